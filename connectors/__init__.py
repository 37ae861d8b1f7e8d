"""Indexes held by other engines. Knows the core, not how models are trained or exported.

Importing this takes neither qdrant-client nor the embedded engine: each is imported when an index is opened.
"""

from .engine import Effort
from .qdrant import QdrantIndex

__all__ = ["Effort", "QdrantIndex"]

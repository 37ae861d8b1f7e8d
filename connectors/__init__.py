"""Indexes held by other engines. Knows the core, not how models are trained or exported.

Importing this takes neither qdrant-client nor the embedded engine: each is imported when an index is opened.
"""

from .engine import Effort
from .place import Qdrant
from .qdrant import QdrantIndex
from .schema import CollectionInfo, CollectionOptions, Words

__all__ = ["CollectionInfo", "CollectionOptions", "Effort", "Qdrant", "QdrantIndex", "Words"]

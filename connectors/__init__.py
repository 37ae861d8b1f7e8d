"""Indexes held by other engines. Knows the core, not how models are trained or exported.

Importing this takes neither qdrant-client nor the embedded engine: each is imported when an index is opened.
"""

from d2llm.deprecated import attributes

from .engine import Effort
from .place import Qdrant
from .qdrant import QdrantIndex
from .schema import Bm25Options, CollectionInfo, CollectionOptions
from .take_over import read_collection

__getattr__ = attributes(__name__, {"Words": (__name__, "Bm25Options")})
__all__ = [
    "Bm25Options", "CollectionInfo", "CollectionOptions", "Effort", "Qdrant", "QdrantIndex", "read_collection",
]  # fmt: skip

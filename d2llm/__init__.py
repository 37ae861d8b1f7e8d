"""Vector search that ranks like a cross-encoder and costs what a bi-encoder costs."""

from d2llm import deprecated
from d2llm.errors import (
    ArgumentError,
    D2LLMError,
    DataError,
    DeviceError,
    ExportError,
    MismatchError,
    MissingExtraError,
    ModelError,
    OutputExistsError,
    StoreError,
)
from d2llm.flat import FlatIndex
from d2llm.index import Index
from d2llm.model import Model, load
from d2llm.search import Searcher, SearchOptions
from d2llm.types import Candidates, Document, Embeddings, Hit

__all__ = [
    "ArgumentError",
    "Candidates",
    "D2LLMError",
    "DataError",
    "DeviceError",
    "Document",
    "Embeddings",
    "ExportError",
    "FlatIndex",
    "Hit",
    "Index",
    "MismatchError",
    "MissingExtraError",
    "Model",
    "ModelError",
    "OutputExistsError",
    "SearchOptions",
    "Searcher",
    "StoreError",
    "load",
]
__version__ = "0.1.0"

deprecated.find_old_modules()

"""A LangChain retriever: in a chain wherever one may stand, sync, async and in batches."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from d2llm.errors import import_extra
from d2llm.search import Searcher
from d2llm.types import Fusion, Hit, Task

from .retrieval import open_searcher, split_hit

import_extra("langchain_core", "langchain")  # what is missing is said with its pip line

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun  # noqa: E402  (after import_extra)
from langchain_core.documents import Document  # noqa: E402  (after import_extra)
from langchain_core.retrievers import BaseRetriever  # noqa: E402  (after import_extra)
from pydantic import ConfigDict  # noqa: E402  (after import_extra)

__all__ = ["D2LLMRetriever"]


class D2LLMRetriever(BaseRetriever):
    """Retrieves with a `d2llm.Searcher`: recall by cosine, then rescoring by the IEM.

    The fields after `searcher` are the arguments of `Searcher.search`. They hold for every call that does not bring its
    own: `retriever.invoke(query, k=3, filter={"lang": "en"})`, or `retriever.bind(k=3)` in a chain.

    A document has the hit's id and text; its metadata are the other fields of the payload, and `score`, `recall_score`
    and `recall_rank`.

    Raises, when called:
        DataError: the query is empty.
        StoreError: the index is empty, cannot be reached, or is in use.
        ArgumentError: `k` or `recall` below 1, `recall` below `k`, a filter of another form, an unknown task.
        TypeError: an argument that `Searcher.search` does not have.
    """

    model_config = ConfigDict(extra="forbid")

    searcher: Searcher
    k: int = 10
    recall: int = 100
    filter: Any = None
    task: Task = "asymmetric"
    rescore: bool = True
    hybrid: Fusion | None = None

    @classmethod
    def from_model(
        cls,
        model: str | PathLike[str],
        collection: str,
        location: str | PathLike[str],
        *,
        model_options: Mapping[str, Any] | None = None,
        index_options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> D2LLMRetriever:
        """A retriever that opens the model folder `model`, and `collection` at `location`, a folder or an address.

        `model_options` go to `d2llm.load`, `index_options` to `QdrantIndex`, `settings` to the retriever.

        Raises:
            ModelError, DeviceError: the model cannot be opened, or not on that device.
            MismatchError, StoreError: the collection is another model's, is missing, in use, or cannot be reached.
        """
        searcher = open_searcher(model, collection, location, model_options, index_options)
        return cls(searcher=searcher, **settings)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return [_document(hit) for hit in self.searcher.search(query, **self._settings(kwargs))]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        return [_document(hit) for hit in await self.searcher.asearch(query, **self._settings(kwargs))]

    def _settings(self, call: Mapping[str, Any]) -> dict[str, Any]:
        names = ("k", "recall", "filter", "task", "rescore", "hybrid")
        return {name: getattr(self, name) for name in names} | dict(call)


def _document(hit: Hit) -> Document:
    text, fields = split_hit(hit)
    return Document(id=hit.id, page_content=text, metadata={**fields, "score": hit.score})

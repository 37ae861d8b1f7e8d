"""A retriever for LangChain: sync, async and in batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, TypeAlias

from d2llm.deprecated import renamed
from d2llm.errors import D2LLMError, import_extra
from d2llm.search import OLD_NAMES, Searcher, SearchOptions
from d2llm.types import Fusion, Hit, StrPath, Task

from .retrieval import open_searcher, split_hit

import_extra("langchain_core", "langchain")  # raises with the pip command to install it

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun  # noqa: E402  (import_extra comes first)
from langchain_core.documents import Document  # noqa: E402  (import_extra comes first)
from langchain_core.retrievers import BaseRetriever  # noqa: E402  (import_extra comes first)
from langchain_core.runnables import RunnableConfig  # noqa: E402  (import_extra comes first)
from pydantic import ConfigDict, model_validator  # noqa: E402  (import_extra comes first)

__all__ = ["D2LLMRetriever"]

Found: TypeAlias = Mapping[str, list[Hit]]
"""The hits of the queries of a batch, which was searched at once."""


class D2LLMRetriever(BaseRetriever):
    """A LangChain retriever that searches with a `d2llm.Searcher`: recall by cosine, then rescoring by the IEM.

    The fields after `searcher` are those of `d2llm.SearchOptions`; a field that is None takes the searcher's own value.
    A call may bring its own: `retriever.invoke(query, k=3, filter={"lang": "en"})`, or `retriever.bind(k=3)` in a
    chain.

    A document has the hit's id and text. Its metadata are the other fields of the payload, and `score`, `recall_score`
    and `recall_rank`; of a long document, whose best passage it is, also `passage` and `start_index`.

    Raises, when called:
        DataError: the query is empty.
        StoreError: the index is empty, cannot be reached, or is in use.
        ArgumentError: an option out of range; see `SearchOptions`.
        TypeError: there is no option of that name.

    Example:
        >>> from d2llm.connectors.langchain import D2LLMRetriever
        >>> retriever = D2LLMRetriever.from_model("model", "kb", "./qdrant", k=3)  # doctest: +SKIP
        >>> retriever.invoke("how long does a refund take?")  # doctest: +SKIP
    """

    model_config = ConfigDict(extra="forbid")

    searcher: Searcher
    k: int | None = None
    candidates: int | None = None
    filter: Any = None
    task: Task | None = None
    rescore: bool | None = None
    hybrid: Fusion | None = None
    bm25_weight: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_new_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        return renamed(values, OLD_NAMES)

    @classmethod
    def from_model(
        cls,
        model: StrPath,
        collection: str,
        location: StrPath,
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

    def batch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Search for all `inputs` at once. Callbacks see one search for each."""
        with suppress(D2LLMError, TypeError):  # one by one, each has its own error
            hits = self.searcher.search_many(inputs, **self._options(kwargs))
            kwargs = {**kwargs, "found": dict(zip(inputs, hits, strict=True))}
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[str],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Search as `batch` does, for an event loop."""
        with suppress(D2LLMError, TypeError):
            hits = await self.searcher.asearch_many(inputs, **self._options(kwargs))
            kwargs = {**kwargs, "found": dict(zip(inputs, hits, strict=True))}
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, found: Found | None = None, **kwargs: Any
    ) -> list[Document]:
        hits = self.searcher.search(query, **self._options(kwargs)) if found is None else found[query]
        return [_document(hit) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, found: Found | None = None, **kwargs: Any
    ) -> list[Document]:
        hits = await self.searcher.asearch(query, **self._options(kwargs)) if found is None else found[query]
        return [_document(hit) for hit in hits]

    def _options(self, call: Mapping[str, Any]) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(SearchOptions)}
        return {name: value for name, value in own.items() if value is not None} | renamed(call, OLD_NAMES)


def _document(hit: Hit) -> Document:
    text, metadata = split_hit(hit)
    if hit.passage is not None:
        metadata["start_index"] = hit.passage.start  # as LangChain's splitters call it
    return Document(id=hit.id, page_content=text, metadata={**metadata, "score": hit.score})

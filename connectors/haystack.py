"""A retriever for Haystack. Pipelines can save it as YAML: it is made from names and settings, and opens model and
index when it is warmed up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Unpack

from d2llm.errors import ArgumentError, import_extra
from d2llm.search import Searcher, SearchKeywords, SearchOptions
from d2llm.types import Hit

from .location import shown
from .retrieval import filter_of, open_searcher, split_hit, unsupported

import_extra("haystack", "haystack")  # raises with the pip command to install it

from haystack import Document, component, default_from_dict, default_to_dict  # noqa: E402  (import_extra comes first)
from haystack.utils import Secret  # noqa: E402  (import_extra comes first)

__all__ = ["D2LLMRetriever"]

API_KEY = Secret.from_env_var("QDRANT_API_KEY", strict=False)


@component
class D2LLMRetriever:
    """A Haystack retriever that searches with a `d2llm.Searcher`: recall by cosine, then rescoring by the IEM.

    A document has the hit's id, text and score. Its meta are the other fields of the payload, `recall_score` and
    `recall_rank`.

    Example:
        >>> from d2llm.connectors.haystack import D2LLMRetriever
        >>> retriever = D2LLMRetriever("model", "kb", "./qdrant", top_k=3, filters={"lang": "en"})
        >>> retriever.run(query="how long does a refund take?")["documents"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str,
        collection: str,
        location: str,
        *,
        top_k: int = 10,
        filters: Mapping[str, Any] | None = None,
        api_key: Secret | None = API_KEY,
        model_options: dict[str, Any] | None = None,
        index_options: dict[str, Any] | None = None,
        **options: Unpack[SearchKeywords],
    ) -> None:
        """Name the model folder `model`, and `collection` at `location`, a folder or an address. Nothing is opened yet.

        `filters` are Haystack's, or a d2llm filter. `api_key` is for a server. `model_options` go to `d2llm.load`,
        `index_options` to `QdrantIndex`. `options` are further fields of `SearchOptions`.

        Raises:
            ArgumentError: filters that a d2llm filter cannot express, an API key among `index_options`, an option
                out of range.
        """
        if "api_key" in (index_options or {}):
            raise ArgumentError(
                "index_options hold an API key, and would be saved with it: pass api_key=Secret.from_env_var(NAME)"
            )
        _own(filters)
        self.model, self.collection, self.location = str(model), collection, str(location)
        self.top_k, self.filters, self.options = top_k, filters, SearchOptions().changed({**options, "k": top_k})
        self.api_key, self.model_options, self.index_options = api_key, model_options, index_options
        self._searcher: Searcher | None = None

    def to_dict(self) -> dict[str, Any]:
        """All settings, as Haystack saves them: for an API key the environment variables, for an address the parts that
        are not secret.

        Raises:
            ArgumentError: `api_key` is a token, which is not saved.
        """
        names = ("model", "collection", "top_k", "filters", "api_key", "model_options", "index_options")
        options = {name: value for name, value in asdict(self.options).items() if name not in ("k", "filter")}
        settings = {name: getattr(self, name) for name in names}
        return default_to_dict(self, location=shown(self.location), **settings, **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> D2LLMRetriever:
        """The component that `to_dict` wrote."""
        return default_from_dict(cls, data)

    def warm_up(self) -> None:
        """Open model and index, if they are not open. A pipeline calls this before its first run.

        Raises:
            ModelError, DeviceError: the model cannot be opened, or not on that device.
            MismatchError, StoreError: the collection is another model's, is missing, in use, or cannot be reached.
        """
        self._opened()

    def close(self) -> None:
        """Close the index, so that another process can open an embedded collection. The next run opens it again."""
        if self._searcher is not None:
            self._searcher.index.close()

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """The best documents for `query`, best first. `filters` and `top_k` replace those of the component.

        Raises:
            DataError: the query is empty.
            StoreError: the index is empty, cannot be reached, or is in use.
            ArgumentError: `top_k` below 1 or above `candidates`; filters that a d2llm filter cannot express.
        """
        return _documents(self._opened().search(query, **self._options(filters, top_k)))

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """`run`, for an event loop."""
        return _documents(await self._opened().asearch(query, **self._options(filters, top_k)))

    def _opened(self) -> Searcher:
        if self._searcher is None:
            key = self.api_key and self.api_key.resolve_value()
            options = {**(self.index_options or {}), "api_key": key}
            self._searcher = open_searcher(self.model, self.collection, self.location, self.model_options, options)
        return self._searcher

    def _options(self, filters: Mapping[str, Any] | None, top_k: int | None) -> dict[str, Any]:
        own = {
            "k": self.top_k if top_k is None else top_k,
            "filter": _own(self.filters if filters is None else filters),
        }
        return asdict(self.options) | own


def _documents(hits: list[Hit]) -> dict[str, list[Document]]:
    documents = []
    for hit in hits:
        text, meta = split_hit(hit)
        if hit.passage is not None:  # as Haystack's splitters call them
            meta |= {"source_id": hit.id, "split_id": hit.passage.number, "split_idx_start": hit.passage.start}
        documents.append(Document(id=hit.id, content=text, meta=meta, score=hit.score))
    return {"documents": documents}


def _own(filters: Any) -> Any:
    """Haystack's filters as a d2llm filter; other filters unchanged."""
    if isinstance(filters, Mapping) and filters.keys() & {"operator", "conditions", "field"}:
        return filter_of(_conditions(filters))
    return filters


def _conditions(filters: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    match filters:
        case {"field": str(field), "operator": str(operator), "value": value}:
            yield _own_name(field), operator, value
        case {"operator": "AND", "conditions": list(conditions)}:
            for condition in conditions:
                yield from _conditions(condition)
        case {"operator": operator, "conditions": _}:
            raise unsupported(operator)
        case _:
            raise ArgumentError(f"filter {filters!r}: expected field, operator and value, or operator and conditions")


def _own_name(name: str) -> str:
    if name in {field.name for field in fields(Document)}:
        raise ArgumentError(f"filter on {name!r}: only a document's meta can be filtered on, as 'meta.NAME'")
    return name.removeprefix("meta.")

"""A retriever for LlamaIndex: for query engines, fusion and routers, sync and async."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from d2llm.deprecated import renamed
from d2llm.errors import import_extra
from d2llm.search import OLD_NAMES, Searcher, SearchKeywords
from d2llm.types import Filter, Hit, StrPath

from .retrieval import filter_of, open_searcher, split_hit, unsupported

import_extra("llama_index.core", "llama-index")  # raises with the pip command to install it

from llama_index.core.retrievers import BaseRetriever  # noqa: E402  (import_extra comes first)
from llama_index.core.schema import (  # noqa: E402  (import_extra comes first)
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores import FilterCondition, MetadataFilters  # noqa: E402  (import_extra comes first)

__all__ = ["D2LLMRetriever"]


class D2LLMRetriever(BaseRetriever):
    """A LlamaIndex retriever that searches with a `d2llm.Searcher`: recall by cosine, then rescoring by the IEM.

    A node has the hit's id, text and score. Its metadata are the other fields of the payload, `recall_score` and
    `recall_rank`; the last two are hidden from LLMs. It searches for the query string of a `QueryBundle`.

    Raises, when called:
        DataError: the query is empty.
        StoreError: the index is empty, cannot be reached, or is in use.
        ArgumentError: an option out of range; see `SearchOptions`.

    Example:
        >>> from d2llm.connectors.llama_index import D2LLMRetriever
        >>> retriever = D2LLMRetriever.from_model("model", "kb", "./qdrant", similarity_top_k=3)  # doctest: +SKIP
        >>> retriever.retrieve("how long does a refund take?")  # doctest: +SKIP
    """

    def __init__(
        self,
        searcher: Searcher,
        similarity_top_k: int | None = None,
        filters: MetadataFilters | Filter | None = None,
        **options: Any,
    ) -> None:
        """Wrap `searcher`. `filters` are LlamaIndex's, or a d2llm filter. `options` are further fields of
        `SearchOptions`, or arguments of LlamaIndex's `BaseRetriever`; what is not given is the searcher's own.

        Raises:
            ArgumentError: LlamaIndex's filters with an operator or condition that a d2llm filter cannot express.
        """
        names = {*SearchKeywords.__annotations__, *OLD_NAMES}
        super().__init__(**{name: value for name, value in options.items() if name not in names})
        self.searcher = searcher
        self._options = {name: value for name, value in renamed(options, OLD_NAMES).items() if name in names}
        self._options |= {} if similarity_top_k is None else {"k": similarity_top_k}
        if filters is not None:
            own = filter_of(_conditions(filters)) if isinstance(filters, MetadataFilters) else filters
            self._options["filter"] = own

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
        return cls(open_searcher(model, collection, location, model_options, index_options), **settings)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in self.searcher.search(query_bundle.query_str, **self._options)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in await self.searcher.asearch(query_bundle.query_str, **self._options)]


def _node(hit: Hit) -> NodeWithScore:
    text, fields = split_hit(hit)
    hidden = ["recall_score", "recall_rank", "passage"]
    place: dict[str, Any] = {}
    if hit.passage is not None:
        place = {"start_char_idx": hit.passage.start, "end_char_idx": hit.passage.end}
        place["relationships"] = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.id)}
    node = TextNode(
        id_=hit.id,
        text=text,
        metadata=fields,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
        **place,
    )
    return NodeWithScore(node=node, score=hit.score)


def _conditions(filters: MetadataFilters) -> Iterator[tuple[str, str, Any]]:
    if filters.condition != FilterCondition.AND:
        raise unsupported(filters.condition and filters.condition.value)
    for filter in filters.filters:
        if isinstance(filter, MetadataFilters):
            yield from _conditions(filter)
        else:
            yield filter.key, filter.operator.value, filter.value

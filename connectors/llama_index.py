"""A LlamaIndex retriever: for query engines, fusion and routers, sync and async."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from d2llm.errors import import_extra
from d2llm.search import Searcher
from d2llm.types import Filter, Fusion, Hit, Task

from .retrieval import filter_of, open_searcher, split_hit, unsupported

import_extra("llama_index.core", "llama-index")  # what is missing is said with its pip line

from llama_index.core.retrievers import BaseRetriever  # noqa: E402  (after import_extra)
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode  # noqa: E402  (after import_extra)
from llama_index.core.vector_stores import FilterCondition, MetadataFilters  # noqa: E402  (after import_extra)

__all__ = ["D2LLMRetriever"]


class D2LLMRetriever(BaseRetriever):
    """Retrieves with a `d2llm.Searcher`: recall by cosine, then rescoring by the IEM.

    A node has the hit's id, text and score; its metadata are the other fields of the payload, and `recall_score` and
    `recall_rank`, which are shown to no LLM. Of a `QueryBundle` the query string is searched for.

    Raises, when called:
        DataError: the query is empty.
        StoreError: the index is empty, cannot be reached, or is in use.
        ArgumentError: `similarity_top_k` or `recall` below 1, `recall` below `similarity_top_k`, an unknown task.
    """

    def __init__(
        self,
        searcher: Searcher,
        similarity_top_k: int = 10,
        filters: MetadataFilters | Filter | None = None,
        *,
        recall: int = 100,
        task: Task = "asymmetric",
        rescore: bool = True,
        hybrid: Fusion | None = None,
        **base: Any,
    ) -> None:
        """Wrap `searcher`, whose `search` has the same arguments. `filters` are LlamaIndex's, or a d2llm filter; `base`
        goes to `BaseRetriever`.

        Raises:
            ArgumentError: LlamaIndex's filters with an operator or condition that a d2llm filter cannot express.
        """
        super().__init__(**base)
        filter = filter_of(_conditions(filters)) if isinstance(filters, MetadataFilters) else filters
        self.searcher = searcher
        self._settings: dict[str, Any] = dict(
            k=similarity_top_k, recall=recall, filter=filter, task=task, rescore=rescore, hybrid=hybrid
        )

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
        return cls(open_searcher(model, collection, location, model_options, index_options), **settings)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in self.searcher.search(query_bundle.query_str, **self._settings)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [_node(hit) for hit in await self.searcher.asearch(query_bundle.query_str, **self._settings)]


def _node(hit: Hit) -> NodeWithScore:
    text, fields = split_hit(hit)
    hidden = ["recall_score", "recall_rank"]
    node = TextNode(
        id_=hit.id,
        text=text,
        metadata=fields,
        excluded_llm_metadata_keys=hidden,
        excluded_embed_metadata_keys=hidden,
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

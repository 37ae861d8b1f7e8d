"""The adapters in real chains of their frameworks, over a real model and embedded Qdrant, against `Searcher.search`."""
# ruff: noqa: E402  (what is set and asked for before the imports must come before them)

import asyncio
import importlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from passages import QUERY, TEXTS

import d2llm
from d2llm.connectors import QdrantIndex
from d2llm.errors import ArgumentError, DataError, MissingExtraError, StoreError
from d2llm.types import Document, Hit

for framework in ("langchain_core", "llama_index.core", "haystack"):
    pytest.importorskip(framework)

import haystack
from haystack import Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.joiners import DocumentJoiner
from haystack.components.retrievers.types import TextRetriever
from haystack.core.errors import DeserializationError, PipelineRuntimeError
from haystack.utils import Secret
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document as LangChainDocument
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import QueryFusionRetriever
from llama_index.core.schema import MetadataMode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from d2llm.connectors.haystack import D2LLMRetriever as HaystackRetriever
from d2llm.connectors.langchain import D2LLMRetriever as LangChainRetriever
from d2llm.connectors.llama_index import D2LLMRetriever as LlamaIndexRetriever

DOCUMENTS = [
    Document(id_, text, id_.title(), {"year": 2018 + i, "tag": ["even" if i % 2 == 0 else "odd", "doc"], "std": i != 3})
    for i, (id_, text) in enumerate(TEXTS.items())
]
WITH_WORDS: dict[str, Any] = {"bm25": {}}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    asked: list[object] = []

    def refuse(*arguments: object) -> None:
        asked.append(arguments)
        raise OSError("no network in these tests")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    yield
    assert asked == []


@pytest.fixture(scope="module")
def searcher(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[d2llm.Searcher]:
    with QdrantIndex("docs", tmp_path_factory.mktemp("qdrant"), options=WITH_WORDS) as index:
        index.add(model, DOCUMENTS)
        yield d2llm.Searcher(model, index)


@pytest.fixture(scope="module")
def place(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded collection `docs` that nobody holds open."""
    folder = tmp_path_factory.mktemp("closed")
    with QdrantIndex("docs", folder, options=WITH_WORDS) as index:
        index.add(model, DOCUMENTS)
    return folder


def ids(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def said(hits: list[Hit]) -> str:
    """What the prompts below make of these hits."""
    return "".join(f"[{TEXTS[hit.id]}]" for hit in hits)


def check_fields(found: dict[str, Any], hit: Hit, **scores: float) -> None:
    """That `found` are the fields of `hit` beside its text, with those of recall, and with `scores`."""
    scores["recall_score"] = hit.recall_score
    assert {name: found[name] for name in scores} == pytest.approx(scores, abs=1e-5)
    own = {name: value for name, value in hit.payload.items() if name != "text"}
    assert {name: value for name, value in found.items() if name not in scores} == own | {
        "recall_rank": hit.recall_rank
    }


# ---- LangChain ----


def chain_of(retriever: Any) -> Any:
    """Retrieval-augmented generation, with a model that repeats one answer; the prompt is kept beside it."""

    def format_documents(documents: list[LangChainDocument]) -> str:
        return "".join(f"[{document.page_content}]" for document in documents)

    prompt = ChatPromptTemplate.from_template("{context}{question}")
    answer = prompt | {
        "answer": FakeListChatModel(responses=["Use join."]) | StrOutputParser(),
        "prompt": lambda value: value.to_string().removeprefix("Human: "),
    }
    return {"context": retriever | format_documents, "question": RunnablePassthrough()} | answer


def test_a_langchain_chain_reads_what_the_searcher_finds(searcher: d2llm.Searcher) -> None:
    chain = chain_of(LangChainRetriever(searcher=searcher, k=4, candidates=6))
    queries = [QUERY, "wait a moment", "parse text with a pattern"]
    expected = [
        {"answer": "Use join.", "prompt": said(searcher.search(query, 4, candidates=6)) + query} for query in queries
    ]
    assert chain.invoke(QUERY) == expected[0]
    assert chain.batch(queries) == expected
    assert asyncio.run(chain.ainvoke(QUERY)) == expected[0]
    assert asyncio.run(chain.abatch(queries)) == expected


def test_a_langchain_batch_is_one_search_and_each_query_has_its_own_error(
    searcher: d2llm.Searcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = LangChainRetriever(searcher=searcher, k=2)
    queries, seen = [QUERY, "wait a moment", QUERY], list[int]()
    expected = [ids(searcher.search(query, 2)) for query in queries]
    recall_many = searcher.index.recall_many

    def recorded(vectors: Any, *arguments: Any, **named: Any) -> Any:
        seen.append(len(vectors))
        return recall_many(vectors, *arguments, **named)

    monkeypatch.setattr(searcher.index, "recall_many", recorded)
    found = retriever.batch(queries)
    assert [[document.id for document in documents] for documents in found] == expected and seen == [3]
    started = []

    class Recorder(BaseCallbackHandler):
        def on_retriever_start(self, serialized: Any, query: str, **given: Any) -> None:
            started.append(query)

    retriever.batch(queries, {"callbacks": [Recorder()]})
    assert sorted(started) == sorted(queries)
    with pytest.raises(DataError, match="query is empty"):
        retriever.batch([QUERY, " "])
    one, other = retriever.batch([QUERY, " "], return_exceptions=True)
    assert [document.id for document in one] == expected[0] and isinstance(other, DataError)


def test_a_langchain_document_has_the_hits_fields(searcher: d2llm.Searcher) -> None:
    hit = searcher.search(QUERY, 1, candidates=8)[0]
    document = LangChainRetriever(searcher=searcher, candidates=8, k=1).invoke(QUERY)[0]
    assert (document.id, document.page_content) == (hit.id, TEXTS[hit.id])
    check_fields(document.metadata, hit, score=hit.score)


def test_langchain_settings_are_the_searchers_and_a_call_may_bring_its_own(searcher: d2llm.Searcher) -> None:
    even: dict[str, Any] = {"k": 3, "candidates": 8, "filter": {"tag": "even"}, "task": "symmetric", "rescore": False}
    expected = ids(searcher.search(QUERY, **even))
    assert expected != ids(searcher.search(QUERY, 3, candidates=8))
    plain = LangChainRetriever(searcher=searcher)
    for documents in (
        LangChainRetriever(searcher=searcher, **even).invoke(QUERY),
        plain.invoke(QUERY, **even),
        plain.bind(**even).invoke(QUERY),
        asyncio.run(plain.ainvoke(QUERY, **even)),
        plain.batch([QUERY], **even)[0],
    ):
        assert [document.id for document in documents] == expected
    unfiltered = LangChainRetriever(searcher=searcher, **even).invoke(QUERY, filter=None)
    assert unfiltered == plain.invoke(QUERY, k=3, candidates=8, task="symmetric", rescore=False)


def test_a_langchain_chain_is_configured_by_its_fields(searcher: d2llm.Searcher) -> None:
    fields = {"k": ConfigurableField(id="k"), "filter": ConfigurableField(id="filter")}
    chain = chain_of(LangChainRetriever(searcher=searcher, candidates=8).configurable_fields(**fields))
    expected = searcher.search(QUERY, 2, candidates=8, filter={"year": {"gte": 2021}})
    found = chain.invoke(QUERY, {"configurable": {"k": 2, "filter": {"year": {"gte": 2021}}}})
    assert found["prompt"] == said(expected) + QUERY


def test_langchain_callbacks_see_the_search(searcher: d2llm.Searcher) -> None:
    seen: list[tuple[Any, ...]] = []

    class Recorder(BaseCallbackHandler):
        def on_retriever_start(self, serialized: Any, query: str, **given: Any) -> None:
            seen.append((query, given["tags"], given["metadata"]["team"]))

        def on_retriever_end(self, documents: Any, **given: Any) -> None:
            seen.append(tuple(document.id for document in documents))

        def on_retriever_error(self, error: BaseException, **given: Any) -> None:
            seen.append((type(error),))

    retriever = LangChainRetriever(searcher=searcher, k=2, tags=["docs"], metadata={"team": "search"})
    retriever.invoke(QUERY, {"callbacks": [Recorder()]})
    with pytest.raises(DataError, match="query is empty"):
        retriever.invoke(" ", {"callbacks": [Recorder()]})
    found = tuple(ids(searcher.search(QUERY, 2)))
    assert seen == [(QUERY, ["docs"], "search"), found, (" ", ["docs"], "search"), (DataError,)]


def test_langchain_says_what_is_wrong(searcher: d2llm.Searcher) -> None:
    retriever = LangChainRetriever(searcher=searcher)
    with pytest.raises(DataError, match="query is empty"):
        chain_of(retriever).invoke("  ")
    with pytest.raises(DataError, match="query is empty"):
        asyncio.run(retriever.ainvoke(""))
    with pytest.raises(ValueError, match="k=200, candidates=100"):
        retriever.invoke(QUERY, k=200)
    with pytest.raises(ValueError, match=r"filter on 'year'.*gte"):
        retriever.invoke(QUERY, filter={"year": {"above": 3}})
    with pytest.raises(TypeError, match="top_k"):
        retriever.invoke(QUERY, top_k=3)
    with pytest.raises(ValueError, match=r"top_k\n.*not permitted"):
        LangChainRetriever(searcher=searcher, top_k=3)


# ---- LlamaIndex ----


def test_a_llama_index_query_engine_answers_from_what_the_searcher_finds(searcher: d2llm.Searcher) -> None:
    hits = searcher.search(QUERY, 5, candidates=8)
    cutoff = (hits[2].score + hits[3].score) / 2
    engine = RetrieverQueryEngine.from_args(
        LlamaIndexRetriever(searcher, 5, candidates=8),
        llm=MockLLM(),  # answers with its prompt
        node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=cutoff)],
    )
    for response in (engine.query(QUERY), asyncio.run(engine.aquery(QUERY))):
        nodes = response.source_nodes
        assert [(node.node_id, node.text) for node in nodes] == [(hit.id, TEXTS[hit.id]) for hit in hits[:3]]
        assert [node.score for node in nodes] == pytest.approx([hit.score for hit in hits[:3]], abs=1e-5)
        positions = [str(response).index(TEXTS[hit.id]) for hit in hits[:3]]
        assert positions == sorted(positions) and TEXTS[hits[3].id] not in str(response)
        assert "year: " in str(response) and "recall_score" not in str(response)


def test_a_llama_index_node_has_the_hits_fields(searcher: d2llm.Searcher) -> None:
    hit = searcher.search(QUERY, 1, candidates=8)[0]
    node = LlamaIndexRetriever(searcher, 1, candidates=8).retrieve(QUERY)[0]
    check_fields(node.metadata, hit)
    assert "recall" not in node.node.get_metadata_str(MetadataMode.LLM)
    assert "recall" not in node.node.get_metadata_str(MetadataMode.EMBED)


def test_a_llama_index_retriever_takes_part_in_fusion(searcher: d2llm.Searcher) -> None:
    retrievers = [LlamaIndexRetriever(searcher, 4), LlamaIndexRetriever(searcher, 4, rescore=False)]
    fusion = QueryFusionRetriever(retrievers, llm=MockLLM(), num_queries=1, similarity_top_k=8, use_async=False)
    both = set(ids(searcher.search(QUERY, 4))) | set(ids(searcher.search(QUERY, 4, rescore=False)))
    assert {node.node_id for node in fusion.retrieve(QUERY)} == both


def metadata_filters(*filters: MetadataFilter | MetadataFilters) -> MetadataFilters:
    return MetadataFilters(filters=list(filters))


YEAR = MetadataFilter(key="year", value=2020, operator=FilterOperator.GTE)
LLAMA_FILTERS: dict[str, tuple[MetadataFilter | MetadataFilters, dict[str, Any]]] = {
    "equal": (MetadataFilter(key="year", value=2020), {"year": 2020}),
    "in numbers": (MetadataFilter(key="year", value=[2019, 2021], operator=FilterOperator.IN), {"year": [2019, 2021]}),
    "in texts": (MetadataFilter(key="tag", value=["odd", "x"], operator=FilterOperator.IN), {"tag": ["odd", "x"]}),
    "bounds": (
        metadata_filters(YEAR, MetadataFilter(key="year", value=2023, operator=FilterOperator.LT)),
        {"year": {"gte": 2020, "lt": 2023}},
    ),
    "nested": (
        metadata_filters(YEAR, metadata_filters(MetadataFilter(key="tag", value="odd"))),
        {"year": {"gte": 2020}, "tag": "odd"},
    ),
}


@pytest.mark.parametrize("name", LLAMA_FILTERS)
def test_llama_index_filters_mean_what_d2llms_do(searcher: d2llm.Searcher, name: str) -> None:
    theirs, ours = LLAMA_FILTERS[name]
    expected = ids(searcher.search(QUERY, 8, candidates=8, filter=ours))
    assert 0 < len(expected) < 8
    for given in (metadata_filters(theirs), ours):
        nodes = LlamaIndexRetriever(searcher, 8, given, candidates=8).retrieve(QUERY)
        assert [node.node_id for node in nodes] == expected


@pytest.mark.parametrize("operator", ["!=", "nin", "any", "all", "text_match", "contains", "is_empty"])
def test_llama_index_operators_without_a_translation_are_named(searcher: d2llm.Searcher, operator: str) -> None:
    value: Any = ["odd"] if operator in ("nin", "any", "all") else "odd"
    filters = metadata_filters(MetadataFilter(key="tag", value=value, operator=FilterOperator(operator)))
    with pytest.raises(ArgumentError, match=rf"filter operator '{operator}': d2llm knows ==, in.*filter what was"):
        LlamaIndexRetriever(searcher, filters=filters)


@pytest.mark.parametrize("condition", [*(one for one in FilterCondition if one != FilterCondition.AND), None])
def test_llama_index_conditions_other_than_and_are_named(
    searcher: d2llm.Searcher, condition: FilterCondition | None
) -> None:
    name = repr(condition and condition.value)
    with pytest.raises(ArgumentError, match=f"filter operator {name}: d2llm knows"):
        LlamaIndexRetriever(searcher, filters=MetadataFilters(filters=[YEAR], condition=condition))


def test_llama_index_says_what_is_wrong(searcher: d2llm.Searcher) -> None:
    with pytest.raises(DataError, match="query is empty"):
        LlamaIndexRetriever(searcher).retrieve(" ")
    with pytest.raises(DataError, match="query is empty"):
        asyncio.run(LlamaIndexRetriever(searcher).aretrieve(""))
    with pytest.raises(ValueError, match="k=200, candidates=100"):
        LlamaIndexRetriever(searcher, 200).retrieve(QUERY)
    with pytest.raises(TypeError, match="top_k"):
        LlamaIndexRetriever(searcher, top_k=3)
    with pytest.raises(ValueError, match=r"filter on 'year': \{'gte': 2020\} and 2020: give one condition"):
        LlamaIndexRetriever(searcher, filters=metadata_filters(YEAR, MetadataFilter(key="year", value=2020)))
    with pytest.raises(ValueError, match=r"filter on 'year'.*give one condition, or bounds of different kinds"):
        LlamaIndexRetriever(searcher, filters=metadata_filters(YEAR, YEAR))
    with pytest.raises(ValueError, match=r"filter on 'year': '==' with \[2020\]: 'in' takes a list"):
        LlamaIndexRetriever(searcher, filters=metadata_filters(MetadataFilter(key="year", value=[2020])))
    with pytest.raises(ValueError, match=r"filter on 'year': \{'gt': 'x'\} is neither"):
        text = MetadataFilter(key="year", value="x", operator=FilterOperator.GT)
        LlamaIndexRetriever(searcher, filters=metadata_filters(text))


# ---- Haystack ----

TEMPLATE = "{% for document in documents %}[{{ document.content }}]{% endfor %}{{ question }}"


@pytest.fixture
def retriever(model_folder: Path, place: Path) -> Iterator[HaystackRetriever]:
    component = HaystackRetriever(str(model_folder), "docs", str(place), top_k=4, candidates=8)
    yield component
    component.close()


def pipeline_of(retriever: HaystackRetriever) -> Pipeline:
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("joiner", DocumentJoiner(sort_by_score=True))
    pipeline.add_component("prompt", PromptBuilder(TEMPLATE, required_variables="*"))
    pipeline.connect("retriever", "joiner")
    pipeline.connect("joiner", "prompt.documents")
    return pipeline


def asked(query: str, **given: Any) -> dict[str, Any]:
    return {"retriever": {"query": query, **given}, "prompt": {"question": query}}


def test_a_haystack_pipeline_reads_what_the_searcher_finds(
    searcher: d2llm.Searcher, retriever: HaystackRetriever
) -> None:
    pipeline = pipeline_of(retriever)
    expected = said(searcher.search(QUERY, 4, candidates=8)) + QUERY
    assert pipeline.run(asked(QUERY))["prompt"]["prompt"] == expected
    assert asyncio.run(pipeline.run_async(asked(QUERY)))["prompt"]["prompt"] == expected
    few = searcher.search(QUERY, 2, candidates=8, filter={"tag": "even"})
    condition = {"field": "meta.tag", "operator": "==", "value": "even"}
    found = pipeline.run(asked(QUERY, top_k=2, filters=condition))
    assert found["prompt"]["prompt"] == said(few) + QUERY


def test_a_saved_haystack_pipeline_runs_the_same(model_folder: Path, place: Path) -> None:
    filters = {"operator": "AND", "conditions": [{"field": "meta.year", "operator": ">=", "value": 2020}]}
    component = HaystackRetriever(
        str(model_folder), "docs", str(place), top_k=3, filters=filters, candidates=7, task="symmetric", rescore=False,
        hybrid=None, api_key=Secret.from_env_var("KEY", strict=False), model_options={"threads": 1},
        index_options={"hnsw_ef": 200},
    )  # fmt: skip
    pipeline = pipeline_of(component)
    before = pipeline.run(asked(QUERY), include_outputs_from={"retriever"})
    text = pipeline.dumps()
    pipeline.close()
    loaded = Pipeline.loads(text, allowed_modules=["d2llm.*"])
    assert loaded.to_dict()["components"] == pipeline.to_dict()["components"]
    try:
        assert loaded.run(asked(QUERY), include_outputs_from={"retriever"}) == before
    finally:
        loaded.close()
    assert len(before["retriever"]["documents"]) == 3
    with pytest.raises(DeserializationError, match=r"'d2llm\.connectors\.haystack': the module is not on the trusted"):
        Pipeline.loads(text)


def test_a_haystack_component_saves_all_its_settings_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "s3cret")
    component = HaystackRetriever("model", "docs", "http://user:s3cret@qdrant:6333")
    saved = component.to_dict()
    assert saved == {
        "type": "d2llm.connectors.haystack.D2LLMRetriever",
        "init_parameters": {
            "model": "model", "collection": "docs", "location": "http://qdrant:6333", "top_k": 10, "filters": None,
            "candidates": 100, "task": "asymmetric", "rescore": True, "hybrid": None, "bm25_weight": None,
            "model_options": None, "index_options": None,
            "api_key": {"type": "env_var", "env_vars": ["QDRANT_API_KEY"], "strict": False},
        },
    }  # fmt: skip
    assert HaystackRetriever.from_dict(saved).to_dict() == saved
    with pytest.raises(ValueError, match="token-based secret"):
        HaystackRetriever("model", "docs", "place", api_key=Secret.from_token("s3cret")).to_dict()
    with pytest.raises(ValueError, match=r"would be saved with it: pass api_key=Secret\.from_env_var"):
        HaystackRetriever("model", "docs", "place", index_options={"api_key": "s3cret"})


def test_a_haystack_document_has_the_hits_fields(searcher: d2llm.Searcher, retriever: HaystackRetriever) -> None:
    text_retriever: TextRetriever = retriever
    documents: list[haystack.Document] = text_retriever.run(QUERY)["documents"]
    hits = searcher.search(QUERY, 4, candidates=8)
    assert [(one.id, one.content) for one in documents] == [(hit.id, TEXTS[hit.id]) for hit in hits]
    assert [one.score for one in documents] == pytest.approx([hit.score for hit in hits], abs=1e-5)
    for document, hit in zip(documents, hits, strict=True):
        check_fields(document.meta, hit)


def test_a_haystack_component_opens_when_warmed_up_once_and_closes(
    model: d2llm.Model, model_folder: Path, place: Path
) -> None:
    component = HaystackRetriever(str(model_folder), "docs", str(place), top_k=2)
    with QdrantIndex("docs", place) as index:  # nothing is held yet
        assert index.count() == len(TEXTS)
    component.warm_up()
    with pytest.raises(StoreError, match="in use"):
        QdrantIndex("docs", place).open_for(model.config, create=False)
    component.warm_up()
    first = component.run(QUERY)
    component.close()
    with QdrantIndex("docs", place) as index:
        assert index.count() == len(TEXTS)
    assert component.run(QUERY) == first
    component.close()


HAYSTACK_FILTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal": ({"field": "meta.year", "operator": "==", "value": 2020}, {"year": 2020}),
    "boolean": ({"field": "meta.std", "operator": "==", "value": False}, {"std": False}),
    "without meta": ({"field": "year", "operator": "<=", "value": 2020}, {"year": {"lte": 2020}}),
    "in": ({"field": "meta.year", "operator": "in", "value": [2019, 2021]}, {"year": [2019, 2021]}),
    "bounds": (
        {
            "operator": "AND",
            "conditions": [
                {"field": "meta.year", "operator": ">", "value": 2019},
                {"operator": "AND", "conditions": [{"field": "meta.year", "operator": "<", "value": 2023}]},
                {"field": "meta.tag", "operator": "==", "value": "odd"},
            ],
        },
        {"year": {"gt": 2019, "lt": 2023}, "tag": "odd"},
    ),
}


@pytest.mark.parametrize("name", HAYSTACK_FILTERS)
def test_haystack_filters_mean_what_d2llms_do(
    searcher: d2llm.Searcher, retriever: HaystackRetriever, name: str
) -> None:
    theirs, ours = HAYSTACK_FILTERS[name]
    expected = ids(searcher.search(QUERY, 8, candidates=8, filter=ours))
    assert 0 < len(expected) < 8
    for filters in (theirs, ours):
        assert [one.id for one in retriever.run(QUERY, filters, 8)["documents"]] == expected


BAD_FILTERS: dict[str, tuple[dict[str, Any], str]] = {
    "not in": ({"field": "meta.year", "operator": "not in", "value": [1]}, "filter operator 'not in': d2llm knows"),
    "!=": ({"field": "meta.year", "operator": "!=", "value": 1}, "filter operator '!=': .*filter what was retrieved"),
    "OR": ({"operator": "OR", "conditions": []}, "filter operator 'OR': d2llm knows"),
    "NOT": (
        {"operator": "AND", "conditions": [{"operator": "NOT", "conditions": []}]},
        "filter operator 'NOT': d2llm knows",
    ),
    "no operator": ({"field": "meta.year", "value": 3}, r"filter \{'field': 'meta.year'.*expected field, operator"),
    "no value": ({"field": "meta.year", "operator": "=="}, "expected field, operator and value"),
    "no conditions": ({"operator": "AND"}, "or operator and conditions"),
    "no field": ({"operator": "==", "value": 3}, "expected field, operator and value"),
    "no mapping": ({"operator": "AND", "conditions": ["year"]}, "filter 'year': expected field"),
    "date": ({"field": "meta.year", "operator": ">", "value": "2020-01-01"}, "filter on 'year': .* is neither"),
    "attribute": ({"field": "id", "operator": "==", "value": "join"}, "filter on 'id': .*as 'meta.NAME'"),
    "list": ({"field": "meta.tag", "operator": "==", "value": ["odd"]}, "'in' takes a list, '==' one value"),
    "d2llm's": ({"year": {"above": 3}}, "filter on 'year'.*gte"),
}


@pytest.mark.parametrize("name", BAD_FILTERS)
def test_haystack_filters_without_a_translation_are_named(retriever: HaystackRetriever, name: str) -> None:
    filters, message = BAD_FILTERS[name]
    with pytest.raises(ValueError, match=message):
        retriever.run(QUERY, filters)


def test_haystack_says_what_is_wrong(
    retriever: HaystackRetriever, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where a pipeline that fails makes a folder
    pipeline = pipeline_of(retriever)
    with pytest.raises(PipelineRuntimeError, match="query is empty"):
        pipeline.run(asked(" "))
    with pytest.raises(PipelineRuntimeError, match="query is empty"):
        asyncio.run(pipeline.run_async(asked("")))
    with pytest.raises(PipelineRuntimeError, match="k=20, candidates=8"):
        pipeline.run(asked(QUERY, top_k=20))
    with pytest.raises(ArgumentError, match="filter operator 'OR'"):
        HaystackRetriever("model", "docs", "place", filters={"operator": "OR", "conditions": []})


# ---- all of them ----


def test_retrievers_are_made_from_a_model_folder(searcher: d2llm.Searcher, model_folder: Path, place: Path) -> None:
    options: dict[str, Any] = {"model_options": {"threads": 1}, "index_options": {"hnsw_ef": 200}, "candidates": 8}
    expected = ids(searcher.search(QUERY, 3, candidates=8))
    chained = LangChainRetriever.from_model(model_folder, "docs", place, k=3, **options)
    with chained.searcher.index:
        assert [document.id for document in chained.invoke(QUERY)] == expected
    llama = LlamaIndexRetriever.from_model(model_folder, "docs", place, similarity_top_k=3, **options)
    with llama.searcher.index:
        assert [node.node_id for node in llama.retrieve(QUERY)] == expected


def test_recall_goes_by_words_too_if_it_is_told_to(searcher: d2llm.Searcher, model_folder: Path, place: Path) -> None:
    settings: dict[str, Any] = {"candidates": 8, "rescore": False, "hybrid": "rrf"}
    query = "wait in place"  # one passage has one of the words: no two have the same sum of ranks
    expected = ids(searcher.search(query, 5, **settings))
    assert expected != ids(searcher.search(query, 5, candidates=8, rescore=False))
    documents = LangChainRetriever(searcher=searcher, k=5, **settings).invoke(query)
    assert [document.id for document in documents] == expected
    nodes = LlamaIndexRetriever(searcher, 5, **settings).retrieve(query)
    assert [node.node_id for node in nodes] == expected
    component = HaystackRetriever(str(model_folder), "docs", str(place), top_k=5, **settings)
    found = component.run(query)["documents"]
    component.close()
    assert [document.id for document in found] == expected


def test_a_missing_collection_is_named(model_folder: Path, tmp_path: Path) -> None:
    component = HaystackRetriever(str(model_folder), "docs", str(tmp_path))
    for attempt in (
        lambda: LangChainRetriever.from_model(model_folder, "docs", tmp_path),
        lambda: LlamaIndexRetriever.from_model(model_folder, "docs", tmp_path),
        component.warm_up,
        lambda: component.run(QUERY),
    ):
        with pytest.raises(StoreError, match=r"no collection 'docs' at .*d2llm index"):
            attempt()


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [("langchain", "langchain_core", "langchain"), ("llama_index", "llama_index", "llama-index"),
     ("haystack", "haystack", "haystack")],
)  # fmt: skip
def test_a_missing_framework_is_named_with_its_pip_line(
    monkeypatch: pytest.MonkeyPatch, module: str, library: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name == library or name.startswith(library + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"d2llm.connectors.{module}")
    with pytest.raises(MissingExtraError, match=rf"pip install 'd2llm\[{extra}\]'"):
        importlib.import_module(f"d2llm.connectors.{module}")


def test_the_connectors_import_no_framework() -> None:
    code = (
        "import sys, d2llm.connectors; "
        "print([m for m in ('langchain_core', 'llama_index', 'haystack') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- long documents ----


def test_each_framework_gets_the_best_passage_and_its_place(
    model: d2llm.Model, model_folder: Path, tmp_path: Path
) -> None:
    text = "# Paths\n\n" + "Paths are joined. " * 90 + "\n\n# Waiting\n\n" + "The process sleeps for seconds. " * 60
    with QdrantIndex("docs", tmp_path / "qdrant") as index:
        index.add(model, [Document("files", text), *DOCUMENTS])
        searcher = d2llm.Searcher(model, index)
        question = "how long does the process sleep?"
        hit = next(hit for hit in searcher.search(question) if hit.id == "files")
        assert hit.passage is not None and "sleeps" in hit.payload["text"]
        start, end = hit.passage.start, hit.passage.end

        of_langchain = next(d for d in LangChainRetriever(searcher=searcher).invoke(question) if d.id == "files")
        assert of_langchain.page_content == text[start:end] and of_langchain.metadata["start_index"] == start
        assert of_langchain.metadata["passage"]["of"] == hit.passage.of

        node = next(n.node for n in LlamaIndexRetriever(searcher).retrieve(question) if n.node.node_id == "files")
        assert (node.start_char_idx, node.end_char_idx) == (start, end)
        assert node.source_node is not None and node.source_node.node_id == "files"
        assert "passage" not in node.get_content(metadata_mode=MetadataMode.LLM)
    haystack_retriever = HaystackRetriever(str(model_folder), "docs", str(tmp_path / "qdrant"))
    document = next(d for d in haystack_retriever.run(question)["documents"] if d.id == "files")
    haystack_retriever.close()
    assert document.content == text[start:end]
    found = {name: document.meta[name] for name in ("source_id", "split_id", "split_idx_start")}
    assert found == {"source_id": "files", "split_id": hit.passage.number, "split_idx_start": start}

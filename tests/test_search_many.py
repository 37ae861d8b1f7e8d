"""Searches for many queries at once: the hits are those of one search after another."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from passages import TEXTS

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

from qdrant_places import CONFIG, PLACES, E, assert_same, make_points, place_of, query_vector
from qdrant_server import QdrantServer

import d2llm
from d2llm import search
from d2llm.cli import main
from d2llm.errors import DataError, MismatchError, StoreError
from d2llm.index import Index
from d2llm.search import Explanation, Searcher
from d2llm.types import Document, Hit

QUERIES = [
    "join path segments",
    "wait some seconds",
    "the errno ENOENT",
    "the",  # a stop word alone, which BM25 does not recall by
    "parse text with a pattern " * 30,  # longer than the limit
    "join path segments",
    "seconds",
]
SECTIONS = [f"Part {name}: wait for some {name} seconds, then join path number {n}.\n\n" * 8
            for n, name in enumerate(["red", "long", "open", "safe", "next", "last", "cold", "many"])]  # fmt: skip
LONG = Document("long", "".join(SECTIONS), payload={"length": 9})


def fill(index: Index, model: d2llm.Model) -> Index:
    texts = [Document(id_, text, payload={"length": len(text)}) for id_, text in TEXTS.items()]
    assert index.add(model, [*texts, LONG]).split == 1
    return index


@pytest.fixture(scope="module", params=["flat", *PLACES])
def searcher(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: d2llm.Model
) -> Iterator[Searcher]:
    if request.param == "flat":
        yield Searcher(model, fill(d2llm.FlatIndex(), model))
        return
    with place_of(request.param, tmp_path_factory.mktemp("many")) as place:
        yield Searcher(model, fill(place(options={"bm25": {"average_words": 8.0}}), model))


def assert_same_hits(found: list[list[Hit]], expected: list[list[Hit]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [(hit.id, hit.recall_rank, hit.passage) for hit in one] == [
            (hit.id, hit.recall_rank, hit.passage) for hit in other
        ]
        assert [hit.payload for hit in one] == [hit.payload for hit in other]
        for name in ("score", "recall_score"):
            np.testing.assert_allclose(
                [getattr(hit, name) for hit in one], [getattr(hit, name) for hit in other], rtol=1e-4, atol=1e-4
            )


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filter": {"filter": {"length": {"lt": 55}}},
    "nothing passes": {"filter": {"length": -1}},
    "no rescoring": {"rescore": False},
    "symmetric": {"task": "symmetric"},
    "one candidate": {"k": 1, "candidates": 1},
    "more candidates for k documents": {"k": 3, "candidates": 3},
    "rrf": {"hybrid": "rrf", "bm25_weight": 0.3},
    "dbsf": {"hybrid": "dbsf", "filter": {"length": {"lt": 55}}, "bm25_weight": 0.3},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("at_a_time", [search.BATCH, 12], ids=["at once", "in batches"])
def test_the_hits_are_those_of_one_search_after_another(
    searcher: Searcher, name: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"k": 4, "candidates": 6, **VARIANTS[name]}
    if "hybrid" in options and isinstance(searcher.index, d2llm.FlatIndex):
        with pytest.raises(MismatchError, match="flat index has no BM25 vectors"):
            searcher.search_many(QUERIES, **options)
        return
    monkeypatch.setattr(search, "BATCH", at_a_time)
    expected = [searcher.search(query, **options) for query in QUERIES]
    assert_same_hits(searcher.search_many(QUERIES, **options), expected)
    assert_same_hits(asyncio.run(searcher.asearch_many(QUERIES, **options)), expected)


def test_queries_whose_filter_leaves_different_numbers_of_candidates(model: d2llm.Model) -> None:
    """A hybrid search and one by cosine fetch different numbers, and so do documents of many passages."""
    index = d2llm.FlatIndex()
    index.add(model, [LONG, {"_id": "mode", "text": "Return the most common data point."}])
    searcher = Searcher(model, index)
    queries = ["wait some seconds", "the most common data point"]
    found = searcher.explain_many(queries, 2, candidates=2)
    expected = [searcher.explain(query, 2, candidates=2) for query in queries]
    assert [one.candidates for one in found] == [one.candidates for one in expected]
    assert len({one.candidates for one in found}) == 2
    assert_same_hits([one.hits for one in found], [one.hits for one in expected])


def test_an_explanation_of_each_query(searcher: Searcher) -> None:
    found = searcher.explain_many(QUERIES, 2, candidates=5, reasons=True)
    assert found[0].seconds.keys() == {"tokenise", "encode", "recall", "rescore"}
    assert all(one.seconds == found[0].seconds for one in found), "they waited for one another"
    expected = [searcher.explain(query, 2, candidates=5, reasons=True) for query in QUERIES]
    for one, other in zip(found, expected, strict=True):
        assert (one.candidates, one.truncated) == (other.candidates, other.truncated)
        assert scores_of(one) == pytest.approx(scores_of(other), rel=1e-4, abs=1e-4)
    assert [one.truncated for one in found] == [len(query) > 100 for query in QUERIES]
    awaited = asyncio.run(searcher.aexplain_many(QUERIES, 2, candidates=5, reasons=True))
    assert [[*scores_of(one)] for one in awaited] == [[*scores_of(one)] for one in found]


def scores_of(explanation: Explanation) -> dict[str, float]:
    assert explanation.reasons is not None
    return {
        f"{row} {reason.hit.id} {name}": value
        for row, reason in enumerate(explanation.reasons.candidates)
        for name, value in reason.parts.items()
    }


def test_queries_of_a_server_travel_at_once(model: d2llm.Model, tmp_path: Path) -> None:
    with place_of("grpc", tmp_path) as place:
        searcher = Searcher(model, fill(place(options={"bm25": {"average_words": 8.0}}), model))
        server = place.server
        assert server is not None
        before = len(server.requests)
        searcher.search_many(QUERIES, 3, candidates=20, hybrid="rrf")
        (request,) = server.requests[before:]
        assert request.operation == "query_batch_points"


def test_none_one_or_wrong_queries(searcher: Searcher, model: d2llm.Model) -> None:
    assert searcher.search_many([]) == []
    assert asyncio.run(searcher.asearch_many([])) == []
    assert_same_hits(searcher.search_many(QUERIES[:1], 3), [searcher.search(QUERIES[0], 3)])
    with pytest.raises(TypeError, match=r"expected a list of queries, found a single string: pass \['wait'\]"):
        searcher.search_many("wait")
    with pytest.raises(TypeError, match="query 2 of 2: expected one query as a string, found 3"):
        searcher.search_many(["wait", 3])  # type: ignore[list-item]  # the wrong type is what is tested
    with pytest.raises(DataError, match=r"query 3 of 3: the query is empty \(' '\)"):
        searcher.search_many(["a", "b", " "])
    with pytest.raises(ValueError, match="k=0"):
        searcher.search_many(QUERIES, 0)
    empty = d2llm.FlatIndex()
    empty.open_for(model.config)
    with pytest.raises(StoreError, match="index is empty: add documents first"):
        Searcher(model, empty).search_many(QUERIES)


def test_recall_of_many_is_recall_of_each(server_or_folder: Index) -> None:
    vectors = np.stack([query_vector(seed) for seed in range(5)])
    for condition in (None, {"lang": "en"}):
        expected = [server_or_folder.recall(vector, 7, filter=condition) for vector in vectors]
        for found in (
            server_or_folder.recall_many(vectors, 7, filter=condition),
            asyncio.run(server_or_folder.arecall_many(vectors, 7, filter=condition)),
            Index.recall_many(server_or_folder, vectors, 7, filter=condition),
        ):
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other)
    assert server_or_folder.recall_many(np.empty((0, E), np.float32), 7) == []
    with pytest.raises(ValueError, match="one text for each vector, found 1 for 5"):
        Index.recall_many(server_or_folder, vectors, 7, query_texts=["a"])


@pytest.fixture(params=["flat", *PLACES])
def server_or_folder(request: pytest.FixtureRequest, tmp_path: Path, shared_server: QdrantServer) -> Iterator[Index]:
    if request.param == "flat":
        index: Index = d2llm.FlatIndex()
        index.open_for(CONFIG)
        index.upsert(make_points())
        yield index
        return
    with place_of(request.param, tmp_path, shared_server) as place:
        index = place()
        index.open_for(CONFIG)
        index.upsert(make_points())
        yield index


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server"), version="1.20.0") as server:
        yield server


# ---- d2llm search --queries ----


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_file_of_queries_gives_a_run_or_lines_of_json(model_folder: Path, tmp_path: Path) -> None:
    corpus, place = tmp_path / "corpus.jsonl", ("--qdrant", tmp_path / "qdrant", "--collection", "docs")
    corpus.write_text("".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in TEXTS.items()))
    assert run("index", model_folder, corpus, *place).exit_code == 0
    queries = tmp_path / "queries.jsonl"
    texts = {"q1": "join path segments", "q2": "wait some seconds", "q3": "word " * 200}
    queries.write_text("".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in texts.items()))
    one = {
        id_: json.loads(run("search", model_folder, text, *place, "--k", "3", "--json").stdout)["hits"]
        for id_, text in texts.items()
    }
    many = run("search", model_folder, "--queries", queries, *place, "--k", "3", "--json")
    assert many.exit_code == 0 and "1 of 3 queries are longer than" in many.stderr
    found = [json.loads(line) for line in many.stdout.splitlines()]
    assert [(row["id"], row["query"]) for row in found] == list(texts.items())
    assert [[hit["id"] for hit in row["hits"]] for row in found] == [
        [hit["id"] for hit in hits] for hits in one.values()
    ]

    lines = run("search", model_folder, "--queries", queries, *place, "--k", "3").stdout.splitlines()
    ranked = [(id_, rank, hit) for id_, hits in one.items() for rank, hit in enumerate(hits, 1)]
    for line, (id_, rank, hit) in zip(lines, ranked, strict=True):
        assert line.split()[:4] == [id_, "Q0", hit["id"], str(rank)] and line.split()[5] == "d2llm"
        assert float(line.split()[4]) == pytest.approx(hit["score"], rel=1e-4)

    log = tmp_path / "log.txt"
    log.write_text("join path segments\n\nwait some seconds\n")
    numbered = [
        json.loads(line) for line in run("search", model_folder, "--queries", log, *place, "--json").stdout.splitlines()
    ]
    assert [(row["id"], row["query"]) for row in numbered] == [("1", "join path segments"), ("3", "wait some seconds")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either one QUERY, or a file of queries (--queries)"),
        (("a question", "--queries", "queries"), "give either one QUERY, or a file of queries (--queries)"),
        (("--queries", "queries", "--explain"), "--explain is for one QUERY"),
        (("--queries", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--queries", "empty.jsonl"), "empty.jsonl: no queries"),
    ],
)
def test_wrong_queries_are_named_before_the_work(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text('{"_id": "q1", "text": " "}\n')
    refused = run("search", "no-model", *arguments, "--qdrant", "qdrant", "--collection", "docs")
    assert refused.exit_code in (1, 2) and message in " ".join(refused.stderr.split())

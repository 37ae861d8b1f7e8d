"""How hard to search: measured on an embedded collection large enough for an HNSW graph, with a flat index as truth."""

import json
import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import d2llm
from d2llm.beir import read_qrels
from d2llm.cli import main
from d2llm.connectors import Effort, QdrantIndex
from d2llm.connectors.engine import OVERSAMPLING, search_effort
from d2llm.connectors.tune import (
    DEPTH,
    WEIGHTS,
    Bm25Figures,
    Bm25Table,
    EffortFigures,
    EffortTable,
    Latency,
    OverfetchFigures,
    OverfetchTable,
    Suggestion,
    Tuning,
    measure_bm25,
    measure_effort,
    measure_overfetch,
)
from d2llm.corpus import read_queries
from d2llm.errors import MismatchError, StoreError
from d2llm.flat import FlatIndex
from d2llm.folder import ModelConfig, SmallEncoderInfo, read_config, write_config
from d2llm.search import BM25_WEIGHT, add_bm25
from d2llm.types import Document, Embeddings, Floats, Point

pytest.importorskip("qdrant_edge")

N, Q, LIMIT = 7000, 24, 10  # 7000 vectors of 384 are just over the 10 MB from which the engine makes a graph
QUESTIONS = ["how to join two paths", "wait for some seconds", "the middle of sorted numbers", "shuffle a list"]


def unit_vectors(n: int, width: int, seed: int) -> Floats:
    """Random ones: of all data the hardest for a graph."""
    vectors = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


@pytest.fixture(scope="module")
def points(model: d2llm.Model) -> list[Point]:
    vectors = unit_vectors(N, model.config.embedding_dim, 0)
    features = np.random.default_rng(1).integers(256, size=(N, model.config.feature_bytes), dtype=np.uint8)
    return [Point(str(i), vectors[i], features[i], {"text": f"text {i}"}, "") for i in range(N)]


@pytest.fixture(scope="module")
def flat(model: d2llm.Model, points: list[Point]) -> FlatIndex:
    flat = FlatIndex()
    flat.open_for(model.config)
    flat.upsert(points)
    return flat


@pytest.fixture(scope="module")
def qdrant(model: d2llm.Model, points: list[Point], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the collection `docs`, indexed."""
    folder = tmp_path_factory.mktemp("tune") / "qdrant"
    with QdrantIndex("docs", folder) as index:
        index.open_for(model.config)
        index.upsert(points)
        index.optimize()
    return folder


@pytest.fixture
def index(qdrant: Path) -> Iterator[QdrantIndex]:
    index = QdrantIndex("docs", qdrant)
    with index:
        assert index.has_graph()
        yield index


@pytest.fixture(scope="module")
def queries(model: d2llm.Model) -> Embeddings:
    features = model.encode_query([f"a text of number {i}" for i in range(Q)]).features
    return Embeddings(unit_vectors(Q, model.config.embedding_dim, 3), features)


# ---- effort ----


def test_exact_search_is_the_flat_indexs(index: QdrantIndex, flat: FlatIndex, queries: Embeddings) -> None:
    for vector in queries.vectors:
        found, expected = index.recall(vector, 50, effort=Effort(exact=True)), flat.recall(vector, 50)
        assert found.ids == expected.ids
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


def test_more_effort_finds_more(qdrant: Path, flat: FlatIndex, queries: Embeddings) -> None:
    def found(hnsw_ef: int | None) -> list[list[str]]:
        with QdrantIndex("docs", qdrant, hnsw_ef=hnsw_ef) as index:
            return [index.recall(vector, LIMIT).ids for vector in queries.vectors]

    exact = [set(flat.recall(vector, LIMIT).ids) for vector in queries.vectors]
    least = int(OVERSAMPLING * LIMIT)
    efforts = (1, least, 200, N)
    found_by = {effort: found(effort) for effort in efforts}
    hits = [sum(len(exact[q] & set(found_by[effort][q])) for q in range(Q)) for effort in efforts]
    assert hits[0] == hits[1] < hits[2] < hits[3] == Q * LIMIT
    assert found_by[1] == found_by[least], "the engine keeps in view what it is to compare by full vectors"
    assert found(None) == found(search_effort(LIMIT))


def test_an_effort_of_less_than_one_node_is_refused() -> None:
    with pytest.raises(ValueError, match="hnsw_ef must be at least 1, found -3"):
        Effort(-3)


# ---- what is measured ----


def test_recall_is_the_share_of_the_exact_nearest(index: QdrantIndex, flat: FlatIndex, queries: Embeddings) -> None:
    table = measure_effort(index, queries.vectors, LIMIT)
    assert [one.hnsw_ef for one in table.figures] == [20, 40, 80, 128, 160]
    assert table.default == table.of_default.hnsw_ef == 128
    for one in table.figures:
        shares = []
        for vector in queries.vectors:
            exact = flat.recall(vector, LIMIT).ids
            found = index.recall(vector, LIMIT, effort=Effort(one.hnsw_ef)).ids
            shares.append(sum(id_ in found for id_ in exact) / LIMIT)
        assert one.recall == pytest.approx(sum(shares) / Q)
        place = 0.05 * (Q - 1)  # between two queries, from the worst on
        low, high = sorted(shares)[int(place)], sorted(shares)[int(place) + 1]
        assert one.worst == pytest.approx(low + (place - int(place)) * (high - low))
        assert 0 < one.ms.p50 <= one.ms.p95
    assert table.figures[0].recall < table.figures[-1].recall


def test_overfetching_is_measured_against_the_full_encoders_hits(
    model: d2llm.Model, index: QdrantIndex, flat: FlatIndex, queries: Embeddings
) -> None:
    limit = 30
    noise = np.random.default_rng(4)
    vectors = queries.vectors + 0.02 * noise.standard_normal(queries.vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    small = Embeddings(vectors, queries.features + 0.1)

    def search(encoded: Embeddings, q: int, number: int) -> tuple[list[str], list[str]]:
        """Candidates and top hits by comparing everything."""
        candidates = flat.recall(encoded.vectors[q], number)
        scores = model.score(encoded.features[[q]], candidates.features[None], candidates.scores[None])[0]
        best = sorted(range(number), key=lambda i: -scores[i])[:DEPTH]
        return candidates.ids, [candidates.ids[i] for i in best]

    table = measure_overfetch(index, model, queries, small, limit, hnsw_ef=N)
    assert table.hnsw_ef == N
    assert [one.candidates for one in table.figures] == [30, 38, 45, 60, 90]
    for one in table.figures:
        held = shared = 0
        for q in range(Q):
            truth = search(queries, q, limit)[1]
            candidates, hits = search(small, q, one.candidates)
            held += len(set(truth) & set(candidates))
            shared += len(set(truth) & set(hits))
        assert one.held == pytest.approx(held / (Q * DEPTH))
        assert one.overlap == pytest.approx(shared / (Q * DEPTH))
    assert table.figures[0].held < table.figures[-1].held <= 1


def test_the_full_encoder_holds_its_own_hits(model: d2llm.Model, index: QdrantIndex, queries: Embeddings) -> None:
    first = measure_overfetch(index, model, queries, queries, LIMIT, hnsw_ef=N).figures[0]
    assert (first.candidates, first.held, first.overlap) == (LIMIT, 1.0, 1.0)


def test_nothing_is_measured_on_an_empty_index(model: d2llm.Model, queries: Embeddings, tmp_path: Path) -> None:
    index = QdrantIndex("empty", tmp_path)
    with index:
        index.open_for(model.config)
        with pytest.raises(StoreError, match="the index is empty: add documents first"):
            measure_effort(index, queries.vectors, LIMIT)
        with pytest.raises(StoreError, match="the index is empty: add documents first"):
            measure_overfetch(index, model, queries, queries, LIMIT)


def test_vectors_of_another_width_are_refused(index: QdrantIndex) -> None:
    with pytest.raises(MismatchError, match="vectors of 384 dimensions, the query has shape"):
        measure_effort(index, np.ones((2, 5), np.float32), LIMIT)


# ---- words ----

PARTS = "fan pump valve hinge filter".split()
ABOUT = "price colour weight smell history noise shape cost owner cleaning sale".split()
CODES = [f"x{731 + 17 * i}q{953 - 29 * i}" for i in range(12)]
FILLER = " ".join(["again"] * 130)
"""More than the model reads of a passage: what comes behind it, words alone find."""


@pytest.fixture(scope="module")
def worded(model: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the collection `docs`, which keeps words: a passage for each part of each machine."""
    folder = tmp_path_factory.mktemp("tune") / "worded"
    with QdrantIndex("docs", folder, options={"bm25": {"average_words": 134}}) as index:
        named = zip(product(CODES, PARTS), cycle(ABOUT), strict=False)
        index.add(model, (Document(f"{c} {part}", f"{about} of a {part} {FILLER} {c}") for (c, part), about in named),
                  chunk=False)  # fmt: skip
    return folder


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, Path]:
    """Queries that name a part and a machine, and what is right; two are not judged."""
    queries = {f"q{i}": f"{code} {part}" for i, (code, part) in enumerate(product(CODES[:3], PARTS))}
    lines = [f"{id_}\t{text}\t1" for id_, text in queries.items()]
    rows = {**queries, "x": "not judged", "y": "not judged either"}
    (file := tmp_path / "asked.jsonl").write_text(
        "".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in rows.items())
    )
    (qrels := tmp_path / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return file, qrels


def test_words_are_weighed_by_the_ndcg_of_the_searches_that_would_be_made(
    model: d2llm.Model, worded: Path, judged: tuple[Path, Path]
) -> None:
    qrels = read_qrels(judged[1])
    queries = {id_: text for id_, text in read_queries(judged[0]).items() if id_ in qrels}
    with QdrantIndex("docs", worded) as index:
        table = measure_bm25(index, model, queries, model.encode_query(list(queries.values())), qrels, 20)
        assert [one.weight for one in table.figures] == list(WEIGHTS) and table.queries == len(queries) == 15
        means = {}
        for weight in (*WEIGHTS, None):
            searcher = d2llm.Searcher(model, index, bm25_weight=weight)
            gains = []
            for id_, text in queries.items():  # one passage is right: its nDCG is the discount of its place
                found = [hit.id for hit in searcher.search(text, candidates=20, hybrid="rrf")]
                right = next(iter(qrels[id_]))
                gains.append(1 / math.log2(found.index(right) + 2) if right in found else 0.0)
            means[weight] = sum(gains) / len(gains)
        assert table.default == 0, "the score has words"
        assert means.pop(None) == means[table.default], "the default is that of searches"
    for one in table.figures:
        assert one.ndcg_10 == pytest.approx(means[one.weight], abs=1e-6)
        assert one.difference == pytest.approx(means[one.weight] - means[table.default], abs=1e-6)
        assert one.low <= one.difference <= one.high
    assert means[2.0] > means[0.0], "for the test to tell weights apart, words must help"
    assert table.best.ndcg_10 == pytest.approx(max(means.values()))
    assert table.suggestion == (table.best.weight if table.best.low > 0 else None)


def test_words_are_weighed_without_the_document_that_is_the_query(model: d2llm.Model, worded: Path) -> None:
    queries = {f"{code} fan": f"fan {code}" for code in CODES[:3]}
    qrels = {query: {query.replace("fan", "pump"): 1} for query in queries}
    agreed = next(iter(queries))
    qrels[agreed] = {agreed: 1}  # it is judged relevant to itself, and stays
    encoded, limit = model.encode_query(list(queries.values())), len(CODES) * len(PARTS) - 1
    gains: dict[float, list[float]] = {weight: [] for weight in WEIGHTS}
    with QdrantIndex("docs", worded) as index:
        table = measure_bm25(index, model, queries, encoded, qrels, limit)
        for row, (id_, text) in enumerate(queries.items()):
            found = index.recall(encoded.vectors[row], limit + (id_ != agreed), query_text=text)
            kept = [place for place, other in enumerate(found.ids) if other != id_ or id_ == agreed]
            assert len(kept) == limit and found.bm25_scores is not None
            iem = model.score(encoded.features[[row]], found.features[kept][None], found.scores[kept][None])[0]
            for weight in WEIGHTS:
                ranked = [
                    found.ids[kept[i]]
                    for i in np.argsort(-add_bm25(iem, found.bm25_scores[kept], weight), kind="stable")
                ]
                place = ranked.index(next(iter(qrels[id_])))
                gains[weight].append(1 / math.log2(place + 2) if place < 10 else 0.0)
    assert {one.weight: one.ndcg_10 for one in table.figures} == pytest.approx(
        {weight: sum(values) / len(values) for weight, values in gains.items()}, abs=1e-6
    )


def test_words_that_may_be_better_by_chance_are_not_suggested() -> None:
    default, better = Bm25Figures(BM25_WEIGHT, 0.5, 0.0, 0.0, 0.0), Bm25Figures(0.3, 0.52, 0.02, 0.001, 0.04)
    doubtful = replace(better, low=-0.001)
    assert Bm25Table([default, better], 9, BM25_WEIGHT).suggestion == 0.3
    assert Bm25Table([default, doubtful], 9, BM25_WEIGHT).suggestion is None
    assert Bm25Table([default, replace(better, ndcg_10=0.4)], 9, BM25_WEIGHT).suggestion is None


def test_the_weight_of_words_is_suggested_to_people_and_programs(
    model_folder: Path, worded: Path, judged: tuple[Path, Path]
) -> None:
    asked = ("tune", model_folder, "--queries", judged[0], "--qrels", judged[1], "--qdrant", worded,
             "--collection", "docs", "--candidates", "20")  # fmt: skip
    found = json.loads(cli(*asked, "--json").stdout)
    assert found["queries"] == found["bm25"]["queries"] == 15, "those that are judged"
    assert [one["weight"] for one in found["bm25"]["figures"]] == list(WEIGHTS)
    best = max(found["bm25"]["figures"], key=lambda one: one["ndcg_10"])
    assert best["low"] > 0, "for the test to see a suggestion"
    assert found["suggestions"]["bm25_weight"] == best["weight"]

    shown = cli(*asked).stdout
    assert "15 judged queries" in shown and "0.0 (default)" in shown
    assert f"{best['weight']} is the best here, by +" in shown
    command = next(line for line in shown.splitlines() if "--bm25-weight" in line)
    typed = shlex.split(command.replace("your question", f"{CODES[5]} pump"))
    again = cli(*typed[1:], "--json")
    assert json.loads(again.stdout)["hits"][0]["id"] == f"{CODES[5]} pump"


def test_words_that_cannot_be_weighed_are_refused(
    model_folder: Path, worded: Path, qdrant: Path, judged: tuple[Path, Path], tmp_path: Path
) -> None:
    header = "query-id\tcorpus-id\tscore\n"
    (strangers := tmp_path / "strangers.tsv").write_text(f"{header}nobody\tx731q953 fan\t1\n")
    (elsewhere := tmp_path / "elsewhere.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\tno such\t1\nq1\tnor this\t1\n"
    )
    (alone := tmp_path / "alone.tsv").write_text(f"{header}q0\tx731q953 fan\t1\n")
    (numbers := tmp_path / "numbers.tsv").write_text(f"{header}q0\t17\t1\nq1\t18\t1\n")
    for file, location, message in (
        (numbers, qdrant, "has no BM25 vectors for hybrid searches. Copy it with them: d2llm collection migrate"),
        (strangers, worded, "strangers.tsv has a relevant document for none of the 17 queries"),
        (elsewhere, worded, "none of the 2 documents judged is in the collection, such as 'no such'"),
        (alone, worded, "two or more judged queries, found 1"),
        (tmp_path / "absent.tsv", worded, "absent.tsv: no such file"),
    ):
        refused = cli("tune", model_folder, "--queries", judged[0], "--qrels", file, "--qdrant", location,
                      "--collection", "docs")  # fmt: skip
        assert refused.exit_code == 1 and not refused.stdout and message in refused.stderr


# ---- what is suggested ----

MS = Latency(1.0, 2.0)
EFFORTS = EffortTable([EffortFigures(ef, recall, 0.5, MS) for ef, recall in ((200, 0.9), (400, 0.97), (800, 0.99))],
                      400, MS)  # fmt: skip
FETCHED = OverfetchTable([OverfetchFigures(n, held, 0.5, MS) for n, held in ((100, 0.9), (150, 0.98), (200, 0.98))],
                         800)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "graph", "full", "small"),
    [
        (0.85, True, Suggestion(200, 100, True), Suggestion(800, 100, True)),
        (0.95, True, Suggestion(None, 100, True), Suggestion(800, 150, True)),  # the default need not be set
        (0.985, True, Suggestion(800, 100, True), Suggestion(800, 150, False)),  # none holds as much: the cheapest best
        (0.999, True, Suggestion(800, 100, False), Suggestion(800, 150, False)),
        (0.95, False, Suggestion(None, 100, True), Suggestion(800, 150, True)),
    ],
)
def test_the_cheapest_setting_that_reaches_the_target_is_suggested(
    target: float, graph: bool, full: Suggestion, small: Suggestion
) -> None:
    tuning = Tuning(10_000, graph, 50, 100, target, {"full": EFFORTS, "small": EFFORTS}, FETCHED)
    assert (tuning.suggest("full"), tuning.suggest("small")) == (full, small)


# ---- the command ----


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "queries.jsonl"
    file.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(QUESTIONS)))
    return file


@pytest.fixture(scope="module")
def with_small(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_folder` with a second query encoder: the same graph, but it reads each query behind another prompt."""
    folder = tmp_path_factory.mktemp("models") / "with-small"
    shutil.copytree(model_folder, folder)
    shutil.copy(folder / "encoder.onnx", folder / "query_encoder.onnx")
    config = read_config(folder)
    small = SmallEncoderInfo(
        kind="layers", precision="fp32", parameters=1, query_prompt="please ", query_max_length=32, probe=config.probe
    )
    write_config(folder, replace(config, query_encoder=small))
    return folder


def asking(qdrant: Path) -> list[str | Path]:
    """Options for ten candidates from the collection docs."""
    return ["--qdrant", qdrant, "--collection", "docs", "--candidates", "10"]


def test_figures_and_suggestion_as_json(model_folder: Path, qdrant: Path, questions: Path) -> None:
    asked = ["tune", model_folder, "--queries", questions, *asking(qdrant)]
    shown = cli(*asked, "--json")
    assert shown.exit_code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert shown.stdout.count("\n") == 1 and not shown.stderr
    assert (found["passages"], found["graph"], found["queries"], found["candidates"]) == (N, True, 4, 10)
    assert found["overfetch"] is None and list(found["efforts"]) == list(found["suggestions"]) == ["full"]
    figures = found["efforts"]["full"]["figures"]
    assert [one["hnsw_ef"] for one in figures] == [20, 40, 80, 128, 160]
    assert set(figures[0]) == {"hnsw_ef", "recall", "worst", "ms"} and set(figures[0]["ms"]) == {"p50", "p95"}
    best = max(figures, key=lambda one: one["recall"])
    assert best["recall"] < 0.99, "random vectors are that hard"
    assert found["suggestions"]["full"] == {"hnsw_ef": best["hnsw_ef"], "candidates": 10, "reached": False}
    assert json.loads(cli(*asked, "--sample", "2", "--json").stdout)["queries"] == 2


def test_queries_come_as_a_text_file_or_a_beir_folder(
    model_folder: Path, qdrant: Path, questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "log.txt").write_text("\n".join(QUESTIONS))
    (tmp_path / "beir").mkdir()
    shutil.copy(questions, tmp_path / "beir" / "queries.jsonl")
    place = ("--qdrant", qdrant, "--collection", "docs", "--candidates", "10", "--json")
    expected, *found = (
        [one["recall"] for one in json.loads(shown.stdout)["efforts"]["full"]["figures"]]
        for shown in (cli("tune", model_folder, "--queries", source, *place)
                      for source in (questions, tmp_path / "log.txt", tmp_path / "beir"))
    )  # fmt: skip
    assert found == [expected] * 2
    (tmp_path / "dev.tsv").write_text("1\t1\t1\n")
    refused = cli("tune", model_folder, "--queries", tmp_path / "log.txt", "--qrels", tmp_path / "dev.tsv", *place)
    assert refused.exit_code == 1 and 'log.txt:1: expected an "_id"' in refused.stderr


def test_people_get_a_table_a_sentence_and_lines_that_work(model_folder: Path, qdrant: Path, questions: Path) -> None:
    place = ("--qdrant", str(qdrant), "--collection", "docs")
    asked = ("tune", model_folder, "--queries", questions, *place, "--candidates", "10")
    missed = cli(*asked).stdout
    assert "7,000 passages, 4 queries, the nearest 10; target 0.99" in missed
    rows = [line.split()[:2] for line in missed.splitlines()]
    assert [row[0] for row in rows if row and row[0].isdecimal()] == ["20", "40", "80", "128", "160"]
    assert ["128", "(default)"] in rows and ["exact", "search"] in rows
    assert "No hnsw_ef here reaches 0.99. The best is 160" in missed and "Exact search takes" in missed
    assert "For the full query encoder, the best that there is:" in missed

    reached = cli(*asked, "--target", "0.01").stdout
    assert "20 is the smallest hnsw_ef here that reaches 0.01" in reached and "ms against the default" in reached
    search, code = [line.strip() for line in reached.splitlines()[-2:]]
    typed = shlex.split(search)
    assert typed[:3] == ["d2llm", "search", str(model_folder)] and typed[-4:] == [
        "--candidates",
        "10",
        "--hnsw-ef",
        "20",
    ]
    assert cli(*typed[1:]).exit_code == 0
    with ExitStack() as opened:
        names: dict[str, Any] = {
            "d2llm": d2llm,
            "Searcher": d2llm.Searcher,
            "QdrantIndex": lambda *place, **options: opened.enter_context(QdrantIndex(*place, **options)),
            "query": QUESTIONS[0],
        }
        assert len(eval(code, names)) == 10
    assert "hnsw_ef=20" in code


def test_a_small_query_encoder_is_measured_beside_the_full_one(with_small: Path, qdrant: Path, questions: Path) -> None:
    asked = ["tune", with_small, "--queries", questions, *asking(qdrant)]
    found = json.loads(cli(*asked, "--json").stdout)
    assert list(found["efforts"]) == list(found["suggestions"]) == ["full", "small"]
    full, small = ([one["recall"] for one in found["efforts"][name]["figures"]] for name in ("full", "small"))
    assert full != small, "each with its own vectors"
    assert [one["candidates"] for one in found["overfetch"]["figures"]] == [10, 13, 15, 20, 30]
    assert found["overfetch"]["hnsw_ef"] == found["suggestions"]["small"]["hnsw_ef"]
    assert found["overfetch"]["figures"][0]["held"] < 1

    shown = cli(*asked, "--target", "0.01").stdout
    assert "Full query encoder" in shown and "Small query encoder" in shown
    assert "The fewest candidates here that reach 0.01: 10 hold" in shown
    lines = [line.strip() for line in shown.splitlines() if line.startswith("  ")]
    full_command, full_python, small_command, _ = lines
    assert full_command.endswith("--candidates 10 --hnsw-ef 20 --query-encoder full")
    assert "query_encoder='full'" in full_python
    assert small_command.endswith("--candidates 10 --hnsw-ef 20"), "the command searches with the small one"
    assert len(json.loads(cli(*shlex.split(full_command)[1:], "--json").stdout)["hits"]) == 10


def test_a_collection_without_a_graph_has_nothing_to_tune(
    model: d2llm.Model, model_folder: Path, points: list[Point], questions: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "qdrant"
    asked = ("tune", model_folder, "--queries", questions, "--qdrant", folder, "--collection", "docs")

    def fill(number: int, name: str = "docs", **more: Any) -> None:
        with QdrantIndex(name, folder, **more) as index:
            index.open_for(model.config)
            index.upsert(points[:number])

    fill(50)
    few = cli(*asked).stdout
    assert "Every search fetches all of them, whatever hnsw_ef is" in few
    small = cli(*asked, "--candidates", "10").stdout
    assert "There is no graph yet" in small and "from 6,667 passages of this width" in small
    assert "hnsw-ef" not in small, "there is no line to type"
    fill(50, "halves", options={"datatype": "float16"})
    assert "from 13,334 passages of this width" in cli(*asked[:-1], "halves", "--candidates", "10").stdout
    fill(N)
    unbuilt = cli(*asked, "--candidates", "10").stdout
    assert "Build it with QdrantIndex.optimize(), or wait until the server has" in unbuilt
    found = json.loads(cli(*asked, "--candidates", "10", "--json").stdout)
    assert not found["graph"] and found["suggestions"]["full"] == {"hnsw_ef": None, "candidates": 10, "reached": True}


def test_what_is_wrong_is_named(model_folder: Path, qdrant: Path, questions: Path, tmp_path: Path) -> None:
    (empty := tmp_path / "empty.jsonl").write_text("")
    with QdrantIndex("other", tmp_path) as index:
        index.open_for(ModelConfig(embedding_dim=384, feature_bytes=5, precision="fp32", fingerprint="fedcba"))
    unreachable = "http://127.0.0.1:1"
    for source, location, collection, message in (
        (tmp_path / "absent.jsonl", qdrant, "docs", "absent.jsonl: no such file"),
        (empty, qdrant, "docs", "empty.jsonl: no queries"),
        (questions, qdrant, "absent", "no collection 'absent'"),
        (questions, tmp_path, "other", "was made with passage encoder fedcba"),
        (questions, unreachable, "docs", f"cannot reach Qdrant at {unreachable}"),
    ):
        refused = cli("tune", model_folder, "--queries", source, "--qdrant", location, "--collection", collection)
        assert refused.exit_code == 1 and not refused.stdout, message
        assert message in refused.stderr and "Traceback" not in refused.output
    for option, value in (("--target", "0"), ("--target", "1.1"), ("--candidates", "0"), ("--sample", "0")):
        asked = ("tune", model_folder, "--queries", questions, "--qdrant", qdrant, "--collection", "docs")
        refused = cli(*asked, option, value)
        assert refused.exit_code == 2 and option in refused.stderr
    assert cli("search", model_folder, "q", "--qdrant", qdrant, "--collection", "docs", "--hnsw-ef", "0").exit_code == 2

"""Recall by vectors and words together: what the engines answer is what slow references in plain Python say."""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import passages
import pytest
from fusion_references import dbsf, rrf, with_words

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

import qdrant_edge
from qdrant_client import models
from qdrant_places import CONFIG, PLACES, Place, make_points, place_of, query_vector
from qdrant_server import QdrantServer

import d2llm
from d2llm.connectors import Bm25Options, QdrantIndex
from d2llm.errors import MismatchError
from d2llm.filters import matches
from d2llm.flat import FlatIndex
from d2llm.search import Searcher, add_bm25, rank
from d2llm.types import Candidates, Document, Filter, Floats, Fusion, Point

WORDS = Bm25Options(k=0.9, b=0.4, average_words=20.0)
VOCABULARY = (
    "river mountain castle bread engine violin harbour lantern copper winter meadow thunder bridge candle forest "
    "marble pepper rocket saddle temple"
).split()
FUSIONS: tuple[Fusion, ...] = ("rrf", "dbsf")
QUERIES = ("castle", "river mountains", "a violin in the winter forest", "rocket rocket pepper unheardof")


def make_texts(n: int = 60) -> list[str]:
    """Texts of different lengths, with and without a title, so that no two have the same score; the last five have no
    words."""
    rng = np.random.default_rng(3)
    likely = np.arange(1, len(VOCABULARY) + 1) / sum(range(1, len(VOCABULARY) + 1))
    texts = [" ".join(rng.choice(VOCABULARY, size=2 * length + 2, p=likely)) for length in range(n)]
    return [*texts, "", "the", "of", ".", "and so"]


def make_documents() -> list[Point]:
    texts = make_texts()
    points = make_points(len(texts))
    return [
        replace(point, payload={**point.payload, "text": text, **({"title": "Winter"} if i % 9 == 0 else {})})
        for i, (point, text) in enumerate(zip(points, texts, strict=True))
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server"), version="1.20.0") as server:
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, server) as place:
        yield place


@pytest.fixture(scope="module", params=PLACES)
def index(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: QdrantServer
) -> Iterator[QdrantIndex]:
    with place_of(request.param, tmp_path_factory.mktemp("hybrid"), server) as place:
        index = place(options={"bm25": WORDS})
        index.open_for(CONFIG)
        index.upsert(make_documents())
        yield index


# ---- the references ----


class Reference:
    """BM25 as the engine weighs it: its own saturated counts, and Qdrant's idf, ln(1 + (N - n + 0.5) / (n + 0.5)) of N
    documents with any word at all, whether they pass a filter or not."""

    def __init__(self, points: Sequence[Point], words: Bm25Options = WORDS) -> None:
        self._bm25 = qdrant_edge.Bm25(
            qdrant_edge.Bm25Config(language=words.language, k=words.k, b=words.b, avg_len=words.average_words)
        )
        self._points = points
        self._weights = {}
        for point in points:
            found = self._bm25.embed_document(f"{point.payload.get('title', '')} {point.payload['text']}")
            self._weights[point.id] = dict(zip(found.indices, found.values, strict=True))

    def by_words(self, query: str, limit: int, filter: Filter | None = None) -> dict[str, float]:
        """Scores of the best, best first."""
        total = sum(bool(weights) for weights in self._weights.values())
        scores: dict[str, float] = {}
        for word in self._bm25.embed_query(query).indices:
            holders = [id_ for id_, weights in self._weights.items() if word in weights]
            idf = math.log(1 + (total - len(holders) + 0.5) / (len(holders) + 0.5))
            for id_ in holders:
                scores[id_] = scores.get(id_, 0.0) + idf * self._weights[id_][word]
        return _best(scores, limit, self._passing(filter))

    def by_cosine(self, vector: Floats, limit: int, filter: Filter | None = None) -> dict[str, float]:
        scores = {point.id: float(point.vector @ vector) for point in self._points}
        return _best(scores, limit, self._passing(filter))

    def fused(
        self, vector: Floats, query: str, limit: int, fusion: Fusion, filter: Filter | None = None
    ) -> dict[str, float]:
        fuse = {"rrf": rrf, "dbsf": dbsf}[fusion]
        return fuse(self.by_cosine(vector, limit, filter), self.by_words(query, limit, filter))

    def _passing(self, filter: Filter | None) -> set[str]:
        return {point.id for point in self._points if matches(point.payload, filter or {})}


def _best(scores: Mapping[str, float], limit: int, passing: set[str]) -> dict[str, float]:
    ranked = sorted((id_ for id_ in scores if id_ in passing), key=lambda id_: -scores[id_])
    return {id_: scores[id_] for id_ in ranked[:limit]}


def assert_fused(found: Candidates, fused: Mapping[str, float], vector: Floats, points: Sequence[Point]) -> None:
    """What was found is the best of `fused`, in its order, equal ones by cosine. Of those that tie with the last it may
    be any."""
    cosines = {point.id: float(point.vector @ vector) for point in points}
    np.testing.assert_allclose(found.scores, [cosines[id_] for id_ in found.ids], atol=1e-5)
    rounded = {id_: round(score, 7) for id_, score in fused.items()}
    order = sorted(rounded, key=lambda id_: (-rounded[id_], -cosines[id_]))[: len(found)]
    last = rounded[order[-1]]
    above = [id_ for id_ in order if rounded[id_] > last]
    assert found.ids[: len(above)] == above
    assert all(rounded[id_] == last for id_ in found.ids[len(above) :])
    assert len(set(found.ids)) == len(found)
    payloads = {point.id: point.payload for point in points}
    assert found.payloads == [payloads[id_] for id_ in found.ids]


# ---- recall ----


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("limit", [1, 5, 20, 200])
def test_recall_is_the_references(index: QdrantIndex, fusion: Fusion, limit: int) -> None:
    points = make_documents()
    reference = Reference(points)
    changed = 0
    for seed, query in enumerate(QUERIES):
        vector = query_vector(100 + seed)
        found = index.recall(vector, limit, query_text=query, fusion=fusion)
        fused = reference.fused(vector, query, limit, fusion)
        assert len(found) == min(limit, len(fused))
        assert_fused(found, fused, vector, points)
        said = reference.by_words(query, len(points))
        assert found.bm25_scores is not None
        assert found.bm25_scores.tolist() == pytest.approx([said.get(id_, 0.0) for id_ in found.ids], rel=1e-4)
        assert index.recall(vector, limit).bm25_scores is None
        changed += found.ids != index.recall(vector, limit).ids
    assert changed >= (2 if 1 < limit < 100 else 0), "words make a difference"


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    "filter", [{"lang": "en"}, {"free": True, "year": {"lt": 2020}}, {"lang": "xx"}], ids=["string", "both", "nothing"]
)
def test_a_filter_holds_for_both_rankings(index: QdrantIndex, fusion: Fusion, filter: Filter) -> None:
    points = make_documents()
    vector = query_vector(5)
    found = index.recall(vector, 10, query_text="winter forest", fusion=fusion, filter=filter)
    assert all(matches(payload, filter) for payload in found.payloads)
    fused = Reference(points).fused(vector, "winter forest", 10, fusion, filter)
    assert len(found) == min(10, len(fused))
    if fused:
        assert_fused(found, fused, vector, points)


def test_what_a_rank_is_worth(place: Place) -> None:
    """Qdrant counts ranks from 0, so that with its k of 60 the first is worth 1/60; the paper counts from 1."""
    index = place(options={"bm25": WORDS})
    index.open_for(CONFIG)
    index.upsert(make_documents())
    vector = query_vector().tolist()
    if place.embedded:
        nearest = qdrant_edge.Prefetch(query=qdrant_edge.Query.Nearest(vector, using="recall"), limit=3)
        rrf60: Any = qdrant_edge.Fusion.Rrf(k=60)
        fused = qdrant_edge.QueryRequest(query=rrf60, prefetches=[nearest], limit=3)
        scores = [point.score for point in index._engine._shard.query(fused)]
    else:
        query = models.RrfQuery(rrf=models.Rrf(k=60))
        prefetch = models.Prefetch(query=vector, using="recall", limit=3)
        points = place.client.query_points(place.name("docs"), query=query, prefetch=prefetch, limit=3).points
        scores = [point.score for point in points]
    assert scores == pytest.approx([1 / 60, 1 / 61, 1 / 62], rel=1e-6)


def test_stop_words_alone_are_no_words(index: QdrantIndex) -> None:
    vector = query_vector()
    for query in ("the of and", "", " . ,"):
        found, nearest = index.recall(vector, 10, query_text=query), index.recall(vector, 10)
        assert found.ids == nearest.ids
        np.testing.assert_array_equal(found.scores, nearest.scores)


def test_words_that_no_document_has_leave_the_nearest(index: QdrantIndex) -> None:
    vector = query_vector()
    for fusion in FUSIONS:
        assert index.recall(vector, 10, query_text="unheardof", fusion=fusion).ids == index.recall(vector, 10).ids


def test_documents_without_words_are_found_by_cosine(index: QdrantIndex) -> None:
    points = make_documents()
    for point in points[-5:]:
        assert point.id in index.recall(point.vector, 3, query_text="castle").ids
    assert set(index.recall(query_vector(), 200, query_text="castle").ids) == {point.id for point in points}


def test_equal_documents_all_come(place: Place) -> None:
    """Ranks of equal scores are the engine's to choose; nothing gets lost, and equal ranks go by cosine."""
    index = place(options={"bm25": WORDS})
    index.open_for(CONFIG)
    points = [replace(point, payload={"text": "the same text"}) for point in make_points(8)]
    index.upsert(points)
    vector = query_vector()
    for fusion in FUSIONS:
        found = index.recall(vector, 8, query_text="same", fusion=fusion)
        assert sorted(found.ids) == sorted(point.id for point in points)
    lonely = replace(make_points(1, seed=4)[0], id="lonely", vector=-vector, payload={"text": "lighthouse"})
    index.upsert([lonely])
    first = index.recall(vector, 1).ids
    assert index.recall(vector, 3, query_text="lighthouse").ids[:2] == [*first, "lonely"], "both first, by cosine"


def test_words_follow_what_is_stored(place: Place) -> None:
    index = place(options={"bm25": WORDS})
    index.open_for(CONFIG)
    points = make_documents()
    index.upsert(points)
    lighthouse = replace(points[20], payload={"text": "a lighthouse"}, digest="new")
    index.upsert([lighthouse])
    far = -lighthouse.vector
    assert lighthouse.id in index.recall(far, 3, query_text="lighthouses").ids
    index.upsert([replace(lighthouse, payload={"text": "a castle"})])
    assert index.recall(far, 3, query_text="lighthouses").ids == index.recall(far, 3).ids
    index.upsert([lighthouse])
    index.delete([lighthouse.id])
    assert index.recall(far, 3, query_text="lighthouses").ids == index.recall(far, 3).ids
    left = [point for point in points if point.id != lighthouse.id]
    fused = Reference(left).fused(far, "lighthouse castle", 5, "rrf")
    assert_fused(index.recall(far, 5, query_text="lighthouse castle"), fused, far, left)


def test_words_survive_optimizing_and_reopening(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.connectors.edge.INDEXING_THRESHOLD_KB", 1)
    index = place(options={"bm25": WORDS})
    index.open_for(CONFIG)
    points = make_documents()
    index.upsert(points)
    if not place.embedded:
        place.client.update_collection(
            place.name("docs"), optimizers_config=models.OptimizersConfigDiff(indexing_threshold=1)
        )
    index.optimize()
    assert index.info().indexed > 0
    again = place.again()
    for fusion in FUSIONS:
        vector = query_vector(3)
        fused = Reference(points).fused(vector, QUERIES[2], 20, fusion)
        assert_fused(again.recall(vector, 20, query_text=QUERIES[2], fusion=fusion), fused, vector, points)


# ---- languages ----


def test_words_are_stemmed_in_their_language(place: Place) -> None:
    texts = {"houses": "Die alten Häuser am Fluss", "singing": "sie sangen", "other": "etwas anderes"}
    points = [replace(point, id=id_, payload={"text": text})
              for point, (id_, text) in zip(make_points(3), texts.items(), strict=True)]  # fmt: skip
    more = [replace(point, payload={"text": "Füllung"}) for point in make_points(40, seed=2)]
    for language, finds in (("german", True), ("english", False)):
        index = place(language, options={"bm25": Bm25Options(language=language, average_words=3.0)})
        index.open_for(CONFIG)
        index.upsert([*points, *more])
        far = -points[0].vector
        nearest = index.recall(far, 3).ids
        assert "houses" not in nearest
        assert ("houses" in index.recall(far, 3, query_text="Haus").ids) is finds
        assert (index.recall(far, 3, query_text="die").ids == nearest) is finds, "a stop word in one of the two"


SCRIPTS = {
    "chinese": ("退款将在十天内到账", "退款"),
    "thai": ("เราจะคืนเงินภายในสิบวัน", "คืนเงิน"),
    "japanese": ("返金は十日以内に行われます", "返金"),
    "decomposed": ("Mu\u0308nchner Cafe\u0301s", "Münchner"),
    "full width": ("\uff21\uff30\uff29\uff12", "api2"),
}


@pytest.mark.parametrize(("text", "query"), SCRIPTS.values(), ids=SCRIPTS)
def test_a_word_is_found_in_any_script_and_form(text: str, query: str, place: Place) -> None:
    index = place(options={"bm25": Bm25Options(average_words=8.0)})
    index.open_for(CONFIG)
    points = make_points(30)
    index.upsert([replace(points[0], id="wanted", payload={"text": text}), *points[1:]])
    far = -points[0].vector
    assert "wanted" not in index.recall(far, 5).ids
    assert "wanted" in index.recall(far, 5, query_text=query).ids


def test_a_collection_of_an_earlier_version_goes_on_as_it_was_and_its_copy_does_better(place: Place) -> None:
    index = place("old", options={"bm25": Bm25Options(average_words=8.0)})
    index.open_for(CONFIG)
    index._collection.remember(split_words=False)
    index.close()
    points = make_points(30)
    index.upsert([replace(points[0], id="wanted", payload={"text": "返金 は十日以内"}), *points[1:]])
    far = -points[0].vector
    for query, found in (("返金", True), ("十日", False)):
        assert ("wanted" in index.recall(far, 5, query_text=query).ids) is found
    copy = place("copy")
    index.copy_to(copy)
    assert all("wanted" in copy.recall(far, 5, query_text=query).ids for query in ("返金", "十日"))


# ---- refusals ----


def test_a_collection_without_words_says_how_to_get_them(place: Place) -> None:
    index = place()
    index.open_for(CONFIG)
    index.upsert(make_points(3))
    with pytest.raises(MismatchError, match=r"'\S*docs' at .* has no BM25 vectors for hybrid searches\. .*--hybrid"):
        index.recall(query_vector(), 3, query_text="castle")
    with pytest.raises(MismatchError, match="has no BM25 vectors"):
        asyncio.run(index.arecall(query_vector(), 3, query_text="castle"))
    assert len(index.recall(query_vector(), 3, query_text="")) == 3


def test_a_flat_index_keeps_no_words() -> None:
    flat = FlatIndex()
    flat.open_for(CONFIG)
    flat.upsert(make_points(3))
    with pytest.raises(MismatchError, match="a flat index has no BM25 vectors: search it without hybrid"):
        flat.recall(query_vector(), 3, query_text="castle")


def test_an_unknown_language_makes_nothing(place: Place) -> None:
    index = place(options={"bm25": {"language": "klingon"}})
    with pytest.raises(ValueError, match="klingon"):
        index.open_for(CONFIG)
    assert place.names() == ([], {})


def test_an_unknown_fusion(index: QdrantIndex) -> None:
    with pytest.raises(ValueError, match="unknown fusion 'sum': choose one of rrf, dbsf"):
        index.recall(query_vector(), 3, query_text="castle", fusion="sum")


# ---- with a model ----

TEXTS = {
    **passages.TEXTS,
    "ENOENT": "ENOENT: the errno that says there is no such file.",
}
QUESTIONS = ("how to combine two directory names", "ENOENT", "objects and patterns")


@pytest.fixture(scope="module", params=PLACES)
def searcher(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: QdrantServer, model: d2llm.Model
) -> Iterator[Searcher]:
    with place_of(request.param, tmp_path_factory.mktemp("searcher"), server) as place:
        index = place(options={"bm25": {"average_words": 8.0}})
        index.add(model, [Document(id_, text, payload={"length": len(text)}) for id_, text in TEXTS.items()])
        yield Searcher(model, index)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("filter", [None, {"length": {"lt": 55}}], ids=["all", "filtered"])
def test_fused_candidates_are_rescored(searcher: Searcher, fusion: Fusion, filter: Filter | None) -> None:
    model, texts = searcher.model, list(TEXTS.values())
    for question in QUESTIONS:
        encoded = model.encode_query([question])
        candidates = searcher.index.recall(encoded.vectors[0], 4, query_text=question, fusion=fusion, filter=filter)
        exact = model.score_pairs([question] * len(texts), texts, "asymmetric")
        scores = np.array([exact[list(TEXTS).index(id_)] for id_ in candidates.ids], np.float32)
        assert candidates.bm25_scores is not None
        by_iem = searcher.search(question, k=3, candidates=4, hybrid=fusion, filter=filter)
        assert [hit.id for hit in by_iem] == [hit.id for hit in rank(candidates, scores, 3)], (
            "its words are BM25 already"
        )
        expected = rank(candidates, np.array(with_words(scores, candidates.bm25_scores, 0.1), np.float32), 3)
        hits = searcher.search(question, k=3, candidates=4, hybrid=fusion, filter=filter, bm25_weight=0.1)
        assert [hit.id for hit in hits] == [hit.id for hit in expected]
        assert [hit.recall_rank for hit in hits] == [hit.recall_rank for hit in expected]
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=2e-2)  # fp16 features
        cosines = model.encode_document([TEXTS[hit.id] for hit in hits]).vectors @ encoded.vectors[0]
        assert [hit.recall_score for hit in hits] == pytest.approx(cosines.tolist(), abs=1e-4)


def test_words_count_as_much_as_they_are_told_to(searcher: Searcher) -> None:
    iem, words = np.array([3.0, 1.0, 2.0], np.float32), np.array([0.0, 5.0, 1.0], np.float32)
    for weight in (0.0, 0.1, 2.0):
        assert add_bm25(iem, words, weight).tolist() == pytest.approx(with_words(iem, words, weight), rel=1e-5)
    assert add_bm25(iem, np.full(3, 2.0, np.float32), 5.0).tolist() == iem.tolist(), "all say the same: nothing"
    assert add_bm25(iem[:1], words[1:2], 5.0).tolist() == iem[:1].tolist()
    loud = Searcher(searcher.model, searcher.index, bm25_weight=100.0)
    assert loud.search("the errno ENOENT", k=1, candidates=9, hybrid="rrf")[0].id == "ENOENT"


def test_without_rescoring_the_fused_order_stays(searcher: Searcher) -> None:
    index = searcher.index
    assert isinstance(index, QdrantIndex)
    for fusion in FUSIONS:
        for question in QUESTIONS:
            vector = searcher.model.encode_query([question]).vectors[0]
            fused = index.recall(vector, 5, query_text=question, fusion=fusion)
            hits = searcher.search(question, k=5, candidates=5, rescore=False, hybrid=fusion)
            assert [hit.id for hit in hits] == fused.ids
            assert [hit.recall_rank for hit in hits] == [1, 2, 3, 4, 5]
            assert [hit.score for hit in hits] == [hit.recall_score for hit in hits]
    assert searcher.search("ENOENT", k=1, candidates=1, rescore=False, hybrid="rrf")[0].recall_score < 1


def test_a_word_finds_what_its_vector_does_not(searcher: Searcher) -> None:
    """A name that the encoder does not know."""
    by_words = {hit.id for hit in searcher.search("ENOENT", k=2, candidates=2, hybrid="rrf")}
    assert "ENOENT" in by_words


def test_searching_for_an_event_loop_is_the_same(searcher: Searcher) -> None:
    async def search_all(**more: Any) -> list[Any]:
        return list(
            await asyncio.gather(*(searcher.asearch(question, 3, candidates=5, **more) for question in QUESTIONS))
        )

    variants: list[dict[str, Any]] = [
        {},
        {"hybrid": "rrf"},
        {"hybrid": "dbsf", "filter": {"length": {"lt": 55}}},
        {"hybrid": "rrf", "rescore": False},
        {"hybrid": "rrf", "task": "symmetric"},
    ]
    for more in variants:
        expected = [searcher.search(question, 3, candidates=5, **more) for question in QUESTIONS]
        found = asyncio.run(search_all(**more))
        assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in expected]
        for one, other in zip(found, expected, strict=True):
            assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)
            assert [hit.recall_rank for hit in one] == [hit.recall_rank for hit in other]


def test_an_unknown_way_to_fuse(searcher: Searcher) -> None:
    with pytest.raises(ValueError, match="unknown fusion 'bm25': choose one of rrf, dbsf"):
        searcher.search("ENOENT", hybrid="bm25")  # type: ignore[arg-type]  # the wrong type is what is tested

"""Documents longer than the model's limit: how they are split, and that an index still speaks of documents."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("qdrant_client")
pytest.importorskip("qdrant_edge")

from qdrant_places import CONFIG, PLACES, E, H, Place, assert_same, place_of
from qdrant_server import QdrantServer

import d2llm
from d2llm.bm25 import tokenize_words
from d2llm.cli import main
from d2llm.connectors import QdrantIndex
from d2llm.connectors.engine import Engine
from d2llm.errors import ArgumentError, MismatchError, StoreError
from d2llm.flat import FlatIndex
from d2llm.index import Index
from d2llm.passages import content_of, joined, leading_heading, split
from d2llm.types import Document, Passage, Point

LIMIT = 64
GUIDE = """# Guide

Read this first.

## Install

### Linux

Use the package. {linux}

```
# not a heading
```

{shell}

### Windows

Use the installer. {windows}

## Use

{use}
""".format(**{part: f"The {part} part goes on. " * 30 for part in ("linux", "shell", "windows", "use")})


SCRAPS = ["word ", "Sätze. ", "\n\n", "\n# Heading\n", "## More\n\n", "漢字", "x" * 40, "😀 ", "- item\n", " "]


def words(texts: Sequence[str]) -> list[int]:
    """A tokenizer whose tokens are words and marks of up to 8 characters."""
    return [sum(-(-len(word) // 8) for word in text.split()) for text in texts]


# ---- splitting ----


def check(document: Document, limit: int) -> list[Passage]:
    passages = split(document, words, limit)
    assert [passage.number for passage in passages] == list(range(len(passages)))
    assert {passage.of for passage in passages} == {len(passages)}
    assert passages[0].start == 0 and passages[-1].end == len(document.text)
    for one, other in itertools.pairwise(passages):
        assert one.start < other.start <= one.end < other.end  # they cover the text, and go on
    parts = [(passage, {"text": document.text[passage.start : passage.end]}) for passage in passages]
    random.Random(0).shuffle(parts)
    assert joined(parts)["text"] == document.text
    return passages


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(SCRAPS), min_size=80, max_size=400).map("".join).filter(str.strip),
    st.integers(24, 80),
)  # fmt: skip
def test_passages_cover_the_text_within_the_limit(text: str, limit: int) -> None:
    document = Document("a", text, title="A title")
    passages = check(document, limit)
    for passage in passages:
        fits = words([content_of(document, passage, limit, words)])[0] <= limit
        assert fits or passage.end - passage.start <= 2 * 16  # the shortest passages are not split again


def test_passages_end_where_a_reader_would_cut() -> None:
    sentences = "One thing is here. Another thing is there. " * 40
    for passage in check(Document("a", sentences), LIMIT):
        assert sentences[passage.start : passage.end].rstrip().endswith(".")
    paragraphs = "\n\n".join(f"Paragraph {i} says little, but in {i} words or more of its own." for i in range(40))
    for passage in check(Document("a", paragraphs), LIMIT):
        assert paragraphs[passage.start : passage.end].lstrip().startswith("Paragraph")


def test_passages_know_the_headings_above_them() -> None:
    document = Document("a", GUIDE, title="Manual")
    passages = check(document, LIMIT)
    expected = {"The linux": "Guide > Install > Linux", "The shell": "Guide > Install > Linux",
                "The windows": "Guide > Install > Windows", "The use": "Guide > Use"}  # fmt: skip
    for start, heading in expected.items():
        inner = [passage for passage in passages if GUIDE[passage.start : passage.end].startswith(start)]
        assert inner and {passage.heading for passage in inner} == {heading}
        assert content_of(document, inner[0], LIMIT, words).startswith(f"Manual {heading}"[: LIMIT // 2])
    assert not any(GUIDE[passage.start : passage.end].strip().startswith("#") and
                   GUIDE[passage.start : passage.end].strip().count("\n") == 0 for passage in passages)  # fmt: skip


@pytest.mark.parametrize(
    "text", ["word " * 200_000, "x" * 100_000, "一" * 50_000], ids=["words", "one word", "no spaces"]
)
def test_any_long_text_is_split(text: str) -> None:
    check(Document("a", text), 256)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n## Linux ##\n\nUse apt.\n", ("Linux", "\nUse apt.\n")),
        ("Use apt.\n# Later\n", ("", "Use apt.\n# Later\n")),
        ("#no heading", ("", "#no heading")),
        ("# Alone", ("Alone", "")),
        ("", ("", "")),
    ],
)
def test_the_heading_that_a_passage_begins_with(text: str, found: tuple[str, str]) -> None:
    assert leading_heading(text) == found


def test_a_comment_in_a_quoted_file_is_no_heading() -> None:
    text = "# Setup\n\nWrite this file:\n# a comment\nkey = 1\n# another\n" + "key = 2\n" * 100 + "\nThen go on. " * 40
    assert {passage.heading for passage in check(Document("a", text), LIMIT)} == {"", "Setup"}


def test_a_title_above_the_limit_leaves_room_for_the_text() -> None:
    document = Document("a", "Some text. " * 50, title="long title " * 100)
    for passage in check(document, LIMIT):
        assert words([content_of(document, passage, LIMIT, words)])[0] <= LIMIT


def syllables(texts: Sequence[str]) -> list[int]:
    """A tokenizer that takes three tokens for a character of Hangul, as BERT's does."""
    return [sum(1 if char.isascii() else 3 for char in text if not char.isspace()) for text in texts]


def test_a_title_of_several_tokens_a_character_leaves_room_for_the_text() -> None:
    text = "이 보고서는 제도 개선 방안을 다룬다. " * 60
    titled, plain = (Document("a", text, title=title) for title in ("종합보고서의회의록" * 10, ""))
    passages = split(titled, syllables, 128)
    assert len(passages) <= 3 * len(split(plain, syllables, 128))
    for passage in passages:
        content = content_of(titled, passage, 128, syllables)
        assert content.startswith("종합보고서") and syllables([content])[0] <= 128


@pytest.mark.parametrize("limit", [24, 40, 64])
def test_lines_of_a_few_characters_with_blanks_between_them_are_split(limit: int) -> None:
    lines = [
        "계약당사자표시번호확인서명란\n\n\n",
        "임대차보증금반환청구권양도서\n\n\n",
        "소유권이전등기신청서접수번호\n\n\n",
    ]
    document = Document("a", "".join(lines * 60), title="제목" * 30)
    passages = split(document, syllables, limit)
    assert passages[0].start == 0 and passages[-1].end == len(document.text)
    assert all(one.end >= other.start for one, other in itertools.pairwise(passages))


# ---- every index speaks of documents ----


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantServer]:
    with QdrantServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path, shared_server: QdrantServer) -> Iterator[Place]:
    with place_of(request.param, tmp_path, shared_server) as place:
        yield place


@pytest.fixture(params=["flat", *PLACES])
def index(request: pytest.FixtureRequest, tmp_path: Path, shared_server: QdrantServer) -> Iterator[Index]:
    if request.param == "flat":
        yield opened(FlatIndex())
    else:
        with place_of(request.param, tmp_path, shared_server) as place:
            yield opened(place())


def opened(index: Index) -> Index:
    index.open_for(CONFIG)
    return index


def document(id_: str, passages: int, version: int = 1, **fields: Any) -> list[Point]:
    """The points of a document whose text tells its version."""
    rng = np.random.default_rng([passages, version, *id_.encode()])
    points = []
    for number in range(passages):
        text, vector = f"[{id_} v{version} part {number}]", rng.standard_normal(E).astype(np.float32)
        passage = Passage(number, passages, number * len(text), (number + 1) * len(text)) if passages > 1 else None
        payload = {"text": text, "version": version, **fields}
        features = rng.integers(256, size=H, dtype=np.uint8)
        points.append(Point(id_, vector / np.linalg.norm(vector), features, payload, f"digest {version}", passage))
    return points


def whole(id_: str, passages: int, version: int = 1) -> str:
    return "".join(point.payload["text"] for point in document(id_, passages, version))


def all_points(index: Index) -> dict[str, set[str]]:
    """The texts of all passages that searches can find, by document."""
    found = index.recall(np.eye(E, dtype=np.float32)[0], 10_000)
    texts: dict[str, set[str]] = {}
    for id_, payload in zip(found.ids, found.payloads, strict=True):
        texts.setdefault(id_, set()).add(payload["text"])
    return texts


def test_every_method_speaks_of_documents(index: Index) -> None:
    index.upsert([*document("long", 5, lang="en"), *document("short", 1, lang="de"), *document("other", 3, lang="en")])
    assert (index.count(), index.count({"lang": "en"}), index.count({"lang": "de"})) == (3, 2, 1)
    assert sorted(index.ids()) == ["long", "other", "short"]
    assert index.digests(["long", "short", "none"]) == {"long": "digest 1", "short": "digest 1"}
    assert index.get(["long", "short"]) == {
        "long": {"text": whole("long", 5), "version": 1, "lang": "en"},
        "short": {"text": whole("short", 1), "version": 1, "lang": "de"},
    }
    assert {id_: len(texts) for id_, texts in all_points(index).items()} == {"long": 5, "short": 1, "other": 3}
    index.delete(["long"])
    assert index.count() == 2 and index.get(["long"]) == {} and "long" not in all_points(index)
    assert index.prune(["short"]) == 1
    assert sorted(index.ids()) == ["short"] and set(all_points(index)) == {"short"}


@pytest.mark.parametrize("passages", [1, 2, 7])
def test_a_new_version_replaces_all_passages(index: Index, passages: int) -> None:
    index.upsert([*document("a", 5), *document("b", 2)])
    index.upsert(document("a", passages, version=2))
    assert index.get(["a"])["a"]["text"] == whole("a", passages, version=2)
    assert all_points(index)["a"] == {point.payload["text"] for point in document("a", passages, version=2)}
    assert index.count() == 2 and index.digests(["a"]) == {"a": "digest 2"}
    if isinstance(index, QdrantIndex):
        info = index.info()
        assert (info.documents, info.passages) == (2, passages + 2)


def test_recall_is_that_of_the_flat_index(place: Place) -> None:
    points = [point for i in range(40) for point in document(f"doc {i}", 1 + i % 5, year=2000 + i % 3)]
    index, flat = opened(place()), opened(FlatIndex())
    for each in (index, flat):
        each.upsert(points)
    for seed in range(5):
        vector = np.random.default_rng(seed).standard_normal(E).astype(np.float32)
        for filter in (None, {"year": 2001}):
            found, expected = (each.recall(vector, 20, filter=filter) for each in (index, flat))
            assert found.ids == expected.ids and found.passages == expected.passages
            assert found.payloads == expected.payloads
            awaited = asyncio.run(index.arecall(vector, 20, filter=filter))
            assert awaited.ids == found.ids and awaited.passages == found.passages


def test_candidates_are_all_passages_of_the_documents_that_are_named(index: Index) -> None:
    index.upsert([point for i in range(9) for point in document(f"doc {i}", 1 + i % 5)])
    vector = np.random.default_rng(0).standard_normal(E).astype(np.float32)
    everything = index.recall(vector, 1000)
    found = index.candidates(["doc 8", "nowhere", "doc 3", "doc 5", "doc 8"], vector)
    rows = [row for row, id_ in enumerate(everything.ids) if id_ in ("doc 3", "doc 5", "doc 8")]
    assert len(rows) == 4 + 1 + 4
    assert_same(found, everything.rows(rows))
    assert found.passages == everything.rows(rows).passages
    index.upsert(document("doc 8", 2, version=2))
    assert len(index.candidates(["doc 8"], vector)) == 2
    assert len(index.candidates(["nowhere"], vector)) == len(index.candidates([], vector)) == 0
    with pytest.raises(TypeError, match="a list of ids"):
        index.candidates("doc 8", vector)
    with pytest.raises(MismatchError, match="vectors of"):
        index.candidates(["doc 8"], vector[:3])


def test_all_points_of_a_document_must_come_together(index: Index) -> None:
    points = document("a", 3)
    for wrong in (points[:2], points[1:], points[::-1]):
        with pytest.raises(ArgumentError, match="'a' has 3 passages, found those of the numbers"):
            index.upsert(wrong)
    assert index.count() == 0


def test_delete_where_and_copies_take_whole_documents(place: Place) -> None:
    source, target = opened(place("source")), place("target")
    assert isinstance(source, QdrantIndex)
    source.upsert([*document("a", 4, lang="en"), *document("b", 3, lang="de"), *document("c", 1, lang="en")])
    assert source.copy_to(target) == 3
    assert target.get(["a", "b", "c"]) == source.get(["a", "b", "c"]) and all_points(target) == all_points(source)
    assert source.copy_to(target) == 0
    assert source.delete_where({"lang": "en"}) == 2
    assert (sorted(source.ids()), set(all_points(source))) == (["b"], {"b"})


def test_a_copy_of_documents_that_have_changed_leaves_nothing_of_the_old_ones(place: Place) -> None:
    source, target = opened(place("source")), place("target")
    assert isinstance(source, QdrantIndex)
    source.upsert([*document("a", 4), *document("b", 3), *document("c", 1)])
    source.copy_to(target)
    source.upsert([*document("a", 2, 2), *document("b", 1, 2), *document("c", 3, 2)])
    assert source.copy_to(target) == 3
    assert all_points(target) == all_points(source) and target.get(["a", "b", "c"]) == source.get(["a", "b", "c"])


def test_words_that_come_with_a_copy_are_weighed_by_the_length_of_passages(tmp_path: Path) -> None:
    place = str(tmp_path / "qdrant")
    with QdrantIndex("source", place) as source:
        source.open_for(CONFIG)
        source.upsert([*document("cat", 4), *document("dog", 1)])
    command = ["collection", "migrate", "source", "--qdrant", place, "--to", place, "--as", "words", "--hybrid"]
    assert CliRunner().invoke(main, command).exit_code == 0
    with QdrantIndex("words", place) as copy:
        bm25 = copy.info().metadata.options.bm25
        assert bm25 is not None and bm25.average_words == len(tokenize_words("[cat v1 part 0]"))


# ---- a job that is killed ----


def test_a_copy_goes_on_after_its_source_has_changed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = opened(place("source")), place("target")
    assert isinstance(source, QdrantIndex)
    monkeypatch.setattr("d2llm.connectors.documents.SETTLED", 0.0)
    source.upsert([*document("a", 4), *document("b", 1)])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(target, 1, patch)
        source.copy_to(target)
    source.upsert(document("a", 2, 2))
    source.copy_to(target)
    assert all_points(target) == all_points(source)


def test_a_copy_that_is_killed_has_whole_documents(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = opened(place("source")), place("target")
    assert isinstance(source, QdrantIndex)
    documents = {f"doc {i}": 1 + i % 5 for i in range(30)}
    source.upsert([point for id_, passages in documents.items() for point in document(id_, passages)])
    monkeypatch.setattr("d2llm.connectors.manage.PAGE", 7)
    whole_texts = {id_: whole(id_, passages) for id_, passages in documents.items()}
    calls = 0
    for call in range(100):
        with monkeypatch.context() as patch:
            kill_at(target, 1, patch)
            try:
                source.copy_to(target)
            except Killed:
                calls = call
            else:
                break
        copied = list(target.ids())
        assert {id_: got["text"] for id_, got in target.get(copied).items()} == {
            id_: whole_texts[id_] for id_ in copied
        }
    assert calls > 5 and {id_: got["text"] for id_, got in target.get(list(documents)).items()} == whole_texts


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(index: QdrantIndex, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the job at its call number `call` that changes points."""
    engine: Engine = index._engine
    calls = itertools.count()

    def dying(method: Callable[..., None]) -> Callable[..., None]:
        def wrapped(points: Any) -> None:
            if next(calls) == call:
                raise Killed
            method(points)

        return wrapped

    for name in ("upsert", "delete"):
        monkeypatch.setattr(engine, name, dying(getattr(engine, name)))


@pytest.mark.parametrize("call", range(4))
def test_a_killed_job_leaves_a_whole_version(place: Place, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    index = place()
    opened(index).upsert([*document("a", 4), *document("b", 2)])
    index.tidy()
    with monkeypatch.context() as patch:
        kill_at(index, call, patch)
        try:
            index.upsert(document("a", 3, version=2))
        except Killed:
            pass
        else:
            assert call == 3, "there are fewer calls: kill at each of them"

    index = place.again()
    version = 1 if call < 2 else 2  # the second call stores the first passage
    texts = {point.payload["text"] for point in document("a", 4 if version == 1 else 3, version)}
    assert all_points(index)["a"] == texts
    assert index.get(["a"])["a"]["text"] == whole("a", 4 if version == 1 else 3, version)
    assert index.count() == 2

    monkeypatch.setattr("d2llm.connectors.documents.SETTLED", -1.0)  # as if an hour had passed
    index.upsert(document("a", 5, version=3))
    index.tidy()
    assert all_points(index)["a"] == {point.payload["text"] for point in document("a", 5, version=3)}
    info = index.info()
    assert (info.documents, info.passages, info.metadata.untidy) == (2, 7, False)


def test_what_a_killed_job_left_takes_no_places_of_a_search_and_the_next_job_removes_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, flat = opened(place()), opened(FlatIndex())
    points = [*document("book", 30), *(point for i in range(8) for point in document(f"doc {i}", 1))]
    for each in (index, flat):
        each.upsert(points)
    index.tidy()
    with monkeypatch.context() as patch:
        kill_at(index, 1, patch)  # after the tails, before the head
        with pytest.raises(Killed):
            index.upsert(document("book", 40, version=2))

    index = place.again()
    vector = np.mean([point.vector for point in document("book", 40, version=2)], axis=0)
    for limit in (5, 20, 38, 60):
        found = index.recall(vector, limit)
        assert found.ids == flat.recall(vector, limit).ids
        assert asyncio.run(index.arecall(vector, limit)).ids == found.ids
    monkeypatch.setattr("d2llm.connectors.documents.SETTLED", -1.0)  # as if an hour had passed
    index.upsert(document("new", 1))
    index.tidy()
    assert (index.info().passages, index.info().metadata.untidy) == (30 + 8 + 1, False)


def test_a_job_that_replaces_long_documents_keeps_the_scales_that_another_process_stores(place: Place) -> None:
    if place.embedded:
        pytest.skip("of servers: no two processes write into a folder at once")
    job, other = opened(place()), place()
    job.upsert(document("a", 1))
    scales = {"asymmetric": {"cosine": 20.0, "words": 0.5, "vectors": 0.0}}
    other.scales = scales
    job.upsert(document("b", 3))
    job.tidy()
    stored = place.again().info().metadata
    assert (stored.scales, stored.untidy) == (scales, False)


def test_a_server_keeps_passages_that_another_job_may_be_storing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if place.embedded:
        pytest.skip("of servers: no two processes write into a folder at once")
    one, other = opened(place()), place()
    one.upsert(document("a", 3))
    one.tidy()
    with monkeypatch.context() as patch:
        kill_at(one, 1, patch)  # after the tails, before the head
        with pytest.raises(Killed):
            one.upsert(document("a", 3, version=2))
    other.open_for(CONFIG)
    other.upsert(document("b", 2))
    other.tidy()
    assert other.info().passages == 3 + 2 + 2 and other.info().metadata.untidy
    one.upsert(document("a", 3, version=2))
    assert one.get(["a"])["a"]["text"] == whole("a", 3, version=2)


def test_a_document_that_lost_a_passage_is_not_given_back_in_part(place: Place) -> None:
    index = place()
    opened(index).upsert(document("a", 3))
    index._engine.delete([stored.id for page in index._engine.scroll(10) for stored in page
                          if stored.payload["text"].endswith("part 1]")])  # fmt: skip
    with pytest.raises(StoreError, match="passages of 'a' are missing: delete and index it again"):
        index.get(["a"])


# ---- from documents to hits ----

LONG = [
    {"_id": "files", "title": "Files", "text": "# Paths\n\n" + "Paths are joined with a slash. " * 60
        + "\n\n# Waiting\n\n" + "The process sleeps for some seconds. " * 60, "lang": "en"},
    {"_id": "median", "text": "The median of numeric data.", "lang": "en"},
    {"_id": "mode", "text": "Der Modus von Daten.", "lang": "de"},
]  # fmt: skip


def test_hits_are_documents_with_their_best_passage(model: d2llm.Model, tmp_path: Path) -> None:
    for index in (FlatIndex(), QdrantIndex("docs", tmp_path / "qdrant", options={"bm25": {}})):
        report = index.add(model, LONG)
        assert (report.added, report.split, report.truncated) == (3, 1, 0) and report.passages > 10
        assert index.add(model, LONG).unchanged == 3
        searcher = d2llm.Searcher(model, index)
        hits = searcher.search("wait some seconds", k=3)
        assert sorted(hit.id for hit in hits) == ["files", "median", "mode"]
        best = hits[0]
        assert best.id == "files" and best.passage is not None and best.passage.heading in ("Waiting", "Paths")
        assert "sleeps" in best.payload["text"] and (best.payload["title"], best.payload["lang"]) == ("Files", "en")
        text = index.get(["files"])["files"]["text"]
        assert text == LONG[0]["text"] and text[best.passage.start : best.passage.end] == best.payload["text"]
        assert all(hit.passage is None for hit in hits[1:])
        assert [hit.id for hit in asyncio.run(searcher.asearch("wait some seconds", k=3))] == [hit.id for hit in hits]
        assert {hit.id for hit in searcher.search("wait", k=3, filter={"lang": "en"})} == {"files", "median"}
        if isinstance(index, QdrantIndex):
            assert searcher.search("sleeps seconds", k=1, hybrid="rrf")[0].id == "files"


def test_a_long_title_costs_no_text(model: d2llm.Model) -> None:
    index = FlatIndex()
    title = "the long title of a document that says little " * 20
    documents = [
        {"_id": "none", "title": title, "text": ""},
        {"_id": "some", "title": title, "text": "Sleep a second."},
    ]
    report = index.add(model, documents)
    assert (report.added, report.passages, report.split, index.count()) == (2, 2, 0, 2)
    points = index.recall(model.encode_query(["sleep a second"]).vectors[0], 10)
    assert points.ids[0] == "some" and points.passages == [None, None]


def test_recall_goes_on_until_there_are_k_documents(model: d2llm.Model) -> None:
    index = FlatIndex()
    index.add(model, LONG)
    hits = d2llm.Searcher(model, index).search("wait some seconds", k=3, candidates=3)  # "files" has more passages
    assert sorted(hit.id for hit in hits) == ["files", "median", "mode"]
    everything = d2llm.Searcher(model, index).search("wait some seconds", k=3, candidates=1000)
    assert [(hit.id, hit.passage) for hit in hits] == [(hit.id, hit.passage) for hit in everything]


def test_whether_documents_are_split_is_part_of_what_is_compared(model: d2llm.Model) -> None:
    index = FlatIndex()
    assert index.add(model, LONG, chunk=False).truncated == 1
    assert index.add(model, LONG, chunk=False).unchanged == 3
    assert index.add(model, LONG).split == 1

"""Calibration on a real model: a literal reference, the evidence, what a collection remembers, the command."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import d2llm
from d2llm.calibration import FEWEST, MULTIPLES, Evidence, calibrate, choices_around, ideal_dcg, ndcg
from d2llm.cli import main
from d2llm.connectors import Qdrant
from d2llm.connectors.schema import Metadata
from d2llm.embedder import create_student
from d2llm.errors import ArgumentError, DataError, MismatchError
from d2llm.evidence import calibrate_index, judged_evidence, pseudo_evidence
from d2llm.export import export
from d2llm.flat import FlatIndex
from d2llm.folder import read_config, write_config
from d2llm.metrics import per_query
from d2llm.pseudo_queries import WORD, easy_queries, hard_queries
from d2llm.types import Document

pytest.importorskip("qdrant_edge")

# ---- a corpus whose words say all, and a backbone of random weights, whose cosine says next to nothing ----

NAMES = [
    f"{a}{b}" for a in "bodrug kelvan tirsol mapwex nubral zifton gorlim pexhat".split() for b in "abcdefghijklmnop"
]
PARTS = "pump valve hinge filter fan cable".split()
VERBS = "leaks rattles sticks overheats stops squeaks".split()


def document(number: int) -> Document:
    rng = random.Random(number)
    name, part, verb = NAMES[number % len(NAMES)], rng.choice(PARTS), rng.choice(VERBS)
    other, tail = rng.choice(PARTS), " ".join(rng.choices(PARTS + VERBS, k=5))
    return Document(str(number), f"The {part} of the {name} {verb}. Clean the {other} of {name} when it {tail} again.")


DOCUMENTS = [document(number) for number in range(260)]
QUERIES = {f"q{number}": f"what to do when a {NAMES[number]} {VERBS[number % 6]}" for number in range(60)}
QRELS = {
    f"q{number}": {str(same): 2 - (same != number) for same in range(number, len(DOCUMENTS), len(NAMES))}
    for number in range(60)
}
TASK = "asymmetric"
WEAK = {"cosine": 20.0, "words": 0.01, "vectors": 10.0, "mlp": 1.0}
"""Words count too little here: calibration must find that."""


@pytest.fixture(scope="module")
def folder(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the scales `WEAK`."""
    root = tmp_path_factory.mktemp("calibration")
    create_student(str(tiny_bert), corpus=[document.content for document in DOCUMENTS]).save(root / "student")
    export(root / "student", root / "model")
    config = read_config(root / "model")
    scales = {**config.scales, TASK: [WEAK[part] for part in config.parts]}
    write_config(root / "model", replace(config, scales=scales), config.files)
    return root / "model"


@pytest.fixture(scope="module")
def small(folder: Path) -> d2llm.Model:
    return d2llm.load(folder)


@pytest.fixture
def flat(small: d2llm.Model) -> FlatIndex:
    index = FlatIndex()
    index.add(small, DOCUMENTS)
    return index


@pytest.fixture(scope="module")
def filled(small: d2llm.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the collection `kb`. Shared: reset what you store in it."""
    location = tmp_path_factory.mktemp("calibration") / "qdrant"
    with Qdrant(location).index("kb", options={"bm25": {"average_words": 12}}) as index:
        index.add(small, DOCUMENTS)
    return location


def own(model: d2llm.Model) -> dict[str, float]:
    return dict(zip(model.config.parts, model.config.scales[TASK], strict=True))


# ---- the choice, against a literal reference ----


def some_evidence(count: int, seed: int, *, noise: float = 1.0) -> list[Evidence]:
    """The second part tells the relevant candidates apart, the first one is noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in range(count):
        grades = rng.integers(-1, 3, 1 + query % 30).astype(np.float32)
        parts = rng.standard_normal((len(grades), 3))
        parts[:, 1] = grades + noise * parts[:, 1]
        rows.append(Evidence(parts.astype(np.float32), grades, ideal_dcg([*grades, 2])))
    return rows


def literal_ndcg(row: Evidence, scales: Mapping[str, float]) -> float:
    scores = [sum(scale * float(part) for scale, part in zip(scales.values(), parts, strict=True))
              for parts in row.parts_KC]  # fmt: skip
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    gains = [max(0.0, float(row.grades_K[place])) for place in order[:10]]
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains)) / row.ideal


CURRENT = {"cosine": 4.0, "words": 0.5, "vectors": 1.0}


def test_scales_are_chosen_as_a_literal_loop_would_choose_them() -> None:
    families = {"a": some_evidence(60, 0, noise=0.3), "b": some_evidence(50, 1, noise=2.0)}
    choices = choices_around(CURRENT)
    for name, rows in families.items():
        grid = np.array([list(scales.values()) for scales in choices], np.float32)
        expected = [[literal_ndcg(row, scales) for row in rows] for scales in choices]
        np.testing.assert_allclose(ndcg(rows, grid), expected, atol=1e-6, err_msg=name)

    found = calibrate(families, CURRENT, choices, fewest=10)
    best, most = CURRENT, 0.0
    for scales in choices:
        gains = []
        for rows in families.values():
            half = random.Random(0).sample(rows, len(rows))[::2]
            gains.append(sum(literal_ndcg(row, scales) - literal_ndcg(row, CURRENT) for row in half) / len(half))
        if min(gains) > most + 1e-9:
            best, most = scales, min(gains)
    assert found.chosen == best != CURRENT
    for name, rows in families.items():
        half = random.Random(0).sample(rows, len(rows))[1::2]
        before = [literal_ndcg(row, CURRENT) for row in half]
        after = [literal_ndcg(row, best) for row in half]
        gain = found.gains[name]
        assert gain.queries == len(half) == len(rows) // 2
        assert gain.ndcg_10 == pytest.approx(sum(before) / len(half), abs=1e-6)
        assert gain.difference == pytest.approx((sum(after) - sum(before)) / len(half), abs=1e-6)
        assert gain.low < gain.difference < gain.high


def test_candidates_with_equal_scores_keep_the_order_of_recall() -> None:
    row = Evidence(np.ones((3, 2), np.float32), np.array([0, 0, 1], np.float32), 1.0)
    assert ndcg([row], np.ones((1, 2), np.float32)) == pytest.approx(1 / math.log2(4))


def test_what_one_family_gains_and_another_loses_is_not_chosen() -> None:
    words_help, words_harm = some_evidence(400, 2), some_evidence(400, 3)
    words_harm = [row._replace(grades_K=-row.grades_K, ideal=2.0) for row in words_harm]
    alone = calibrate({"easy": words_help}, CURRENT, choices_around(CURRENT))
    assert alone.accepted and alone.scales["words"] == pytest.approx(1.5), "alone it would be stored"
    both = calibrate({"easy": words_help, "hard": words_harm}, CURRENT, choices_around(CURRENT))
    assert not both.accepted and both.scales == CURRENT


def test_too_few_queries_change_nothing() -> None:
    families = {"easy": some_evidence(2 * FEWEST, 4), "hard": some_evidence(2 * FEWEST - 1, 5)}
    found = calibrate(families, CURRENT, choices_around(CURRENT))
    assert found.queries == {"easy": 200, "hard": 199}
    assert not found.gains and not found.accepted and found.scales == found.chosen == CURRENT


def test_a_gain_that_may_be_chance_is_not_accepted() -> None:
    noise = [row._replace(grades_K=np.random.default_rng(q).integers(0, 2, len(row.grades_K)).astype(np.float32))
             for q, row in enumerate(some_evidence(60, 6))]  # fmt: skip
    found = calibrate({"judged": noise}, CURRENT, choices_around(CURRENT), fewest=10)
    assert found.chosen != CURRENT and found.gains["judged"].low <= 0
    assert not found.accepted and found.scales == CURRENT


def test_few_gains_are_not_sure_though_their_interval_is_above_zero() -> None:
    better = Evidence(np.eye(2, dtype=np.float32), np.array([0, 1], np.float32), 1.0)
    same = better._replace(grades_K=np.zeros(2, np.float32))
    rows = [better] * 8 + [same] * 12
    (gain,) = calibrate({"judged": rows}, {"cosine": 1.0, "words": 0.9}, [{"cosine": 1.0, "words": 2.0}],
                        fewest=10, seed=0).gains.values()  # fmt: skip
    assert gain.low > 0 and gain.p > 0.05 and not gain.sure


def test_the_grid_multiplies_words_and_vectors_nearest_first() -> None:
    choices = choices_around(CURRENT)
    assert choices[0] == CURRENT and len(choices) == len(MULTIPLES["words"]) * len(MULTIPLES["vectors"])
    assert {scales["cosine"] for scales in choices} == {4.0}
    assert {scales["words"] for scales in choices} == {0.5 * factor for factor in MULTIPLES["words"]}
    assert min(scales["vectors"] for scales in choices) == 0 == choices[-1]["vectors"]
    assert len(choices_around({"cosine": 20, "words": 0, "vectors": 2, "mlp": 1})) == len(MULTIPLES["vectors"])
    with pytest.raises(ArgumentError, match="nothing to calibrate: the model scores by cosine, mlp, and neither"):
        choices_around({"cosine": 20.0, "mlp": 1.0})


# ---- pseudo-queries ----


def test_hard_queries_are_taken_out_of_their_passages() -> None:
    titled = [Document(str(n), f"Start w{n} here. Then comes x{n} now.", f"About thing{n} again") for n in range(40)]
    kinds = set()
    for query in hard_queries(titled, 40):
        parts = [query.document.title, *query.document.text.replace(". ", ".|").split("|")]
        assert query.text in parts and query.text not in query.passage
        assert query.passage == " ".join(part for part in parts if part != query.text)
        kinds.add(parts.index(query.text))
    assert kinds == {0, 1, 2}, "titles and all sentences"


def test_a_passage_of_one_sentence_is_cut_in_two_halves() -> None:
    line = "find . -name '*.py' -mtime 3 | xargs grep -l main"
    chinese = "退款需要五个工作日才能到账"
    halves = [("find . -name '*.py' -mtime", "3 | xargs grep -l main"), ("退款需要五个", "工作日才能到账")]
    for text, (first, second) in zip((line, chinese), halves, strict=True):
        made = [hard_queries([Document("a", text)], 1, seed)[0] for seed in range(9)]
        found = {(query.text, query.passage) for query in made}
        assert found == {(first, second), (second, first)}


def test_passages_that_are_too_short_make_no_queries() -> None:
    short = [Document("a", "ls -l"), Document("b", "one two three four"), Document("c", " ", "A title of words")]
    assert hard_queries(short, 10) == []
    assert [query.document.id for query in easy_queries(short[:1], 10)] == []
    assert len(hard_queries(DOCUMENTS, 7)) == len(easy_queries(DOCUMENTS, 7)) == 7


def test_easy_queries_repeat_words_of_their_passages() -> None:
    queries = easy_queries(DOCUMENTS, 100)
    for query in queries:
        words = [word.lower() for word in WORD.findall(query.document.content)]
        assert {word.lower() for word in query.text.split()} <= set(words) and query.passage == query.document.content
    lengths = [len(query.text.split()) for query in queries]
    assert max(lengths[::2]) <= 6 and max(lengths[1::2]) > 6, "keywords and runs of words in turn"


# ---- evidence ----


@pytest.mark.parametrize("scales", [None, {"words": 0.5}, {"words": 0.1, "vectors": 0.0}])
def test_judged_evidence_predicts_the_ndcg_of_searches(
    small: d2llm.Model, flat: FlatIndex, scales: dict[str, float] | None
) -> None:
    used = {**own(small), **(scales or {})}
    evidence = judged_evidence(small, flat, QUERIES, QRELS, candidates=50)
    predicted = ndcg(evidence, np.array([list(used.values())], np.float32))[0]
    searcher = d2llm.Searcher(small, flat, candidates=50, scales=None if scales is None else {TASK: used})
    run = {query: {hit.id: -float(place) for place, hit in enumerate(searcher.search(text))}
           for query, text in QUERIES.items()}  # fmt: skip
    assert predicted.tolist() == pytest.approx(list(per_query(run, QRELS, "nDCG@10").values()), abs=1e-6)
    assert predicted.mean() > 0


def test_a_document_that_is_the_query_itself_is_no_evidence(small: d2llm.Model, flat: FlatIndex) -> None:
    asked, right = {"3": DOCUMENTS[3].text}, {"3": {"131": 1}}
    (evidence,) = judged_evidence(small, flat, asked, right, candidates=len(DOCUMENTS))
    assert len(evidence.grades_K) == len(DOCUMENTS) - 1 and evidence.grades_K.sum() == 1


def test_judged_documents_that_are_not_stored_are_counted(
    small: d2llm.Model, flat: FlatIndex, caplog: pytest.LogCaptureFixture
) -> None:
    judged_evidence(small, flat, {"q": "a text"}, {"q": {"131": 1, "elsewhere": 1}}, candidates=10)
    assert caplog.messages == [
        "1 of 2 documents judged are not in the collection, such as 'elsewhere': no search finds them"
    ]


def test_the_rest_of_a_passage_takes_its_place(small: d2llm.Model, flat: FlatIndex) -> None:
    """Literally: index the rest in the passage's place, and search."""
    limit = 20
    families = pseudo_evidence(small, flat, queries=30, candidates=limit)
    assert {name: len(rows) for name, rows in families.items()} == {"hard": 30, "easy": 30}
    ids = random.Random(0).sample(sorted(flat.ids()), 90)
    documents = [next(document for document in DOCUMENTS if document.id == id_) for id_ in ids]
    recalled = 0
    for query, row in zip(hard_queries(documents, 30), families["hard"], strict=True):
        replaced = FlatIndex()
        replaced.add(small, [replace(each, text=query.passage) if each.id == query.document.id else each
                             for each in DOCUMENTS])  # fmt: skip
        encoded = small.encode_query([query.text])
        found = replaced.recall(encoded.vectors[0], limit)
        expected = small.parts(encoded.features, found.features[None], found.scores[None])[0]
        got = {tuple(parts.round(3)): grade for parts, grade in zip(row.parts_KC, row.grades_K, strict=True)}
        for id_, parts in zip(found.ids, expected, strict=True):
            near = min(got, key=lambda other: float(np.abs(np.subtract(other, parts)).max()))
            assert np.abs(np.subtract(near, parts)).max() < 0.01
            assert got[near] == (id_ == query.document.id)
        assert row.grades_K.sum() == (query.document.id in found.ids)
        recalled += query.document.id in found.ids
    assert 0 < recalled < 30, "for the test to see both"


# ---- what a search uses ----


def first_score(searcher: d2llm.Searcher, **options: Any) -> float:
    return searcher.search("the pump of a bodruga leaks", **options)[0].score


def test_searches_use_the_scales_of_the_index_unless_others_are_given(small: d2llm.Model, flat: FlatIndex) -> None:
    plain = d2llm.Searcher(small, flat)
    only_cosine = {**dict.fromkeys(small.config.parts, 0.0), "cosine": 3.0}
    flat.scales = {TASK: only_cosine}
    calibrated = d2llm.Searcher(small, flat)
    hit = calibrated.search("the pump of a bodruga leaks")[0]
    assert hit.score == pytest.approx(3 * hit.recall_score, rel=1e-5)
    assert first_score(plain) != first_score(calibrated), "an open searcher keeps what it has"
    assert first_score(calibrated, task="symmetric") == first_score(plain, task="symmetric")
    given = d2llm.Searcher(small, flat, scales={TASK: own(small)})
    assert first_score(given) == first_score(plain)
    assert first_score(d2llm.Searcher(small, flat, scales={})) == first_score(plain)


def test_scales_that_do_not_fit_are_refused(small: d2llm.Model, flat: FlatIndex) -> None:
    flat.scales = {TASK: {"cosine": 1.0, "words": 2.0}}
    with pytest.raises(MismatchError, match=r"the index has scales of cosine, words, the model's .*: remove them"):
        d2llm.Searcher(small, flat)
    with pytest.raises(MismatchError, match=r"the argument scales has scales of no part, .*: name these parts"):
        d2llm.Searcher(small, flat, scales={TASK: {}})
    with pytest.raises(ArgumentError, match="unknown task 'symetric'"):
        d2llm.Searcher(small, flat, scales={"symetric": own(small)})
    with pytest.raises(ArgumentError, match="expected a finite number as the scale of words, found nan"):
        d2llm.Searcher(small, flat, scales={TASK: {**own(small), "words": math.nan}})


# ---- what a collection remembers ----


def test_a_collection_remembers_its_scales_and_copies_keep_them(small: d2llm.Model, tmp_path: Path) -> None:
    qdrant, scales = Qdrant(tmp_path), {TASK: {**own(small), "words": 0.5}}
    with qdrant.index("kb") as index:
        index.add(small, DOCUMENTS[:5])
        assert index.scales is None
        before = index.info().metadata
        index.scales = scales
        assert index.info().metadata == replace(before, scales=scales)
        expected = d2llm.Searcher(small, index, scales=scales).search(QUERIES["q1"])
    with qdrant.index("kb") as again:
        assert again.scales == scales
        assert d2llm.Searcher(small, again).search(QUERIES["q1"]) == expected
    with qdrant.index("copy") as copy:
        qdrant.copy("kb", copy)
        assert copy.scales == scales
    qdrant.snapshot("kb", tmp_path / "kb.snapshot")
    qdrant.restore("restored", tmp_path / "kb.snapshot")
    assert (restored := qdrant.peek("restored")) is not None and restored.scales == scales


def test_the_next_generation_of_an_alias_keeps_the_scales(small: d2llm.Model, tmp_path: Path) -> None:
    qdrant, scales = Qdrant(tmp_path), {TASK: {**own(small), "words": 0.5}}
    qdrant.reindex("live", small, DOCUMENTS[:5])
    with qdrant.index("live") as index:
        index.scales = scales
    qdrant.reindex("live", small, DOCUMENTS[:7])
    with qdrant.index("live") as index:
        assert index.count() == 7 and index.scales == scales


def test_collections_of_earlier_versions_have_no_scales(small: d2llm.Model, filled: Path) -> None:
    metadata = Qdrant(filled).peek("kb")
    assert metadata is not None
    content = metadata.to_json()
    assert content.pop("scales") is None
    assert Metadata.parse(content, "kb") == metadata


# ---- the command ----


def cli(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def written(folder: Path, queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]) -> Sequence[Any]:
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": id_, "text": text}) + "\n" for id_, text in queries.items())
    )
    rows = [f"{query}\t{id_}\t{grade}\n" for query, grades in qrels.items() for id_, grade in grades.items()]
    (folder / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return "--queries", folder / "queries.jsonl", "--qrels", folder / "dev.tsv"


def test_judged_queries_calibrate_a_collection(folder: Path, small: d2llm.Model, filled: Path, tmp_path: Path) -> None:
    judged = written(tmp_path, QUERIES, QRELS)
    place = ("--qdrant", filled, "--collection", "kb")
    found = json.loads(cli("tune", folder, "--calibrate", *judged, *place, "--json").stdout)
    assert found["accepted"] and found["queries"] == {"judged": 60} and found["hybrid"]
    assert found["current"] == own(small) and found["scales"] == found["chosen"]
    assert found["scales"]["words"] > found["current"]["words"] and found["gains"]["judged"]["low"] > 0
    with Qdrant(filled).index("kb") as index:
        assert index.scales == {TASK: found["scales"]}
        better = calibrate_index(small, index, QUERIES, QRELS, hybrid=True)
        assert better.current == found["scales"], "what is stored is what others are compared with"
    shown = cli("collection", "info", "kb", "--qdrant", filled).stdout
    assert f"scales, {TASK}" in shown and f"words {found['scales']['words']:.4g}" in shown
    hits = json.loads(cli("search", folder, QUERIES["q1"], *place, "--json").stdout)["hits"]
    assert f"Removed from kb: {TASK}: cosine 20, words" in cli("tune", folder, "--calibrate", "--reset", *place).stdout
    plain = json.loads(cli("search", folder, QUERIES["q1"], *place, "--json").stdout)["hits"]
    assert hits[0]["score"] != plain[0]["score"]
    assert "kb has no scales of its own" in cli("tune", folder, "--calibrate", "--reset", *place).stdout


def test_pseudo_queries_calibrate_a_collection_where_both_families_gain(folder: Path, filled: Path) -> None:
    asked = ("tune", folder, "--calibrate", "--qdrant", filled, "--collection", "kb", "--candidates", 20)
    shown = cli(*asked).stdout
    assert "hard: 260 titles and sentences" in shown and "easy: 260 keywords and runs of words" in shown
    assert "Stored in kb" in shown and "--calibrate --reset --qdrant" in shown
    assert cli("tune", folder, "--calibrate", "--reset", "--qdrant", filled, "--collection", "kb", "--json").stdout
    few = cli(*asked, "--sample", 150)
    assert (
        few.exit_code == 0 and "They stay: calibration without judgements needs 200 queries of each kind" in few.stdout
    )
    assert Qdrant(filled).peek("kb").scales is None


def test_what_calibration_cannot_use_is_named(folder: Path, filled: Path, tmp_path: Path) -> None:
    place = ("--qdrant", filled, "--collection", "kb")
    queries, qrels = judged_options = written(tmp_path, QUERIES, QRELS)[:2], written(tmp_path, QUERIES, QRELS)[2:]
    few = (tmp_path / "few").absolute(), (tmp_path / "strangers").absolute()
    for other in few:
        other.mkdir()
    some = written(few[0], QUERIES, {query: QRELS[query] for query in list(QUERIES)[:19]})
    strangers = written(few[1], QUERIES, {query: {"elsewhere": 1} for query in QUERIES})
    config = read_config(folder)
    with Qdrant(tmp_path / "q").index("other") as index:
        index.open_for(replace(config, fingerprint="fedcba"))
    for arguments, message in (
        ([*qrels, *place], "--calibrate takes judged queries, --queries with --qrels; or neither"),
        ([*queries, *place], "--calibrate takes judged queries, --queries with --qrels; or neither"),
        ([*some, *place], "calibration needs 20 or more judged queries, found 19: judge more, or leave them out"),
        ([*strangers, *place], "none of the 1 documents judged is in the collection, such as 'elsewhere'"),
        (["--reset", *queries, *place], "--reset needs no queries"),
        (["--qdrant", tmp_path / "q", "--collection", "other"], "was made with passage encoder fedcba"),
    ):
        refused = cli("tune", folder, "--calibrate", *arguments)
        assert refused.exit_code != 0 and message in refused.output and "Traceback" not in refused.output
    assert judged_options and "Missing option '--queries'" in cli("tune", folder, *place).output
    assert "--reset is for --calibrate" in cli("tune", folder, "--reset", *place).output


def test_the_python_call_refuses_too_few_queries(small: d2llm.Model, flat: FlatIndex) -> None:
    with pytest.raises(DataError, match="calibration needs 20 or more judged queries, found 3"):
        calibrate_index(small, flat, dict(list(QUERIES.items())[:3]), QRELS)
    config, flat_scales = small.config, {TASK: {"cosine": 1.0}}
    flat.scales = flat_scales
    with pytest.raises(MismatchError, match=f"the index has scales of cosine, .* {config.parts[-1]}: remove them"):
        calibrate_index(small, flat, QUERIES, QRELS)


def test_init_says_how_the_parts_are_weighed(tiny_bert: Path, tmp_path: Path) -> None:
    (corpus := tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": each.id, "text": each.text}) + "\n" for each in DOCUMENTS[:20])
    )
    shown = cli("init", tiny_bert, tmp_path / "student", "--corpus", corpus).stdout
    assert "scales of the score: cosine 20, words 0.25, vectors 10" in shown and "d2llm tune MODEL --calibrate" in shown
    found = json.loads(cli("init", tiny_bert, tmp_path / "plain", "--json").stdout)
    assert found["scales"]["cosine"] == 20 and not found["scales"].get("words")

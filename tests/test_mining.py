"""Hard negatives: who is a candidate, who is taken out and why, and the file that is left."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import BertConfig, BertForSequenceClassification

from d2llm.bm25 import Bm25
from d2llm.cli import main
from d2llm.errors import DataError, ModelError
from d2llm.student import Student, StudentConfig
from d2llm.train import FalseNegativeFilter, mine, read_recipe
from d2llm.train.examples import Example, read_examples, write_examples
from d2llm.train.hub_loading import load_hub_teacher
from d2llm.train.mining import BiEncoderRanker, Ranker, interleave, load_bi_encoder, nearest
from d2llm.train.teacher import Bm25Teacher, LateInteraction, TokenStates

CORPUS = [
    "A generator yields values one at a time.",
    "a  generator YIELDS values\none at a time.",  # the same passage under another id
    "A generator of electric power yields a steady current.",
    "The yields of wheat rose this year.",
    "Values are yielded lazily by a generator expression.",
    "Bread is made from wheat, water and salt.",
    "The power of a generator is given in watts.",
    "A steady current of water.",
    *(
        "One two.",
        "Red and blue.",
        "Rain in spring.",
        "A long road home.",
        "Old maps.",
        "Two cats sleep.",
        "Tea, please.",
    ),
]
EXAMPLE = Example("generator yields values", [CORPUS[0]], ["old"])


@pytest.fixture(scope="module")
def bm25() -> Bm25:
    return Bm25(CORPUS)


@pytest.fixture(scope="module")
def student(tiny_bert: Path) -> Student:
    return Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen")).eval()


def order(*indices: int) -> Ranker:
    """A ranker that gives every query this order."""
    return lambda queries, depth: [list(indices[:depth])] * len(queries)


def texts(*indices: int) -> list[str]:
    return [CORPUS[index] for index in indices]


# candidates


def test_negatives_are_the_best_ranked_that_are_no_positive_under_any_id(bm25: Bm25) -> None:
    ranked = bm25.top(EXAMPLE.query, len(CORPUS))
    assert set(ranked[:2]) == {0, 1}
    found = mine([EXAMPLE], CORPUS, [bm25.rank], negatives=3)
    assert found.examples == [replace(EXAMPLE, negatives=texts(*ranked[2:5]))]
    assert (found.positives, found.short) == (1, 0), "two copies are one candidate"


def test_a_positive_of_the_same_query_on_another_row_is_no_negative() -> None:
    rows = [Example("q", texts(0), []), Example("Q ", texts(2), []), Example("other", texts(3), [])]
    found = mine(rows, CORPUS, [order(0, 2, 3, 4)], negatives=2)
    assert [example.negatives for example in found.examples] == [texts(3, 4), texts(3, 4), texts(0, 2)]
    assert found.positives == 5


def test_the_query_itself_is_no_negative_where_pairs_mean_the_same() -> None:
    query = CORPUS[5].lower()
    rows = [Example(query, texts(0), [], "symmetric"), Example(query, texts(0), [], "asymmetric")]
    found = mine(rows, CORPUS, [order(5, 6)], negatives=1)
    assert [example.negatives for example in found.examples] == [texts(6), texts(5)]


def test_the_document_that_is_the_query_is_no_negative() -> None:
    rows = [Example("values", texts(0), [], itself=texts(4)[0].upper()), Example("values", texts(0), [])]
    found = mine(rows, CORPUS, [order(4, 0, 6)], negatives=2)
    assert [example.negatives for example in found.examples] == [texts(6), texts(4, 6)]


def test_rankings_are_interleaved_each_passage_once() -> None:
    assert interleave([[3, 1, 2], [1, 3, 0, 7, 8], []]) == [3, 1, 2, 0, 7, 8]
    found = mine([EXAMPLE], CORPUS, [order(2, 0, 3), order(5, 2, 6)], negatives=9)
    assert found.examples[0].negatives == texts(2, 5, 3, 6)


def test_depth_bounds_each_ranker_and_skip_passes_over_the_best_that_are_no_positive() -> None:
    rankers = [order(0, 2, 3, 4), order(2, 5, 6, 7)]
    found = mine([EXAMPLE], CORPUS, rankers, negatives=9, depth=3, skip=1)
    assert found.examples[0].negatives == texts(5, 3, 6)
    assert found.short == 1


def test_a_query_without_candidates_keeps_its_row_and_is_counted(student: Student) -> None:
    teacher = LateInteraction(TokenStates(student, None))
    found = mine([EXAMPLE], CORPUS, [order(0, 1)], false_negatives=FalseNegativeFilter(teacher=teacher, margin=0.1))
    assert found.examples == [replace(EXAMPLE, negatives=[])]
    assert (found.positives, found.short) == (1, 1)


def test_more_queries_than_a_block_are_mined_as_each_alone(bm25: Bm25, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Example(text, [text], []) for text in CORPUS]
    whole = mine(rows, CORPUS, [bm25.rank], negatives=3)
    monkeypatch.setattr("d2llm.train.mining.QUERIES", 3)
    assert mine(rows, CORPUS, [bm25.rank], negatives=3) == whole
    known = [CORPUS[0], CORPUS[1]]
    alone = [mine([replace(row, positives=known if row.query in known else row.positives)], CORPUS, [bm25.rank],
                  negatives=3).examples[0].negatives for row in rows]  # fmt: skip
    assert [example.negatives for example in whole.examples] == alone


# bi-encoders


def test_a_bi_encoder_ranks_by_cosine(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.train.mining.ENCODED", 3)
    queries = ["electric current", "bread and salt", "lazy values"]
    for query, row in zip(queries, BiEncoderRanker(student, CORPUS).rank(queries, 5), strict=True):
        (vector,) = student.encode([query], "query").vectors_BE
        cosines = [float(vector @ student.encode([text], "document").vectors_BE[0]) for text in CORPUS]
        expected = sorted(range(len(CORPUS)), key=lambda index: -cosines[index])
        assert [cosines[i] for i in row] == pytest.approx([cosines[i] for i in expected[:5]], abs=1e-5)
        assert len(set(row)) == 5


@pytest.mark.parametrize("k", [1, 7, 50, 99])
def test_the_nearest_are_those_of_a_full_sort_whatever_the_blocks(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2llm.train.mining.QUERIES", 2)
    monkeypatch.setattr("d2llm.train.mining.PASSAGES", 10)
    queries_QE, passages_NE = torch.randn(2, 53, 6, generator=torch.Generator().manual_seed(0))
    expected_QN = (queries_QE @ passages_NE.T).sort(descending=True).indices
    assert torch.equal(nearest(queries_QE, passages_NE, k), expected_QN[:, :k])


def test_a_backbone_alone_ranks_by_its_mean_pooling(tiny_bert: Path) -> None:
    student = load_bi_encoder(str(tiny_bert))
    ids = torch.tensor(student.encodings([CORPUS[2]], "document"))
    mean = student.tokens(ids, torch.ones_like(ids)).mean(1)
    found = student.encode([CORPUS[2]], "document").vectors_BE
    torch.testing.assert_close(found, torch.nn.functional.normalize(mean, dim=-1), rtol=0, atol=1e-5)


def test_a_students_folder_ranks_as_that_student(student_folder: Path) -> None:
    expected = Student.load(student_folder).encode(CORPUS, "document").vectors_BE
    torch.testing.assert_close(load_bi_encoder(str(student_folder)).encode(CORPUS, "document").vectors_BE, expected)


# false negatives


@pytest.mark.parametrize("bound", [{"margin": 0.5}, {"max_probability": 0.8}, {"margin": 0.5, "max_probability": 0.8}])
def test_the_filter_drops_what_a_teacher_takes_for_a_positive(bm25: Bm25, bound: dict[str, float]) -> None:
    """The teacher's log-odds are BM25 scores. Of two positives the lower one counts."""
    example = replace(EXAMPLE, positives=texts(0, 3))
    scores = bm25.scores(example.query).tolist()
    kept, probable, near = [], 0, 0
    for index in (6, 2, 8, 4, 7):
        if 1 / (1 + math.exp(-scores[index])) > bound.get("max_probability", 1):
            probable += 1
        elif "margin" in bound and scores[index] > min(scores[0], scores[3]) - bound["margin"]:
            near += 1
        else:
            kept.append(CORPUS[index])
    keep = FalseNegativeFilter(teacher=Bm25Teacher(bm25, CORPUS), **bound)
    found = mine([example], CORPUS, [order(6, 2, 0, 8, 3, 4, 7)], negatives=9, false_negatives=keep)
    assert found.examples[0].negatives == kept
    assert (found.probable, found.within_margin) == (probable, near)
    assert 0 < len(kept) < 5 and bool(probable) == ("max_probability" in bound), "the case decides nothing"


def test_a_wide_margin_by_late_interaction_leaves_nothing_and_a_far_one_everything(student: Student) -> None:
    teacher = LateInteraction(TokenStates(student, None))  # mean cosines: none is 2 apart from another
    for margin, left in ((2.0, 0), (-2.0, 3)):
        keep = FalseNegativeFilter(teacher=teacher, margin=margin)
        found = mine([EXAMPLE], CORPUS, [order(2, 3, 0, 4)], negatives=9, false_negatives=keep)
        assert (len(found.examples[0].negatives), found.within_margin) == (left, 3 - left)


def test_a_filter_needs_a_bound_that_can_hold(bm25: Bm25) -> None:
    with pytest.raises(ValueError, match="a filter needs a bound"):
        FalseNegativeFilter(teacher=Bm25Teacher(bm25, CORPUS))
    with pytest.raises(ValueError, match=r"between 0 and 1, not at 1\.5"):
        FalseNegativeFilter(teacher=Bm25Teacher(bm25, CORPUS), max_probability=1.5)


# the file and the command


def test_what_is_written_is_read_again_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "train.jsonl"
    examples = [Example("q", texts(0, 1), texts(2)), Example("天气", ["今天"], [], "symmetric", "天气")]
    write_examples(path, examples)
    assert '"itself"' not in path.read_text(encoding="utf-8").splitlines()[0]
    assert read_examples(path) == examples
    with pytest.raises(DataError, match=r"train\.jsonl exists already"):
        write_examples(path, [])
    assert read_examples(path) == examples


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_examples(tmp_path / "train.jsonl", [EXAMPLE, Example("\ud800", ["p"], [])])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", CORPUS), ("queries", ["generator yields values", "salt bread", "nothing"])):
        lines = [json.dumps({"_id": f"{name[0]}{index}", "text": text}) + "\n" for index, text in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tc0\t1\nq1\tc5\t1\nq2\tc7\t0\n")
    return folder


def d2llm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_writes_tuples_and_counts_them(dataset: Path, tmp_path: Path, tiny_bert: Path) -> None:
    options: list[str | Path] = ["--with", "bm25", "--with", tiny_bert, "--depth", "4", "--negatives", "5"]
    done = d2llm("mine", dataset, tmp_path / "out.jsonl", *options, "--json")
    assert done.exit_code == 0, done.stderr
    counts = json.loads(done.stdout)
    rows = read_examples(tmp_path / "out.jsonl")
    corpus, bert = Bm25(CORPUS), BiEncoderRanker(load_bi_encoder(str(tiny_bert)), CORPUS)
    examples = [Example("generator yields values", texts(0), []), Example("salt bread", texts(5), [])]
    expected = mine(examples, CORPUS, [corpus.rank, bert.rank], negatives=5, depth=4)
    assert rows == expected.examples
    assert counts == {
        "queries": 2,
        "negatives": sum(len(row.negatives) for row in rows),
        "dropped": {"positives": expected.positives, "probable": 0, "within_margin": 0},
        "short": expected.short,
    }
    shown = d2llm(
        "mine", dataset, tmp_path / "other.jsonl", "--engine", "rank-bm25", "--depth", "4", "--negatives", "3"
    )
    assert "2 queries, 2 negatives in" in shown.stdout
    assert "2 queries have fewer than 3 negatives: raise --depth" in shown.stdout
    assert f"--set data.examples={tmp_path / 'other.jsonl'}" in shown.stdout
    shown = d2llm("mine", dataset, tmp_path / "third.jsonl", "--depth", "100", "--negatives", "50")
    assert f"2 queries have fewer than 50 negatives: the {len(CORPUS)} passages have no more" in shown.stdout


def test_the_command_filters_by_the_reranker_of_a_recipe(dataset: Path, tmp_path: Path, minilm: Path) -> None:
    torch.manual_seed(5)
    network = BertForSequenceClassification(
        BertConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, id2label={0: "yes"}
        )
    )
    with torch.no_grad():
        network.classifier.weight.mul_(30)  # log-odds that differ
    network.save_pretrained(tmp_path / "reranker")
    shutil.copy(minilm / "tokenizer.json", tmp_path / "reranker")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
        precision = "fp32"
        [student]
        backbone = "unused"
        [data]
        folder = "unused"
        [teacher]
        members = ["reranker"]
        model = "{tmp_path / "reranker"}"
    """)
    teacher = load_hub_teacher(read_recipe(recipe).teacher, "cpu", None)
    example = Example("generator yields values", texts(0), [])
    odds = teacher.judge(example.query, texts(0, 4, 2, 3, 6)).log_odds_K.tolist()
    margin = odds[0] - sum(sorted(odds[1:])[1:3]) / 2  # two of the four stay
    done = d2llm("mine", dataset, tmp_path / "out.jsonl", "--teacher", recipe, f"--margin={margin}", "--depth=15")
    assert done.exit_code == 0, done.output
    kept = [index for index, value in zip((4, 2, 3, 6), odds[1:], strict=True) if value <= odds[0] - margin]
    assert read_examples(tmp_path / "out.jsonl")[0].negatives == texts(*kept)
    assert "within the positive's margin" in done.stdout


def test_the_command_refuses_before_it_works(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text("kept")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[student]\nbackbone = "b"\n[data]\nfolder = "f"\n')
    new = tmp_path / "new.jsonl"
    cases: list[tuple[list[str | Path], int, str]] = [
        ([dataset, tmp_path / "kept.jsonl"], 1, "kept.jsonl exists already"),
        ([dataset, new, "--split", "dev"], 1, "dev.tsv: no such file"),
        (["./nothing", new, "--with", "./nowhere"], 1, "--with './nowhere': there is no such file or folder"),
        ([dataset, new, "--margin", "1"], 2, "one half is missing"),
        ([dataset, new, "--teacher", recipe], 2, "one half is missing"),
        ([dataset, new, "--teacher", recipe, "--margin", "1"], 1, "none is an `llm` or `reranker`"),
        ([dataset, new, "--depth", "5", "--skip", "3", "--negatives", "3"], 2, "raise --depth"),
        ([dataset, new, "--max-probability", "1"], 2, "0<x<1"),
        ([dataset, new, "--teacher", recipe, "--max-probability", "nan"], 2, "expected a finite number, found nan"),
        ([dataset, new, "--teacher", recipe, "--margin", "inf"], 2, "expected a finite number, found inf"),
    ]
    for arguments, status, message in cases:
        refused = d2llm("mine", *arguments)
        assert refused.exit_code == status, refused.output
        assert message in refused.stderr
    assert (tmp_path / "kept.jsonl").read_text() == "kept"
    assert not new.exists()


def test_a_ranker_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"embedder '.*absent': there is no such file or folder"):
        load_bi_encoder(str(tmp_path / "absent"))

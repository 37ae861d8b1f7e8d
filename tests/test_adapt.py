"""Queries that a language model writes, and the adaptation of an embedder to a corpus by them."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from d2llm.calibration import Evidence
from d2llm.cli import main
from d2llm.embedder import create_student
from d2llm.errors import ArgumentError, DataError, ModelError, OutputExistsError
from d2llm.heads import RecallHead, RecallHeadKind
from d2llm.lock import FileLock
from d2llm.student import Student
from d2llm.train import adapt as adapting
from d2llm.train import generator as generating
from d2llm.train import generator_tuning, written_lessons
from d2llm.train.adapt import adapt
from d2llm.train.adaptation import Adaptation, Report
from d2llm.train.adaptation_stage import LinearMap
from d2llm.train.examples import Example
from d2llm.train.generator import CausalGenerator, DocToQuery, Written, load_generator, read_written, write_queries
from d2llm.train.generator_tuning import GeneratorTuning, finetune_generator
from d2llm.train.loop import Loop
from d2llm.train.pool import Pool, Query
from d2llm.train.styles import SHOWN, Style
from d2llm.train.written_lessons import queries_of
from d2llm.types import Document

TOPICS = {
    "river": "stream", "engine": "motor", "violin": "fiddle", "vaccine": "injection", "glacier": "ice",
    "parliament": "assembly", "orchid": "flower", "satellite": "probe",
}  # fmt: skip
"""The words of the passages, and the words of their queries."""
FACTS = ("grew", "failed", "was measured", "was painted", "was sold", "froze", "was repaired", "was elected")
PLACES = ("Oslo", "Lima", "Cairo", "Perth", "Kyoto", "Quito", "Tunis", "Riga")
SETTINGS = Adaptation(tuning="full", steps=40, batch=16, negatives=5, candidates=15, lr=3e-3)
HEAD = Adaptation(steps=40, folds=2, candidates=15, lr=2e-2)


@pytest.fixture(scope="module")
def corpus() -> dict[str, Document]:
    texts = [
        f"the {topic} near {place} {fact} in {1900 + number}"
        for number, (topic, fact, place) in enumerate((t, f, p) for t in TOPICS for f in FACTS for p in PLACES)
    ]
    return {f"d{number}": Document(f"d{number}", text) for number, text in enumerate(texts)}


@pytest.fixture(scope="module")
def written(corpus: dict[str, Document], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries that use other words than their passages."""
    path = tmp_path_factory.mktemp("written") / "queries.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number, (id_, document) in enumerate(corpus.items()):
            _, topic, _, place, *fact, _, _ = document.text.split()
            query = f"{TOPICS[topic]} {place} {' '.join(fact)}"
            row = {"_id": str(number), "text": query, "style": "keywords", "passage": id_}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(autouse=True)
def small_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpora of these tests are small, which the tests of the limits undo."""
    monkeypatch.setattr(adapting, "SMALLEST", 100)
    monkeypatch.setattr(written_lessons, "FEWEST", 20)
    monkeypatch.setattr(generating, "BATCH", 4)
    monkeypatch.setattr(generating, "QUERY_TOKENS", 4)


class Fails:
    """A generator that stops in the middle, as a killed process does."""

    def __init__(self, generator: CausalGenerator, batches: int) -> None:
        self.generator, self.left = generator, batches
        self.identity, self.learned = generator.identity, generator.learned

    def write(self, passages: Sequence[str], styles: Sequence[Style]) -> list[list[str]]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        written: list[list[str]] = self.generator.write(passages, styles)
        return written


@contextmanager
def stopped_at(number: int) -> Iterator[None]:
    """Stop a run before this step, as Ctrl-C does."""
    step = Loop._step

    def stops(self: Loop, stage: Any, optimizer: torch.optim.Optimizer, at: int) -> None:
        if at == number:
            raise KeyboardInterrupt
        step(self, stage, optimizer, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_step", stops)
        yield


@pytest.fixture(scope="module")
def few_shot(tiny_llm: Path) -> CausalGenerator:
    return load(tiny_llm)


def test_shared_reading_writes_what_each_prompt_alone_would(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    monkeypatch.setattr(generating, "QUERY_TOKENS", greedy["max_new_tokens"])
    monkeypatch.setattr(generating, "_sampled", lambda logits_BV: logits_BV.argmax(-1))
    few_shot = load(tiny_llm)
    few_shot.model.float()  # bf16 rounds near ties one way in a batch and another way alone
    with torch.no_grad():
        for weight in few_shot.model.parameters():
            weight *= 10 if weight.ndim == 2 else 1  # so that what it writes depends on each token that it reads
    passages = ["the cat sat on the mat", "a much longer passage, on rivers and on their banks"]
    styles: tuple[Style, ...] = ("claim", "title")
    lines = list[str]()
    for text, queries in SHOWN:
        lines += [f"Passage: {text}", *(f"{style.capitalize()}: {queries[style]}" for style in styles), ""]
    reference = []
    for passage in passages:
        for style in styles:
            prompt = "\n".join([*lines, f"Passage: {passage}", f"{style.capitalize()}:"])
            ids = few_shot.tokenizer.encode(prompt)[:-1]  # [CLS] comes first, as BOS does, and no [SEP] ends the prompt
            tokens = few_shot.model.generate(torch.tensor([ids]), eos_token_id=102, **greedy)[0, len(ids) :]
            reference.append(few_shot.tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert [text for row in few_shot.write(passages, styles) for text in row] == reference
    assert any(reference)


def test_a_killed_generator_goes_on_and_writes_the_same_file(few_shot: CausalGenerator, tmp_path: Path) -> None:
    passages = {f"p{number}": f"passage {number} on rivers" for number in range(10)}
    whole = write_queries(few_shot, passages, tmp_path / "whole.jsonl", styles=("question", "title"))
    out = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_queries(Fails(few_shot, 2), passages, out, styles=("question", "title"))
    assert not out.exists()
    (part,) = tmp_path.glob("killed.jsonl.*.part")
    part.write_text(part.read_text()[:-10])  # the last batch was cut off
    lock, before = FileLock(part), part.read_bytes()  # as another process that writes them has it
    with pytest.raises(DataError, match=r"killed.jsonl: another process writes these queries\. Wait for it"):
        write_queries(few_shot, passages, out, styles=("question", "title"))
    assert part.read_bytes() == before
    lock.release()
    assert write_queries(few_shot, passages, out, styles=("question", "title")) == whole
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()
    with pytest.raises(KeyboardInterrupt):
        write_queries(Fails(few_shot, 2), passages, tmp_path / "new.jsonl", styles=("question", "title"))
    other = write_queries(few_shot, passages, tmp_path / "new.jsonl", styles=("question", "title"), seed=1)
    assert other != whole  # nothing of another seed's rest
    assert len({query.text for query in whole}) > 10


def test_a_rest_is_cut_at_its_lines_alone(few_shot: CausalGenerator, tmp_path: Path) -> None:
    """Ids and queries may hold characters at which strings are split too, and a kill may cut a character in two."""
    passages = {f"a\u2028\u0085{number}": f"passage {number} on rivers" for number in range(10)}
    whole = write_queries(few_shot, passages, tmp_path / "whole.jsonl", styles=("question",))
    with pytest.raises(KeyboardInterrupt):
        write_queries(Fails(few_shot, 2), passages, tmp_path / "killed.jsonl", styles=("question",))
    (part,) = tmp_path.glob("killed.jsonl.*.part")
    part.write_bytes(part.read_bytes() + '{"_id": "é'.encode()[:-1])
    assert write_queries(few_shot, passages, tmp_path / "killed.jsonl", styles=("question",)) == whole
    assert len(whole) == 10


def test_a_rest_for_other_passages_is_not_continued(few_shot: CausalGenerator, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_queries(Fails(few_shot, 1), {f"p{n}": "text" for n in range(8)}, tmp_path / "q.jsonl")
    written = write_queries(few_shot, {f"other{n}": "text" for n in range(8)}, tmp_path / "q.jsonl")
    assert {query.passage for query in written} == {f"other{n}" for n in range(8)}


def test_an_encoder_decoder_writes_queries(minilm: Path, tmp_path: Path) -> None:
    config = T5Config(vocab_size=30522, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(str(minilm)).save_pretrained(tmp_path / "t5")
    generator = load_generator(str(tmp_path / "t5"), torch.device("cpu"))
    assert isinstance(generator, DocToQuery)
    rows = generator.write(["a passage", "another passage"], ("question", "title"))
    assert [len(row) for row in rows] == [2, 2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "style": "poem", "passage": "d"}, r"jsonl:1: expected .style. to be one of question, .*'poem'"),
        (
            {"text": 3, "style": "claim", "passage": "d"},
            r"jsonl:1: expected .text. and .passage. to be strings, found 3",
        ),
    ],
)
def test_bad_rows_of_written_queries_name_their_line(row: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_written(tmp_path / "q.jsonl")


def test_a_title_looks_for_its_document_without_the_title(tiny_bert: Path) -> None:
    corpus = {
        "a": Document("a", "Cats sleep all day and hunt at night.", "On the life of cats"),
        "b": Document("b", "Dogs bark at strangers.", "On dogs"),
        "c": Document("c", "The life of a river begins in the hills."),
    }
    pool = Pool.sample(corpus, create_student(str(tiny_bert)), 10, 10, seed=0)
    assert {query.text for query in pool.titles} == {"On the life of cats", "On dogs"}
    assert len(Pool.sample(corpus, create_student(str(tiny_bert)), 10, 1, seed=0).texts) == 3 + 1
    query = next(query for query in pool.titles if query.text == "On dogs")
    assert query.own is not None
    assert pool.texts[query.own] == "Dogs bark at strangers."
    candidates = pool.candidates(query, torch.zeros(len(pool.texts)), 10)
    assert [pool.texts[row] for row in candidates[:1]] == ["Dogs bark at strangers."]
    assert {pool.documents[row] for row in candidates[1:]} == {"a", "c"}
    logged = pool.candidates(Query("barking dogs", "log", None), torch.zeros(len(pool.texts)), 10)
    assert sorted(pool.texts[row] for row in logged) == sorted(document.content for document in corpus.values())


def test_a_long_document_takes_part_as_passages(tiny_bert: Path) -> None:
    text = " ".join(f"Sentence number {number} says nothing new." for number in range(60))
    student = create_student(str(tiny_bert), max_length=64)
    pool = Pool.sample({"long": Document("long", text)}, student, 10, 10, seed=0)
    assert len(pool.texts) > 5
    assert list(pool.names)[:2] == ["long", "long#1"]
    assert set(pool.documents) == {"long"}


def test_a_document_with_the_name_of_a_passage_is_another_row(tiny_bert: Path) -> None:
    text = " ".join(f"Sentence number {number} says nothing new." for number in range(60))
    corpus = {"long": Document("long", text), "long#1": Document("long#1", "Cats sleep.", "On cats")}
    pool = Pool.sample(corpus, create_student(str(tiny_bert), max_length=64), 10, 10, seed=0)
    assert "Cats sleep." in pool.texts[pool.names["long#1"]] and len(pool.titles) == 1
    found = pool.candidates(Query("anything", "log", None), torch.zeros(len(pool.texts)), 100)
    assert sorted(found) == list(range(len(pool.texts) - 1)), "all passages, but not the text without its title"


def test_a_heading_looks_for_its_passage_without_the_heading(tiny_bert: Path) -> None:
    parts = {
        name: f"{name} needs a step that no other part of the manual explains. " * 6 for name in ("Linux", "macOS")
    }
    text = "".join(f"## {name}\n\n{part}\n\n" for name, part in parts.items())
    corpus = {"long": Document("long", text, "Install"), "short": Document("short", "## Later\n\nNothing is known.")}
    student = create_student(str(tiny_bert), max_length=128)
    pool = Pool.sample(corpus, student, 10, 10, seed=0)
    assert {query.text for query in pool.titles} == {"Install Linux", "Install macOS"}
    query = next(query for query in pool.titles if query.text == "Install macOS")
    assert query.own is not None
    assert pool.texts[query.own].strip() == parts["macOS"].strip()
    own, *others = pool.candidates(query, torch.zeros(len(pool.texts)), 10)
    assert own == query.own
    assert all("macOS" not in pool.texts[row] for row in others), "the passage with the heading is no rival"


class Run:
    """Adapts an embedder with random weights, which has much to learn, to the corpus of these tests."""

    def __init__(self, corpus: dict[str, Document], embedder: Path, written: Path) -> None:
        self.corpus, self.embedder, self.written = corpus, str(embedder), written

    def __call__(self, out: Path, **options: Any) -> Report:
        options = {"written": self.written, "settings": SETTINGS, **options}
        return adapt(self.corpus, self.embedder, str(out), **options)


@pytest.fixture(scope="module")
def run(corpus: dict[str, Document], written: Path, tiny_bert: Path) -> Run:
    return Run(corpus, tiny_bert, written)


@pytest.fixture(scope="module")
def adapted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    return whole_run(run, tmp_path_factory.mktemp("adapted") / "student", SETTINGS)


@pytest.fixture(scope="module")
def head_adapted(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    return whole_run(run, tmp_path_factory.mktemp("head") / "student", HEAD)


def whole_run(run: Run, out: Path, settings: Adaptation) -> tuple[Report, Path]:
    """A run for all tests of this file, with the limits of `small_is_enough`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "SMALLEST", 100)
        patch.setattr(written_lessons, "FEWEST", 20)
        return run(out, settings=settings), out


def test_an_adapted_student_moved_and_tells_why(adapted: tuple[Report, Path], run: Run) -> None:
    report, out = adapted
    assert report.gain is not None
    assert report.gain.sure
    assert report.adapted
    assert report.kept["keywords"] > 100
    assert report.teacher["teacher"] > report.teacher["cosine"]
    student = Student.load(out)
    assert student.provenance["adaptation"]["verdict"] == report.verdict
    texts = ["the river near Oslo grew"]
    start = create_student(run.embedder).encode(texts, "query").vectors_BE
    assert not torch.allclose(student.encode(texts, "query").vectors_BE, start)
    assert not out.with_name("student.run").exists()
    assert (out / "log.jsonl").is_file()


def head_of(folder: Path) -> torch.Tensor:
    """The weight of a student's recall head."""
    return load_file(folder / "heads.safetensors")["recall_head.weight"]


def test_a_trained_head_alone_adapts_too(head_adapted: tuple[Report, Path], run: Run, tmp_path: Path) -> None:
    report, out = head_adapted
    assert report.gain is not None
    assert report.adapted
    student, start = Student.load(out), create_student(run.embedder)
    assert all(torch.equal(*pair) for pair in zip(student.backbone.parameters(), start.parameters(), strict=False))
    texts = ["stream Oslo grew", "the river near Oslo grew"]
    weight_EE = head_of(out)
    mapped_BE = start.encode(texts, "query").vectors_BE @ weight_EE.T  # nothing but the head changed
    torch.testing.assert_close(student.encode(texts, "query").vectors_BE, normalize(mapped_BE), rtol=0, atol=1e-5)
    run(tmp_path / "end", settings=replace(HEAD, way=1.0))
    torch.testing.assert_close(weight_EE, (head_of(tmp_path / "end") + torch.eye(len(weight_EE))) / 2)


def test_a_killed_training_of_the_head_encodes_nothing_again(
    head_adapted: tuple[Report, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = head_adapted
    monkeypatch.setattr(adapting, "SAVE_EVERY", 7)
    with stopped_at(25):
        run(tmp_path / "student", settings=HEAD)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Pool, "encode")
        assert run(tmp_path / "student", settings=HEAD).gain == whole.gain
    assert torch.equal(head_of(out), head_of(tmp_path / "student"))


@pytest.mark.parametrize("kind", [None, "linear", "affine"])
def test_a_map_over_a_student_maps_its_recall_vectors(kind: RecallHeadKind | None, tiny_bert: Path) -> None:
    student = create_student(str(tiny_bert))
    if kind is not None:
        student.config = replace(student.config, embedding_dim=24, recall_head=kind)
        student.recall_head = RecallHead(student.dim, 24, kind)
        torch.nn.init.normal_(next(reversed(list(student.recall_head.parameters()))))
    linear_map = LinearMap(student.embedding_dim).requires_grad_(False)
    torch.nn.init.normal_(linear_map.weight_EE)
    texts = ["the river near Oslo grew", "a violin"]
    expected_BE = linear_map(student.encode(texts, "document").vectors_BE)
    actual_BE = linear_map.over(student).encode(texts, "document").vectors_BE
    torch.testing.assert_close(actual_BE, expected_BE, rtol=0, atol=1e-5)


def test_no_map_follows_a_tanh(tiny_bert: Path) -> None:
    student = create_student(str(tiny_bert))
    student.recall_head = RecallHead(student.dim, 24, "tanh")
    with pytest.raises(ModelError, match="ends with a tanh, which no linear map can follow: use --set tuning=full"):
        LinearMap(24).over(student)


def test_the_weights_stop_half_way(adapted: tuple[Report, Path], run: Run, tmp_path: Path) -> None:
    run(tmp_path / "end", settings=replace(SETTINGS, way=1.0))
    half, end = Student.load(adapted[1]).backbone.state_dict(), Student.load(tmp_path / "end").backbone.state_dict()
    for name, weight in create_student(run.embedder).backbone.state_dict().items():
        if weight.is_floating_point():
            torch.testing.assert_close(half[name], (weight + end[name]) / 2)


def test_a_killed_adaptation_ends_as_an_undisturbed_one(
    adapted: tuple[Report, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, embedder = tmp_path / "student", shutil.copytree(run.embedder, tmp_path / "embedder")
    run = Run(run.corpus, embedder, run.written)
    monkeypatch.setattr(adapting, "SAVE_EVERY", 3)
    with stopped_at(20):
        run(out)
    assert not out.exists()
    weights = embedder / "model.safetensors"
    before = load_file(weights)
    save_file({name: weight + 0.1 for name, weight in before.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="unfinished run with weights of the embedder = '"):
        run(out)
    save_file(before, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"student.run holds an unfinished run with lr = 0.003, this one has 0.002"):
        run(out, settings=replace(SETTINGS, lr=2e-3))
    assert run(out).gain == adapted[0].gain
    first, second = (load_file(folder / "backbone" / "model.safetensors") for folder in (adapted[1], out))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("gained", "lost", "adapted", "why"),
    [
        (7, 0, True, "The student is adapted"),
        # p = 2 / 2^6, which would be sure for one ranking alone
        (6, 0, False, "Neither is sure at p < 0.025, so the embedder stays as it was"),
        (40, 1, False, "One of the two loses, so the embedder stays as it was"),
    ],
)
def test_the_cosine_and_a_hybrid_search_decide(gained: int, lost: int, adapted: bool, why: str) -> None:
    """Before, the words find the first candidate of 40 queries, and the cosine misses it. Then the cosine finds it for
    some, and the words miss it for others."""

    def evidence(gained: int, lost: int) -> list[list[Evidence]]:
        scores = [
            ((0.9, 0.1) if at < gained else (0.1, 0.9), (1.0, 0.0) if at < 40 - lost else (0.0, 1.0))
            for at in range(40)
        ]
        return [[Evidence(np.array(parts, np.float32).T, np.array([1, 0], np.float32), 1.0) for parts in scores]]

    report = Report()
    verdict = adapting._decide(report, evidence(0, 0), evidence(gained, lost), {"cosine": 1.0, "words": 2.0})
    assert report.adapted == adapted
    assert why in verdict
    assert report.gain is not None and report.gain.ndcg_10 == 1


def test_without_a_sure_gain_the_embedder_stays(run: Run, tmp_path: Path) -> None:
    report = run(tmp_path / "student", settings=replace(SETTINGS, steps=1, lr=1e-9))
    assert not report.adapted
    assert "Neither is sure at p < 0.025, so the embedder stays as it was" in report.verdict
    student = Student.load(tmp_path / "student")
    start = create_student(run.embedder, corpus=[document.content for document in run.corpus.values()])
    assert student.weights_sha256(whole=True) == start.weights_sha256(whole=True)
    assert set(student.iem.part_names) >= {"cosine", "words"}


def test_a_file_of_queries_stays_where_it_is(run: Run, tmp_path: Path) -> None:
    queries = tmp_path / "student.queries.jsonl"
    queries.write_bytes(run.written.read_bytes())
    run(tmp_path / "student", written=queries, settings=replace(SETTINGS, steps=1))
    assert queries.read_bytes() == run.written.read_bytes()
    assert (tmp_path / "student" / "queries.jsonl").read_bytes() == run.written.read_bytes()


def test_a_small_corpus_is_not_trained_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "SMALLEST", 1000)
    report = run(tmp_path / "student")
    assert "has 512 documents. Fewer than 1,000 can make an embedder worse" in report.verdict
    assert Student.load(tmp_path / "student").config.tuning == "frozen"


def test_too_few_queries_are_an_error_before_they_are_written(
    run: Run, few_shot: CausalGenerator, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, written=9, styles=("title", "claim"))
    with pytest.raises(DataError, match=r"there will be 18 queries at most, and an adaptation needs 20 that decide"):
        run(tmp_path / "student", written=None, generator=Fails(few_shot, 0), settings=settings)
    assert not list(tmp_path.iterdir())


def test_loops_and_copies_of_the_examples_are_dropped(tiny_bert: Path) -> None:
    corpus = {f"d{number}": Document(f"d{number}", f"all about topic {number}") for number in range(6)}
    pool = Pool.sample(corpus, create_student(str(tiny_bert)), 6, 6, seed=0)
    loops = ["the new home is a new home it is a new home", "好的酒店好的酒店好的酒店"]
    texts = [*loops, "how to take iron tablets", "tea tea", "what is it that it is not", "怎么在北京找到一家好的酒店"]
    rows = [Written(text, "claim", f"d{number}") for number, text in enumerate(texts)]
    log = ["new york new york new york new york"]  # a person's query
    assert [query.text for query in queries_of(pool, rows, log, Report())] == [*log, *texts[3:]]


def test_queries_that_miss_their_passages_are_an_error(run: Run, tmp_path: Path) -> None:
    rows = [
        {"_id": id_, "text": ("", document.text, "the same for all")[number % 3], "style": "claim", "passage": id_}
        for number, (id_, document) in enumerate(run.corpus.items())
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"of 512 queries 0 are left to learn from .* Does the generator know the lang"):
        run(tmp_path / "student", written=tmp_path / "q.jsonl")
    assert not (tmp_path / "student").exists()


def test_a_reranker_below_the_cosine_teaches_nothing(run: Run, minilm: Path, tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config.num_labels = 1
    reranker = BertForSequenceClassification(config)
    nn.init.zeros_(reranker.classifier.weight)  # all passages are equal to it
    reranker.save_pretrained(tmp_path / "reranker")
    AutoTokenizer.from_pretrained(str(minilm)).save_pretrained(tmp_path / "reranker")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written_lessons, "FEWEST", 0)
        with pytest.raises(ModelError, match=r"ranks no better than the embedder's cosine \(mean reciprocal rank"):
            run(tmp_path / "student", reranker=str(tmp_path / "reranker"))


def test_a_larger_embedder_adds_what_it_knows(
    head_adapted: tuple[Report, Path], run: Run, minilm: Path, tmp_path: Path
) -> None:
    """MiniLM beside an embedder with random weights."""
    alone, _ = head_adapted
    taught = run(tmp_path / "taught", settings=HEAD, teacher=str(minilm))
    assert taught.teacher["cosine"] == alone.teacher["cosine"]
    assert taught.teacher["teacher"] > alone.teacher["teacher"] + 0.1
    assert taught.gain is not None
    assert taught.gain.sure


def test_a_killed_adaptation_does_not_go_on_with_another_teacher(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(run.embedder, tmp_path / "teacher")
    monkeypatch.setattr(adapting, "SAVE_EVERY", 3)
    with stopped_at(4):
        run(tmp_path / "student", settings=HEAD, teacher=str(teacher))
    weights = load_file(teacher / "model.safetensors")
    save_file({name: weight + 0.1 for name, weight in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"student.run holds an unfinished run with sha256.teacher = '"):
        run(tmp_path / "student", settings=HEAD, teacher=str(teacher))


def test_a_missing_teacher_is_named_before_a_query_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent"):
        run(tmp_path / "student", written=None, generator=Unused(), teacher=str(tmp_path / "absent"))


class Unused:
    """A generator that nobody may ask."""

    identity, learned = {"name": "unused"}, None

    def write(self, passages: Sequence[str], styles: Sequence[Style]) -> list[list[str]]:
        raise AssertionError("queries are written")


def test_nothing_to_make_queries_of(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing to decide with: no document has a title and a text, or headings. Na"):
        run(tmp_path / "student", written=None, log=["when was the violin sold"])
    assert not list(tmp_path.iterdir())


def test_queries_for_another_corpus_are_an_error(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"_id": "1", "text": "cats", "style": "claim", "passage": "elsewhere"}\n')
    with pytest.raises(DataError, match=r"none of 1 queries was written for a document of this corpus.*'elsewhere'"):
        run(tmp_path / "student", written=path)
    path.write_text("")
    with pytest.raises(DataError, match=r"q.jsonl: no queries"):
        run(tmp_path / "student", written=path)
    with pytest.raises(DataError, match=r"typo.jsonl: no such file"):
        run(tmp_path / "student", written=tmp_path / "typo.jsonl")


def test_after_an_error_the_queries_are_kept_for_other_settings(
    run: Run, few_shot: CausalGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, written=8)
    with pytest.raises(DataError, match=r"to decide with"):
        run(tmp_path / "student", written=None, generator=few_shot, settings=settings)
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".queries.jsonl")
    monkeypatch.setattr(CausalGenerator, "write", None)  # nothing is written again
    with pytest.raises(DataError, match=r"to decide with"):
        run(tmp_path / "student", written=None, generator=few_shot, settings=replace(settings, folds=2))


def test_the_commands_from_a_corpus_to_a_student(run: Run, tiny_llm: Path, tmp_path: Path) -> None:
    corpus, queries, log = tmp_path / "corpus.jsonl", tmp_path / "q.jsonl", tmp_path / "log.txt"
    rows = [{"_id": document.id, "text": document.text} for document in run.corpus.values()]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(*arguments: object) -> Result:
        return CliRunner().invoke(main, list(map(str, arguments)))

    found = command("generate", corpus, queries, "--generator", tiny_llm, "--passages", 20)
    assert found.exit_code == 0, found.output
    assert "80 queries for 20 documents" in found.output
    assert len(read_written(queries)) == 80
    *_, read, following = found.stdout.splitlines()
    assert read.startswith(f"Now read {queries}.") and following.startswith("Next: d2llm adapt")
    log.write_text("when was the violin near Lima sold\nengine repaired Riga\n")
    options = ["--from", run.embedder, "--generated", run.written, "--queries", log, "--set", "steps=2"]
    found = command("adapt", corpus, tmp_path / "student", *options, "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["written"] == {"log": 2, "keywords": 512}
    assert facts["kept"]["log"] == 2
    found = command("adapt", corpus, tmp_path / "student", *options)
    assert (found.exit_code, "exists" in found.output) == (1, True)
    for first, second in (("--generator", "--generated"), ("--reranker", "--teacher")):
        found = command("adapt", corpus, tmp_path / "new", first, "x", second, "y")
        assert (found.exit_code, "choose one" in found.output) == (2, True)


def test_a_fine_tuned_generator_writes_what_it_learned(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example("median", [f"passage {number} on cats"], []) for number in range(16)]
    settings = GeneratorTuning(steps=60, batch=8, lr=1e-2)
    tuned = finetune_generator(load(tiny_llm), examples, tmp_path / "tuned", settings=settings)
    loaded = load(tmp_path / "tuned")
    prompt = torch.tensor([loaded.tokenizer.encode("Passage: another passage on cats Question:")[:-1]])
    with torch.inference_mode():
        said = [generator.model.generate(prompt, max_new_tokens=24, do_sample=False) for generator in (tuned, loaded)]
    assert torch.equal(*said)
    assert loaded.tokenizer.decode(said[0][0, prompt.shape[1] :]).startswith("median")
    assert not (tmp_path / "tuned.run").exists()
    monkeypatch.setattr(generating, "_sampled", lambda logits_BV: logits_BV.argmax(-1))
    passages = ["another passage on cats", "and one on dogs, which is longer"]
    for generator in (tuned, loaded):  # no examples, and the cue that it knows
        assert generator.write(passages, ("claim", "title")) == [["medi", "medi"]] * 2, "four tokens of median"
    written = write_queries(loaded, {"p": passages[0]}, tmp_path / "q.jsonl", styles=("claim", "title"))
    assert [(query.style, query.text) for query in written] == [("question", "medi")] * 2


@pytest.mark.parametrize("content", ['{"learned": "poem", "about": {}}', "{", "[]", "{}"])
def test_a_damaged_note_of_a_fine_tuned_generator(content: str, tiny_llm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llm, tmp_path / "tuned")
    (folder / generating.FACTS).write_text(content)
    with pytest.raises(ModelError, match=r"generator.json.*fine-tune the generator again"):
        load_generator(str(folder), torch.device("cpu"))


def test_a_killed_fine_tuning_of_a_generator_ends_as_an_undisturbed_one(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example(f"query {number}", [f"passage {number}"], []) for number in range(16)]
    whole = finetune_generator(load(tiny_llm), examples, tmp_path / "whole", settings=GeneratorTuning(steps=6, batch=4))
    out = tmp_path / "killed"
    monkeypatch.setattr(generator_tuning, "SAVE_EVERY", 3)
    with stopped_at(4):
        finetune_generator(load(tiny_llm), examples, out, settings=GeneratorTuning(steps=6, batch=4))
    assert not out.exists()
    resumed = finetune_generator(load(tiny_llm), examples, out, settings=GeneratorTuning(steps=6, batch=4))
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    monkeypatch.setattr(Loop, "_step", None)  # nothing is trained again: the command was killed after it
    again = finetune_generator(load(tiny_llm), examples, out, settings=GeneratorTuning(steps=6, batch=4))
    assert (again.identity, again.learned) == (resumed.identity, "question")
    with pytest.raises(OutputExistsError, match=r"killed"):
        finetune_generator(load(tiny_llm), examples, out, settings=GeneratorTuning(steps=7, batch=4))
    corrected = [replace(examples[0], query="query zero"), *examples[1:]]
    with pytest.raises(OutputExistsError, match=r"killed"):
        finetune_generator(load(tiny_llm), corrected, out, settings=GeneratorTuning(steps=6, batch=4))


def load(folder: Path) -> CausalGenerator:
    generator = load_generator(str(folder), torch.device("cpu"))
    assert isinstance(generator, CausalGenerator)
    return generator


def test_a_token_is_drawn_in_proportion_from_the_most_probable_ones_alone() -> None:
    share_V = torch.tensor([0.05, 0.5, 0.15, 0.3])  # .5 + .3 are not yet TOP_P, with .15 they are
    logits_BV = (share_V.log() * generating.TEMPERATURE).expand(4000, -1)
    torch.manual_seed(0)
    drawn = generating._sampled(logits_BV).bincount(minlength=4) / 4000
    assert drawn[0] == 0
    assert drawn[1:].tolist() == pytest.approx((share_V[1:] / 0.95).tolist(), abs=0.03)


@pytest.mark.parametrize("harmed", [None, "claim"])
def test_scales_change_only_if_each_style_of_queries_gains(tiny_bert: Path, harmed: str | None) -> None:
    student = create_student(str(tiny_bert), corpus=["the river near Oslo", "a bank in Rome"])
    before, parts = student.iem.scales_of("asymmetric"), student.iem.part_names
    queries, evidence = list[Query](), list[Evidence]()
    for number in range(800):
        style = ("question", "claim")[number % 2]
        parts_KC = np.zeros((5, len(parts)), np.float32)
        parts_KC[0, parts.index("words")] = -1 if style == harmed else 1  # the right one, which words find or miss,
        parts_KC[1:, parts.index("vectors")] = 1.2 * before["words"] / before["vectors"]  # the vectors say otherwise
        queries.append(Query(f"query {number}", style, 0))
        evidence.append(Evidence(parts_KC, np.array([1, 0, 0, 0, 0], np.float32), ideal=1.0))
    found = adapting.calibrated(student, [queries[:300], queries[300:]], [evidence[:300], evidence[300:]])
    assert found is not None
    after = student.iem.scales_of("asymmetric")
    if harmed is None:
        assert after["words"] / after["vectors"] > 1.2 * before["words"] / before["vectors"]
        assert "The scales of the score change: " in adapting._said(found)
    else:
        assert after == before
        assert "scales of the score stay" in adapting._said(found)


def test_an_existing_file_of_queries_is_kept(few_shot: CausalGenerator, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("mine\n")
    with pytest.raises(OutputExistsError, match=r"q.jsonl"):
        write_queries(few_shot, {"a": "text"}, tmp_path / "q.jsonl")
    assert (tmp_path / "q.jsonl").read_text() == "mine\n"


def test_an_adaptation_without_a_style_is_refused() -> None:
    with pytest.raises(ArgumentError, match="styles: expected one or more of question, keywords, claim, title"):
        Adaptation(styles=())


def test_the_queries_and_the_fine_tuned_generator_have_names_of_their_own(tmp_path: Path) -> None:
    """Found before a generator is loaded and fine-tuned."""
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "a river"}\n')
    command = ["generate", tmp_path / "corpus.jsonl", tmp_path / "out", "--generator=./nothing", "--finetune"]
    done = CliRunner().invoke(main, [*map(str, [*command, tmp_path / "beir", tmp_path / "out"])])
    assert done.exit_code == 2
    assert "out cannot be both the queries and the folder of --finetune: choose two names" in done.output
    done = CliRunner().invoke(main, [*map(str, [*command, tmp_path / "beir", tmp_path / "tuned"])])
    assert done.exit_code == 1
    assert str(tmp_path / "beir") in done.output

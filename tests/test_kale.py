"""Alignment of a small query encoder: losses and ridge regression by hand, what is learned from, and a run's life."""

import argparse
import copy
import functools
import inspect
import json
import logging
import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SHORT
from torch import Tensor

from d2llm.cli import main
from d2llm.errors import DataError, MismatchError, ModelError
from d2llm.pseudo_queries import QUESTIONS, made_up_queries
from d2llm.small_encoder import SmallEncoder, from_layers, from_model, from_tokens
from d2llm.student import Student
from d2llm.train import kale, losses, targets
from d2llm.train.checkpoint import Checkpoint
from d2llm.train.kale import Alignment, align, solve_ridge, warm_start
from d2llm.train.losses import DivergedError
from d2llm.train.targets import compute_targets, read_query_texts
from d2llm.types import Document

MakeStudent = Callable[..., Student]
Rows = list[list[float]]
SENTENCES = list(
    dict.fromkeys(
        " ".join(paragraph.split())
        for module in (statistics, inspect, json, argparse, logging)
        for _, thing in sorted(vars(module).items())
        for paragraph in (inspect.getdoc(thing) or "").split("\n\n")
        if callable(thing) and len(paragraph.split()) > 6
    )
)[:200]
QUERIES = list(dict.fromkeys(" ".join(text.split()[2:8]) for text in SENTENCES))
DOCUMENTS = [Document(f"d{index}", text) for index, text in enumerate(SENTENCES)]
QUICK = Alignment(steps=40, batch=32, lr=1e-3, table_lr=1e-2, texts=250, held_out=0.1, save_every=10, precision="fp32")


@pytest.fixture(scope="module")
def student(make_student: MakeStudent, tiny_bert: Path) -> Student:
    return make_student(tiny_bert, tuning="frozen", query_max_length=16, document_max_length=32)


@pytest.fixture(scope="module")
def make_encoder(student: Student, byte_bert: Path) -> Callable[[str], SmallEncoder]:
    """A new small encoder of `student`, the same one each time."""

    @functools.cache  # a table encodes each token alone
    def made(kind: str) -> SmallEncoder:
        torch.manual_seed(21)
        if kind == "layers":
            return from_layers(student, [1])
        return from_tokens(student, bigrams=5000) if kind == "static" else from_model(student, str(byte_bert))

    return lambda kind: copy.deepcopy(made(kind))


KINDS = pytest.mark.parametrize("kind", ["layers", "model", "static"])


def weights_of(encoder: SmallEncoder) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


# -- losses --------------------------------------------------------------------------------------------------------

GIVEN: Rows = [[0.6, -0.8, 0.0], [0.0, 0.28, 0.96]]
WANTED: Rows = [[0.8, -0.6, 0.0], [0.48, 0.6, 0.64]]


def literal_vector_alignment(given: Rows, wanted: Rows) -> float:
    """mean over queries of |v - w|^2."""
    squares = [sum((a - b) ** 2 for a, b in zip(v, w, strict=True)) for v, w in zip(given, wanted, strict=True)]
    return sum(squares) / len(squares)


def literal_feature_alignment(given: Rows, wanted: Rows) -> float:
    """sum of squared differences over the sum of the wanted squares."""
    difference = sum((a - b) ** 2 for u, w in zip(given, wanted, strict=True) for a, b in zip(u, w, strict=True))
    return difference / sum(b**2 for w in wanted for b in w)


def literal_embedding_kl(given: Rows, wanted: Rows, temperature: float) -> float:
    """T^2 sum_e p_e log(p_e / q_e) with p = softmax(w / T), q = softmax(v / T), plus E (mean v - mean w)^2."""
    total = 0.0
    for v, w in zip(given, wanted, strict=True):
        p, q = (
            [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row] for row in (w, v)
        )
        total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total += len(v) * (sum(v) / len(v) - sum(w) / len(w)) ** 2
    return total / len(given)


def test_losses_are_their_formulas() -> None:
    given, wanted = torch.tensor(GIVEN), torch.tensor(WANTED)
    assert losses.vector_alignment(given, wanted).item() == pytest.approx(literal_vector_alignment(GIVEN, WANTED))
    assert losses.feature_alignment(given, wanted).item() == pytest.approx(literal_feature_alignment(GIVEN, WANTED))
    for temperature in (0.1, 1.0, 10.0):
        found = losses.embedding_kl(given, wanted, temperature=temperature).item()
        assert found == pytest.approx(literal_embedding_kl(GIVEN, WANTED, temperature), rel=1e-4)


def test_the_distance_of_unit_vectors_is_the_cosines_loss() -> None:
    given, wanted = torch.tensor(GIVEN), torch.tensor(WANTED)
    cosine = (given * wanted).sum(-1).mean()
    torch.testing.assert_close(losses.vector_alignment(given, wanted), 2 - 2 * cosine)


def test_all_losses_are_zero_for_equal_vectors_alone() -> None:
    wanted = torch.tensor(WANTED)
    for loss in (losses.vector_alignment, losses.feature_alignment, losses.embedding_kl):
        assert loss(wanted, wanted).item() == pytest.approx(0, abs=1e-7)
        assert loss(torch.tensor(GIVEN), wanted).item() > 0.01


def test_the_embedding_kl_sees_a_constant_that_softmax_does_not() -> None:
    """KALE's own loss is blind to it, and it changes every inner product with a passage."""
    wanted = torch.tensor(WANTED)
    shifted = (wanted + 0.25).requires_grad_()
    torch.testing.assert_close(shifted.softmax(-1), wanted.softmax(-1))
    loss = losses.embedding_kl(shifted, wanted)
    assert loss.item() == pytest.approx(3 * 0.25**2, rel=1e-4)
    loss.backward()
    assert shifted.grad is not None and (shifted.grad > 0.01).all(), "and is led back"


def test_features_of_nothing_but_zeros_give_a_finite_loss() -> None:
    assert torch.isfinite(losses.feature_alignment(torch.tensor(GIVEN), torch.zeros(2, 3)))


# -- the warm start ------------------------------------------------------------------------------------------------


@pytest.fixture
def regression() -> tuple[Tensor, Tensor]:
    """Inputs [N, D] and targets [N, O]."""
    draw = torch.Generator().manual_seed(3)
    inputs_ND = torch.randn(50, 6, generator=draw)
    return inputs_ND, inputs_ND @ torch.randn(6, 4, generator=draw) + 0.3 * torch.randn(50, 4, generator=draw)


@pytest.mark.parametrize("ridge", [1e-12, 0.2, 50.0])
def test_ridge_is_least_squares_with_the_penalty_as_further_rows(
    ridge: float, regression: tuple[Tensor, Tensor]
) -> None:
    inputs_ND, targets_NO = regression
    root = math.sqrt(ridge * len(inputs_ND) * float(inputs_ND.pow(2).mean()))
    rows = np.vstack([inputs_ND.double().numpy(), root * np.eye(6)])
    expected_DO, *_ = np.linalg.lstsq(rows, np.vstack([targets_NO.double().numpy(), np.zeros((6, 4))]))
    found_OD = solve_ridge(inputs_ND, targets_NO, ridge)
    assert found_OD.dtype == torch.float32
    np.testing.assert_allclose(found_OD.numpy(), expected_DO.T, rtol=1e-4, atol=1e-5)


def distances(encoder: SmallEncoder, student: Student) -> tuple[float, float]:
    """Mean of 1 - cosine, and the relative error of the projection that the IEM reads, over `QUERIES`."""
    found, wanted = encoder.encode(QUERIES), student.encode(QUERIES, "query")
    features, wanted_features = (
        x[:, : student.iem.layouts[0].projection] for x in (found.features_BH, wanted.query_features_BH)
    )
    cosine = (found.vectors_BE * wanted.vectors_BE).sum(-1).mean()
    return 1 - float(cosine), float((features - wanted_features).pow(2).mean() / wanted_features.pow(2).mean())


@pytest.mark.parametrize("kind", ["model", "static"])
def test_the_warm_start_brings_an_encoder_nearer(
    kind: str, make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    encoder = make_encoder(kind)
    vector, features = distances(encoder, student)
    warm_start(encoder, QUERIES, compute_targets(student, QUERIES, [], None, precision="fp32"), 1e-3)
    warm_vector, warm_features = distances(encoder, student)
    assert warm_vector < vector / 2 and warm_features < features / 2


def test_the_warm_start_of_a_table_keeps_the_size_of_features_that_the_regression_found(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    """A great ridge makes vectors short; their length, by which the sum is divided, must not blow features up."""
    encoder, ridge = make_encoder("static"), 10.0
    wanted = compute_targets(student, QUERIES, [], None, precision="fp32")
    inputs_NE = encoder.encode(QUERIES).vectors_BE
    wanted_NF = wanted.features_NH[:, : student.iem.layouts[0].projection]
    predicted_NF = inputs_NE @ solve_ridge(inputs_NE, wanted_NF, ridge).T
    shrunk = (inputs_NE @ solve_ridge(inputs_NE, wanted.vectors_NE, ridge).T).norm(dim=-1).mean()
    assert shrunk < 0.9
    warm_start(encoder, QUERIES, wanted, ridge)
    found_NF = encoder.encode(QUERIES).features_BH[:, : student.iem.layouts[0].projection]
    assert float(found_NF.norm(dim=-1).mean() / predicted_NF.norm(dim=-1).mean()) == pytest.approx(1, abs=0.05)


def test_the_maps_of_the_students_own_layers_are_not_solved_anew(make_student: MakeStudent, minilm: Path) -> None:
    student = make_student(minilm, tuning="frozen", query_max_length=16)
    encoder = from_layers(student, [5])
    before = encoder.encode(QUERIES[:50]).vectors_BE
    settings = replace(QUICK, steps=1, lr=1e-12, embedding_lr=1e-12, texts=1)
    after = align(student, encoder, QUERIES, settings=settings).encode(QUERIES[:50]).vectors_BE
    torch.testing.assert_close(after, before)


# -- the alignment -------------------------------------------------------------------------------------------------


def held_out(encoder: SmallEncoder) -> tuple[dict[str, float], dict[str, float]]:
    """What was measured on queries held out: before the first step, and at the end."""
    found = encoder.provenance["held_out"]
    return found["before"], found["after"]


@pytest.mark.parametrize("kind", ["model", "static"])
def test_an_alignment_comes_nearer_on_queries_that_it_was_not_shown(
    kind: str, make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    settings = replace(QUICK, steps=120, warm_start=False)
    encoder = align(student, make_encoder(kind), QUERIES, DOCUMENTS, settings=settings)
    before, after = held_out(encoder)
    assert after["cosine"] > max(0.9, before["cosine"] + 0.05)
    assert after["overlap@10"] > before["overlap@10"] + 0.05  # words by name are right before training
    assert not encoder.training
    assert encoder.provenance["alignment"] == asdict(settings)


def test_what_was_measured_is_what_the_encoder_gives(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    """A literal search: cosine over all passages of the sample (fewer than recall takes), then the IEM."""
    documents = DOCUMENTS[:60]
    settings = replace(QUICK, steps=3, texts=1, held_out=0.03)
    run = kale._Run(student, make_encoder("model"), QUERIES, documents, settings, None, None, progress=False)
    encoder = align(student, make_encoder("model"), QUERIES, documents, settings=settings)
    _, after = held_out(encoder)
    queries, texts = run.held_out, [document.content for document in documents]
    passages, wanted = student.encode(texts, "document"), student.encode(queries, "query")
    found = encoder.encode(queries)
    shared = []
    for index in range(len(queries)):
        best = []
        for vector, features in ((wanted.vectors_BE, wanted.query_features_BH), found):
            cosine_1K = passages.vectors_BE[None] @ vector[index]
            task = torch.ones(1, dtype=torch.long)
            with torch.inference_mode():
                scores = student.iem(features[[index]], passages.passage_features_BH[None], cosine_1K, task)[0]
            best.append({texts[place] for place in scores.argsort(descending=True)[:10]})
        shared.append(len(best[0] & best[1]) / 10)
    assert after["overlap@10"] == pytest.approx(sum(shared) / len(shared), abs=0.05)  # features are kept in fp16
    cosine = (found.vectors_BE * wanted.vectors_BE).sum(-1).mean()
    assert after["cosine"] == pytest.approx(float(cosine), abs=1e-4)


def test_the_score_term_teaches_alone(make_encoder: Callable[[str], SmallEncoder], student: Student) -> None:
    settings = replace(QUICK, vector=0.0, features=0.0, warm_start=False)
    before, after = held_out(align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=settings))
    assert after["overlap@10"] > before["overlap@10"] + 0.05  # words by name are right before training


def test_kales_own_loss_teaches_alone(make_encoder: Callable[[str], SmallEncoder], student: Student) -> None:
    only = {"vector": 0.0, "features": 0.0, "score": 0.0, "embedding_kl": 1.0}
    settings = replace(QUICK, steps=120, warm_start=False, **only)
    before, after = held_out(align(student, make_encoder("model"), QUERIES, settings=settings))
    assert after["cosine"] > before["cosine"] + 0.2


def test_without_documents_vectors_and_features_are_learned(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    encoder = align(student, make_encoder("model"), QUERIES, settings=replace(QUICK, warm_start=False))
    before, after = held_out(encoder)
    assert set(after) == {"cosine"}, "there is nothing to rank"
    assert after["cosine"] > before["cosine"] + 0.2
    assert (encoder.provenance["passages"], encoder.provenance["made up"]) == (0, 0)


def test_without_anything_to_learn_by_there_is_no_alignment(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    with pytest.raises(DataError, match="nothing to align: vector, features and embedding_kl are 0, and score needs"):
        align(student, make_encoder("static"), QUERIES, settings=replace(QUICK, vector=0.0, features=0.0))


@KINDS
def test_the_student_and_its_words_are_left_alone(
    kind: str, make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    digest = student.weights_sha256(whole=True)
    encoder = align(student, make_encoder(kind), QUERIES, DOCUMENTS[:40], settings=replace(QUICK, steps=3))
    assert student.weights_sha256(whole=True) == digest
    width, words = student.iem.layouts[0].learned, student.encode(QUERIES[:9], "query").query_features_BH
    torch.testing.assert_close(encoder.encode(QUERIES[:9]).features_BH[:, width:], words[:, width:], rtol=0, atol=0)


def test_the_same_seed_gives_the_same_encoder_and_another_seed_another(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    found = []
    for seed in (1, 1, 2):
        settings = replace(QUICK, steps=5, seed=seed)
        found.append(align(student, make_encoder("layers"), QUERIES, DOCUMENTS, settings=settings).encode(QUERIES))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[0].vectors_BE - found[2].vectors_BE).abs().max() > 1e-4


def test_an_encoder_of_another_student_is_refused(
    make_encoder: Callable[[str], SmallEncoder], make_student: MakeStudent, tiny_bert: Path
) -> None:
    other = make_student(tiny_bert, tuning="frozen", seed=1)
    with pytest.raises(MismatchError, match=r"the query encoder was aligned to the student .*, the student is"):
        align(other, make_encoder("static"), QUERIES, settings=QUICK)


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_handful_of_queries_is_enough(
    count: int, make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    settings = replace(QUICK, steps=20, texts=1, warm_start=False)
    encoder = align(student, make_encoder("static"), QUERIES[:count], settings=settings)
    assert (encoder.provenance["queries"], encoder.provenance["held_out"]["queries"]) == (count - 1, 1)
    found, wanted = encoder.encode(QUERIES[:count]).vectors_BE, student.encode(QUERIES[:count], "query").vectors_BE
    before = make_encoder("static").encode(QUERIES[:count]).vectors_BE
    assert ((found - wanted) ** 2).sum() < ((before - wanted) ** 2).sum()


def test_each_query_is_learned_from_equally_often(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    """Batches are of queries of similar length, and none is passed over for its length."""
    settings = replace(QUICK, batch=4, texts=1, held_out=0.01)
    run = kale._Run(student, make_encoder("static"), QUERIES[:97], [], settings, None, None, progress=False)
    batches = [run._batch(step) for step in range(24 * 3)]  # 96 queries, three times
    assert {len(batch) for batch in batches} == {4}
    counts = Counter(row for batch in batches for row in batch)
    assert set(counts.values()) == {3} and len(counts) == 96
    spread = [max(len(run.ids[row]) for row in batch) - min(len(run.ids[row]) for row in batch) for batch in batches]
    lengths = [len(ids) for ids in run.ids]
    assert sum(spread) / len(spread) < (max(lengths) - min(lengths)) / 2
    assert run._batch(5) == batches[5], "a batch depends on its step alone"


@pytest.mark.parametrize("queries", [[], ["one"], ["one", "one", "  "]], ids=["none", "one", "one and a blank"])
def test_too_few_queries_are_counted(
    queries: list[str], make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    found = rf"two or more different queries, found {min(1, len(queries))}$"
    with pytest.raises(DataError, match=found):
        align(student, make_encoder("static"), queries, settings=QUICK)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number between 1 and 2147483647, found 0"),
        ({"held_out": 1.0}, "held_out: expected a number above 0 and below 1, found 1.0"),
        ({"task": "both"}, "task: expected one of 'symmetric', 'asymmetric', found 'both'"),
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Alignment(**setting)


def test_an_encoder_that_became_nan_is_not_kept(
    make_encoder: Callable[[str], SmallEncoder], student: Student, tmp_path: Path
) -> None:
    wild = replace(QUICK, lr=1e30, embedding_lr=1e30, table_lr=1e30, save_every=1000)
    with pytest.raises(DivergedError, match=r"the loss is nan at step \d+ .*: lower the learning rates"):
        align(student, make_encoder("layers"), QUERIES, settings=wild, out=tmp_path / "kale")
    assert not (tmp_path / "kale").exists()


# -- queries, real and made up -------------------------------------------------------------------------------------


def test_held_out_queries_are_never_learned_from(make_encoder: Callable[[str], SmallEncoder], student: Student) -> None:
    """Not even when they are made up again: each query here is the title of a passage."""
    pairs = zip(QUERIES, SENTENCES, strict=False)
    documents = [Document(f"d{index}", text, title=query) for index, (query, text) in enumerate(pairs)]
    settings = replace(QUICK, steps=1, texts=1000, held_out=0.2)
    run = kale._Run(student, make_encoder("static"), QUERIES, documents, settings, None, None, progress=False)
    assert len(run.held_out) == round(0.2 * len(QUERIES))
    assert set(run.real) | set(run.held_out) == set(QUERIES)
    assert len(run.learned) > len(QUERIES), "some were made up"
    assert not set(run.learned) & set(run.held_out)
    assert len(set(run.learned)) == len(run.learned)
    wanted = student.encode(run.held_out, "query").vectors_BE
    torch.testing.assert_close(run.targets.vectors_NE[len(run.learned) :], wanted, rtol=0, atol=1e-5)


def test_queries_are_made_up_only_where_there_are_few(
    make_encoder: Callable[[str], SmallEncoder], student: Student
) -> None:
    def made(texts: int) -> int:
        settings = replace(QUICK, steps=1, texts=texts)
        return int(align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=settings).provenance["made up"])

    assert made(len(QUERIES) // 2) == 0
    assert 80 <= made(len(QUERIES) + 80) <= 80 + len(QUERIES) * QUICK.held_out + 1


LONG = [
    Document(f"d{d}", " ".join(f"the{d}w{w:02}" if w % 2 else "the" for w in range(60)) + ".", title=f"Title {d}")
    for d in range(40)
]
"""Passages of 30 words of their own, and one that they all share."""


def form_of(text: str) -> str:
    document = next(d for d in LONG if f"the{d.id[1:]}w" in text or text == d.title)
    words = f"{document.title} {document.text[:-1]}".split()
    own = text.removesuffix("?").split()
    if text == document.title:
        return "heading"
    if any(own == words[start : start + len(own)] for start in range(len(words))) and 4 <= len(own) <= 24:
        return "run of words"
    kind = "keywords"
    if text.endswith("?"):
        kind, start = "question", next(phrase for phrase in QUESTIONS if text.startswith(f"{phrase} "))
        own = own[len(start.split()) :]
    assert 2 <= len(own) <= 6 and "the" not in own, "the rarest words"
    lower = [word.lower() for word in words]
    assert [lower.index(word) for word in own] == sorted(lower.index(word) for word in own), "in the passage's order"
    return kind


def test_made_up_queries_take_turns_in_four_forms() -> None:
    made = made_up_queries(LONG, 40)
    forms = [form_of(text) for text in made]
    assert {form: forms.count(form) for form in set(forms)} == {
        "heading": 10, "run of words": 10, "keywords": 10, "question": 10,
    }  # fmt: skip
    everything = made_up_queries(LONG, 1000)
    assert 120 < len(everything) <= 160, "each passage in each form, and no more"
    assert everything[:40] == made


def test_made_up_queries_depend_on_the_seed_alone() -> None:
    assert made_up_queries(LONG, 60, seed=1) == made_up_queries(LONG, 60, seed=1)
    assert set(made_up_queries(LONG, 60, seed=1)) != set(made_up_queries(LONG, 60, seed=2))


def test_made_up_queries_are_all_different_and_none_is_blank() -> None:
    twins = [Document(str(index), "the same text in every passage of them all") for index in range(50)]
    made = made_up_queries(twins, 500)
    assert len(set(made)) == len(made) < 500 and all(text.strip() for text in made)


def test_a_passage_without_words_gives_no_more_than_itself() -> None:
    odd = [Document("a", "!!!"), Document("b", "?"), Document("c", ""), Document("d", " \n")]
    assert set(made_up_queries(odd, 100)) == {"!!!", "?"}
    assert made_up_queries([], 100) == made_up_queries(LONG, 0) == []


def test_without_a_title_the_first_sentence_is_the_heading() -> None:
    document = Document("a", "First one here. Then another\nand more.")
    assert "First one here." in made_up_queries([document], 10)


def test_query_logs_of_all_kinds_are_read(tmp_path: Path) -> None:
    rows = ['{"_id": "1", "text": "first"}', "", '{"query": "second", "count": 3}', '{"text": "first"}']
    for name in ("log.jsonl", "log.ndjson", "log.json"):
        (tmp_path / name).write_text("\n".join(rows))
        assert read_query_texts(tmp_path / name) == ["first", "second"], "each once, in the order of the file"
    (tmp_path / "log.txt").write_text("first\n\n  second \nfirst\n \n日本語\n", encoding="utf-8")
    assert read_query_texts(tmp_path / "log.txt") == ["first", "second", "日本語"]
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=f"{name}: no queries"):
            read_query_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not valid JSON"),
        ('["a list"]', "expected a JSON object, found list"),
        ('{"_id": "1"}', r'expected "text" \(or "query"\) to be a string, found None'),
        ('{"text": 3}', ".*to be a string, found 3"),
        ('{"query": ["x"]}', r".*to be a string, found \['x'\]"),
    ],
)
def test_a_broken_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"log\.jsonl:3: {message}"):
        read_query_texts(tmp_path / "log.jsonl")


def test_a_log_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=r"log\.txt:1: not valid UTF-8"):
        read_query_texts(tmp_path / "log.txt")
    for name in ("nowhere.txt", "nowhere.jsonl"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            read_query_texts(tmp_path / name)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", SENTENCES), ("queries", QUERIES)):
        rows = (json.dumps({"_id": f"{name[0]}{index}", "text": text}) for index, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    for split, judged in {"train": range(60), "dev": range(60, 80)}.items():
        rows = (f"q{index}\tc{index}\t1\n" for index in judged)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    return folder


def test_of_a_beir_folder_only_the_queries_of_the_split_are_read(beir: Path) -> None:
    assert read_query_texts(beir) == QUERIES[:60]
    assert read_query_texts(beir, "dev") == QUERIES[60:80]
    with pytest.raises(DataError, match=r"test\.tsv: no such file"):
        read_query_texts(beir, "test")


# -- targets are kept ----------------------------------------------------------------------------------------------


def test_targets_are_computed_once(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compute_targets(student, QUERIES, SENTENCES[:80], tmp_path / "cache", precision="fp32")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"], "and nothing half-written"

    def again(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(student, "encode", again)
    second = compute_targets(student, QUERIES, SENTENCES[:80], tmp_path / "cache", precision="fp32")
    for name in ("vectors_NE", "features_NH", "passages_ME", "passage_features_MH", "near_NK"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=0, atol=0)
    for changed in ((QUERIES[1:], SENTENCES[:80]), (QUERIES, SENTENCES[:79])):
        with pytest.raises(AssertionError, match="encoded again"):
            compute_targets(student, *changed, tmp_path / "cache", precision="fp32")
    with pytest.raises(AssertionError, match="encoded again"):
        compute_targets(student, QUERIES, SENTENCES[:80], tmp_path / "cache", precision="bf16")


def test_damaged_targets_are_named(student: Student, tmp_path: Path) -> None:
    compute_targets(student, QUERIES[:5], [], tmp_path, precision="fp32")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"is damaged: {path.name} .*Remove the file: it is computed again"):
        compute_targets(student, QUERIES[:5], [], tmp_path, precision="fp32")


def test_targets_of_a_student_that_reads_otherwise_are_others(
    make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    """The weights are the same."""
    for options in ({}, {"query_prompt": "query: "}, {"query_max_length": 8}):
        student = make_student(tiny_bert, tuning="frozen", **options)
        found = compute_targets(student, QUERIES[:5], [], tmp_path, precision="fp32")
        torch.testing.assert_close(found.vectors_NE, student.encode(QUERIES[:5], "query").vectors_BE, rtol=0, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == 3


def test_targets_are_what_the_student_gives_and_an_index_stores(student: Student) -> None:
    found = compute_targets(student, QUERIES[:20], SENTENCES[:80], None, precision="fp32")
    query, passage = student.encode(QUERIES[:20], "query"), student.encode(SENTENCES[:80], "document")
    torch.testing.assert_close(found.vectors_NE, query.vectors_BE, rtol=0, atol=1e-5)
    assert found.features_NH.dtype == found.passage_features_MH.dtype == torch.float16
    torch.testing.assert_close(found.passage_features_MH, passage.passage_features_BH.half(), rtol=2e-3, atol=2e-3)
    expected = (query.vectors_BE @ passage.vectors_BE.T).argsort(descending=True, dim=-1)[:, : targets.NEAREST]
    assert found.near_NK.shape == (20, targets.NEAREST) == expected.shape
    assert (found.near_NK[:, :10] == expected[:, :10]).float().mean() > 0.95  # all but ties


# -- a run that is interrupted -------------------------------------------------------------------------------------


@KINDS
def test_an_interrupted_run_goes_on_as_it_would_have(
    kind: str,
    make_encoder: Callable[[str], SmallEncoder],
    student: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(QUICK, steps=25)
    whole = align(student, make_encoder(kind), QUERIES, DOCUMENTS, settings=settings)
    real, out = Checkpoint.save, tmp_path / "kale"

    def saved_and_interrupted(self: Checkpoint, content: dict[str, Any]) -> None:
        real(self, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", saved_and_interrupted)
        for _ in range(2):  # after 10 steps, and after 20
            with pytest.raises(KeyboardInterrupt):
                align(student, make_encoder(kind), QUERIES, DOCUMENTS, settings=settings, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["kale.run"]
    torch.manual_seed(99)  # what the other process's generator happened to be at
    resumed = align(student, make_encoder(kind), QUERIES, DOCUMENTS, settings=settings, out=out)
    assert held_out(resumed) == held_out(whole)
    for name, value in weights_of(resumed).items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=0, msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["kale"]
    loaded = SmallEncoder.load(out)
    torch.testing.assert_close(loaded.encode(QUERIES[:9]), whole.encode(QUERIES[:9]), rtol=0, atol=0)
    assert loaded.provenance == resumed.provenance


def test_an_unfinished_run_of_other_settings_or_texts_is_not_continued(
    make_encoder: Callable[[str], SmallEncoder], student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: kale._Run, step: int) -> dict[str, Tensor]:
        if step == 10:
            raise KeyboardInterrupt
        return real(self, step)

    real: Callable[[kale._Run, int], dict[str, Tensor]] = kale._Run._losses
    out, settings = tmp_path / "kale", replace(QUICK, texts=1)  # none made up: another corpus has the same queries
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kale._Run, "_losses", interrupted)
        align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=settings, out=out)
    with pytest.raises(DataError, match=r"kale\.run holds an unfinished run with lr = 0\.001, this one has 0\.5"):
        align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=replace(settings, lr=0.5), out=out)
    with pytest.raises(DataError, match=r"unfinished run with encoder\.kind = 'static', this one has 'layers'"):
        align(student, make_encoder("layers"), QUERIES, DOCUMENTS, settings=settings, out=out)
    for queries, documents in ((QUERIES[1:], DOCUMENTS), (QUERIES, DOCUMENTS[1:])):
        with pytest.raises(DataError, match="unfinished run with texts ="):
            align(student, make_encoder("static"), queries, documents, settings=settings, out=out)
    align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=settings, out=out)
    with pytest.raises(ModelError, match="kale exists already"):
        align(student, make_encoder("static"), QUERIES, DOCUMENTS, settings=settings, out=out)


# -- the command line ----------------------------------------------------------------------------------------------


def d2llm(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def saved_student(make_student: MakeStudent, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "small"
    make_student(tiny_bert, **SHORT).save(folder)
    return folder


@pytest.fixture
def job(saved_student: Path, tmp_path: Path) -> list[str | Path]:
    """`d2llm kale` with a student, its output, a query log and a corpus; short."""
    (tmp_path / "log.txt").write_text("\n".join(QUERIES))
    rows = [json.dumps({"_id": document.id, "text": document.text}) for document in DOCUMENTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*rows, '{"_id": "empty", "text": ""}']))
    return [
        *("kale", saved_student, tmp_path / "kale", "--queries", tmp_path / "log.txt"),
        *("--corpus", tmp_path / "corpus.jsonl", "--targets", tmp_path / "targets"),
        *("--set", "steps=5", "--set", "texts=250", "--set", "precision=fp32"),
    ]


@pytest.mark.parametrize(
    ("choice", "kind", "layers"),
    [
        (["--layers", "1"], "layers", (1,)),
        (["--layers", "0,"], "layers", (0,)),
        (["--layers", "1,0"], "layers", (0, 1)),
        (["--static"], "static", ()),
        (["--static", "--bigrams", "0"], "static", ()),
    ],
    ids=["count", "which one", "which two", "static", "static, no bigrams"],
)
def test_the_command_aligns_each_kind(
    choice: list[str], kind: str, layers: tuple[int, ...], job: list[str | Path], tmp_path: Path
) -> None:
    done = d2llm(*job, *choice)
    assert done.exit_code == 0, done.stderr
    encoder = SmallEncoder.load(tmp_path / "kale")
    assert (encoder.config.kind, encoder.config.layers) == (kind, layers)
    assert bool(encoder.config.bigrams) == (choice == ["--static"])
    assert f"{encoder.parameter_count:,} parameters, aligned on " in done.stdout
    assert "before the first step" in done.stdout and "overlap@10" in done.stdout
    assert f"Next: d2llm-export onnx {job[1]} MODEL --query-encoder {tmp_path / 'kale'}" in done.stdout
    assert len(list((tmp_path / "targets").iterdir())) == 1
    assert not (tmp_path / "kale.run").exists()


def test_the_command_aligns_another_model_with_its_prompt(
    job: list[str | Path], byte_bert: Path, saved_student: Path, tmp_path: Path
) -> None:
    done = d2llm(*job, "--model", byte_bert, "--prompt", "find: ", "--json")
    assert done.exit_code == 0, done.stderr
    encoder = SmallEncoder.load(tmp_path / "kale")
    assert (encoder.config.kind, encoder.config.query_prompt) == ("model", "find: ")
    student = Student.load(saved_student)
    student.merge_lora()
    encoder.config.require_student(student, "KALE", "STUDENT")
    torch.manual_seed(1)  # another state than that before the first call
    shutil.rmtree(tmp_path / "kale")
    assert d2llm(*job, "--model", byte_bert, "--prompt", "find: ").exit_code == 0
    again = SmallEncoder.load(tmp_path / "kale").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in encoder.state_dict().items()), "the seed is 0"


def test_json_is_one_line_and_nothing_else(
    job: list[str | Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = d2llm(*job, "--static", "--json")
    assert done.exit_code == 0, done.stderr
    assert f"corpus.jsonl: 1 of {len(DOCUMENTS) + 1} documents are empty and left out" in caplog.text
    assert done.stdout.count("\n") == 1
    said = json.loads(done.stdout)
    assert said["kale"] == str(tmp_path / "kale")
    assert said["alignment"]["steps"] == 5
    assert said["queries"] == round(0.95 * len(QUERIES)) and said["passages"] == len(DOCUMENTS)
    assert set(said["held_out"]["after"]) == {"cosine", "overlap@10"}
    assert "step/s" not in done.stderr and "text/s" not in done.stderr


def test_several_logs_are_read_and_dev_stays_unseen(
    job: list[str | Path], beir: Path, saved_student: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.jsonl").write_text('{"query": "one more"}\n')
    settings = ["--static", "--set", "steps=1", "--set", "held_out=0.1", "--json"]
    logs: list[str | Path] = ["--queries", beir, "--queries", tmp_path / "more.jsonl"]
    said = json.loads(d2llm("kale", saved_student, tmp_path / "kale", *logs, *settings).stdout)
    assert said["queries"] + said["held_out"]["queries"] == 61, "60 that train judges, and the one of the other log"
    assert saved_student.with_name("small.targets").is_dir(), "targets are kept beside the student"


def test_the_help_says_what_to_type() -> None:
    text = d2llm("kale", "--help").stdout
    for part in ("d2llm kale STUDENT KALE --queries log.txt --corpus corpus.jsonl --static", "--layers", "--model"):
        assert part in text
    assert "d2llm-export onnx STUDENT MODEL --query-encoder KALE" in text
    assert "kale" in d2llm("--help").stdout


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "choose one of --layers, --model and --static"),
        (["--static", "--layers", "2"], 2, "choose one of --layers, --model and --static"),
        (["--layers", "1", "--bigrams", "9"], 2, "--bigrams needs --static"),
        (["--static", "--prompt", "find: "], 2, "--prompt needs --model"),
        (["--layers", "x"], 2, "'x': expected how many layers, such as 2, or which ones, such as 0,5"),
        (["--layers", ","], 2, "',': expected how many layers"),
        (["--layers", "3"], 2, "'3': 3 layers: the student has 2, choose from 1 to 2"),
        (["--layers", "0,7"], 2, "'0,7': layers [0, 7]: choose one or more of the student's 0 to 1, each once"),
        (["--layers", "some"], 2, "'some': expected how many layers"),
        (["--model", "no/where/at/all"], 1, "backbone 'no/where/at/all': there is no such file or folder"),
        (["--static", "--set", "speed=3"], 2, "unknown key speed: known are batch, "),
        (["--static", "--set", "steps=abc"], 2, "steps: expected a whole number between 1 and 2147483647, found 'abc'"),
        (["--static", "--set", "warm_start=1"], 2, "warm_start: expected true or false, found 1"),
        (["--static", "--set", "steps"], 2, "--set steps: expected KEY=VALUE"),
        (["--static", "--set", "held_out=2.0"], 2, "held_out: expected a number above 0 and below 1, found 2.0"),
        (["--static", "--queries", "nowhere.txt"], 1, "nowhere.txt: no such file"),
        (["--static", "--corpus", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_named_and_leaves_nothing(
    options: list[str], code: int, message: str, job: list[str | Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    done = d2llm(*job, *options)
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_output_is_refused_before_the_work(job: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "kale").mkdir()
    (tmp_path / "kale" / "notes.txt").write_text("mine")
    done = d2llm(*job, "--static")
    assert done.exit_code == 1
    assert "kale exists already. Choose another name or remove it first." in done.stderr
    assert [path.name for path in (tmp_path / "kale").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "targets").exists()


def test_an_empty_log_is_refused(job: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("\n \n")
    done = d2llm(*job, "--static")
    assert done.exit_code == 1
    assert "log.txt: no queries" in done.stderr


def test_a_killed_command_typed_again_goes_on(job: list[str | Path], saved_student: Path, tmp_path: Path) -> None:
    long = ["--layers", "1", "--set", "steps=50", "--set", "save_every=5", "--json"]
    job[2] = tmp_path / "whole"
    assert d2llm(*job, *long).exit_code == 0
    job[2] = tmp_path / "killed"
    process = processes.start(*job, *long, folder=tmp_path)
    while not (tmp_path / "killed.run" / "state.pt").exists():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "killed").exists()
    done = d2llm(*job, *long)
    assert done.exit_code == 0, done.stderr
    whole, resumed = SmallEncoder.load(tmp_path / "whole"), SmallEncoder.load(tmp_path / "killed")
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not (tmp_path / "killed.run").exists()

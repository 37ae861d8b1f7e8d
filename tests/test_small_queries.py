"""A model with a small query encoder: exported beside the student's own, into a model that exists too, and searched
with, while passages and their index stay as they are, byte for byte."""

import argparse
import hashlib
import inspect
import json
import logging
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import SHORT

import d2llm
from d2llm import model as runtime
from d2llm.cli import export_main, main
from d2llm.connectors import QdrantIndex
from d2llm.errors import ExportError, MismatchError, ModelError
from d2llm.export import add_query_encoder, export
from d2llm.export import onnx as exporting
from d2llm.export import verify as verification
from d2llm.export.onnx import Precision
from d2llm.export.verify import FLOORS, TOLERANCE
from d2llm.files import sha256_of
from d2llm.folder import (
    CONFIG,
    ENCODER,
    IEM,
    QUERY_ENCODER,
    QUERY_TOKENIZER,
    TOKENIZER,
    ModelConfig,
    SmallEncoderInfo,
    fingerprint,
    read_config,
    write_config,
)
from d2llm.small_encoder import SmallEncoder, from_layers, from_model, from_tokens
from d2llm.small_encoder_config import student_digest
from d2llm.student import Student
from d2llm.train.kale import Alignment, align
from d2llm.types import Document, StrPath

pytest.importorskip("qdrant_edge")

MakeStudent = Callable[..., Student]
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
DOCUMENTS = [Document(f"d{index}", text, payload={"place": index}) for index, text in enumerate(SENTENCES)]
TEXTS = [
    "How do I read a file line by line?",
    "ok",
    "a query that is longer than the limit of sixteen tokens loses its tail, all the same by whom it is read",
    "机器学习模型可以把查询和段落分别编码。",
]
QUICK = Alignment(steps=60, batch=32, lr=1e-3, table_lr=1e-2, texts=400, precision="fp32")
KINDS = ("layers", "model", "static")


@pytest.fixture(scope="module")
def student_folder(make_student: MakeStudent, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that exports in seconds."""
    folder = tmp_path_factory.mktemp("students") / "small"
    make_student(tiny_bert, **SHORT).save(folder)
    return folder


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    return merged(student_folder)


def merged(folder: StrPath) -> Student:
    student = Student.load(folder)
    student.merge_lora()
    return student.eval()


@pytest.fixture(scope="module")
def kales(student: Student, byte_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small query encoder of each kind, aligned to `student_folder`."""
    folder = tmp_path_factory.mktemp("kales")
    torch.manual_seed(31)
    encoders = {
        "layers": from_layers(student, [1]),
        "model": from_model(student, str(byte_bert), prompt="find: ", max_length=40),
        "static": from_tokens(student),
    }
    for kind, encoder in encoders.items():
        align(student, encoder, QUERIES, DOCUMENTS, settings=QUICK, out=str(folder / kind), cache=f"{folder}/targets")
    return {kind: folder / kind for kind in encoders}


@pytest.fixture(scope="module")
def plain_model(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's model without a small query encoder. Shared: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    export(student_folder, folder)
    return folder


@pytest.fixture
def copy(plain_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain_model, tmp_path / "model")


@dataclass(frozen=True)
class Added:
    """A model folder into which a small query encoder was put."""

    folder: Path
    kind: str
    precision: Precision
    returned: ModelConfig

    @property
    def small(self) -> SmallEncoderInfo:
        assert self.returned.query_encoder is not None
        return self.returned.query_encoder


@pytest.fixture(scope="module")
def add(
    student_folder: Path, plain_model: Path, kales: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Precision], Added]:
    """`plain_model` with a small query encoder, each made once. Shared: copy it before changing anything."""
    made: dict[tuple[str, str], Added] = {}

    def of(kind: str, precision: Precision = "fp32") -> Added:
        if (kind, precision) not in made:
            folder = shutil.copytree(plain_model, tmp_path_factory.mktemp("added") / kind)
            config = add_query_encoder(student_folder, folder, kales[kind], precision=precision)
            made[kind, precision] = Added(folder, kind, precision, config)
        return made[kind, precision]

    return of


@pytest.fixture(params=[(kind, precision) for precision in ("fp32", "int8") for kind in KINDS], ids=" ".join)
def added(request: pytest.FixtureRequest, add: Callable[[str, Precision], Added]) -> Added:
    return add(*request.param)


def bytes_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_reads_as(model: d2llm.Model, encoder: SmallEncoder) -> None:
    """fp32: in batches and one by one, the runtime gives what the small encoder gives in torch."""
    expected, together = encoder.encode(TEXTS), model.encode_query(TEXTS)
    np.testing.assert_allclose(together.vectors, expected.vectors_BE, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(together.features, expected.features_BH, atol=TOLERANCE, rtol=0)
    assert_one_vector_for_each_text(model)


def assert_one_vector_for_each_text(model: d2llm.Model) -> None:
    together = model.encode_query(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = model.encode_query([text])
        np.testing.assert_allclose(alone.vectors[0], together.vectors[row], atol=1e-5, rtol=0)
        np.testing.assert_allclose(alone.features[0], together.features[row], atol=TOLERANCE, rtol=0)


# -- what is exported ----------------------------------------------------------------------------------------------


def test_the_runtime_computes_what_the_small_encoder_computes(
    added: Added, add: Callable[[str, Precision], Added], kales: dict[str, Path]
) -> None:
    model, encoder = d2llm.load(added.folder), SmallEncoder.load(kales[added.kind])
    assert model.query_encoder == "small"
    if added.precision == "fp32":
        assert_reads_as(model, encoder)
        return
    found, expected = model.encode_query(TEXTS), encoder.encode(TEXTS)
    cosines = (found.vectors * expected.vectors_BE.numpy()).sum(-1)
    assert FLOORS["int8"]["min_cosine"] < cosines.min() < 1 - 1e-6, "quantized, and near"
    assert_one_vector_for_each_text(model)
    small, whole = (
        (folder / QUERY_ENCODER).stat().st_size for folder in (added.folder, add(added.kind, "fp32").folder)
    )
    assert small < (0.85 if added.kind == "model" else 0.35) * whole, (
        "words by name, which stay as they are, weigh much"
    )


def test_words_by_name_are_the_students_in_every_precision(added: Added, student: Student) -> None:
    """A name that is off by one is another word."""
    words = student.encode(TEXTS, "query").query_features_BH[:, student.iem.layouts[0].learned :]
    for texts, rows in ((TEXTS, slice(None)), (TEXTS[2:3], slice(2, 3))):
        found = d2llm.load(added.folder).encode_query(texts).features[:, student.iem.layouts[0].learned :]
        np.testing.assert_array_equal(found, words[rows])


def test_reasons_name_words_by_the_students_tokenizer(add: Callable[[str, Precision], Added]) -> None:
    model, index = d2llm.load(add("model", "fp32").folder), d2llm.FlatIndex()
    index.add(model, [{"id": "a", "text": "Return the median of numeric data."}])
    reasons = d2llm.Searcher(model, index).explain("numeric data, of the median", 1, reasons=True).reasons
    assert reasons is not None
    reason = reasons.candidates[0]
    assert {"data", "median", "the"} < reason.words.keys()
    assert sum(reason.words.values()) == pytest.approx(reason.parts["words"], abs=1e-4)
    text = reason.hit.payload["text"]
    assert {text[mark.start : mark.end] for mark in reason.marks["text"]} >= {"data", "median", "the"}


def test_nothing_else_of_the_model_changes(added: Added, plain_model: Path) -> None:
    before, after = bytes_of(plain_model), bytes_of(added.folder)
    new = {QUERY_ENCODER, QUERY_TOKENIZER} if added.kind == "model" else {QUERY_ENCODER}
    assert {name: after[name] for name in (TOKENIZER, ENCODER, IEM)} == {
        name: before[name] for name in (TOKENIZER, ENCODER, IEM)
    }
    assert set(after) == {*before, *new}
    said_before, said = (json.loads((folder / CONFIG).read_text()) for folder in (plain_model, added.folder))
    assert said["fingerprint"] == said_before["fingerprint"] == added.returned.fingerprint
    assert said.pop("files") == {name: digest for name, digest in after.items() if name != CONFIG}
    del said["query_encoder"], said_before["query_encoder"], said_before["files"]
    assert said == said_before
    assert read_config(added.folder) == added.returned


def test_the_model_says_what_reads_its_queries(added: Added, kales: dict[str, Path]) -> None:
    encoder, small = SmallEncoder.load(kales[added.kind]), added.small
    assert (small.kind, small.precision, small.parameters) == (added.kind, added.precision, encoder.parameter_count)
    assert small.own_tokenizer == (added.kind == "model")
    own = added.kind == "model"
    assert (small.query_prompt, small.query_max_length) == (("find: ", 40) if own else ("query: ", 16))
    assert small.provenance["held_out"] == encoder.provenance["held_out"]
    assert small.provenance["layers"] == ([1] if added.kind == "layers" else [])
    assert small.provenance["backbone"] == ("byte-bert" if added.kind == "model" else "")
    if added.precision == "fp32":
        assert max(small.agreement["max_abs_difference"], small.agreement["score_difference"]) <= TOLERANCE
    else:
        assert all(small.agreement[name] >= floor for name, floor in FLOORS["int8"].items())


def test_passages_are_encoded_and_scored_as_before(added: Added, plain_model: Path) -> None:
    before, after = d2llm.load(plain_model), d2llm.load(added.folder)
    expected, found = before.encode_document(SENTENCES[:20]), after.encode_document(SENTENCES[:20])
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    np.testing.assert_array_equal(found.features, expected.features)
    full = d2llm.load(added.folder, query_encoder="full")
    assert full.query_encoder == before.query_encoder == "full"
    np.testing.assert_array_equal(
        full.score_pairs(TEXTS, SENTENCES[:4]), before.score_pairs(TEXTS, SENTENCES[:4])
    )  # fmt: skip


@pytest.mark.parametrize("query_precision", [None, "fp32"], ids=["as the encoder", "fp32"])
def test_a_new_model_takes_its_small_encoder_along(
    query_precision: Precision | None, student_folder: Path, kales: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "model"
    config = export(
        student_folder, target, precision="int8", query_encoder=kales["static"], query_precision=query_precision
    )
    assert config.query_encoder is not None
    assert (config.precision, config.query_encoder.precision) == ("int8", query_precision or "int8")
    assert {path.name for path in target.iterdir()} == {CONFIG, *config.files}
    assert {QUERY_ENCODER, ENCODER, IEM, TOKENIZER} == set(config.files)
    assert d2llm.load(target).query_encoder == "small"


def test_int8_models_of_earlier_exports_stay_apart_and_go_on_working(
    student_folder: Path, kales: dict[str, Path], tmp_path: Path
) -> None:
    """Their graphs had one range for a whole batch: their vectors are not today's, and collections keep to them."""
    target = tmp_path / "model"
    config = export(student_folder, target, precision="int8")
    student = Student.load(student_folder)
    weights, tokenizer = student.weights_sha256(), sha256_of(target / TOKENIZER)
    earlier = fingerprint(weights, tokenizer, "", config.document_max_length, "int8")
    with pytest.raises(MismatchError, match=f"kb was made with passage encoder {earlier}, this model is"):
        config.require_fingerprint(earlier, "kb")
    write_config(target, replace(config, fingerprint=earlier), config.files)
    added = add_query_encoder(student_folder, target, kales["static"])
    assert (added.precision, added.fingerprint) == ("int8", earlier)
    assert d2llm.load(target).encode_query(["a question"]).vectors.shape == (1, config.embedding_dim)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("model", {"embedding_dim": 24, "lexical_slots": 0}),
        ("static", {"embedding_dim": 24, "lexical_slots": 0}),
    ],
    ids=["model, recall head, no words", "static, recall head, no words"],
)
def test_students_of_other_shapes_in_folders_whose_paths_are_text(
    kind: str,
    options: dict[str, Any],
    make_student: MakeStudent,
    tiny_bert: Path,
    byte_bert: Path,
    tmp_path: Path,
) -> None:
    of_student, of_kale, of_model = (str(tmp_path / name) for name in ("student", "kale", "model"))
    make_student(tiny_bert, **SHORT, **options).save(of_student)
    student = merged(of_student)
    torch.manual_seed(32)
    encoder = from_tokens(student) if kind == "static" else from_model(student, str(byte_bert))
    encoder.save(of_kale)
    export(of_student, of_model, query_encoder=of_kale)
    add_query_encoder(of_student, of_model, of_kale)
    model = d2llm.load(of_model)
    assert_reads_as(model, encoder)
    assert model.encode_query(TEXTS).vectors.shape == (len(TEXTS), student.embedding_dim)


def test_a_causal_student_is_read_by_some_of_its_layers(
    make_student: MakeStudent, tiny_qwen3: Path, tmp_path: Path
) -> None:
    make_student(tiny_qwen3, **SHORT).save(tmp_path / "student")
    encoder = from_layers(merged(tmp_path / "student"), [1])
    encoder.save(tmp_path / "kale")
    export(tmp_path / "student", tmp_path / "model", query_encoder=tmp_path / "kale")
    assert_reads_as(d2llm.load(tmp_path / "model"), encoder)


# -- one in another's place, and what does not belong together -----------------------------------------------------


def test_one_small_encoder_takes_anothers_place(
    add: Callable[[str, Precision], Added], student_folder: Path, kales: dict[str, Path], tmp_path: Path
) -> None:
    """First one with a tokenizer of its own, of which nothing is left."""
    first = add("model", "fp32")
    folder = shutil.copytree(first.folder, tmp_path / "model")
    config = add_query_encoder(student_folder, folder, kales["static"])
    assert {path.name for path in folder.iterdir()} == {CONFIG, ENCODER, IEM, TOKENIZER, QUERY_ENCODER}
    assert config.fingerprint == first.returned.fingerprint
    assert_reads_as(d2llm.load(folder), SmallEncoder.load(kales["static"]))
    add_query_encoder(student_folder, folder, kales["model"])
    assert bytes_of(folder).keys() == bytes_of(first.folder).keys()
    assert_reads_as(d2llm.load(folder), SmallEncoder.load(kales["model"]))


@pytest.fixture
def other(make_student: MakeStudent, tiny_bert: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Another student on the same backbone, and a small encoder of it."""
    make_student(tiny_bert, seed=1, **SHORT).save(tmp_path / "other")
    from_layers(merged(tmp_path / "other"), [0]).save(tmp_path / "other-kale")
    return tmp_path / "other", tmp_path / "other-kale"


def test_a_small_encoder_of_another_student_is_refused(
    other: tuple[Path, Path], student_folder: Path, student: Student, copy: Path, tmp_path: Path
) -> None:
    kale, before = other[1], bytes_of(copy)
    its, ours = SmallEncoder.load(kale).config.student[:16], student_digest(student)[:16]
    message = rf"other-kale was aligned to the student {its}, .*small is {ours}\. Align an encoder to it: d2llm"
    with pytest.raises(MismatchError, match=message):
        add_query_encoder(student_folder, copy, kale)
    with pytest.raises(MismatchError, match=message):
        export(student_folder, tmp_path / "new", query_encoder=kale)
    assert bytes_of(copy) == before and not (tmp_path / "new").exists()


def test_a_model_of_another_student_is_refused(other: tuple[Path, Path], copy: Path) -> None:
    before = bytes_of(copy)
    ours = json.loads((copy / CONFIG).read_text())["fingerprint"]
    with pytest.raises(
        MismatchError, match=rf"model has the passage encoder {ours}, .*other would have [0-9a-f]{{16}}:"
    ):
        add_query_encoder(*(other[0], copy, other[1]))
    assert bytes_of(copy) == before


def test_a_model_with_another_iem_is_found_out(
    make_student: MakeStudent, tiny_bert: Path, copy: Path, tmp_path: Path
) -> None:
    """The passage side, and so the fingerprint, is the model's own: it is the scores that give it away."""
    student = make_student(tiny_bert, **SHORT)
    with torch.no_grad():
        student.iem.out.weight.add_(0.1)
    student.save(tmp_path / "student")
    from_tokens(merged(tmp_path / "student")).save(tmp_path / "kale")
    before = bytes_of(copy)
    with pytest.raises(ExportError, match=r"IEM scores of torch and onnxruntime differ by .* Nothing was published"):
        add_query_encoder(tmp_path / "student", copy, tmp_path / "kale")
    assert bytes_of(copy) == before


def test_folders_that_are_none_are_named(
    student_folder: Path, kales: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        add_query_encoder(student_folder, tmp_path / "nowhere", kales["static"])
    with pytest.raises(ModelError, match=r"model is not a student folder: it has no student\.json"):
        add_query_encoder(copy, copy, kales["static"])
    with pytest.raises(ModelError, match="small is not a small query encoder"):
        add_query_encoder(student_folder, copy, student_folder)
    with pytest.raises(ModelError, match="small is not a small query encoder"):
        export(student_folder, tmp_path / "new", query_encoder=student_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# -- interrupted ---------------------------------------------------------------------------------------------------


def test_an_encoder_that_does_not_verify_leaves_the_model_as_it_was(
    student_folder: Path, kales: dict[str, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(copy)
    with monkeypatch.context() as patch:
        patch.setattr(verification, "TOLERANCE", -1.0)
        with pytest.raises(ExportError, match=r"torch and onnxruntime on 1 rows of .* Nothing was published"):
            add_query_encoder(student_folder, copy, kales["layers"])
        patch.setitem(FLOORS, "int8", {"min_cosine": 1.1})
        with pytest.raises(ExportError, match=r"int8: min_cosine is [01]\.\d+, the floor is 1\.1"):
            add_query_encoder(student_folder, copy, kales["layers"], precision="int8")
    assert bytes_of(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == ["model"], "nothing is left beside it either"


@dataclass
class Breaking:
    """A function that works until it is called for the `last` time, and then is interrupted."""

    function: Callable[..., Any]
    last: int
    calls: int = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.last:
            raise KeyboardInterrupt
        return self.function(*arguments)


@pytest.mark.parametrize(
    ("there", "name", "call", "left"),
    [
        (None, "write_config", 1, "full"),
        ("model", "write_config", 1, "small"),
        ("model", "sha256_of", 2, "full"),
        ("model", "write_config", 2, "full"),
    ],
    ids=["before the first is named", "before the old is forgotten", "before the new is moved", "before it is named"],
)
def test_an_interrupted_addition_leaves_a_valid_model(
    there: str | None,
    name: str,
    call: int,
    left: str,
    add: Callable[[str, Precision], Added],
    plain_model: Path,
    student_folder: Path,
    kales: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = plain_model if there is None else add(there, "fp32").folder
    folder = shutil.copytree(start, tmp_path / "model")
    breaking = Breaking(getattr(exporting, name), call)  # of hashes the first is the tokenizer's
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(exporting, name, breaking)
        add_query_encoder(student_folder, folder, kales["static"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    model = d2llm.load(folder)
    assert model.query_encoder == left
    expected = d2llm.load(start if left == "small" else plain_model)
    np.testing.assert_array_equal(model.encode_query(TEXTS).vectors, expected.encode_query(TEXTS).vectors)
    add_query_encoder(student_folder, folder, kales["static"])
    assert_reads_as(d2llm.load(folder), SmallEncoder.load(kales["static"]))
    assert {path.name for path in folder.iterdir()} == {CONFIG, ENCODER, IEM, TOKENIZER, QUERY_ENCODER}


def assert_full(model: d2llm.Model, plain_model: Path) -> None:
    expected = d2llm.load(plain_model)
    np.testing.assert_array_equal(model.encode_query(TEXTS).vectors, expected.encode_query(TEXTS).vectors)
    np.testing.assert_array_equal(model.encode_document(TEXTS).features, expected.encode_document(TEXTS).features)


# -- the runtime ---------------------------------------------------------------------------------------------------


def test_the_caller_chooses_who_reads_queries(add: Callable[[str, Precision], Added], plain_model: Path) -> None:
    both = add("layers", "fp32").folder
    chosen = {name: d2llm.load(both, query_encoder=name) for name in (None, "small", "full")}
    assert [model.query_encoder for model in chosen.values()] == ["small", "small", "full"]
    vectors = {name: model.encode_query(TEXTS).vectors for name, model in chosen.items()}
    np.testing.assert_array_equal(vectors[None], vectors["small"])
    assert np.abs(vectors["full"] - vectors["small"]).max() > 1e-3
    assert_full(chosen["full"], plain_model)
    assert_full(d2llm.load(plain_model), plain_model)


def test_a_small_encoder_that_is_not_there_says_how_to_make_one(plain_model: Path) -> None:
    with pytest.raises(ModelError, match=r"plain has no small query encoder\. Make one with: d2llm kale STUDENT KALE"):
        d2llm.load(plain_model, query_encoder="small")
    assert d2llm.load(plain_model, query_encoder="full").query_encoder == "full"


def test_an_unknown_choice_is_named(plain_model: Path) -> None:
    with pytest.raises(ValueError, match="unknown query encoder 'tiny': choose one of full, small"):
        d2llm.load(plain_model, query_encoder="tiny")  # type: ignore[arg-type]  # the wrong type is what is tested


def test_too_long_queries_are_counted_by_the_small_encoders_limit(add: Callable[[str, Precision], Added]) -> None:
    words = ["word " * count for count in (6, 12, 13, 60)]  # prompt and special tokens take 4 of the 16
    assert d2llm.load(add("layers", "fp32").folder).encode_query(words).truncated == 2
    own = d2llm.load(add("model", "fp32").folder)  # 40 of its own tokens, with its prompt
    assert own.query.tokenize(["find"])[0].student_ids != own.query.tokenize(["find"])[0].ids
    assert own.encode_query([*words, "x" * 100]).truncated >= 2


def test_searching_opens_no_full_encoder(add: Callable[[str, Precision], Added], tmp_path: Path) -> None:
    """Its file is damaged, and nobody notices before a passage is encoded."""
    folder = shutil.copytree(add("static", "fp32").folder, tmp_path / "model")
    index = d2llm.FlatIndex()
    index.add(d2llm.load(folder), DOCUMENTS)
    with open(folder / ENCODER, "ab") as file:
        file.write(b"x")
    model = d2llm.load(folder)
    assert len(d2llm.Searcher(model, index).search("return the median of the data", k=5)) == 5
    for _ in range(2):
        with pytest.raises(ModelError, match=r"encoder\.onnx was changed: its sha256 is .* Export again"):
            model.encode_document(["a passage"])
    with pytest.raises(ModelError, match=r"encoder\.onnx was changed"):
        d2llm.load(folder, query_encoder="full")


def test_the_full_encoder_is_opened_once_by_whoever_comes_first(
    add: Callable[[str, Precision], Added], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = runtime._graph

    def recording(folder: Path, config: ModelConfig, name: str, *rest: Any) -> Any:
        opened.append(name)
        return real(folder, config, name, *rest)

    monkeypatch.setattr(runtime, "_graph", recording)
    model = d2llm.load(add("static", "fp32").folder)
    assert sorted(opened) == sorted([QUERY_ENCODER, IEM])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: model.encode_document([text]).vectors, SENTENCES[:16]))
    assert sorted(opened) == sorted([QUERY_ENCODER, IEM, ENCODER])
    np.testing.assert_allclose(np.concatenate(found), model.encode_document(SENTENCES[:16]).vectors, atol=1e-5)


@pytest.mark.parametrize("name", [QUERY_ENCODER, QUERY_TOKENIZER])
def test_a_damaged_or_missing_file_of_the_small_encoder_is_named(
    name: str, add: Callable[[str, Precision], Added], tmp_path: Path
) -> None:
    folder = shutil.copytree(add("model", "fp32").folder, tmp_path / "model")
    with open(folder / name, "ab") as file:
        file.write(b" ")
    with pytest.raises(ModelError, match=rf"{name} was changed: its sha256"):
        d2llm.load(folder)
    assert d2llm.load(folder, query_encoder="full").query_encoder == "full"
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"model is incomplete: {name} is missing"):
        d2llm.load(folder)


# -- the promise: the index stays ----------------------------------------------------------------------------------


def points_of(index: QdrantIndex) -> bytes:
    """Every point as the engine itself gives it: id, vector, payload with the features in it."""
    assert index.count() == len(DOCUMENTS)  # opens the shard
    request = index._engine.models.ScrollRequest(limit=10 * len(DOCUMENTS), with_payload=True, with_vector=True)
    records, _ = index._engine._shard.scroll(request)  # of the embedded engine
    rows = sorted([str(record.id), record.vector, record.payload] for record in records)
    assert len(rows) == index.info().passages > len(DOCUMENTS), "long documents have several"
    return json.dumps(rows, sort_keys=True).encode()


def search(model: d2llm.Model, index: QdrantIndex, texts: list[str]) -> list[list[str]]:
    searcher = d2llm.Searcher(model, index)
    return [[hit.id for hit in searcher.search(text, k=10, candidates=50)] for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_not_touched_by_a_new_query_encoder(
    kind: str, student_folder: Path, kales: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    place = tmp_path / "qdrant"
    with QdrantIndex("docs", place) as index:
        index.add(d2llm.load(copy), DOCUMENTS)
        index.optimize()
    with QdrantIndex("docs", place) as index:
        points = points_of(index)
        before = search(d2llm.load(copy), index, QUERIES[:30])
    files = bytes_of(place)
    assert len(files) > 5 and any("segments" in name for name in files)

    add_query_encoder(student_folder, copy, kales[kind])

    with QdrantIndex("docs", place) as index:
        small = search(d2llm.load(copy), index, QUERIES[:30])
        full = search(d2llm.load(copy, query_encoder="full"), index, QUERIES[:30])
        after = points_of(index)
        report = index.add(d2llm.load(copy), DOCUMENTS)
        assert (report.added, report.unchanged) == (0, len(DOCUMENTS)), "no passage is encoded again"
    assert hashlib.sha256(after).hexdigest() == hashlib.sha256(points).hexdigest()
    assert bytes_of(place) == files
    assert full == before
    shared = [len(set(ours) & set(theirs)) / 10 for ours, theirs in zip(small, full, strict=True)]
    assert sum(shared) / len(shared) > {"layers": 0.7, "model": 0.4, "static": 0.6}[kind]
    assert small != full, "another encoder read the queries"


# -- the command line ----------------------------------------------------------------------------------------------


def d2llm_export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(export_main, ["onnx", *(str(argument) for argument in arguments)])


def test_the_command_exports_a_new_model_with_a_small_encoder(
    student_folder: Path, kales: dict[str, Path], tmp_path: Path
) -> None:
    options: list[str | Path] = ["--query-encoder", kales["static"], "--query-precision", "int8", "--json"]
    done = d2llm_export(student_folder, tmp_path / "model", *options)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["precision"], said["query_encoder"]["precision"]) == ("fp32", "int8")
    assert said == json.loads((tmp_path / "model" / CONFIG).read_text())


def test_the_command_adds_to_a_model_and_searches_with_it(
    student_folder: Path, kales: dict[str, Path], copy: Path, tmp_path: Path
) -> None:
    rows = (json.dumps({"_id": document.id, "text": document.text}) for document in DOCUMENTS[:50])
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows))

    def run(*arguments: str | Path) -> Result:
        place = ["--qdrant", tmp_path / "qdrant", "--collection", "docs"]
        return CliRunner().invoke(main, [str(argument) for argument in (*arguments, *place)])

    assert run("index", copy, tmp_path / "corpus.jsonl").exit_code == 0
    files = bytes_of(copy)
    done = d2llm_export(student_folder, copy, "--query-encoder", kales["layers"])
    assert done.exit_code == 0, done.stderr
    assert "small query encoder (layers) (fp32) against torch: largest difference" in done.stdout
    assert f"d2llm search {copy}" in done.stdout and "d2llm index" not in done.stdout, "there is nothing to index again"
    assert {name: bytes_of(copy)[name] for name in files if name != CONFIG} == {
        name: digest for name, digest in files.items() if name != CONFIG
    }

    scores = {}
    for choice in ([], ["--query-encoder", "small"], ["--query-encoder", "full"]):
        found = run("search", copy, QUERIES[0], "--json", *choice)
        assert found.exit_code == 0, found.stderr
        scores["".join(choice)] = [hit["score"] for hit in json.loads(found.stdout)["hits"]]
    assert scores[""] == scores["--query-encodersmall"] != scores["--query-encoderfull"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--query-precision", "int8"], 2, "--query-precision needs --query-encoder"),
        (
            ["--precision", "int8", "--query-encoder", "KALE"],
            2,
            "--precision would change its encoder: give --query-precision",
        ),
        (["--query-encoder", "nowhere"], 1, "nowhere is not a small query encoder"),
        (["--query-encoder", "KALE", "--query-precision", "int4"], 2, "'int4' is not one of"),
        ([], 1, "model exists already. Choose another name or remove it first."),
    ],
    ids=["no encoder", "the other precision", "no folder", "unknown precision", "no --query-encoder"],
)
def test_what_cannot_be_done_is_named_and_changes_nothing(
    options: list[str], code: int, message: str, student_folder: Path, kales: dict[str, Path], copy: Path
) -> None:
    before = bytes_of(copy)
    done = d2llm_export(student_folder, copy, *(str(kales["static"]) if part == "KALE" else part for part in options))
    assert (done.exit_code, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert bytes_of(copy) == before


def test_a_search_with_a_small_encoder_that_is_not_there_is_refused(plain_model: Path, tmp_path: Path) -> None:
    place = ["--qdrant", str(tmp_path / "qdrant"), "--collection", "docs"]
    with QdrantIndex("docs", tmp_path / "qdrant") as index:
        index.open_for(read_config(plain_model))
    done = CliRunner().invoke(main, ["search", str(plain_model), "a question", "--query-encoder", "small", *place])
    assert done.exit_code == 1
    assert "has no small query encoder. Make one with: d2llm kale STUDENT KALE" in done.stderr

"""The exported model against the torch student; what a failed export leaves; what the folder says of itself."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import d2llm
from d2llm import ModelError
from d2llm.export import add_query_encoder, export
from d2llm.export import onnx as exporting
from d2llm.export import verify as verification
from d2llm.export.onnx import Precision
from d2llm.export.verify import FLOORS, TOLERANCE, ExportError
from d2llm.folder import CONFIG, ENCODER, IEM, TOKENIZER, ModelConfig, fingerprint, sha256_of
from d2llm.modeling import Student
from d2llm.query_encoder import from_layers
from d2llm.train.data import Example
from d2llm.train.mining import write_examples
from d2llm.train.targets import compute_targets
from d2llm.types import Embeddings

MakeStudent = Callable[..., Student]
SHORT: dict[str, Any] = {"tuning": "lora", "query_max_length": 16, "document_max_length": 24}
TEXTS = [
    "How do I read a file line by line?",
    "ok",
    "A generator yields one value at a time, so that a file larger than memory can be read. " * 4,
    "机器学习模型可以把查询和段落分别编码。",
    "Der Zug nach München fährt heute von Gleis 12 ab.",
]


@pytest.fixture(scope="module")
def small_student(make_student: MakeStudent, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that exports in seconds."""
    folder = tmp_path_factory.mktemp("students") / "small"
    make_student(tiny_bert, **SHORT).save(folder)
    return folder


@pytest.fixture(scope="module")
def small_model(small_student: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    config: ModelConfig = export(small_student, tmp_path_factory.mktemp("models") / "small")
    return config


def assert_runtime_is_student(model: d2llm.Model, student: Student) -> None:
    student.eval()
    for side, encode in (("query", model.encode_query), ("document", model.encode_document)):
        expected, found = student.encode(TEXTS, side), encode(TEXTS)  # type: ignore[arg-type]  # wider than its hint
        features = expected.query_features_BH if side == "query" else expected.passage_features_BH
        np.testing.assert_allclose(found.vectors, expected.vectors_BE, atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(found.features, features, atol=TOLERANCE, rtol=0)


def test_the_runtime_computes_what_the_lora_student_computes(model: d2llm.Model, student_folder: Path) -> None:
    student = Student.load(student_folder)
    assert_runtime_is_student(model, student)
    student.backbone.disable_adapter_layers()  # type: ignore[operator]  # a Module to torch's types
    without = student.eval().encode(TEXTS, "document").vectors_BE
    assert np.abs(without.numpy() - model.encode_document(TEXTS).vectors).max() > 100 * TOLERANCE, "LoRA did nothing"


@pytest.mark.parametrize("backbone", ["tiny_qwen3", "tiny_llama"])
def test_causal_backbones_export(
    backbone: str, make_student: MakeStudent, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    student = make_student(request.getfixturevalue(backbone), **SHORT, embedding_dim=32)
    student.save(tmp_path / "student")
    config = export(tmp_path / "student", tmp_path / "model")
    assert config.embedding_dim == 32
    assert_runtime_is_student(d2llm.load(tmp_path / "model"), student)


def test_no_lora_weight_is_left_in_the_graph(model_folder: Path) -> None:
    graph = onnx.load(model_folder / ENCODER).graph
    assert len(graph.initializer) > 50
    assert not [tensor.name for tensor in graph.initializer if "lora" in tensor.name.lower()]


def test_one_text_encodes_as_in_a_batch_of_many(model: d2llm.Model) -> None:
    together = model.encode_document(TEXTS)
    for row, text in enumerate(TEXTS):
        alone = model.encode_document([text])
        np.testing.assert_allclose(alone.vectors[0], together.vectors[row], atol=1e-5)
        np.testing.assert_allclose(alone.features[0], together.features[row], atol=TOLERANCE)


def test_fp32_agreement_is_recorded(model_folder: Path) -> None:
    agreement = json.loads((model_folder / CONFIG).read_text())["agreement"]
    assert 0 < agreement["max_abs_difference"] <= TOLERANCE
    assert agreement["score_difference"] <= TOLERANCE
    assert agreement["min_cosine"] > 0.99999 and agreement["score_correlation"] > 0.99999


@pytest.fixture(scope="module", params=["fp16", "int8"])
def reduced(
    request: pytest.FixtureRequest, make_student: MakeStudent, minilm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The student of `student_folder` in a reduced precision; its limits are short, so that it is verified sooner."""
    folder = tmp_path_factory.mktemp("reduced")
    make_student(minilm, tuning="lora", query_max_length=16, document_max_length=32).save(folder / "student")
    export(folder / "student", folder / request.param, precision=request.param)
    return folder / str(request.param)


def test_reduced_precision_stays_above_its_floors(reduced: Path, model: d2llm.Model, model_folder: Path) -> None:
    small = d2llm.load(reduced)
    precision = reduced.name
    recorded = json.loads((reduced / CONFIG).read_text())
    assert recorded["precision"] == precision
    assert all(recorded["agreement"][name] >= floor for name, floor in FLOORS[precision].items())
    assert recorded["agreement"]["max_abs_difference"] > 1e-5, "nothing was reduced"
    share = (reduced / ENCODER).stat().st_size / (model_folder / ENCODER).stat().st_size
    assert share < {"fp16": 0.55, "int8": 0.35}[precision]
    texts = [text for text in TEXTS if len(text) < 90]
    cosines = (small.encode_document(texts).vectors * model.encode_document(texts).vectors).sum(-1)
    assert cosines.min() > FLOORS[precision]["min_cosine"]


def test_the_folder_holds_its_files_and_says_where_it_comes_from(model_folder: Path) -> None:
    assert sorted(path.name for path in model_folder.iterdir()) == sorted([CONFIG, ENCODER, IEM, TOKENIZER])
    content = json.loads((model_folder / CONFIG).read_text())
    assert content["files"] == {name: sha256_of(model_folder / name) for name in (ENCODER, IEM, TOKENIZER)}
    assert content["provenance"]["recipe"] == "by hand", "the student's own provenance goes along"
    assert content["provenance"]["backbone"] == "model", "the backbone's name, not where it lay on this machine"
    assert content["tasks"] == ["symmetric", "asymmetric"]
    assert model_folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_what_is_published_has_the_permissions_of_any_new_file(
    umask: int, file: int, folder: int, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Another user serves the model: weights in safetensors and beside a graph were their owner's alone."""
    monkeypatch.setattr(exporting, "EXTERNAL_DATA_BYTES", 2**16)
    student, kale, model = (tmp_path / name for name in ("student", "kale", "model"))
    before = os.umask(umask)
    try:
        make_student(tiny_bert, **{**SHORT, "tuning": "full"}).save(student)
        export(student, model, precision="fp16")
        loaded = Student.load(student)
        from_layers(loaded, [1]).save(kale)
        add_query_encoder(student, model, kale)
        write_examples(tmp_path / "mined" / "examples.jsonl", [Example("a query", ["a passage"], [])])
        compute_targets(loaded, ["a query"], ["a passage"], tmp_path / "targets")
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert {"encoder.onnx.data", "query_encoder.onnx.data", "heads.safetensors"} <= {path.name for path in made}
    wrong = {str(path): oct(mode) for path in made if (mode := path.stat().st_mode & 0o777) != (
        folder if path.is_dir() else file)}  # fmt: skip
    assert not wrong


def test_the_same_student_exported_again_has_the_same_fingerprint(
    make_student: MakeStudent, tiny_bert: Path, small_model: ModelConfig, tmp_path: Path
) -> None:
    """The other prompt is the query's: passages know nothing of it."""
    student = make_student(tiny_bert, **SHORT, query_prompt="query: ")
    student.save(tmp_path / "student")
    assert export(tmp_path / "student", tmp_path / "model").fingerprint == small_model.fingerprint


def test_the_fingerprint_is_that_of_all_that_passages_depend_on(model_folder: Path, student_folder: Path) -> None:
    student = Student.load(student_folder)
    student.merge_lora()
    expected = fingerprint(student.weights_sha256(), sha256_of(model_folder / TOKENIZER), "", 128, "fp32")
    assert json.loads((model_folder / CONFIG).read_text())["fingerprint"] == expected


def test_no_two_passage_sides_share_a_fingerprint() -> None:
    sides: list[tuple[str, str, str, int, str]] = [
        ("weights", "tokenizer", "prompt", 128, "fp32"),
        ("other", "tokenizer", "prompt", 128, "fp32"),
        ("weights", "other", "prompt", 128, "fp32"),
        ("weights", "tokenizer", "other", 128, "fp32"),
        ("weights", "tokenizer", "prompt", 256, "fp32"),
        ("weights", "tokenizer", "prompt", 128, "int8"),
    ]
    assert len({fingerprint(*side) for side in sides}) == len(sides)


def test_an_export_that_does_not_verify_leaves_nothing(
    small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match=r"torch and onnxruntime on 1 rows of .* Nothing was published"):
        export(small_student, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_reduced_precision_below_its_floor_is_refused(
    precision: Precision, small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FLOORS, precision, {"min_cosine": 1.1})
    with pytest.raises(ExportError, match=rf"{precision}: min_cosine is [01]\.\d+, the floor is 1\.1\. Export as fp32"):
        export(small_student, tmp_path / "model", precision=precision)
    assert not list(tmp_path.iterdir())


def test_a_target_in_use_is_refused_and_left_alone(small_student: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"model exists already\. Choose another folder"):
        export(small_student, tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "notes.txt"]


def test_a_folder_that_is_no_student_is_refused_and_leaves_nothing(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no student"):
        export(minilm, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_beyond_the_limit_of_protobuf_go_to_a_file_beside_the_graph(
    precision: Precision, small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "EXTERNAL_DATA_BYTES", 0)
    config = export(small_student, tmp_path / "model", precision=precision)
    assert "encoder.onnx.data" in config_files(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(
        ["d2llm.json", *config_files(tmp_path / "model")]
    )
    vectors = d2llm.load(tmp_path / "model").encode_query(["a question"]).vectors
    assert np.linalg.norm(vectors) == pytest.approx(1.0, abs=1e-3)
    assert config.precision == precision
    (tmp_path / "model" / "encoder.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"encoder\.onnx\.data is missing"):
        d2llm.load(tmp_path / "model")


def config_files(folder: Path) -> list[str]:
    return list(json.loads((folder / "d2llm.json").read_text())["files"])


def test_too_low_an_opset_is_refused(small_student: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset 17 is too low: the exporter writes 18 and above"):
        export(small_student, tmp_path / "model", opset=17)
    assert not list(tmp_path.iterdir())


EXPORT = """
import resource, signal, sys
from pathlib import Path
from d2llm.export import export
limit = int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
export(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def start_export(student: Path, target: Path, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(student), str(target), str(limit)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def test_a_full_disk_leaves_nothing(small_student: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: writing the graph fails half-way."""
    child = start_export(small_student, tmp_path / "model", limit=2**20)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "File too large" in errors
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(small_student: Path, tmp_path: Path) -> None:
    child = start_export(small_student, tmp_path / "model")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f".model-*/{ENCODER}")):
        assert child.poll() is None and time.monotonic() < deadline, "the export ended before it could be interrupted"
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not list(tmp_path.iterdir())


def test_scores_come_out_of_the_exported_iem_as_out_of_torch(model: d2llm.Model) -> None:
    """The score is no longer the cosine: the IEM's own part must have come through."""
    query: Embeddings = model.encode_query(TEXTS[:1])
    documents = model.encode_document(TEXTS)
    scores = model.score_all(query, documents)[0]
    cosine = query.vectors @ documents.vectors.T
    assert np.corrcoef(scores, cosine[0])[0, 1] < 0.9999

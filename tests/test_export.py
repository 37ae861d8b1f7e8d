"""The exported model against the torch student; what a failed export leaves; what the folder says of itself."""

import json
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from conftest import SHORT
from onnxruntime.quantization import quantize_dynamic

import d2llm
from d2llm import ExportError, ModelError
from d2llm.export import add_query_encoder, export
from d2llm.export import onnx as exporting
from d2llm.export import verify as verification
from d2llm.export.int8 import STEPS, WEIGHT_STEPS, quantize
from d2llm.export.onnx import Precision
from d2llm.export.verify import BATCH_TOLERANCE, FLOORS, STEP_SHARE, TOLERANCE
from d2llm.files import sha256_of
from d2llm.folder import CONFIG, ENCODER, IEM, TOKENIZER, ModelConfig, fingerprint
from d2llm.small_encoder import from_layers
from d2llm.student import Student
from d2llm.train.examples import Example, write_examples
from d2llm.train.targets import compute_targets
from d2llm.types import Embeddings

MakeStudent = Callable[..., Student]
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
        expected, found = student.encode(TEXTS, side), encode(TEXTS)  # type: ignore[arg-type]  # a str where a Literal is expected
        features = expected.query_features_BH if side == "query" else expected.passage_features_BH
        np.testing.assert_allclose(found.vectors, expected.vectors_BE, atol=TOLERANCE, rtol=0)
        if side == "query":
            np.testing.assert_allclose(found.features, features, atol=TOLERANCE, rtol=0)
        else:
            assert (found.features != student.iem.layouts[1].pack(features).numpy()).mean() < STEP_SHARE


def test_the_runtime_computes_what_the_lora_student_computes(model: d2llm.Model, student_folder: Path) -> None:
    student = Student.load(student_folder)
    assert_runtime_is_student(model, student)
    student.backbone.disable_adapter_layers()
    without = student.eval().encode(TEXTS, "document").vectors_BE
    assert np.abs(without.numpy() - model.encode_document(TEXTS).vectors).max() > 100 * TOLERANCE, "LoRA did nothing"


@pytest.mark.parametrize("backbone", ["tiny_qwen3", "tiny_llama"])
def test_causal_backbones_export(
    backbone: str, make_student: MakeStudent, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    student = make_student(request.getfixturevalue(backbone), **SHORT)
    student.save(tmp_path / "student")
    export(tmp_path / "student", tmp_path / "model")
    assert_runtime_is_student(d2llm.load(tmp_path / "model"), student)


def test_no_lora_weight_is_left_in_the_graph(model_folder: Path) -> None:
    graph = onnx.load(model_folder / ENCODER).graph
    assert len(graph.initializer) > 50
    assert not [tensor.name for tensor in graph.initializer if "lora" in tensor.name.lower()]


def test_attention_is_one_node_of_each_layer(model_folder: Path) -> None:
    kinds = Counter(node.op_type for node in onnx.load(model_folder / ENCODER, load_external_data=False).graph.node)
    assert kinds["MultiHeadAttention"] == 6
    assert kinds["IsNaN"] == 0, "a part of attention as torch's exporter writes it"


def assert_one_vector_for_each_text(model: d2llm.Model) -> None:
    exact = model.config.precision == "fp32"
    tolerance, share = (TOLERANCE, STEP_SHARE) if exact else (BATCH_TOLERANCE, 0.05)
    for encode in (model.encode_query, model.encode_document):
        together, pairs = encode(TEXTS), encode(TEXTS[::-1][1:])
        for row, text in enumerate(TEXTS):
            alone = encode([text])
            np.testing.assert_allclose(alone.vectors[0], together.vectors[row], atol=1e-5)
            if together.features.dtype == np.uint8:
                assert (alone.features[0] != together.features[row]).mean() <= share
            else:
                np.testing.assert_allclose(alone.features[0], together.features[row], atol=tolerance)
        np.testing.assert_allclose(pairs.vectors[::-1], together.vectors[:-1], atol=1e-5)


def test_one_text_encodes_as_in_a_batch_of_many(model: d2llm.Model) -> None:
    assert_one_vector_for_each_text(model)


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
    make_student(minilm, **SHORT).save(folder / "student")
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


def test_one_text_encodes_as_in_a_batch_in_reduced_precision_too(reduced: Path) -> None:
    assert_one_vector_for_each_text(d2llm.load(reduced))
    assert json.loads((reduced / CONFIG).read_text())["agreement"]["batch_cosine"] > 1 - 1e-5


@pytest.mark.parametrize("backbone", ["tiny_bert", "tiny_qwen3"])
def test_an_int8_graph_with_one_range_for_a_batch_is_refused(
    backbone: str,
    make_student: MakeStudent,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As onnxruntime's dynamic quantizer writes them. The same student exports with a range for each row."""

    def with_one_range(model: onnx.ModelProto) -> None:
        del model.graph.value_info[:]
        onnx.save(model, tmp_path / "whole.onnx")
        float_inputs = {"DefaultTensorType": onnx.TensorProto.FLOAT}
        quantize_dynamic(tmp_path / "whole.onnx", tmp_path / "quantized.onnx", extra_options=float_inputs)
        model.CopyFrom(onnx.load(tmp_path / "quantized.onnx"))

    make_student(request.getfixturevalue(backbone), **SHORT).save(tmp_path / "student")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "quantize", with_one_range)
        with pytest.raises(ExportError, match=r"int8: a row of \d tokens alone and in a batch differ by \d"):
            export(tmp_path / "student", tmp_path / "model", precision="int8")
    export(tmp_path / "student", tmp_path / "model", precision="int8")
    assert_one_vector_for_each_text(d2llm.load(tmp_path / "model"))


def test_two_int8_products_fit_the_16_bits_in_which_older_cpus_add_them() -> None:
    assert 2 * STEPS * WEIGHT_STEPS <= np.iinfo(np.int16).max


def run_in_int8(nodes: list[onnx.NodeProto], x: npt.NDArray[Any], **constants: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What `nodes` make of `x` when they are quantized: x to y."""
    kind, axes = onnx.helper.np_dtype_to_tensor_dtype(x.dtype), [f"axis{axis}" for axis in range(x.ndim)]
    inputs = [onnx.helper.make_tensor_value_info("x", kind, axes)]
    outputs = [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    opsets = [onnx.helper.make_opsetid("", exporting.DEFAULT_OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    quantize(model)
    found: npt.NDArray[Any] = ort.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})[0]
    return found


def test_a_product_in_int8_is_exact_up_to_half_a_step_of_each_row() -> None:
    """Rows differ in length by orders of magnitude, lie on one side of zero, or hold one number."""
    rng = np.random.default_rng(0)
    x_BLK = rng.normal(size=(2, 6, 48)).astype(np.float32)
    x_BLK[0, 1] *= 1e4
    x_BLK[0, 2] = x_BLK[0, 2] * 1e-4 + 3
    x_BLK[0, 3], x_BLK[0, 4] = 5, 0
    x_BLK[1, 0, 7] = 500
    w_KN = rng.normal(size=(48, 24)).astype(np.float32)
    bias_N = rng.normal(size=24).astype(np.float32)
    product = [onnx.helper.make_node("MatMul", ["x", "w"], ["xw"]), onnx.helper.make_node("Add", ["xw", "b"], ["y"])]
    found = run_in_int8(product, x_BLK, w=w_KN, b=bias_N)

    step_BL1 = (x_BLK.max(-1, keepdims=True) - x_BLK.min(-1, keepdims=True)) / 255
    weight_step_N = np.abs(w_KN).max(0) / 64
    of_activations = step_BL1 / 2 * np.abs(w_KN).sum(0)
    of_weights = (np.abs(x_BLK).sum(-1, keepdims=True) + 48 * step_BL1 / 2) * weight_step_N / 2
    assert (np.abs(found - (x_BLK @ w_KN + bias_N)) <= of_activations + of_weights + 1e-4).all()
    for row in range(6):
        part = np.s_[:1, row : row + 1]
        np.testing.assert_array_equal(run_in_int8(product, x_BLK[part], w=w_KN, b=bias_N), found[part])


def test_products_in_int8_may_share_an_input_and_follow_each_other() -> None:
    rng = np.random.default_rng(0)
    x_BLK = rng.normal(size=(2, 5, 32)).astype(np.float32)
    u, v, w = (rng.normal(size=(32, 32)).astype(np.float32) for _ in range(3))
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "u"], ["xu"]),
        onnx.helper.make_node("MatMul", ["x", "v"], ["xv"]),
        onnx.helper.make_node("MatMul", ["xu", "w"], ["xuw"]),
        onnx.helper.make_node("MatMul", ["xv", "w"], ["xvw"]),
        onnx.helper.make_node("Sub", ["xuw", "xvw"], ["y"]),
    ]
    found, expected = run_in_int8(nodes, x_BLK, u=u, v=v, w=w), x_BLK @ (u - v) @ w
    assert 0 < np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected)


def test_a_table_in_int8_keeps_each_row_within_half_a_step_of_its_own() -> None:
    rng = np.random.default_rng(0)
    table_VO = (rng.normal(size=(50, 8)) * 10.0 ** rng.integers(-3, 3, size=(50, 1))).astype(np.float32)
    table_VO[7] = 0
    look_up = [onnx.helper.make_node("Gather", ["table", "x"], ["y"])]
    found = run_in_int8(look_up, np.arange(50)[None], table=table_VO)[0]
    step_V1 = np.abs(table_VO).max(-1, keepdims=True) / 127
    assert (np.abs(found - table_VO) <= 0.501 * step_V1).all()
    assert (found != table_VO).any(), "nothing was quantized"


def test_the_folder_holds_its_files_and_says_where_it_comes_from(model_folder: Path) -> None:
    assert sorted(path.name for path in model_folder.iterdir()) == sorted([CONFIG, ENCODER, IEM, TOKENIZER])
    content = json.loads((model_folder / CONFIG).read_text())
    assert content["files"] == {name: sha256_of(model_folder / name) for name in (ENCODER, IEM, TOKENIZER)}
    assert content["provenance"]["recipe"] == "by hand", "the student's own provenance goes along"
    assert content["provenance"]["backbone"] == "model", "the backbone's name, not where it lay on this machine"
    assert content["tasks"] == ["symmetric", "asymmetric"]
    assert model_folder.stat().st_mode & 0o777 == 0o755


def test_what_is_published_has_the_permissions_of_any_new_file(
    make_student: MakeStudent, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user serves the model: weights in safetensors and beside a graph were their owner's alone."""
    monkeypatch.setattr(exporting, "EXTERNAL_DATA_BYTES", 2**16)
    student, kale, model = (tmp_path / name for name in ("student", "kale", "model"))
    before = os.umask(0o027)
    try:
        make_student(tiny_bert, **SHORT).save(student)
        export(student, model, precision="fp16")
        loaded = Student.load(student)
        loaded.merge_lora()
        from_layers(loaded, [1]).save(kale)
        add_query_encoder(student, model, kale)
        write_examples(tmp_path / "mined" / "examples.jsonl", [Example("a query", ["a passage"], [])])
        compute_targets(loaded, ["a query"], ["a passage"], tmp_path / "targets")
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    names = {path.name for path in made}
    assert {"encoder.onnx.data", "query_encoder.onnx.data", "heads.safetensors", "adapter_model.safetensors"} <= names
    wrong = {str(path): oct(mode) for path in made if (mode := path.stat().st_mode & 0o777) != (
        0o750 if path.is_dir() else 0o640)}  # fmt: skip
    assert not wrong


def test_the_same_student_exported_again_has_the_same_fingerprint(
    make_student: MakeStudent, tiny_bert: Path, small_model: ModelConfig, tmp_path: Path
) -> None:
    """The other prompt is the query's: passages know nothing of it."""
    student = make_student(tiny_bert, **SHORT)
    student.config = replace(student.config, query_prompt="find: ")
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
    with pytest.raises(ModelError, match=r"model exists already\. Choose another name"):
        export(small_student, tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "notes.txt"]


def test_a_folder_that_is_no_student_is_refused_and_leaves_nothing(minilm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a student folder"):
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


def test_a_full_disk_leaves_nothing(small_student: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: writing the graph fails half-way."""
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limit[1]))
        with pytest.raises(OSError, match="File too large: '/"):
            export(small_student, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(
    small_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ctrl_c(*_: object) -> None:
        assert list(tmp_path.glob(f".model-*/{ENCODER}"))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(exporting, "verify", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        export(small_student, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_scores_come_out_of_the_exported_iem_as_out_of_torch(model: d2llm.Model) -> None:
    """The score is no longer the cosine: the IEM's own part must have come through."""
    query: Embeddings = model.encode_query(TEXTS[:1])
    documents = model.encode_document(TEXTS)
    scores = model.score_all(query, documents)[0]
    cosine = query.vectors @ documents.vectors.T
    assert np.corrcoef(scores, cosine[0])[0, 1] < 0.9999

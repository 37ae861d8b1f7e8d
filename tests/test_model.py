"""The runtime on a real model: what comes out, in which order, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import d2llm
from d2llm import ArgumentError, DataError, DeviceError, MismatchError, ModelError
from d2llm import model as runtime
from d2llm.files import sha256_of
from d2llm.folder import CONFIG, ENCODER, IEM, TOKENIZER
from d2llm.sessions import Graph, why_no_cuda
from d2llm.student import Student
from d2llm.tokens import encode_batch
from d2llm.types import PARTS, Task

TEXTS = [f"{'word ' * (37 * i % 101 + 1)}number {i}" for i in range(120)]  # more than one batch, in no order of length


def has_gpu_wheel() -> bool:
    return any(wheel.name == "onnxruntime-gpu" for wheel in metadata.distributions())


@pytest.fixture
def copy(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "copy")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def assert_same_features(found: Any, expected: Any) -> None:
    """A last bit, which depends on the rest of a batch, can turn a number of packed features into the next step."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if found.dtype == np.uint8:
        assert (found != expected).mean() < 0.01
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)


# encoding


@pytest.mark.parametrize("side", ["query", "document"])
def test_results_stand_in_the_order_of_the_texts(side: str, model: d2llm.Model) -> None:
    encode = model.encode_query if side == "query" else model.encode_document
    together = encode(TEXTS)
    assert len(together) == len(TEXTS)
    for row in (0, 1, 59, 118, 119):
        alone = encode([TEXTS[row]])
        np.testing.assert_allclose(together.vectors[row], alone.vectors[0], atol=1e-5)
        assert_same_features(together.features[row], alone.features[0])


def test_vectors_are_unit_vectors_and_features_of_passages_are_packed(model: d2llm.Model) -> None:
    config = model.config
    assert config.feature_bytes <= 1024
    for embeddings, width, kind in (
        (model.encode_query(TEXTS[:5]), config.query_width, np.float32),
        (model.encode_document(TEXTS[:5]), config.feature_bytes, np.uint8),
    ):
        assert embeddings.vectors.shape == (5, config.embedding_dim) and embeddings.vectors.dtype == np.float32
        assert embeddings.features.shape == (5, width) and embeddings.features.dtype == kind
        np.testing.assert_allclose(np.linalg.norm(embeddings.vectors, axis=1), 1, atol=1e-5)


def test_encoding_goes_in_batches_of_bounded_size(model: d2llm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    real = model.document.run

    def recording(batch: Sequence[runtime.Tokens]) -> Any:
        sizes.append((len(batch), max(len(tokens.ids) for tokens in batch)))
        return real(batch)

    monkeypatch.setattr(model.document, "run", recording)
    monkeypatch.setattr(runtime, "CHUNK", 50)
    budget = model.document.graph.batch_tokens
    found = model.encode_document(TEXTS)
    assert max(rows * length for rows, length in sizes) <= budget
    assert max(rows for rows, _ in sizes) <= 50, "no more texts at a time than a chunk"
    assert sum(rows for rows, _ in sizes) == len(TEXTS)
    assert len(sizes) < len(TEXTS) / 4, "batches, not single texts"
    monkeypatch.undo()
    np.testing.assert_allclose(found.vectors, model.encode_document(TEXTS).vectors, atol=1e-5)


def test_batches_grow_with_the_threads_up_to_a_limit(model_folder: Path) -> None:
    graphs = [Graph(model_folder / IEM, threads=threads) for threads in (1, 2, 64)]
    assert [graph.batch_tokens for graph in graphs] == [256, 512, 4096]
    assert [graph.batches_at_a_time for graph in graphs] == [1, 2, 2]


def test_texts_of_one_length_share_a_batch(model: d2llm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []
    real = model.document.run

    def recording(batch: Sequence[runtime.Tokens]) -> Any:
        lengths.append([len(tokens.ids) for tokens in batch])
        return real(batch)

    monkeypatch.setattr(model.document, "run", recording)
    model.encode_document(TEXTS)
    assert len(lengths) > 1
    lengths.sort(key=max, reverse=True)  # two batches run at a time: either may begin first
    assert all(min(longer) >= max(shorter) for longer, shorter in pairwise(lengths))


def test_too_long_texts_are_cut_and_counted_on_each_side_by_its_own_limit(model: d2llm.Model) -> None:
    words = ["word " * n for n in (30, 31, 126, 127)]  # and two special tokens
    assert (model.config.query_max_length, model.config.document_max_length) == (32, 128)
    assert model.encode_query(words).truncated == 3
    documents = model.encode_document([*words, "word " * 500])
    assert documents.truncated == 2
    np.testing.assert_allclose(documents.vectors[3], documents.vectors[4], atol=1e-5)


def test_the_sides_share_vectors_and_their_features_are_those_of_torch(
    model: d2llm.Model, student_folder: Path
) -> None:
    student = Student.load(student_folder).eval()
    query, document = model.encode_query(TEXTS[:9]), model.encode_document(TEXTS[:9])
    np.testing.assert_allclose(query.vectors[:1], document.vectors[:1], atol=1e-5)  # a short text: no limit cuts it
    expected = student.encode(TEXTS[:9], "query").query_features_BH, student.encode(TEXTS[:9], "document")
    assert_same_features(query.features, expected[0].numpy())
    assert_same_features(document.features, student.iem.layouts[1].pack(expected[1].passage_features_BH).numpy())


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_empty_text_is_named_by_its_index(empty: str, model: d2llm.Model) -> None:
    with pytest.raises(DataError, match="text 2 of 3 is empty"):
        model.encode_document(["a", "b", empty])
    with pytest.raises(DataError, match="text 0 of 1 is empty"):
        model.encode_query([empty])


def test_what_is_no_list_of_texts_is_refused(model: d2llm.Model) -> None:
    calls: list[Callable[[Any], Any]] = [
        model.encode_query,
        model.encode_document,
        model.query.tokenize,
        lambda texts: model.score_pairs(texts, ["one text"]),
        lambda texts: model.score_pairs(["one text"], texts),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"found a single string: pass \[text\]"):
            call("how do I")
        with pytest.raises(TypeError, match="expected each text to be a string, found None"):
            call([None])
        with pytest.raises(DataError, match=r"text 'cut emoji \\ud83d' cannot be written as UTF-8"):
            call(["cut emoji \ud83d"])


def test_no_texts_give_empty_arrays(model: d2llm.Model) -> None:
    nothing, something = model.encode_document([]), model.encode_query(TEXTS[:2])
    assert nothing.vectors.shape == (0, model.config.embedding_dim)
    assert nothing.features.shape == (0, model.config.feature_bytes)
    assert len(nothing) == nothing.truncated == 0
    assert model.score_pairs([], []).shape == (0,)
    assert model.score_all(something, nothing).shape == (2, 0)
    assert model.score_all(model.encode_query([]), model.encode_document(TEXTS[:3])).shape == (0, 3)


# scoring


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_scores_are_those_of_the_torch_iem(task: Task, model: d2llm.Model, student_folder: Path) -> None:
    student = Student.load(student_folder).eval()
    queries, documents = TEXTS[:3], TEXTS[10:15]
    q, p = student.encode(queries, "query"), student.encode(documents, "document")
    cosine = q.vectors_BE @ p.vectors_BE.T
    branch = torch.full((3,), ["symmetric", "asymmetric"].index(task))
    with torch.inference_mode():
        packed = student.iem.layouts[1].pack(p.passage_features_BH).expand(3, -1, -1)
        parts = student.iem.parts(q.query_features_BH, student.iem.layouts[1].unpack(packed), cosine, branch)
        expected = (parts * student.iem.weights(branch)[:, None]).sum(-1)
        exact = student.iem(q.query_features_BH, p.passage_features_BH.expand(3, -1, -1), cosine, branch)
    query, document = model.encode_query(queries), model.encode_document(documents)
    candidates = np.repeat(document.features[None], 3, axis=0)
    found = model.score(query.features, candidates, query.vectors @ document.vectors.T, task)
    np.testing.assert_allclose(found, expected, atol=0.02)  # a byte may be the next step
    of_torch_features = model.parts(q.query_features_BH.numpy(), packed.numpy(), cosine.numpy(), task)
    np.testing.assert_allclose(of_torch_features, parts, atol=1e-4)
    np.testing.assert_allclose(found, exact, atol=0.3)  # packing costs little
    other: Task = "asymmetric" if task == "symmetric" else "symmetric"
    other_scores = model.score(query.features, candidates, query.vectors @ document.vectors.T, other)
    assert np.abs(found - other_scores).max() > 0.1, "the branches must differ, or nothing was shown"


@pytest.mark.parametrize("task", ["symmetric", "asymmetric"])
def test_a_score_is_the_weighted_sum_of_its_parts(task: Task, model: d2llm.Model) -> None:
    query, document = model.encode_query(TEXTS[:2]), model.encode_document(TEXTS[:4])
    inputs = query.features, np.repeat(document.features[None], 2, axis=0), query.vectors @ document.vectors.T
    parts, scales = model.parts(*inputs, task), model.config.scales[task]
    assert model.config.parts == list(PARTS) and scales[-1] == 1
    assert model.config.scales["symmetric"] != model.config.scales["asymmetric"]
    np.testing.assert_allclose(model.score(*inputs, task), parts @ np.array(scales, np.float32), rtol=1e-5)
    np.testing.assert_allclose(parts[..., 0], inputs[2], atol=1e-6)
    np.testing.assert_allclose(model.score(*inputs, task, scales=[0, 1, 0, 0]), parts[..., 1], rtol=1e-5)
    with pytest.raises(ArgumentError, match=r"one scale for each of cosine, words, vectors, mlp, found \[1, 2\]"):
        model.score(*inputs, task, scales=[1, 2])


def test_score_pairs_and_score_all_are_score(model: d2llm.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, documents = TEXTS[:4], TEXTS[20:24]
    query, document = model.encode_query(queries), model.encode_document(documents)
    cosine = query.vectors @ document.vectors.T
    expected = model.score(query.features, np.repeat(document.features[None], 4, axis=0), cosine, "symmetric")
    np.testing.assert_allclose(model.score_pairs(queries, documents, "symmetric"), expected.diagonal(), atol=1e-4)
    np.testing.assert_allclose(model.score_all(query, document, "symmetric"), expected, atol=1e-4)
    monkeypatch.setattr(runtime, "CHUNK", 3)
    np.testing.assert_allclose(model.score_all(query, document, "symmetric"), expected, atol=1e-4)


def test_score_pairs_refuses_lists_of_two_lengths(model: d2llm.Model) -> None:
    with pytest.raises(ValueError, match="as many queries as documents, found 1 and 2"):
        model.score_pairs(TEXTS[:1], TEXTS[:2])


def test_features_of_another_size_are_refused(model: d2llm.Model) -> None:
    query = model.encode_query(TEXTS[:1])
    size = model.config.feature_bytes
    with pytest.raises(MismatchError, match=f"passage features have 64 bytes, this model's have {size}: encode the"):
        model.score(query.features, np.zeros((1, 3, 64), np.uint8), np.zeros((1, 3), np.float32))


def test_an_unknown_task_is_refused(model: d2llm.Model) -> None:
    with pytest.raises(ValueError, match="unknown task 'rank': choose one of symmetric, asymmetric"):
        model.score_pairs(TEXTS[:1], TEXTS[:1], "rank")  # type: ignore[arg-type]  # a str where a Literal is expected


def test_one_model_serves_many_threads(model: d2llm.Model) -> None:
    expected = [model.encode_query([text]).vectors for text in TEXTS[:8]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda text: model.encode_query([text]).vectors, TEXTS[:8] * 3))
    for row, vectors in enumerate(found):
        np.testing.assert_allclose(vectors, expected[row % 8], atol=1e-6)


# loading


@pytest.mark.parametrize("name", [ENCODER, IEM, TOKENIZER])
def test_a_damaged_file_is_named(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ModelError, match=rf"copy/{name} was changed: its sha256 is"):
        d2llm.load(copy)


@pytest.mark.parametrize("name", [ENCODER, IEM, TOKENIZER])
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(ModelError, match=f"copy is incomplete: {name} is missing"):
        d2llm.load(copy)


def test_a_file_that_the_config_does_not_vouch_for_is_refused(copy: Path) -> None:
    edit_config(copy, lambda content: content["files"].pop(ENCODER))
    with pytest.raises(ModelError, match=rf"{ENCODER} was changed: .* {CONFIG} has None"):
        d2llm.load(copy)


def test_a_path_that_is_no_folder_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        d2llm.load(model_folder / "nowhere")
    with pytest.raises(ModelError, match=rf"{ENCODER} is not a folder"):
        d2llm.load(model_folder / ENCODER)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"is not a d2llm model: it has no {CONFIG}"):
        d2llm.load(tmp_path)


def test_another_format_is_refused(copy: Path) -> None:
    edit_config(copy, lambda content: content.update(format=99))
    with pytest.raises(ModelError, match=rf"{CONFIG} has format 99, this d2llm reads 2"):
        d2llm.load(copy)


def test_a_model_of_the_first_format_is_refused_with_the_way_out(copy: Path) -> None:
    def first(content: dict[str, Any]) -> None:
        for key in ("feature_bytes", "query_width", "parts", "scales"):
            del content[key]
        content.update(format=1, feature_dim=256)

    edit_config(copy, first)
    way_out = "Export the student again; train a student of an earlier d2llm again, or make it again with d2llm init"
    with pytest.raises(ModelError, match=rf"copy/{CONFIG} has format 1, this d2llm reads 2. {way_out}"):
        d2llm.load(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format": 2', b"[1]", b"null", b"{}", b'{"format": 2}', b'\xff{"format": 2}'],
    ids=["empty", "cut", "list", "null", "no format", "no fields", "not UTF-8"],
)
def test_a_damaged_config_is_named(content: bytes, copy: Path) -> None:
    (copy / CONFIG).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{CONFIG} is damaged"):
        d2llm.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_dim": "384"}, "embedding_dim: expected a whole number between 1 and 2147483647, found '384'"),
        ({"embedding_dim": True}, "embedding_dim: expected a whole number .*, found True"),
        ({"feature_bytes": -1}, "feature_bytes: expected a whole number .*, found -1"),
        ({"scales": [1]}, "scales: expected a table, each value a list, each item a number, found"),
        ({"document_max_length": 0}, "document_max_length: expected a whole number .*, found 0"),
        ({"query_prompt": None}, "query_prompt: expected a text, found None"),
        ({"fingerprint": 7}, "fingerprint: expected a text, found 7"),
        ({"tasks": "asymmetric"}, "tasks: expected a list, each item a text, found 'asymmetric'"),
        ({"files": ["encoder.onnx"]}, "files: expected a table, each value a text, found"),
        ({"files": {"encoder.onnx": 3}}, "files: expected a table, each value a text, found"),
        ({"probe": {}}, "missing key probe.text"),
        ({"probe": {"text": "some words"}}, "missing key probe.ids"),
        ({"probe": {"text": "some words", "ids": ["101"]}}, "probe.ids: expected a list, each item a whole number"),
        ({"query_encoder": []}, "query_encoder: expected a table, found"),
        ({"query_encoder": {"kind": "static"}}, "missing key query_encoder.precision"),
        *[({"files": {name: "0" * 64}}, "files: expected names of files in the folder, found")
          for name in ("../encoder.onnx", "/etc/hostname", "encoder.onnx/../../x", "..", ".", "")],
    ],
)  # fmt: skip
def test_a_wrong_value_in_the_config_is_named(change: dict[str, Any], message: str, copy: Path) -> None:
    edit_config(copy, lambda content: content.update(change))
    with pytest.raises(ModelError, match=rf"copy/{CONFIG} is damaged \({message}.*Export the student again"):
        d2llm.load(copy)


def test_a_name_that_no_file_can_have_is_a_missing_file(copy: Path) -> None:
    edit_config(copy, lambda content: content["files"].update({"x" * 300: "0" * 64}))
    with pytest.raises(ModelError, match=r"copy is incomplete: x{300} is missing"):
        d2llm.load(copy)


def test_a_model_may_consist_of_links(copy: Path, model: d2llm.Model, tmp_path: Path) -> None:
    """As hub caches keep it: a snapshot is a folder of links."""
    (tmp_path / "snapshot").mkdir()
    for file in copy.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert d2llm.load(tmp_path / "snapshot").config == model.config


def test_a_config_of_a_later_minor_version_is_read(copy: Path, model: d2llm.Model) -> None:
    edit_config(copy, lambda content: content.update(a_field_of_tomorrow=1))
    assert d2llm.load(copy).config == model.config


def test_a_tokenizer_that_reads_the_probe_differently_is_refused(copy: Path) -> None:
    edit_config(copy, lambda content: content["probe"]["ids"].insert(3, 7))
    with pytest.raises(ModelError, match=rf"copy/{TOKENIZER} reads the probe sentence as \[101, "):
        d2llm.load(copy)


def test_a_graph_that_onnxruntime_cannot_open_is_named(copy: Path) -> None:
    (copy / IEM).write_bytes(b"not a graph")
    edit_config(copy, lambda content: content["files"].update({IEM: sha256_of(copy / IEM)}))
    with pytest.raises(ModelError, match=rf"onnxruntime .* cannot open .*copy/{IEM}"):
        d2llm.load(copy)


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_a_number_of_threads_that_cannot_be_is_refused(threads: int, model_folder: Path) -> None:
    with pytest.raises(ArgumentError, match=f"threads must be from 1 to 1024, found {threads}"):
        d2llm.load(model_folder, threads=threads)


def test_the_number_of_threads_does_not_change_the_result(model_folder: Path, model: d2llm.Model) -> None:
    one = d2llm.load(str(model_folder), threads=1)
    np.testing.assert_allclose(one.encode_query(TEXTS[:3]).vectors, model.encode_query(TEXTS[:3]).vectors, atol=1e-6)


def test_an_unknown_device_is_refused(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown device 'tpu': choose one of cpu, cuda"):
        d2llm.load(model_folder, device="tpu")  # type: ignore[arg-type]  # a str where a Literal is expected


@pytest.mark.skipif(has_gpu_wheel(), reason="onnxruntime-gpu is installed")
def test_cuda_without_its_wheel_says_what_to_install(model_folder: Path) -> None:
    with pytest.raises(DeviceError, match=r"onnxruntime-gpu is not installed: .* pip install 'd2llm\[gpu\]'"):
        d2llm.load(model_folder, device="cuda")


def test_each_reason_for_no_cuda_has_its_own_advice() -> None:
    none, both = why_no_cuda({"onnxruntime": "1"}), why_no_cuda({"onnxruntime": "1", "onnxruntime-gpu": "1"})
    gpu = why_no_cuda({"onnxruntime-gpu": "1.2.3"})
    assert "pip uninstall -y onnxruntime &&" in none
    assert "both installed" in both and "pip uninstall -y onnxruntime onnxruntime-gpu" in both
    assert "1.2.3 did not find a GPU" in gpu and "nvidia-smi" in gpu


FORKED = """
import os, signal, sys, d2llm
model = d2llm.load(sys.argv[1])
model.encode_query(["one", "two"])
if (child := os.fork()) == 0:
    signal.alarm(60)  # a child that hangs is killed
    try:
        model.encode_query(["one"])
    except d2llm.DeviceError as error:
        print(error)
    del model
    print(d2llm.load(sys.argv[1]).encode_query(["one", "two"]).vectors.shape)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), model.encode_query(["one"]).vectors.shape)
"""


def test_a_forked_child_ends_and_is_told_to_load_its_own(model_folder: Path, model: d2llm.Model) -> None:
    command = [sys.executable, "-u", "-c", FORKED, str(model_folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    width = model.config.embedding_dim
    assert found.stdout.splitlines() == [
        "the model was loaded before this process was forked: load it after the fork",
        f"(2, {width})",
        f"7 (1, {width})",
    ]


def test_importing_the_package_brings_in_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "peft", "onnx", "onnxruntime", "qdrant_client", "qdrant_edge", "optimum"]
    code = f"import sys, d2llm; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_searching_needs_no_torch(model_folder: Path) -> None:
    """A machine that serves has onnxruntime alone: torch and its company must not be imported on the way."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'peft', 'onnx', 'optimum']))\n"
        "import d2llm\n"
        f"model, index = d2llm.load({str(model_folder)!r}), d2llm.FlatIndex()\n"
        "index.add(model, [{'id': 'a', 'text': 'read a file'}, {'id': 'b', 'text': 'bake bread'}])\n"
        "print(len(d2llm.Searcher(model, index).search('open a file', 2)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "2"


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "a few words" + " " * 50_000 + "and more of them behind the gap, " * 3,
        "one " + "x" * 30_000 + " and the rest, which is read too if nothing overflows",
        "no end " + "字" * 20_000,
        "short",
    ],
    ids=["words", "a gap", "a long word", "no spaces", "short"],
)
@pytest.mark.parametrize("backbone", ["minilm", "byte_bert"])
def test_a_long_text_is_not_read_to_its_end_and_keeps_the_same_tokens(
    text: str, backbone: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer.from_file(str(request.getfixturevalue(backbone) / TOKENIZER))
    tokenizer.no_padding()
    tokenizer.enable_truncation(16)
    whole, (found,) = tokenizer.encode(text), encode_batch(tokenizer, [text], 16)
    assert found.ids == whole.ids
    assert bool(found.overflowing) == bool(whole.overflowing)
    if text.startswith("word"):  # what overflows is what was read beyond the limit
        assert len(found.overflowing) < 64 < len(whole.overflowing)


def test_a_long_run_of_one_character_keeps_its_tokens_where_it_is_cut() -> None:
    """Its last tokens depend on its length: a cut just behind the limit must not change those that are kept."""
    runs = ["=" * 2**power for power in range(8)]
    vocabulary = {token: number for number, token in enumerate(["a", *runs])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(run, run) for run in runs[:-1]]))
    tokenizer.enable_truncation(16)
    for words in range(16):
        text = "a" * words + "=" * 5_000
        assert encode_batch(tokenizer, [text], 16)[0].tokens == tokenizer.encode(text).tokens, words


def test_a_model_is_opened_and_checked_with_asserts_off_too(model_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (broken / ENCODER).write_bytes(b"no graph")
    script = f"import d2llm; d2llm.load({str(broken)!r})"
    done = subprocess.run([sys.executable, "-O", "-P", "-c", script], capture_output=True, text=True, check=False)
    assert f"{broken / ENCODER} was changed" in done.stderr

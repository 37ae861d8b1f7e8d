"""From a GGUF file to a search: SmolLM2's first layers as the backbone of a student, with the real weights and tokens.

All 30 layers take the same path; their export alone takes a minute.
"""

import functools
import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import MakeStudent
from passages import QUERY, TEXTS

import d2llm
from d2llm.backbone import load_backbone, pad
from d2llm.connectors import QdrantIndex
from d2llm.embedder import create_student, is_embedder
from d2llm.export import add_query_encoder, export
from d2llm.export.onnx import Precision
from d2llm.folder import ENCODER
from d2llm.saved import weights_sha256
from d2llm.sessions import Graph
from d2llm.small_encoder import from_model
from d2llm.student import Student
from d2llm.train import read_recipe, train
from d2llm.train.config import TeacherConfig
from d2llm.train.examples import Example
from d2llm.train.finetune import finetune, save_finetuned
from d2llm.train.hub_loading import load_uncached
from d2llm.train.kale import Alignment, align
from d2llm.types import Document

LAYERS = 2
SENTENCES = [line.strip() for line in str(statistics.__doc__).splitlines() if len(line.split()) > 2][:40]
DOCUMENTS = [Document(id=id_, text=text) for id_, text in TEXTS.items()]


@pytest.fixture(autouse=True, scope="module")
def read_once() -> Iterator[None]:
    """To read a vocabulary of 49,152 tokens takes seconds, and transformers does it several times for each load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def llm(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of SmolLM2 as a GGUF file."""
    reader = gguf.GGUFReader(smollm)
    path = tmp_path_factory.mktemp("llm") / "smol.gguf"
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = LAYERS if name.endswith(".block_count") else field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        place = tensor.name.split(".")
        if place[0] != "blk" or int(place[1]) < LAYERS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def student_folder(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few steps by the shipped recipe: LoRA, and PMA that starts as the last token."""
    folder = tmp_path_factory.mktemp("training")
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", SENTENCES), ("queries", [" ".join(text.split()[:5]) for text in SENTENCES])):
        rows = [json.dumps({"_id": f"{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
        (data / f"{name}.jsonl").write_text("".join(rows))
    for split, first in (("train", 0), ("dev", 1)):
        pairs = "".join(f"{i}\t{i}\t1\n" for i in range(first, len(SENTENCES), 2))
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + pairs)
    overrides = {
        **{"student.backbone": str(llm), "student.pma_start": "last", "data.folder": str(data)},
        **{"recall.steps": "2", "recall.batch": "4", "distil.steps": "2", "distil.batch": "4"},
        **{"distil.candidates": "20", "distil.negatives": "3", "student.document_max_length": "48"},
        **{"teacher.calibration_queries": "4", "precision": "fp32", "data.negatives": "3"},
    }
    train(read_recipe("smollm2", overrides), folder / "student")
    return folder / "student"


@pytest.fixture(scope="module")
def exported(
    student_folder: Path, llm: Path, make_student: MakeStudent, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Precision], tuple[Student, Path]]:
    """A student of a pooling, and its model folder in a precision: made once, copy it before changing anything."""
    folder = tmp_path_factory.mktemp("models")
    students = {
        "pma": Student.load(student_folder).eval(),
        "last": make_student(llm, pooling="last", document_max_length=48),
    }

    def make(pooling: str, precision: Precision) -> tuple[Student, Path]:
        model = folder / f"{pooling}-{precision}"
        if not model.exists():
            export(students[pooling], model, precision=precision)
        return students[pooling], model

    return make


def test_training_moves_the_adapters_and_leaves_the_file(student_folder: Path, llm: Path) -> None:
    student = Student.load(student_folder)
    assert student.config.backbone == str(llm)
    moved = [weight for name, weight in student.named_parameters() if "lora_B" in name]
    assert len(moved) == 7 * LAYERS and all(weight.abs().max() > 0 for weight in moved)
    stored = sum(file.stat().st_size for file in student_folder.rglob("*") if file.is_file())
    assert stored < llm.stat().st_size, "a student is its adapters, heads and tokenizer"


def test_a_gguf_gives_the_same_weights_on_each_machine(llm: Path) -> None:
    """Other bits would give a student another digest, and its collections would be refused."""
    assert weights_sha256(load_backbone(str(llm)).state_dict())[:16] == "5c37bd28f81cef84"


@pytest.mark.parametrize(
    ("pooling", "precision"), [("pma", "fp32"), ("pma", "fp16"), ("pma", "int8"), ("last", "fp32")]
)
def test_padding_on_either_side_gives_torchs_vectors_in_every_precision(
    pooling: str, precision: Precision, exported: Callable[[str, Precision], tuple[Student, Path]]
) -> None:
    student, model = exported(pooling, precision)
    rows = student.encodings(SENTENCES, "document")
    assert len({len(row) for row in rows}) > 3
    expected = student.encode(SENTENCES, "document").vectors_BE.numpy()
    encoder = Graph(model / ENCODER)
    floor = {"fp32": 1 - 1e-6, "fp16": 0.999, "int8": 0.95}[precision]
    for side in ("right", "left"):
        ids_BL, mask_BL = (tensor.numpy() for tensor in pad(rows, side=side))
        found = encoder.run({"input_ids": ids_BL, "attention_mask": mask_BL})["sentence_embedding"]
        assert (expected * found).sum(-1).min() > floor, side
    size = (exported(pooling, "fp32")[1] / ENCODER).stat().st_size
    share = {"fp32": 1, "fp16": 0.5, "int8": 0.25}[precision]
    assert (model / ENCODER).stat().st_size == pytest.approx(share * size, rel=0.15), "the heads stay in fp32"


def test_passages_of_the_llm_are_searched_by_minilm(
    exported: Callable[[str, Precision], tuple[Student, Path]], minilm: Path, tmp_path: Path
) -> None:
    student, folder = exported("pma", "fp32")
    with QdrantIndex("docs", tmp_path / "qdrant") as index:
        index.add(d2llm.load(folder), DOCUMENTS)
        best = d2llm.Searcher(d2llm.load(folder), index).search(TEXTS["median"], k=1)[0].id
        settings = Alignment(steps=2, batch=8, texts=0)
        small = align(student, from_model(student, str(minilm)), SENTENCES, DOCUMENTS, settings=settings,
                      out=tmp_path / "kale")  # fmt: skip
        assert small.provenance["held_out"]["after"]["cosine"] > 0.7
        model = shutil.copytree(folder, tmp_path / "model")
        add_query_encoder(student, model, tmp_path / "kale")
        assert index.add(d2llm.load(model), DOCUMENTS).unchanged == len(DOCUMENTS), "no passage is encoded again"
        assert d2llm.Searcher(d2llm.load(model), index).search(TEXTS["median"], k=1)[0].id == best == "median"


def test_a_gguf_is_a_teacher_and_a_fine_tuned_one_finds_it_from_any_folder(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TeacherConfig(members=("llm",), model=llm.name, chat_template=True)
    monkeypatch.chdir(llm.parent)
    teacher = load_uncached(config, "cpu", None)
    finetune(teacher, [Example(QUERY, [TEXTS["join"]], [TEXTS["sleep"]])], steps=1, negatives=1)
    save_finetuned(teacher, tmp_path / "tuned")
    monkeypatch.chdir(tmp_path)
    again = load_uncached(replace(config, model="tuned"), "cpu", None)
    assert again.identity == teacher.identity
    passages = list(TEXTS.values())
    torch.testing.assert_close(again.judge(QUERY, passages).log_odds_K, teacher.judge(QUERY, passages).log_odds_K)


def test_a_gguf_is_an_embedder_that_a_student_is_made_of(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(llm.parent)
    assert is_embedder(llm.name)
    made = create_student(llm.name, max_length=64)
    assert "mean pooling is assumed" in caplog.text
    made.save(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    again = Student.load(tmp_path / "student")
    assert again.weights_sha256() == made.weights_sha256()
    states_L = made.tokens(*pad(made.encodings([QUERY], "query")))[0]
    expected = torch.nn.functional.normalize(states_L.mean(0), dim=0)
    torch.testing.assert_close(again.encode([QUERY], "query").vectors_BE[0], expected.detach())

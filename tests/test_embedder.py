"""Students of published embedders against sentence-transformers itself, which reads the same folder."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from torch import nn

import d2llm
from d2llm.cli import export_main, main
from d2llm.embedder import POOLINGS, create_student
from d2llm.errors import ArgumentError, DataError, ModelError
from d2llm.export import export
from d2llm.features import Words
from d2llm.student import Student
from d2llm.train.mining import load_bi_encoder
from d2llm.types import task_id

TEXTS = [
    "How do I read a file line by line?",
    "ok",
    "A generator yields one value at a time, so that a file larger than memory can be read. " * 20,
    "Vitamin D is made in the skin under sunlight.",
]
PROMPTS = {"query": "query: ", "document": "passage: "}
Publish = Callable[..., Path]


@pytest.fixture
def publish(tiny_bert: Path, tmp_path: Path) -> Publish:
    """Write an embedder as sentence-transformers does."""

    def write(*modules: nn.Module, transformer: Path = tiny_bert, limit: int = 48, **options: Any) -> Path:
        torch.manual_seed(7)
        source = shutil.copytree(transformer, tmp_path / "transformer")
        pad = "[PAD]" if Tokenizer.from_file(str(source / "tokenizer.json")).token_to_id("[PAD]") is not None else "!"
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "model_max_length": limit}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        first = Transformer(str(source))
        first.max_seq_length = limit
        folder = tmp_path / "embedder"
        SentenceTransformer(modules=[first, *modules], device="cpu", **options).save(str(folder))
        return folder

    return write


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file. None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def expected(folder: Path, side: str) -> np.ndarray[Any, Any]:
    published = SentenceTransformer(str(folder), device="cpu")
    encode = published.encode_query if side == "query" else published.encode_document
    vectors: np.ndarray[Any, Any] = encode(TEXTS, normalize_embeddings=True)
    return vectors


def assert_same_vectors(student: Student, folder: Path) -> None:
    assert np.abs(student.encode(TEXTS, "query").vectors_BE.numpy() - expected(folder, "query")).max() < 1e-5
    assert np.abs(student.encode(TEXTS, "document").vectors_BE.numpy() - expected(folder, "document")).max() < 1e-5


def test_a_student_of_minilm_has_its_vectors_and_its_limit(minilm: Path) -> None:
    student = create_student(str(minilm))
    assert student.config.query_max_length == student.config.document_max_length == 256
    assert len(student.encodings(TEXTS, "document")[2]) == 256, "no text is cut: the limit was not compared"
    assert_same_vectors(student, minilm)


HEADS: dict[str, list[nn.Module]] = {
    "none": [],
    "normalize": [Normalize()],
    "linear": [Dense(64, 32, bias=False, activation_function=nn.Identity())],
    "affine": [Dense(64, 32, activation_function=nn.Identity()), Normalize()],
    "tanh": [Dense(64, 96, activation_function=nn.Tanh()), Normalize()],
    "two": [Dense(64, 96, activation_function=nn.Identity()), Dense(96, 32, bias=False), Normalize()],
}


@pytest.mark.parametrize(
    ("mode", "head"),
    [
        *((mode, "normalize") for mode in POOLINGS),
        *(("mean", head) for head in HEADS if head != "normalize"),
        ("mean_sqrt_len_tokens", "linear"),
    ],
)
def test_every_pooling_and_head_gives_the_vectors_of_sentence_transformers(
    mode: Any, head: str, publish: Publish
) -> None:
    folder = publish(Pooling(64, mode), *HEADS[head], prompts=PROMPTS)
    student = create_student(str(folder))
    assert (student.config.query_prompt, student.config.document_prompt) == ("query: ", "passage: ")
    assert student.config.pooling == ("max" if mode == "max" else "pma"), "attention can be trained, max cannot"
    assert_same_vectors(student, folder)


def test_a_bi_encoder_that_teaches_or_mines_is_read_in_the_same_way(publish: Publish) -> None:
    folder = publish(Pooling(64, "cls"), Normalize(), prompts=PROMPTS)
    assert_same_vectors(load_bi_encoder(str(folder)), folder)


@pytest.mark.parametrize(
    ("mode", "transformer", "head"),
    [
        ("cls", "tiny_bert", "affine"),
        ("weightedmean", "tiny_bert", "linear"),
        ("max", "tiny_bert", "tanh"),
        ("lasttoken", "tiny_qwen3", "normalize"),
    ],
)
def test_the_exported_model_gives_the_vectors_of_sentence_transformers(
    mode: Any, transformer: str, head: str, publish: Publish, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = publish(Pooling(64, mode), *HEADS[head], transformer=request.getfixturevalue(transformer), prompts=PROMPTS)
    create_student(str(folder)).save(tmp_path / "student")
    assert_same_vectors(Student.load(tmp_path / "student"), folder)
    export(tmp_path / "student", tmp_path / "model")
    model = d2llm.load(tmp_path / "model")
    assert (model.config.query_prompt, model.config.document_prompt) == ("query: ", "passage: ")
    assert np.abs(model.encode_query(TEXTS).vectors - expected(folder, "query")).max() < 1e-4
    assert np.abs(model.encode_document(TEXTS).vectors - expected(folder, "document")).max() < 1e-4


def test_older_files_are_read_too(publish: Publish) -> None:
    """As sentence-transformers 2 wrote them: one flag a pooling mode, pickled weights, the limit with the transformer,
    which has a folder of its own."""
    folder = publish(Pooling(64, "cls"), Dense(64, 32), limit=512)
    pooling, dense = folder / "1_Pooling" / "config.json", folder / "2_Dense"
    edit(pooling, pooling_mode=None, embedding_dimension=None, include_prompt=None, pooling_mode_cls_token=True,
         pooling_mode_mean_tokens=False, word_embedding_dimension=64)  # fmt: skip
    torch.save(load_file(dense / "model.safetensors"), dense / "pytorch_model.bin")
    (dense / "model.safetensors").unlink()
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.move(folder / name, folder / "0_Transformer")
    (folder / "sentence_bert_config.json").unlink()
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text(
        '{"max_seq_length": 16, "do_lower_case": false}'
    )
    modules = json.loads((folder / "modules.json").read_text())
    kinds = ["Transformer", "Pooling", "Dense"]
    modules = [
        entry | {"type": f"sentence_transformers.models.{kind}"} for entry, kind in zip(modules, kinds, strict=True)
    ]
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    student = create_student(str(folder))
    config = student.config
    assert (config.pma_start, config.recall_head, config.query_max_length) == ("cls", "tanh", 16)
    assert_same_vectors(student, folder)


def test_lower_case_is_a_setting_of_the_transformer(byte_bert: Path, publish: Publish) -> None:
    folder = publish(Pooling(32, "mean"), transformer=byte_bert)
    upper = create_student(str(folder))
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    lower = create_student(str(folder))
    assert upper.encodings(["Read ME"], "query") != lower.encodings(["Read ME"], "query")
    assert_same_vectors(lower, folder)


def test_the_prompts_are_those_of_queries_and_passages(publish: Publish, caplog: pytest.LogCaptureFixture) -> None:
    folder = publish(Pooling(64, "mean"), Normalize())
    config = folder / "config_sentence_transformers.json"
    prompts = {"query": "q: ", "passage": "p: ", "topics": "t: "}
    edit(config, prompts=prompts, default_prompt_name="topics")
    student = create_student(str(folder))
    assert (student.config.query_prompt, student.config.document_prompt) == ("q: ", "p: ")
    assert "default prompt 'topics' is put before no text" in caplog.text
    passage = SentenceTransformer(str(folder), device="cpu").encode(
        TEXTS, prompt_name="passage", normalize_embeddings=True
    )
    assert np.abs(student.encode(TEXTS, "document").vectors_BE.numpy() - passage).max() < 1e-5
    edit(config, default_prompt_name="poem")
    with pytest.raises(ModelError, match="default_prompt_name is 'poem', but the prompts are: query, passage, topics"):
        create_student(str(folder))


def test_a_plain_transformer_gets_mean_pooling_and_a_warning(tiny_bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = create_student(str(tiny_bert))
    assert "has no modules.json: mean pooling is assumed, without prompts" in caplog.text
    assert student.config.query_max_length == 512
    assert_same_vectors(student, tiny_bert)


def test_a_limit_can_be_given(minilm: Path) -> None:
    assert len(create_student(str(minilm), max_length=40).encodings(TEXTS, "query")[2]) == 40
    with pytest.raises(ArgumentError, match="query_max_length = 600 is more than the 512 tokens"):
        create_student(str(minilm), max_length=600)


def test_a_corpus_gives_words_and_vectors_and_none_gives_neither(tiny_bert: Path) -> None:
    bare = create_student(str(tiny_bert))
    assert (bare.config.lexical_slots, bare.config.vectors) == (0, 0) and not bare.words.idf_V.any()
    student = create_student(str(tiny_bert), corpus=TEXTS)
    literal = Words(30522)
    literal.fit(student.encodings(TEXTS, "document"), [0, 100, 101, 102, 103])
    assert torch.equal(student.words.idf_V, literal.idf_V)
    assert student.iem.part_names == ("cosine", "words", "vectors")
    assert 900 < student.iem.layouts[1].bytes <= 1024


def test_a_corpus_that_the_tokenizer_cannot_read_is_refused_or_warned_of(
    tiny_bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thai = ["การคืนเงิน", "แมว"]
    with pytest.raises(DataError, match=r"bert knows no word of the corpus: choose an embedder for its language"):
        create_student(str(tiny_bert), corpus=thai)
    caplog.clear()
    create_student(str(tiny_bert), corpus=[*thai, "one two three four five six"])
    assert "25 % of the tokens of the corpus are unknown to the tokenizer of" in caplog.text
    caplog.clear()
    create_student(str(tiny_bert), corpus=[thai[0], "one two three four five six seven eight nine ten"])
    assert "unknown" not in caplog.text


def test_without_labels_the_words_of_the_query_raise_a_passage(minilm: Path) -> None:
    """Beside the cosine alone, which is the score without a corpus."""
    passages = [*TEXTS, "Error E1234: the disk is full.", "Error E4321: the disk is full."]
    gaps = []
    for corpus in ([], passages):
        student = create_student(str(minilm), corpus=corpus)
        query, found = student.encode(["What is E4321?"], "query"), student.encode(passages, "document")
        with torch.inference_mode():
            cosine = query.vectors_BE @ found.vectors_BE.T
            features = query.query_features_BH, found.passage_features_BH[None]
            score = student.iem(*features, cosine, torch.tensor([task_id("asymmetric")]))[0]
        if not corpus:
            torch.testing.assert_close(score, 20 * cosine[0])
        gaps.append(float(score[-1] - score[-2]))
    assert gaps[1] > gaps[0] + 0.2


def replace_module(folder: Path, index: int, kind: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[index]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))


def narrow(folder: Path) -> None:
    save_file(
        {"linear.weight": torch.zeros(32, 48), "linear.bias": torch.zeros(32)}, folder / "2_Dense/model.safetensors"
    )


def no_limit(folder: Path) -> None:
    edit(folder / TRANSFORMER, max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length="many")


def remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


OLD = "sentence_transformers.models."
POOLING, DENSE, TRANSFORMER = "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: replace_module(f, 2, OLD + "LSTM"), r"models\.LSTM, which is not supported\. Supported are Transf"),
        (lambda f: replace_module(f, 2, "custom.Dense"), r"the module custom\.Dense, which is not supported"),
        (lambda f: replace_module(f, 1, OLD + "Normalize"), "modules Transformer, Normalize, Dense, Normalize, which"),
        (lambda f: edit(f / POOLING, pooling_mode="median"), "pools by median, which is not supported. Supported is"),
        (lambda f: edit(f / POOLING, pooling_mode=["mean", "max"]), "pools by mean and max, which is not supported"),
        (lambda f: edit(f / POOLING, pooling_mode="mean_sqrt_len_tokens"), "mean_sqrt_len_tokens before a Dense with"),
        (lambda f: edit(f / POOLING, include_prompt=False), "sets include_prompt to false"),
        (lambda f: edit(f / POOLING, embedding_dimension=48), "states of 48 numbers, the transformer's have 64"),
        (lambda f: edit(f / DENSE, in_features=48), "reads vectors of 48 numbers, but is given 64"),
        (narrow, r"has a weight of shape \(32, 48\), config.json says \(32, 64\)"),
        (lambda f: edit(f / DENSE, activation_function="torch.nn.ReLU"), "the activation torch.nn.ReLU, which is not"),
        (lambda f: edit(f / DENSE, use_residual=True), "has a residual"),
        (lambda f: edit(f / TRANSFORMER, config_kwargs={"num_hidden_layers": 1}), "sets config_kwargs to"),
        (lambda f: edit(f / TRANSFORMER, transformer_task="fill-mask"), "sets transformer_task to 'fill-mask'"),
        (lambda f: remove(f, "2_Dense/model.safetensors"), r"is incomplete: 2_Dense/pytorch_model\.bin is missing"),
        (lambda f: remove(f, POOLING), r"is incomplete: 1_Pooling/config\.json is missing"),
        (lambda f: (f / "modules.json").write_text("{"), r"modules\.json is damaged"),
        (lambda f: (f / "modules.json").write_text('{"0": 1}'), r"modules\.json is damaged: it is not a list"),
        (lambda f: (f / DENSE).write_text('["a"]'), r"2_Dense/config\.json is damaged"),
        (lambda f: remove(f, "tokenizer.json", "tokenizer_config.json"), "has no fast tokenizer"),
        (lambda f: remove(f, "tokenizer.json"), "the tokenizer of backbone .* cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_text(""), r"is damaged: tokenizer\.json .*Download the model again"),
        (no_limit, r"tokenizer_config\.json is damaged \(model_max_length is 'many'\)"),
        (lambda f: remove(f, "model.safetensors"), "cannot be loaded from the hub or a folder"),
    ],
)
def test_what_a_student_cannot_have_is_named(damage: Callable[[Path], Any], message: str, publish: Publish) -> None:
    folder = publish(Pooling(64, "cls"), Dense(64, 32), Normalize(), prompts=PROMPTS)
    damage(folder)
    with pytest.raises(ModelError, match=message):
        create_student(str(folder))


def test_a_name_that_is_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"embedder '.*missing': there is no such file or folder. Check the path"):
        create_student(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"is not an embedder: it has neither modules\.json nor config\.json"):
        create_student(str(tmp_path))


def test_a_student_is_no_embedder(tiny_bert: Path, tmp_path: Path) -> None:
    create_student(str(tiny_bert)).save(tmp_path / "student")
    with pytest.raises(ModelError, match=r"student is not an embedder: it is a student"):
        create_student(str(tmp_path / "student"))


def write_corpus(path: Path) -> str:
    path.write_text("".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return str(path)


def test_the_command_takes_an_embedder_to_a_student(publish: Publish, tmp_path: Path) -> None:
    folder = publish(Pooling(64, "cls"), Normalize(), prompts=PROMPTS)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    done = CliRunner().invoke(main, ["init", str(folder), str(tmp_path / "a student")])
    assert done.exit_code == 0, done.output
    assert "cls pooling, vectors of 64 numbers, texts of at most 48 tokens" in done.stdout
    assert "prompt of queries: 'query: ', of passages: 'passage: '" in done.stdout
    assert "no words and no vectors in the score: they are fitted to a corpus (--corpus)" in done.stdout
    assert "Later" not in done.stdout, "there is nothing to calibrate"
    assert f"Next: d2llm-export onnx '{tmp_path / 'a student'}' MODEL" in done.stdout
    assert_same_vectors(Student.load(tmp_path / "a student"), folder)
    again = CliRunner().invoke(main, ["init", str(folder), str(tmp_path / "a student")])
    assert again.exit_code == 1 and "exists already" in again.stderr
    words = ["init", str(folder), str(tmp_path / "words"), "--corpus", corpus, "--json"]
    printed = json.loads(CliRunner().invoke(main, words).stdout)
    fitted = Student.load(tmp_path / "words")
    assert (printed["lexical_slots"], printed["vectors"]) == (fitted.config.lexical_slots, fitted.config.vectors)
    assert list(printed["scales"]) == ["cosine", "words", "vectors"] and fitted.words.idf_V.any()
    assert 1024 - fitted.config.vector_dim // 2 < printed["feature_bytes"] <= 1024, "vectors take what is left"


def run_export(*arguments: Any) -> Result:
    return CliRunner().invoke(export_main, ["onnx", *map(str, arguments)])


@pytest.mark.parametrize("mode", ["cls", "weightedmean"])
def test_the_exporter_takes_an_embedder_in_fp16(mode: Any, publish: Publish, tmp_path: Path) -> None:
    folder = publish(Pooling(64, mode), Normalize(), prompts=PROMPTS)
    done = run_export(folder, tmp_path / "model", "--precision", "fp16")
    assert done.exit_code == 0, done.output
    model = d2llm.load(tmp_path / "model")
    assert model.config.provenance["embedder"] == "embedder" and model.config.document_max_length == 48
    assert np.abs(model.encode_query(TEXTS).vectors - expected(folder, "query")).max() < 2e-3
    assert np.abs(model.encode_document(TEXTS).vectors - expected(folder, "document")).max() < 2e-3


def test_the_exporter_makes_the_student_that_init_makes(publish: Publish, tmp_path: Path) -> None:
    """Both models have one fingerprint, so that they can share a collection."""
    folder, corpus = publish(Pooling(64, "lasttoken")), write_corpus(tmp_path / "corpus.jsonl")
    options = ["--corpus", corpus, "--max-length", "24"]
    done = CliRunner().invoke(main, ["init", str(folder), str(tmp_path / "student"), *options])
    assert "last pooling" in done.stdout
    for source, name, given in ((tmp_path / "student", "one", []), (folder, "two", options)):
        assert run_export(source, tmp_path / name, *given).exit_code == 0
    one, two = (d2llm.load(tmp_path / name).config for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    assert two.document_max_length == two.query_max_length == 24
    assert one.parts == two.parts == ["cosine", "words", "vectors"], "the corpus gives words and vectors"


def test_options_of_an_embedder_are_refused_for_a_student(publish: Publish, tmp_path: Path) -> None:
    create_student(str(publish(Pooling(64, "mean")))).save(tmp_path / "student")
    for option, value in (("--corpus", write_corpus(tmp_path / "corpus.jsonl")), ("--max-length", "24")):
        refused = run_export(tmp_path / "student", tmp_path / "model", option, value)
        assert refused.exit_code == 2
        assert f"student is a student folder, and {option} is for a published embedder: leave it out" in refused.stderr


def test_what_is_neither_a_student_nor_an_embedder_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "empty", r"is not a student folder: it has no student\.json"),
        (tmp_path / "missing", r"is not a student folder: it has no student\.json"),
        ("nobody/no-embedder", "'nobody/no-embedder' is no folder, and cannot be loaded from the hub"),
    ):
        refused = run_export(source, tmp_path / "model")
        assert refused.exit_code == 1 and re.search(message, refused.stderr), refused.output
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_empty_corpus_is_no_corpus(tiny_bert: Path, tmp_path: Path) -> None:
    """A student without words would rank as the cosine does, and nobody would know why."""
    (tmp_path / "empty.jsonl").touch()
    arguments = ["init", str(tiny_bert), str(tmp_path / "student"), "--corpus", str(tmp_path / "empty.jsonl")]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "empty.jsonl has no passages: give a corpus, or none" in refused.stderr
    assert not (tmp_path / "student").exists()

"""Small query encoders in torch: what each kind computes, what of it is the student's own, and how it lies on disk."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file
from test_features import literal_parts
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Qwen3Config, Qwen3Model

from d2llm.backbone import load_tokenizer, pad, spread
from d2llm.errors import ArgumentError, MismatchError, ModelError
from d2llm.folder import TOKENIZER
from d2llm.small_encoder import (
    CONFIG,
    STUDENT_TOKENIZER,
    WEIGHTS,
    SmallEncoder,
    SmallTransformer,
    StaticTable,
    from_layers,
    from_model,
    from_tokens,
    layer_count,
)
from d2llm.small_encoder_config import student_digest
from d2llm.student import BACKBONE, Student

MakeStudent = Callable[..., Student]
TEXTS = [
    "How do I read a file line by line?",
    "ok",
    "a query that is longer than the limit of sixteen tokens loses its tail, all the same by whom it is read",
    "机器学习模型可以把查询和段落分别编码。",
    "read read READ the file",
]
FOUR: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def deep_student(make_student: MakeStudent, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """On a BERT of four layers, LoRA merged."""
    torch.manual_seed(11)
    return four_layers(make_student, minilm, tmp_path_factory.mktemp("deep"), BertModel(BertConfig(**FOUR)))


@pytest.fixture(scope="module")
def sliding_student(make_student: MakeStudent, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Student:
    """On a Qwen3 whose last two layers see four tokens back, LoRA merged."""
    torch.manual_seed(12)
    sliding: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    backbone = Qwen3Model(Qwen3Config(**FOUR, num_key_value_heads=2, head_dim=16, **sliding))
    return four_layers(make_student, minilm, tmp_path_factory.mktemp("sliding"), backbone)


def four_layers(make_student: MakeStudent, minilm: Path, folder: Path, backbone: Any) -> Student:
    backbone.save_pretrained(folder)
    (folder / TOKENIZER).write_bytes((minilm / TOKENIZER).read_bytes())
    student = make_student(folder, tuning="lora", query_max_length=16)
    student.merge_lora()
    return student


@pytest.fixture(scope="module")
def encoders(deep_student: Student, byte_bert: Path) -> dict[str, SmallEncoder]:
    """One of each kind, all of `deep_student`. Shared: change none of them."""
    torch.manual_seed(13)
    static = from_tokens(deep_student, bigrams=5000)
    assert isinstance(static, StaticTable) and static.bigrams is not None
    assert not static.bigrams.weight.any(), "at the start a query is the sum of its tokens"
    nn.init.normal_(static.bigrams.weight, std=0.1)
    return {
        "layers": from_layers(deep_student, [0, 3]).eval(),
        "model": from_model(deep_student, str(byte_bert), prompt="find: ", max_length=24).eval(),
        "static": static.eval(),
    }


KINDS = pytest.mark.parametrize("kind", ["layers", "model", "static"])


def words_of(student: Student, texts: list[str]) -> Tensor:
    return student.encode(texts, "query").query_features_BH[:, student.iem.layouts[0].learned :]


# -- some of the student's layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("tiny_bert", {}),
        ("tiny_bert", {"embedding_dim": 32, "lexical_slots": 0, "pooling": "mean"}),
        ("tiny_qwen3", {"pma_heads": 2, "query_prompt": "query: ", "document_prompt": "line, file: "}),
        ("tiny_llama", {"embedding_dim": 16, "pooling": "last"}),
        ("tiny_bert", {"pma_start": "weighted_mean"}),
        ("tiny_bert", {"vectors": 0}),
        ("tiny_bert", {"feature_dim": 0}),
    ],
    ids=[
        "bert",
        "bert, mean, recall head, no words",
        "qwen3, two heads, prompts",
        "llama, last token, recall head",
        "bert, weighted mean",
        "bert, no vectors",
        "bert, no projection",
    ],
)
def test_all_layers_are_the_students_query_side(
    backbone: str, options: dict[str, Any], make_student: MakeStudent, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    student = make_student(request.getfixturevalue(backbone), tuning="lora", query_max_length=16, **options)
    without_lora = student.backbone.disable_adapter()
    with without_lora:
        unmerged = student.encode(TEXTS, "query").vectors_BE
    student.merge_lora()
    expected = student.encode(TEXTS, "query")
    assert (expected.vectors_BE - unmerged).abs().max() > 1e-3, "LoRA did nothing"
    encoder = from_layers(student, range(layer_count(student)))
    encoder.save(tmp_path / "small")
    found = SmallEncoder.load(tmp_path / "small").encode(TEXTS)
    assert found.vectors_BE.shape == (len(TEXTS), student.embedding_dim)
    torch.testing.assert_close(found.vectors_BE, expected.vectors_BE, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.features_BH, expected.query_features_BH, rtol=0, atol=1e-4)


def test_a_subset_of_berts_layers_is_those_layers_one_after_the_other(deep_student: Student) -> None:
    backbone: Any = deep_student.backbone
    encoder = from_layers(deep_student, [3, 1])
    assert encoder.config.layers == (1, 3), "in the student's order"
    for text in TEXTS:
        ids_1L, mask_1L = pad(deep_student.encodings([text], "query"))
        with torch.inference_mode():
            states_1LD = backbone.embeddings(ids_1L)
            for index in (1, 3):
                out = backbone.encoder.layer[index](states_1LD)
                states_1LD = out[0] if isinstance(out, tuple) else out
            expected = deep_student.heads(states_1LD, mask_1L, ids_1L)
        found = encoder.encode([text])
        torch.testing.assert_close(found.vectors_BE, expected.vectors_BE, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.features_BH, expected.query_features_BH, rtol=0, atol=1e-4)


def test_a_subset_of_a_causal_models_layers_is_the_model_with_the_others_silenced(sliding_student: Student) -> None:
    """The reference: in layers 0 and 2 what is added to the residual stream is zero. Layer 3 keeps its short sight."""
    backbone: Any = sliding_student.backbone
    encoder = from_layers(sliding_student, [1, 3])
    silenced = {
        name: value.clone()
        for name, value in backbone.state_dict().items()
        if name.startswith(("layers.0.", "layers.2.")) and ("o_proj" in name or "down_proj" in name)
    }
    assert len(silenced) == 4
    backbone.load_state_dict({name: torch.zeros_like(value) for name, value in silenced.items()}, strict=False)
    try:
        expected = sliding_student.encode(TEXTS, "query")
    finally:
        backbone.load_state_dict(silenced, strict=False)
    found = encoder.encode(TEXTS)
    torch.testing.assert_close(found.vectors_BE, expected.vectors_BE, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.features_BH, expected.query_features_BH, rtol=0, atol=1e-4)


def test_a_truncated_backbone_knows_which_layers_it_has(sliding_student: Student, tmp_path: Path) -> None:
    encoder = from_layers(sliding_student, [1, 3])
    encoder.save(tmp_path / "kale")
    loaded = SmallEncoder.load(tmp_path / "kale")
    for found in (encoder, loaded):
        assert isinstance(found, SmallTransformer)
        backbone: Any = found.backbone
        assert backbone.config.num_hidden_layers == len(backbone.layers) == 2
        assert backbone.config.layer_types == ["full_attention", "sliding_attention"]
        assert [layer.self_attn.layer_idx for layer in backbone.layers] == [0, 1]
        assert [layer.self_attn.sliding_window for layer in backbone.layers] == [None, 4]
    for ours, theirs in zip(encoder.encode(TEXTS), loaded.encode(TEXTS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_taking_layers_leaves_the_student_alone(deep_student: Student) -> None:
    before, digest = deep_student.encode(TEXTS, "query"), deep_student.weights_sha256(whole=True)
    encoder = from_layers(deep_student, [2])
    with torch.no_grad():
        for parameter in encoder.parameters():
            assert parameter.requires_grad, "all of it learns, whatever of the student did"
            parameter.add_(1.0)
    encoder.encode(["by another length limit"])
    assert (layer_count(deep_student), deep_student.weights_sha256(whole=True)) == (4, digest)
    torch.testing.assert_close(deep_student.encode(TEXTS, "query"), before, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [[], [0, 0], [4], [-1, 2]], ids=["none", "twice", "too high", "negative"])
def test_layers_that_the_student_has_not_are_refused(layers: list[int], deep_student: Student) -> None:
    with pytest.raises(ValueError, match=r"layers \[.*\]: choose one or more of the student's 0 to 3, each once") as e:
        from_layers(deep_student, layers)
    assert str(layers) in str(e.value)


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    assert spread(1, 12) == (11,)
    assert spread(2, 12) == (0, 11)
    assert spread(3, 6) == (0, 2, 5)
    assert spread(4, 12) == (0, 4, 7, 11)
    for total in range(1, 40):
        for count in range(2, total + 1):
            layers = spread(count, total)
            gaps = [after - before for before, after in pairwise(layers)]
            assert (len(layers), layers[0], layers[-1]) == (count, 0, total - 1)
            assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1, (count, total)
    for count in (0, 7):
        with pytest.raises(ValueError, match=rf"{count} layers: the student has 6, choose from 1 to 6"):
            spread(count, 6)


# -- a table of tokens ---------------------------------------------------------------------------------------------


def table_of(encoder: SmallEncoder) -> Tensor:
    assert isinstance(encoder, StaticTable) and isinstance(encoder.table, nn.Embedding)
    return encoder.table.weight.detach()


def literal_static(encoder: SmallEncoder, ids: list[int]) -> tuple[list[float], list[float]]:
    """The sum of the rows of tokens and of neighbours, divided by the length of the part that is the vector; then the
    rest of the rows of words, in as many parts as a query has vectors."""
    table_VO, width, layout = table_of(encoder), encoder.config.embedding_dim, encoder.config.query_layout
    assert encoder.words is not None
    total = [0.0] * (width + layout.projection)
    for token in ids:
        total = [a + b for a, b in zip(total, table_VO[token, : len(total)].tolist(), strict=True)]
    if encoder.config.bigrams:
        assert isinstance(encoder, StaticTable) and encoder.bigrams is not None
        for token, following in pairwise(ids):
            row = encoder.bigrams.weight[(1_000_003 * token + following) % encoder.config.bigrams]
            total = [a + b for a, b in zip(total, row.tolist(), strict=True)]
    length = math.sqrt(sum(x * x for x in total[:width]))
    tokens = table_VO[ids, len(total) :].tolist()
    parts = literal_parts(tokens, [int(encoder.words.idf_V[token] > 0) for token in ids], layout.vectors)
    return [x / length for x in total[:width]], [*(x / length for x in total[width:]), *chain(*parts)]


@pytest.mark.parametrize("bigrams", [5000, 0], ids=["with bigrams", "tokens alone"])
def test_a_static_encoder_sums_the_rows_of_a_querys_tokens_and_neighbours(
    bigrams: int, encoders: dict[str, SmallEncoder], deep_student: Student
) -> None:
    encoder = encoders["static"] if bigrams else from_tokens(deep_student, bigrams=0)
    found, width = encoder.encode(TEXTS), encoder.config.query_layout.learned
    for row, ids in enumerate(encoder.encodings(TEXTS)):
        vector, features = literal_static(encoder, ids)
        assert found.vectors_BE[row].tolist() == pytest.approx(vector, abs=1e-5)
        assert found.features_BH[row, :width].tolist() == pytest.approx(features, abs=1e-4)


def test_pairs_tell_orders_apart_that_a_bag_of_tokens_does_not(encoders: dict[str, SmallEncoder]) -> None:
    static = encoders["static"]
    assert isinstance(static, StaticTable)
    alone = copy.deepcopy(static)
    alone.bigrams = None
    orders = ["files in a folder not on disk", "files on a folder not in disk"]
    one, other = alone.encode(orders).vectors_BE
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    one, other = static.encode(orders).vectors_BE
    assert (one - other).abs().max() > 1e-3


def test_a_row_starts_as_what_the_student_makes_of_its_token_times_the_words_weight(
    encoders: dict[str, SmallEncoder], deep_student: Student
) -> None:
    table_VO = table_of(encoders["static"])
    weights, layout = deep_student.words.idf_V.sqrt(), deep_student.iem.layouts[0]
    heaviest = float(weights.max())
    for token in (101, 2000, 3231, 30521):  # of which [CLS] weighs nothing as a word
        with torch.inference_mode():
            alone = deep_student(*pad([[101, token, 102]]))
        vector = layout.split(alone.query_features_BH).vectors[:, 0]  # a text of one word has one
        row = torch.cat([alone.vectors_BE, alone.query_features_BH[:, : layout.projection], vector], dim=-1)[0]
        weight = float(weights[token])
        torch.testing.assert_close(table_VO[token], row * max(weight, heaviest / 100), rtol=1e-4, atol=1e-4)
    assert float(weights[101]) == 0.0


def test_without_words_by_name_all_tokens_of_a_static_encoder_start_alike(
    make_student: MakeStudent, tiny_bert: Path
) -> None:
    options: dict[str, Any] = {"lexical_slots": 0, "vectors": 0, "embedding_dim": 16, "query_max_length": 16}
    student = make_student(tiny_bert, tuning="frozen", **options)
    encoder = from_tokens(student, bigrams=0)
    assert not encoder.config.query_layout.words
    torch.testing.assert_close(table_of(encoder)[:, :16].norm(dim=-1), torch.ones(30522))
    found = encoder.encode(TEXTS)
    assert (found.vectors_BE.shape[1], found.features_BH.shape[1]) == (16, 64)


# -- what holds for all kinds --------------------------------------------------------------------------------------


@KINDS
def test_words_by_name_are_the_students_own(
    kind: str, encoders: dict[str, SmallEncoder], deep_student: Student
) -> None:
    expected = words_of(deep_student, TEXTS)
    assert (expected != 0).any(dim=-1).all(), "each text has words"
    found = encoders[kind].encode(TEXTS).features_BH[:, deep_student.iem.layouts[0].learned :]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@KINDS
def test_one_query_encodes_as_in_a_batch_whatever_fills_it_up(kind: str, encoders: dict[str, SmallEncoder]) -> None:
    encoder = encoders[kind]
    together = encoder.encode(TEXTS)
    torch.testing.assert_close(together.vectors_BE.norm(dim=-1), torch.ones(len(TEXTS)))
    for row, text in enumerate(TEXTS):
        alone = encoder.encode([text])
        torch.testing.assert_close(alone.vectors_BE[0], together.vectors_BE[row], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.features_BH[0], together.features_BH[row], rtol=0, atol=1e-4)
    in_parts = encoder.encode(TEXTS, batch_size=2)
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-4)
    ids_BL, mask_BL = pad(encoder.encodings(TEXTS))
    words_BW, word_mask_BW = pad(encoder.student_encodings(TEXTS))
    with torch.inference_mode():
        filled = encoder(
            ids_BL.masked_fill(mask_BL == 0, 7), mask_BL, words_BW.masked_fill(word_mask_BW == 0, 2000), word_mask_BW
        )
    torch.testing.assert_close(filled, together, rtol=0, atol=1e-5)


def test_another_model_reads_by_its_own_tokenizer_prompt_and_limit(
    encoders: dict[str, SmallEncoder], byte_bert: Path, deep_student: Student
) -> None:
    encoder, tokenizer = encoders["model"], load_tokenizer(str(byte_bert))
    assert encoder.encodings(TEXTS) == [tokenizer.encode(f"find: {text}").ids[:24] for text in TEXTS]
    assert encoder.student_encodings(TEXTS) == deep_student.encodings(TEXTS, "query")
    assert encoder.config.own_tokenizer and not encoders["static"].config.own_tokenizer


@pytest.mark.parametrize("options", [{"lexical_slots": 0}, {"embedding_dim": 16}], ids=["no words", "recall head"])
def test_another_model_takes_the_students_widths(
    options: dict[str, Any], make_student: MakeStudent, tiny_bert: Path, byte_bert: Path
) -> None:
    student = make_student(tiny_bert, tuning="frozen", **options)
    found = from_model(student, str(byte_bert)).encode(TEXTS)
    assert found.vectors_BE.shape == (len(TEXTS), student.embedding_dim)
    assert found.features_BH.shape == (len(TEXTS), student.iem.layouts[0].width)


def test_a_model_that_reads_less_than_the_student_reads_what_it_can(
    deep_student: Student, minilm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BertModel(BertConfig(**{**SMALL, "max_position_embeddings": 12})).save_pretrained(tmp_path / "short")
    shutil.copy(minilm / "tokenizer.json", tmp_path / "short")
    encoder = from_model(deep_student, str(tmp_path / "short"))
    assert max(map(len, encoder.encodings(TEXTS))) == encoder.config.query_max_length == 12
    assert "short reads 12 tokens of a query at most, the student reads 16" in caplog.text
    with pytest.raises(ArgumentError, match="query_max_length = 16 is more than the 12 tokens"):
        from_model(deep_student, str(tmp_path / "short"), max_length=16)


def test_the_size_of_an_encoder_is_what_queries_are_encoded_with(
    encoders: dict[str, SmallEncoder], deep_student: Student
) -> None:
    width, layout = deep_student.embedding_dim, deep_student.iem.layouts[0]
    assert encoders["static"].parameter_count == (30522 + 5000) * (width + layout.projection) + 30522 * layout.dim
    whole = from_layers(deep_student, range(4))
    recall_map = width * deep_student.dim  # the student, without a recall head, has none
    assert whole.parameter_count == sum(p.numel() for p in deep_student.query_parameters()) + recall_map
    assert encoders["layers"].parameter_count < whole.parameter_count


def test_a_model_that_cannot_be_had_is_named(deep_student: Student, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"backbone '.*nowhere': there is no such file or folder"):
        from_model(deep_student, str(tmp_path / "nowhere"))


# -- on disk -------------------------------------------------------------------------------------------------------


@KINDS
def test_a_saved_encoder_comes_back_as_it_was(kind: str, encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    encoder = encoders[kind]
    encoder.provenance = {"held_out": {"cosine": 0.98}}
    before = encoder.encode(TEXTS)
    encoder.save(tmp_path / "kale")
    assert {path.name for path in (tmp_path / "kale").iterdir()} == {
        *(CONFIG, WEIGHTS, STUDENT_TOKENIZER, TOKENIZER),
        *([] if kind == "static" else [BACKBONE]),
    }
    loaded = SmallEncoder.load(tmp_path / "kale")
    assert (loaded.config, loaded.provenance) == (encoder.config, encoder.provenance)
    assert not loaded.training
    torch.testing.assert_close(loaded.encode(TEXTS), before, rtol=0, atol=0)
    torch.testing.assert_close(encoder.encode(TEXTS), before, rtol=0, atol=0)


def test_an_existing_folder_is_not_overwritten(encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        encoders["static"].save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_save_that_fails_leaves_nothing(
    encoders: dict[str, SmallEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        Path(folder).mkdir()
        raise OSError("no space left on device")

    encoder = encoders["layers"]
    assert isinstance(encoder, SmallTransformer)
    monkeypatch.setattr(encoder.backbone, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        encoder.save(tmp_path / "kale")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_the_names_of_version_0_1_is_read(encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    encoders["static"].save(tmp_path / "kale")
    config = tmp_path / "kale" / CONFIG
    config.write_text(config.read_text().replace('"bigrams"', '"pairs"'))
    weights = load_file(tmp_path / "kale" / WEIGHTS)
    weights["pairs.weight"] = weights.pop("bigrams.weight")
    save_file(weights, tmp_path / "kale" / WEIGHTS)
    old, new = (encoder.encode(TEXTS) for encoder in (SmallEncoder.load(tmp_path / "kale"), encoders["static"]))
    assert torch.equal(old.vectors_BE, new.vectors_BE) and torch.equal(old.features_BH, new.features_BH)


def test_a_folder_that_is_no_small_encoder_says_how_to_make_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=rf"{folder.name} is not a small query encoder.*d2llm kale STUDENT"):
            SmallEncoder.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, TOKENIZER, STUDENT_TOKENIZER])
def test_a_missing_or_damaged_file_is_named(name: str, encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    encoders["layers"].save(tmp_path / "kale")
    file = tmp_path / "kale" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=rf"kale is damaged: {name} \(.*Align it again with d2llm kale"):
        SmallEncoder.load(tmp_path / "kale")
    file.unlink()
    with pytest.raises(ModelError, match=rf"kale is incomplete: {name} is missing\. Align it again with d2llm kale"):
        SmallEncoder.load(tmp_path / "kale")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_backbone_is_named(name: str, encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    encoders["layers"].save(tmp_path / "kale")
    file = tmp_path / "kale" / BACKBONE / name
    file.write_bytes(file.read_bytes()[:100])
    named = rf"(?s)kale is damaged: {BACKBONE} \(.*Align it again with d2llm kale"
    with pytest.raises(ModelError, match=named):
        SmallEncoder.load(tmp_path / "kale")
    file.unlink()
    with pytest.raises(ModelError, match=named):
        SmallEncoder.load(tmp_path / "kale")
    shutil.rmtree(file.parent)
    with pytest.raises(ModelError, match=rf"kale is incomplete: {BACKBONE} is missing"):
        SmallEncoder.load(tmp_path / "kale")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}', '{"config": {"kind": "layers", "new": 1}}'])
def test_a_damaged_description_is_named(content: str, encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    encoders["static"].save(tmp_path / "kale")
    (tmp_path / "kale" / CONFIG).write_text(content)
    with pytest.raises(ModelError, match=rf"kale is damaged: {CONFIG} \(.*Align it again with d2llm kale"):
        SmallEncoder.load(tmp_path / "kale")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tables"}, "config.kind: expected one of 'layers', 'model', 'static', found 'tables'"),
        ({"embedding_dim": -64}, "config.embedding_dim: expected a whole number .*, found -64"),
        ({"layers": [0, "3"]}, "config.layers: expected a list, each item a whole number .*, found"),
        ({"query_max_length": 0.5}, "config.query_max_length: expected a whole number .*, found 0.5"),
        ({"pma_heads": 5}, "the backbone's width 64 is not divisible into 5 PMA heads"),
    ],
)
def test_a_wrong_value_in_a_description_is_named(
    change: dict[str, Any], message: str, encoders: dict[str, SmallEncoder], tmp_path: Path
) -> None:
    encoders["layers"].save(tmp_path / "kale")
    content = json.loads((tmp_path / "kale" / CONFIG).read_text())
    content["config"] |= change
    (tmp_path / "kale" / CONFIG).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"kale is damaged: {CONFIG} \({message}.*Align it again"):
        SmallEncoder.load(tmp_path / "kale")


def test_weights_of_another_encoder_are_refused(encoders: dict[str, SmallEncoder], tmp_path: Path) -> None:
    """Files were mixed up: no weight may stay as it happened to be in memory."""
    for kind in ("layers", "static", "model"):
        encoders[kind].save(tmp_path / kind)
    for kind, other in (("static", "layers"), ("layers", "model"), ("model", "static")):
        shutil.copytree(tmp_path / kind, tmp_path / "mixed")
        shutil.copy(tmp_path / other / WEIGHTS, tmp_path / "mixed")
        with pytest.raises(ModelError, match=rf"(?s)mixed is damaged: {WEIGHTS} \("):
            SmallEncoder.load(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")


def test_an_encoder_belongs_to_the_student_it_was_made_from(
    encoders: dict[str, SmallEncoder], deep_student: Student
) -> None:
    config = encoders["static"].config
    config.require_student(deep_student, "KALE", "STUDENT")
    with torch.no_grad():
        deep_student.iem.out.bias.add_(1.0)  # nothing that passages are encoded with
    other = student_digest(deep_student)
    try:
        expected = rf"KALE was aligned to the student {config.student[:16]}, STUDENT is {other[:16]}\. .*d2llm kale"
        with pytest.raises(MismatchError, match=expected):
            config.require_student(deep_student, "KALE", "STUDENT")
    finally:
        with torch.no_grad():
            deep_student.iem.out.bias.sub_(1.0)
    prompted = Student(replace(deep_student.config, query_prompt="q: "), deep_student.backbone, deep_student.tokenizer)
    prompted.load_state_dict(deep_student.state_dict())
    with pytest.raises(MismatchError, match=f"STUDENT is {student_digest(prompted)[:16]}"):  # reads queries otherwise
        config.require_student(prompted, "KALE", "STUDENT")
    with pytest.raises(MismatchError, match="was aligned to the student 0000"):
        replace(config, student="0" * 64).require_student(deep_student, "KALE", "STUDENT")

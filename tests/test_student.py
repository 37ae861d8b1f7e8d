"""The student's modules against their equations, written out in loops; and the student folder."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, BertModel, RobertaConfig, RobertaForMaskedLM, RobertaModel

from d2llm.backbone import load_tokenizer, pad
from d2llm.errors import ArgumentError, DataError, ModelError
from d2llm.features import Layout
from d2llm.fitting import fit_to_corpus
from d2llm.folder import TOKENIZER
from d2llm.heads import PMA, Pooling, Start, Weightless
from d2llm.iem import IEM, SCALED, UNTRAINED, Inputs
from d2llm.student import ADAPTER, BACKBONE, HEADS, STUDENT, Encoded, Student, StudentConfig
from d2llm.types import PARTS

MakeStudent = Callable[..., Student]
SMALL: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
Vector = list[float]
Side = Literal["query", "document"]

TEXTS = [
    "How do I read a file line by line?",
    "ok",
    "A generator yields one value at a time, so that a file larger than memory can be read.",
    "Vitamin D is made in the skin under sunlight.",
]


def linear(layer: nn.Module, x: Vector) -> Vector:
    """W x + b, one product at a time."""
    assert isinstance(layer, nn.Linear)
    bias = [0.0] * layer.out_features if layer.bias is None else layer.bias.tolist()
    rows = zip(layer.weight.tolist(), bias, strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def relu(x: Vector) -> Vector:
    return [max(0.0, value) for value in x]


def add(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def layer_norm(norm: nn.Module, x: Vector) -> Vector:
    if isinstance(norm, nn.Identity):
        return x
    assert isinstance(norm, nn.LayerNorm)
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / len(x) + norm.eps)
    return [
        (value - mean) / deviation * scale + shift
        for value, scale, shift in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)
    ]


def literal_pma(pma: PMA, tokens: list[Vector], times: Vector | None = None) -> Vector:
    """`h = LN(MHA(q, Y, Y) + q)`, `out = LN(h + FFN(h))`, with a softmax over the tokens for each head. `times` is how
    often each token counts in the softmax."""
    seed = pma.seed.tolist()
    query = linear(pma.query, seed)
    keys, values = [linear(pma.key, token) for token in tokens], [linear(pma.value, token) for token in tokens]
    width = len(seed) // pma.heads
    pooled: Vector = []
    for head in range(pma.heads):
        part = slice(head * width, (head + 1) * width)
        logits = [sum(a * b for a, b in zip(query[part], key[part], strict=True)) / math.sqrt(width) for key in keys]
        weights = [n * math.exp(logit) for n, logit in zip(times or [1.0] * len(logits), logits, strict=True)]
        for place in range(width):
            pooled.append(sum(w * v[part][place] for w, v in zip(weights, values, strict=True)) / sum(weights))
    hidden = layer_norm(pma.norm_attention, add(pooled, seed))
    assert isinstance(pma.ffn, nn.Sequential)
    inner = relu(linear(pma.ffn[0], hidden))
    return layer_norm(pma.norm_out, add(hidden, linear(pma.ffn[2], inner) if len(pma.ffn) > 2 else inner))


def literal_mlp(iem: IEM, query: Vector, passage: Vector, task: int) -> float:
    """`f2(f1([q; p]))` on one pair of pooled states. With `inputs="sum"`, f1 is one matrix over the concatenation."""
    assert iem.query is not None and iem.passage is not None
    u, v = linear(iem.query, query), linear(iem.passage, passage)
    hidden = [*u, *v, *(a * b for a, b in zip(u, v, strict=True)), *(abs(a - b) for a, b in zip(u, v, strict=True))]
    if iem.inputs == "sum":
        first = [wq + wp for wq, wp in zip(iem.query.weight.tolist(), iem.passage.weight.tolist(), strict=True)]
        pair = query + passage
        hidden = relu(
            [
                sum(w * x for w, x in zip(row, pair, strict=True)) + b
                for row, b in zip(first, iem.passage.bias.tolist(), strict=True)
            ]
        )
    branch = iem.symmetric if task == 0 else iem.asymmetric
    return linear(iem.out, relu(linear(branch, hidden)))[0]


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its start, so that none can hide behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return module


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_paper_pma_computes_its_equations(heads: int) -> None:
    pma = PMA(8, heads, "paper").double()
    stirred(pma)
    tokens = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lengths = [5, 3, 1]
    mask = torch.tensor([[1] * n + [0] * (5 - n) for n in lengths])
    found = pma(tokens, mask)
    for row, length in enumerate(lengths):
        assert found[row].tolist() == pytest.approx(literal_pma(pma, tokens[row, :length].tolist()), abs=1e-9)


POOLINGS: dict[str, Callable[[int], Vector]] = {
    "mean": lambda n: [1.0] * n,
    "cls": lambda n: [1.0] + [0.0] * (n - 1),
    "last": lambda n: [0.0] * (n - 1) + [1.0],
    "weighted_mean": lambda n: [float(place) for place in range(1, n + 1)],
}
"""How often each of n tokens counts."""


def padded(rows: list[list[Vector]], side: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Token states and mask of texts of mixed length, with junk in the padding."""
    length, width = max(map(len, rows)), len(rows[0][0])
    tokens, mask = torch.full((len(rows), length, width), torch.nan, dtype=dtype), torch.zeros(len(rows), length).long()
    for row, states in enumerate(rows):
        columns = slice(0, len(states)) if side == "right" else slice(length - len(states), length)
        tokens[row, columns], mask[row, columns] = torch.tensor(states, dtype=dtype), 1
    return tokens, mask


def random_rows(*lengths: int, width: int = 8) -> list[list[Vector]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", POOLINGS)
def test_pma_starts_as_a_pooling_and_keeps_its_prior(kind: Any, side: str) -> None:
    rows = random_rows(5, 3, 1)
    pma, (tokens, mask) = PMA(8, 2, kind).double(), padded(rows, side)
    for found, states in zip(pma(tokens, mask).tolist(), rows, strict=True):
        times = POOLINGS[kind](len(states))
        columns = zip(*states, strict=True)
        expected = [sum(n * x for n, x in zip(times, column, strict=True)) / sum(times) for column in columns]
        assert found == pytest.approx(expected, abs=1e-6)
    stirred(pma)
    for found, states in zip(pma(tokens, mask).tolist(), rows, strict=True):
        assert found == pytest.approx(literal_pma(pma, states, POOLINGS[kind](len(states))), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", POOLINGS)
def test_pma_starts_as_a_pooling_in_half_precision_and_for_long_texts(kind: Any, dtype: torch.dtype) -> None:
    rows = [[[value, 1.0] for value in torch.linspace(-1, 1, 3000).tolist()]]
    tokens, mask = padded(rows, "right", dtype)
    expected = PMA(2, start=kind)(tokens.float(), mask)
    assert (PMA(2, start=kind).to(dtype)(tokens, mask).float() - expected).abs().max() < 2e-2


@pytest.mark.parametrize("kind", POOLINGS)
def test_every_start_of_pma_learns(kind: Any) -> None:
    """What the pooling cannot give: twice the mean, whatever the start."""
    pma, (tokens, mask) = PMA(8, 1, kind), padded(random_rows(5, 3, 4), "right", torch.float32)
    target = 2 * PMA(8)(tokens, mask).detach()
    optimizer, losses = torch.optim.Adam(pma.parameters(), lr=1e-2), []
    for _ in range(60):
        loss = (pma(tokens, mask) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(
        p.grad is not None and p.grad.isfinite().all() for name, p in pma.named_parameters() if name != "key.bias"
    )
    assert losses[-1] < 0.1 * losses[0]


def test_the_start_of_pma_is_saved_and_belongs_to_the_digest(tiny_bert: Path, tmp_path: Path) -> None:
    def made(**options: Any) -> Student:
        torch.manual_seed(0)
        return Student.create(
            StudentConfig(backbone=str(tiny_bert), tuning="frozen", lexical_slots=0, **options)
        ).eval()

    students = {kind: made(pma_start=kind) for kind in POOLINGS}
    assert len({student.weights_sha256() for student in students.values()}) == len(POOLINGS), "other vectors"
    assert students["mean"].weights_sha256() == made().weights_sha256() == made(start="mean").weights_sha256()
    students["cls"].save(tmp_path / "cls")
    loaded = Student.load(tmp_path / "cls").eval()
    assert torch.equal(loaded.encode(TEXTS, "query").vectors_BE, students["cls"].encode(TEXTS, "query").vectors_BE)
    assert loaded.weights_sha256() == students["cls"].weights_sha256()
    pooled = made(pooling="cls").encode(TEXTS, "query").vectors_BE
    assert (loaded.encode(TEXTS, "query").vectors_BE - pooled).abs().max() < 1e-6
    path = tmp_path / "cls" / STUDENT
    content = json.loads(path.read_text())
    del content["config"]["pma_start"]  # as an earlier version wrote it
    path.write_text(json.dumps(content))
    assert Student.load(tmp_path / "cls").config.pma_start == "mean"


MLP = Layout(5, 0, 0, 0)


@pytest.mark.parametrize("inputs", get_args(Inputs))
def test_the_paper_iem_is_the_mlp_over_both_texts(inputs: Inputs) -> None:
    iem = IEM(6, MLP, MLP, start="paper", inputs=inputs).double()
    stirred(iem)
    assert iem.part_names == ("mlp",) and iem.query is not None and iem.passage is not None
    generator = torch.Generator().manual_seed(2)
    queries = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    passages = torch.randn(4, 3, 6, dtype=torch.float64, generator=generator)
    recall = torch.randn(4, 3, dtype=torch.float64, generator=generator)  # the paper's form must not look at it
    tasks = [0, 1, 1, 0]
    found = iem(iem.query(queries), iem.passage(passages), recall, torch.tensor(tasks))
    for q, task in enumerate(tasks):
        for k in range(3):
            expected = literal_mlp(iem, queries[q].tolist(), passages[q, k].tolist(), task)
            assert found[q, k].item() == pytest.approx(expected, abs=1e-9)
            other = literal_mlp(iem, queries[q].tolist(), passages[q, k].tolist(), 1 - task)
            assert abs(expected - other) > 1e-3, "the branches must differ for the test to tell them apart"


def test_paper_student_is_backbone_then_pma_then_iem(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(
        tiny_bert, tuning="frozen", start="paper", iem_inputs="sum", pma_heads=2, feature_dim=8, lexical_slots=0,
        vectors=0,
    )  # fmt: skip
    assert isinstance(student.pma, PMA)
    stirred(student.pma)  # a fresh LayerNorm gives one norm to all, and would hide a scaling
    query, passage = student.encode(TEXTS[:1], "query"), student.encode(TEXTS[2:3], "document")
    cosine = query.vectors_BE @ passage.vectors_BE.T
    features = (query.query_features_BH, passage.passage_features_BH[None])
    pooled_query, pooled_passage = (
        literal_pma(student.pma, student.tokens(*pad(student.encodings([text], "query")))[0].tolist())
        for text in (TEXTS[0], TEXTS[2])
    )
    for task in (0, 1):
        found = student.iem(*features, cosine, torch.tensor([task]))
        assert found.item() == pytest.approx(literal_mlp(student.iem, pooled_query, pooled_passage, task), abs=1e-5)


def test_mean_start_is_the_mean_pooling_of_the_backbone(minilm: Path) -> None:
    student = Student.create(StudentConfig(backbone=str(minilm), tuning="lora"))
    backbone = AutoModel.from_pretrained(str(minilm)).eval()
    found = student.encode(TEXTS, "document").vectors_BE
    for row, ids in enumerate(student.encodings(TEXTS, "document")):
        with torch.inference_mode():
            mean = backbone(torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[row], mean / mean.norm(), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_mean_start_scores_exactly_as_recall(minilm: Path) -> None:
    student = Student.create(StudentConfig(backbone=str(minilm), tuning="frozen"))
    fit_to_corpus(student, TEXTS)
    assert student.iem.part_names == PARTS
    query, passage = student.encode(TEXTS[:2], "query"), student.encode(TEXTS, "document")
    cosine = query.vectors_BE @ passage.vectors_BE.T
    candidates = passage.passage_features_BH.expand(2, -1, -1)
    task = torch.tensor([0, 1])
    parts = student.iem.parts(query.query_features_BH, candidates, cosine, task)
    score = student.iem(query.query_features_BH, candidates, cosine, task)
    assert torch.equal(score[0], 20 * cosine[0])  # symmetric: no scale of words and vectors is good for all
    untrained = [UNTRAINED[name] for name in SCALED if name in student.iem.part_names] + [1.0]
    torch.testing.assert_close(score[1], parts[1] @ torch.tensor(untrained))
    student.iem.reset()
    assert torch.equal(student.iem(query.query_features_BH, candidates, cosine, task), 20 * cosine)


def test_iem_learns_at_the_mean_start() -> None:
    """A last layer at zero blocks the gradient of all before it, not its own: one step opens the rest."""
    layout = Layout(5, 2, 4, 3)
    iem = IEM(6, layout, layout)
    query, passage = torch.randn(2, layout.width), torch.randn(2, 3, layout.width)
    for features in (query, passage):  # all have the words 1, 2 and 3
        features[..., -9:] = torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0])
    iem(query, passage, torch.rand(2, 3), torch.tensor([0, 1]))[0, 0].backward()
    assert iem.out.weight.grad is not None and iem.out.weight.grad.abs().max() > 0
    assert iem.scales.grad is not None and (iem.scales.grad[0] != 0).all(), "cosine, words and vectors"
    assert not iem.scales.grad[1].any(), "the query of the other branch"


@pytest.mark.parametrize("start", ["mean", "paper"])
def test_what_lies_in_padded_positions_has_no_influence(start: str) -> None:
    pma = stirred(PMA(8, 2, start))  # type: ignore[arg-type]  # a str where a Literal is expected
    tokens = torch.randn(2, 4, 8)
    expected = pma(tokens, torch.ones(2, 4, dtype=torch.long))
    for junk in (0.0, 1e30, -torch.inf, torch.nan):
        padded = torch.cat([tokens, torch.full((2, 3, 8), junk)], dim=1)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)
        torch.testing.assert_close(pma(padded, mask), expected, atol=1e-6, rtol=0)


def test_nan_in_padded_positions_reaches_no_gradient() -> None:
    pma = stirred(PMA(8))
    tokens = torch.randn(1, 3, 8)
    tokens[:, 2] = torch.nan
    pma(tokens, torch.tensor([[1, 1, 0]])).sum().backward()
    # The keys' bias shifts every logit alike: softmax does not see it, and it has no gradient.
    learned = [p for name, p in pma.named_parameters() if name != "key.bias"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


@pytest.mark.parametrize("backbone", ["tiny_bert", "tiny_qwen3", "tiny_llama"])
def test_padding_on_the_right_changes_nothing(
    backbone: str, make_student: MakeStudent, request: pytest.FixtureRequest
) -> None:
    student = make_student(request.getfixturevalue(backbone), tuning="lora")
    rows = student.encodings(TEXTS, "document")
    ids, mask = pad(rows)
    with torch.inference_mode():
        together = student(ids, mask)
        stray = student(ids.masked_fill(mask == 0, 2042), mask)
        for row, alone in enumerate(rows):
            assert_same_encoding(Encoded(*(t[row : row + 1] for t in together)), student(*pad([alone])))
    assert_same_encoding(stray, together)


@pytest.mark.parametrize("backbone", ["tiny_qwen3", "tiny_llama"])
def test_left_and_right_padding_agree_on_causal_backbones(
    backbone: str, make_student: MakeStudent, request: pytest.FixtureRequest
) -> None:
    student = make_student(request.getfixturevalue(backbone), tuning="lora")
    rows = student.encodings(TEXTS, "document")
    with torch.inference_mode():
        assert_same_encoding(student(*pad(rows, side="left")), student(*pad(rows, side="right")))
        first, last = student(*pad([[*rows[0], 2042]])), student(*pad([[2042, *rows[0]]]))
    assert (first.vectors_BE - last.vectors_BE).abs().max() > 1e-4, "order of tokens must matter, or nothing was shown"


def assert_same_encoding(found: Encoded, expected: Encoded) -> None:
    for name, left, right in zip(Encoded._fields, found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-5, rtol=1e-5), f"{name}: {(left - right).abs().max()} apart"


def test_encode_keeps_the_order_of_texts_of_mixed_length(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(tiny_bert)
    texts = [f"{'word ' * (7 * i % 11 + 1)}{i}" for i in range(10)]
    shapes = list[torch.Size]()
    student.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    together = student.encode(texts, "document", batch_tokens=24)
    assert max(shape.numel() for shape in shapes) <= 24
    assert max(rows for rows, _ in shapes) > 1
    for row, text in enumerate(texts):
        alone = student.encode([text], "document")
        assert_same_encoding(Encoded(*(tensor[row : row + 1] for tensor in together)), alone)


def test_encode_leaves_the_training_mode_as_it_was(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(tiny_bert).train()
    first, second = (student.encode(TEXTS, "document") for _ in range(2))
    assert student.training
    assert torch.equal(first.vectors_BE, second.vectors_BE), "dropout was active"


def test_each_side_has_its_prompt_and_limit(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(
        tiny_bert, query_prompt="query: ", document_prompt="passage: ", query_max_length=8, document_max_length=12
    )
    text = "one two three four five six seven eight nine ten eleven twelve"
    tokenizer = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for side, prompt, limit in (("query", "query: ", 8), ("document", "passage: ", 12)):
        whole = tokenizer.encode(prompt + text).ids
        assert student.encodings([text], side)[0] == whole[: limit - 1] + whole[-1:]  # type: ignore[arg-type]  # a str where a Literal is expected


def test_an_empty_text_is_refused(make_student: MakeStudent, tiny_bert: Path) -> None:
    with pytest.raises(DataError, match="text 1 of 2 is empty"):
        make_student(tiny_bert).encode(["ok", " \n"], "document")


def test_heads_that_do_not_divide_the_width_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match="width 64 is not divisible into 5 PMA heads"):
        Student.create(StudentConfig(backbone=str(tiny_bert), pma_heads=5))


@pytest.mark.parametrize(("network", "most"), [(RobertaModel, 38), (BertModel, 40)], ids=["RoBERTa", "BERT"])
def test_a_limit_beyond_what_the_backbone_can_read_is_refused(network: Any, most: int, minilm: Path) -> None:
    """RoBERTa keeps two rows of its table of positions for padding."""
    backbone = network(network.config_class(**{**SMALL, "max_position_embeddings": 40})).eval()
    tokenizer = load_tokenizer(str(minilm))
    Student(StudentConfig(backbone="b", query_max_length=most, document_max_length=most), backbone, tokenizer)
    ids_BL = torch.full((1, most + 1), 5)
    backbone(input_ids=ids_BL[:, 1:], attention_mask=torch.ones_like(ids_BL[:, 1:]))
    with pytest.raises((IndexError, RuntimeError)):
        backbone(input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL))
    for side in ("query", "document"):
        lengths = {"query_max_length": most, "document_max_length": most, f"{side}_max_length": most + 1}
        config = StudentConfig(backbone="b", **lengths)  # type: ignore[arg-type]  # `lengths` holds lengths alone
        with pytest.raises(ArgumentError, match=f"{side}_max_length = {most + 1} is more than the {most} tokens that"):
            Student(config, backbone, tokenizer)


def test_rotations_and_relative_distances_set_no_limit(tiny_qwen3: Path) -> None:
    long = StudentConfig(backbone=str(tiny_qwen3), document_max_length=100_000)
    assert Student.create(long).config.document_max_length == 100_000


@pytest.mark.parametrize(("prompt", "length", "taken"), [("", 2, 2), ("passage: ", 4, 4)])
def test_a_limit_without_room_for_text_is_refused(prompt: str, length: int, taken: int, tiny_bert: Path) -> None:
    """All texts would be the same, or tokenizers would not cut at all."""
    config = StudentConfig(backbone=str(tiny_bert), document_prompt=prompt, document_max_length=length)
    expected = f"document_max_length = {length} leaves no room for text: prompt and special tokens take {taken}"
    with pytest.raises(ArgumentError, match=expected):
        Student.create(config)
    one_more = replace(config, document_max_length=length + 1)
    ids = Student.create(one_more).encodings(["hello there"], "document")
    assert len(ids[0]) == length + 1


@pytest.mark.parametrize("tuning", ["lora", "full", "frozen"])
def test_a_saved_student_loads_as_it_was(
    tuning: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    student = make_student(tiny_bert, tuning=tuning, embedding_dim=16, query_prompt="q: ", document_max_length=20)
    stirred(student.iem)
    if tuning == "full":
        stirred(student.backbone)  # what lies at the backbone's own place is no longer right
    student.provenance = {"step": 7}
    student.save(tmp_path / "student")
    loaded = Student.load(tmp_path / "student").eval()
    assert loaded.config == student.config
    assert loaded.provenance == {"step": 7}
    sides: tuple[Side, ...] = ("query", "document")
    for side in sides:
        assert_same_encoding(loaded.encode(TEXTS, side), student.encode(TEXTS, side))
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in student.named_parameters()
    }, "training on must train the same parts"
    for name, value in student.iem.state_dict().items():
        assert torch.equal(loaded.iem.state_dict()[name], value), name
    assert loaded.weights_sha256() == student.weights_sha256()


def test_merging_lora_keeps_what_the_student_computes(make_student: MakeStudent, tiny_qwen3: Path) -> None:
    student = make_student(tiny_qwen3, tuning="lora")
    untrained = Student.create(StudentConfig(backbone=str(tiny_qwen3), tuning="frozen"))
    expected = student.encode(TEXTS, "document")
    tokens = student.tokens(*pad(student.encodings(TEXTS[:1], "document")))
    moved = tokens - untrained.eval().tokens(*pad(student.encodings(TEXTS[:1], "document")))
    assert moved.abs().max() > 1e-3, "LoRA must do something here"
    student.merge_lora()
    assert_same_encoding(student.encode(TEXTS, "document"), expected)
    assert not [name for name, _ in student.named_parameters() if "lora_" in name]


def test_save_refuses_a_folder_in_use(make_student: MakeStudent, tiny_bert: Path, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="student exists already"):
        make_student(tiny_bert).save(tmp_path / "student")
    assert [path.name for path in tmp_path.rglob("*")] == ["student", "notes.txt"]


def test_a_save_that_fails_leaves_nothing(make_student: MakeStudent, tiny_bert: Path, tmp_path: Path) -> None:
    student = make_student(tiny_bert)
    student.provenance = {"when": object()}  # the last file to be written cannot be
    with pytest.raises(TypeError, match="not JSON serializable"):
        student.save(tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_student_is_refused(minilm: Path) -> None:
    with pytest.raises(
        ModelError,
        match=r"model is not a student folder: it has no student\.json\. .*d2llm train RECIPE STUDENT, or .*d2llm init",
    ):
        Student.load(minilm)


FILES = [STUDENT, TOKENIZER, HEADS, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors",
         f"{BACKBONE}/config.json", f"{BACKBONE}/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_a_backbone_that_has_changed_since_is_refused(
    tuning: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    """The heads and adapters do not suit it, and nothing would show that: torch and the export would agree."""
    backbone = shutil.copytree(tiny_bert, tmp_path / "bert")
    make_student(backbone, tuning=tuning).save(tmp_path / "student")
    description = tmp_path / "student" / STUDENT
    Student.load(tmp_path / "student")
    weights = load_file(backbone / "model.safetensors")
    changed = {name: weight * 1.01 for name, weight in weights.items()}
    save_file(changed, backbone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"bert has other weights than when .*student was made.* Restore the backbone"):
        Student.load(tmp_path / "student")
    content = json.loads(description.read_text())
    del content["backbone"]  # as in a student of an earlier version
    description.write_text(json.dumps(content))
    Student.load(tmp_path / "student")


@pytest.mark.parametrize("damage", ["missing", "cut off", "garbage"])
@pytest.mark.parametrize("name", FILES)
def test_a_student_with_a_damaged_file_is_refused_by_its_name(
    name: str, damage: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    make_student(tiny_bert, tuning="full" if name.startswith(BACKBONE) else "lora").save(tmp_path / "student")
    file = tmp_path / "student" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut off" else b"\xff\x00garbage")
    part = name.partition("/")[0]
    named = rf"(?s)student is (not a student folder|(damaged|incomplete): {part}).*(again|RECIPE STUDENT)"
    with pytest.raises(ModelError, match=named):
        Student.load(tmp_path / "student")


@pytest.mark.parametrize("file", [HEADS, f"{ADAPTER}/adapter_model.safetensors"], ids=["heads", "adapter"])
def test_weights_that_are_missing_or_another_students_are_refused(
    file: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    """No weight may stay as it happened to be in memory."""
    make_student(tiny_bert, tuning="lora").save(tmp_path / "student")
    path = tmp_path / "student" / file
    weights = load_file(path)
    one = sorted(weights)[-1]
    part = file.partition("/")[0]
    changed: list[tuple[dict[str, Tensor], str]] = [
        ({one: weights[one]}, f"is missing, one of {len(weights) - 1} such weights"),
        ({name: weight for name, weight in weights.items() if name != one}, f"{one} is missing, one of 1 such"),
        ({**weights, "backbone.x": torch.zeros(1)}, r"backbone\.x belongs to another model, one of 1 such"),
        ({**weights, one: torch.zeros(7, 3)}, r"size mismatch for .*\[7, 3\]"),
    ]
    for content, message in changed:
        save_file(content, path)
        named = rf"(?s)student is damaged: {part} \(.*{message}.*train the student again"
        with pytest.raises(ModelError, match=named):
            Student.load(tmp_path / "student")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tunning": "lora"}, "unknown key config.tunning: known are"),
        ({"backbone": None}, "config.backbone: expected a text, found None"),
        ({"tuning": "some"}, "config.tuning: expected one of 'frozen', 'lora', 'full', found 'some'"),
        ({"feature_dim": "64"}, "config.feature_dim: expected a whole number between 0 and 2147483647, found '64'"),
        ({"feature_dim": 25}, "size mismatch"),
        ({"vector_dim": 7}, "vector_dim must be even, found 7"),
        ({"iem_inputs": "product"}, "config.iem_inputs: expected one of 'comparison', 'sum', found 'product'"),
        ({"document_max_length": -1}, "config.document_max_length: expected a whole number .*, found -1"),
        ({"document_max_length": 513}, "document_max_length = 513 is more than the 512 tokens"),
        ({"lora_dropout": math.nan}, "config.lora_dropout: expected a number between 0 and 1, found nan"),
        ({"pma_heads": 5}, "width 64 is not divisible into 5 PMA heads"),
        ({"lexical_slots": 400}, "take .* bytes, feature_bytes is 1024"),
    ],
)
def test_a_wrong_value_in_a_students_config_is_named(
    change: dict[str, Any], message: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    make_student(tiny_bert).save(tmp_path / "student")
    file = tmp_path / "student" / STUDENT
    content = json.loads(file.read_text())
    content["config"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"(?s)student is damaged: (student\.json|heads\S+) \(.*{message}"):
        Student.load(tmp_path / "student")
    for damaged in (
        "[]",
        "{}",
        '{"config": {}}',
        '{"config": [], "provenance": {}}',
        '{"config": {}, "provenance": 3}',
    ):
        file.write_text(damaged)
        with pytest.raises(
            ModelError, match=r"student is damaged: student\.json \((missing key|\w+: expected a table)"
        ):
            Student.load(tmp_path / "student")


def test_a_backbone_that_is_gone_is_named(make_student: MakeStudent, tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"backbone '/no/such/backbone': there is no such file or folder"):
        Student.create(StudentConfig(backbone="/no/such/backbone"))
    moving = shutil.copytree(tiny_bert, tmp_path / "moving")
    make_student(moving).save(tmp_path / "student")
    shutil.rmtree(moving)
    with pytest.raises(ModelError, match="moving': there is no such file or folder"):
        Student.load(tmp_path / "student")


@pytest.mark.parametrize("backbone", ["tiny_bert", "tiny_qwen3", "tiny_llama"])
def test_a_backbone_without_a_vocabulary_is_refused(
    backbone: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Some tokenizer classes come up with special tokens alone, and then every word is unknown."""
    bare = shutil.copytree(request.getfixturevalue(backbone), tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no fast tokenizer|tokenizer of backbone .* cannot be loaded"):
        Student.create(StudentConfig(backbone=str(bare)))


def test_a_tokenizer_without_its_json_is_converted(minilm: Path, tmp_path: Path) -> None:
    for name in ("vocab.txt", "config.json", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path)
    found, expected = load_tokenizer(str(tmp_path)), load_tokenizer(str(minilm))
    for text in [*TEXTS, "机器学习 naïve café 3.14"]:
        assert found.encode(text).ids == expected.encode(text).ids


def test_the_tokenizer_neither_pads_nor_truncates_by_itself(minilm: Path) -> None:
    """MiniLM's own file asks for both."""
    own = json.loads((minilm / "tokenizer.json").read_text())
    assert own["truncation"] or own["padding"]
    tokenizer = load_tokenizer(str(minilm))
    assert len(tokenizer.encode("ok").ids) == 3
    assert len(tokenizer.encode("word " * 600).ids) == 602


def test_a_projected_recall_vector_is_a_unit_vector_of_its_width(make_student: MakeStudent, minilm: Path) -> None:
    student = make_student(minilm, tuning="frozen", embedding_dim=64)
    vectors = student.encode(TEXTS, "document").vectors_BE
    assert vectors.shape == (4, 64) and student.embedding_dim == 64
    np.testing.assert_allclose(vectors.norm(dim=-1), 1, atol=1e-6)


def test_the_weights_digest_covers_the_passage_side_and_no_more(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(tiny_bert, embedding_dim=16)
    before = student.weights_sha256()
    assert make_student(tiny_bert, embedding_dim=16).weights_sha256() == before

    def digest_without(parameter: Tensor) -> str:
        """The digest while the parameter's last element is another."""
        with torch.no_grad():
            flat = parameter.view(-1)
            kept = flat[-1].clone()
            flat[-1] += 0.5
            digest = student.weights_sha256()
            flat[-1] = kept
        return digest

    passage_side = {n for n, _ in student.named_parameters() if not n.startswith("iem.")} | {
        "iem.passage.weight",
        "iem.passage.bias",
    }
    for name, parameter in student.named_parameters():
        assert (digest_without(parameter) != before) == (name in passage_side), name
    assert student.weights_sha256() == before


@pytest.mark.parametrize("whole", [False, True], ids=["passage side", "whole"])
def test_the_digest_of_a_student_with_lora_is_that_of_what_is_stored(
    whole: bool, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    """Merging is a matrix product, whose last bits differ from machine to machine: they decide nothing."""
    student = make_student(tiny_bert, tuning="lora")
    student.save(tmp_path / "student")
    digest = student.weights_sha256(whole=whole)
    for unit in (0.0, 1.0):
        loaded = Student.load(tmp_path / "student")
        assert loaded.weights_sha256(whole=whole) == digest
        loaded.merge_lora()
        with torch.no_grad():
            for parameter in loaded.backbone.parameters():
                parameter.copy_(torch.nextafter(parameter, parameter + unit))
        assert loaded.weights_sha256(whole=whole) == digest


def test_how_far_lora_moves_the_backbone_is_part_of_its_digest(
    make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    student = make_student(tiny_bert, tuning="lora")
    student.save(tmp_path / "student")
    file = tmp_path / "student" / ADAPTER / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 33}))
    assert Student.load(tmp_path / "student").weights_sha256() != student.weights_sha256()


@pytest.mark.parametrize("tuning", ["frozen", "full"])
def test_without_lora_the_digest_is_of_each_weights_name_shape_and_values(
    tuning: str, make_student: MakeStudent, tiny_bert: Path
) -> None:
    """Collections and models that exist hold such digests: they must not change."""
    student = make_student(tiny_bert, tuning=tuning, embedding_dim=16)
    expected = hashlib.sha256()
    for name, weight in sorted(student.state_dict().items()):
        if not name.startswith("iem.") or name in ("iem.passage.weight", "iem.passage.bias"):
            expected.update(f"{name}{tuple(weight.shape)}".encode() + weight.numpy().tobytes())
    assert student.weights_sha256() == expected.hexdigest()


@pytest.mark.parametrize("tuning", ["frozen", "lora"])
def test_a_backbone_without_a_pooler_makes_the_same_student_at_every_load(
    tuning: str, make_student: MakeStudent, minilm: Path, tmp_path: Path
) -> None:
    """Models that were trained on masked words alone, such as RoBERTa, store no pooler."""
    RobertaForMaskedLM(RobertaConfig(**SMALL)).save_pretrained(tmp_path / "roberta")
    shutil.copy(minilm / "tokenizer.json", tmp_path / "roberta")
    student = make_student(tmp_path / "roberta", tuning=tuning)
    student.save(tmp_path / "student")
    for seed in (1, 2):
        torch.manual_seed(seed)
        assert Student.load(tmp_path / "student").weights_sha256() == student.weights_sha256()


def test_a_backbone_that_lacks_a_weight_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    """It would be filled with random numbers."""
    backbone = shutil.copytree(tiny_bert, tmp_path / "backbone")
    weights = load_file(backbone / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, backbone / "model.safetensors", metadata={"format": "pt"})
    lost = r"backbone'? has no weights for encoder\.layer\.1\.output\.dense\.weight \(1 missing\)"
    with pytest.raises(ModelError, match=lost):
        Student.create(StudentConfig(backbone=str(backbone)))


def test_a_student_whose_lora_was_merged_is_not_saved(
    make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    """What would be written as its adapters is a whole backbone, and no student could be read from it."""
    student = make_student(tiny_bert, tuning="lora")
    student.merge_lora()
    with pytest.raises(ModelError, match=r"merged into its backbone: save it before merge_lora\(\)"):
        student.save(tmp_path / "student")
    assert not list(tmp_path.iterdir())


OLD = {"iem.scale": torch.tensor(20.0), "lexical.weight_V": torch.zeros(9), "iem.passage.bias": torch.zeros(3)}


@pytest.mark.parametrize("old", ["config", "weights"])
def test_a_student_of_the_iems_first_form_is_refused_with_the_way_out(
    old: str, make_student: MakeStudent, tiny_bert: Path, tmp_path: Path
) -> None:
    make_student(tiny_bert, tuning="frozen").save(tmp_path / "student")
    if old == "config":
        content = json.loads((tmp_path / "student" / STUDENT).read_text())
        for key in ("iem_inputs", "feature_bytes", "vectors", "vector_dim"):
            del content["config"][key]
        content["config"] |= {"product": True, "lexical_slots": 96}
        (tmp_path / "student" / STUDENT).write_text(json.dumps(content))
    else:
        save_file(OLD, tmp_path / "student" / HEADS)
    message = "student was made by an earlier d2llm: train it again, or make it again with d2llm init"
    with pytest.raises(ModelError, match=message):
        Student.load(tmp_path / "student")


def test_pooling_without_weights_is_what_its_name_says_whatever_the_padding() -> None:
    tokens = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    texts = tokens[0, :3], tokens[1, 2:]
    expected = {
        "mean": [text.mean(0) for text in texts],
        "last": [text[2] for text in texts],
        "cls": [text[0] for text in texts],
        "weighted_mean": [(text[0] + 2 * text[1] + 3 * text[2]) / 6 for text in texts],
        "max": [torch.stack([max(column) for column in text.T]) for text in texts],
    }
    for junk in (0.0, 1e30, torch.nan):
        padded = tokens.masked_fill(mask.unsqueeze(-1) == 0, junk)
        for kind in get_args(Weightless):
            torch.testing.assert_close(Pooling(kind)(padded, mask), torch.stack(expected[kind]))


@pytest.mark.parametrize("start", get_args(Start))
def test_without_interaction_the_score_is_the_scaled_cosine(start: Start, tiny_bert: Path) -> None:
    config = StudentConfig(backbone=str(tiny_bert), tuning="frozen", interaction="cosine", start=start)
    student = Student.create(config)
    fit_to_corpus(student, TEXTS)
    assert not any(p.requires_grad for p in student.iem.parameters()) and "mlp" not in student.iem.part_names
    encoded = student.encode(TEXTS, "query")
    cosine = encoded.vectors_BE @ encoded.vectors_BE.T
    features = encoded.passage_features_BH.expand(len(TEXTS), -1, -1)
    scores = student.iem(encoded.query_features_BH, features, cosine, torch.ones(len(TEXTS), dtype=torch.long))
    torch.testing.assert_close(scores, 20 * cosine)

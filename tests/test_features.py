"""What the IEM reads of a text, against its formulas in plain loops: words, vectors, and both as bytes."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2llm.errors import ArgumentError
from d2llm.features import K1, B, Layout, TokenVectors, Words, pool_parts
from d2llm.fitting import fit_to_corpus
from d2llm.iem import bm25, maxsim
from d2llm.student import Student, StudentConfig
from d2llm.tokens import NAMES, QUERY_WORDS

MakeStudent = Callable[..., Student]
Vector = list[float]
DOCUMENTS = [[0, 5, 7, 5, 9, 1], [0, 5, 8, 1], [0, 6, 6, 6, 6, 2, 1], [0, 5, 7, 3, 4, 9, 8, 1]]
"""Token ids. 0 and 1 are special."""


def literal_idf(documents: Sequence[Sequence[int]], special: Sequence[int]) -> dict[int, float]:
    frequency = Counter(token for ids in documents for token in set(ids))
    idf = {token: math.log(1 + (len(documents) - n + 0.5) / (n + 0.5)) for token, n in frequency.items()}
    return {token: value for token, value in idf.items() if token not in special}


def literal_bm25(query: Sequence[int], passage: Sequence[int], idf: dict[int, float], average: float) -> float:
    """Robertson and Zaragoza's formula, a term for each token of the query."""
    words = [token for token in passage if token in idf]
    score = 0.0
    for token in query:
        if token in idf:
            tf = words.count(token)
            score += idf[token] * tf * (K1 + 1) / (tf + K1 * (1 - B + B * len(words) / average))
    return score


def fitted() -> tuple[Words, dict[int, float], float]:
    words = Words(vocabulary=12)
    words.fit(DOCUMENTS, special=[0, 1])
    return words, literal_idf(DOCUMENTS, [0, 1]), sum(len(ids) - 2 for ids in DOCUMENTS) / len(DOCUMENTS)


def padded(rows: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L]. The padding is a word's id, which must have no influence."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 5), torch.zeros(len(rows), length).long()
    for row, tokens in enumerate(rows):
        columns = slice(0, len(tokens)) if side == "right" else slice(length - len(tokens), length)
        ids[row, columns], mask[row, columns] = torch.tensor(tokens), 1
    return ids, mask


def kept(columns_H: Tensor) -> dict[int, float]:
    """The words that a row of columns holds, in its order: {name: weight}."""
    high, low, weights = columns_H.chunk(3)
    names = (256 * high + low).long().tolist()
    return {name: weight for name, weight in zip(names, weights.tolist(), strict=True) if weight}


# words


def test_idf_and_average_length_are_those_of_the_documents_and_special_tokens_are_no_words() -> None:
    words, idf, average = fitted()
    for token in (*idf, 0, 1):
        assert words.idf_V[token].item() == pytest.approx(idf.get(token, 0.0))
    assert words.idf_V[11].item() == pytest.approx(math.log(1 + 4.5 / 0.5)), "a word of no document is the rarest"
    assert words.average_length.item() == average


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9])
def test_a_passage_keeps_the_words_of_the_largest_product_of_impact_and_idf(slots: int, side: str) -> None:
    words, idf, average = fitted()
    found = words.passage(*padded(DOCUMENTS, side), slots)
    assert found.shape == (len(DOCUMENTS), 3 * slots)
    for row, ids in enumerate(DOCUMENTS):
        counts = Counter(token for token in ids if token in idf)
        impact = {
            token: tf * (K1 + 1) / (tf + K1 * (1 - B + B * counts.total() / average)) for token, tf in counts.items()
        }
        best = sorted(counts, key=lambda token: (-round(impact[token] * idf[token], 6), ids.index(token)))[:slots]
        assert kept(found[row]) == pytest.approx({token: impact[token] for token in best})
        assert list(kept(found[row])) == best, "the heaviest first, of equals the earlier one"


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_a_query_keeps_the_words_of_the_largest_idf_times_count(slots: int) -> None:
    words, idf, _ = fitted()
    found = words.query(*padded(DOCUMENTS), slots)
    for row, ids in enumerate(DOCUMENTS):
        weight = {token: idf[token] * n for token, n in Counter(ids).items() if token in idf}
        best = sorted(weight, key=lambda token: (-round(weight[token], 6), ids.index(token)))[:slots]
        assert kept(found[row]) == pytest.approx({token: weight[token] for token in best})


def test_the_score_of_a_pair_is_bm25_over_the_tokens_of_both_texts() -> None:
    words, idf, average = fitted()
    queries = [[0, 5, 9, 1], [0, 6, 6, 7, 1], [0, 11, 4, 1], [0, 1]]
    query = Layout(0, 0, 0, 6).split(words.query(*padded(queries), 6))
    passages = words.passage(*padded(DOCUMENTS), 6)[None].expand(len(queries), -1, -1)
    expected = [[literal_bm25(q, p, idf, average) for p in DOCUMENTS] for q in queries]
    torch.testing.assert_close(bm25(query, Layout(0, 0, 0, 6).split(passages)), torch.tensor(expected))
    assert max(expected[1]) > 0 == max(expected[3])


def test_bm25_of_real_texts_is_the_textbook_formula(make_student: MakeStudent, tiny_bert: Path) -> None:
    student = make_student(tiny_bert, tuning="frozen", lexical_slots=64)
    passages = [line for line in str(torch.__doc__).splitlines() if line.strip()]
    queries = [*passages[:2], "a tensor, and a tensor of tensors", "gpu"]
    query, passage = student.encode(queries, "query"), student.encode(passages, "document")
    features = student.iem.layouts[0].split(query.query_features_BH)
    packed = student.iem.layouts[1].pack(passage.passage_features_BH).expand(len(queries), -1, -1)
    found = bm25(features, student.iem.layouts[1].unpack(packed))
    ids, asked = student.encodings(passages, "document"), student.encodings(queries, "query")
    idf = literal_idf(ids, [101, 102])
    average = sum(len(row) - 2 for row in ids) / len(ids)
    expected = torch.tensor([[literal_bm25(q, p, idf, average) for p in ids] for q in asked])
    assert all(len(set(row)) <= QUERY_WORDS for row in asked), "no word was left out"
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)  # a weight has one byte
    assert (expected > 0).float().mean() > 0.3


def test_words_above_65535_share_names_with_others_and_find_themselves() -> None:
    big = NAMES + 7
    words = Words(vocabulary=big + 10)
    words.fit([[big, 3], [7, 4], [big + 1, 5]], special=[])
    query, passage = [[big], [7], [big + 1]], [[big, 3], [7, 4], [big + 1, 5]]
    layout = Layout(0, 0, 0, 2)
    ids, mask = padded(passage)
    packed = layout.pack(words.passage(ids, mask, 2)).expand(3, -1, -1)
    found = bm25(layout.split(words.query(*padded(query), 2)), layout.unpack(packed))
    assert (found > 0).tolist() == [[True, True, False], [True, True, False], [False, False, True]]


# bytes


PARTS = [parts for parts in itertools.product((0, 5), (0, 3), (0, 4)) if any(parts)]


def made(projection: int, vectors: int, words: int, scale: float = 3.0) -> tuple[Layout, Tensor]:
    """A layout, and features [2, 3, H] as a student makes them. One text lacks a vector and a word."""
    layout = Layout(projection, vectors, 6 if vectors else 0, words)
    columns = [torch.randn(2, 3, projection) * scale]
    units = torch.nn.functional.normalize(torch.randn(2, 3, vectors, layout.dim), dim=-1)
    names, weights = torch.randint(256, (2, 3, 2 * words)).float(), torch.rand(2, 3, words) * (K1 + 1)
    if vectors:
        units[0, 0, -1] = 0
    if words:
        weights[0, 0, -1] = 0
    return layout, torch.cat([*columns, units.flatten(-2), names, weights], dim=-1)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 80.0])
@pytest.mark.parametrize(("projection", "vectors", "words"), PARTS)
def test_packed_features_come_back_within_a_step(projection: int, vectors: int, words: int, scale: float) -> None:
    layout, features = made(projection, vectors, words, scale)
    packed = layout.pack(features)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, layout.bytes)
    found, expected = layout.unpack(packed), layout.split(features)
    assert [part.shape for part in found] == [part.shape for part in expected]
    if projection:
        peak = expected.projection.abs().amax(-1, keepdim=True)
        assert ((found.projection - expected.projection).abs() <= peak / 254 + 1 / 512 + 1e-5).all()
    assert torch.equal(found.names, expected.names)
    assert ((found.weights - expected.weights).abs() <= (K1 + 1) / 510 + 1e-6).all()
    directions = torch.nn.functional.normalize(found.vectors, dim=-1).flatten(0, 2)
    for got, unit in zip(directions, expected.vectors.flatten(0, 2), strict=True):
        peak = unit.abs().max().item()
        steps = [round(value / peak * 7) if peak else 0 for value in unit.tolist()]
        length = math.sqrt(sum(step * step for step in steps)) or 1.0
        assert got.tolist() == pytest.approx([step / length for step in steps], abs=1e-5)
        assert not peak or float(got @ unit) > 0.98


def test_equal_features_give_equal_bytes_however_many_are_packed_together() -> None:
    layout, features = made(5, 3, 4)
    alone = torch.stack([torch.stack([layout.pack(row) for row in rows]) for rows in features])
    assert torch.equal(layout.pack(features), alone)


# vectors


def literal_parts(rows: list[Vector], counts: list[int], vectors: int) -> list[Vector]:
    """Cut where a row differs most from the one before it; the sum of each part at length 1, then zeros."""

    def cosine(a: Vector, b: Vector) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b) or 1.0)

    places = [place for place, count in enumerate(counts) if count]
    cuts = sorted(places[1:], key=lambda place: cosine(rows[place], rows[place - 1]))[: vectors - 1]
    parts: list[list[Vector]] = []
    for place in places:
        if not parts or place in cuts:
            parts.append([])
        parts[-1].append(rows[place])
    sums = [[sum(column) for column in zip(*part, strict=True)] for part in parts]
    unit = [[value / math.hypot(*total) for value in total] for total in sums]
    return unit + [[0.0] * len(rows[0])] * (vectors - len(unit))


@pytest.mark.parametrize("vectors", [1, 2, 4, 9, 20])
def test_texts_are_cut_where_neighbours_differ_most(vectors: int) -> None:
    rows = torch.randn(5, 9, 3)
    counts = torch.tensor(
        [[1] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0], [0] * 6 + [1, 1, 1], [1, 1, 0, 1] * 2 + [1]]
    )
    found = pool_parts(rows, counts.float(), vectors)
    for row in range(5):
        expected = literal_parts(rows[row].tolist(), counts[row].tolist(), vectors)
        torch.testing.assert_close(found[row], torch.tensor(expected), atol=1e-5, rtol=0)
    assert not pool_parts(rows, torch.zeros(5, 9), vectors).any(), "a text without words has no vectors"


def stirred(vectors: TokenVectors) -> TokenVectors:
    with torch.no_grad():
        vectors.seed.normal_()
        vectors.mean_D.normal_(std=0.1)
    return vectors


def literal_vectors(module: TokenVectors, tokens: list[Vector], counts: list[int], vectors: int) -> list[Vector]:
    """Each state at length 1, centred, projected, times the exponential of its attention logit; then cut."""
    seed, mean, weight = module.seed.tolist(), module.mean_D.tolist(), module.project.weight.tolist()
    rows = []
    for token in tokens:
        unit = [value / math.hypot(*token) for value in token]
        attention = math.exp(sum(a * b for a, b in zip(unit, seed, strict=True)))
        centred = [value - centre for value, centre in zip(unit, mean, strict=True)]
        rows.append([attention * sum(w * x for w, x in zip(line, centred, strict=True)) for line in weight])
    return literal_parts(rows, counts, vectors)


@pytest.mark.parametrize("vectors", [1, 3, 8])
def test_token_vectors_are_attention_within_each_part(vectors: int) -> None:
    module, tokens = stirred(TokenVectors(6, 4)), torch.randn(2, 7, 6)
    counts = torch.tensor([[1] * 7, [0, 1, 1, 1, 1, 1, 0]])
    found = module(tokens, counts.float(), vectors)
    for row in range(2):
        expected = literal_vectors(module, tokens[row].tolist(), counts[row].tolist(), vectors)
        torch.testing.assert_close(found[row], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("junk", [0.0, 1e30, -torch.inf, torch.nan])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence_on_vectors_nor_on_gradients(side: str, junk: float) -> None:
    module, tokens = stirred(TokenVectors(6, 4)), torch.randn(2, 5, 6)
    filler = torch.full((2, 3, 6), junk)
    padded_tokens = torch.cat([tokens, filler] if side == "right" else [filler, tokens], dim=1)
    counts = torch.tensor([[1] * 5 + [0] * 3] * 2)
    found = module(padded_tokens, (counts if side == "right" else counts.flip(1)).float(), 3)
    torch.testing.assert_close(found, module(tokens, torch.ones(2, 5), 3), atol=1e-6, rtol=0)
    found[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("dim", "width"), [(8, 4), (4, 6)], ids=["narrower", "wider than the states"])
def test_centre_and_projection_are_mean_and_principal_components(dim: int, width: int) -> None:
    tokens = torch.randn(200, dim) * torch.arange(1, dim + 1) + 1
    module = TokenVectors(dim, width)
    module.fit(tokens)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(module.mean_D, unit.mean(0))
    centred = unit - unit.mean(0)
    _, _, components = torch.linalg.svd(centred, full_matrices=False)
    kept_variance = (centred @ components[:width].T).var(0)
    found = module.project(centred)[:, :dim].var(0)
    torch.testing.assert_close(found[:width], kept_variance)
    assert not module.project(centred)[:, dim:].any(), "there are no more components than numbers"


def literal_maxsim(query: list[Vector], passage: list[Vector]) -> float:
    query, passage = ([row for row in rows if any(row)] for rows in (query, passage))
    cosines = [[sum(a * b for a, b in zip(q, p, strict=True)) for p in passage] for q in query]
    return sum(map(max, cosines)) / len(query)


def test_maxsim_is_the_mean_of_the_best_cosines_and_empty_vectors_do_not_count() -> None:
    query = torch.nn.functional.normalize(torch.randn(3, 4, 5), dim=-1)
    passage = torch.nn.functional.normalize(torch.randn(3, 2, 6, 5), dim=-1)
    query[1, 2:], query[2, 1:] = 0, 0
    passage[0, 1, 1:], passage[1, 0, 3:] = 0, 0
    passage[2, :, :5] = -query[2, 0]  # a negative cosine is better than that of an empty vector
    passage[2, :, 5:] = 0
    found = maxsim(query, passage)
    for q, k in itertools.product(range(3), range(2)):
        expected = literal_maxsim(query[q].tolist(), passage[q, k].tolist())
        assert found[q, k].item() == pytest.approx(expected, abs=1e-6)


def test_gradients_are_finite_beside_empty_vectors() -> None:
    """Training sees short passages in every batch: a root at 0 would make all weights NaN."""
    query = torch.nn.functional.normalize(torch.randn(1, 2, 4), dim=-1)
    passage = torch.randn(1, 3, 5, 4)
    passage[0, 1, 2:] = 0
    passage.requires_grad_()
    maxsim(query, passage).sum().backward()
    assert passage.grad is not None and passage.grad.isfinite().all() and passage.grad.any()


def test_texts_without_vectors_have_a_finite_maxsim() -> None:
    query, passage = torch.zeros(2, 3, 4), torch.zeros(2, 2, 5, 4)
    query[1, 0, 0] = passage[0, :, 0, 0] = passage[1, 0, 0, 1] = 1
    found = maxsim(query, passage)
    assert found[0].tolist() == [0.0, 0.0], "a query without vectors does not tell passages apart"
    assert found[1, 1] < -1 < found[1, 0], "a passage without vectors is the last"


def test_a_corpus_of_one_word_leaves_the_projection_as_it_is(tiny_bert: Path) -> None:
    """The covariance of one token state is not defined: vectors of NaN would find nothing."""
    student = Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen"))
    before = student.token_vectors.project.weight.clone()
    fit_to_corpus(student, ["word"])
    assert torch.equal(student.token_vectors.project.weight, before)
    assert student.encode(["a word"], "document").passage_features_BH.isfinite().all()


# the sizes of both


def test_fitting_to_a_corpus_divides_the_bytes_of_a_passage(tiny_bert: Path) -> None:
    passages = [" ".join(f"{word}" for word in range(n)) for n in (3, 5, 8, 8, 8, 9, 9, 9, 10, 60)]

    def layout(**options: Any) -> Layout:
        student = Student.create(StudentConfig(backbone=str(tiny_bert), tuning="frozen", **options))
        fit_to_corpus(student, passages)
        found = student.iem.layouts[1]
        assert found == student.config.layouts()[1] and found.bytes <= student.config.feature_bytes
        return found

    words = math.ceil(10 + (0.95 * 9 - 8) * (60 - 10))
    whole = layout()
    assert (whole.projection, whole.words, whole.dim) == (64, words, 48), "as many words as 95 % of passages have"
    assert whole.vectors == (1024 - 66 - 3 * words) // 24, "and vectors in the bytes that are left"
    assert layout(feature_dim=0).vectors == (1024 - 3 * words) // 24
    small = layout(feature_bytes=160)
    assert (small.words, small.vectors) == ((160 - 66) // 2 // 3, 2), "words have at most half of the bytes"
    assert (layout(vectors=0).words, layout(vectors=0).vectors) == (words, 0)
    assert (layout(lexical_slots=0).words, layout(lexical_slots=0).vectors) == (0, (1024 - 66) // 24)
    assert (layout(lexical_slots=7, vectors=5).words, layout(lexical_slots=7, vectors=5).vectors) == (7, 5)
    assert (layout(feature_bytes=67).words, layout(feature_bytes=67).vectors) == (0, 0), "no room for any"


@pytest.mark.parametrize(
    ("options", "size"),
    [({"feature_dim": 2000}, 2002), ({"vectors": 40}, 1026), ({"lexical_slots": 96, "feature_bytes": 300}, 354)],
)
def test_features_that_exceed_the_bytes_of_a_passage_are_refused(options: dict[str, Any], size: int) -> None:
    most = options.get("feature_bytes", 1024)
    with pytest.raises(
        ArgumentError, match=rf"vectors take {size} bytes, feature_bytes is {most}: lower them, or raise"
    ):
        StudentConfig(backbone="b", **options)
    with pytest.raises(ArgumentError, match="vector_dim must be even, found 5"):
        StudentConfig(backbone="b", vector_dim=5)


def test_of_places_that_are_exactly_alike_the_earlier_ones_are_cut() -> None:
    """The rows of a static table repeat, and each runtime rounds their similarity in its own way."""
    pair_2d = torch.nn.functional.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    rows_1Ld = pair_2d.repeat(20, 1)[None]
    found_4d = pool_parts(rows_1Ld, torch.ones(1, 40), 4, earlier_first=True)[0]
    rest_d = torch.nn.functional.normalize(rows_1Ld[0, 3:].sum(0), dim=-1)
    torch.testing.assert_close(found_4d, torch.stack([*rows_1Ld[0, :3], rest_d]))

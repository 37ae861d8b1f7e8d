"""The score of a pair against a loop over its parts, in torch and in the exported graph."""

from itertools import product
from typing import get_args

import pytest
import torch
from test_features import Vector, literal_maxsim
from test_student import literal_mlp
from torch import Tensor
from torch.nn.functional import normalize

from d2llm.export.graphs import IEMGraph
from d2llm.features import Layout
from d2llm.heads import Start
from d2llm.iem import IEM, SCALED, Inputs
from d2llm.types import PARTS

Q, K, D = 3, 4, 6
SIZES = [sizes for sizes in product((0, 5), (0, 3), (0, 4)) if any(sizes)]


def layouts(projection: int, vectors: int, words: int) -> tuple[Layout, Layout]:
    """A query has other numbers of vectors and words than a passage."""
    dim = 4 if vectors else 0
    return Layout(projection, vectors and 2, dim, words and 3), Layout(projection, vectors, dim, words)


def random_features(layout: Layout, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pooled states, vectors, names (few, so that texts share some) and weights of texts."""
    names = torch.stack([torch.randperm(6)[: layout.words] for _ in range(torch.Size(shape).numel())])
    return (
        torch.randn(*shape, D),
        normalize(torch.randn(*shape, layout.vectors, layout.dim), dim=-1),
        names.view(*shape, layout.words) + 300 * names.view(*shape, layout.words),
        torch.rand(*shape, layout.words),
    )


def columns(project: torch.nn.Module | None, states: Tensor, vectors: Tensor, names: Tensor, weights: Tensor) -> Tensor:
    """The features as a student writes them."""
    first = states[..., :0] if project is None else project(states)
    return torch.cat([first, vectors.flatten(-2), names // 256, names % 256, weights], dim=-1)


def made(inputs: Inputs, projection: int, vectors: int, words: int, start: Start = "mean") -> IEM:
    """An IEM none of whose weights is at its start."""
    iem = IEM(D, *layouts(projection, vectors, words), start=start, inputs=inputs)
    with torch.no_grad():
        for parameter in iem.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return iem


def literal_words(query: dict[int, float], passage: dict[int, float]) -> float:
    return sum(weight * passage[name] for name, weight in query.items() if name in passage)


@pytest.mark.parametrize("start", ["mean", "paper"])
@pytest.mark.parametrize("inputs", get_args(Inputs))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_score_is_the_sum_of_its_parts_times_the_scales_of_the_branch(
    sizes: tuple[int, int, int], inputs: Inputs, start: Start
) -> None:
    iem = made(inputs, *sizes, start=start)
    query, passage = random_features(iem.layouts[0], Q), random_features(iem.layouts[1], Q, K)
    cosine, tasks = torch.rand(Q, K), [0, 1, 1]
    features = columns(iem.query, *query), columns(iem.passage, *passage)
    parts = iem.parts(*features, cosine, torch.tensor(tasks))
    scores = iem(*features, cosine, torch.tensor(tasks))
    projection, vectors, words = sizes
    present = {"cosine": start == "mean", "words": words, "vectors": vectors, "mlp": projection}
    assert iem.part_names == tuple(name for name in PARTS if present[name])
    assert parts.shape == (Q, K, len(iem.part_names))
    for q, k in product(range(Q), range(K)):
        terms: list[float] = []
        for name in iem.part_names:
            if name == "cosine":
                value = cosine[q, k].item()
            elif name == "words":
                named = [dict(zip(of[2].tolist(), of[3].tolist(), strict=True)) for of in (
                    [part[q] for part in query], [part[q, k] for part in passage])]  # fmt: skip
                value = literal_words(*named)
            elif name == "vectors":
                value = literal_maxsim(query[1][q].tolist(), passage[1][q, k].tolist())
            else:
                value = literal_mlp(iem, query[0][q].tolist(), passage[0][q, k].tolist(), tasks[q])
            assert parts[q, k, len(terms)].item() == pytest.approx(value, abs=1e-4), name
            terms.append(value)
        weights: Vector = [1.0 if n == "mlp" else iem.scales[tasks[q], SCALED.index(n)].item() for n in iem.part_names]
        expected = sum(weight * term for weight, term in zip(weights, terms, strict=True))
        assert scores[q, k].item() == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(iem.weights(torch.tensor(tasks))[0].tolist()[-1:], [1.0] if projection else
                               [iem.scales[0, SCALED.index(iem.part_names[-1])].item()])  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_graph_scores_what_packing_leaves_of_the_features(sizes: tuple[int, int, int]) -> None:
    iem = made("comparison", *sizes)
    query, passage = random_features(iem.layouts[0], Q), random_features(iem.layouts[1], Q, K)
    features, cosine, tasks = columns(iem.passage, *passage), torch.rand(Q, K), torch.tensor([1, 0, 1])
    exact = iem.parts(columns(iem.query, *query), features, cosine, tasks)
    found = IEMGraph(iem)(columns(iem.query, *query), iem.layouts[1].pack(features), cosine, tasks)
    torch.testing.assert_close(found, exact, atol=0.12, rtol=0.02)
    if sizes[2]:
        assert exact[..., iem.part_names.index("words")].any(), "no texts share a word: the test shows nothing"


def test_reset_leaves_the_scaled_cosine_of_both_branches() -> None:
    iem = made("comparison", 5, 3, 4)
    query, passage = random_features(iem.layouts[0], 2), random_features(iem.layouts[1], 2, K)
    features, cosine, tasks = (columns(iem.query, *query), columns(iem.passage, *passage)), torch.rand(2, K), [0, 1]
    iem.reset()
    found = iem(*features, cosine, torch.tensor(tasks))
    torch.testing.assert_close(found, iem.scales[:, :1] * cosine)

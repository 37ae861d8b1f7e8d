"""Each loss against its formula in plain floats, its gradient against finite differences, and its edges."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2llm.train import losses

Rows = list[list[float]]


def literal_ci(z: Rows, s: Rows, positive: list[list[bool]], temperature: float, with_positive: bool) -> float:
    """-1/|D+| sum_j log( exp(s_j z_j / t) / (sum_k exp((1 - s_k) z_k / t) [+ the numerator]) ), mean over queries."""
    total = 0.0
    for z_i, s_i, positive_i in zip(z, s, positive, strict=True):
        negatives = sum(
            math.exp((1 - s_ik) * z_ik / temperature)
            for z_ik, s_ik, is_positive in zip(z_i, s_i, positive_i, strict=True)
            if not is_positive
        )
        loss = 0.0
        for z_ij, s_ij, is_positive in zip(z_i, s_i, positive_i, strict=True):
            if is_positive:
                numerator = math.exp(s_ij * z_ij / temperature)
                loss -= math.log(numerator / (negatives + (numerator if with_positive else 0.0)))
        total += loss / sum(positive_i)
    return total / len(z)


def literal_ph(z: Rows, t: Rows) -> float:
    """1 - corr(z, t), mean over queries."""
    total = 0.0
    for z_i, t_i in zip(z, t, strict=True):
        mean_z, mean_t = sum(z_i) / len(z_i), sum(t_i) / len(t_i)
        covariance = sum((a - mean_z) * (b - mean_t) for a, b in zip(z_i, t_i, strict=True))
        variance_z, variance_t = sum((a - mean_z) ** 2 for a in z_i), sum((b - mean_t) ** 2 for b in t_i)
        total += 1 - covariance / math.sqrt(variance_z * variance_t)
    return total / len(z)


def literal_hi(hard_z: Rows, easy_z: Rows, hard_s: Rows, easy_s: Rows) -> float:
    """-1/(J I) sum_jk max(s_j - s_k, 0) log sigmoid(z_j - z_k), mean over queries."""
    total = 0.0
    for z_j, z_k, s_j, s_k in zip(hard_z, easy_z, hard_s, easy_s, strict=True):
        for j in range(len(z_j)):
            for k in range(len(z_k)):
                weight = max(s_j[j] - s_k[k], 0.0)
                total -= weight * math.log(1 / (1 + math.exp(-(z_j[j] - z_k[k])))) / (len(z_j) * len(z_k))
    return total / len(hard_z)


def literal_hi_by_ndcg(hard_z: Rows, easy_z: Rows, hard_s: Rows, easy_s: Rows) -> float:
    """The same with lambda_jk times | 1 / log2(1 + rank_j) - 1 / log2(1 + rank_k) |, ranks by the student's scores."""
    total = 0.0
    for z_j, z_k, s_j, s_k in zip(hard_z, easy_z, hard_s, easy_s, strict=True):
        order = sorted([*z_j, *z_k], reverse=True)
        for j in range(len(z_j)):
            for k in range(len(z_k)):
                rank_j, rank_k = order.index(z_j[j]) + 1, order.index(z_k[k]) + 1
                change = abs(1 / math.log2(1 + rank_j) - 1 / math.log2(1 + rank_k))
                weight = max(s_j[j] - s_k[k], 0.0) * change
                total -= weight * math.log(1 / (1 + math.exp(-(z_j[j] - z_k[k])))) / (len(z_j) * len(z_k))
    return total / len(hard_z)


def literal_cross_entropy(z: list[float], y: list[float]) -> float:
    """-(y log p + (1 - y) log(1 - p)) with p = sigmoid(z), mean over pairs."""
    p = [1 / (1 + math.exp(-value)) for value in z]
    return -sum(math.log(a) if b else math.log(1 - a) for a, b in zip(p, y, strict=True)) / len(z)


def literal_margin_mse(z: Rows, t: Rows) -> float:
    """mean over queries and negatives k of ((z_0 - z_k) - (t_0 - t_k))^2."""
    squares = [
        ((z_i[0] - z_i[k]) - (t_i[0] - t_i[k])) ** 2 for z_i, t_i in zip(z, t, strict=True) for k in range(1, len(z_i))
    ]
    return sum(squares) / len(squares)


def literal_cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def literal_fi(student: list[Rows], teacher: list[Rows]) -> float:
    """|| r_T - r_S || over the cosines of all pairs of a query's candidates, mean over queries."""
    total = 0.0
    for y, t in zip(student, teacher, strict=True):
        squares = 0.0
        for j in range(len(y)):
            for k in range(len(y)):
                squares += (literal_cosine(t[j], t[k]) - literal_cosine(y[j], y[k])) ** 2
        total += math.sqrt(squares)
    return total / len(student)


def literal_listwise(z: Rows, t: Rows) -> float:
    """sum_k p_k log(p_k / q_k), p and q the softmax of teacher and student, mean over queries."""
    total = 0.0
    for z_i, t_i in zip(z, t, strict=True):
        p = [math.exp(value) / sum(map(math.exp, t_i)) for value in t_i]
        q = [math.exp(value) / sum(map(math.exp, z_i)) for value in z_i]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(z)


def literal_recall(cosine: Rows, positive: list[list[bool]], temperature: float) -> float:
    """-1/|D+| sum_j log( e_j / (e_j + sum of e over the negatives) ), mean over queries."""
    total = 0.0
    for row, positive_row in zip(cosine, positive, strict=True):
        e = [math.exp(value / temperature) for value in row]
        negatives = sum(value for value, is_positive in zip(e, positive_row, strict=True) if not is_positive)
        chosen = [value for value, is_positive in zip(e, positive_row, strict=True) if is_positive]
        total -= sum(math.log(value / (value + negatives)) for value in chosen) / len(chosen)
    return total / len(cosine)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


POSITIVE = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
Z, LOG_ODDS = random(3, 5), random(3, 5, seed=1)
S = LOG_ODDS.sigmoid()
HARD_Z, EASY_Z = random(3, 4, seed=2), random(3, 2, seed=3)
HARD_S, EASY_S = random(3, 4, seed=4).sigmoid(), random(3, 2, seed=5).sigmoid()
FEATURES, TEACHER_FEATURES = random(3, 4, 6, seed=6), random(3, 4, 9, seed=7)


@pytest.mark.parametrize("with_positive", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_contrastive_imitation_is_its_formula(temperature: float, with_positive: bool) -> None:
    found = losses.contrastive_imitation(
        Z, S, POSITIVE, temperature=temperature, positive_in_denominator=with_positive
    ).item()
    assert found == pytest.approx(
        literal_ci(Z.tolist(), S.tolist(), POSITIVE.tolist(), temperature, with_positive), abs=1e-10
    )


def test_rank_imitation_ph_is_its_formula() -> None:
    found = losses.rank_imitation_ph(Z, LOG_ODDS).item()
    assert found == pytest.approx(literal_ph(Z.tolist(), LOG_ODDS.tolist()), abs=1e-10)


def test_rank_imitation_hi_is_its_formula() -> None:
    found = losses.rank_imitation_hi(HARD_Z, EASY_Z, HARD_S, EASY_S).item()
    expected = literal_hi(HARD_Z.tolist(), EASY_Z.tolist(), HARD_S.tolist(), EASY_S.tolist())
    assert found == pytest.approx(expected, abs=1e-10)
    assert expected > 0


def test_rank_imitation_hi_by_ndcg_is_its_formula() -> None:
    found = losses.rank_imitation_hi(HARD_Z, EASY_Z, HARD_S, EASY_S, weight="ndcg").item()
    expected = literal_hi_by_ndcg(HARD_Z.tolist(), EASY_Z.tolist(), HARD_S.tolist(), EASY_S.tolist())
    assert found == pytest.approx(expected, abs=1e-10)
    assert 0 < expected < losses.rank_imitation_hi(HARD_Z, EASY_Z, HARD_S, EASY_S).item()


def test_feature_imitation_is_its_formula() -> None:
    found = losses.feature_imitation(FEATURES, TEACHER_FEATURES).item()
    assert found == pytest.approx(literal_fi(FEATURES.tolist(), TEACHER_FEATURES.tolist()), abs=1e-10)
    # Of a single query the authors' form is the square of the printed one, over the number of cosines.
    for row in (slice(0, 1), slice(1, 2)):
        pair = FEATURES[row], TEACHER_FEATURES[row]
        squared = losses.feature_imitation(*pair, squared=True).item()
        assert squared == pytest.approx(losses.feature_imitation(*pair).item() ** 2 / 16)


def test_margin_mse_is_its_formula() -> None:
    assert losses.margin_mse(Z, LOG_ODDS).item() == pytest.approx(literal_margin_mse(Z.tolist(), LOG_ODDS.tolist()))
    assert losses.margin_mse(LOG_ODDS + 3, LOG_ODDS).item() == pytest.approx(0), "only margins count"
    alone = Z[:, :1].clone().requires_grad_()
    losses.margin_mse(alone, LOG_ODDS[:, :1]).backward()
    assert alone.grad is not None and not alone.grad.any()


def test_listwise_imitation_is_its_formula() -> None:
    found = losses.listwise_imitation(Z, LOG_ODDS).item()
    assert found == pytest.approx(literal_listwise(Z.tolist(), LOG_ODDS.tolist()), abs=1e-10)
    shifted = losses.listwise_imitation(Z + torch.tensor([[5.0], [-3.0], [0.0]]), LOG_ODDS).item()
    assert shifted == pytest.approx(found), "only differences of scores count"
    assert losses.listwise_imitation(LOG_ODDS + 2, LOG_ODDS).item() == pytest.approx(0, abs=1e-12)


def test_recall_contrastive_is_its_formula() -> None:
    cosine = Z.tanh()
    found = losses.recall_contrastive(cosine, POSITIVE, temperature=0.2).item()
    assert found == pytest.approx(literal_recall(cosine.tolist(), POSITIVE.tolist(), 0.2), abs=1e-10)


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (lambda z: losses.contrastive_imitation(z, S, POSITIVE), [Z]),
        (lambda z: losses.contrastive_imitation(z, S, POSITIVE, positive_in_denominator=False), [Z]),
        (lambda z: losses.rank_imitation_ph(z, LOG_ODDS), [Z]),
        (lambda hard, easy: losses.rank_imitation_hi(hard, easy, HARD_S, EASY_S), [HARD_Z, EASY_Z]),
        (lambda hard, easy: losses.rank_imitation_hi(hard, easy, HARD_S, EASY_S, weight="ndcg"), [HARD_Z, EASY_Z]),
        (lambda y: losses.feature_imitation(y, TEACHER_FEATURES), [FEATURES]),
        (lambda y: losses.feature_imitation(y, TEACHER_FEATURES, squared=True), [FEATURES]),
        (lambda z: losses.margin_mse(z, LOG_ODDS), [Z]),
        (lambda z: losses.listwise_imitation(z, LOG_ODDS), [Z]),
        (lambda cosine: losses.recall_contrastive(cosine, POSITIVE, temperature=0.5), [Z]),
    ],
    ids=["ci", "ci as printed", "ph", "hi", "hi ndcg", "fi", "fi squared", "margin-mse", "listwise", "recall"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    assert torch.autograd.gradcheck(loss, [value.clone().requires_grad_() for value in inputs])


@pytest.mark.parametrize("one", [slice(0, 1), slice(1, 2)])
def test_a_batch_counts_each_query_once(one: slice) -> None:
    """The loss of a batch is the mean of the losses of its queries, so a batch of one is that query's loss."""
    rows = [slice(i, i + 1) for i in range(3)]
    for loss, inputs in (
        (losses.contrastive_imitation, (Z, S, POSITIVE)),
        (losses.rank_imitation_ph, (Z, LOG_ODDS)),
        (losses.rank_imitation_hi, (HARD_Z, EASY_Z, HARD_S, EASY_S)),
        (losses.feature_imitation, (FEATURES, TEACHER_FEATURES)),
        (losses.margin_mse, (Z, LOG_ODDS)),
        (losses.listwise_imitation, (Z, LOG_ODDS)),
        (losses.recall_contrastive, (Z.tanh(), POSITIVE)),
    ):
        apply: Callable[..., Tensor] = loss
        alone = [apply(*(value[row] for value in inputs)).item() for row in rows]
        assert apply(*inputs).item() == pytest.approx(sum(alone) / 3, abs=1e-12)
        assert apply(*(value[one] for value in inputs)).shape == ()


# contrastive imitation


def test_ci_with_the_positive_is_never_negative_and_as_printed_can_be() -> None:
    z, s = torch.tensor([[5.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    positive = torch.tensor([[True, False]])
    assert losses.contrastive_imitation(z, s, positive) > 0
    assert losses.contrastive_imitation(z, s, positive, positive_in_denominator=False) < 0


def test_ci_mutes_a_negative_that_the_teacher_is_sure_is_none() -> None:
    positive = torch.tensor([[True, False, False]])
    z = torch.zeros(1, 3, requires_grad=True)
    losses.contrastive_imitation(z, torch.tensor([[1.0, 1.0, 0.0]]), positive).backward()
    assert z.grad is not None
    assert z.grad[0, 1] == 0 and z.grad[0, 2] > 0 and z.grad[0, 0] < 0


@pytest.mark.parametrize("with_positive", [True, False])
def test_ci_is_finite_at_teacher_probabilities_of_zero_and_one(with_positive: bool) -> None:
    z = (torch.tensor([[30.0, -30.0, 200.0, -200.0]])).requires_grad_()
    s, positive = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[True, True, False, False]])
    loss = losses.contrastive_imitation(z, s, positive, positive_in_denominator=with_positive)
    loss.backward()
    # numerators e^0 and e^-30, denominators e^200 + e^0 (+ the numerator): 200 and 230 to any digit
    assert loss.item() == pytest.approx(215.0)
    assert z.grad is not None and z.grad.isfinite().all()


def test_ci_of_positives_alone_is_zero() -> None:
    z = torch.tensor([[3.0, -2.0]], requires_grad=True)
    loss = losses.contrastive_imitation(z, torch.full((1, 2), 0.5), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and z.grad is not None and not z.grad.any()


# rank imitation


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_ph_of_a_constant_row_is_one_and_gives_no_gradient(side: str) -> None:
    for level in (0.0, 0.1, -7.3):
        constant, other = torch.full((1, 3), level), torch.tensor([[-2.0, 0.5, 3.0]])
        z = (other if side == "teacher" else constant).clone().requires_grad_()
        loss = losses.rank_imitation_ph(z, other if side == "student" else constant)
        loss.backward()
        assert loss == 1
        assert z.grad is not None and not z.grad.any()


def test_ph_of_a_constant_row_leaves_the_others_alone() -> None:
    z = torch.cat([Z[:1], torch.full((1, 5), 0.1, dtype=torch.float64)]).requires_grad_()
    loss = losses.rank_imitation_ph(z, LOG_ODDS[:2])
    loss.backward()
    assert loss.item() == pytest.approx((literal_ph(Z[:1].tolist(), LOG_ODDS[:1].tolist()) + 1) / 2)
    assert z.grad is not None and z.grad[0].abs().max() > 0


def test_ph_sees_neither_scale_nor_shift() -> None:
    assert losses.rank_imitation_ph(3 * LOG_ODDS - 7, LOG_ODDS).item() == pytest.approx(0, abs=1e-12)
    assert losses.rank_imitation_ph(-LOG_ODDS, LOG_ODDS).item() == pytest.approx(2)


@pytest.mark.parametrize(("hard", "easy"), [(0, 3), (3, 0), (0, 0)])
def test_hi_without_hard_or_in_batch_negatives_is_zero_and_backward_runs(hard: int, easy: int) -> None:
    z_hard, z_easy = (torch.zeros(2, n, requires_grad=True) for n in (hard, easy))
    loss = losses.rank_imitation_hi(z_hard, z_easy, torch.ones(2, hard), torch.ones(2, easy))
    loss.backward()
    assert loss == 0
    assert z_hard.grad is None or not z_hard.grad.any()


def test_hi_asks_nothing_where_the_teacher_prefers_the_in_batch_negative() -> None:
    z = torch.tensor([[-4.0]], requires_grad=True)
    loss = losses.rank_imitation_hi(z, torch.tensor([[4.0]]), torch.tensor([[0.2]]), torch.tensor([[0.9]]))
    loss.backward()
    assert loss == 0 and z.grad is not None and not z.grad.any()


def test_hi_is_finite_at_extreme_scores() -> None:
    z = torch.tensor([[-1e4]], requires_grad=True)
    loss = losses.rank_imitation_hi(z, torch.tensor([[1e4]]), torch.ones(1, 1), torch.zeros(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert z.grad is not None and z.grad.item() == pytest.approx(-1)


# labelled pairs


def test_the_cross_entropy_is_its_formula_and_finite_at_extreme_scores() -> None:
    z, y = [0.3, -1.2, 2.0, -0.1], [1.0, 0.0, 0.0, 1.0]
    assert losses.cross_entropy(torch.tensor(z), torch.tensor(y)).item() == pytest.approx(literal_cross_entropy(z, y))
    extreme = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = losses.cross_entropy(extreme, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert extreme.grad is not None and extreme.grad.tolist() == pytest.approx([-0.5, 0.5])


# feature imitation


def test_fi_with_a_row_of_zeros_is_its_formula_and_gives_it_no_gradient() -> None:
    """The rows come out of a ReLU; a row may be zero throughout, and must not blow up the step."""
    before = FEATURES.clone()
    before[0, 1] = -before[0, 1].abs()
    before.requires_grad_()
    features = before.relu()
    loss = losses.feature_imitation(features, TEACHER_FEATURES)
    loss.backward()
    assert not features[0, 1].any()
    assert loss.item() == pytest.approx(literal_fi(features.tolist(), TEACHER_FEATURES.tolist()), abs=1e-10)
    assert before.grad is not None and before.grad.isfinite().all()
    assert not before.grad[0, 1].any() and before.grad[0, 0].any()


def test_fi_is_zero_with_a_finite_gradient_when_the_cosines_agree() -> None:
    features = FEATURES.clone().requires_grad_()
    loss = losses.feature_imitation(features, 5 * FEATURES)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert features.grad is not None and features.grad.isfinite().all()


# recall


def test_two_positives_do_not_push_each_other() -> None:
    positive = torch.tensor([[True, True, False]])
    for cosine in (torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[0.9, 0.8, 0.7]])):
        cosine.requires_grad_()
        losses.recall_contrastive(cosine, positive, temperature=0.1).backward()
        assert cosine.grad is not None
        assert (cosine.grad[0, :2] < 0).all() and cosine.grad[0, 2] > 0
    alone, both = (torch.tensor([[0.5, second, 0.0]], requires_grad=True) for second in (0.1, 0.9))
    for cosine in (alone, both):
        losses.recall_contrastive(cosine, positive, temperature=0.1).backward()
    assert alone.grad is not None and both.grad is not None
    assert alone.grad[0, 0] == both.grad[0, 0], "where the other positive stands must not matter"

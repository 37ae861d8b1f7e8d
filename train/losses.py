"""The losses as pure functions from tensors to a scalar, with the names of the paper (section 3.4).

B queries, K candidates of a query (the positive and its hard negatives), N passages of a batch, J hard and I in-batch
negatives, H student feature width, T teacher feature width. In formulas, `z` is a student score and `s` the teacher's
probability of "yes". The log-odds are the logit of `s`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from d2llm.errors import D2LLMError

EPSILON = 1e-8


class DivergedError(D2LLMError, FloatingPointError):
    """A loss is NaN or infinite, so that nothing can be learned from it."""


def total(terms: Mapping[str, Tensor], step: int) -> Tensor:
    """The sum of a step's terms.

    Raises:
        DivergedError: the sum is not finite. The error names the step and each term.
    """
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        values = ", ".join(f"{name} {value.item():g}" for name, value in terms.items())
        raise DivergedError(f"the loss is {loss.item()} at step {step} ({values}): lower the learning rates")
    return loss


def contrastive_imitation(
    scores_BK: Tensor,
    teacher_BK: Tensor,
    positive_BK: Tensor,
    *,
    temperature: float = 1.0,
    positive_in_denominator: bool = True,
) -> Tensor:
    """CI: contrastive learning with weights from the teacher, which mute likely false negatives.

    `-1/|D+| sum_j log( exp(s_j z_j / t) / sum_k exp((1 - s_k) z_k / t) )` over positives j and negatives k. As printed
    (`positive_in_denominator=False`), the denominator holds the negatives alone and the loss can fall below zero. The
    authors' code adds the positive. `positive_BK` is boolean. Each row needs a positive, and in the printed form also a
    negative.
    """
    weighted_BK = torch.where(positive_BK, teacher_BK, 1 - teacher_BK) * scores_BK / temperature
    negatives_BK = weighted_BK.masked_fill(positive_BK, torch.finfo(weighted_BK.dtype).min)
    negatives_B1 = negatives_BK.logsumexp(-1, keepdim=True)
    denominator_BK = torch.logaddexp(weighted_BK, negatives_B1) if positive_in_denominator else negatives_B1
    losses_BK = (denominator_BK - weighted_BK).masked_fill(~positive_BK, 0.0)
    return (losses_BK.sum(-1) / positive_BK.sum(-1)).mean()


def rank_imitation_ph(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """RI_PH: one minus the Pearson correlation of student and teacher over a query's positive and hard negatives.

    `teacher_BK` are log-odds, because probabilities near 0 tie and lose their order. If either side of a row is
    constant, the row has no correlation: it counts as 1 and gives no gradient.
    """
    student_BK = scores_BK - scores_BK.mean(-1, keepdim=True)
    target_BK = teacher_BK - teacher_BK.mean(-1, keepdim=True)
    covariance_B = (student_BK * target_BK).sum(-1)
    constant_B = _constant(scores_BK) | _constant(teacher_BK)
    spread_B = (student_BK.pow(2).sum(-1) * target_BK.pow(2).sum(-1)).clamp(min=EPSILON**2).sqrt()
    return (1 - (covariance_B / spread_B).masked_fill(constant_B, 0.0)).mean()


def _constant(rows_BK: Tensor) -> Tensor:
    return rows_BK.amax(-1) == rows_BK.amin(-1)


def rank_imitation_hi(
    hard_scores_BJ: Tensor,
    easy_scores_BI: Tensor,
    hard_teacher_BJ: Tensor,
    easy_teacher_BI: Tensor,
    *,
    weight: Literal["probability", "ndcg"] = "probability",
) -> Tensor:
    """RI_HI: a hard negative should score above an in-batch negative if the teacher scores it higher.

    `-1/(J I) sum_jk lambda_jk log sigmoid(z_j - z_k)`. The paper says that lambda is "based on NDCG" and prints no
    formula. The authors' code has `max(s_j - s_k, 0)` on probabilities (`probability`). `ndcg` is LambdaRank: the same
    gain times the difference of the discounts `1 / log2(1 + rank)` of j and k, with ranks in the student's order of all
    J + I negatives. The loss is zero without hard or in-batch negatives.
    """
    if not hard_scores_BJ.numel() or not easy_scores_BI.numel():
        return hard_scores_BJ.sum() * 0.0
    weight_BJI = (hard_teacher_BJ.unsqueeze(-1) - easy_teacher_BI.unsqueeze(-2)).clamp(min=0)
    if weight == "ndcg":
        scores_BN = torch.cat([hard_scores_BJ, easy_scores_BI], dim=-1).detach()
        ranks_BN = scores_BN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
        hard_BJ, easy_BI = (1 / (1 + ranks_BN).to(scores_BN.dtype).log2()).split(
            [hard_scores_BJ.shape[1], easy_scores_BI.shape[1]], dim=-1
        )
        weight_BJI = weight_BJI * (hard_BJ.unsqueeze(-1) - easy_BI.unsqueeze(-2)).abs()
    difference_BJI = hard_scores_BJ.unsqueeze(-1) - easy_scores_BI.unsqueeze(-2)
    return -(weight_BJI * F.logsigmoid(difference_BJI)).mean()


def feature_imitation(features_BKH: Tensor, teacher_features_BKT: Tensor, *, squared: bool = False) -> Tensor:
    """FI: the cosines among the features of a query's candidates should be the same in student and teacher.

    The loss is the mean Frobenius norm of the difference of both K x K matrices, as printed. `squared` is the mean
    square instead, as in the authors' code. A row of zeros (possible after a ReLU) has cosine 0 with all others.
    """
    difference_BKK = cosines(features_BKH) - cosines(teacher_features_BKT)
    if squared:
        return difference_BKK.pow(2).mean()
    return difference_BKK.pow(2).sum((-2, -1)).clamp(min=EPSILON**2).sqrt().mean()


def cosines(features_BKH: Tensor) -> Tensor:
    """Cosine matrix [B, K, K] among the K features of each query."""
    unit_BKH = F.normalize(features_BKH, dim=-1, eps=EPSILON)
    return unit_BKH @ unit_BKH.transpose(-1, -2)


def listwise_imitation(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """KL divergence between the softmax of teacher and student over a query's candidates. Not in the paper.

    `teacher_BK` are log-odds. RI_PH asks for order and spacing up to scale; this loss asks for the distribution, above
    all for its top. Unlike CI, it does not change when a constant is added to all scores of a query.
    """
    return F.kl_div(scores_BK.log_softmax(-1), teacher_BK.log_softmax(-1), reduction="batchmean", log_target=True)


def cross_entropy(scores_N: Tensor, labels_N: Tensor) -> Tensor:
    """Binary cross-entropy of labelled pairs: `-mean(y log sigmoid(z) + (1 - y) log(1 - sigmoid(z)))`.

    `labels_N` are 1 and 0. The scores become log-odds of the label. Not in the paper, whose RI_PH suits graded scores.
    """
    return F.binary_cross_entropy_with_logits(scores_N, labels_N)


def ranknet(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """RankNet (Burges et al. 2005): where the teacher ranks i above j, `-log sigmoid(z_i - z_j)`. Not in the paper.

    It is the mean over these pairs in a row, and then over the rows. It asks for the teacher's order alone, so the
    teacher may have any scale. A row without an order counts as 0.
    """
    above_BKK = (teacher_BK.unsqueeze(-1) > teacher_BK.unsqueeze(-2)).to(scores_BK.dtype)
    difference_BKK = scores_BK.unsqueeze(-1) - scores_BK.unsqueeze(-2)
    pairs_B = above_BKK.sum((-2, -1)).clamp(min=1)
    return (-(above_BKK * F.logsigmoid(difference_BKK)).sum((-2, -1)) / pairs_B).mean()


def margin_mse(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Margin-MSE (arXiv 2010.02666): the positive's margin over each negative should be the teacher's.

    The positive comes first, and `teacher_BK` are log-odds. With a single candidate the loss is 0.
    """
    difference_BK = scores_BK - teacher_BK
    return (difference_BK[:, :1] - difference_BK[:, 1:]).pow(2).sum() / max(1, difference_BK[:, 1:].numel())


def recall_contrastive(cosine_BN: Tensor, positive_BN: Tensor, *, temperature: float = 0.05) -> Tensor:
    """The recall loss: InfoNCE on the cosines of each query with all passages of the batch.

    Each positive competes with the negatives alone, so that other positives are not pushed away. `positive_BN` is
    boolean with at least one positive in each row.
    """
    logits_BN = cosine_BN / temperature
    negatives_B1 = logits_BN.masked_fill(positive_BN, torch.finfo(logits_BN.dtype).min).logsumexp(-1, keepdim=True)
    losses_BN = (torch.logaddexp(logits_BN, negatives_B1) - logits_BN).masked_fill(~positive_BN, 0.0)
    return (losses_BN.sum(-1) / positive_BN.sum(-1)).mean()


def vector_alignment(vectors_BE: Tensor, wanted_BE: Tensor) -> Tensor:
    """Mean squared distance between two encoders' recall vectors of the same queries (LEAF, arXiv 2509.12539).

    For unit vectors this is 2 - 2 cosine, so a loss on the cosine would be the same.
    """
    return (vectors_BE - wanted_BE).pow(2).sum(-1).mean()


def feature_alignment(features_BF: Tensor, wanted_BF: Tensor) -> Tensor:
    """Mean squared difference of two encoders' query features, divided by the mean square of `wanted_BF`."""
    return (features_BF - wanted_BF).pow(2).mean() / wanted_BF.pow(2).mean().clamp(min=EPSILON)


def embedding_kl(vectors_BE: Tensor, wanted_BE: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KALE (arXiv 2304.01016): `T^2 KL(softmax(wanted / T) || softmax(vectors / T))`, the softmax over coordinates.

    A softmax does not change when a constant is added to all coordinates, but inner products with passages do. So the
    squared mean shift is added: the loss is zero only for equal vectors.
    """
    divergence = F.kl_div(
        (vectors_BE / temperature).log_softmax(-1),
        (wanted_BE / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    shift_B = vectors_BE.mean(-1) - wanted_BE.mean(-1)
    return temperature**2 * divergence + vectors_BE.shape[-1] * shift_B.pow(2).mean()

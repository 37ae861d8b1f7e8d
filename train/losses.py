"""The losses, pure: tensors in, a scalar out. Named as the paper names them (section 3.4).

B queries, K candidates of a query (the positive and its hard negatives), N passages of a batch, J hard and I in-batch
negatives, H student feature width, T teacher feature width. `z` is a student score, `s` the teacher's probability of
"yes", `log-odds` the teacher's logit of it.
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
    """A loss that is NaN or infinite: there is nothing to learn from it."""


def total(terms: Mapping[str, Tensor], step: int) -> Tensor:
    """The sum of a step's terms.

    Raises:
        DivergedError: it is not finite; names the step and each term.
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
    """CI: contrastive learning weighted by the teacher, so that a likely false negative is muted.

    `-1/|D+| sum_j log( exp(s_j z_j / t) / sum_k exp((1 - s_k) z_k / t) )` over positives j and negatives k. As printed
    (`positive_in_denominator=False`) the denominator holds the negatives alone and the loss can fall below zero; the
    authors' code adds the positive. `positive_BK` is boolean; each row has a positive, and a negative if as printed.
    """
    weighted_BK = torch.where(positive_BK, teacher_BK, 1 - teacher_BK) * scores_BK / temperature
    negatives_BK = weighted_BK.masked_fill(positive_BK, torch.finfo(weighted_BK.dtype).min)
    negatives_B1 = negatives_BK.logsumexp(-1, keepdim=True)
    denominator_BK = torch.logaddexp(weighted_BK, negatives_B1) if positive_in_denominator else negatives_B1
    losses_BK = (denominator_BK - weighted_BK).masked_fill(~positive_BK, 0.0)
    return (losses_BK.sum(-1) / positive_BK.sum(-1)).mean()


def rank_imitation_ph(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """RI_PH: one minus the Pearson correlation of student and teacher over a query's positive and hard negatives.

    `teacher_BK` are log-odds: probabilities near 0 all tie, and their order would be lost. A row in which either side
    is constant has no correlation; it counts as 1 and gives no gradient.
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
    """RI_HI: a hard negative should score above an in-batch one where the teacher says so.

    `-1/(J I) sum_jk lambda_jk log sigmoid(z_j - z_k)`. The paper says that lambda is "based on NDCG" and prints no
    more; the authors' code has `max(s_j - s_k, 0)` on probabilities (`probability`). `ndcg` is LambdaRank's: that gain
    times the difference of the discounts `1 / log2(1 + rank)` which j and k have in the student's present order of all
    J + I negatives. Zero without hard or in-batch negatives.
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
    """FI: the cosines among a query's candidates, student's pair features against the teacher's: mean Frobenius norm.

    Unsquared, as printed; `squared` gives the authors' code's mean square over the K x K cosines. A feature row of
    zeros (possible after a ReLU) has cosine 0 with every other.
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
    """Ours, not the paper's: KL divergence from the teacher's softmax over a query's candidates to the student's.

    `teacher_BK` are log-odds. Where RI_PH asks for the order and spacing of scores up to scale, this asks for the
    distribution itself, and most of all for its top. Independent of what is added to all scores of a query, which CI,
    multiplying scores by probabilities, is not.
    """
    return F.kl_div(scores_BK.log_softmax(-1), teacher_BK.log_softmax(-1), reduction="batchmean", log_target=True)


def margin_mse(scores_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Margin-MSE (arXiv 2010.02666): the positive's margin over each negative should be the teacher's.

    The positive stands first; `teacher_BK` are log-odds. Of a single candidate there is no margin and the loss is 0.
    """
    difference_BK = scores_BK - teacher_BK
    return (difference_BK[:, :1] - difference_BK[:, 1:]).pow(2).sum() / max(1, difference_BK[:, 1:].numel())


def recall_contrastive(cosine_BN: Tensor, positive_BN: Tensor, *, temperature: float = 0.05) -> Tensor:
    """The recall loss: InfoNCE on cosines over a query's candidates and all others of the batch.

    Each positive competes with the negatives alone, so that a second positive is not pushed away. `positive_BN` is
    boolean with at least one positive a row.
    """
    logits_BN = cosine_BN / temperature
    negatives_B1 = logits_BN.masked_fill(positive_BN, torch.finfo(logits_BN.dtype).min).logsumexp(-1, keepdim=True)
    losses_BN = (torch.logaddexp(logits_BN, negatives_B1) - logits_BN).masked_fill(~positive_BN, 0.0)
    return (losses_BN.sum(-1) / positive_BN.sum(-1)).mean()


def vector_alignment(vectors_BE: Tensor, wanted_BE: Tensor) -> Tensor:
    """Mean squared distance between two encoders' recall vectors of the same queries (LEAF, arXiv 2509.12539).

    Of unit vectors it is 2 - 2 cosine, so that the cosine's loss is the same.
    """
    return (vectors_BE - wanted_BE).pow(2).sum(-1).mean()


def feature_alignment(features_BF: Tensor, wanted_BF: Tensor) -> Tensor:
    """Mean squared difference of two encoders' query features, in units of the mean square of those wanted."""
    return (features_BF - wanted_BF).pow(2).mean() / wanted_BF.pow(2).mean().clamp(min=EPSILON)


def embedding_kl(vectors_BE: Tensor, wanted_BE: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KALE (arXiv 2304.01016): `T^2 KL(softmax(wanted / T) || softmax(vectors / T))`, the softmax over coordinates.

    It does not see what is added to all coordinates of a vector, which changes every inner product with a passage: the
    squared distance along that one direction is added, so that it is zero for equal vectors alone.
    """
    divergence = F.kl_div(
        (vectors_BE / temperature).log_softmax(-1),
        (wanted_BE / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    shift_B = vectors_BE.mean(-1) - wanted_BE.mean(-1)
    return temperature**2 * divergence + vectors_BE.shape[-1] * shift_B.pow(2).mean()

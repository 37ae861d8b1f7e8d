"""The modules that a student adds to its backbone, in torch: PMA pooling, word slots and the IEM.

Dimensions: B texts of a batch, L tokens, D backbone width, F width of the IEM's projections, S word slots, H = F + 2 S
width of the features, V vocabulary, Q queries, K candidates of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.errors import ArgumentError

Start = Literal["mean", "paper"]
PMAStart = Literal["mean", "paper", "cls", "last", "weighted_mean"]
"""What the PMA is before training: a kind of `Pooling`, or the paper's random start."""
Weightless = Literal["mean", "last", "cls", "weighted_mean", "max"]
"""The kinds of pooling that have no weights (see `Pooling`)."""
RecallHeadKind = Literal["linear", "affine", "tanh"]
ALL_ATTENTION = 30.0
"""Logit that gives a token all attention: 2^17 other tokens with logit 0 get 1e-8 of it together."""


class PMA(nn.Module):
    """Pooling by multi-head attention with one learned query (paper section 3.2, after the Set Transformer).

    The pooled vector of token states Y with query q is `out = LN(h + FFN(h))`, where `h = LN(MHA(q, Y, Y) + q)`.

    `start="paper"` follows these formulas and initializes at random. The other starts make `out` what `Pooling` of this
    kind computes, until training changes it. They drop both LNs and start with a zero query, an identity value
    projection and a zero last FFN layer. The attention logits get a prior that depends on a token's position alone and
    is not trained:

    - `mean`: 0.
    - `weighted_mean`: the log of the position, counted from 1.
    - `cls`, `last`: a large number for the first or the last token, and 0 for the others. It is so large that training
      changes the value projection and the FFN long before it changes the attention.

    Example:
        >>> import torch
        >>> from d2llm.heads import PMA
        >>> tokens_BLD = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> mask_BL = torch.tensor([[1, 1, 0]])
        >>> PMA(dim=2, start="mean")(tokens_BLD, mask_BL).tolist()
        [[2.0, 3.0]]
        >>> PMA(dim=2, start="last")(tokens_BLD, mask_BL).tolist()
        [[3.0, 4.0]]

    Raises:
        ArgumentError: `dim` is not divisible by `heads`.
    """

    def __init__(self, dim: int, heads: int = 1, start: PMAStart = "mean") -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError(
                f"the backbone's width {dim} is not divisible into {heads} PMA heads: choose a divisor of {dim}"
            )
        self.heads, self.start = heads, start
        self.seed = nn.Parameter(torch.zeros(dim))
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_attention: nn.Module = nn.Identity()
        self.norm_out: nn.Module = nn.Identity()
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if start == "paper":
            nn.init.normal_(self.seed, std=dim**-0.5)
            self.norm_attention, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        else:
            nn.init.eye_(self.value.weight)
            last = nn.Linear(dim, dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.ffn = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool token states [B, L, D] to [B, D]. Tokens whose mask is 0 have no influence, even if they hold NaN."""
        batch, _, dim = tokens_BLD.shape
        tokens_BLD = tokens_BLD.masked_fill(mask_BL.unsqueeze(-1) == 0, 0.0)  # 0 * NaN would be NaN
        # With one query, no key or value per token is needed. Logits are q (K y) = (q K) y, and the value projection is
        # applied after the weighted sum. The bias of the keys shifts all logits alike, which softmax ignores.
        query_Nd = self.query(self.seed).view(self.heads, -1) * (dim // self.heads) ** -0.5
        query_key_ND = (query_Nd.unsqueeze(1) @ self.key.weight.view(self.heads, -1, dim)).squeeze(1)
        logits_BNL = query_key_ND @ tokens_BLD.transpose(1, 2)
        if self.start not in ("mean", "paper"):
            logits_BNL = logits_BNL + self._prior(mask_BL).unsqueeze(1).to(logits_BNL.dtype)
        logits_BNL = logits_BNL.masked_fill(mask_BL.unsqueeze(1) == 0, torch.finfo(logits_BNL.dtype).min)
        mixed_BND = logits_BNL.softmax(-1) @ tokens_BLD
        value_NDd = self.value.weight.view(self.heads, -1, dim).transpose(1, 2)
        pooled_NBd = mixed_BND.transpose(0, 1) @ value_NDd
        pooled_BD = pooled_NBd.transpose(0, 1).reshape(batch, dim) + self.value.bias
        hidden_BD = self.norm_attention(pooled_BD + self.seed)
        out: Tensor = self.norm_out(hidden_BD + self.ffn(hidden_BD))
        return out

    def _prior(self, mask_BL: Tensor) -> Tensor:
        """Return what the start adds to the logits [B, L] of the unmasked tokens, float32. Padding may be on the left
        or on the right."""
        position_BL = mask_BL.cumsum(-1).clamp(min=1)
        count_B1 = position_BL[:, -1:]
        if self.start == "weighted_mean":  # softmax ignores the division, which keeps fp16 logits small and precise
            return (position_BL / count_B1).log()
        return ALL_ATTENTION * (position_BL == (1 if self.start == "cls" else count_B1)).float()


class Pooling(nn.Module):
    """Pooling without weights, for the paper's ablations of PMA and for embedders that pool by `max`.

    - `mean`: the mean of the token states.
    - `last`: the last token, the EOS of a causal LM.
    - `cls`: the first token.
    - `weighted_mean`: the mean in which the first token counts once, the second twice, and so on.
    - `max`: the largest value of each number of the token states.

    Example:
        >>> import torch
        >>> from d2llm.heads import Pooling
        >>> tokens_BLD = torch.tensor([[[1.0, 8.0], [4.0, 2.0], [9.0, 9.0]]])
        >>> mask_BL = torch.tensor([[1, 1, 0]])
        >>> Pooling("weighted_mean")(tokens_BLD, mask_BL).tolist(), Pooling("max")(tokens_BLD, mask_BL).tolist()
        ([[3.0, 4.0]], [[4.0, 8.0]])
    """

    def __init__(self, kind: Weightless) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool token states [B, L, D] to [B, D]. Tokens whose mask is 0 have no influence."""
        if self.kind in ("last", "cls"):
            rank_L = torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)
            chosen_B = (mask_BL * (rank_L if self.kind == "last" else rank_L.flip(0))).argmax(-1)
            chosen_B1D = chosen_B.view(-1, 1, 1).expand(-1, 1, tokens_BLD.shape[-1])
            return tokens_BLD.gather(1, chosen_B1D).squeeze(1)  # not by arange(B): tracing would fix B
        mask_BL1 = mask_BL.unsqueeze(-1)
        if self.kind == "max":
            return tokens_BLD.masked_fill(mask_BL1 == 0, torch.finfo(tokens_BLD.dtype).min).amax(1)
        count_B1 = mask_BL1.sum(1).clamp(min=1)
        tokens_BLD = tokens_BLD.masked_fill(mask_BL1 == 0, 0.0)
        if self.kind == "mean":
            return tokens_BLD.sum(1) / count_B1
        # Places are divided by their number first: fp16 has no number for the sum of 362 places or more.
        weight_BL1 = (mask_BL.cumsum(-1) * mask_BL / count_B1).unsqueeze(-1)
        return (tokens_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)


class RecallHead(nn.Linear):
    """The layer from the pooled vector [B, D] to the recall vector [B, E], before it is normalized.

    `linear` has no bias, `affine` has one, and `tanh` is `affine` with a tanh after it. The weight starts orthogonal:
    no untrained projection keeps angles better.
    """

    def __init__(self, dim: int, embedding_dim: int, kind: RecallHeadKind = "linear") -> None:
        super().__init__(dim, embedding_dim, bias=kind != "linear")
        self.kind = kind
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, pooled_BD: Tensor) -> Tensor:
        """Return the recall vectors [B, E], of any length."""
        mapped_BE = super().forward(pooled_BD)
        return mapped_BE.tanh() if self.kind == "tanh" else mapped_BE


class WordSlots(nn.Module):
    """Lexical features of a text: 2 S numbers that say which important tokens it contains.

    Pooled vectors blur exact words; an LLM that reads query and passage together sees them. Word slots give them to the
    IEM, as a densified lexical representation (Lin and Lin, arXiv 2112.04666 and 2206.09912):

    - Token t belongs to slot `t mod S` and has the name `t div S + 1` in it.
    - Each slot stores the weight and the name of the heaviest token that the text has in this slot.
    - Two texts share a token if their names in a slot are equal. Their lexical score is the sum of the weight products
      over these slots (a gated inner product).

    The weight of a token is `sqrt(idf)`, so a shared token adds its idf to the score. Names are at most 2048: fp16
    represents integers exactly up to there.

    Example:
        >>> import torch
        >>> from d2llm.heads import WordSlots
        >>> slots = WordSlots(vocabulary=6, slots=2)
        >>> slots.fit([[0, 2, 3], [0, 1, 4]], special=[0])
        >>> features_BS = slots(torch.tensor([[0, 2, 3]]), torch.tensor([[1, 1, 1]]))
        >>> weights_BS, names_BS = features_BS.split(2, dim=-1)
        >>> names_BS.tolist()
        [[2.0, 2.0]]

    Raises:
        ArgumentError: `slots` is too small for the vocabulary.
    """

    weight_V: Tensor
    name_V: Tensor

    def __init__(self, vocabulary: int, slots: int) -> None:
        super().__init__()
        if vocabulary > 2048 * slots:
            raise ArgumentError(
                f"lexical_slots = {slots} is too few for a vocabulary of {vocabulary} tokens: at least "
                f"{-(-vocabulary // 2048)}, or 0 for no word slots"
            )
        self.slots = slots
        self.register_buffer("weight_V", torch.zeros(vocabulary))
        name_V = (torch.arange(vocabulary) // slots + 1).float()
        self.register_buffer("name_V", name_V, persistent=False)

    def fit(self, documents: Iterable[Sequence[int]], special: Iterable[int]) -> None:
        """Set the token weights from document frequencies in `documents`, lists of token ids. `special` tokens get
        weight 0."""
        frequency_V, count = torch.zeros_like(self.weight_V, device="cpu"), 0
        for ids in documents:
            frequency_V[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
            count += 1
        idf_V = torch.log1p((count - frequency_V + 0.5) / (frequency_V + 0.5))
        idf_V[torch.tensor(list(special), dtype=torch.long)] = 0.0
        self.weight_V.copy_(idf_V.sqrt())

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the features [B, 2 S]: the weights of all slots, then the names. An empty slot holds zeros."""
        # One lookup for weights and names, and fmod, which needs no case for negative numbers: each node of the graph
        # costs noticeable time for a short query.
        table_V2 = torch.stack([self.weight_V, self.name_V], dim=-1)
        weight_BL, name_BL = F.embedding(ids_BL, table_V2).unbind(-1)
        weight_BL = weight_BL * mask_BL
        slot_BL = ids_BL.fmod(self.slots)
        empty_BS = weight_BL.new_zeros(ids_BL.shape[0], self.slots)  # not len(): tracing would fix it
        heaviest_BS = empty_BS.scatter_reduce(1, slot_BL, weight_BL, "amax")
        is_heaviest_BL = (weight_BL == heaviest_BS.gather(1, slot_BL)) & (weight_BL > 0)
        names_BS = empty_BS.scatter_reduce(1, slot_BL, torch.where(is_heaviest_BL, name_BL, 0.0), "amax")
        return torch.cat([heaviest_BS, names_BS], dim=-1)


class IEM(nn.Module):
    """Interaction emulation module (paper section 3.3): scores pairs of a query and a passage from their features.

    The paper's f1 applies a linear layer to the concatenation `[q; p]`. This layer is the sum of `u_q = W_q q`
    (`query`) and `u_p = W_p p + b` (`passage`), so the features `u_p` of a passage are computed once, when it is
    indexed. Per pair, the IEM computes `ReLU(u_q + u_p)`, then f2 and an output layer. f2 has a branch for symmetric
    and a branch for asymmetric pairs; both share f1 and the output layer.

    With `start="mean"` the score is `scale * cosine` plus a correction that starts at zero: before training, rescoring
    ranks as recall does. With `slots`, the features end in the features of `WordSlots`, and the score adds their gated
    inner product times `lexical_scale`, a learned number for each branch.

    Example:
        >>> import torch
        >>> from d2llm.heads import IEM
        >>> iem = IEM(dim=4, feature_dim=8, start="mean")
        >>> query_features_QH = iem.query(torch.ones(1, 4))
        >>> passage_features_QKH = iem.passage(torch.ones(1, 3, 4))
        >>> cosines_QK = torch.tensor([[0.75, 0.5, 0.25]])
        >>> asymmetric = torch.tensor([1])
        >>> iem(query_features_QH, passage_features_QKH, cosines_QK, asymmetric).tolist()
        [[15.0, 10.0, 5.0]]
    """

    def __init__(
        self, dim: int, feature_dim: int, *, start: Start = "mean", product: bool = True, slots: int = 0
    ) -> None:
        super().__init__()
        self.width, self.slots = feature_dim, slots
        self.lexical_scale = nn.Parameter(torch.zeros(2)) if slots else None
        self.query = nn.Linear(dim, feature_dim, bias=False)
        self.passage = nn.Linear(dim, feature_dim)
        self.product = product
        width = 2 * feature_dim if product else feature_dim
        self.symmetric, self.asymmetric = nn.Linear(width, feature_dim), nn.Linear(width, feature_dim)
        self.out = nn.Linear(feature_dim, 1)
        for layer in (self.query, self.passage, self.symmetric, self.asymmetric, self.out):
            nn.init.xavier_uniform_(layer.weight)
        self.scale = nn.Parameter(torch.tensor(20.0)) if start == "mean" else None
        if start == "mean":
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def interact(self, query_features_QH: Tensor, passage_features_QKH: Tensor, task_Q: Tensor) -> Tensor:
        """Return the features [Q, K, F] of the pairs before the output layer. Feature imitation compares them with the
        teacher's."""
        query_Q1F = query_features_QH[:, None, : self.width]
        passage_QKF = passage_features_QKH[..., : self.width]
        hidden = F.relu(query_Q1F + passage_QKF)
        if self.product:
            hidden = torch.cat([hidden, query_Q1F * passage_QKF], dim=-1)
        # Choose each query's branch before the product, so the other branch is not computed.
        weight_QHF = torch.stack([self.symmetric.weight, self.asymmetric.weight])[task_Q]
        bias_QH = torch.stack([self.symmetric.bias, self.asymmetric.bias])[task_Q]
        return F.relu(hidden @ weight_QHF.transpose(1, 2) + bias_QH.unsqueeze(1))

    def matches(self, query_features_QH: Tensor, passage_features_QKH: Tensor) -> Tensor:
        """Return the lexical scores [Q, K]: the gated inner product of the word slots, the sum of the shared tokens'
        idf."""
        query_weight_Q1S, query_name_Q1S = query_features_QH[:, None, self.width :].split(self.slots, dim=-1)
        weight_QKS, name_QKS = passage_features_QKH[..., self.width :].split(self.slots, dim=-1)
        return torch.where(query_name_Q1S == name_QKS, query_weight_Q1S * weight_QKS, 0.0).sum(-1)

    @torch.no_grad()
    def drop_correction(self) -> None:
        """Reset the score to the scaled cosine by setting the correction and the lexical scales to zero."""
        self.out.weight.zero_()
        self.out.bias.zero_()
        if self.lexical_scale is not None:
            self.lexical_scale.zero_()

    def forward(
        self, query_features_QH: Tensor, passage_features_QKH: Tensor, recall_score_QK: Tensor, task_Q: Tensor
    ) -> Tensor:
        """Return the scores [Q, K] of Q queries with K candidates each.

        `recall_score_QK` are cosines. `task_Q` int64 chooses the branch of each query: 0 symmetric, 1 asymmetric.
        """
        score_QK: Tensor = self.out(self.interact(query_features_QH, passage_features_QKH, task_Q)).squeeze(-1)
        if self.lexical_scale is not None:
            matches_QK = self.matches(query_features_QH, passage_features_QKH)
            score_QK = score_QK + self.lexical_scale[task_Q].unsqueeze(-1) * matches_QK
        if self.scale is not None:
            score_QK = score_QK + self.scale * recall_score_QK
        else:
            score_QK = score_QK + 0.0 * recall_score_QK  # keeps `recall_score` an input of the exported graph
        return score_QK

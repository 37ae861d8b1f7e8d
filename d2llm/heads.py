"""Pooling and recall head of a student, in torch.

Dimensions: B texts of a batch, L tokens, D backbone width, E width of the recall vector.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

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

"""What the student adds to a backbone: PMA pooling, word slots and the IEM. In torch.

B batch, L tokens, D backbone width, H feature width, S word slots, Q queries, K candidates of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.errors import ArgumentError

Start = Literal["mean", "paper"]


class PMA(nn.Module):
    """Pooling by multi-head attention with one learned query (paper section 3.2, after the Set Transformer).

    `h = LN(MHA(q, Y, Y) + q)`, `out = LN(h + FFN(h))`. With `start="paper"` as printed. With `start="mean"` there is no
    LN, q is zero (attention is uniform), values pass unchanged and the FFN's last layer is zero: `out` is the mean of
    the unmasked token states until training moves it.
    """

    def __init__(self, dim: int, heads: int = 1, start: Start = "mean") -> None:
        super().__init__()
        if dim % heads:
            raise ArgumentError(f"the backbone's width {dim} is not divisible into {heads} PMA heads")
        self.heads = heads
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
        """Pool token states to [B, D]; positions where `mask_BL` is 0 have no influence, whatever they hold."""
        batch, _, dim = tokens_BLD.shape
        tokens_BLD = tokens_BLD.masked_fill(mask_BL.unsqueeze(-1) == 0, 0.0)  # 0 * NaN would be NaN
        # There is one query, so no token needs a key or a value of its own: q (K y) = (q K) y, and values are made of
        # the mixture. What the keys' bias adds is the same for all tokens, and softmax does not see it.
        query_Nd = self.query(self.seed).view(self.heads, -1) * (dim // self.heads) ** -0.5
        lens_ND = (query_Nd.unsqueeze(1) @ self.key.weight.view(self.heads, -1, dim)).squeeze(1)
        logits_BNL = lens_ND @ tokens_BLD.transpose(1, 2)
        logits_BNL = logits_BNL.masked_fill(mask_BL.unsqueeze(1) == 0, torch.finfo(logits_BNL.dtype).min)
        mixed_BND = logits_BNL.softmax(-1) @ tokens_BLD
        value_NDd = self.value.weight.view(self.heads, -1, dim).transpose(1, 2)
        pooled_NBd = mixed_BND.transpose(0, 1) @ value_NDd
        pooled_BD = pooled_NBd.transpose(0, 1).reshape(batch, dim) + self.value.bias
        hidden_BD = self.norm_attention(pooled_BD + self.seed)
        out: Tensor = self.norm_out(hidden_BD + self.ffn(hidden_BD))
        return out


class Pooling(nn.Module):
    """The paper's ablations of PMA: the mean of the token states, or the state of the last token (EOS)."""

    def __init__(self, kind: Literal["mean", "last"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Pool token states to [B, D]."""
        if self.kind == "last":
            last_B = (mask_BL * torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)).argmax(-1)
            return tokens_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        mask_BL1 = mask_BL.unsqueeze(-1)
        return tokens_BLD.masked_fill(mask_BL1 == 0, 0.0).sum(1) / mask_BL1.sum(1).clamp(min=1)


class WordSlots(nn.Module):
    """The words of a text in 2 S numbers: what pooled vectors blur and an LLM that reads both texts at once does not.

    A densified lexical representation (Lin and Lin, arXiv 2112.04666 and 2206.09912): the vocabulary is cut into S
    slots, token t going to slot `t mod S`, and each slot keeps the heaviest of the text's tokens: its weight and its
    name `t div S + 1`. Two texts share a token where the names in a slot are equal; their lexical score is the sum of
    weight products over those slots, a gated inner product. Weights are `sqrt(idf)`, so that a match counts its idf.
    Names stay at or below 2048, which fp16 holds exactly.
    """

    weight_V: Tensor
    name_V: Tensor

    def __init__(self, vocabulary: int, slots: int) -> None:
        super().__init__()
        if vocabulary > 2048 * slots:
            raise ArgumentError(
                f"lexical_slots = {slots} is too few for a vocabulary of {vocabulary} tokens: at least "
                f"{-(-vocabulary // 2048)}, or 0 to leave them out"
            )
        self.slots = slots
        self.register_buffer("weight_V", torch.zeros(vocabulary))
        name_V = (torch.arange(vocabulary) // slots + 1).float()
        self.register_buffer("name_V", name_V, persistent=False)

    def fit(self, documents: Iterable[Sequence[int]], special: Iterable[int]) -> None:
        """Set the weights from the document frequencies of tokens; `special` tokens are no words."""
        frequency_V, count = torch.zeros_like(self.weight_V, device="cpu"), 0
        for ids in documents:
            frequency_V[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
            count += 1
        idf_V = torch.log1p((count - frequency_V + 0.5) / (frequency_V + 0.5))
        idf_V[torch.tensor(list(special), dtype=torch.long)] = 0.0
        self.weight_V.copy_(idf_V.sqrt())

    def forward(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Weights and names [B, 2 S] of the tokens kept; an empty slot holds zeros."""
        # One lookup for both, and no remainder of negative numbers: of a short query, each node of the graph counts.
        table_V2 = torch.stack([self.weight_V, self.name_V], dim=-1)
        weight_BL, name_BL = F.embedding(ids_BL, table_V2).unbind(-1)
        weight_BL = weight_BL * mask_BL
        slot_BL = ids_BL.fmod(self.slots)
        empty_BS = weight_BL.new_zeros(ids_BL.shape[0], self.slots)  # not len(): tracing would fix it
        heaviest_BS = empty_BS.scatter_reduce(1, slot_BL, weight_BL, "amax")
        kept_BL = (weight_BL == heaviest_BS.gather(1, slot_BL)) & (weight_BL > 0)
        names_BS = empty_BS.scatter_reduce(1, slot_BL, torch.where(kept_BL, name_BL, 0.0), "amax")
        return torch.cat([heaviest_BS, names_BS], dim=-1)


class IEM(nn.Module):
    """Interaction emulation module (paper section 3.3), split so that passages can be prepared ahead.

    f1's first layer acts on the concatenation `[q; p]`, so it is the sum of `u_q = W_q q` and `u_p = W_p p + b`
    (`query`, `passage`), and the pair's part starts at `ReLU(u_q + u_p)`. `f2` has a branch for symmetric and one for
    asymmetric pairs; f1 and the last layer are shared. With `start="mean"` the score is `scale * cosine` plus a
    correction that starts at zero: rescoring begins as recall and learns what recall lacks. With `slots`, the features
    end in those of `WordSlots`, and `lexical_scale` times their gated inner product is added, one scale a branch.
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
        """The pair's feature [Q, K, F] before the last layer: what feature imitation compares with the teacher's."""
        query_Q1F = query_features_QH[:, None, : self.width]
        passage_QKF = passage_features_QKH[..., : self.width]
        hidden = F.relu(query_Q1F + passage_QKF)
        if self.product:
            hidden = torch.cat([hidden, query_Q1F * passage_QKF], dim=-1)
        # Each query's own branch is taken first, so that the other one costs nothing.
        weight_QHF = torch.stack([self.symmetric.weight, self.asymmetric.weight])[task_Q]
        bias_QH = torch.stack([self.symmetric.bias, self.asymmetric.bias])[task_Q]
        return F.relu(hidden @ weight_QHF.transpose(1, 2) + bias_QH.unsqueeze(1))

    def matches(self, query_features_QH: Tensor, passage_features_QKH: Tensor) -> Tensor:
        """The gated inner product [Q, K] of both sides' words: the idf of those they share."""
        query_weight_Q1S, query_name_Q1S = query_features_QH[:, None, self.width :].split(self.slots, dim=-1)
        weight_QKS, name_QKS = passage_features_QKH[..., self.width :].split(self.slots, dim=-1)
        return torch.where(query_name_Q1S == name_QKS, query_weight_Q1S * weight_QKS, 0.0).sum(-1)

    @torch.no_grad()
    def drop_correction(self) -> None:
        """Make the score the scaled cosine again, as at the start."""
        self.out.weight.zero_()
        self.out.bias.zero_()
        if self.lexical_scale is not None:
            self.lexical_scale.zero_()

    def forward(
        self, query_features_QH: Tensor, passage_features_QKH: Tensor, recall_score_QK: Tensor, task_Q: Tensor
    ) -> Tensor:
        """Scores [Q, K]; `task_Q` int64 chooses each query's branch: 0 symmetric, 1 asymmetric."""
        score_QK: Tensor = self.out(self.interact(query_features_QH, passage_features_QKH, task_Q)).squeeze(-1)
        if self.lexical_scale is not None:
            matches_QK = self.matches(query_features_QH, passage_features_QKH)
            score_QK = score_QK + self.lexical_scale[task_Q].unsqueeze(-1) * matches_QK
        if self.scale is not None:
            score_QK = score_QK + self.scale * recall_score_QK
        else:
            score_QK = score_QK + 0.0 * recall_score_QK  # the graph keeps its input in the paper's form too
        return score_QK

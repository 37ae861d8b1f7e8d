"""The features of a text, from which the IEM scores a pair, and how the features of a passage are packed into bytes.

Dimensions: B texts of a batch, L tokens, D backbone width, F width of the projection, M vectors, d their width, S
words, H columns of the features, P bytes of a packed passage, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.tokens import NAMES

K1, B = 0.9, 0.4
"""Parameters of BM25: how soon repetitions saturate, and how much the length of a passage counts (Lucene's values for
passages)."""
STEPS = 127
"""Largest absolute value of a number of a packed projection."""
VECTOR_STEPS = 7
"""Largest absolute value of a number of a packed vector, which has four bits."""
PEAK_STEPS = 256
"""Steps of 1 in which the largest number of a packed projection is stored, in two bytes."""


class Layout(NamedTuple):
    """The sizes of one side's features. The columns have this order: projection, vectors, words."""

    projection: int
    """F, the width of the projection that the MLP reads; 0 without an MLP."""
    vectors: int
    """M, the number of pooled vectors that MaxSim reads; 0 without MaxSim."""
    dim: int
    """d, the width of each vector."""
    words: int
    """S, the number of words by name; 0 without words."""

    @property
    def learned(self) -> int:
        """Number of columns before the words. The words depend on token ids only, and nothing learns them."""
        return self.projection + self.vectors * self.dim

    @property
    def width(self) -> int:
        """H, the number of columns."""
        return self.learned + 3 * self.words

    @property
    def bytes(self) -> int:
        """P, the size of packed features in bytes. `dim` must be even."""
        return self.projection + (2 if self.projection else 0) + self.vectors * self.dim // 2 + 3 * self.words

    def split(self, features_BH: Tensor) -> Features:
        """Take the columns [..., H] apart."""
        projection, vectors, high, low, weights = features_BH.split(
            [self.projection, self.vectors * self.dim, self.words, self.words, self.words], dim=-1
        )
        return Features(projection, vectors.unflatten(-1, (self.vectors, self.dim)), 256 * high + low, weights)

    def pack(self, features_BH: Tensor) -> Tensor:
        """Pack features [..., H] into bytes, uint8 [..., P].

        Vectors keep their direction alone, in four bits a number. The projection is int8, beside its largest absolute
        value. A word has two bytes for its name and one for its weight, which is at most K1 + 1.
        """
        projection, vectors, names, weights = features_BH.split(
            [self.projection, self.vectors * self.dim, 2 * self.words, self.words], dim=-1
        )
        parts = [names, (weights * (255 / (K1 + 1))).round()]
        if self.vectors:
            quantized, _ = _quantized(vectors.unflatten(-1, (self.vectors, self.dim)), VECTOR_STEPS)
            first, second = quantized.flatten(-2).chunk(2, dim=-1)
            parts.insert(0, 16 * first + second)
        if self.projection:
            quantized, peak = _quantized(projection, STEPS)
            steps = (peak * PEAK_STEPS).round().clamp(max=NAMES - 1)
            high = (steps / 256).floor()
            parts = [quantized, high, steps - 256 * high, *parts]
        return torch.cat(parts, dim=-1).to(torch.uint8)

    def unpack(self, packed_BP: Tensor) -> Features:
        """Read packed features, uint8 [..., P]."""
        peak = 2 if self.projection else 0
        projection, peak_bytes, pairs, high, low, weights = packed_BP.split(
            [self.projection, peak, self.vectors * self.dim // 2, self.words, self.words, self.words], dim=-1
        )
        projection, peak_bytes, pairs, high, low, weights = (
            x.float() for x in (projection, peak_bytes, pairs, high, low, weights)
        )
        if self.projection:
            largest = peak_bytes @ peak_bytes.new_tensor([[256.0], [1.0]]) / (PEAK_STEPS * STEPS)
            projection = (projection - (STEPS + 1)) * largest
        # Runtimes mask and shift bytes slowly, so the upper four bits are found by division.
        upper = (pairs * (1 / 16)).to(torch.uint8).float()
        halves = torch.cat([upper, pairs - 16 * upper], dim=-1) - (VECTOR_STEPS + 1)
        vectors = halves.unflatten(-1, (self.vectors, self.dim))
        return Features(projection, vectors, 256 * high + low, weights * ((K1 + 1) / 255))


class Features(NamedTuple):
    """The features of a batch of texts, taken apart."""

    projection: Tensor
    """[..., F]"""
    vectors: Tensor
    """[..., M, d], of length 1 before they were packed and of any length after, zero where a text has fewer tokens."""
    names: Tensor
    """[..., S], whole numbers below `NAMES`."""
    weights: Tensor
    """[..., S]: BM25's impact of each word in a passage, or its idf times its count in a query. 0 is an empty place."""


def _quantized(rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return rows as whole numbers from 1 to 2 steps + 1, and the largest absolute value of each row."""
    peak = rows.abs().amax(-1, keepdim=True)
    return (rows / peak.clamp(min=1e-6) * steps).round() + steps + 1, peak


class Words(nn.Module):
    """The words of a text by name, so that two texts have a BM25 score of each other (Robertson and Zaragoza, 2009).

    Pooled vectors blur exact words; an LLM that reads query and passage together sees them. BM25 splits into a half of
    the passage and a half of the query: the score of a pair is the sum, over the words that both have, of `impact` in
    the passage times `idf` in the query. `impact = tf (K1 + 1) / (tf + K1 (1 - B + B length / average))`, where `tf`
    counts the word in the passage. A passage keeps the `words` of the largest `impact * idf`.

    A word is a token of the student's tokenizer. Its name is its id, in a high and a low byte: fp16 has no larger whole
    numbers.

    Example:
        >>> import torch
        >>> from d2llm.features import Words
        >>> words = Words(vocabulary=6)
        >>> words.fit([[0, 2, 3], [0, 1, 4]], special=[0])
        >>> high_BS, low_BS, impacts_BS = words.passage(torch.tensor([[0, 2, 3]]), torch.ones(1, 3), 2).split(2, dim=-1)
        >>> low_BS.tolist(), impacts_BS.tolist()
        ([[2.0, 3.0]], [[1.0, 1.0]])
    """

    idf_V: Tensor
    average_length: Tensor

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("idf_V", torch.zeros(vocabulary))
        self.register_buffer("average_length", torch.ones(()))

    def fit(self, documents: Iterable[Sequence[int]], special: Iterable[int]) -> None:
        """Set idf and the average length from `documents`, lists of token ids. `special` tokens are no words."""
        frequency_V, count, length = torch.zeros_like(self.idf_V, device="cpu"), 0, 0
        taboo = set(special)
        for ids in documents:
            words = [id_ for id_ in ids if id_ not in taboo]
            frequency_V[torch.tensor(sorted(set(words)), dtype=torch.long)] += 1
            count, length = count + 1, length + len(words)
        idf_V = torch.log1p((count - frequency_V + 0.5) / (frequency_V + 0.5))
        idf_V[torch.tensor(sorted(taboo), dtype=torch.long)] = 0.0
        self.idf_V.copy_(idf_V)
        self.average_length.fill_(max(1.0, length / max(1, count)))

    def idf(self, ids_BL: Tensor) -> Tensor:
        """Return the idf [B, L] of tokens, 0 for special tokens."""
        return F.embedding(ids_BL, self.idf_V.unsqueeze(-1)).squeeze(-1)

    def passage(self, ids_BL: Tensor, mask_BL: Tensor, words: int) -> Tensor:
        """Return the columns [B, 3 words] of passages: high bytes and low bytes of the names, and the impacts."""
        idf_BL, count_BL, first_BL, length_B1 = self._counted(ids_BL, mask_BL)
        saturation_B1 = K1 * (1 - B + B * length_B1 / self.average_length)
        impact_BL = count_BL * (K1 + 1) / (count_BL + saturation_B1)
        return _heaviest(ids_BL, impact_BL * first_BL, impact_BL * idf_BL * first_BL, words)

    def query(self, ids_BL: Tensor, mask_BL: Tensor, words: int) -> Tensor:
        """Return the columns [B, 3 words] of queries: high bytes and low bytes of the names, and idf times count."""
        idf_BL, count_BL, first_BL, _ = self._counted(ids_BL, mask_BL)
        weight_BL = idf_BL * count_BL * first_BL
        return _heaviest(ids_BL, weight_BL, weight_BL, words)

    def _counted(self, ids_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the idf of each token, its count in the text, 1 where it occurs first, and the length in words."""
        idf_BL = self.idf(ids_BL) * mask_BL
        word_BL = (idf_BL > 0).to(idf_BL.dtype)
        same_BLL = (ids_BL.unsqueeze(1) == ids_BL.unsqueeze(2)).to(idf_BL.dtype) * word_BL.unsqueeze(1)
        place_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        before_LL = (place_L.unsqueeze(0) < place_L.unsqueeze(1)).to(idf_BL.dtype)
        first_BL = ((same_BLL * before_LL).amax(-1) == 0).to(idf_BL.dtype) * word_BL
        return idf_BL, same_BLL.sum(-1), first_BL, word_BL.sum(-1, keepdim=True)


def _heaviest(ids_BL: Tensor, weight_BL: Tensor, order_BL: Tensor, words: int) -> Tensor:
    """Return high bytes, low bytes and weights [B, 3 words] of the words that are the highest in `order_BL`."""
    # Of equals the earlier one is higher, in every runtime.
    order_BL = order_BL * (1 - 1e-6 * torch.arange(ids_BL.shape[1], device=ids_BL.device))
    empty_BS = order_BL.new_zeros(ids_BL.shape[0], words)  # a text may have fewer tokens
    best_BS = torch.cat([order_BL, empty_BS], dim=1).topk(words, dim=1).indices
    weight_BS = torch.cat([weight_BL, empty_BS], dim=1).gather(1, best_BS)
    id_BS = torch.cat([ids_BL, empty_BS.to(ids_BL.dtype)], dim=1).gather(1, best_BS)
    id_BS = torch.where(weight_BS > 0, id_BS, 0) % NAMES
    return torch.cat([(id_BS // 256).to(weight_BS.dtype), (id_BS % 256).to(weight_BS.dtype), weight_BS], dim=-1)


class TokenVectors(nn.Module):
    """Several pooled vectors of a text, for MaxSim between a query and a passage: PMA with several seeds.

    The Set Transformer pools a set into M vectors by M seeds. Here seed m attends to the m-th of M parts of the text
    (see `pool_parts`), and all seeds share one learned attention query. The query starts at zero: until training
    changes it, a vector is the mean of the token states of its part, centred, projected and normalized.

    A text of fewer than M tokens has one vector for each token; the other vectors are zero.

    Example:
        >>> import torch
        >>> from d2llm.features import TokenVectors
        >>> vectors = TokenVectors(dim=4, width=2)
        >>> vectors(torch.randn(1, 7, 4), torch.ones(1, 7), 3).shape
        torch.Size([1, 3, 2])
    """

    mean_D: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.seed = nn.Parameter(torch.zeros(dim))
        self.project = nn.Linear(dim, width, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.register_buffer("mean_D", torch.zeros(dim))

    @torch.no_grad()
    def fit(self, tokens_ND: Tensor) -> None:
        """Set centre and projection from a sample of token states: the mean, and the principal components.

        States of fewer numbers than the vectors have fewer components. The other numbers of the vectors are zero. Fewer
        than two states have no components, and change nothing.
        """
        if len(tokens_ND) < 2:
            return
        unit_ND = F.normalize(tokens_ND.double(), dim=-1)
        self.mean_D.copy_(unit_ND.mean(0))
        _, components_DD = torch.linalg.eigh(torch.cov(unit_ND.T))
        found_dD = components_DD.flip(-1)[:, : self.project.out_features].T
        self.project.weight.zero_()[: len(found_dD)] = found_dD.to(self.project.weight)

    def forward(self, tokens_BLD: Tensor, word_BL: Tensor, vectors: int) -> Tensor:
        """Return vectors [B, vectors, d] of token states [B, L, D]. `word_BL` is 1 for tokens that count, else 0."""
        unit_BLD = F.normalize(tokens_BLD.masked_fill(word_BL.unsqueeze(-1) == 0, 0.0), dim=-1)
        weight_BL = (unit_BLD @ self.seed).exp()
        return pool_parts(self.project(unit_BLD - self.mean_D) * weight_BL.unsqueeze(-1), word_BL, vectors)


def pool_parts(rows_BLd: Tensor, word_BL: Tensor, vectors: int, *, earlier_first: bool = False) -> Tensor:
    """Cut each text into `vectors` parts and return the sum [B, vectors, d] of the rows [B, L, d] of each, normalized.

    The cuts are where two neighbouring rows differ most. Rows whose `word_BL` is 0 do not count. With fewer rows than
    parts, each row is a part of its own, and the parts that are left are zero.

    `earlier_first` cuts at the earlier of two places that are alike. Rows without context need it: repeated words make
    places that are exactly alike, and every runtime rounds them in its own way.
    """
    unit_BLd = F.normalize(rows_BLd, dim=-1, eps=1e-6)
    similar_BL = torch.cat(
        [word_BL.new_zeros(word_BL.shape[0], 1), (unit_BLd[:, 1:] * unit_BLd[:, :-1]).sum(-1)], dim=1
    )
    later_BL = word_BL * (word_BL.cumsum(-1) > 1).to(word_BL.dtype)  # a cut is before one of these words
    length = rows_BLd.shape[1]
    if earlier_first:
        similar_BL = similar_BL + 1e-6 * torch.arange(length, device=similar_BL.device)
    different_BL = (2 - similar_BL) * later_BL
    padded_BL = torch.cat([different_BL, different_BL.new_zeros(different_BL.shape[0], vectors)], dim=1)
    cuts_BM = padded_BL.topk(vectors - 1, dim=1).indices
    cut_BL = torch.zeros_like(padded_BL).scatter(1, cuts_BM, 1.0)[:, :length] * later_BL
    part_BL = cut_BL.cumsum(-1)
    parts_M = torch.arange(vectors, device=part_BL.device).to(part_BL.dtype)
    member_BML = (part_BL.unsqueeze(1) == parts_M.view(1, -1, 1)).to(rows_BLd.dtype) * word_BL.unsqueeze(1)
    return F.normalize(member_BML @ rows_BLd, dim=-1, eps=1e-6)

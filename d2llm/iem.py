"""The interaction emulation module in torch: it scores pairs of a query and a passage from their features.

Dimensions: B texts of a batch, D backbone width, F width of the projections, M vectors of a query, N of a passage, d
their width, S words, H columns of the features, Q queries, K candidates of a query, C parts of the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2llm.features import Features, Layout
from d2llm.heads import Start
from d2llm.tokens import NAMES
from d2llm.types import PARTS, Part, Task, task_id

Inputs = Literal["comparison", "sum"]
SCALED = PARTS[:-1]
"""The parts that have a scale for each branch: all but the MLP, whose last layer is one."""
COSINE_SCALE = 20.0
"""The scale of the cosine before training, the inverse of a usual temperature."""
UNTRAINED: dict[Part, float] = {"cosine": COSINE_SCALE, "words": 0.0125 * COSINE_SCALE, "vectors": 0.5 * COSINE_SCALE}
"""Scales without labels. Of a grid, they are closest to the best scales of four corpora (docs/results.md)."""


class IEM(nn.Module):
    """Interaction emulation module (paper section 3.3): scores pairs of a query and a passage from their features.

    The score is a weighted sum of up to four parts:

    - `cosine`: the cosine of the recall vectors.
    - `words`: BM25 over the words that both texts have (see `Words`).
    - `vectors`: MaxSim, the mean over the query's vectors of the largest cosine with a vector of the passage.
    - `mlp`: the paper's network over two projections of the pooled states, u of the query and v of the passage.

    The features of a passage are computed once, when it is indexed. The MLP has a branch for symmetric and a branch for
    asymmetric pairs, and each branch has its own `scales` of the first three parts. With `inputs="sum"` the first layer
    of the MLP is the paper's f1, a linear layer over the concatenation of both texts: `ReLU(u + v)`. With
    `inputs="comparison"` the MLP reads `[u, v, u * v, |u - v|]`.

    With `start="mean"` the score starts as a scaled cosine: before training, rescoring ranks as recall does. With
    `start="paper"` it is the MLP alone, without scales.

    Example:
        >>> import torch
        >>> from d2llm.features import Layout
        >>> from d2llm.iem import IEM
        >>> layout = Layout(projection=8, vectors=0, dim=0, words=0)
        >>> iem = IEM(dim=4, query=layout, passage=layout)
        >>> query_QH, passage_QKH = iem.query(torch.ones(1, 4)), iem.passage(torch.ones(1, 3, 4))
        >>> cosines_QK = torch.tensor([[0.75, 0.5, 0.25]])
        >>> asymmetric = torch.tensor([1])
        >>> iem(query_QH, passage_QKH, cosines_QK, asymmetric).tolist()
        [[15.0, 10.0, 5.0]]
    """

    def __init__(
        self, dim: int, query: Layout, passage: Layout, *, start: Start = "mean", inputs: Inputs = "comparison"
    ) -> None:
        super().__init__()
        self.start, self.inputs = start, inputs
        self.layouts: tuple[Layout, Layout]
        self.part_names: tuple[Part, ...]
        self.query: nn.Linear | None = None
        self.passage: nn.Linear | None = None
        if width := passage.projection:
            self.query, self.passage = nn.Linear(dim, width, bias=False), nn.Linear(dim, width)
            wide = width if inputs == "sum" else 4 * width
            self.symmetric, self.asymmetric = nn.Linear(wide, width), nn.Linear(wide, width)
            self.out = nn.Linear(width, 1)
            for layer in (self.query, self.passage, self.symmetric, self.asymmetric, self.out):
                nn.init.xavier_uniform_(layer.weight)
            if inputs == "comparison":  # u and v are comparable from the start
                nn.init.zeros_(self.passage.bias)
                self.passage.weight.data.copy_(nn.init.orthogonal_(self.query.weight.data))
            if start == "mean":
                nn.init.zeros_(self.out.weight)
                nn.init.zeros_(self.out.bias)
        self.scales = nn.Parameter(torch.zeros(2, len(SCALED)), requires_grad=start == "mean")
        self.scales.data[:, 0] = COSINE_SCALE
        self.resize(query, passage)

    def resize(self, query: Layout, passage: Layout) -> None:
        """Take over the layouts of other numbers of words and vectors. No weight depends on them."""
        self.layouts = query, passage
        present = {"cosine": self.start == "mean", "words": passage.words, "vectors": passage.vectors}
        self.part_names = (*(name for name in SCALED if present[name]), *(("mlp",) if passage.projection else ()))

    @torch.no_grad()
    def start_untrained(self) -> None:
        """Give the parts of the score of asymmetric pairs the scales `UNTRAINED`."""
        for column, name in enumerate(SCALED):
            self.scales[task_id("asymmetric"), column] = UNTRAINED[name]

    @torch.no_grad()
    def scales_of(self, task: Task) -> dict[str, float]:
        """Return the weight of each part of the score of one task, in the order of `part_names`."""
        weights_1C = self.weights(torch.tensor([task_id(task)], device=self.scales.device))
        return dict(zip(self.part_names, weights_1C[0].tolist(), strict=True))

    @torch.no_grad()
    def set_scales(self, task: Task, scales: Mapping[str, float]) -> None:
        """Set the scales of one task by the name of their part. Other names, such as that of the MLP, are ignored."""
        for column, name in enumerate(SCALED):
            self.scales[task_id(task), column] = scales.get(name, self.scales[task_id(task), column])

    @torch.no_grad()
    def reset(self) -> None:
        """Make the score the scaled cosine again: the other scales and the last layer of the MLP become zero."""
        self.scales[:, 1:] = 0
        if self.query is not None:
            self.out.weight.zero_()
            self.out.bias.zero_()

    def interact(self, query_features_QH: Tensor, passage_features_QKH: Tensor, task_Q: Tensor) -> Tensor:
        """Return the features [Q, K, F] of the pairs before the output layer. Feature imitation compares them with the
        teacher's."""
        query, passage = self.layouts[0].split(query_features_QH), self.layouts[1].split(passage_features_QKH)
        return self._interact(query, passage, task_Q)

    def _interact(self, query: Features, passage: Features, task_Q: Tensor) -> Tensor:
        u_Q1F, v_QKF = query.projection.unsqueeze(1), passage.projection
        # Both branches are computed: a copy of a branch's weights for each query would take more time and memory.
        branches = self.symmetric, self.asymmetric
        weight, bias = torch.cat([b.weight for b in branches]), torch.cat([b.bias for b in branches])
        if self.inputs == "sum":
            both = F.linear(F.relu(u_Q1F + v_QKF), weight, bias)
        else:  # the product with u is computed once for all candidates
            width = u_Q1F.shape[-1]
            rest = torch.cat([v_QKF, u_Q1F * v_QKF, (u_Q1F - v_QKF).abs()], dim=-1)
            both = F.linear(rest, weight[:, width:]) + F.linear(u_Q1F, weight[:, :width], bias)
        symmetric_QKF, asymmetric_QKF = both.chunk(2, dim=-1)
        return F.relu(torch.where(task_Q.view(-1, 1, 1) == 0, symmetric_QKF, asymmetric_QKF))

    def parts(
        self,
        query: Tensor | Features,
        passage: Tensor | Features,
        recall_score_QK: Tensor,
        task_Q: Tensor,
    ) -> Tensor:
        """Return the parts [Q, K, C] of the scores of Q queries with K candidates each, in the order of `part_names`.

        The features `query` [Q, H] and `passage` [Q, K, H] may also be taken apart. `recall_score_QK` are cosines.
        `task_Q` int64 chooses the branch of each query: 0 symmetric, 1 asymmetric.
        """
        query, passage = (
            layout.split(features) if isinstance(features, Tensor) else features
            for layout, features in zip(self.layouts, (query, passage), strict=True)
        )
        columns = []
        for name in self.part_names:
            if name == "cosine":
                columns.append(recall_score_QK)
            elif name == "words":
                columns.append(bm25(query, passage))
            elif name == "vectors":
                columns.append(maxsim(query.vectors, passage.vectors))
            else:
                columns.append(self.out(self._interact(query, passage, task_Q)).squeeze(-1))
        return torch.stack(columns, dim=-1)

    def weights(self, task_Q: Tensor) -> Tensor:
        """Return the weights [Q, C] of the parts: the scales of the branch, and 1 for the MLP."""
        scales_TC = torch.cat([self.scales, torch.ones_like(self.scales[:, :1])], dim=1)
        columns = [PARTS.index(name) for name in self.part_names]
        return scales_TC[task_Q][:, columns]

    def forward(
        self, query_features_QH: Tensor, passage_features_QKH: Tensor, recall_score_QK: Tensor, task_Q: Tensor
    ) -> Tensor:
        """Return the scores [Q, K] of Q queries with K candidates each, from features that are not packed.

        `recall_score_QK` are cosines. `task_Q` int64 chooses the branch of each query: 0 symmetric, 1 asymmetric.
        """
        parts_QKC = self.parts(query_features_QH, passage_features_QKH, recall_score_QK, task_Q)
        scores_QK: Tensor = (parts_QKC * self.weights(task_Q).unsqueeze(1)).sum(-1)
        return scores_QK


def bm25(query: Features, passage: Features) -> Tensor:
    """Return the BM25 scores [Q, K]: the sum of `weight * weight` over the words that query and passage have."""
    # One table of all names for each query: looking a passage's words up in it takes less time than comparing names.
    table_QN = query.weights.new_zeros(query.weights.shape[0], NAMES)
    table_QN = table_QN.scatter_add(1, query.names.long(), query.weights)
    names_QKS = passage.names.long()
    # -1 in place of a number that is known: the exported graph then has no nodes that compute it.
    found_QKS = table_QN.gather(1, names_QKS.flatten(1)).view(names_QKS.shape[0], -1, names_QKS.shape[2])
    scores_QK: Tensor = (found_QKS * passage.weights).sum(-1)
    return scores_QK


def maxsim(query_QMd: Tensor, passage_QKNd: Tensor) -> Tensor:
    """Return the mean over the query's vectors of the largest cosine with one of the passage's vectors, [Q, K].

    The query's vectors are of length 1, the passage's of any length. Vectors of zeros do not count.
    """
    # Products are divided by lengths, since there are fewer of them than numbers in the passages' vectors.
    (queries, _, parts, width), query_vectors = passage_QKNd.shape, query_QMd.shape[1]
    passage_QXd = passage_QKNd.reshape(queries, -1, width)  # -1: see bm25
    squared_QX = (passage_QXd * passage_QXd).sum(-1)
    scale_QX = squared_QX.clamp(min=1e-12).rsqrt()  # the root has no gradient at 0
    empty_QX = (squared_QX == 0).to(scale_QX.dtype)
    cosine_QMX = query_QMd @ passage_QXd.transpose(1, 2) * scale_QX.unsqueeze(1) - 2 * empty_QX.unsqueeze(1)
    best_QMK = cosine_QMX.view(queries, query_vectors, -1, parts).amax(-1)
    counts_QM1 = (query_QMd.abs().amax(-1, keepdim=True) > 0).to(best_QMK.dtype)
    scores_QK: Tensor = (best_QMK * counts_QM1).sum(1) / counts_QM1.sum(1).clamp(min=1)
    return scores_QK

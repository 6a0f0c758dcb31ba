"""How well the centroids of a head foretell in which clusters the target's next token lies.

A head with centroids looks only at the tokens of the clusters that score best. So centroids learn to score a cluster as
the target's probability of its tokens: by cross-entropy, on states that the drafter has anyway. The states get no
gradient of it: centroids adapt to the drafter, and not the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from draftwerk.training.target import FrozenTarget
from draftwerk.training.whole_blocks import fill_block

_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class ClusteredHead:
    """A head with centroids.

    Attributes:
        rows: [draft vocabulary, hidden], the target's embedding of the tokens that can be drafted, cluster by cluster.
        centroids: [clusters, width], float32; these are trained.
        chosen: clusters whose tokens are looked at.
    """

    rows: Tensor
    centroids: Tensor
    chosen: int


class ClusterLoss:
    """Sums over the rows of a batch, as its draft steps come.

    Attributes:
        rows: that were looked at so far.
        recall: sum over them of the target's probability, given that its token can be drafted, that it is in a chosen
            cluster.

    Args:
        target: what centroids learn from.
        head: whose centroids.
        states: [N, hidden], the target's final states at all positions of the batch.
        positions: [n], those of them that are looked at: every one costs a distribution over the draft vocabulary.
    """

    def __init__(self, target: FrozenTarget, head: ClusteredHead, states: Tensor, positions: Tensor) -> None:
        self.rows = 0
        self.recall = 0.0
        self._head = head
        self._cross_entropy = torch.zeros((), device=states.device)
        self._place = torch.full((states.shape[0],), -1, device=states.device)
        self._place[positions] = torch.arange(positions.shape[0], device=states.device)
        clusters = head.centroids.shape[0]
        looked_at = fill_block(positions)
        self._expected = torch.empty(looked_at.shape[0], clusters, device=states.device)
        with torch.no_grad():
            for first in range(0, looked_at.shape[0], _ROWS_AT_ONCE):
                some = looked_at[first : first + _ROWS_AT_ONCE]
                of_tokens = torch.softmax(target.logits(states[some], head.rows).float(), dim=-1)
                of_clusters = of_tokens.view(some.shape[0], clusters, -1).sum(-1)
                self._expected[first : first + some.shape[0]] = of_clusters

    def add(self, states: Tensor, at: Tensor) -> None:
        """Adds the rows of a draft step.

        Args:
            states: [R, width], what the head scores.
            at: [R], the positions whose distributions the rows foretell; others than those above are left out.
        """
        rows = torch.nonzero(self._place[at] >= 0)[:, 0]
        expected = self._expected[self._place[at[rows]]]
        with torch.autocast(states.device.type, enabled=False):
            scores = functional.linear(states[rows].detach().float(), self._head.centroids)
        self.rows += rows.shape[0]
        self.recall += float(expected.gather(1, scores.topk(self._head.chosen, dim=-1).indices).sum())
        self._cross_entropy = self._cross_entropy + functional.cross_entropy(scores, expected, reduction="sum")

    def mean(self) -> Tensor:
        """The cross-entropy of a row, in nats, with a gradient for the centroids alone."""
        return self._cross_entropy / max(1, self.rows)

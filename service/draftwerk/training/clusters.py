"""Clusters of equal size, for a head that scores clusters first and then the tokens of a few.

Rows are split in halves along the direction in which they differ most, and the halves again, down to the clusters. Then
pairs of neighbouring clusters are thrown together and split anew where that brings their rows closer together. A split
is k-means with two means and halves of given size, which makes its assignment a sort.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional

_POWER_ITERATIONS = 8
_MEANS_ITERATIONS = 4
_ROUNDS = 16  # of pairs; more of them gain next to nothing
_NEIGHBOURS = 24  # among which a cluster looks for a partner
_LEAST_GAIN = 1e-5  # of a pair's spread; less is rounding


@torch.no_grad()
def balanced_clusters(rows: Tensor, clusters: int) -> Tensor:
    """An order of rows in which those of each cluster follow each other: a function of the rows alone.

    Args:
        rows: [N, width], of any floating type.
        clusters: divides N.

    Returns:
        [N] int64, a permutation; cluster c is at ``[c * N / clusters, (c + 1) * N / clusters)``, its rows ascending.
    """
    rows = rows.float()
    parts = _halved(rows, clusters).view(clusters, -1)
    tried: set[tuple[int, int]] = set()
    for turn in range(_ROUNDS if parts.shape[1] > 1 else 0):
        pairs = _pairs(rows[parts].mean(1), turn, tried)
        if not pairs:
            break
        improved = _split_anew(rows, parts, torch.tensor(pairs, device=rows.device))
        # A pair that is as it was need not be tried again, until one of both changes.
        tried.update(pair for pair, changed in zip(pairs, improved, strict=True) if not changed)
        touched = {cluster for pair, changed in zip(pairs, improved, strict=True) if changed for cluster in pair}
        tried = {pair for pair in tried if touched.isdisjoint(pair)}
    return parts.sort(-1).values.flatten()


def _halved(rows: Tensor, clusters: int) -> Tensor:
    """The order of the rows after splitting in halves; with an odd number of clusters the first half has one less."""
    size = rows.shape[0] // clusters
    order = torch.arange(rows.shape[0], device=rows.device)
    parts = [(0, clusters)]  # first place in the order, clusters
    while parts:
        alike: dict[int, list[int]] = defaultdict(list)
        for first, count in parts:
            if count > 1:
                alike[count].append(first)
        parts = []
        for count, starts in alike.items():
            low = count // 2
            places = torch.tensor(starts, device=rows.device)[:, None] + torch.arange(count * size, device=rows.device)
            inside = order[places]
            centred = _centred(rows[inside])
            order[places] = inside.gather(1, _split(centred, low * size, _widest(centred)))
            parts += [half for first in starts for half in ((first, low), (first + low * size, count - low))]
    return order


def _pairs(means: Tensor, turn: int, tried: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Clusters with a neighbour each that they were not tried with in vain; everyone is in one pair at most."""
    clusters = means.shape[0]
    distance = torch.cdist(means, means).fill_diagonal_(torch.inf)
    nearest = distance.topk(min(_NEIGHBOURS, clusters - 1), largest=False).indices.tolist() if clusters > 1 else []
    free = set(range(clusters))
    pairs = []
    # Who chooses first is another one in every turn.
    for one in torch.randperm(clusters, generator=torch.Generator().manual_seed(turn)).tolist() if nearest else []:
        for other in nearest[one] if one in free else []:
            pair = (min(one, other), max(one, other))
            if other in free and pair not in tried:
                free -= {one, other}
                pairs.append(pair)
                break
    return pairs


def _split_anew(rows: Tensor, parts: Tensor, pairs: Tensor) -> list[bool]:
    """Splits pairs [P, 2] of ``parts`` again where that is better, in place; for each whether it was."""
    size = parts.shape[1]
    both = parts[pairs].flatten(1)
    centred = _centred(rows[both])
    order = torch.arange(2 * size, device=rows.device).expand_as(both)
    mean = _mean_of_first(centred, order, size)
    # Halves of one size lie the closer together the farther their means are from each other.
    apart = mean.square().sum(-1)
    improved = torch.zeros_like(apart, dtype=torch.bool)
    for start in (mean, _widest(centred)):
        split = _split(centred, size, start)
        anew = _mean_of_first(centred, split, size).square().sum(-1)
        better = anew > apart * (1.0 + _LEAST_GAIN)
        order, apart = torch.where(better[:, None], split, order), torch.where(better, anew, apart)
        improved |= better
    parts[pairs] = both.gather(1, order).view(-1, 2, size)
    return improved.tolist()


def _split(centred: Tensor, first: int, direction: Tensor) -> Tensor:
    """Two means with halves of given size, for G groups at once.

    Args:
        centred: [G, n, width], of mean 0.
        first: rows of the first half.
        direction: [G, width], in which the first half begins to be sought.

    Returns:
        [G, n], an order of each group's rows: those of the first half in front.
    """
    order = _by(centred, direction)
    for _ in range(_MEANS_ITERATIONS):
        # The means of both halves lie opposite each other.
        order = _by(centred, _mean_of_first(centred, order, first))
    return order


def _widest(centred: Tensor) -> Tensor:
    """[G, width]: about the direction in which each group of rows [G, n, width] of mean 0 is widest."""
    farthest = centred.square().sum(-1).argmax(-1)
    direction = centred[torch.arange(centred.shape[0], device=centred.device), farthest]
    for _ in range(_POWER_ITERATIONS):
        along = torch.bmm(centred, direction[..., None])
        direction = functional.normalize(torch.bmm(along.transpose(1, 2), centred)[:, 0], dim=-1)
    return direction


def _by(rows: Tensor, direction: Tensor) -> Tensor:
    """[G, n]: the order of rows [G, n, width], farthest in the direction [G, width] first."""
    return torch.bmm(rows, direction[..., None])[..., 0].argsort(dim=-1, descending=True, stable=True)


def _mean_of_first(rows: Tensor, order: Tensor, count: int) -> Tensor:
    """[G, width]: the mean of so many rows [G, n, width], those that are first in an order."""
    weights = torch.zeros(order.shape, device=rows.device).scatter_(1, order[:, :count], 1.0 / count)
    return torch.bmm(weights[:, None], rows)[:, 0]


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)

"""Clusters of equal size."""

from __future__ import annotations

import pytest
import torch

from draftwerk.training import clusters
from draftwerk.training.clusters import balanced_clusters


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(rows: torch.Tensor, order: torch.Tensor, count: int) -> float:
    """Of rows around the means of their clusters."""
    parts = rows[order].view(count, -1, rows.shape[1])
    return float((parts - parts.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize(("count", "size"), [(8, 4), (13, 6), (2, 9), (1, 5), (7, 1)])
def test_clusters_that_are_there_are_found(count: int, size: int) -> None:
    rows = 10 * random_rows(count, 1, 12) + 0.1 * random_rows(count, size, 12, seed=1)
    shuffle = torch.randperm(count * size, generator=torch.Generator().manual_seed(2))
    order = balanced_clusters(rows.flatten(0, 1)[shuffle], count)
    assert sorted(order.tolist()) == list(range(count * size))
    parts = order.view(count, size)
    assert torch.equal(parts, parts.sort(-1).values)
    of = shuffle[parts] // size
    assert torch.equal(of, of[:, :1].expand_as(of))


@pytest.mark.parametrize("count", [16, 15])
def test_pairs_that_are_split_anew_bring_rows_closer(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(240, 8)
    order = balanced_clusters(rows, count)
    monkeypatch.setattr(clusters, "_ROUNDS", 0)
    halved = balanced_clusters(rows, count)
    assert spread(rows, order, count) < 0.97 * spread(rows, halved, count)
    assert spread(rows, halved, count) < 0.8 * spread(rows, torch.arange(240), count)


def test_they_are_a_function_of_the_rows() -> None:
    rows = random_rows(96, 5)
    assert torch.equal(balanced_clusters(rows, 12), balanced_clusters(rows, 12))
    assert torch.equal(balanced_clusters(rows.bfloat16(), 12), balanced_clusters(rows.bfloat16().float(), 12))


def test_rows_that_are_all_alike_are_clusters_too() -> None:
    assert balanced_clusters(torch.ones(12, 3), 4).sort().values.tolist() == list(range(12))

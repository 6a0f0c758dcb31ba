"""The loss of centroids against the plain formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_training
import torch
from tiny_training import MODELS

from draftwerk.training.cluster_loss import ClusteredHead, ClusterLoss
from draftwerk.training.target import FrozenTarget, softcap

CLUSTERS, SIZE, CHOSEN, WIDTH = 20, 5, 3, 64


@pytest.mark.parametrize("family", ["gemma3", "dense_k_eq_v"])
def test_it_is_the_cross_entropy_of_the_clusters(tmp_path: Path, family: str) -> None:
    target = tiny_training.frozen(MODELS[family](seed=1), tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = target.embedding[torch.randperm(target.config.vocab_size, generator=generator)[: CLUSTERS * SIZE]]
    centroids = torch.randn(CLUSTERS, WIDTH, generator=generator).requires_grad_()
    states = torch.randn(300, WIDTH, generator=generator)
    positions = torch.arange(1, 300, 2)
    loss = ClusterLoss(target, ClusteredHead(rows, centroids, CHOSEN), states, positions)
    entropy, recall, count = torch.zeros(()), 0.0, 0
    for step in (torch.arange(300), torch.tensor([4, 7, 8, 8, 9]), torch.tensor([2, 4]), torch.tensor([], dtype=int)):
        drafted = torch.randn(len(step), WIDTH, generator=generator).requires_grad_()
        loss.add(drafted, step)
        for state, position in zip(drafted, step.tolist(), strict=True):
            if position % 2 == 0:
                continue
            probability = torch.softmax(softcap(states[position] @ rows.T, target.config.final_logit_softcapping), 0)
            of_clusters = torch.stack([part.sum() for part in probability.split(SIZE)])
            scores = centroids @ state.detach()
            entropy = entropy - of_clusters @ torch.log_softmax(scores, 0)
            recall += float(of_clusters[scores.argsort(descending=True)[:CHOSEN]].sum())
            count += 1
    assert loss.rows == count == 150 + 2
    assert loss.recall == pytest.approx(recall, rel=1e-5)
    torch.testing.assert_close(loss.mean(), entropy / count)
    expected = torch.autograd.grad(entropy / count, centroids)[0]
    loss.mean().backward()
    assert drafted.grad is None
    torch.testing.assert_close(centroids.grad, expected)


def test_a_batch_without_a_row_costs_nothing(tmp_path: Path) -> None:
    target: FrozenTarget = tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path)
    centroids = torch.ones(4, WIDTH, requires_grad=True)
    head = ClusteredHead(target.embedding[:8], centroids, 2)
    loss = ClusterLoss(target, head, torch.ones(5, WIDTH), torch.tensor([], dtype=torch.long))
    loss.add(torch.ones(3, WIDTH), torch.tensor([0, 1, 2]))
    loss.mean().backward()
    assert (loss.rows, loss.recall, float(loss.mean().detach())) == (0, 0.0, 0.0)
    assert centroids.grad is not None
    assert not centroids.grad.any()

"""The chains of drafts that training unrolls against their enumeration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tiny_training
import torch
from tiny_training import MODELS, random_ids, text

from draftwerk.training.batches import Batches
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.options import TrainingOptions
from draftwerk.training.rows import Rows
from draftwerk.training.target import FrozenTarget
from draftwerk.training.trainer import Trainer

PROMPT = 3  # tokens that the target did not write, and at which no chain starts


def every_chain(
    drafter: DrafterModule, target: FrozenTarget, ids: torch.Tensor, depth: int
) -> tuple[float, list[float]]:
    """By enumeration: the divergence of a chain, and how often each of its drafts is reached, averaged over starts."""
    losses, reached = [], []
    index = {token: place for place, token in enumerate(drafter.draft_token_ids.tolist())}
    head = target.embedding[drafter.draft_token_ids]
    for sequence in ids:
        features = target.features(sequence[None])
        targets = torch.softmax(target.logits(features.states, head)[0], -1)
        for start in range(PROMPT, len(sequence)):
            rows, previous = Rows(torch.tensor([0]), torch.tensor([start])), features.states[:, start - 1]
            divergence, shares = 0.0, [0.0] * depth
            reach = 1.0
            for step in range(min(depth, len(sequence) - start)):
                shares[step] = reach
                embedded = target.embed(sequence[start + step : start + step + 1])
                with torch.no_grad():
                    _, previous = drafter(embedded, previous, rows, features.keys, features.values)
                    draft = torch.softmax(target.logits(previous, head)[0], -1)
                there = targets[start + step]
                divergence += reach * float((there * (there / draft).log()).sum())
                following = index.get(int(sequence[start + step + 1])) if start + step + 1 < len(sequence) else None
                reach *= 0.0 if following is None else min(1.0, float(draft[following] / there[following]))
            losses.append(divergence)
            reached.append(shares)
    return float(np.mean(losses)), np.mean(reached, axis=0).tolist()


def assert_mean(expected: float, values: list[float]) -> None:
    """Within four standard errors, which are small enough to tell."""
    error = float(np.std(values)) / len(values) ** 0.5
    assert error < 0.03 * expected
    assert abs(float(np.mean(values)) - expected) < 4 * error


def test_a_chain_goes_on_as_often_as_its_drafts_are_accepted(tmp_path: Path) -> None:
    """Rows are drawn, and the loss is that of all rows, each counted as often as it is reached."""
    target = tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path / "target")
    ids = random_ids(2, 9)
    batches = Batches([text(row, PROMPT) for row in ids], length=9, tokens_per_batch=18, seed=0)
    options = TrainingOptions(steps=200, draft_depth=3, learning_rate=0.0, warmup_steps=0, seed=1)
    trainer = Trainer(target, tiny_training.tiny_drafter(target, draft_vocab_size=320), options, tmp_path / "states")
    loss, reached = every_chain(trainer.drafter, target, torch.from_numpy(ids), options.draft_depth)
    figures = list(trainer.steps(batches))
    assert_mean(loss, [step.loss for step in figures])
    for depth in (1, 2):
        assert 0.1 < reached[depth] < 0.9
        assert_mean(reached[depth], [step.reached[depth] for step in figures])

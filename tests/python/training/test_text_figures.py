"""What text says of a target's tokens, against the plain formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from tiny_training import MODELS, random_ids

from draftwerk.training import text_figures as module
from draftwerk.training.text_figures import text_figures


@pytest.mark.parametrize("family", ["gemma3", "dense_k_eq_v"])
def test_counts_and_directions(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_TOKENS", 150)  # the first two texts
    target = tiny_training.frozen(MODELS[family](seed=1), tmp_path)
    texts = [random_ids(1, length, seed=length)[0].astype(np.int32) for length in (90, 70, 50)]
    figures = text_figures(target, texts)
    states = torch.cat([target.features(torch.from_numpy(text).long()[None]).states[0] for text in texts[:2]])
    expected = torch.softmax(target.logits(states), dim=-1).mean(0)
    np.testing.assert_allclose(figures.counts / 2.0**30, expected.numpy(), rtol=1e-3, atol=1e-7)
    # Tokens lie as far from each other as their logits do.
    embedded = target.embedding @ figures.directions
    logits = states @ target.embedding.T
    apart = (logits[:, 5] - logits[:, 9]).var(correction=0)
    torch.testing.assert_close((embedded[5] - embedded[9]).square().sum(), apart, rtol=1e-3, atol=0.0)
    lengths = figures.directions.square().sum(0)
    assert torch.equal(lengths, lengths.sort(descending=True).values)

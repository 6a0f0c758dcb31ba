"""What some text of a target says of its tokens: how often each is to be expected, and how far apart any two are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from draftwerk.training.target import FrozenTarget

_ROWS_AT_ONCE = 64
_MOST_TOKENS = 16_384  # of text that are looked at
_LONGEST = 512
_SCALE = 1 << 30  # counts are integers
_DIRECTIONS = 128  # hold five sixths of the variance of gemma-3-270m's logits


@dataclass(frozen=True)
class TextFigures:
    """Of some text.

    Attributes:
        counts: [vocabulary] int64, how often each token is to be expected, in units that mean nothing in themselves.
        directions: [hidden, n] float32, principal directions of the states, each as long as the states vary along it:
            rows of the head times these lie as far from each other as the logits of their tokens do, on average.
    """

    counts: npt.NDArray[np.int64]
    directions: Tensor


@torch.no_grad()
def text_figures(target: FrozenTarget, texts: Iterable[npt.NDArray[np.int32]]) -> TextFigures:
    """Looks at the target's distributions and states at every position of some text.

    Counting what it wrote would say nothing of most of the vocabulary, because every position shows one token; its
    distribution there shows all of them.

    Args:
        target: whose text it is.
        texts: token ids [tokens] of each; the first ones are looked at.
    """
    width = target.config.hidden_size
    expected = torch.zeros(target.config.vocab_size, dtype=torch.float64, device=target.device)
    total = torch.zeros(width, dtype=torch.float64, device=target.device)
    squares = torch.zeros(width, width, dtype=torch.float64, device=target.device)
    seen = 0
    for text in texts:
        if seen >= _MOST_TOKENS:
            break
        token_ids = torch.from_numpy(text[:_LONGEST].astype(np.int64))[None].to(target.device)
        states = target.features(token_ids).states[0]
        for first in range(0, states.shape[0], _ROWS_AT_ONCE):
            logits = target.logits(states[first : first + _ROWS_AT_ONCE]).float()
            expected += torch.softmax(logits, dim=-1).sum(0)
        exact = states.double()
        total += exact.sum(0)
        squares += exact.T @ exact
        seen += token_ids.shape[1]
    count = max(seen, 1)
    mean = total / count
    variances, directions = torch.linalg.eigh(squares / count - mean[:, None] * mean)
    scaled = (directions * variances.clamp_min(0.0).sqrt()).flip(1)[:, :_DIRECTIONS]
    counts = (expected / count * _SCALE).round().long().cpu().numpy()
    return TextFigures(counts, scaled.float())

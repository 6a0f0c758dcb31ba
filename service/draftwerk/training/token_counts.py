"""How often a target writes each of its tokens, from less text than it takes to see the rare ones."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from draftwerk.training.target import FrozenTarget

_ROWS_AT_ONCE = 64
_MOST_TOKENS = 16_384  # of text that are looked at
_LONGEST = 512
_SCALE = 1 << 30  # counts are integers


@torch.no_grad()
def expected_counts(target: FrozenTarget, texts: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    """How often each token is to be expected, by the target's probabilities at every position of some text.

    Counting what it wrote would say nothing of most of the vocabulary, because every position shows one token; its
    distribution there shows all of them.

    Args:
        target: whose text it is.
        texts: token ids [tokens] of each; the first ones are looked at.

    Returns:
        [vocabulary], in units that mean nothing in themselves.
    """
    expected = torch.zeros(target.config.vocab_size, dtype=torch.float64, device=target.device)
    seen = 0
    for text in texts:
        if seen >= _MOST_TOKENS:
            break
        token_ids = torch.from_numpy(text[:_LONGEST].astype(np.int64))[None].to(target.device)
        states = target.features(token_ids).states[0]
        for first in range(0, states.shape[0], _ROWS_AT_ONCE):
            logits = target.logits(states[first : first + _ROWS_AT_ONCE]).float()
            expected += torch.softmax(logits, dim=-1).sum(0)
        seen += token_ids.shape[1]
    return (expected / max(seen, 1) * _SCALE).round().long().cpu().numpy()

"""Which tokens a drafter can draft."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from draftwerk.loading.config import TextConfig
from draftwerk.training.errors import TrainingError


@dataclass(frozen=True)
class DraftVocabulary:
    """What a drafter drafts.

    Attributes:
        token_ids: [N] int32, the tokens in the order of the head: those of a cluster together.
        counts: [N] int64, how often each is to be expected, in units that mean nothing in themselves.
    """

    token_ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]

    def most_frequent(self, size: int) -> npt.NDArray[np.int32]:
        """So many of the tokens, ascending, those with the smaller id first where they are equally frequent."""
        order = np.lexsort((self.token_ids, -self.counts))
        return np.sort(self.token_ids[order[:size]])


def choose_draft_vocabulary(
    config: TextConfig, counts: npt.NDArray[np.integer], size: int, always: Iterable[int]
) -> npt.NDArray[np.int32]:
    """The most frequent tokens of a text, those with the smaller id first where they are equally frequent.

    Args:
        config: the target's configuration.
        counts: [vocabulary], how often each token is in the text that the target wrote.
        size: how many tokens.
        always: tokens that belong to it in any case, such as end tokens.

    Returns:
        [size], ascending.

    Raises:
        TrainingError: the size is out of range, or a token is not in the vocabulary.
    """
    needed = np.unique(np.fromiter(always, np.int64))
    if counts.shape != (config.vocab_size,):
        raise TrainingError(f"counts of {list(counts.shape)} tokens: the vocabulary has {config.vocab_size}")
    if needed.size and not 0 <= needed[0] <= needed[-1] < config.vocab_size:
        raise TrainingError(f"tokens {needed[0]} to {needed[-1]}: the vocabulary has {config.vocab_size}")
    least = max(1, needed.size)
    if not least <= size <= config.vocab_size:
        raise TrainingError(f"draft_vocab_size = {size}: must be {least} to {config.vocab_size}")
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    others = order[~np.isin(order, needed)][: size - needed.size]
    return np.sort(np.concatenate([needed, others])).astype(np.int32)

"""Which tokens the distributions of draft and target are compared over.

All that can be drafted, where they are few. Where they are many, most of them are as improbable as can be at every
position of a batch, and to score them all is most of the work. Then those that are frequent everywhere are compared in
every batch, and with them the tokens of the batch's own text, which are there as often as the target finds them
probable, and some of all others, so that a token is pushed down too where nothing speaks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftwerk.training.whole_blocks import whole_blocks

_BY_CHANCE = 1024
"""Tokens of a batch that neither frequency nor text speaks for; some more make a whole block (:mod:`.whole_blocks`)."""


@dataclass(frozen=True)
class ComparedTokens:
    """Those of one batch.

    Attributes:
        token_ids: [n], ascending.
        index: [vocabulary], where each token is in ``token_ids``; -1 where it is not.
    """

    token_ids: Tensor
    index: Tensor

    @classmethod
    def of(cls, token_ids: Tensor, vocabulary: int) -> ComparedTokens:
        """Tokens [n], in the order given."""
        index = torch.full((vocabulary,), -1, dtype=torch.long, device=token_ids.device)
        index[token_ids] = torch.arange(token_ids.shape[0], device=token_ids.device)
        return cls(token_ids, index)


class TokenChoice:
    """Chooses the tokens of each batch.

    Args:
        drafted: [n], all tokens that can be drafted.
        frequent: [m], those of them that every batch compares; None: all.
        vocabulary: size of the target's.
    """

    def __init__(self, drafted: Tensor, frequent: Tensor | None, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._all = ComparedTokens.of(drafted if frequent is None else frequent, vocabulary)
        others = torch.zeros(vocabulary, dtype=torch.bool, device=drafted.device)
        others[drafted] = True
        others[self._all.token_ids] = False
        self._is_other = others
        self._others = torch.nonzero(others)[:, 0]

    def of_batch(self, token_ids: Tensor, generator: torch.Generator) -> ComparedTokens:
        """Those of a batch with the text ``token_ids``, of any shape."""
        if not len(self._others):
            return self._all
        chosen = torch.zeros_like(self._is_other)
        chosen[self._all.token_ids] = True
        own = token_ids.flatten()
        chosen[own[self._is_other[own]]] = True
        others = self._others[torch.randperm(len(self._others), generator=generator).to(self._others.device)]
        count = int(chosen.sum())
        chosen[others[~chosen[others]][: whole_blocks(count + _BY_CHANCE) - count]] = True
        return ComparedTokens.of(torch.nonzero(chosen)[:, 0], self._vocabulary)

"""The text of a training run, cut into batches: which batch comes when is a function of the text and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from draftwerk.training.errors import TrainingError
from draftwerk.training.shards import Text

_POOL = 32  # batches whose sequences are sorted by length together
_LEAST = 3  # tokens of a sequence: one that starts a chain needs one before it and one behind
_MOST_PROMPT = 1 / 2  # of a sequence that is cut from a text with a long prompt

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Sequences side by side.

    Attributes:
        token_ids: [B, T] int64; 0 behind the end of a sequence.
        lengths: [B] int64; tokens of each sequence.
        starts: [B] int64; where the first chain of drafts starts, which is at a token that the target wrote.
    """

    token_ids: Tensor
    lengths: Tensor
    starts: Tensor

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum())


class BatchSource(Protocol):
    """What a trainer takes its batches from.

    Attributes:
        fingerprint: of everything that determines them.
    """

    @property
    def fingerprint(self) -> str: ...

    def __getitem__(self, index: int) -> Batch:
        """The batch at this place of an endless row; the same one at any time."""


def check_sizes(length: int, tokens_per_batch: int) -> None:
    """Refuses sizes that are out of range.

    Raises:
        TrainingError: one is.
    """
    if not 2 * _LEAST <= length <= 1 << 20:
        raise TrainingError(f"length = {length}: must be {2 * _LEAST} to {1 << 20}")
    if tokens_per_batch < length:
        raise TrainingError(f"tokens_per_batch = {tokens_per_batch}: must be at least length = {length}")


class Batches:
    """Batches of about equally long sequences, in an order of their own in every epoch.

    A text that is longer than ``length`` becomes several sequences, each of which begins with its first token, the
    beginning-of-sequence token. Of a long prompt no more is kept than fills half of the first one.

    Attributes:
        fingerprint: of the text and of how it is cut.
        tokens: of all sequences, once.

    Args:
        texts: of a target.
        length: longest sequence of a batch, in tokens.
        tokens_per_batch: most of them in a batch, padding included; at least ``length``.
        seed: of the order.

    Raises:
        TrainingError: a size is out of range, or there is no text.
    """

    def __init__(self, texts: Sequence[Text], *, length: int, tokens_per_batch: int, seed: int) -> None:
        check_sizes(length, tokens_per_batch)
        pieces = [piece for text in texts for piece in _pieces(text, length)]
        if not pieces:
            raise TrainingError(f"no text to train on: {len(texts)} texts, none with two tokens of the model's own")
        self._pieces = [ids for ids, _ in pieces]
        self._starts = np.array([start for _, start in pieces])
        self._lengths = np.array([piece.size for piece in self._pieces])
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._epochs: list[list[npt.NDArray[np.int64]]] = []
        self.tokens = int(self._lengths.sum())
        digest = hashlib.blake2b(repr((length, tokens_per_batch, seed)).encode(), digest_size=8)
        for piece, start in pieces:
            digest.update(piece.tobytes())
            digest.update(f"/{start}/".encode())
        self.fingerprint = digest.hexdigest()

    @property
    def first_epoch(self) -> int:
        """Batches of the first epoch."""
        return len(self._epoch(0))

    def __getitem__(self, index: int) -> Batch:
        """The batch at this place of an endless row of epochs."""
        epoch = 0
        while index >= len(self._epoch(epoch)):
            index -= len(self._epoch(epoch))
            epoch += 1
        chosen = self._epoch(epoch)[index]
        lengths = self._lengths[chosen]
        token_ids = np.zeros((chosen.size, lengths.max()), np.int64)
        for row, piece in enumerate(chosen):
            token_ids[row, : lengths[row]] = self._pieces[piece]
        return Batch(torch.from_numpy(token_ids), torch.from_numpy(lengths), torch.from_numpy(self._starts[chosen]))

    def _epoch(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        while epoch >= len(self._epochs):
            self._epochs.append(self._order(len(self._epochs)))
        return self._epochs[epoch]

    def _order(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The pieces of each batch of an epoch."""
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = rng.permutation(len(self._pieces))
        batches = []
        for pool in _cut(shuffled, self._lengths, self._tokens_per_batch * _POOL):
            by_length = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += _cut(by_length, self._lengths, self._tokens_per_batch)
        return [batches[index] for index in rng.permutation(len(batches))]


def _pieces(text: Text, length: int) -> Iterator[tuple[TokenIds, int]]:
    """Sequences of a text, and where the first chain starts in each; none in which a chain has no draft."""
    ids = np.asarray(text.token_ids, np.int32)
    written = max(1, text.prompt_length)  # the first token has no state before it
    room = length - 1  # behind the first token
    first = 1
    if ids.size > length:
        first = max(1, written - int(_MOST_PROMPT * length))
    while first < ids.size:
        piece = np.concatenate([ids[:1], ids[first : first + room]])
        start = max(1, written - first + 1)
        if piece.size - start >= _LEAST - 1:
            yield piece, start
        first += room


def _cut(chosen: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], most: int) -> list[npt.NDArray[np.int64]]:
    """Cuts a row of pieces so that count times longest length of each part is at most ``most``."""
    parts, first, longest = [], 0, 0
    for index, piece in enumerate(chosen):
        longest = max(longest, int(lengths[piece]))
        if longest * (index + 1 - first) > most:
            parts.append(chosen[first:index])
            first, longest = index, int(lengths[piece])
    return [*parts, chosen[first:]]

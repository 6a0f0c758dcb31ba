"""Batches of text that is still being written: trained on as it comes, and a few more times later on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from draftwerk.training.batches import Batch, Batches, check_sizes
from draftwerk.training.shards import Shard

_ORDER = 3  # of batches, and what they are: a run that was begun with others cannot be gone on with

REPLAYED = 2
"""Older shards that every new one is mixed with. Text that comes back a few times teaches nearly as much as new text,
and need not be written again."""


class TextBatches:
    """Batches in rounds: each has a new shard of text and some older ones, in an order of chance.

    Shards are asked for when the first batch of their round is; which batch comes when depends on their texts and the
    seed alone.

    Args:
        shard: gives the shard with this number, and writes it if need be.
        identity: of the text, such as the digest of its manifest.
        length: longest sequence of a batch, in tokens.
        tokens_per_batch: most of them in a batch, padding included; at least `length`.
        seed: of the order.

    Raises:
        TrainingError: a size is out of range.
    """

    def __init__(
        self, shard: Callable[[int], Shard], *, identity: str, length: int, tokens_per_batch: int, seed: int
    ) -> None:
        check_sizes(length, tokens_per_batch)  # now, not when the first text is there
        self._shard = shard
        self._length = length
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._round: tuple[int, list[tuple[Batches, int]]] | None = None
        self._starts = [0]  # the first batch of each round, as far as that is known
        said = repr((_ORDER, identity, length, tokens_per_batch, seed, REPLAYED))
        self.fingerprint = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()

    @property
    def of_first_shard(self) -> int:
        """Batches of the first shard, which come first."""
        return self._of_shard(0).first_epoch

    @property
    def mean_tokens(self) -> float:
        """Tokens of a batch of the first shard, on average."""
        first = self._of_shard(0)
        return first.tokens / first.first_epoch

    def __getitem__(self, index: int) -> Batch:
        number = 0
        while True:
            if number + 1 == len(self._starts):
                self._starts.append(self._starts[number] + len(self._batches(number)))
            if index < self._starts[number + 1]:
                batches, place = self._batches(number)[index - self._starts[number]]
                return batches[place]
            number += 1

    def _batches(self, number: int) -> list[tuple[Batches, int]]:
        """Those of a round in their order."""
        if self._round is None or self._round[0] != number:
            rng = np.random.default_rng([self._seed, number])
            shards = (number, *rng.permutation(number)[:REPLAYED])
            # A shard is cut into the same batches in every round: what the target computes of one may be kept.
            all_batches = [self._of_shard(int(shard)) for shard in shards]
            places = [(batches, place) for batches in all_batches for place in range(batches.first_epoch)]
            self._round = (number, [places[index] for index in rng.permutation(len(places))])
        return self._round[1]

    def _of_shard(self, number: int) -> Batches:
        return Batches(
            list(self._shard(number).texts()),
            length=self._length,
            tokens_per_batch=self._tokens_per_batch,
            seed=self._seed + number,
        )

"""Texts on disk: token ids in files that are there as a whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from draftwerk.training.atomic_file import atomic_file
from draftwerk.training.errors import TrainingError

ENDS = ("end token", "length", "loop")
"""Why a text ended: the model ended it, it was long enough, or it began to go round in circles and was cut."""

_ARRAYS = ("tokens", "lengths", "prompt_lengths", "kinds", "ends")


@dataclass(frozen=True)
class Text:
    """One text of a target.

    Attributes:
        token_ids: [tokens] int32, the prompt's first; the end token, if there is one, last.
        prompt_length: tokens that are the prompt's.
        kind: how it was sampled, an index into draftwerk.training.text.kinds_of_texts().
        end: why it ended, an index into ENDS.
    """

    token_ids: npt.NDArray[np.int32]
    prompt_length: int
    kind: int
    end: int


@dataclass(frozen=True)
class Shard:
    """The texts of one file.

    Attributes:
        tokens: [all tokens] int32, text after text.
        lengths: [texts] int32, tokens of each.
        prompt_lengths: [texts] int32, how many of them are the prompt's.
        kinds: [texts] uint8, see Text.
        ends: [texts] uint8, see Text.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    prompt_lengths: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    ends: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, texts: Sequence[Text]) -> Shard:
        return cls(
            tokens=np.concatenate([text.token_ids for text in texts], dtype=np.int32),
            lengths=np.array([len(text.token_ids) for text in texts], dtype=np.int32),
            prompt_lengths=np.array([text.prompt_length for text in texts], dtype=np.int32),
            kinds=np.array([text.kind for text in texts], dtype=np.uint8),
            ends=np.array([text.end for text in texts], dtype=np.uint8),
        )

    @property
    def generated_tokens(self) -> int:
        """Tokens that the target wrote itself."""
        return int(self.lengths.sum() - self.prompt_lengths.sum())

    def texts(self) -> Iterator[Text]:
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        for i, (first, last) in enumerate(pairwise(starts)):
            yield Text(self.tokens[first:last], int(self.prompt_lengths[i]), int(self.kinds[i]), int(self.ends[i]))


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:06}.npz"


def count_shards(directory: Path) -> int:
    """How many shards there are, without a gap from the first one on."""
    number = 0
    while shard_path(directory, number).exists():
        number += 1
    return number


def write_shard(directory: Path, number: int, shard: Shard) -> Path:
    """Writes a shard; equal shards are equal files.

    Raises:
        OSError: the disk is full, for instance; then there is no such file.
    """
    path = shard_path(directory, number)
    with atomic_file(path) as file:
        np.savez(file, **{name: getattr(shard, name) for name in _ARRAYS})
    return path


def read_shard(directory: Path, number: int) -> Shard:
    """Reads a shard.

    Raises:
        TrainingError: the file is damaged, or is something else.
        OSError: it cannot be read.
    """
    path = shard_path(directory, number)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shard = Shard(**{name: arrays[name] for name in _ARRAYS})
    except (ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise _damaged(path, str(error)) from None
    texts = len(shard.lengths)
    whole = (
        shard.tokens.dtype == np.int32
        and all(array.shape == (texts,) for array in (shard.lengths, shard.prompt_lengths, shard.kinds, shard.ends))
        and shard.tokens.shape == (int(shard.lengths.sum()),)
        and bool(np.all((shard.prompt_lengths >= 0) & (shard.prompt_lengths <= shard.lengths)))
    )
    if not whole:
        raise _damaged(path, "its arrays do not belong together")
    return shard


def _damaged(path: Path, reason: str) -> TrainingError:
    return TrainingError(f"{path} is damaged ({reason}); delete it and go on with --resume: it is written again")

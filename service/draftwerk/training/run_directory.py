"""The directory of a training run: what is where, and that it is whole whenever the run is stopped.

run.json          what the run was told, and what it settled at its beginning
vocabulary.npz    the tokens that can be drafted
prompts           what texts begin with, if the run was told
text/             what the target wrote
states/           states to go on from
features/         what the target computed of the text, while training goes on
log.jsonl         a line for every optimizer step, every shard of text, every session, and an end while text is written
initial/          the drafter as it was before the first step
drafter/          the drafter as it is so far: complete at any time once it is there
evaluation.json, report.html    at the end
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from draftwerk.training.atomic_file import append_line, atomic_file, remove_leftovers
from draftwerk.training.errors import TrainingError
from draftwerk.training.shards import count_shards
from draftwerk.training.vocabulary import DraftVocabulary

_RUN = "run.json"
_FORMAT = 1


class RunDirectory:
    """See above.

    Attributes:
        path: where it is.
        prompts, text, states, features, initial, drafter, evaluation, report: paths of its parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompts = path / "prompts"
        self.text = path / "text"
        self.states = path / "states"
        self.features = path / "features"
        self.initial = path / "initial"
        self.drafter = path / "drafter"
        self.evaluation = path / "evaluation.json"
        self.report = path / "report.html"
        self._log = path / "log.jsonl"
        self._fresh = path / ".drafter.new"
        self._vocabulary = path / "vocabulary.npz"

    # --- what the run was told ----------------------------------------------------------------------------------

    def begin(self, told: Mapping[str, Any]) -> None:
        """Makes this the directory of a new run. It may be that of one that has done nothing yet.

        Args:
            told: plain values that read() gives back.

        Raises:
            TrainingError: there is something there.
            OSError: it cannot be written.
        """
        self._make_room()
        self.write(told)

    def _make_room(self) -> None:
        if (self.path / _RUN).exists():
            begun = (self.drafter, self.states, self.initial, self._vocabulary)
            if any(part.exists() for part in begun) or count_shards(self.text):
                raise TrainingError(
                    f"{self.path} holds a training run: go on with it by --resume, or give another directory"
                )
            # It failed before it had done anything, and the new one may be told otherwise.
            shutil.rmtree(self.text, ignore_errors=True)
            self._log.unlink(missing_ok=True)
            self.prompts.unlink(missing_ok=True)
        elif not all(map(_is_leftover, self.path.iterdir())):
            raise TrainingError(f"{self.path} is not empty: a training run needs a directory of its own")

    @contextmanager
    def held(self, *, new: bool = False) -> Iterator[None]:
        """Keeps other processes from working on the run meanwhile, from before it is begun or read until it is over. A
        process that is killed holds nothing.

        Args:
            new: whether it is to be begun: the directory is made if need be.

        Raises:
            TrainingError: another one works on it, or there is no such directory.
            OSError: it cannot be made or opened.
        """
        if self.path.exists() and not self.path.is_dir():
            what = "needs a directory of its own" if new else "is a directory"
            raise TrainingError(f"{self.path} is a file: a training run {what}")
        if new:
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise TrainingError(
                f"{self.path} holds no training run to go on with: there is no such directory"
            ) from None
        try:
            _lock(descriptor, self.path)
            yield
        finally:
            os.close(descriptor)

    def read(self) -> dict[str, Any]:
        """What write() wrote last.

        Raises:
            TrainingError: there is no run, or its file is damaged.
        """
        path = self.path / _RUN
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise TrainingError(f"{self.path} holds no training run to go on with: there is no {_RUN}") from None
        except ValueError as error:
            raise TrainingError(f"{path} is damaged: {error}") from None
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise TrainingError(f"{path} is not that of a run of this version of draftwerk")
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Replaces what read() gives."""
        with atomic_file(self.path / _RUN) as file:
            file.write(json.dumps({"format": _FORMAT, **values}, indent=2).encode() + b"\n")

    # --- what it does -------------------------------------------------------------------------------------------

    def remove_leftovers(self) -> None:
        """Removes what a process that was killed has left half written."""
        remove_leftovers(self.path)
        for pattern in (f".{self.initial.name}.*", self._fresh.name, f".{self._fresh.name}.*"):
            for leftover in self.path.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
            OSError: it cannot be written; nothing of it is there.
        """
        append_line(self._log, json.dumps(entry))

    def replace_log(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Writes all lines anew.

        Raises:
            OSError: they cannot be written; the log is what it was.
        """
        with atomic_file(self._log) as file:
            file.writelines(json.dumps(entry).encode() + b"\n" for entry in entries)

    def entries(self) -> list[dict[str, Any]]:
        """The lines of the log. A last one that was cut off, by a kill or a full disk, is none."""
        try:
            text = self._log.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        *whole, _ = text.split("\n")
        try:
            return [json.loads(line) for line in whole]
        except ValueError as error:
            raise TrainingError(f"{self._log} is damaged: {error}") from None

    def vocabulary(self) -> DraftVocabulary | None:
        """What save_vocabulary() saved; None if it has not yet.

        Raises:
            TrainingError: the file is damaged.
        """
        if not self._vocabulary.exists():
            return None
        try:
            with np.load(self._vocabulary, allow_pickle=False) as arrays:
                return DraftVocabulary(**{name: arrays[name] for name in arrays.files})
        except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise TrainingError(f"{self._vocabulary} is damaged ({error}): begin in another directory") from None

    def save_vocabulary(self, vocabulary: DraftVocabulary) -> None:
        with atomic_file(self._vocabulary) as file:
            np.savez(file, **asdict(vocabulary))

    def publish(self, write: Callable[[Path], None]) -> None:
        """Replaces the drafter, so that there is a whole one at every moment once there is a first.

        Its files are replaced one by one: those of a run's drafters differ in the weights alone, which are one file.

        Args:
            write: writes one into a directory that does not exist yet.
        """
        shutil.rmtree(self._fresh, ignore_errors=True)
        write(self._fresh)
        if not self.drafter.exists():
            self._fresh.rename(self.drafter)
            return
        for file in self._fresh.iterdir():
            file.replace(self.drafter / file.name)
        self._fresh.rmdir()


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TrainingError(
            f"{path}: another process works on this run; wait for it, stop it, or give another directory"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system that has no locks
            raise


def _is_leftover(path: Path) -> bool:
    """Whether this is all that a process left that was killed while it began a run."""
    return path.name.startswith(f".{_RUN}.")

"""Which drafters an engine gets: what `drafter` stands for, found, opened and checked against the target."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from draftwerk import _core
from draftwerk.loading import CheckpointError, check_fits, find_assistant, is_hub_name, open_assistant, path_exists
from draftwerk.weights import Progress, load_assistant

if TYPE_CHECKING:
    from draftwerk.loading import AssistantCheckpoint, Checkpoint

_logger = logging.getLogger(__name__)

DRAFTERS = ("auto", "lookup", "none")
"""What has a name; everything else is the path or the hub name of an MTP drafter, but for one that is for tests."""

_FOR_TESTS = "random"  # drafts are noise: right hardly ever


@dataclass(frozen=True)
class SyntheticDrafter:
    """Drafts that are right with a set probability, for benchmarks: they are read off recorded runs.

    Attributes:
        recordings: token ids, each of a prompt and of what the same model made of it without drafts.
        acceptance: the probability with which each draft is right, 0 to 1.
        seed: decides which drafts those are.
        assistant: an MTP drafter that is run for the time it takes; its drafts are replaced.
    """

    recordings: Sequence[Sequence[int]]
    acceptance: float
    seed: int = 0
    assistant: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.acceptance <= 1.0:
            raise ValueError(f"acceptance = {self.acceptance}: must be 0 to 1")


Drafter = Union[str, "os.PathLike[str]", SyntheticDrafter]


@dataclass(frozen=True)
class ChosenDrafters:
    """The drafters of an engine, before their weights are loaded.

    Attributes:
        names: the core's names for them.
        assistant: the MTP drafter among them, or the one that a synthetic drafter runs.
        synthetic: the synthetic drafter among them.
    """

    names: tuple[str, ...]
    assistant: AssistantCheckpoint | None = None
    synthetic: SyntheticDrafter | None = None

    @property
    def description(self) -> str:
        """Such as "mtp+lookup"."""
        return "+".join(self.names) or "none"

    def load(
        self, target: Checkpoint, model: _core.Model, *, weights: str, progress: Progress | None
    ) -> _core.MtpModel | None:
        """The native MTP drafter, if there is one; arguments as for draftwerk.weights.load_assistant().

        Raises:
            CheckpointError: its weights cannot be used.
        """
        if self.assistant is None:
            return None
        return load_assistant(self.assistant, target, model, weights=weights, progress=progress)

    def native_synthetic(self) -> _core.SyntheticDrafts | None:
        """The native form of the synthetic drafter, if there is one."""
        if self.synthetic is None:
            return None
        recordings = [list(recording) for recording in self.synthetic.recordings]
        return _core.SyntheticDrafts(recordings, self.synthetic.acceptance, self.synthetic.seed)


def choose_drafters(drafter: Drafter, target: Checkpoint, *, lookup: bool) -> ChosenDrafters:
    """What `drafter` stands for with this target.

    Args:
        drafter: "auto" is the MTP drafter that lies next to the target ("MODEL-assistant") or comes with draftwerk for
            a built-in model, if there is one that fits, together with lookup; else lookup. "lookup", "none" and
            "random" are just that. Any other text is the directory, GGUF file or hub name of an MTP drafter, which is
            used together with lookup.
        lookup: whether an MTP drafter has lookup beside it. Each sequence drafts with the one that pays best in a step.

    Raises:
        CheckpointError: the MTP drafter cannot be opened, or does not fit the target.
        ValueError: there is neither a drafter of this name nor a file.
    """
    if isinstance(drafter, SyntheticDrafter):
        assistant = None if drafter.assistant is None else _open_fitting(drafter.assistant, target)
        return ChosenDrafters(("synthetic",), assistant, drafter)
    if drafter == "auto":
        neighbour = _neighbour(target)
        return ChosenDrafters(("lookup",)) if neighbour is None else _with_lookup(neighbour, lookup)
    if drafter in DRAFTERS or drafter == _FOR_TESTS:
        return ChosenDrafters(() if drafter == "none" else (str(drafter),))
    path = os.fspath(drafter)
    if not (path_exists(path) or is_hub_name(path)):
        raise ValueError(
            f"drafter = {path!r}: must be one of {', '.join(DRAFTERS)}, or the path or hub name of an MTP drafter "
            "(no such file or directory)"
        )
    return _with_lookup(_open_fitting(path, target), lookup)


def _neighbour(target: Checkpoint) -> AssistantCheckpoint | None:
    """The drafter next to the target, or that of a built-in model, if it can be used.

    One that cannot be used must not keep a model from starting: nobody asked for it.
    """
    found = find_assistant(target.path)
    if found is None:
        return None
    try:
        return _open_fitting(found, target)
    except CheckpointError as error:
        _logger.warning("drafting by lookup alone, the drafter of the model cannot be used: %s", error)
        return None


def _open_fitting(drafter: str | os.PathLike[str], target: Checkpoint) -> AssistantCheckpoint:
    assistant = open_assistant(drafter)
    check_fits(assistant, target)
    return assistant


def _with_lookup(assistant: AssistantCheckpoint, lookup: bool) -> ChosenDrafters:
    return ChosenDrafters(("mtp", "lookup") if lookup else ("mtp",), assistant)

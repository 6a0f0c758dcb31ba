"""What a training run is told, and the beginning of one."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftwerk.training.atomic_file import atomic_file
from draftwerk.training.batches import check_sizes
from draftwerk.training.errors import TrainingError
from draftwerk.training.precision import DTYPES
from draftwerk.training.prompts import PromptsFile, read_prompts
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.sampling import Sampling
from draftwerk.training.text import TextOptions
from draftwerk.weights import WEIGHT_CHOICES


@dataclass(frozen=True)
class RunOptions:
    """What a run is told. All of it determines the drafter, so it stays as it is when the run is gone on with.

    Attributes:
        model: the target, as draftwerk.loading.open_checkpoint() takes it.
        prompts: file of prompts that texts begin with; None: the built-in openings.
        chat: whether these prompts are what a user says to the model, through its chat template.
        start_from: drafter to go on from, as draftwerk.loading.open_assistant() takes it; None: the target's last
            layers.
        hours: that writing and training may take, all sessions together.
        tokens: of text that are trained on, repetitions included. Either this or `hours`.
        seed: of everything that is chosen by chance.
        layers: decoder layers of the drafter; one that is gone on from has its own.
        draft_vocab_size: tokens that it can draft; likewise, as for the next two.
        clusters: of them, which are scored first; 0: every token is scored; None: as HeadSizes.of() has it.
        chosen_clusters: of them whose tokens are scored.
        draft_depth: drafts of a chain that are trained.
        learning_rate: at its peak.
        length: longest sequence of a batch, in tokens.
        tokens_per_batch: most tokens of a batch, padding included.
        accumulate: batches of an optimizer step.
        weights: how the engine that writes text holds the target's, as draftwerk.Engine takes it.
        precision: what training computes in, as choose_precision() takes it.
        text: how text is written; its seed is `seed`. What it says of sampling holds for the evaluation, too.
    """

    model: str
    prompts: str | None = None
    chat: bool = False
    start_from: str | None = None
    hours: float | None = None
    tokens: int | None = None
    seed: int = 0
    layers: int = 2
    draft_vocab_size: int = 16_384
    clusters: int | None = None
    chosen_clusters: int = 64
    draft_depth: int = 6
    learning_rate: float = 5e-4
    length: int = 1024
    tokens_per_batch: int = 2048
    accumulate: int = 1
    weights: str = "auto"
    precision: str = "auto"
    text: TextOptions = dataclasses.field(default_factory=TextOptions)

    def __post_init__(self) -> None:
        if (self.hours is None) == (self.tokens is None):
            raise TrainingError("give either hours or tokens: how long the run is to be")
        if self.hours is not None and not 0.0 < self.hours <= 1e4:
            raise TrainingError(f"hours = {self.hours}: must be more than 0, and at most 10000")
        if self.tokens is not None and not 1 <= self.tokens <= 1 << 40:
            raise TrainingError(f"tokens = {self.tokens}: must be 1 to {1 << 40}")
        check_sizes(self.length, self.tokens_per_batch)
        if not 1 <= self.accumulate <= 1 << 20:
            raise TrainingError(f"accumulate = {self.accumulate}: must be 1 to {1 << 20}")
        if self.weights not in WEIGHT_CHOICES:
            raise TrainingError(f"weights = {self.weights}: must be one of {', '.join(WEIGHT_CHOICES)}")
        if self.precision not in ("auto", *DTYPES):
            raise TrainingError(f"precision = {self.precision}: must be auto, {' or '.join(DTYPES)}")
        if self.chat and self.prompts is None:
            raise TrainingError("chat is for prompts of one's own: the built-in openings use a chat template anyway")

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> RunOptions:
        """From asdict(). What a run of an earlier version does not know is as it was then, by default."""
        served = values["text"].get("served")
        text = TextOptions(**{**values["text"], "served": None if served is None else Sampling(**served)})
        return cls(**{"precision": "bf16", **values, "text": text})


def begin(directory: RunDirectory, options: RunOptions, prompts: PromptsFile | None = None) -> None:
    """Begins a new run. Prompts are copied to its directory, so that it does not depend on their file; nor does it
    depend on the working directory.

    Args:
        directory: of the run; is held.
        options: what it is told.
        prompts: its prompts, if they have been read.

    Raises:
        TrainingError: there is something in the directory; the prompts cannot be used.
        OSError: a file cannot be read or written.
    """
    if prompts is None and options.prompts is not None:
        prompts = read_prompts(Path(options.prompts), chat=options.chat)
    directory.begin({"options": asdict(_with_absolute_paths(options))})
    if prompts is not None:
        with atomic_file(directory.prompts) as copy:
            copy.write(prompts.data)


def read_options(directory: RunDirectory) -> RunOptions:
    """What the run in a directory was told.

    Raises:
        TrainingError: there is no run, or its file is damaged.
    """
    try:
        return RunOptions.from_values(directory.read()["options"])
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{directory.path}: its run.json is not that of a run ({error})") from None


def prompts_of_run(directory: RunDirectory, options: RunOptions) -> PromptsFile | None:
    """The prompts of a run, read from its copy, under the name of the file that it was told: errors are to name that.

    Args:
        directory: of the run.
        options: what it was told.

    Raises:
        TrainingError: they cannot be used.
        OSError: they cannot be read.
    """
    if options.prompts is None:
        return None
    given = Path(options.prompts)
    # A run that was killed before there was a copy goes on with the file that it was told.
    prompts = read_prompts(directory.prompts if directory.prompts.exists() else given, chat=options.chat)
    return dataclasses.replace(prompts, path=given)


def _with_absolute_paths(options: RunOptions) -> RunOptions:
    """Names of models stay as they are. Links are not followed: a model is called by the name that it has."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if name and Path(name).exists() else name

    return dataclasses.replace(
        options,
        model=absolute(options.model),
        prompts=None if options.prompts is None else absolute(options.prompts),
        start_from=None if options.start_from is None else absolute(options.start_from),
    )

"""A training run of a tiny model, in seconds; as a program, until it is killed.

python tiny_run.py MODEL DIRECTORY
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tiny_writer import with_tokenizer

from draftwerk.loading import Checkpoint
from draftwerk.training import run_options
from draftwerk.training.run import Progress, Run
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, read_options
from draftwerk.training.text import TextOptions, TextProgress

torch.set_num_threads(1)

OPTIONS = RunOptions(
    model="tiny",
    tokens=3000,
    seed=5,
    draft_vocab_size=67,
    clusters=16,
    chosen_clusters=4,
    draft_depth=3,
    learning_rate=3e-3,
    length=64,
    tokens_per_batch=256,
    text=TextOptions(max_tokens=40, texts_per_shard=24, streams=8),
)


class Notes:
    """What a run said."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.texts: list[tuple[int, TextProgress]] = []
        self.steps: list[Progress] = []
        self.evaluated: list[tuple[str, int, int]] = []

    def phase(self, what: str) -> None:
        self.phases.append(what)

    def loading(self, what: str, done: int, total: int) -> None:
        pass

    def writing(self, shard: int, progress: TextProgress) -> None:
        self.texts.append((shard, progress))

    def step(self, progress: Progress) -> None:
        self.steps.append(progress)
        print(progress.figures.step, flush=True)

    def evaluating(self, what: str, done: int, total: int) -> None:
        self.evaluated.append((what, done, total))


def begin(directory: Path, options: RunOptions) -> RunDirectory:
    """Of a new run, which nobody works on yet."""
    place = RunDirectory(directory)
    with place.held(new=True):
        run_options.begin(place, options)
    return place


def run(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    notes: Notes | None = None,
    stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
    **changes: Any,
) -> bool:
    """Begins a run, or goes on with the one that is there."""
    if (directory / "run.json").exists():
        place = RunDirectory(directory)
    else:
        place = begin(directory, dataclasses.replace(OPTIONS, **changes))
    return Run(place, read_options(place), checkpoint, notes or Notes(), stop=stop, device=device, threads=1).train()


def weights(directory: Path) -> dict[str, bytes]:
    """Those of a run's drafter."""
    tensors = safetensors.torch.load_file(directory / "drafter" / "model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def log(directory: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a run's log, all of which are whole, without what depends on time and on when it was stopped."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    dependent = {"seconds", "writing", "tokens_per_second"} | ({"step", "trained_tokens"} if kind == "text" else set())
    return [
        {name: value for name, value in entry.items() if name not in dependent}
        for entry in entries
        if entry["kind"] == kind
    ]


if __name__ == "__main__":
    model, where = sys.argv[1:]
    print("ready", flush=True)
    run(with_tokenizer(Path(model)), Path(where))

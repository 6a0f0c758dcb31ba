"""The end of a training run: its drafter is evaluated, and a report written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftwerk.engine import Engine
from draftwerk.loading import Checkpoint
from draftwerk.training.atomic_file import atomic_file
from draftwerk.training.evaluation import EvaluationOptions, Evaluator
from draftwerk.training.evaluation_prompts import EvaluationPrompt, from_file, from_openings
from draftwerk.training.prompts import PromptsFile, set_aside
from draftwerk.training.report import render_report
from draftwerk.training.run import Observer, Stopped
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, prompts_of_run
from draftwerk.training.shards import count_shards, read_shard

PROMPTS = 48
"""That a drafter is evaluated on, where none were set aside for that."""

_FORMAT = 3  # of evaluation.json; the second did not say what "sampled" is, the first measured no fewer drafts


def conclude(
    directory: RunDirectory,
    options: RunOptions,
    checkpoint: Checkpoint,
    observer: Observer,
    *,
    command: str,
    stop: Callable[[], bool] = lambda: False,
    threads: int = 0,
    prompts: int = PROMPTS,
    evaluation: EvaluationOptions | None = None,
) -> bool:
    """Evaluates the drafter of a run as it was before and as it is now, and writes evaluation.json and report.html.

    What was evaluated already is only reported again.

    Args:
        directory: of a run with a drafter.
        options: what it was told.
        checkpoint: the target.
        observer: told how far it is.
        command: that began the run, for the report.
        stop: asked now and then; once it says so, this ends without a report.
        threads: kernel threads of the engine; 0: all.
        prompts: most prompts to evaluate on, where none were set aside for that.
        evaluation: how to evaluate; seed, threads and how the model will be sampled from are those of the run.

    Returns:
        Whether it came to the end.

    Raises:
        TrainingError: a prompt cannot be used.
        OSError: a file cannot be read or written.
    """
    entries = directory.entries()
    step = max((entry["step"] for entry in entries if entry["kind"] == "step"), default=0)
    values = _evaluated(directory.evaluation, step)
    if values is None:
        how = evaluation_of_run(options, evaluation or EvaluationOptions(), threads)

        def report(what: str, done: int, total: int) -> None:
            observer.evaluating(what, done, total)
            if stop():
                raise Stopped

        def chosen(engine: Engine) -> Sequence[EvaluationPrompt]:
            return _prompts(engine, directory, options, prompts, how.max_tokens)

        evaluator = Evaluator(checkpoint, chosen, how, report, observer.loading)
        try:
            observer.phase("evaluating the drafter")
            now = evaluator.evaluate(directory.drafter, directory.drafter.name)
            observer.phase("evaluating what it was before")
            before = evaluator.acceptance(directory.initial)
        except Stopped:
            return False
        values = {
            "format": _FORMAT,
            "step": step,
            "prompts_from": _prompts_from(directory, options),
            **now.as_dict(),
            "before": list(map(asdict, before)),
        }
        _write(directory.evaluation, json.dumps(values, indent=2) + "\n")
    _write(directory.report, render_report(asdict(options), entries, values, command=command))
    return True


def evaluation_of_run(options: RunOptions, evaluation: EvaluationOptions, threads: int) -> EvaluationOptions:
    """How the drafter of a run is evaluated: with its seed, and as its model will be served."""
    served = options.text.served
    if served is None or served.temperature == 0.0:  # greedy text is a part of every evaluation
        served = evaluation.sampled
    return dataclasses.replace(evaluation, seed=options.seed, threads=threads, sampled=served)


def _prompts(
    engine: Engine, directory: RunDirectory, options: RunOptions, count: int, room: int
) -> list[EvaluationPrompt]:
    """Prompts that no text of the run was written from; of a file with few of them those that it was."""
    if options.prompts is not None:
        written, aside = _prompts_of_file(directory, options)
        if aside is None:
            return from_file(engine, written, count, room=room)
        return from_file(engine, aside, len(aside.prompts), room=room)
    shards = (read_shard(directory.text, number) for number in range(count_shards(directory.text)))
    texts = (text for shard in shards for text in shard.texts())
    written_from = {tuple(text.token_ids[: text.prompt_length].tolist()) for text in texts}
    return from_openings(engine, count, seed=options.seed, room=room, without=written_from)


def _prompts_from(directory: RunDirectory, options: RunOptions) -> str:
    """What _prompts() gives, for people."""
    if options.prompts is None:
        return "built-in openings, filled in otherwise than those that text was written from"
    _, aside = _prompts_of_file(directory, options)
    return "set aside from those given" if aside else "those that text was written from: too few to set some aside"


def _prompts_of_file(directory: RunDirectory, options: RunOptions) -> tuple[PromptsFile, PromptsFile | None]:
    prompts = prompts_of_run(directory, options)
    assert prompts is not None
    return set_aside(prompts, options.seed)


def _evaluated(path: Path, step: int) -> dict[str, Any] | None:
    """What was written of the drafter after this step; None if nothing was, in another format, or not readable."""
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(values, dict) or (values.get("format"), values.get("step")) != (_FORMAT, step):
        return None
    return values


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a name of a file need not be UTF-8

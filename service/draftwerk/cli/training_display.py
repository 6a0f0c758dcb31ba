"""How far the training or the evaluation of a drafter is: bars on a terminal, else a line now and then."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from draftwerk.cli import options

if TYPE_CHECKING:
    from draftwerk.training import run
    from draftwerk.training.text import TextProgress

_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal to draw on
_POSITIONS = 4  # of a draft, that are shown


class TrainingDisplay:
    """An observer of a run: draftwerk.training.run.Observer."""

    def __init__(self) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bars = Progress(TextColumn("{task.description}"), *columns, console=options.messages)
        self._line = Text()
        self._on_terminal = options.messages.is_terminal
        self._live = Live(self, console=options.messages, refresh_per_second=2, transient=True)
        self._loading: Any = None
        self._text: Any = None
        self._training: Any = None
        self._first = 0, 0.0  # step that was seen first, and the seconds of the run by then
        self._evaluation: Any = None
        self._said_at = 0.0
        logging.getLogger("draftwerk.acceptance").addHandler(logging.NullHandler())  # an evaluation has its figures

    def __rich__(self) -> Group:
        return Group(self._bars, self._line)

    def __enter__(self) -> TrainingDisplay:
        if self._on_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_terminal:
            self._live.stop()

    def say(self, message: str) -> None:
        options.messages.print(Text(message), soft_wrap=True)

    def phase(self, what: str) -> None:
        if self._on_terminal:
            self._line = Text(what, style="dim")
        else:
            self.say(what)

    def loading(self, what: str, done: int, total: int) -> None:
        if self._loading is None:
            self._loading = self._bars.add_task(what)
        self._bars.update(self._loading, description=what, completed=done, total=total, visible=done < total)

    def writing(self, shard: int, progress: TextProgress) -> None:
        what = f"writing text {shard + 1} ({progress.tokens:,} tokens)"
        if self._text is None:
            self._text = self._bars.add_task(what)
        if progress.texts == 1:
            self._bars.reset(self._text)
        done = progress.texts == progress.of
        self._bars.update(self._text, description=what, completed=progress.texts, total=progress.of, visible=not done)
        if done or self._is_time():
            self._say_on_pipe(f"{what}: {progress.texts} of {progress.of} texts")

    def step(self, progress: run.Progress) -> None:
        figures, plan = progress.figures, progress.plan
        if self._training is None:
            self._first = figures.step, progress.seconds
            self._training = self._bars.add_task("training", completed=figures.step - 1, total=plan.steps)
        self._bars.update(self._training, completed=figures.step)
        spent = progress.seconds - progress.writing
        sampled, greedy = (
            " ".join(f"{share:.0%}" for share in shares[:_POSITIONS]) for shares in (figures.overlap, figures.agreement)
        )
        line = (
            f"step {figures.step:,} of {plan.steps:,}: loss {figures.loss:.3f}, "
            f"acceptance by position {sampled} (greedy {greedy})"
            f", {progress.tokens:,} tokens ({progress.written:,} written)"
            + (f", {progress.tokens / spent:.0f} tokens/s" if spent > 0 else "")
        )
        self._line = Text(line)
        if figures.step == plan.steps or self._is_time():
            self._say_on_pipe(f"{line}{self._left(progress)}")

    def _left(self, progress: run.Progress) -> str:
        """How long the run will last, by the steps since the first one that was seen: the first text is behind that."""
        from draftwerk.training.report import duration

        step, first, began = progress.figures.step, *self._first
        if step == first:
            return ""
        seconds = (progress.seconds - began) / (step - first) * (progress.plan.steps - step)
        return f", about {duration(seconds)} left" if seconds >= 60 else ""

    def evaluating(self, what: str, done: int, total: int) -> None:
        if self._evaluation is None:
            self._evaluation = self._bars.add_task(what)
        self._line = Text()
        self._bars.update(self._evaluation, description=what, completed=done, total=total)
        if self._is_time():
            self._say_on_pipe(f"{what}: {done} of {total}")

    def _say_on_pipe(self, message: str) -> None:
        if not self._on_terminal:
            self._said_at = time.monotonic()
            self.say(message)

    def _is_time(self) -> bool:
        return time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES

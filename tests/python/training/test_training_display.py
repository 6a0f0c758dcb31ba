"""What is seen of a run on a terminal: bars while something lasts, and a line of the latest step."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from draftwerk.cli.training_display import TrainingDisplay
from draftwerk.training.run import Plan, Progress
from draftwerk.training.text import TextProgress
from draftwerk.training.trainer import StepFigures


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system=None)
    monkeypatch.setattr("draftwerk.cli.options.messages", console)
    return console


def progress(step: int, of: int = 20, seconds: float = 60.0) -> Progress:
    figures = StepFigures(step, 2000, 2.5, (1.0, 0.5), (0.41, 0.38), (0.52, 0.47), 0.3, 1e-4, 900.0)
    return Progress(Plan(of, 5), figures, seconds=seconds, writing=20.0, tokens=36_000, written=12_000)


def seen(display: TrainingDisplay, terminal: Console) -> str:
    """What is on the screen now."""
    with terminal.capture() as capture:
        terminal.print(display)
    return capture.get()


def test_a_step_is_a_bar_and_a_line(terminal: Console) -> None:
    with TrainingDisplay() as display:
        display.phase("loading the target")
        assert "loading the target" in seen(display, terminal)
        display.step(progress(5))
        shown = seen(display, terminal)
    assert "training" in shown
    assert "25%" in shown
    assert "step 5 of 20: loss 2.500, acceptance by position 52% 47% (greedy 41% 38%)" in shown
    assert "36,000 tokens (12,000 written), 900 tokens/s" in shown
    assert "loading the target" not in shown


def test_where_there_is_no_terminal_a_line_says_how_long_it_will_last(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=300)
    monkeypatch.setattr("draftwerk.cli.options.messages", console)
    monkeypatch.setattr("draftwerk.cli.training_display._SECONDS_BETWEEN_LINES", 0.0)
    with TrainingDisplay() as display:
        for step, seconds in ((5, 60.0), (15, 180.0), (200, 2400.0)):
            display.step(progress(step, of=200, seconds=seconds))
    assert isinstance(console.file, io.StringIO)
    first, then, last = console.file.getvalue().splitlines()
    assert first.startswith("step 5 of 200: loss 2.500")
    assert first.endswith("(12,000 written), 900 tokens/s")
    assert then.endswith("tokens/s, about 37 min left")  # two minutes for ten steps, of which 185 are left
    assert last.endswith("tokens/s")


def test_text_is_a_bar_until_it_is_written(terminal: Console) -> None:
    with TrainingDisplay() as display:
        display.writing(1, TextProgress(texts=1, of=4, tokens=500))
        assert "writing text 2 (500 tokens)" in seen(display, terminal)
        assert "25%" in seen(display, terminal)
        display.writing(1, TextProgress(texts=4, of=4, tokens=2000))
        assert "writing text" not in seen(display, terminal)


def test_an_evaluation_takes_the_place_of_the_last_step(terminal: Console) -> None:
    with TrainingDisplay() as display:
        display.step(progress(20))
        display.evaluating("drafts accepted, greedy", 3, 12)
        shown = seen(display, terminal)
    assert "drafts accepted, greedy" in shown
    assert "25%" in shown
    assert "loss" not in shown


def test_a_model_that_is_loaded_is_no_longer_shown(terminal: Console) -> None:
    with TrainingDisplay() as display:
        display.loading("loading weights", 50, 100)
        assert "loading weights" in seen(display, terminal)
        display.loading("loading weights", 100, 100)
        assert "loading weights" not in seen(display, terminal)


def test_what_is_said_stays(terminal: Console) -> None:
    with TrainingDisplay() as display:
        display.say("200 prompts of [mine].jsonl")
    assert isinstance(terminal.file, io.StringIO)
    assert "200 prompts of [mine].jsonl" in terminal.file.getvalue()

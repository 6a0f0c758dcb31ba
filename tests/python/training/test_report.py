"""Reports of runs with awkward values, read as XML: a page that is not well formed fails."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest

from draftwerk.training.evaluation import SAMPLINGS, Evaluation, EvaluationOptions, SamplingAcceptance, Speed
from draftwerk.training.report import render_report
from draftwerk.training.rounds import Acceptance
from draftwerk.training.run_options import RunOptions
from draftwerk.training.timing import Pace

HOSTILE = '<script>alert("1")</script> & "quotes"'


def acceptance(*shares: float, rounds: int = 100) -> Acceptance:
    return Acceptance(rounds, 1.0 + sum(shares), shares)


def evaluation(**changes: Any) -> dict[str, Any]:
    its = [
        SamplingAcceptance(
            sampling,
            tokens=1000,
            loop_share=0.25,
            whole=acceptance(0.7, 0.5),
            before_loops=acceptance(0.6, 0.3),
            by_category={"prose": acceptance(0.5, 0.2), HOSTILE: acceptance(0.0, 0.0, rounds=0)},
            tokens_per_step=(1.0, 1.45, 1.9),
        )
        for sampling in SAMPLINGS
    ]
    pace = Pace(prompts=3, plain=100.0, drafted=150.0, speedup=1.5)
    values: dict[str, Any] = {
        "model": "gemma",
        "drafter": "drafter",
        "backend": "cpu",
        "prompts": 4,
        "options": EvaluationOptions(draft_length=2),
        "acceptance": tuple(its),
        "step_seconds": (0.010, 0.011, 0.012),
        "speeds": tuple(
            Speed(drafter, sampling, its, its)
            for drafter, its in (("drafter and lookup", pace), ("lookup", dataclasses.replace(pace, speedup=1.25)))
            for sampling in SAMPLINGS
        ),
        **changes,
    }
    untrained = asdict(acceptance(0.1, 0.0))
    before = [
        asdict(one)
        | {
            "before_loops": untrained,
            "by_category": {name: asdict(acceptance(0.2, 0.0)) for name in one.by_category},
            "tokens_per_step": (1.0, 1.05, 1.1),
        }
        for one in values["acceptance"]
    ]
    return {"prompts_from": "somewhere", **Evaluation(**values).as_dict(), "before": before}


def step(number: int, **changes: Any) -> dict[str, Any]:
    values = {"kind": "step", "step": number, "loss": 3.0 / number, "agreement": [0.5, 0.4], "reached": [1.0, 0.5]}
    spent = {"seconds": 100.0 * number, "writing": 10.0, "trained_tokens": 4096 * number}
    return {**values, **spent, **changes}


def page(entries: list[dict[str, Any]], values: dict[str, Any], **changes: Any) -> str:
    options = RunOptions(**{"model": "gemma", "tokens": 1000, **changes})
    return render_report(asdict(options), entries, values, command=f"draftwerk train-drafter --out {HOSTILE}")


def text(html: str) -> str:
    root = ElementTree.fromstring(
        re.sub(r"<(meta[^>]*|br)>", r"<\1/>", html.replace("<!DOCTYPE html>", "")).replace("&times;", "×")
    )
    return " ".join("".join(root.itertext()).split())


def test_a_report_says_what_a_drafter_is_worth() -> None:
    texts = [{**step(number), "kind": "text", "tokens": 1000} for number in (1, 2)]
    html = page([*texts, step(1), step(2)], evaluation())
    shown = text(html)
    assert "8,192 tokens trained on, 2,000 of them different" in shown
    assert "in 2 steps and 3 min" in shown
    assert "1.90tokens a step, greedy (before training 1.10)" in shown
    assert "1.50 ×as fast as without drafts, greedy (by lookup alone 1.25)" in shown
    assert "(10.0, 11.0, 12.0 ms" in shown
    assert html.count("<svg") == 6
    assert "seed" in shown


def test_positions_are_depths_in_a_tree() -> None:
    html = page([step(1)], evaluation())
    shown = text(html)
    assert "The drafts of a step form a tree" in shown
    assert "tokens a stepdepth 1depth 2" in shown
    assert 'aria-label="steps that accepted drafts so deep by depth in the tree of drafts"' in html
    assert "draft 1" not in shown.partition("Drafts accepted")[2]


def test_a_report_says_what_tokens_a_step_were_before_training() -> None:
    shown = text(page([step(1)], evaluation()))
    assert "greedy, before training1001.1010%0%" in shown  # rounds, tokens a step, depths
    assert "prose1001.701.2050%" in shown
    assert "measured for each number on the first 48 tokens" in shown
    html = page([step(1)], evaluation())
    for name in ("greedy", "greedy, before training", "sampled", "sampled, before training"):
        assert f"<title>{name}</title>" in html


def test_what_users_name_is_text() -> None:
    html = page([step(1)], evaluation(), prompts=HOSTILE)
    assert "<script>" not in html
    assert text(html).count(HOSTILE) == 3


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{**step(1), "kind": "text", "tokens": 5}],
        [{**step(1), "kind": "session"}],
        [step(1)],
        [step(1, loss=math.nan, agreement=[0.0, math.nan]), step(2, loss=math.inf)],
        [step(1, agreement=[], reached=[])],
        [step(1, agreement=[0.1, 0.0], reached=[1.0, 0.0])],
        [step(i) for i in range(1, 2000)],
    ],
)
def test_any_log_makes_a_report(entries: list[dict[str, Any]]) -> None:
    html = page(entries, evaluation())
    assert "nan" not in re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL)
    assert text(html)
    assert len(html) < 100_000


def test_what_was_not_measured_is_left_out() -> None:
    values = evaluation(speeds=(), step_seconds=())
    for its in (*values["acceptance"], *values["before"]):
        its["tokens_per_step"] = ()
    shown = text(page([step(1)], values))
    assert "Not measured." in shown
    assert "as fast as" not in shown
    assert "fewer drafts" not in shown
    slow = tuple(Speed(drafter, its, None, None) for drafter in ("drafter and lookup", "lookup") for its in SAMPLINGS)
    shown = text(page([step(1)], evaluation(speeds=slow, step_seconds=())))
    assert "drafter and lookup, greedy---" in shown.replace(" ", "").replace(
        "drafterandlookup,", "drafter and lookup, "
    )
    assert "let expect" not in shown


def test_nothing_accepted_is_shown() -> None:
    nothing = Acceptance(0, 1.0, (0.0, 0.0))
    its = [SamplingAcceptance(sampling, 0, 0.0, nothing, nothing, {"": nothing}, (1.0,) * 3) for sampling in SAMPLINGS]
    assert "1.00tokens a step" in text(page([step(1)], evaluation(acceptance=tuple(its))))

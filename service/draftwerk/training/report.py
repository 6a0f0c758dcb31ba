"""The report of a training run: one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from draftwerk.training import charts
from draftwerk.training.evaluation import LENGTH_TOKENS
from draftwerk.training.sampling import Sampling

_SHOWN_POSITIONS = 4  # of a chain, in the chart of agreement: few get further
_HIDDEN = ("text", "model")  # options that are shown otherwise


def render_report(
    options: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], *, command: str
) -> str:
    """The report as HTML.

    Args:
        options: of the run, as plain values.
        entries: its log.
        evaluation: what draftwerk.training.evaluation.Evaluation.as_dict() gave, and with it "before": acceptance
            before the first step; "prompts_from": what prompts those are.
        command: that began it.
    """
    environment = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    steps = [entry for entry in entries if entry["kind"] == "step"]
    last = entries[-1] if entries else {"seconds": 0.0, "writing": 0.0, "trained_tokens": 0}
    before = {its["sampling"]: its for its in evaluation["before"]}
    return environment.get_template("report.html.jinja").render(
        charts=charts,
        command=command,
        options={
            name: value
            for name, value in options.items()
            if name not in _HIDDEN and value is not None and value is not False
        },
        steps=len(steps),
        spent=last,
        written=sum(entry["tokens"] for entry in entries if entry["kind"] == "text"),
        evaluation=evaluation,
        before=before,
        loss=_loss(steps),
        agreement=_agreement(steps),
        depths={its["sampling"]: _depths(its, before[its["sampling"]]) for its in evaluation["acceptance"]},
        by_draft_length=_by_draft_length(evaluation["acceptance"], before),
        categories=_categories(evaluation["acceptance"], before),
        expected=_expected(evaluation["expected"]),
        duration=duration,
        sampled=Sampling(**evaluation["options"]["sampled"]),
        length_tokens=LENGTH_TOKENS,
        gains=_gains(evaluation["speeds"]),
    )


def _loss(steps: Sequence[Mapping[str, Any]]) -> charts.LineChart:
    points = [(float(step["step"]), float(step["loss"])) for step in steps]
    return charts.line_chart(
        [("loss", points)], x_label="optimizer step", y_label="divergence of a chain, nats", y_from=0.0
    )


def _agreement(steps: Sequence[Mapping[str, Any]]) -> charts.LineChart:
    count = min((len(step["agreement"]) for step in steps), default=0)
    lines = [
        (
            f"draft {position + 1}",
            # Where no chain got so far there is nothing to agree on.
            [
                (float(step["step"]), float(step["agreement"][position]))
                for step in steps
                if step["reached"][position] > 0
            ],
        )
        for position in range(min(count, _SHOWN_POSITIONS))
    ]
    return charts.line_chart(
        lines, x_label="optimizer step", y_label="same likeliest token as the target", percent=True, y_from=0.0
    )


def _depths(after: Mapping[str, Any], before: Mapping[str, Any]) -> charts.BarChart:
    shares = after["before_loops"]["by_position"]
    return charts.bar_chart(
        [f"{depth + 1}" for depth in range(len(shares))],
        [("before training", before["before_loops"]["by_position"]), ("after", shares)],
        x_label="depth in the tree of drafts",
        y_label="steps that accepted drafts so deep",
    )


def _by_draft_length(
    acceptance: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]
) -> charts.LineChart | None:
    """Tokens a step by the number of drafts."""
    lines = [
        (name, list(enumerate(map(float, its["tokens_per_step"]))))
        for after in acceptance
        for name, its in (
            (after["sampling"], after),
            (f"{after['sampling']}, before training", before[after["sampling"]]),
        )
    ]
    if not any(points for _, points in lines):
        return None
    return charts.line_chart(lines, x_label="drafts a step", y_label="tokens a step")


def _categories(
    acceptance: Sequence[Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]]:
    """Category to the acceptance of each way of sampling, after and before training, the best category first."""
    names = {name for its in acceptance for name in its["by_category"]}
    rows = {
        name: [(its["by_category"][name], before[its["sampling"]]["by_category"][name]) for its in acceptance]
        for name in names
    }
    return dict(sorted(rows.items(), key=lambda row: (-sum(its["tokens_per_step"] for its, _ in row[1]), row[0])))


def _gains(speeds: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Way of sampling to the speed-up by drafter and lookup, and by lookup alone."""
    speedups = {(its["drafter"], its["sampling"]): (its["before_loops"] or {}).get("speedup") for its in speeds}
    return {
        sampling: [speedups.get((drafter, sampling)) for drafter in ("drafter and lookup", "lookup")]
        for sampling in dict.fromkeys(its["sampling"] for its in speeds)
    }


def _expected(expectations: Sequence[Mapping[str, Any]]) -> charts.LineChart | None:
    if not expectations:
        return None
    return charts.line_chart(
        [(its["sampling"], [(float(i), v) for i, v in enumerate(its["by_draft_length"])]) for its in expectations],
        x_label="drafts a step",
        y_label="speed-up",
    )


def duration(seconds: float) -> str:
    """Such as "3 h 20 min", "12 min" or "45 s"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"

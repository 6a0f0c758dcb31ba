"""The geometry of a report's charts, in units of an SVG picture; the report's template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
"""Margins around the plot, in which the axes are labelled."""

_POINTS = 320  # of a line: more would not be seen
_TICKS = 5
_BAR_GAP = 0.25  # of the place of a group of bars


@dataclass(frozen=True)
class Tick:
    """A value that an axis shows: where, and how it is written."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: for the legend.
        points: of an SVG polyline; "" if no value can be drawn.
    """

    name: str
    points: str


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis.

    Attributes:
        x_label, y_label: what the axes are.
        x_ticks, y_ticks: their values.
        lines: at least one.
    """

    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        x, y, width, height: where it is.
        series: whose it is, from 0.
        text: what it says.
    """

    x: float
    y: float
    width: float
    height: float
    series: int
    text: str


@dataclass(frozen=True)
class BarChart:
    """Groups of bars.

    Attributes:
        x_label, y_label: what the axes are.
        x_ticks: the groups.
        y_ticks: values.
        names: of the series.
        bars: group after group.
    """

    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    names: tuple[str, ...]
    bars: tuple[Bar, ...]


def line_chart(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    y_from: float | None = None,
) -> LineChart:
    """A chart of named lines, each of (x, y) in ascending order of x. Values that are not finite are left out.

    Args:
        percent: whether y is a share, shown from 0% to 100% at most.
        y_from: where the y axis begins; None: below the smallest value.
    """
    drawn = [(name, _thinned([(x, y) for x, y in points if math.isfinite(x + y)])) for name, points in lines]
    every = [point for _, points in drawn for point in points]
    x_low, x_high = _range([x for x, _ in every])
    y_low, y_high = _range([y for _, y in every])
    y_low = y_low if y_from is None else min(y_from, y_low)
    y_ticks = _ticks(y_low, y_high, percent=percent)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    to_x, to_y = _to_x(x_low, x_high), _to_y(y_low, y_high)
    return LineChart(
        x_label,
        y_label,
        tuple(Tick(to_x(value), f"{value:,g}") for value in _ticks(x_low, x_high) if x_low <= value <= x_high),
        tuple(Tick(to_y(value), _text(value, percent)) for value in y_ticks),
        tuple(Line(name, " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in points)) for name, points in drawn),
    )


def bar_chart(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, x_label: str, y_label: str
) -> BarChart:
    """A chart of shares, 0 to 1: for each group a bar of every series."""
    to_y = _to_y(0.0, 1.0)
    place = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    width = place * (1 - _BAR_GAP) / max(1, len(series))
    bars = []
    for group in range(len(groups)):
        for index, (name, values) in enumerate(series):
            share = min(max(values[group], 0.0), 1.0) if math.isfinite(values[group]) else 0.0
            x = LEFT + place * (group + _BAR_GAP / 2) + width * index
            text = f"{name}, {groups[group]}: {share:.1%}"
            bars.append(Bar(x, to_y(share), width, to_y(0.0) - to_y(share), index, text))
    return BarChart(
        x_label,
        y_label,
        tuple(Tick(LEFT + place * (group + 0.5), name) for group, name in enumerate(groups)),
        tuple(Tick(to_y(value), f"{value:.0%}") for value in (0.0, 0.25, 0.5, 0.75, 1.0)),
        tuple(name for name, _ in series),
        tuple(bars),
    )


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that there are few points and a jagged line is a smooth one."""
    size = math.ceil(len(points) / _POINTS)
    pieces = [points[first : first + size] for first in range(0, len(points), size)] if points else []
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The least and the greatest, and far enough apart to tell values between them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    size = max(abs(low), abs(high))
    if high - low > 1e-6 * size:
        return low, high
    return low - max(0.5, 1e-6 * size), high + max(0.5, 1e-6 * size)


def _ticks(low: float, high: float, *, percent: bool = False) -> list[float]:
    """Round values, one or two of which lie outside."""
    if percent:
        low, high = 0.0, min(max(high, 0.1), 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (times * step) <= _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _text(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent else f"{value:,g}"


def _to_x(low: float, high: float) -> Callable[[float], float]:
    return lambda value: LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)


def _to_y(low: float, high: float) -> Callable[[float], float]:
    return lambda value: HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

"""Charts stay inside their picture, whatever the values are."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftwerk.training.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, bar_chart, line_chart

ANYTHING = st.floats(allow_nan=True, allow_infinity=True, width=32)


def points(line: Line) -> list[tuple[float, float]]:
    return [tuple(map(float, point.split(","))) for point in line.points.split()]  # type: ignore[misc]


def test_a_line_goes_from_corner_to_corner() -> None:
    chart = line_chart([("up", [(0.0, 0.0), (10.0, 1.0)])], x_label="x", y_label="y")
    assert points(chart.lines[0]) == [(LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, TOP)]
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [tick.text for tick in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_shares_are_percents() -> None:
    chart = line_chart([("share", [(1.0, 0.31), (2.0, 0.42)])], x_label="x", y_label="y", percent=True)
    assert [tick.text for tick in chart.y_ticks] == ["0%", "10%", "20%", "30%", "40%", "50%"]


def test_many_points_are_few_means() -> None:
    chart = line_chart([("noise", [(float(i), float(i % 2)) for i in range(10_000)])], x_label="x", y_label="y")
    drawn = points(chart.lines[0])
    assert 250 < len(drawn) <= 320
    assert {round(y) for _, y in drawn} == {round(drawn[0][1])}


@pytest.mark.parametrize("values", [[], [(3.0, 7.0)], [(1.0, math.nan)], [(1.0, 5.0), (2.0, 5.0)], [(1.0, math.inf)]])
def test_awkward_lines_are_drawn(values: list[tuple[float, float]]) -> None:
    chart = line_chart([("line", values), ("none", [])], x_label="x", y_label="y", y_from=0.0)
    assert len(points(chart.lines[0])) == sum(math.isfinite(x + y) for x, y in values)
    assert chart.lines[1].points == ""
    assert chart.y_ticks


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(ANYTHING, ANYTHING), max_size=50), st.booleans())
def test_lines_stay_inside(values: list[tuple[float, float]], percent: bool) -> None:
    if percent:
        values = [(x, min(max(y, 0.0), 1.0)) for x, y in values]
    chart = line_chart([("line", sorted(values))], x_label="x", y_label="y", percent=percent)
    for x, y in points(chart.lines[0]):
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    assert 2 <= len(chart.y_ticks) <= 8
    assert all(TOP - 0.1 <= tick.at <= HEIGHT - BOTTOM + 0.1 for tick in chart.y_ticks)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 8), st.integers(1, 3), st.data())
def test_bars_stay_inside_and_apart(groups: int, series: int, data: st.DataObject) -> None:
    values = [(f"s{i}", data.draw(st.lists(ANYTHING, min_size=groups, max_size=groups))) for i in range(series)]
    chart = bar_chart([f"g{i}" for i in range(groups)], values, x_label="x", y_label="y")
    assert len(chart.bars) == groups * series
    for bar, following in zip(chart.bars, [*chart.bars[1:], None], strict=False):
        assert bar.x >= LEFT
        assert bar.x + bar.width <= WIDTH - RIGHT + 0.1
        assert bar.y >= TOP - 0.1
        assert bar.y + bar.height == pytest.approx(HEIGHT - BOTTOM)
        assert following is None or bar.x + bar.width <= following.x + 0.1

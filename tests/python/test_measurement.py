"""What `draftwerk bench` drives and adds up, over scripted streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import pytest

from draftwerk import GenerationStats
from draftwerk.measurement import BenchPrompt, drafter_figures, output_sha256, run_prompts

PROMPTS = [(BenchPrompt(str(i), "", ""), [i]) for i in range(6)]
STATS = GenerationStats(generated_tokens=2, steps=2)


class Stream:
    """Answers [n] with the tokens n, n + 10, as soon as `gates[n]` is set."""

    def __init__(self, token_ids: Sequence[int], gates: dict[int, asyncio.Event], log: list[str]) -> None:
        self.number = token_ids[0]
        self.gates = gates
        self.log = log
        log.append(f"start {self.number}")

    async def __aiter__(self) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(token_ids=(self.number,), received_at=1.0, stats=None)
        await self.gates[self.number].wait()
        if self.number == 13:
            raise RuntimeError("out of pages")
        yield SimpleNamespace(token_ids=(self.number + 10,), received_at=2.0, stats=STATS)

    def cancel(self) -> None:
        self.log.append(f"cancel {self.number}")


async def logged(log: list[str], entry: str) -> None:
    while entry not in log:
        await asyncio.sleep(0)


async def test_records_are_in_the_order_of_the_prompts_whatever_ends_first() -> None:
    gates = {i: asyncio.Event() for i in range(6)}
    log: list[str] = []
    running = asyncio.ensure_future(run_prompts(lambda ids: Stream(ids, gates, log), PROMPTS, 3, lambda: None))
    for number in (2, 1, 3, 5, 4, 0):
        gates[number].set()
        await asyncio.wait_for(logged(log, f"cancel {number}"), 30)
    records, seconds = await asyncio.wait_for(running, 30)
    assert [record.token_ids for record in records] == [(i, i + 10) for i in range(6)]
    assert [entry for entry in log if entry.startswith("start")] == [f"start {i}" for i in range(6)]
    assert log.index("start 3") > log.index("cancel 2") > log.index("start 2"), "three at a time"
    assert records[0].arrivals == ((1.0, 1), (2.0, 1))
    assert seconds > 0


async def test_a_failure_ends_the_others() -> None:
    gates = {i: asyncio.Event() for i in (0, 1, 13)}
    gates[13].set()
    log: list[str] = []
    prompts = [(BenchPrompt("", "", ""), [i]) for i in (0, 1, 13)]
    with pytest.raises(RuntimeError, match="out of pages"):
        await run_prompts(lambda ids: Stream(ids, gates, log), prompts, 3, lambda: None)
    assert {"cancel 0", "cancel 1", "cancel 13"} <= set(log)


def test_a_token_cannot_move_to_the_next_output_unnoticed() -> None:
    assert output_sha256([[1, 2], [3]]) != output_sha256([[1], [2, 3]])


def test_what_drafters_did_before_does_not_count() -> None:
    before = {"mtp": {"drafted_by_position": (4, 2), "accepted_by_position": (1, 0), "warning": "x", "name": "mtp"}}
    after = {
        "mtp": {"drafted_by_position": (14, 6, 5, 2), "accepted_by_position": (6, 1, 0, 0), "warning": "hardly any"},
        "lookup": {"drafted_by_position": [], "accepted_by_position": [], "warning": ""},
    }
    assert drafter_figures(before, after) == {
        "mtp": {
            "drafted_by_position": [10, 4, 5, 2],
            "accepted_by_position": [5, 1, 0, 0],
            "acceptance_by_position": [0.5, 0.25, 0.0, 0.0],
            "warning": "hardly any",
        },
        "lookup": {
            "drafted_by_position": [],
            "accepted_by_position": [],
            "acceptance_by_position": [],
            "warning": None,
        },
    }


def test_a_position_that_was_not_drafted_meanwhile_has_no_share() -> None:
    figures = {"drafted_by_position": [4, 2], "accepted_by_position": [1, 1], "warning": None}
    assert drafter_figures({"mtp": figures}, {"mtp": figures})["mtp"]["acceptance_by_position"] == [0.0, 0.0]

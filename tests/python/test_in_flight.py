"""So many requests at a time, in order, and none is left behind."""

from __future__ import annotations

import asyncio

import pytest

from draftwerk.in_flight import keep_in_flight


async def test_items_begin_in_order_and_so_many_at_a_time() -> None:
    begun: list[int] = []
    running, most = 0, 0

    async def work(item: int) -> None:
        nonlocal running, most
        begun.append(item)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (item % 3))
        running -= 1

    await keep_in_flight(3, range(10), work)
    assert begun == list(range(10))
    assert (most, running) == (3, 0)


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_the_others_are_ended_at_once(how: str) -> None:
    ended: list[int] = []

    async def work(item: int) -> None:
        if item == 2 and how == "failed":
            raise ValueError("of one")
        try:
            await asyncio.sleep(60.0)
        finally:
            ended.append(item)

    running = asyncio.ensure_future(keep_in_flight(3, range(10), work))
    await asyncio.sleep(0.01)
    if how == "cancelled":
        running.cancel()
    with pytest.raises(ValueError if how == "failed" else asyncio.CancelledError):
        await running
    assert ended == ([0, 1] if how == "failed" else [0, 1, 2])

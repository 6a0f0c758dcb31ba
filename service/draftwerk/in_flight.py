"""So many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

_T = TypeVar("_T")


async def keep_in_flight(count: int, items: Iterable[_T], work: Callable[[_T], Awaitable[None]]) -> None:
    """Works on items, begun in their order, `count` at a time until all are done.

    After a failure or Ctrl-C the others are ended at once instead of being waited for.
    """
    waiting = iter(items)

    async def take_turns() -> None:
        for item in waiting:
            await work(item)

    workers = [asyncio.ensure_future(take_turns()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

"""Tokenising beside the event loop: a long prompt takes milliseconds, in which no stream would go on."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from typing_extensions import ParamSpec

LONG_PROMPT_BYTES = 16 << 10
"""Prompts of at least this size are tokenised off the loop. A smaller one takes less time than two thread switches
cost the others."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="draftwerk-encoding")


async def off_loop(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Runs a function on one of the encoding threads; the event loop goes on meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(_threads, functools.partial(function, *args, **kwargs))

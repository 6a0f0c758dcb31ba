"""The server's log: one line per event, readable on a terminal and JSON elsewhere. Never anything of a prompt."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

from draftwerk import acceptance

_MOST_FRAMES = 100  # exceptions can be each other's context, in a circle

_log = structlog.stdlib.get_logger("draftwerk.server")


def configure(form: Literal["auto", "console", "json"], level: str, stream: TextIO | None = None) -> None:
    """Sends all logging of the process, that of libraries too, to `stream` (default: stderr) in one form."""
    stream = stream or sys.stderr
    console = form == "console" or (form == "auto" and stream.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _exception_without_text,
        _in_order,
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0, sort_keys=False)
        if console
        else structlog.processors.JSONRenderer()
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(allow=acceptance.LOG_FIELDS), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def log_loop_exceptions(loop: asyncio.AbstractEventLoop) -> None:
    """Logs what asyncio has to say without the objects that it is about: their repr may hold what a client sent."""

    def handle(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        error = context.get("exception")
        _log.error(str(context.get("message")) if error is None else "unhandled exception", exc_info=error)

    loop.set_exception_handler(handle)


def _in_order(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What every line has comes first, in the order in which people read."""
    return {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event} | dict(event)


def _exception_without_text(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An exception as its types and frames. Its message is left out: it may quote what a client sent."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given[1] if isinstance(given, tuple) else given
    lines: list[str] = []
    while isinstance(error, BaseException) and len(lines) < _MOST_FRAMES:
        lines.append(("caused by " if lines else "") + type(error).__qualname__)
        frames = traceback.extract_tb(error.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if lines:
        event["exception"] = "\n".join(lines)
    return event

"""A line at the foot of the terminal while output scrolls above it."""

from __future__ import annotations

import contextlib
import sys
import termios
import time
from typing import Any

from rich.console import Console

_SECONDS_BETWEEN = 0.2  # a terminal is slow, and the server may need the cores
_FEWEST_ROWS = 4


class StatusLine:
    """Keeps the terminal's last row for a status, and its keys silent, for as long as the context lasts.

    Rows above the last are made the terminal's scrolling region, so that output needs no knowledge of the status. Keys
    that are pressed meanwhile are not echoed into the output; the next prompt gets them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows = 0  # of the terminal when its last row was taken; 0: it is not
        self._shown_at = 0.0
        self._keys: list[Any] | None = None  # the terminal's settings for keys, to go back to

    def __enter__(self) -> StatusLine:
        with contextlib.suppress(termios.error, OSError, ValueError):  # stdin is no terminal
            self._keys = termios.tcgetattr(sys.stdin)
            input_flags, output_flags, control_flags, local_flags, *others = self._keys
            silent = [input_flags, output_flags, control_flags, local_flags & ~termios.ECHO, *others]
            termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._write(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
            self._rows = 0
        if self._keys is not None:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self._keys)

    def show(self, status: str) -> None:
        """Shows the status, unless the last one is only just there or the terminal cannot."""
        now = time.monotonic()
        width, height = self._console.size
        capable = self._console.is_terminal and not self._console.is_dumb_terminal and height >= _FEWEST_ROWS
        if not capable or now - self._shown_at < _SECONDS_BETWEEN:
            return
        self._shown_at = now
        if height != self._rows:
            self._take_last_row(height)
        self._write(f"\x1b7\x1b[{height};1H\x1b[2K\x1b[2m{status[: width - 1]}\x1b[0m\x1b8")

    def _take_last_row(self, height: int) -> None:
        # One row down and up again: if the cursor was in the last row, everything has now moved up by one.
        self._write(f"\x1bD\x1b[A\x1b7\x1b[1;{height - 1}r\x1b8")
        self._rows = height

    def _write(self, control: str) -> None:
        self._console.file.write(control)
        self._console.file.flush()

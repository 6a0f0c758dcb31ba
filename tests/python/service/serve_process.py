"""`draftwerk serve` as a process that a test starts, reads the log of, and ends; and the types of the fixtures."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import IO, Any

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from draftwerk.server.server import Server

TIMEOUT = 60.0
"""Seconds that nothing takes: a test that waits longer has failed."""


@dataclass
class ServerProcess:
    """A running `draftwerk serve`."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    """What it has written to stderr so far."""
    _arrivals: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True).start()

    def _read(self, stderr: IO[str]) -> None:
        for line in stderr:
            self.lines.append(line)
            self._arrivals.put(line)
        self._arrivals.put(None)

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next line of the log with this event."""
        while True:
            line = self._arrivals.get(timeout=TIMEOUT)
            assert line is not None, f"the server ended before {event!r}:\n" + "".join(self.lines)
            if line.startswith("{") and (entry := json.loads(line))["event"] == event:
                return dict(entry)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        return self.process.wait(TIMEOUT)


@dataclass
class RunningServer:
    """A server that answers, and how it said that it does."""

    server: ServerProcess
    serving: dict[str, Any]

    @property
    def address(self) -> str:
        """What a channel is opened to."""
        return str(self.serving["listen"])


def start_serve(*flags: str, environment: dict[str, str] | None = None) -> ServerProcess:
    """Starts `draftwerk serve` with these flags and without any settings from this process's environment."""
    pipe = subprocess.PIPE
    return ServerProcess(
        subprocess.Popen(
            _command(flags), env=_environment(environment), stdin=subprocess.DEVNULL, stderr=pipe, text=True
        )
    )


def failed_serve(*flags: str) -> tuple[int, str]:
    """The exit code of a `draftwerk serve` that cannot start, and the one line in which it says why."""
    ended = subprocess.run(
        _command(flags),
        env=_environment(None),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    return ended.returncode, line


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`draftwerk` with these arguments, in a process of its own: with its own logging."""
    return subprocess.run(
        [sys.executable, "-m", "draftwerk", *arguments],
        env=_environment(None),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def _command(flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "draftwerk", "serve", *flags]


def _environment(changes: dict[str, str] | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWERK_")}
    path = os.pathsep.join(part for part in sys.path if part)
    return {**inherited, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "200", **(changes or {})}


def end(server: ServerProcess) -> int:
    """Ends a server as an operator would, and returns its exit code."""
    if server.process.poll() is None:
        server.signal(signal.SIGTERM)
    try:
        return server.wait()
    finally:
        server.process.kill()


def scraped(address: str) -> dict[tuple[str, ...], float]:
    """What an address serves over HTTP: (name, label values in the order of their names) to value."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT) as response:
        text = response.read().decode()
    return {_key(sample): sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def probed(address: str) -> tuple[int, str]:
    """The status and the text of /healthz."""
    try:
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=TIMEOUT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _key(sample: Sample) -> tuple[str, ...]:
    return (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))


ServerFactory = Callable[..., RunningServer]
InProcess = Callable[..., AbstractAsyncContextManager[Server]]

"""A server of one's own: `draftwerk serve` in a process beside this one, for as long as a command needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, Union

from draftwerk.cli.failures import CommandError

_STOP_SECONDS = 10.0
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

Setting = Union[str, int, float, bool, None]


@contextmanager
def local_server(model: str, **settings: Setting) -> Iterator[str]:
    """Serves `model` on a Unix socket that only this user can reach.

    Args:
        model: what `draftwerk serve --model` takes.
        settings: further settings of the server by their names; those that are None keep their defaults.

    Yields:
        The address for the client, once the server answers. The server ends with the context.

    Raises:
        CommandError: the server could not start, or ended before the context did; with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="draftwerk-") as directory, _ends_by_exception():
        socket = Path(directory, "socket")
        errors = Path(directory, "stderr")
        fixed: dict[str, Setting] = {
            "model": model,
            "listen": f"unix:{socket}",
            "metrics_listen": "",
            "log_level": "warning",
            "log_format": "console",
            "grace_period": 0,  # at the end nobody listens any more
        }
        command = [sys.executable, "-m", "draftwerk.cli.local_server_process", "serve", *_flags({**fixed, **settings})]
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # nothing is written: its end tells the server that this process is no more
                stdout=stderr,
                stderr=stderr,
                env=_without_settings(os.environ),
                start_new_session=True,  # Ctrl-C is for the command, which then decides when the server ends
            )
        try:
            _wait_ready(process, socket)
            yield f"unix:{socket}"
        except CommandError:
            if process.poll() is None:
                raise
            raise _ended(process, errors) from None  # says more than that the connection broke
        finally:
            _stop(process)


def _without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what is set there for the user's servers; what chooses the kernels stays."""
    from draftwerk.server.settings import CONFIG_VARIABLE, ENVIRONMENT_PREFIX, Settings

    settings = {CONFIG_VARIABLE, *(ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields)}
    return {name: value for name, value in environment.items() if name not in settings}


def _flags(settings: dict[str, Setting]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            flags += [f"--{option}", str(value)]
    return flags


def _wait_ready(process: subprocess.Popen[bytes], socket: Path) -> None:
    """Waits, however long the model takes to load, until the server answers.

    Raises:
        CommandError: the server ended instead.
    """
    from draftwerk_client import Client, DraftwerkError

    while not socket.exists():  # connecting before would only make gRPC wait longer before its next try
        if process.poll() is not None:
            raise CommandError("the server ended")
        time.sleep(0.02)
    with Client(f"unix:{socket}") as client:
        while process.poll() is None:
            try:
                client.wait_ready(timeout=1.0)
                return
            except DraftwerkError:
                continue
    raise CommandError("the server ended")


def _ended(process: subprocess.Popen[bytes], errors: Path) -> CommandError:
    """What the server said last."""
    lines = errors.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if said.startswith("error: "):
        return CommandError(said.removeprefix("error: "), max(1, process.returncode))
    ending = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
    return CommandError(f"the server that was started ended with {ending}" + (f": {said}" if said else ""))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also when Ctrl-C ends the wait
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _ends_by_exception() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP (a terminal that was closed) end this process by an exception, so that it cleans up."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be handled
        yield
        return

    def end(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in _ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

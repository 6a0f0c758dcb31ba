"""`draftwerk chat` as users run it: through a pipe and at a terminal, with a server that runs or one of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serve_process import TIMEOUT

from draftwerk import Engine, SamplingParams
from draftwerk.cli.failures import CommandError
from draftwerk.cli.local_server import local_server
from draftwerk_client import Client

MESSAGES = ["Hello there", "And then?"]


@pytest.fixture(scope="module")
def answers(tiny_model_path: Path) -> list[str]:
    """What one-shot generation gives for the same conversation."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    token_ids: list[int] = []
    texts = []
    with Engine(tiny_model_path, threads=1, kv_memory="16MiB") as engine:
        for message in MESSAGES:
            token_ids += engine.continue_chat(token_ids, [{"role": "user", "content": message}])
            completion = engine.generate(token_ids, params)
            token_ids += completion.token_ids
            texts.append(completion.text)
    return texts


def start_chat(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    environment.update(options.pop("environment", {}))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "draftwerk", "chat", "--temperature", "1", "--seed", "3", "-n", "12", *arguments]
    return subprocess.Popen(command, env=environment, **{**pipes, **options})


def chat(*arguments: str, lines: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a chat through a pipe."""
    process = start_chat(*arguments)
    stdout, stderr = process.communicate("".join(f"{line}\n" for line in lines).encode(), timeout=TIMEOUT)
    return process.returncode, stdout.decode(), stderr.decode()


def one_line(stderr: str) -> str:
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    return stderr


def test_a_conversation_through_a_pipe_is_what_one_shot_generation_gives(server, answers: list[str]) -> None:
    code, stdout, stderr = chat("--target", server.address, lines=MESSAGES)
    assert (code, stdout, stderr) == (0, "".join(f"{answer}\n" for answer in answers), "")


def test_with_a_server_of_its_own(answers: list[str], tiny_model_path: Path) -> None:
    code, stdout, stderr = chat("--model", str(tiny_model_path), "--kv-memory", "16MiB", "-t", "1", lines=MESSAGES)
    assert (code, stdout, stderr) == (0, "".join(f"{answer}\n" for answer in answers), "")


def test_a_parameter_that_the_server_refuses_is_one_line(server) -> None:
    code, stdout, stderr = chat("--target", server.address, "--top-p", "7", lines=MESSAGES)
    assert (code, stdout) == (1, "")
    assert "top_p" in one_line(stderr)


def test_thinking_of_a_model_that_cannot_is_one_line(server) -> None:
    code, stdout, stderr = chat("--target", server.address, "--thinking", lines=MESSAGES)
    assert (code, stdout) == (2, "")
    assert "--thinking: the chat template of tiny-gemma knows no thinking" in one_line(stderr)


def test_a_model_that_cannot_think_need_not_be_told(server, answers: list[str]) -> None:
    code, stdout, _ = chat("--target", server.address, "--no-thinking", lines=MESSAGES)
    assert (code, stdout) == (0, "".join(f"{answer}\n" for answer in answers))


def test_nobody_at_the_address_is_one_line() -> None:
    code, stdout, stderr = chat("--target", "127.0.0.1:1", lines=MESSAGES)
    assert (code, stdout) == (1, "")
    assert "127.0.0.1:1" in one_line(stderr)


def test_a_model_that_cannot_be_loaded_is_the_line_of_the_server() -> None:
    code, stdout, stderr = chat("--model", "/nowhere/at-all", lines=MESSAGES)
    assert (code, stdout) == (2, "")
    assert "/nowhere/at-all" in one_line(stderr)


def test_a_server_that_goes_away_is_one_line(server_process, answers: list[str]) -> None:
    running = server_process()
    process = start_chat("--target", running.address)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{MESSAGES[0]}\n".encode())
    process.stdin.flush()
    first = f"{answers[0]}\n".encode()
    assert process.stdout.read(len(first)) == first
    running.server.process.kill()
    running.server.wait()
    _, stderr = process.communicate(b"more\n", timeout=TIMEOUT)
    assert process.returncode == 1
    one_line(stderr.decode())


def children(pid: int) -> list[int]:
    """The processes that the main thread of a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_chat_that_is_ended_takes_its_server_with_it(
    tiny_model_path: Path, answers: list[str], number: signal.Signals
) -> None:
    process = start_chat("--model", str(tiny_model_path), "--kv-memory", "16MiB", "-t", "1")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{MESSAGES[0]}\n".encode())
    process.stdin.flush()
    first = f"{answers[0]}\n".encode()
    assert process.stdout.read(len(first)) == first
    (server_pid,) = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + number
    assert b"Traceback" not in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid, 0)


def test_a_chat_that_is_killed_takes_its_server_with_it(tiny_model_path: Path) -> None:
    process = start_chat("--model", str(tiny_model_path), "--kv-memory", "16MiB", "-t", "1")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{MESSAGES[0]}\n".encode())
    process.stdin.flush()
    process.stdout.read(1)
    (server_pid,) = children(process.pid)
    server = os.pidfd_open(server_pid)
    try:
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert select.select([server], [], [], 10.0)[0], "it serves on"
    finally:
        with suppress(ProcessLookupError):
            os.kill(server_pid, signal.SIGKILL)
        os.close(server)


# --- at a terminal -------------------------------------------------------------------------------------------------


class Terminal:
    """A chat at a pseudo-terminal."""

    def __init__(self, *arguments: str, state: Path) -> None:
        self._ours, theirs = pty.openpty()
        environment = {"XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1", "LINES": "24", "COLUMNS": "100"}
        self.process = start_chat(
            *arguments, stdin=theirs, stdout=theirs, stderr=theirs, environment=environment, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""
        self._looked_at = 0

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str) -> None:
        """Reads on until the text is shown, after everything that was waited for before."""
        deadline = time.monotonic() + TIMEOUT
        while (found := self.shown.find(text, self._looked_at)) < 0:
            ready, _, _ = select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown[self._looked_at :]!r}"
            self._read()
        self._looked_at = found + len(text)

    def wait(self) -> int:
        """The exit code; shows what is left to show."""
        while select.select([self._ours], [], [], TIMEOUT)[0] and self._read():
            pass
        os.close(self._ours)
        return self.process.wait(TIMEOUT)

    def _read(self) -> bool:
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@pytest.fixture
def terminal(server, tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal("--target", server.address, "--show-drafts", state=tmp_path)
    yield opened
    opened.process.kill()


def test_at_a_terminal(terminal: Terminal) -> None:
    terminal.wait_for("/help lists commands")
    terminal.type("Hello there\r")
    terminal.wait_for("waiting for the first token")
    terminal.wait_for("per step)")
    terminal.type("/fork\r")
    terminal.wait_for("branch 1 is a copy")
    terminal.type("/seed 9\r")
    terminal.wait_for("seed = 9")
    terminal.type("And then?\r")
    terminal.wait_for("per step)")
    terminal.type("/branches\r")
    terminal.wait_for("last: And then?")
    terminal.wait_for("last: Hello there")
    terminal.type("/quit\r")
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.shown
    assert terminal.shown.count("\x1b[r") == 2, "each answer gives the last row back"


# --- the server of one's own ---------------------------------------------------------------------------------------


def test_a_local_server_lasts_as_long_as_its_context(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTWERK_MODEL", "/nowhere")
    monkeypatch.setenv("DRAFTWERK_MAX_SEQUENCES", "what is set for the user's servers is not for this one")
    others = children(os.getpid())
    with local_server(str(tiny_model_path), threads=1, kv_memory="16MiB", prefix_cache=False) as address:
        (server_pid,) = set(children(os.getpid())) - set(others)
        with Client(address) as client:
            assert client.model().name == tiny_model_path.name
            assert client.stats().cache.budget_bytes == 16 << 20
        socket = Path(address.removeprefix("unix:"))
        assert socket.parent.stat().st_mode & 0o077 == 0
    assert not socket.parent.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server_pid, 0)


def test_a_local_server_has_the_environment_that_chooses_kernels(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTWERK_CPU_ISA", "portable")
    with local_server(str(tiny_model_path), threads=1, kv_memory="16MiB") as address, Client(address) as client:
        assert "portable" in client.model().backend


def test_a_local_server_that_dies_says_how(tiny_model_path: Path) -> None:
    others = children(os.getpid())
    with (
        pytest.raises(CommandError, match="the server that was started ended with signal 9"),
        local_server(str(tiny_model_path), threads=1, kv_memory="16MiB"),
    ):
        (server_pid,) = set(children(os.getpid())) - set(others)
        os.kill(server_pid, signal.SIGKILL)
        os.waitid(os.P_PID, server_pid, os.WEXITED | os.WNOWAIT)
        raise CommandError("the connection broke")

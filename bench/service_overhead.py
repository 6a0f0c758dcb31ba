"""Measures what the service costs against the engine in process, and prints the table of docs/performance.md.

    python bench/service_overhead.py --threads 2 --json overhead.json

An engine in a process of its own and a server take turns on the same prompts, round by round, so that a slow spell of
the machine falls on both, and never compute at the same time. There are two of each: one with lookup alone, one with
the model's own drafters, which also generates without drafts. The client of the servers runs in this process, on the
same machine. The table shows medians over the rounds; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import queue
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from compare_llama_cpp import machine

from draftwerk import Engine, SamplingParams
from draftwerk.measurement import BenchPrompt, output_sha256, read_prompts, run_prompts
from draftwerk_client import AsyncClient, Client
from draftwerk_client.v1 import (
    generation_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    parameters_pb2,
    session_pb2,
)

STREAMS = (1, 16, 64)
# By the name of a row: the drafter that engine and server are started with, and whether generations draft.
ROWS = {"none": ("auto", False), "lookup": ("lookup", True), "auto": ("auto", True)}
FIRST_TOKENS = 32
SESSIONS = 200

SUBJECTS = (
    "the harbour in the early morning",
    "a letter that arrived thirty years late",
    "why small countries trade more than large ones",
    "the lighthouse keeper and his radio",
    "how a sculptor works with stone",
    "the first train over the mountains",
    "a recipe for rye bread",
    "the function that sorts a list in place",
)
OPENINGS = (
    "This is what we know about",
    "Write a short story about",
    "Summarise in three sentences:",
    "She had never thought much about",
    "The history of this begins with",
    "Explain to a child:",
    "def describe():\n    return",
    "The newspaper of that day wrote about",
)

Prompts = list[tuple[BenchPrompt, list[int]]]


class Run(NamedTuple):
    """What came of running prompts."""

    tokens_per_second: float
    first_tokens: list[float]
    """Seconds from submission to the first token, of each prompt."""
    output_sha256: str


Side = Callable[[Prompts, int, dict[str, Any]], Run]
"""Runs prompts, so many at a time, with these sampling parameters: in process, or through the service."""


def main() -> None:
    arguments = parse_arguments()
    measured: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        sides: dict[str, dict[str, Side]] = {}
        for drafter in ("lookup", "auto"):
            engine = stack.enter_context(engine_process(arguments, drafter))
            address = stack.enter_context(server_process(arguments, drafter))
            sides[drafter] = {"in process": engine, "service": stack.enter_context(through_service(address))}
        prompts = tokenized(address, texts(arguments.prompts))
        for number in range(arguments.rounds + 1):
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
            found = speeds(sides, prompts, arguments.max_tokens, number) | first_tokens(sides["auto"], prompts, number)
            for name, value in found.items():
                if number > 0:  # the one before touches weights and clocks
                    measured[name].append(value)
    for connections in (1, SESSIONS):
        with server_process(arguments) as address:
            measured[f"sessions, {connections}"].append(idle_sessions(address, connections))
    table = render(arguments, measured)
    print(table)
    if arguments.json is not None:
        report = {"command": command_line(), "machine": machine(), "rounds": measured, "table": table}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a GGUF file or a built-in name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--prompts", type=Path, help="JSON lines as for draftwerk bench; default: a list in the script")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args()


def texts(file: Path | None) -> list[BenchPrompt]:
    """As many prompts as the most streams."""
    if file is None:
        made = [f"{opening} {subject}" for opening in OPENINGS for subject in SUBJECTS]
        found = [BenchPrompt(str(number), "", text) for number, text in enumerate(made)]
    else:
        found = read_prompts(file, max(STREAMS))
    return (found * max(STREAMS))[: max(STREAMS)]


def tokenized(address: str, prompts: list[BenchPrompt]) -> Prompts:
    with Client(address) as client:
        return [(prompt, list(client.tokenize(prompt.text).token_ids)) for prompt in prompts]


# --- the two sides -----------------------------------------------------------------------------------------------


@contextmanager
def engine_process(arguments: argparse.Namespace, drafter: str) -> Iterator[Side]:
    """An engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve_engine, args=(theirs, arguments.model, arguments.threads, drafter), daemon=True
    )
    process.start()

    def run(*request: Any) -> Run:
        ours.send(request)
        answer: Run = ours.recv()
        return answer

    yield run
    ours.send(None)
    process.join()


def serve_engine(connection: Connection, model: str, threads: int, drafter: str) -> None:
    loop = asyncio.new_event_loop()
    with Engine(model, drafter=drafter, threads=threads, prefix_cache=False) as engine:

        def start(token_ids: Any, **params: Any) -> Any:
            return engine.submit(token_ids, SamplingParams(**params))

        async def deliver() -> None:
            engine.deliver_on(loop)

        loop.run_until_complete(deliver())
        while (request := connection.recv()) is not None:
            connection.send(loop.run_until_complete(run(start, *request)))


@contextmanager
def server_process(arguments: argparse.Namespace, drafter: str = "auto") -> Iterator[str]:
    """`draftwerk serve` on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = serve_command(arguments, drafter, address)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with Client(address) as client:
                client.wait_ready(60.0)
            yield address
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace"), file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


def serve_command(arguments: argparse.Namespace, drafter: str, address: str) -> list[str]:
    command = [sys.executable, "-m", "draftwerk.cli.main", "serve", "--model", arguments.model, "--listen", address]
    command += ["--drafter", drafter, "--threads", str(arguments.threads)]
    return [*command, "--metrics-listen", "", "--no-prefix-cache"]


@contextmanager
def through_service(address: str) -> Iterator[Side]:
    loop = asyncio.new_event_loop()

    async def connect() -> AsyncClient:
        return AsyncClient(address)

    client = loop.run_until_complete(connect())
    yield lambda *request: loop.run_until_complete(run(client.stream, *request))
    loop.run_until_complete(client.close())
    loop.close()


async def run(start: Callable[..., Any], prompts: Prompts, concurrency: int, params: dict[str, Any]) -> Run:
    records, seconds = await run_prompts(lambda ids: start(ids, **params), prompts, concurrency, lambda: None)
    return Run(
        sum(len(record.token_ids) for record in records) / seconds,
        [record.time_to_first_token for record in records],
        output_sha256(record.token_ids for record in records),
    )


# --- measurements ------------------------------------------------------------------------------------------------


def speeds(sides: dict[str, dict[str, Side]], prompts: Prompts, max_tokens: int, number: int) -> dict[str, float]:
    """Tokens per second of all streams together, each from its prompt to its last token. `sides` are by drafter."""
    found: dict[str, float] = {}
    for streams in STREAMS:
        for row, (drafter, drafting) in ROWS.items():
            chosen = prompts if streams > 1 else prompts[number % 8 :: 8]
            params = {"max_tokens": max_tokens, "ignore_eos": True, "drafting": drafting}
            outputs = set()
            for name, side in in_turn(sides[drafter], number):
                result = side(chosen, streams, params)
                found[f"{name}, {streams}, {row}"] = result.tokens_per_second
                outputs.add(result.output_sha256)
            assert len(outputs) == 1, "the service gave another output than the engine"
    return found


def first_tokens(sides: dict[str, Side], prompts: Prompts, number: int) -> dict[str, float]:
    """Median milliseconds to the first token of one stream, the sides in turn on every prompt."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for index in range(FIRST_TOKENS):
        prompt = prompts[(number * FIRST_TOKENS + index) % len(prompts)]
        for name, side in in_turn(sides, index):
            seconds[name] += side([prompt], 1, {"max_tokens": 1}).first_tokens
    return {f"{name}, first token": statistics.median(values) * 1e3 for name, values in seconds.items()}


def in_turn(sides: dict[str, Side], number: int) -> list[tuple[str, Side]]:
    """Each side is the first one every other time."""
    return list(sides.items())[:: 1 if number % 2 else -1]


def idle_sessions(address: str, connections: int) -> float:
    """MiB that the server grows by for SESSIONS sessions of one short turn each, besides the pages that they touch."""
    with ExitStack() as stack:
        operations = operations_pb2_grpc.OperationsStub(stack.enter_context(grpc.insecure_channel(address)))
        stubs = [
            # A channel with an option of its own shares its connection with no other.
            generation_pb2_grpc.GenerationStub(
                stack.enter_context(grpc.insecure_channel(address, options=[("draftwerk.connection", number)]))
            )
            for number in range(connections)
        ]
        for number in range(8):  # what is imported and allocated once
            open_session(stubs[0], number).cancel()
        before = operations.GetStats(operations_pb2.GetStatsRequest())
        sessions = [open_session(stubs[number % connections], number) for number in range(SESSIONS)]
        after = operations.GetStats(operations_pb2.GetStatsRequest())
        assert after.sessions >= SESSIONS
        for session in sessions:
            session.cancel()
    # The cache's memory becomes resident where it is first used, and stays so.
    pages = after.cache.peak_bytes - before.cache.peak_bytes
    return (after.resident_bytes - before.resident_bytes - pages) / 2**20


def open_session(stub: generation_pb2_grpc.GenerationStub, number: int) -> Any:
    """A session after its first turn; the call."""
    request = session_pb2.SessionRequest
    actions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    actions.put(request(request_number=1, open=request.Open()))
    prompt = parameters_pb2.Prompt(text=f"Session number {number} begins with")
    actions.put(request(request_number=2, append=request.Append(content=prompt)))
    stop = parameters_pb2.StopConditions(max_tokens=8, ignore_end_tokens=True)
    actions.put(request(request_number=3, generate=request.Generate(stop=stop)))
    call = stub.Session(iter(actions.get, None))
    for response in call:
        if response.generated.finish_reason:
            break
    return call


# --- the table ---------------------------------------------------------------------------------------------------


def render(arguments: argparse.Namespace, measured: dict[str, list[float]]) -> str:
    lines = [
        f"{machine()}, {arguments.model}, {arguments.threads} threads, medians of {arguments.rounds} rounds. "
        f"Command: `{command_line()}`",
        "",
        "| | in process | through the service | | goal |",
        "|---|---|---|---|---|",
    ]
    for streams in STREAMS:
        for row in ROWS:
            ours, theirs = (measured[f"{side}, {streams}, {row}"] for side in ("service", "in process"))
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            title = f"{streams} stream{'s' * (streams > 1)}, drafter {row}"
            speeds_of = f"{statistics.median(theirs):.4g} tokens/s | {statistics.median(ours):.4g} tokens/s"
            lines.append(f"| {title} | {speeds_of} | {ratio:.1%} | >= 95% |")
    ours, theirs = (measured[f"{side}, first token"] for side in ("service", "in process"))
    later = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
    medians = f"{statistics.median(theirs):.2f} ms | {statistics.median(ours):.2f} ms"
    lines.append(f"| first token of one stream, p50 | {medians} | {later:+.2f} ms | <= 3 ms |")
    for connections in (1, SESSIONS):
        title = f"{SESSIONS} idle sessions on {connections} connection{'s' * (connections > 1)}, besides their pages"
        lines.append(f"| {title} | - | {measured[f'sessions, {connections}'][0]:.1f} MiB | - | <= 20 MB |")
    return "\n".join(lines)


def command_line() -> str:
    """The command that took the figures."""
    return shlex.join(["python", *sys.argv])


if __name__ == "__main__":
    main()

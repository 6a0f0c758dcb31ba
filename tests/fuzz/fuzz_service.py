"""Fuzzes the service over a socket: whatever bytes arrive, a foreseen status in time, and the same outputs as ever.

python tests/fuzz/fuzz_service.py                          20,000 requests
python tests/fuzz/fuzz_service.py --seconds 20             as many as that time allows, 20,000 at most
python tests/fuzz/fuzz_service.py --seed 7 --call 1234     one call alone, to repeat a failure

A call with several messages, as sessions are, counts as that many requests. It is a failure when a call

- ends with INTERNAL, UNKNOWN or UNAVAILABLE, or with CANCELLED or DEADLINE_EXCEEDED that the client did not cause;
- does not end within its deadline;
- is refused without saying what is wrong, or is valid and refused;
- gets another output than an earlier one with the same fingerprint;

and when the server logs an error, does not answer a known request with its known output after each batch of calls,
still has a generation or a session at the end, or does not stop cleanly then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from service_calls import GENERATE, METHODS, REQUEST_ID, Call, call

from conformance.served import write_model
from draftwerk_client.v1.errors_pb2 import BadRequest, PreconditionFailure, RequestInfo, Status
from draftwerk_client.v1.generation_pb2 import GenerateRequest
from draftwerk_client.v1.operations_pb2 import GetStatsRequest, GetStatsResponse
from draftwerk_client.v1.output_pb2 import FinishReason, GenerateResponse
from draftwerk_client.v1.parameters_pb2 import Prompt, StopConditions, TokenIds
from draftwerk_client.v1.session_pb2 import SessionResponse
from loading.tiny_files import U32

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[bytes, bytes]"

REQUESTS = 20_000
BATCH = 400
IN_FLIGHT = 24
# Every call has to end within this, or the server hangs.
PATIENCE = 60.0

_FORESEEN = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_FORESEEN_IN_SESSION = {code.value[0] for code in _FORESEEN - {grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED}}
_DETAILS = {grpc.StatusCode.INVALID_ARGUMENT: BadRequest, grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailure}
# What grpc.aio makes of a call that the server ends while the client is writing: its true status is lost. That it was
# no error the server's log shows.
_LOST_STATUS = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_STATS = "/draftwerk.v1.Operations/GetStats"
_KNOWN = GenerateRequest(
    prompt=Prompt(token_ids=TokenIds(ids=[2, 270, 280, 290])), stop=StopConditions(max_tokens=8, ignore_end_tokens=True)
)


class Failure(Exception):
    """The server did what it must not do."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended."""

    code: grpc.StatusCode
    message: str
    details: Status | None
    request_id: str | None
    responses: tuple[bytes, ...]


class Server:
    """`draftwerk serve` with a tiny random model. Its memory and its queue are small enough to run out."""

    def __init__(self, directory: Path) -> None:
        model = write_model(directory / "tiny.gguf", gemma3__context_length=(U32, 600))
        self.address = f"unix:{directory / 'socket'}"
        self._log = directory / "log"
        settings = {"model": model, "listen": self.address, "metrics-listen": "", "log-format": "json", "threads": 1}
        settings |= {"kv-memory": "256KiB", "max-sequences": 16, "max-queued-tokens": 210}
        settings |= {"max-unread-tokens": 16, "max-message-bytes": 1 << 20, "grace-period": 10}
        flags = [argument for name, value in settings.items() for argument in (f"--{name}", str(value))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DRAFTWERK_")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "draftwerk", "serve", *flags], stdout=log, stderr=log, env=environment
            )

    def check(self) -> None:
        """Raises Failure if the server has ended, or has logged an error, or has written anything that is no log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        if self._process.poll() is not None:
            raise Failure(
                "the server ended with status {}:\n{}".format(self._process.returncode, "\n".join(lines[-50:]))
            )
        bad = [line for line in lines if not line.startswith("{") or json.loads(line)["level"] in ("error", "critical")]
        if bad:
            raise Failure("the server wrote\n{}".format("\n".join(bad[:20])))

    def stop(self) -> None:
        """Ends the server as an operator would. Raises Failure if it does not end cleanly."""
        self.check()
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failure(f"the server did not end within {PATIENCE:.0f} s of SIGTERM") from None
        if status != 0:
            raise Failure(f"the server ended with status {status}")

    def kill(self) -> None:
        """Makes sure that no process is left."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Fuzzer:
    """Makes calls and judges their outcomes."""

    def __init__(self, channel: grpc.aio.Channel, seed: int) -> None:
        self._channel = channel
        self._seed = seed
        self._outputs: dict[int, list[int]] = {}
        self.requests = 0
        self.calls = 0
        self.codes: Counter[str] = Counter()

    async def batch(self, numbers: Sequence[int]) -> None:
        """Makes these calls, many at a time, and some of them throughout.

        Raises:
            Failure: with every call that failed.
        """
        calls = {number: call(self._seed, number) for number in numbers}
        rest_is_done = asyncio.Event()
        held = [number for number in numbers if calls[number].ending == "hold"]
        others = iter([number for number in numbers if calls[number].ending != "hold"])
        failures: list[str] = []

        async def one(number: int) -> None:
            try:
                await self._make(calls[number], rest_is_done)
            except Failure as failure:
                failures.append(self._report(number, calls[number], failure))

        async def worker() -> None:
            for number in others:
                await one(number)

        holding = [asyncio.ensure_future(one(number)) for number in held]
        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        rest_is_done.set()
        await asyncio.gather(*holding)
        if failures:
            raise Failure("\n".join(failures[:5]))

    async def known_output(self) -> list[int]:
        """The output of the known request, which is tried again while the queue is full."""
        deadline = time.monotonic() + PATIENCE
        while True:
            outcome = await self._outcome(Call(GENERATE, (_KNOWN.SerializeToString(),)), asyncio.Event())
            if outcome.code is grpc.StatusCode.OK:
                return _tokens(outcome.responses)
            if outcome.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > deadline:
                raise Failure(f"the known request ended with {outcome.code.name}: {outcome.message}")

    async def at_rest(self) -> GetStatsResponse:
        """The server's figures, once it has nothing to do.

        Raises:
            Failure: it still has after a while.
        """
        deadline = time.monotonic() + PATIENCE / 4
        while True:
            outcome = await self._outcome(Call(_STATS, (GetStatsRequest().SerializeToString(),)), asyncio.Event())
            if outcome.code is not grpc.StatusCode.OK:
                raise Failure(f"GetStats ended with {outcome.code.name}: {outcome.message}")
            stats = GetStatsResponse.FromString(outcome.responses[0])
            busy = stats.running or stats.waiting or stats.paused or stats.sessions or stats.queued_tokens
            kept = stats.cache.used_bytes - stats.cache.reclaimable_bytes
            if not busy and not kept and stats.requests == stats.finished:
                return stats
            if time.monotonic() > deadline:
                raise Failure(f"nobody calls any more, and still the server is busy or keeps {kept} bytes:\n{stats}")

    async def _make(self, call: Call, rest_is_done: asyncio.Event) -> None:
        outcome = await self._outcome(call, rest_is_done)
        self.calls += 1
        self.requests += max(1, len(call.messages))
        if (outcome.code, outcome.message) == _LOST_STATUS:
            self.codes["with its status lost"] += 1
            return
        self.codes[outcome.code.name] += 1
        self._judge(call, outcome)

    async def _outcome(self, call: Call, rest_is_done: asyncio.Event) -> Outcome:
        # As bytes and as a stream, whatever the method is: on the wire a unary call is a stream of one message.
        patience = 2 * PATIENCE if call.ending == "hold" else PATIENCE  # those wait for the others
        stream: _Stream = self._channel.stream_stream(call.path)(
            timeout=call.timeout or patience, metadata=call.metadata, wait_for_ready=call.timeout is None
        )
        responses: list[bytes] = []
        try:
            await asyncio.wait_for(_converse(stream, call, responses, rest_is_done), patience + 10)
        except asyncio.TimeoutError:
            raise Failure("the call does not end at all") from None
        code, message = await stream.code(), await stream.details() or ""
        trailing = await stream.trailing_metadata() or ()
        initial = await stream.initial_metadata() or ()
        status = next((value for key, value in trailing if key == "grpc-status-details-bin"), None)
        request_id = next((str(value) for key, value in (*initial, *trailing) if key == REQUEST_ID), None)
        details = Status.FromString(status) if isinstance(status, bytes) else None
        return Outcome(code, message, details, request_id, tuple(responses))

    def _judge(self, call: Call, outcome: Outcome) -> None:
        code = outcome.code
        caused = {grpc.StatusCode.CANCELLED} if call.ending == "cancel" else set()
        if call.timeout is not None:
            caused = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
        if code not in _FORESEEN | caused:
            raise Failure(f"{code.name}: {outcome.message}")
        if code in _DETAILS:
            _judge_details(outcome, _DETAILS[code])
        if call.is_plain and code not in {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED} | caused:
            raise Failure(f"a valid request is refused with {code.name}: {outcome.message}")
        if call.metadata and code is grpc.StatusCode.OK:
            _judge_request_id(call, outcome.request_id)
        if call.path in METHODS:
            responses = [_parsed(call.path, response) for response in outcome.responses]
            for response in responses:
                if isinstance(response, SessionResponse) and response.HasField("error"):
                    self.codes["errors in sessions"] += 1
                    _judge_error_in_session(response.error)
            if call.path == GENERATE and code is grpc.StatusCode.OK:
                self._judge_output(responses)

    def _judge_output(self, responses: Sequence[Message]) -> None:
        messages = [response for response in responses if isinstance(response, GenerateResponse)]
        if not messages or messages[-1].finish_reason not in (
            FinishReason.FINISH_REASON_STOP,
            FinishReason.FINISH_REASON_LENGTH,
        ):
            raise Failure(f"a generation of {len(messages)} messages ended with OK and without a finish reason")
        tokens = [token for message in messages for token in message.token_ids]
        expected = self._outputs.setdefault(messages[0].fingerprint, tokens)
        if tokens != expected:
            raise Failure(f"fingerprint {messages[0].fingerprint:016x} had the output {expected}, and now {tokens}")

    def _report(self, number: int, call: Call, failure: Failure) -> str:
        kept = Path(tempfile.gettempdir()) / f"fuzz-failure-service-{self._seed}-{number}.txt"
        messages = "\n".join(message.hex() for message in call.messages)
        kept.write_text(f"{failure}\n{call.path} {call.metadata}\n{messages}\n", encoding="utf-8")
        how = f"{call.ending}, {len(call.messages)} messages{', paced' * call.paced}"
        return (
            f"--seed {self._seed} --call {number}: {call.path} ({how}) failed: {failure}\n"
            f"  in hexadecimal in {kept}: {messages:.200}"
        )


async def _converse(stream: _Stream, call: Call, responses: list[bytes], rest_is_done: asyncio.Event) -> None:
    """Sends the messages and reads the answers as the call says, until it has ended."""
    arrived = asyncio.Condition()
    ended = False

    async def read() -> None:
        nonlocal ended
        try:
            while (response := await stream.read()) is not grpc.aio.EOF:
                assert isinstance(response, bytes)
                async with arrived:
                    responses.append(response)
                    arrived.notify_all()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass  # how the call ended is looked at later
        finally:
            async with arrived:
                ended = True
                arrived.notify_all()

    async def until(count: int) -> None:
        async with arrived:
            await arrived.wait_for(lambda: ended or len(responses) >= count)

    # A reader that stops reading: what it does not read has to wait in the server.
    reader = asyncio.ensure_future(read()) if call.ending != "hold" or call.reads else None
    # Writing to a call that has ended meanwhile fails in several ways, some of them only grpc's own: no matter.
    with contextlib.suppress(Exception, asyncio.CancelledError):
        for index, message in enumerate(call.messages):
            await stream.write(message)
            if call.paced and reader is not None:
                await until(index + 1)
        if call.ending == "cancel":
            await until(call.reads)
            stream.cancel()
        if call.ending == "hold":
            await rest_is_done.wait()
        await stream.done_writing()
    await (reader or read())


def _parsed(path: str, response: bytes) -> Message:
    return GetMessageClass(METHODS[path].output_type).FromString(response)


def _tokens(responses: Sequence[bytes]) -> list[int]:
    return [token for response in responses for token in GenerateResponse.FromString(response).token_ids]


def _judge_details(outcome: Outcome, expected: type[Message]) -> None:
    """What is wrong has to be said, in the message and in the details."""
    if outcome.details is None or not outcome.message:
        raise Failure(f"{outcome.code.name} without details: {outcome.message!r}")
    if outcome.details.code != outcome.code.value[0] or outcome.details.message != outcome.message:
        raise Failure(f"{outcome.code.name} {outcome.message!r}, but the details say {outcome.details}")
    kinds = {detail.type_url.rsplit("/", 1)[-1] for detail in outcome.details.details}
    for kind in (expected, RequestInfo):
        if f"google.rpc.{kind.DESCRIPTOR.name}" not in kinds:
            raise Failure(f"{outcome.code.name} has {sorted(kinds)} and no {kind.DESCRIPTOR.name}: {outcome.message}")


def _judge_error_in_session(error: Status) -> None:
    if error.code not in _FORESEEN_IN_SESSION or not error.message:
        raise Failure(f"an error in a session: {error}")


def _judge_request_id(call: Call, request_id: str | None) -> None:
    """The client's request id comes back if it is a valid one, and another one if it is not."""
    if request_id is None or not (1 <= len(request_id) <= 128 and request_id.isascii() and request_id.isprintable()):
        raise Failure(f"the request id is {request_id!r}")
    sent = [str(value) for key, value in call.metadata if key == REQUEST_ID]
    if len(sent) == 1 and len(sent[0].strip()) >= 1 and len(sent[0]) <= 128 and request_id != sent[0]:
        raise Failure(f"the request id is {request_id!r}, and {sent[0]!r} was sent")


async def fuzz(server: Server, options: argparse.Namespace) -> None:
    """Makes calls until there were enough of them."""
    limits = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(server.address, options=limits) as channel:
        await _until_ready(channel, server)
        fuzzer = Fuzzer(channel, options.seed)
        expected = await fuzzer.known_output()
        started = time.monotonic()
        for numbers in _batches(options.call):
            await fuzzer.batch(numbers)
            server.check()
            tokens = await fuzzer.known_output()
            if tokens != expected:
                raise Failure(f"the known request has the output {tokens} after call {numbers[-1]}, before {expected}")
            if fuzzer.requests >= options.requests or time.monotonic() - started >= options.seconds:
                break
        stats = await fuzzer.at_rest()
        codes = ", ".join(f"{count} {name}" for name, count in fuzzer.codes.most_common())
        print(f"{fuzzer.requests} requests in {fuzzer.calls} calls, {time.monotonic() - started:.0f} s: {codes};")
        print(f"{stats.requests} generations with {stats.preemptions} preemptions,", end=" ")
        print(f"{stats.cache.evicted_pages} pages given up; no failure")


async def _until_ready(channel: grpc.aio.Channel, server: Server) -> None:
    """Returns when the server can be called. Raises Failure if it does not come up."""
    ready = asyncio.ensure_future(channel.channel_ready())
    deadline = time.monotonic() + PATIENCE
    while not ready.done():
        server.check()
        if time.monotonic() > deadline:
            raise Failure(f"the server does not listen after {PATIENCE:.0f} s")
        await asyncio.wait({ready}, timeout=0.1)


def _batches(only: int | None) -> Iterator[Sequence[int]]:
    if only is not None:
        yield [only]
        return
    start = 0
    while True:
        yield range(start, start + BATCH)
        start += BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="requests to try; stops at this or at --seconds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time to spend")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--call", type=int, help="make this call alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory))
        try:
            asyncio.run(fuzz(server, options))
            server.stop()
        except Failure as failure:
            sys.exit(f"failed: {failure}")
        finally:
            server.kill()


if __name__ == "__main__":
    main()

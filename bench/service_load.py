"""Measures what streams that misbehave cost the others: 8 stop reading, 8 are cancelled, 8 outlive their deadline.

    python bench/service_load.py --threads 2 --json load.json

The speed of 40 steady streams is taken four times in every round, in turn, so that a slow spell of the machine falls on
all four:

    alone           nothing else runs
    after the 24    the 24 have stopped, and 8 of them are still open, unread: they must cost nothing
    beside 24       24 streams that behave run as well
    beside the 24   the 24 misbehave meanwhile: they must not cost more than streams that behave

Every steady stream has the same tokens each time. The stalled streams are read on at the end of a round, to the same
tokens as if they had never stopped. After it nothing runs, and the cache holds nothing but cached prefixes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from compare_llama_cpp import machine
from service_overhead import Prompts, command_line, server_process, texts, tokenized

from draftwerk_client.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    parameters_pb2,
)

STEADY, STALLED, CANCELLED, LATE = 40, 8, 8, 8
# A client takes megabytes before it holds the server back, unless it is told to take as little as it can.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0)]
# Beyond what a stalled stream gets before it pauses: max_unread_tokens and some messages on their way.
STALLED_TOKENS = 512
COMPARISONS = (("after the 24", "alone"), ("beside the 24", "beside 24"))


def main() -> None:
    arguments = parse_arguments()
    with server_process(arguments) as address:
        prompts = tokenized(address, texts(arguments.prompts))
        measured = asyncio.run(measure(arguments, address, prompts))
    table = render(arguments, measured)
    print(table)
    if arguments.json is not None:
        report = {"command": command_line(), "machine": machine(), "rounds": measured, "table": table}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m", help="a GGUF file or a built-in name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each steady stream")
    parser.add_argument("--prompts", type=Path, help="JSON lines as for draftwerk bench; default: a list in a script")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args()


class Load:
    """The streams of one server."""

    def __init__(self, address: str, prompts: Prompts, max_tokens: int) -> None:
        channel = grpc.aio.insecure_channel(address)
        self._stub = generation_pb2_grpc.GenerationStub(channel)
        self._stalling = generation_pb2_grpc.GenerationStub(grpc.aio.insecure_channel(address, options=SMALL_WINDOW))
        self._operations = operations_pb2_grpc.OperationsStub(channel)
        requests = [self._request(token_ids, max_tokens) for _, token_ids in prompts]
        self.steady = requests[:STEADY]
        self.others = requests[STEADY:]
        self.stalled = [self._request(token_ids, STALLED_TOKENS) for _, token_ids in prompts[STEADY:][:STALLED]]
        self.endless = [self._request(token_ids, 4096) for _, token_ids in prompts[STEADY + STALLED :]]

    async def stats(self) -> operations_pb2.GetStatsResponse:
        found: operations_pb2.GetStatsResponse = await self._operations.GetStats(operations_pb2.GetStatsRequest())
        return found

    async def wait_for(self, **values: int) -> operations_pb2.GetStatsResponse:
        """The server's figures, as soon as these have these values."""
        while True:
            stats = await self.stats()
            if all(getattr(stats, name) == value for name, value in values.items()):
                return stats
            await asyncio.sleep(0.05)

    async def run_steady(self) -> tuple[float, list[list[int]]]:
        """Tokens per second of the steady streams, and the tokens of each."""
        started = time.perf_counter()
        outputs = await asyncio.gather(*(self.read(self.begin(request)) for request in self.steady))
        return sum(map(len, outputs)) / (time.perf_counter() - started), outputs

    async def behave(self) -> None:
        await asyncio.gather(*(self.read(self.begin(request)) for request in self.others))

    async def misbehave(self, chance: random.Random) -> list[tuple[Any, list[int]]]:
        """Returns when the cancelled and the late streams are over; the stalled ones, and what they have read."""
        stalled = [self._stalling.Generate(request) for request in self.stalled]
        begun: list[Any] = await asyncio.gather(*(call.read() for call in stalled))
        await asyncio.gather(
            *(self._cancel(request, chance.randrange(20)) for request in self.endless[:CANCELLED]),
            *(self._outlive(request, chance.uniform(0.2, 2.0)) for request in self.endless[CANCELLED:]),
        )
        return [(call, list(first.token_ids)) for call, first in zip(stalled, begun, strict=True)]

    def begin(self, request: generation_pb2.GenerateRequest) -> Any:
        return self._stub.Generate(request)

    async def read(self, call: Any) -> list[int]:
        """The tokens that are left of a stream."""
        token_ids: list[int] = []
        while (response := await call.read()) is not grpc.aio.EOF:
            token_ids += response.token_ids
        return token_ids

    async def _cancel(self, request: generation_pb2.GenerateRequest, after: int) -> None:
        call = self.begin(request)
        for _ in range(after):
            await call.read()
        call.cancel()

    async def _outlive(self, request: generation_pb2.GenerateRequest, seconds: float) -> None:
        call = self._stub.Generate(request, timeout=seconds)
        try:
            await self.read(call)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    @staticmethod
    def _request(token_ids: Sequence[int], max_tokens: int) -> generation_pb2.GenerateRequest:
        prompt = parameters_pb2.Prompt(token_ids=parameters_pb2.TokenIds(ids=token_ids))
        stop = parameters_pb2.StopConditions(max_tokens=max_tokens, ignore_end_tokens=True)
        return generation_pb2.GenerateRequest(prompt=prompt, stop=stop)


async def measure(arguments: argparse.Namespace, address: str, prompts: Prompts) -> dict[str, list[float]]:
    load = Load(address, prompts, arguments.max_tokens)
    chance = random.Random(0)
    measured: dict[str, list[float]] = defaultdict(list)
    (_, expected), _ = await asyncio.gather(load.run_steady(), load.behave())  # touches weights, clocks and memory
    whole = await asyncio.gather(*(load.read(load.begin(request)) for request in load.stalled))
    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        before = await load.wait_for(running=0, waiting=0, paused=0)
        found = {"alone": await load.run_steady()}

        behaving = asyncio.create_task(load.behave())
        found["beside 24"] = await load.run_steady()
        await behaving

        misbehaving = asyncio.create_task(load.misbehave(chance))
        found["beside the 24"] = await load.run_steady()
        stalled = await misbehaving

        await load.wait_for(running=0, waiting=0, paused=STALLED)
        found["after the 24"] = await load.run_steady()
        beside = await load.wait_for(running=0, waiting=0, paused=STALLED)
        # The cache's memory becomes resident where it is first used, and stays so.
        pages = beside.cache.peak_bytes - before.cache.peak_bytes
        measured["growth"].append((beside.resident_bytes - before.resident_bytes - pages) / 2**20)

        rest = await asyncio.gather(*(load.read(call) for call, _ in stalled))
        assert [first + others for (_, first), others in zip(stalled, rest, strict=True)] == whole
        after = await load.wait_for(running=0, waiting=0, paused=0)
        assert after.cache.used_bytes == after.cache.reclaimable_bytes, "pages are lost"
        for name, (speed, outputs) in found.items():
            assert outputs == expected, f"other tokens {name}"
            measured[name].append(speed)
    return measured


def render(arguments: argparse.Namespace, measured: dict[str, list[float]]) -> str:
    lines = [
        f"{machine()}, {arguments.model}, {arguments.threads} threads, medians of {arguments.rounds} rounds. "
        f"Command: `{command_line()}`",
        "",
        f"| {STEADY} steady streams | | compared with | ratio | target |",
        "|---|---|---|---|---|",
    ]
    for name, baseline in COMPARISONS:
        ratio = statistics.median(a / b for a, b in zip(measured[name], measured[baseline], strict=True))
        speeds = [f"{statistics.median(measured[which]):.4g} tokens/s" for which in (name, baseline)]
        lines.append(f"| {name} | {speeds[0]} | {speeds[1]} ({baseline}) | {ratio:.1%} | >= 95% |")
    growth = max(measured["growth"])
    lines.append(
        f"| growth of the server beside {STALLED} stalled streams, besides its pages | {growth:.1f} MiB | - | - | - |"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

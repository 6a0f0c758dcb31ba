"""Measures what streams that misbehave cost the others: 8 stop reading, 8 are cancelled, 8 outlive their deadline.

    python bench/service_load.py --threads 2 --json load.json

The speed of 40 steady streams is taken four times in every round, so that a slow spell of the machine falls on all
four; every other round goes from the last to the first:

    alone           nothing else runs
    beside 24       24 streams that behave run as well
    beside the 24   the 24 misbehave meanwhile: they must not cost more than streams that behave
    after the 24    (always behind the one before) the 24 have stopped, and 8 of them are still open, unread: they must
                    cost nothing

The 24 are there as long as a steady stream is, those that behave and those that do not: where one ends another one
begins. Those that behave end by themselves after as many tokens as the others are cancelled after, or have got about
when their deadline passes.

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
from collections.abc import Callable, Coroutine, Sequence
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
ENDLESS = 4096
MOST_TOKENS = 20
"""Of a stream that is cancelled or has a deadline; the least is 1."""
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
    parser.add_argument("--rounds", type=int, default=4, help="an even number: every other one is in reverse")
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
        self.steady = [self._request(token_ids, max_tokens) for _, token_ids in prompts[:STEADY]]
        self.stalled = [self._request(token_ids, STALLED_TOKENS) for _, token_ids in prompts[STEADY:][:STALLED]]
        self.short = [token_ids for _, token_ids in prompts[STEADY + STALLED :]]
        self.expected: list[list[int]] | None = None
        """Of the steady streams, once they have run."""
        self.pace = 0.0
        """Tokens per second of a steady stream when they ran first."""

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

    async def run_steady(self) -> float:
        """Tokens per second of the steady streams."""
        started = time.perf_counter()
        outputs = await asyncio.gather(*(self.read(self.begin(request)) for request in self.steady))
        speed = sum(map(len, outputs)) / (time.perf_counter() - started)
        if self.expected is None:
            self.expected, self.pace = outputs, speed / STEADY
        assert outputs == self.expected, "other tokens"
        return speed

    async def beside_behaving(self, number: int) -> float:
        """The speed of the steady streams beside 24 others that behave."""
        others = [self.read(self.begin(request)) for request in self.stalled]
        others += self._short_streams(number, [self._finish] * (CANCELLED + LATE))
        return await self._beside(others)

    async def beside_misbehaving(self, number: int) -> tuple[float, list[tuple[Any, list[int]]]]:
        """The speed of the steady streams beside 24 that do not; the stalled ones of these, and what they have read."""
        stalled = [self._stalling.Generate(request) for request in self.stalled]
        begun: list[Any] = await asyncio.gather(*(call.read() for call in stalled))
        others = self._short_streams(number, [self._cancel] * CANCELLED + [self._outlive] * LATE)
        speed = await self._beside(others)
        return speed, [(call, list(first.token_ids)) for call, first in zip(stalled, begun, strict=True)]

    async def _beside(self, others: Sequence[Coroutine[Any, Any, Any]]) -> float:
        tasks = [asyncio.ensure_future(other) for other in others]
        speed = await self.run_steady()
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return speed

    def _short_streams(
        self, number: int, kinds: Sequence[Callable[[Sequence[int], int], Coroutine[Any, Any, None]]]
    ) -> list[Coroutine[Any, Any, None]]:
        """One stream of each kind after the other. Their lengths are the same of the same round."""

        async def run(index: int) -> None:
            lengths = random.Random(f"{number} {index}")
            while True:
                await kinds[index](self.short[index], lengths.randint(1, MOST_TOKENS))

        return [run(index) for index in range(len(kinds))]

    def begin(self, request: generation_pb2.GenerateRequest) -> Any:
        return self._stub.Generate(request)

    async def read(self, call: Any) -> list[int]:
        """The tokens that are left of a stream."""
        token_ids: list[int] = []
        while (response := await call.read()) is not grpc.aio.EOF:
            token_ids += response.token_ids
        return token_ids

    async def _finish(self, prompt: Sequence[int], tokens: int) -> None:
        await self.read(self.begin(self._request(prompt, tokens)))

    async def _cancel(self, prompt: Sequence[int], tokens: int) -> None:
        call = self.begin(self._request(prompt, ENDLESS))
        while tokens > 0:
            tokens -= len((await call.read()).token_ids)
        call.cancel()

    async def _outlive(self, prompt: Sequence[int], tokens: int) -> None:
        call = self._stub.Generate(self._request(prompt, ENDLESS), timeout=tokens / self.pace)
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
    measured: dict[str, list[float]] = defaultdict(list)
    await load.run_steady()
    await load.beside_behaving(-1)  # touches weights, clocks and memory
    whole = await asyncio.gather(*(load.read(load.begin(request)) for request in load.stalled))

    async def alone(number: int) -> dict[str, float]:
        return {"alone": await load.run_steady()}

    async def behaving(number: int) -> dict[str, float]:
        return {"beside 24": await load.beside_behaving(number)}

    async def misbehaving(number: int) -> dict[str, float]:
        before = await load.stats()
        beside, stalled = await load.beside_misbehaving(number)
        await load.wait_for(running=0, waiting=0, paused=STALLED)
        after = await load.run_steady()
        stats = await load.wait_for(running=0, waiting=0, paused=STALLED)
        rest = await asyncio.gather(*(load.read(call) for call, _ in stalled))
        assert [first + others for (_, first), others in zip(stalled, rest, strict=True)] == whole
        # The cache's memory becomes resident where it is first used, and stays so.
        pages = stats.cache.peak_bytes - before.cache.peak_bytes
        growth = (stats.resident_bytes - before.resident_bytes - pages) / 2**20
        return {"beside the 24": beside, "after the 24": after, "growth": growth}

    for number in range(arguments.rounds):
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        for part in (alone, behaving, misbehaving)[:: -1 if number % 2 else 1]:
            for name, value in (await part(number)).items():
                measured[name].append(value)
            stats = await load.wait_for(running=0, waiting=0, paused=0)
            assert stats.cache.used_bytes == stats.cache.reclaimable_bytes, "pages are lost"
    return measured


def render(arguments: argparse.Namespace, measured: dict[str, list[float]]) -> str:
    lines = [
        f"{machine()}, {arguments.model}, {arguments.threads} threads, medians of {arguments.rounds} rounds. "
        f"Command: `{command_line()}`",
        "",
        f"| {STEADY} steady streams | | compared with | ratio | goal |",
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

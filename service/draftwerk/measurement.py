"""What is measured of a running model: prompts at a fixed concurrency, and the figures made of them."""

from __future__ import annotations

import hashlib
import json
import statistics
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Union

from draftwerk.in_flight import keep_in_flight

if TYPE_CHECKING:
    import draftwerk_client
    from draftwerk import _core
    from draftwerk.results import GenerationStats

    Stats = Union[GenerationStats, draftwerk_client.GenerationStats]


class TokenChunk(Protocol):
    """What one step added to a generation: the part that draftwerk.Chunk and draftwerk_client.Chunk share."""

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def received_at(self) -> float: ...

    @property
    def stats(self) -> Stats | None: ...


class TokenStream(Protocol):
    """A running generation: a draftwerk.Generation, or a stream of draftwerk_client.AsyncClient."""

    def __aiter__(self) -> AsyncIterator[TokenChunk]: ...

    def cancel(self) -> object: ...


@dataclass(frozen=True)
class BenchPrompt:
    """One line of a prompts file."""

    question_id: str
    category: str
    text: str


@dataclass(frozen=True)
class StreamRecord:
    """What one request produced, and when."""

    prompt: BenchPrompt
    token_ids: tuple[int, ...]
    stats: Stats
    submitted_at: float
    arrivals: tuple[tuple[float, int], ...]
    """Per step that brought tokens: when they arrived, and how many."""

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0][0] - self.submitted_at if self.arrivals else 0.0

    @property
    def decode_tokens_per_second(self) -> float | None:
        """(tokens after the first step) / (time after the first step); None when there was only one step."""
        if len(self.arrivals) < 2:
            return None
        seconds = self.arrivals[-1][0] - self.arrivals[0][0]
        return (len(self.token_ids) - self.arrivals[0][1]) / seconds if seconds > 0 else None

    def inter_token_latencies(self) -> list[float]:
        """Seconds from token to token. k tokens that one step brought dt after the last count as k gaps of dt / k."""
        gaps: list[float] = []
        for (before, _), (now, count) in pairwise(self.arrivals):
            gaps.extend([(now - before) / count] * count)
        return gaps


def read_prompts(path: Path, limit: int | None) -> list[BenchPrompt]:
    """The prompts of a JSON-lines file in Spec-Bench's form; of each line the first turn.

    Raises:
        ValueError: a line is not of that form, or there is none.
    """
    prompts: list[BenchPrompt] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(prompts) >= limit:
                break
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                text = entry["turns"][0]
                if not isinstance(text, str):
                    raise TypeError
                prompts.append(BenchPrompt(str(entry.get("question_id", number)), str(entry.get("category", "")), text))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f'{path}:{number}: not a line like {{"question_id": 1, "category": "...", "turns": ["..."]}}'
                ) from None
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return prompts


async def run_prompts(
    start: Callable[[Sequence[int]], TokenStream],
    prompts: Sequence[tuple[BenchPrompt, Sequence[int]]],
    concurrency: int,
    on_done: Callable[[], None],
) -> tuple[list[StreamRecord], float]:
    """Keeps `concurrency` requests in flight until all prompts are done.

    Args:
        start: begins to generate from token ids: in an engine of this process or at a server.
        prompts: each with its token ids, so that no tokenizer is measured.
        concurrency: requests in flight.
        on_done: called after each prompt.

    Returns:
        A record for each prompt, in the order of the prompts, and the seconds that it took.
    """
    records: dict[int, StreamRecord] = {}

    async def record(index: int) -> None:
        prompt, token_ids = prompts[index]
        records[index] = await _record(prompt, start, token_ids)
        on_done()

    started_at = time.perf_counter()
    await keep_in_flight(min(concurrency, len(prompts)), range(len(prompts)), record)
    seconds = time.perf_counter() - started_at
    return [records[i] for i in range(len(prompts))], seconds


async def _record(
    prompt: BenchPrompt, start: Callable[[Sequence[int]], TokenStream], token_ids: Sequence[int]
) -> StreamRecord:
    output: list[int] = []
    arrivals: list[tuple[float, int]] = []
    stats: Stats | None = None
    submitted_at = time.perf_counter()
    stream = start(token_ids)
    try:
        async for chunk in stream:
            if chunk.token_ids:
                output.extend(chunk.token_ids)
                arrivals.append((chunk.received_at, len(chunk.token_ids)))
            stats = chunk.stats
    finally:
        stream.cancel()
    assert stats is not None, "the last chunk of a generation has its statistics"
    return StreamRecord(prompt, tuple(output), stats, submitted_at, tuple(arrivals))


def figures(records: Sequence[StreamRecord], seconds: float, peak_memory: int) -> dict[str, Any]:
    """The figures of a run, by the names of the JSON report.

    `steps` counts, for each request, the passes that gave it tokens, so that `tokens_per_step` says what drafting gave
    each stream at any concurrency. `prefill_tokens_per_second` is over prompt tokens that were not cached and the time
    from leaving the queue to the first token. `peak_memory` is in bytes, its figure in MiB.
    """
    tokens = sum(len(record.token_ids) for record in records)
    computed = sum(record.stats.prompt_tokens - record.stats.cached_tokens for record in records)
    prefill = sum(record.stats.time_to_first_token - record.stats.queue_time for record in records)
    categories = sorted({record.prompt.category for record in records})
    return {
        **_speculation(records),
        "aggregate_tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "prefill_tokens_per_second": computed / prefill if prefill > 0 else 0.0,
        "time_to_first_token_ms": percentiles(record.time_to_first_token * 1e3 for record in records),
        "inter_token_latency_ms": percentiles(
            gap * 1e3 for record in records for gap in record.inter_token_latencies()
        ),
        "peak_rss_mb": peak_memory / 2**20,
        "output_sha256": output_sha256(record.token_ids for record in records),
        "wall_seconds": seconds,
        "prompts": len(records),
        "prompt_tokens": sum(record.stats.prompt_tokens for record in records),
        "cached_tokens": sum(record.stats.cached_tokens for record in records),
        "per_category": {
            category: _speculation([record for record in records if record.prompt.category == category])
            for category in categories
        },
    }


def _speculation(records: Sequence[StreamRecord]) -> dict[str, Any]:
    tokens = sum(len(record.token_ids) for record in records)
    steps = sum(record.stats.steps for record in records)
    drafted = sum(record.stats.drafted for record in records)
    accepted = sum(record.stats.accepted for record in records)
    speeds = [speed for record in records if (speed := record.decode_tokens_per_second) is not None]
    return {
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": tokens / steps if steps else 0.0,
        "decode_tokens_per_second": statistics.fmean(speeds) if speeds else 0.0,
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": accepted / drafted if drafted else 0.0,
    }


def drafter_figures(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What each drafter did between two looks at the engine's statistics of its drafters, at a server for everybody.

    Args:
        before: drafted_by_position and accepted_by_position, by drafter.
        after: the same later, and warning.

    Returns:
        by drafter the difference, the share of accepted drafts by position (of those that were drafted there), and the
        warning now.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, now in after.items():
        drafted, accepted = (
            [count - there for count, there in zip_longest(now[key], before.get(name, {}).get(key, ()), fillvalue=0)]
            for key in ("drafted_by_position", "accepted_by_position")
        )
        figures[name] = {
            "drafted_by_position": drafted,
            "accepted_by_position": accepted,
            "acceptance_by_position": [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)],
            "warning": now["warning"] or None,
        }
    return figures


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90 and p99, by linear interpolation; zeros when there is no value."""
    ordered = sorted(values)

    def at(share: float) -> float:
        if not ordered:
            return 0.0
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p50": at(0.50), "p90": at(0.90), "p99": at(0.99)}


def output_sha256(outputs: Iterable[Sequence[int]]) -> str:
    """SHA-256 over all outputs in the order of their prompts: each token id as a little-endian 32-bit unsigned integer,
    and 0xFFFFFFFF after the last of each output, so that a token cannot move from one output to the next unnoticed."""
    digest = hashlib.sha256()
    for token_ids in outputs:
        digest.update(struct.pack(f"<{len(token_ids) + 1}I", *token_ids, 0xFFFFFFFF))
    return digest.hexdigest()


def time_rows(model: _core.Model, most_rows: int, repeats: int, context: int) -> dict[int, float]:
    """Median milliseconds of one pass of the model at 1 to `most_rows` rows, after `context` positions.

    The row counts take turns, so that a slow spell of the machine falls on all of them alike.
    """
    seconds: dict[int, list[float]] = {rows: [] for rows in range(1, most_rows + 1)}
    for _ in range(repeats):
        for rows, measured in seconds.items():
            measured.extend(model.time_rows(rows, 1, context))
    return {rows: statistics.median(measured) * 1e3 for rows, measured in seconds.items()}

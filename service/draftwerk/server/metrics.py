"""Figures for Prometheus: what streams see, what calls end with, and what the engine says when it is asked."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from draftwerk import __version__
from draftwerk.server.errors import RETRY_DELAY

if TYPE_CHECKING:
    from draftwerk.engine import Engine
    from draftwerk.results import Chunk, FinishReason, GenerationStats

SESSION = "Generation/Session"

_SHORTEST_DELAY, _LONGEST_DELAY = 0.1, 10.0  # seconds
# Seconds over which the speed of working off the queue is measured. It is looked at when calls are refused; what lies
# further back than the longest was before that, when less waited than could be computed.
_SPEED_WINDOW, _LONGEST_SPEED_WINDOW = 1.0, 3.0
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 2, 5, 10, 30, 60)
_POSITIONS = 8  # in a draft, that have a label of their own
_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


class Histogram:
    """Counts by buckets. Written by one thread; another one that reads may see a figure a moment before its sum.

    prometheus_client's own takes 0.7 us for each value and cannot add one several times: 4 us for a step with five
    tokens, which this counts in 0.5.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds a value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self, name: str, documentation: str) -> HistogramMetricFamily:
        """The histogram as Prometheus wants it: each bucket with all that is below it."""
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        return HistogramMetricFamily(
            name, documentation, buckets=list(zip(bounds, accumulate(self._counts), strict=True)), sum_value=self._sum
        )


class Metrics:
    """All figures of one server. Everything but collect() is called on the event loop, and takes microseconds."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # resident memory, processor time, file descriptors
        self._engine = engine
        self._started_at = time.perf_counter()
        self._first_token = Histogram(_SECONDS)
        self._between_tokens = Histogram(_SECONDS)
        self._queue_time = Histogram(_SECONDS)
        self._tokens_per_step = Histogram(_TOKENS)
        self._finished: dict[str, int] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._running_calls: dict[str, int] = {}
        self._speed_since = (self._started_at, 0)  # time, prompt tokens computed until then
        self._queue_speed = 0.0  # prompt tokens per second

    # --- what happens ------------------------------------------------------------------------------------------

    def observe_chunk(self, submitted_at: float, previous_at: float | None, chunk: Chunk) -> None:
        """Counts one step of one generation.

        Args:
            submitted_at: when the generation was submitted (time.perf_counter()).
            previous_at: received_at of the chunk before, or None for the first one.
            chunk: what the step brought.
        """
        tokens = len(chunk.token_ids)
        if tokens == 0:
            return
        self._tokens_per_step.observe(tokens)
        if previous_at is None:
            self._first_token.observe(chunk.received_at - submitted_at)
            if tokens > 1:  # they came together
                self._between_tokens.observe(0.0, tokens - 1)
        else:
            self._between_tokens.observe((chunk.received_at - previous_at) / tokens, tokens)

    def observe_end(self, stats: GenerationStats | None, finish_reason: FinishReason) -> None:
        """Counts a generation that has ended. `stats`: None if nobody was left to read them."""
        self._finished[finish_reason] = self._finished.get(finish_reason, 0) + 1
        if stats is not None:
            self._queue_time.observe(stats.queue_time)

    def call_started(self, method: str) -> None:
        """Counts a call, such as "Generation/Generate"."""
        self._running_calls[method] = self._running_calls.get(method, 0) + 1

    def call_ended(self, method: str, code: str) -> None:
        """Counts the end of a call."""
        self._running_calls[method] -= 1
        self._calls[method, code] = self._calls.get((method, code), 0) + 1

    # --- what follows from it ----------------------------------------------------------------------------------

    @property
    def sessions(self) -> int:
        """Sessions that are open."""
        return self._running_calls.get(SESSION, 0)

    @property
    def uptime(self) -> float:
        """Seconds since the server started."""
        return time.perf_counter() - self._started_at

    def retry_delay(self) -> float:
        """Seconds until half of the queue is worked off at the speed that was measured last: when to try again."""
        stats = self._engine.stats()
        now, computed = time.perf_counter(), int(stats["prefill_rows"])
        seconds = now - self._speed_since[0]
        if seconds >= _SPEED_WINDOW:
            if seconds <= _LONGEST_SPEED_WINDOW:
                self._queue_speed = (computed - self._speed_since[1]) / seconds
            self._speed_since = (now, computed)
        if self._queue_speed <= 0:
            return RETRY_DELAY
        seconds = int(stats["queued_tokens"]) / 2 / self._queue_speed
        return min(max(seconds, _SHORTEST_DELAY), _LONGEST_DELAY)

    # --- Prometheus --------------------------------------------------------------------------------------------

    def describe(self) -> list[Metric]:
        """Nothing beforehand: registering must not ask the engine."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus_client for each scrape, on its thread."""
        yield from self._streams()
        yield from self._rpc()
        yield from self._of_engine(self._engine.stats())
        info = self._engine.info
        yield InfoMetricFamily(
            "draftwerk",
            "What is served.",
            {"version": __version__, "model": info.model, "backend": info.backend, "drafter": info.drafter},
        )
        yield _gauge("uptime_seconds", "Time since the server started.", self.uptime)

    def _streams(self) -> Iterator[Metric]:
        yield self._first_token.collect(
            "draftwerk_time_to_first_token_seconds", "Time from the arrival of a generation to its first token."
        )
        yield self._between_tokens.collect(
            "draftwerk_inter_token_latency_seconds",
            "Time between two tokens of a generation; tokens of one step share the time since the step before.",
        )
        yield self._queue_time.collect(
            "draftwerk_queue_time_seconds", "Time from the arrival of a generation to the first step that worked on it."
        )
        yield self._tokens_per_step.collect(
            "draftwerk_tokens_per_step", "Tokens that one pass of the model gave one generation."
        )
        finished = CounterMetricFamily(
            "draftwerk_generations_finished", "Generations that have ended, by finish reason.", labels=["reason"]
        )
        for reason, count in list(self._finished.items()):
            finished.add_metric([reason], count)
        yield finished

    def _rpc(self) -> Iterator[Metric]:
        calls = CounterMetricFamily("draftwerk_calls", "Calls that have ended.", labels=["method", "code"])
        for (method, code), count in list(self._calls.items()):
            calls.add_metric([method, code], count)
        yield calls
        running = GaugeMetricFamily("draftwerk_calls_running", "Calls that run now.", labels=["method"])
        for method, count in list(self._running_calls.items()):
            running.add_metric([method], count)
        yield running
        yield _gauge("sessions", "Sessions that are open.", self.sessions)

    def _of_engine(self, stats: dict[str, Any]) -> Iterator[Metric]:
        yield _counter("generations", "Generations that were accepted.", stats["requests"])
        yield _gauge("generations_running", "Generations that run.", stats["running"])
        yield _gauge("generations_waiting", "Generations that wait for their first step.", stats["waiting"])
        yield _gauge("generations_paused", "Generations that wait for their reader.", stats["paused"])
        yield _gauge(
            "queued_tokens", "Prompt tokens of generations that wait for their first token.", stats["queued_tokens"]
        )
        yield _counter("preemptions", "Times a generation lost its place to others.", stats["preemptions"])
        yield _counter("steps", "Passes of the model.", stats["steps"])
        yield _counter("rows", "Rows that the passes computed: prompt tokens, last tokens, drafts.", stats["rows"])
        yield _counter("prefill_rows", "Of the rows, those of prompts.", stats["prefill_rows"])
        yield _counter("generated_tokens", "Tokens generated.", stats["generated_tokens"])
        yield _counter("verified_drafts", "Tokens that were drafted and verified.", stats["drafted"])
        yield _by(
            "drafted_tokens",
            "Positions drafted ahead, by place in the draft; a tree has several drafts for one.",
            stats["drafted_by_position"],
        )
        yield _by("accepted_tokens", "Drafted tokens accepted, by place in the draft.", stats["accepted_by_position"])
        yield from _of_drafters(stats["drafters"])
        phases = CounterMetricFamily("draftwerk_engine_seconds", "Time of the engine's thread.", labels=["phase"])
        for phase, seconds in stats["seconds"].items():
            phases.add_metric([phase], seconds)
        yield phases
        kv = stats["kv"]
        yield _gauge("kv_budget_bytes", "What the cache of keys and values may use.", kv["budget_bytes"])
        yield _gauge("kv_used_bytes", "What it uses.", kv["used_bytes"])
        yield _gauge("kv_cached_bytes", "Of what it uses, cached prefixes: free on demand.", kv["cached_bytes"])
        yield _gauge(
            "kv_parked_bytes",
            "Of what it uses, idle sessions and paused generations: free on demand.",
            kv["parked_bytes"],
        )
        pages = GaugeMetricFamily("draftwerk_kv_pages", "Pages in use, by kind of layer.", labels=["layers"])
        pages.add_metric(["sliding"], kv["sliding_pages"])
        pages.add_metric(["full"], kv["full_pages"])
        yield pages
        yield _counter("kv_evicted_pages", "Pages given up for others.", kv["evicted_pages"])
        yield _counter(
            "prefix_lookup_tokens", "Prompt tokens looked up in the prefix cache.", kv["prefix_lookup_tokens"]
        )
        yield _counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", kv["prefix_hit_tokens"])


def _of_drafters(drafters: dict[str, Any]) -> Iterator[Metric]:
    labels = ["drafter", "position"]
    drafted = CounterMetricFamily(
        "draftwerk_drafter_drafted_tokens",
        "Positions that a drafter drafted ahead, by place in the draft.",
        labels=labels,
    )
    accepted = CounterMetricFamily("draftwerk_drafter_accepted_tokens", "Those that were accepted.", labels=labels)
    recent = GaugeMetricFamily(
        "draftwerk_drafter_recent_acceptance",
        "Share of accepted first drafts over the last 512 to 1,023 rounds of a drafter.",
        labels=["drafter"],
    )
    near_zero = GaugeMetricFamily(
        "draftwerk_drafter_acceptance_near_zero",
        "Whether a warning is in force, because hardly any drafts of a model drafter are accepted.",
        labels=["drafter"],
    )
    for name, figures in drafters.items():
        for position, count in _bounded_positions(figures["drafted_by_position"]):
            drafted.add_metric([name, position], count)
        for position, count in _bounded_positions(figures["accepted_by_position"]):
            accepted.add_metric([name, position], count)
        if figures["recent"]["rounds"]:  # else there is no share
            recent.add_metric([name], figures["recent"]["accepted_by_position"][0] / figures["recent"]["rounds"])
        near_zero.add_metric([name], int(figures["warning"] is not None))
    yield from (drafted, accepted, recent, near_zero)


def _bounded_positions(counts: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Counts by position as a label: drafts can be 64 long, so the last label sums up what few of them reach."""
    yield from zip(map(str, range(_POSITIONS)), counts, strict=False)
    if len(counts) > _POSITIONS:
        yield f"{_POSITIONS}+", sum(counts[_POSITIONS:])


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"draftwerk_{name}", documentation, value)


def _counter(name: str, documentation: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"draftwerk_{name}", documentation, value)


def _by(name: str, documentation: str, values: Sequence[int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"draftwerk_{name}", documentation, labels=["position"])
    for position, value in enumerate(values):
        family.add_metric([str(position)], value)
    return family

"""Decoding by an engine on a model in memory: tokens per second with drafts that are right as often as they are told,
and without drafts, and where the time of a step goes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from draftwerk import _core

DRAFTS = 8
ACCEPTANCE = 0.7755  # of each draft: 4.0 tokens a step with 8 drafts
CONTEXT = 1024  # tokens of a prompt
_PREFILL_CHUNK = 2048
_PATIENCE = 60.0  # seconds without an event


@dataclass(frozen=True)
class Decoding:
    """Of some streams, from when the last of them has its first token until the first of them ends.

    Attributes:
        tokens_per_second: of all streams.
        tokens_per_step: of a stream.
        pass_ms: of a step, in the target's pass, sampling and verification: recording them and waiting for them.
        drafting_ms: of a step, in the drafter.
        host_ms: of a step, in planning it, laying out its rows and accepting its tokens.
        idle_ms: of a step, in which the device had nothing to do; None where the engine's statistics do not tell.
        text_sha256: of all tokens of all streams.
    """

    tokens_per_second: float
    tokens_per_step: float
    pass_ms: float
    drafting_ms: float
    host_ms: float
    idle_ms: float | None
    text_sha256: str


@dataclass
class Run:
    """What an engine made of some requests.

    Attributes:
        texts: tokens of each.
        steps: in all, those of prompts among them.
        figures: None where the streams did not run at the same time.
    """

    texts: list[list[int]]
    steps: int
    figures: Decoding | None


@dataclass(frozen=True)
class _Moment:
    statistics: dict[str, Any]
    time: float = field(default_factory=time.perf_counter)


def prompts_of(streams: int, context: int = CONTEXT) -> list[list[int]]:
    """A prompt for each stream, each another."""
    return [[2, *((17 * i + 31 * j) % 200_000 + 5 for j in range(context - 1))] for i in range(streams)]


def decode(
    model: _core.Model,
    mtp: _core.MtpModel | None,
    *,
    prompts: list[list[int]],
    tokens: int,
    rounds: int,
    kv_memory: int,
) -> dict[str, Decoding]:
    """Without drafts, and with 8 in every step, 4.0 of whose tokens are accepted on average; text is the same.

    Args:
        model: loaded.
        mtp: its drafter, run for the time that it takes; its drafts are replaced, for which the host waits once more in
            a step than with drafts that are the drafter's own. None: drafts are free of charge.
        prompts: of the streams, which run at the same time.
        tokens: of each stream.
        rounds: of which the fastest counts; a warm-up comes before.
        kv_memory: bytes for keys and values.

    Raises:
        RuntimeError: what was measured is not what it should be: a text differs, or memory was too small for all
            streams at once.
    """
    plain, texts = _best(model, None, None, prompts, tokens, rounds, kv_memory)
    recorded = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    synthetic = _core.SyntheticDrafts(recorded, ACCEPTANCE, 1)
    drafted, same = _best(model, mtp, synthetic, prompts, tokens, rounds, kv_memory)
    if same != texts:
        raise RuntimeError("drafts changed a token")
    return {"none": plain, "drafted": drafted}


@contextmanager
def opened(model: _core.Model, drafters: list[str], mtp: Any, synthetic: Any, kv_memory: int) -> Iterator[_core.Engine]:
    """An engine that drafts 8 tokens in every step, or none without drafters."""
    options = _core.EngineOptions()
    options.drafters = drafters
    options.draft_length = DRAFTS if drafters else 0
    options.max_draft_length = DRAFTS
    options.kv_memory_bytes = kv_memory
    options.prefill_chunk = _PREFILL_CHUNK
    options.max_context = 4096
    options.prefix_cache = False
    engine = _core.Engine(model, options, None, mtp=mtp, synthetic=synthetic)
    try:
        yield engine
    finally:
        engine.close()


def run_once(engine: _core.Engine, prompts: list[list[int]], tokens: int) -> Run:
    """Runs all prompts at the same time.

    Raises:
        RuntimeError: a request failed, or had to give way to another for want of memory.
    """
    before = engine.stats()
    texts: dict[int, list[int]] = {}
    for prompt in prompts:
        request = _core.Request()
        request.prompt = prompt
        request.max_tokens = tokens
        request.ignore_eos = True
        texts[engine.submit(request)] = []
    left = len(texts)
    begun: _Moment | None = None
    ended: _Moment | None = None
    while left:
        events = engine.wait_events(_PATIENCE)
        if not events:
            raise RuntimeError(f"nothing came for {_PATIENCE:.0f} s")
        for event in events:
            texts[event.request_id] += event.token_ids
            if event.finish_reason:
                left -= 1
                if event.finish_reason != "length":
                    raise RuntimeError(f"{event.finish_reason}: {event.error}")
        if ended is None and left < len(texts):
            ended = _Moment(engine.stats())
        if begun is None and all(texts.values()):
            begun = _Moment(engine.stats())
    after = engine.stats()
    if preempted := after["preemptions"] - before["preemptions"]:
        raise RuntimeError(f"{preempted} times a stream gave way to another: too little memory for keys and values")
    assert begun is not None
    assert ended is not None
    written = list(texts.values())
    return Run(written, after["steps"] - before["steps"], _figures(begun, ended, written))


def _figures(begun: _Moment, ended: _Moment, texts: list[list[int]]) -> Decoding | None:
    first, last = begun.statistics, ended.statistics
    steps = last["steps"] - first["steps"]
    if steps <= 0:
        return None
    tokens = last["generated_tokens"] - first["generated_tokens"]
    seconds = ended.time - begun.time
    spent = {phase: last["seconds"][phase] - first["seconds"][phase] for phase in last["seconds"]}
    return Decoding(
        tokens_per_second=tokens / seconds,
        tokens_per_step=tokens / steps / len(texts),
        pass_ms=spent["target"] / steps * 1e3,
        drafting_ms=spent["draft"] / steps * 1e3,
        host_ms=(spent["schedule"] + spent["commit"]) / steps * 1e3,
        idle_ms=spent["idle"] / steps * 1e3 if "idle" in spent else None,
        text_sha256=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
    )


def _best(
    model: _core.Model,
    mtp: Any,
    synthetic: Any,
    prompts: list[list[int]],
    tokens: int,
    rounds: int,
    kv_memory: int,
) -> tuple[Decoding, list[list[int]]]:
    with opened(model, [] if synthetic is None else ["synthetic"], mtp, synthetic, kv_memory) as engine:
        runs = [run_once(engine, prompts, tokens) for _ in range(1 + rounds)][1:]
    if any(run.texts != runs[0].texts for run in runs):
        raise RuntimeError("the same requests gave another text")
    figures = [run.figures for run in runs if run.figures is not None]
    if not figures:
        raise RuntimeError(f"{tokens} tokens are too few for {len(prompts)} streams to decode at the same time")
    return max(figures, key=lambda one: one.tokens_per_second), runs[0].texts

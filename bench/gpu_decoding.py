"""Decoding by an engine on a model in memory: tokens per second with drafts that are right as often as they are told,
and without drafts, and the time that a step spends outside of the model's pass."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from draftwerk import _core

DRAFTS = 8
ACCEPTANCE = 0.7755  # of each draft: 4.0 tokens a step with 8 drafts
_PROMPT = 12  # tokens


@dataclass(frozen=True)
class Decoding:
    """Of some streams that run at the same time.

    Attributes:
        tokens_per_second: of all streams, the prompts' time included.
        tokens_per_step: of a stream.
        pass_ms: of a step, in the target's pass, sampling and verification.
        drafting_ms: of a step, in the drafter.
        host_ms: of a step, in everything else.
    """

    tokens_per_second: float
    tokens_per_step: float
    pass_ms: float
    drafting_ms: float
    host_ms: float


def decode(
    model: _core.Model,
    mtp: _core.MtpModel | None,
    *,
    streams: int,
    tokens: int,
    rounds: int,
    kv_memory: int = 2 << 30,
) -> dict[str, Decoding]:
    """Without drafts, and with 8 in every step, 4.0 of whose tokens are accepted on average; text is the same.

    Args:
        model: loaded.
        mtp: its drafter, run for the time that it takes; its drafts are replaced, for which the host waits once more in
            a step than with drafts that are the drafter's own. None: drafts are free of charge.
        streams: that run at the same time.
        tokens: of each stream.
        rounds: of which the fastest counts; a warm-up comes before.
        kv_memory: bytes for keys and values.
    """
    prompts = [[2, *((17 * i + 31 * j) % 200_000 + 5 for j in range(_PROMPT))] for i in range(streams)]
    plain, texts = _runs(model, None, None, prompts, tokens, rounds, kv_memory)
    recorded = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    synthetic = _core.SyntheticDrafts(recorded, ACCEPTANCE, 1)
    drafted, same = _runs(model, mtp, synthetic, prompts, tokens, rounds, kv_memory)
    if same != texts:
        raise RuntimeError("drafts changed a token")
    return {"none": plain, "drafted": drafted}


def _runs(
    model: _core.Model,
    mtp: Any,
    synthetic: Any,
    prompts: list[list[int]],
    tokens: int,
    rounds: int,
    kv_memory: int,
) -> tuple[Decoding, list[list[int]]]:
    options = _core.EngineOptions()
    options.drafters = [] if synthetic is None else ["synthetic"]
    options.draft_length = 0 if synthetic is None else DRAFTS
    options.max_draft_length = DRAFTS
    options.kv_memory_bytes = kv_memory
    options.max_context = 4096
    options.prefix_cache = False
    engine = _core.Engine(model, options, None, mtp=mtp, synthetic=synthetic)
    try:
        results = [_once(engine, prompts, tokens) for _ in range(1 + rounds)][1:]
    finally:
        engine.close()
    if any(texts != results[0][1] for _, texts in results):
        raise RuntimeError("the same requests gave another text")
    return max((figures for figures, _ in results), key=lambda figures: figures.tokens_per_second), results[0][1]


def _once(engine: _core.Engine, prompts: list[list[int]], tokens: int) -> tuple[Decoding, list[list[int]]]:
    before = engine.stats()
    started = time.perf_counter()
    texts: dict[int, list[int]] = {}
    for prompt in prompts:
        request = _core.Request()
        request.prompt = prompt
        request.max_tokens = tokens
        request.ignore_eos = True
        texts[engine.submit(request)] = []
    left = len(texts)
    while left:
        for event in engine.wait_events(60.0):
            texts[event.request_id] += event.token_ids
            if event.finish_reason:
                left -= 1
                if event.finish_reason != "length":
                    raise RuntimeError(f"{event.finish_reason}: {event.error}")
    seconds = time.perf_counter() - started
    after = engine.stats()

    steps = after["steps"] - before["steps"]
    inside = after["seconds"]["target"] - before["seconds"]["target"]
    drafting = after["seconds"]["draft"] - before["seconds"]["draft"]
    figures = Decoding(
        tokens_per_second=len(prompts) * tokens / seconds,
        tokens_per_step=tokens / steps,
        pass_ms=inside / steps * 1e3,
        drafting_ms=drafting / steps * 1e3,
        host_ms=(seconds - inside - drafting) / steps * 1e3,
    )
    return figures, list(texts.values())

"""What a generation produced, from the engine's form to the protos'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from google.protobuf.duration_pb2 import Duration

from draftwerk.engine import Engine
from draftwerk.results import Chunk, FinishReason, GenerationStats, TokenLogprobs
from draftwerk_client.v1 import output_pb2, parameters_pb2, statistics_pb2

_FINISH_REASONS: dict[FinishReason, output_pb2.FinishReason.ValueType] = {
    "stop": output_pb2.FINISH_REASON_STOP,
    "length": output_pb2.FINISH_REASON_LENGTH,
    "cancelled": output_pb2.FINISH_REASON_CANCELLED,
}

Spell = Callable[[Sequence[int]], list[bytes]]
"""Gives the bytes of each token."""


def spelling(output: parameters_pb2.OutputOptions, engine: Engine) -> Spell | None:
    """How the tokens of an output are spelled, if its client wants to know."""
    if not output.token_bytes or not engine.has_tokenizer:
        return None
    return partial(engine.token_bytes, special_tokens=output.special_tokens)


def generate_response(chunk: Chunk, fingerprint: int, spell: Spell | None = None) -> output_pb2.GenerateResponse:
    """The message of one engine step. Runs once per stream and step.

    Args:
        chunk: what the step added; not one that says "error".
        fingerprint: of the output.
        spell: if the client wants the bytes of the tokens.
    """
    response = output_pb2.GenerateResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        drafted_tokens=sum(chunk.drafted),
        position=chunk.position,
        fingerprint=fingerprint,
    )
    if chunk.logprobs is not None:
        response.logprobs.extend(map(_token_logprobs, chunk.logprobs))
    if spell is not None:
        response.token_bytes.extend(spell(chunk.token_ids))
    if chunk.finish_reason is not None:
        response.finish_reason = _FINISH_REASONS[chunk.finish_reason]
        if chunk.stats is not None:
            response.statistics.CopyFrom(generation_statistics(chunk.stats))
    return response


def generation_statistics(stats: GenerationStats) -> statistics_pb2.GenerationStatistics:
    """What one generation cost."""
    statistics = statistics_pb2.GenerationStatistics(
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        generated_tokens=stats.generated_tokens,
        steps=stats.steps,
        drafts=statistics_pb2.DraftStatistics(
            drafted=stats.drafted,
            accepted=stats.accepted,
            drafted_by_position=stats.drafted_by_position,
            accepted_by_position=stats.accepted_by_position,
        ),
        preemptions=_preemptions(stats),
        queue_time=duration(stats.queue_time),
    )
    if stats.generated_tokens > 0:
        statistics.time_to_first_token.CopyFrom(duration(stats.time_to_first_token))
        statistics.decode_time.CopyFrom(duration(stats.decode_time))
    return statistics


def joined_stats(parts: Sequence[tuple[float, GenerationStats]]) -> GenerationStats:
    """Statistics of a generation that ran as several requests, one after the other.

    Prompt, cached tokens and queue time are those of the first part, the rest is summed. Time to the first token and
    decode time span what lies between the parts.

    Args:
        parts: when each was submitted (time.perf_counter()), and what it cost. At least one.
    """
    stats = [part for _, part in parts]
    first_tokens = [start + part.time_to_first_token for start, part in parts if part.generated_tokens > 0]
    last_tokens = [
        start + part.time_to_first_token + part.decode_time for start, part in parts if part.generated_tokens > 0
    ]
    return GenerationStats(
        prompt_tokens=stats[0].prompt_tokens,
        cached_tokens=stats[0].cached_tokens,
        generated_tokens=sum(part.generated_tokens for part in stats),
        steps=sum(part.steps for part in stats),
        drafted=sum(part.drafted for part in stats),
        accepted=sum(part.accepted for part in stats),
        drafted_by_position=_sums([part.drafted_by_position for part in stats]),
        accepted_by_position=_sums([part.accepted_by_position for part in stats]),
        queue_time=stats[0].queue_time,
        time_to_first_token=first_tokens[0] - parts[0][0] if first_tokens else 0.0,
        decode_time=last_tokens[-1] - first_tokens[0] if first_tokens else 0.0,
        extra={"preemptions": sum(map(_preemptions, stats))},
    )


def _preemptions(stats: GenerationStats) -> int:
    return int(stats.extra.get("preemptions", 0))


def _sums(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(row[i] for row in rows if i < len(row)) for i in range(max(map(len, rows))))


def _token_logprobs(entry: TokenLogprobs) -> output_pb2.TokenLogprobs:
    return output_pb2.TokenLogprobs(
        logprob=entry.logprob,
        top=[output_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in entry.top],
    )


def duration(seconds: float) -> Duration:
    """The time as protobuf has it, to the nanosecond."""
    nanoseconds = round(seconds * 1e9)
    return Duration(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)

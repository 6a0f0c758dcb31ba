"""What a user gets: pieces of a running generation, the finished completion, what it cost, and the server's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Literal

from draftwerk_client.reply import Reply, read_reply
from draftwerk_client.v1 import models_pb2, operations_pb2, output_pb2, statistics_pb2

FinishReason = Literal["stop", "length", "cancelled", "unknown"]
"""stop: an end token, stop token or stop string; length: max_tokens or the context; cancelled: an interrupt.
unknown: the server is newer and has a reason that this client does not know."""

_FINISH_REASONS: dict[int, FinishReason] = {
    output_pb2.FINISH_REASON_STOP: "stop",
    output_pb2.FINISH_REASON_LENGTH: "length",
    output_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of a generated token, and the most probable alternatives (token id, log-probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one generation cost. Times are in seconds."""

    prompt_tokens: int = 0
    """In a session: all tokens of the branch before the generation."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were in the cache already."""
    generated_tokens: int = 0
    steps: int = 0
    """Passes of the model in which this generation received tokens."""
    drafted: int = 0
    """Drafts that the model verified; several of them may have been for one position."""
    accepted: int = 0
    drafted_by_position: tuple[int, ...] = ()
    """[i]: steps that drafted more than i tokens ahead."""
    accepted_by_position: tuple[int, ...] = ()
    """[i]: steps that accepted more than i drafts."""
    preemptions: int = 0
    """Times the generation lost its place to others and was computed again, to the same tokens."""
    queue_time: float = 0.0
    """From arrival at the server to the first step that worked on it."""
    time_to_first_token: float = 0.0
    """From arrival at the server; 0.0 when there was no token."""
    decode_time: float = 0.0
    """From the first token to the end."""

    @property
    def tokens_per_step(self) -> float:
        """Tokens generated per pass of the model; 1.0 without drafting."""
        return self.generated_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that the model accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first token; 0.0 when there was only one."""
        return (self.generated_tokens - 1) / self.decode_time if self.decode_time > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the derived figures included."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        values.update(
            tokens_per_step=self.tokens_per_step,
            acceptance_rate=self.acceptance_rate,
            decode_tokens_per_second=self.decode_tokens_per_second,
        )
        return values


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step of the engine added to one generation.

    `text` may lag behind the tokens: half a character, or text that may turn out to begin a stop string, is held back
    until it is certain. The texts of all chunks joined are the completion's text.
    """

    text: str
    token_ids: tuple[int, ...]
    """Empty only in a last chunk."""
    drafted: tuple[bool, ...]
    """Per token: True if it was drafted and accepted, False if the model chose it itself."""
    position: int
    """Position of the first of `token_ids` in the sequence (the prompt starts at 0)."""
    logprobs: tuple[TokenLogprobs, ...] | None
    """Per token, if asked for."""
    token_bytes: tuple[bytes, ...] | None
    """Per token, if asked for: the bytes that it stands for; empty for control tokens, unless they have text."""
    finish_reason: FinishReason | None
    """In the last chunk only."""
    stats: GenerationStats | None
    """In the last chunk only."""
    received_at: float
    """time.perf_counter() when the chunk was read from the stream."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation."""

    text: str
    """Empty if the server's model has no tokenizer. Ends before a stop string, which `token_ids` may contain."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    drafted: tuple[bool, ...]
    """Per token: True if it was drafted and accepted, False if the model chose it itself."""
    logprobs: tuple[TokenLogprobs, ...] | None
    token_bytes: tuple[bytes, ...] | None
    fingerprint: int
    """Identifies the output: equal for requests with the same weights, prompt tokens and parameters."""
    request_id: str
    stats: GenerationStats

    def reply(self) -> Reply:
        """Thoughts, calls of functions and answer, of a generation with `special_tokens`. See read_reply()."""
        return read_reply(self.text)


@dataclass(frozen=True, slots=True)
class Appended:
    """Tokens that were added to a branch of a session."""

    token_ids: tuple[int, ...]
    length: int
    """Of the branch now, in tokens."""

    @property
    def position(self) -> int:
        """In the branch, of the first of token_ids; they are the branch's tokens from there on. Chat messages may have
        changed what the branch had there before."""
        return self.length - len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Injected:
    """Tokens that were put into a running generation."""

    token_ids: tuple[int, ...]
    position: int
    """In the branch, of the first of them."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as tokens."""

    token_ids: tuple[int, ...]
    token_bytes: tuple[bytes, ...]
    """Per token: the bytes that it stands for; empty for control tokens."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it is served."""

    name: str
    architecture: str
    backend: str
    """What it runs on, such as "cpu avx512, 2 threads"."""
    drafter: str
    """What drafts for it; "none" if nothing does."""
    vocabulary_size: int
    max_context: int
    """Most tokens of one sequence, prompt and output together."""
    end_token_ids: tuple[int, ...]
    has_tokenizer: bool
    """Whether prompts may be text."""
    has_chat_template: bool
    """Whether prompts may be chat messages."""
    fingerprint: int
    """Identifies the weights."""
    weight_bytes: int
    server_version: str
    has_thinking: bool
    """Whether the chat template knows Chat.enable_thinking."""
    has_tools: bool
    """Whether the chat template knows Chat.tools."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The server's cache of keys and values. Sizes are in bytes."""

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    reclaimable_bytes: int
    """Of used_bytes, what is free on demand."""
    sliding_pages: int
    full_pages: int
    prefix_lookup_tokens: int
    prefix_hit_tokens: int
    evicted_pages: int


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Time of the engine's thread by phase, in seconds."""

    schedule: float
    draft: float
    target: float
    commit: float


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """How the drafts of one of the server's drafters fared, since the server started and over its latest rounds.

    A round is what it drafts for one generation in one step.
    """

    name: str
    """Such as "mtp" or "lookup"."""
    drafted: int
    """Drafts that the model verified; several of them may have been for one position."""
    accepted: int
    drafted_by_position: tuple[int, ...]
    """[i]: rounds that drafted more than i tokens ahead."""
    accepted_by_position: tuple[int, ...]
    """[i]: rounds that accepted more than i drafts."""
    recent_rounds: int
    recent_drafted_by_position: tuple[int, ...]
    recent_accepted_by_position: tuple[int, ...]
    warning: str
    """Figures and likely causes, while hardly any drafts of a drafter that was trained for it are accepted; else ""."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures since the server started, and its state now."""

    uptime: float
    """In seconds."""
    requests: int
    finished: int
    running: int
    waiting: int
    paused: int
    """Generations that wait for their reader."""
    queued_tokens: int
    max_queued_tokens: int
    sessions: int
    steps: int
    rows: int
    prefill_rows: int
    generated_tokens: int
    drafted: int
    """Drafts that the model verified; several of them may have been for one position."""
    accepted: int
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    preemptions: int
    cache: CacheStats
    time: EngineTime
    resident_bytes: int
    peak_resident_bytes: int
    drafters: tuple[DrafterStats, ...]
    """Empty if the server is too old to tell."""


def chunk_of(response: output_pb2.GenerateResponse) -> Chunk:
    """A message of a stream as a Chunk. Runs once for each engine step and stream."""
    token_ids = tuple(response.token_ids)
    drafted = response.drafted_tokens
    finish_reason = response.finish_reason
    return Chunk(
        response.text,
        token_ids,
        (True,) * drafted + (False,) * (len(token_ids) - drafted),
        response.position,
        _logprobs(response.logprobs) if response.logprobs else None,
        tuple(response.token_bytes) if response.token_bytes else None,
        _FINISH_REASONS.get(finish_reason, "unknown") if finish_reason else None,
        _generation_stats(response.statistics) if finish_reason else None,
        perf_counter(),
    )


def completion_of(chunks: Sequence[Chunk], fingerprint: int, request_id: str) -> Completion:
    """The finished generation that these chunks, the last of which has a finish reason, add up to."""
    last = chunks[-1]
    assert last.finish_reason is not None
    assert last.stats is not None
    logprobs = [token for chunk in chunks for token in chunk.logprobs or ()]
    token_bytes = [token for chunk in chunks for token in chunk.token_bytes or ()]
    return Completion(
        text="".join([chunk.text for chunk in chunks]),
        token_ids=tuple([token for chunk in chunks for token in chunk.token_ids]),
        finish_reason=last.finish_reason,
        drafted=tuple([token for chunk in chunks for token in chunk.drafted]),
        logprobs=tuple(logprobs) or None,
        token_bytes=tuple(token_bytes) or None,
        fingerprint=fingerprint,
        request_id=request_id,
        stats=last.stats,
    )


def model_of(model: models_pb2.Model) -> Model:
    """The served model."""
    return Model(
        name=model.name,
        architecture=model.architecture,
        backend=model.backend,
        drafter=model.drafter,
        vocabulary_size=model.vocabulary_size,
        max_context=model.max_context,
        end_token_ids=tuple(model.end_token_ids),
        has_tokenizer=model.has_tokenizer,
        has_chat_template=model.has_chat_template,
        fingerprint=model.fingerprint,
        weight_bytes=model.weight_bytes,
        server_version=model.server_version,
        has_thinking=model.has_thinking,
        has_tools=model.has_tools,
    )


def stats_of(response: operations_pb2.GetStatsResponse) -> Stats:
    """The server's figures."""
    cache, time = response.cache, response.time
    return Stats(
        uptime=_seconds(response.uptime),
        requests=response.requests,
        finished=response.finished,
        running=response.running,
        waiting=response.waiting,
        paused=response.paused,
        queued_tokens=response.queued_tokens,
        max_queued_tokens=response.max_queued_tokens,
        sessions=response.sessions,
        steps=response.steps,
        rows=response.rows,
        prefill_rows=response.prefill_rows,
        generated_tokens=response.generated_tokens,
        drafted=response.drafts.drafted,
        accepted=response.drafts.accepted,
        drafted_by_position=tuple(response.drafts.drafted_by_position),
        accepted_by_position=tuple(response.drafts.accepted_by_position),
        preemptions=response.preemptions,
        cache=CacheStats(
            budget_bytes=cache.budget_bytes,
            used_bytes=cache.used_bytes,
            peak_bytes=cache.peak_bytes,
            reclaimable_bytes=cache.reclaimable_bytes,
            sliding_pages=cache.sliding_pages,
            full_pages=cache.full_pages,
            prefix_lookup_tokens=cache.prefix_lookup_tokens,
            prefix_hit_tokens=cache.prefix_hit_tokens,
            evicted_pages=cache.evicted_pages,
        ),
        time=EngineTime(
            schedule=_seconds(time.schedule),
            draft=_seconds(time.draft),
            target=_seconds(time.target),
            commit=_seconds(time.commit),
        ),
        resident_bytes=response.resident_bytes,
        peak_resident_bytes=response.peak_resident_bytes,
        drafters=tuple(map(_drafter_stats, response.drafters)),
    )


def _logprobs(logprobs: Sequence[output_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        [TokenLogprobs(token.logprob, tuple([(top.token_id, top.logprob) for top in token.top])) for token in logprobs]
    )


def _generation_stats(statistics: statistics_pb2.GenerationStatistics) -> GenerationStats:
    drafts = statistics.drafts
    return GenerationStats(
        prompt_tokens=statistics.prompt_tokens,
        cached_tokens=statistics.cached_tokens,
        generated_tokens=statistics.generated_tokens,
        steps=statistics.steps,
        drafted=drafts.drafted,
        accepted=drafts.accepted,
        drafted_by_position=tuple(drafts.drafted_by_position),
        accepted_by_position=tuple(drafts.accepted_by_position),
        preemptions=statistics.preemptions,
        queue_time=_seconds(statistics.queue_time),
        time_to_first_token=_seconds(statistics.time_to_first_token),
        decode_time=_seconds(statistics.decode_time),
    )


def _drafter_stats(statistics: statistics_pb2.DrafterStatistics) -> DrafterStats:
    drafts, recent = statistics.drafts, statistics.recent
    return DrafterStats(
        name=statistics.name,
        drafted=drafts.drafted,
        accepted=drafts.accepted,
        drafted_by_position=tuple(drafts.drafted_by_position),
        accepted_by_position=tuple(drafts.accepted_by_position),
        recent_rounds=statistics.recent_rounds,
        recent_drafted_by_position=tuple(recent.drafted_by_position),
        recent_accepted_by_position=tuple(recent.accepted_by_position),
        warning=statistics.warning,
    )


def _seconds(duration: Any) -> float:
    return float(duration.seconds + duration.nanos / 1e9)

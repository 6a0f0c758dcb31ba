"""A stand-in for `draftwerk._core` that tests of the Python layer drive: no model, tokens from a script.

The "model" continues a prompt by repeating it, two tokens per step of which the first counts as drafted, so that every
expected output can be written down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar


class RequestError(ValueError):
    pass


class QueueFull(RuntimeError):
    pass


class Model:
    description = "fake backend"
    weight_bytes = 1234

    def __init__(self, config: dict[str, object], *, threads: int = 0, max_step_rows: int = 512) -> None:
        self.config = config
        self.threads = threads
        self.matrices: dict[str, dict[str, Any]] = {}
        self.vectors: dict[str, Any] = {}
        self.finished = False

    def create_weight(self, name: str, type: str, rows: int, columns: int) -> None:
        self.matrices[name] = {"type": type, "rows": rows, "columns": columns, "chunks": []}

    def upload_rows(self, name: str, first_row: int, source_type: str, rows: int, data: Any) -> None:
        self.matrices[name]["chunks"].append((first_row, source_type, rows, bytes(data)))

    def set_vector(self, name: str, values: Any) -> None:
        self.vectors[name] = values.copy()

    def finish(self) -> None:
        self.finished = True

    def time_rows(self, rows: int, repeats: int, context: int) -> list[float]:
        return [0.010 + 0.001 * rows] * repeats


@dataclass
class EngineOptions:
    kv_memory_bytes: int = 0
    max_sequences: int = 64
    prefill_chunk: int = 512
    drafter: str = "lookup"
    draft_length: int = -1
    max_draft_length: int = 8
    prefix_cache: bool = True
    max_queued_tokens: int = 1 << 20
    eos_token_ids: list[int] = field(default_factory=list)
    max_context: int = 0


@dataclass(eq=False)
class Request:
    prompt: list[int] = field(default_factory=list)
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: int = -1
    stop_token_ids: list[int] = field(default_factory=list)
    stop_strings: list[bytes] = field(default_factory=list)
    ignore_eos: bool = False
    drafting: bool = True
    max_draft_length: int = -1
    salt: str = ""


@dataclass(frozen=True)
class Event:
    request_id: int
    token_ids: list[int]
    drafted: list[bool]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    position: int
    finish_reason: str = ""
    error: str = ""
    text_bytes: int = -1
    stats: dict[str, Any] = field(default_factory=dict)


def repeat_prompt(request: Request, index: int) -> int:
    """Token `index` of the output."""
    return request.prompt[index % len(request.prompt)]


class Engine:
    """Steps only while someone waits for events, and only while `gate` is set: tests decide when time passes."""

    instances: ClassVar[list[Engine]] = []
    default_failure: ClassVar[str] = ""

    def __init__(self, model: Model, options: EngineOptions, token_bytes: Any) -> None:
        self.model = model
        self.options = options
        self.token_bytes = token_bytes
        self.next_token: Callable[[Request, int], int] = repeat_prompt
        self.fail_with = self.default_failure
        self.refuse_with: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.waits = 0
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.closed = False
        self._condition = threading.Condition()
        self._running: dict[int, tuple[Request, list[int]]] = {}
        Engine.instances.append(self)

    def submit(self, request: Request) -> int:
        if self.refuse_with is not None:
            raise self.refuse_with
        if not request.prompt:
            raise RequestError("prompt", "empty", "at least one token")
        if request.max_tokens < 1:
            raise RequestError("max_tokens", str(request.max_tokens), "1 or more")
        with self._condition:
            self.requests.append(request)
            request_id = len(self.requests)
            self._running[request_id] = (request, [])
            self._condition.notify_all()
            return request_id

    def cancel(self, request_id: int) -> None:
        with self._condition:
            self.cancelled.append(request_id)
            self._condition.notify_all()

    def wait_events(self, timeout: float) -> list[Event]:
        self.waits += 1
        with self._condition:
            while not self.closed and (not self._running or not self.gate.is_set()):
                if not self._condition.wait(0.002) and self.closed:
                    return []
                if self._running and set(self.cancelled) & set(self._running):
                    break
            if self.closed:
                return []
            return [self._step(i) for i in list(self._running) if self.gate.is_set() or i in self.cancelled]

    def _step(self, request_id: int) -> Event:
        request, output = self._running[request_id]
        position = len(request.prompt) + len(output)
        tokens: list[int] = []
        reason, error, text_bytes = "", "", -1
        if request_id in self.cancelled:
            reason = "cancelled"
        elif self.fail_with:
            reason, error = "error", self.fail_with
        else:
            for _ in range(2 if request.drafting and self.options.drafter != "none" else 1):
                token = self.next_token(request, len(output))
                tokens.append(token)
                output.append(token)
                text_bytes = self._stop_position(request, output)
                eos = not request.ignore_eos and token in self.options.eos_token_ids
                if text_bytes >= 0 or eos or token in request.stop_token_ids:
                    reason = "stop"
                    break
                if len(output) == request.max_tokens:
                    reason = "length"
                    break
        if reason:
            del self._running[request_id]
        wants_logprobs = request.logprobs >= 0
        return Event(
            request_id=request_id,
            token_ids=tokens,
            drafted=[i < len(tokens) - 1 for i in range(len(tokens))],
            logprobs=[-0.5] * len(tokens) if wants_logprobs else [],
            top_logprobs=[[(token, -0.5)] * request.logprobs for token in tokens] if wants_logprobs else [],
            position=position,
            finish_reason=reason,
            error=error,
            text_bytes=text_bytes,
            stats=self._stats(request, output) if reason else {},
        )

    def _stop_position(self, request: Request, output: list[int]) -> int:
        if not request.stop_strings:
            return -1
        offsets, blob = self.token_bytes
        text = b"".join(blob[offsets[token] : offsets[token + 1]] for token in output)
        found = [position for stop in request.stop_strings if (position := text.find(stop)) >= 0]
        return min(found) if found else -1

    def _stats(self, request: Request, output: list[int]) -> dict[str, Any]:
        return {
            "prompt_tokens": len(request.prompt),
            "cached_tokens": 0,
            "generated_tokens": len(output),
            "steps": (len(output) + 1) // 2,
            "drafted": len(output),
            "accepted": len(output) // 2,
            "drafted_by_position": [len(output)],
            "accepted_by_position": [len(output) // 2],
            "queue_time": 0.001,
            "time_to_first_token": 0.011,
            "decode_time": 0.1,
            "preemptions": 0,
        }

    def stats(self) -> dict[str, Any]:
        return {"steps": self.waits}

    def close(self) -> None:
        with self._condition:
            self.closed = True
            self._condition.notify_all()

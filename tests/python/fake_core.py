"""A stand-in for `draftwerk._core` that tests of the Python layer drive: no model, tokens from a script.

The "model" continues a prompt by repeating it, two tokens per step of which the first counts as drafted, so that every
expected output can be written down.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


class RequestError(ValueError):
    pass


class DeviceFailure(RuntimeError):
    pass


class QueueFull(RuntimeError):
    pass


class Model:
    description = "fake backend"
    weight_bytes = 1234
    memory: tuple[int, int] | None = None

    def __init__(
        self, config: dict[str, object], *, gpu: object = None, threads: int = 0, max_step_rows: int = 512
    ) -> None:
        self.config = config
        self.gpu = gpu
        self.threads = threads
        self.matrices: dict[str, dict[str, Any]] = {}
        self.vectors: dict[str, Any] = {}
        self.tables: dict[str, dict[str, Any]] = {}
        self.finished = False

    def create_weight(self, name: str, type: str, rows: int, columns: int) -> None:
        self.matrices[name] = {"type": type, "rows": rows, "columns": columns, "chunks": []}

    def upload_rows(self, name: str, first_row: int, source_type: str, rows: int, data: Any) -> None:
        self.matrices[name]["chunks"].append((first_row, source_type, rows, bytes(data)))

    def set_vector(self, name: str, values: Any) -> None:
        self.vectors[name] = values.copy()

    def map_table(self, name: str, dtype: str, rows: int, columns: int, data: Any) -> None:
        self.tables[name] = {"type": dtype, "rows": rows, "columns": columns, "data": data}

    def finish(self, full_head: bool = False) -> None:
        self.finished = True

    def time_rows(self, rows: int, repeats: int, context: int) -> list[float]:
        return [0.010 + 0.001 * rows] * repeats


class MtpModel(Model):
    def __init__(self, target: Model, config: dict[str, object]) -> None:
        super().__init__(config)
        self.target = target
        self.indices: dict[str, Any] = {}

    def set_indices(self, name: str, values: Any) -> None:
        self.indices[name] = values.copy()


@dataclass
class EngineOptions:
    kv_memory_bytes: int = 0
    max_sequences: int = 64
    prefill_chunk: int = 512
    drafters: list[str] = field(default_factory=lambda: ["lookup"])
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
    conversation: int = 0
    continues: bool = False


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


def drafter_figures(
    drafted: Sequence[int] = (), accepted: Sequence[int] = (), siblings: int = 0, **recent: Any
) -> dict[str, Any]:
    """What Engine.stats() says of a drafter, by position; lately the same, unless `recent` says otherwise.

    Args:
        siblings: drafts of trees that were for a position with another one.
    """
    by_position = {"drafted_by_position": [*drafted], "accepted_by_position": [*accepted]}
    return {
        "drafted": sum(drafted) + siblings,
        "accepted": sum(accepted),
        **by_position,
        "recent": {"rounds": drafted[0] if drafted else 0, **by_position, **recent},
    }


def repeat_prompt(request: Request, index: int) -> int:
    """Token `index` of the output."""
    return request.prompt[index % len(request.prompt)]


class Gate(threading.Event):
    """Whether the engine may step; says when that changes."""

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__()
        self._changed = changed

    def set(self) -> None:
        super().set()
        self._changed()

    def clear(self) -> None:
        super().clear()
        self._changed()


class Engine:
    """Makes one step whenever someone takes events, and only while `gate` is set: tests decide when time passes.

    The event descriptor is readable while there is a step to make.
    """

    instances: ClassVar[list[Engine]] = []
    default_failure: ClassVar[str] = ""

    def __init__(
        self, model: Model, options: EngineOptions, token_bytes: Any, *, mtp: Any = None, synthetic: Any = None
    ) -> None:
        self.model = model
        self.mtp = mtp
        self.synthetic = synthetic
        self.options = options
        self.token_bytes = token_bytes
        self.next_token: Callable[[Request, int], int] = repeat_prompt
        self.fail_with = self.default_failure
        self.refuse_with: Exception | None = None
        self.device_failure = ""
        self.step_takes = 0.0
        self.waits = 0
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.pauses: list[int] = []
        self.resumes: list[int] = []
        self.takers: list[str] = []
        """Names of the threads that took events, each once for every time."""
        self.conversations: dict[int, list[int]] = {}
        """Of each open conversation, the tokens whose keys and values are parked."""
        self.closed = False
        self.pause_lag = 0
        """Steps that a request still makes after pause(): those that were under way."""
        self._paused: dict[int, int] = {}  # with the steps it still makes
        self._conversations_opened = 0
        self._condition = threading.Condition(threading.RLock())
        self._running: dict[int, tuple[Request, list[int], int]] = {}  # with its output and number of cached tokens
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.gate = Gate(self._changed)
        self.gate.set()
        Engine.instances.append(self)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def failure(self) -> str:
        return self.device_failure

    def step_seconds(self) -> float:
        return self.step_takes

    def submit(self, request: Request) -> int:
        if self.device_failure:
            raise DeviceFailure(self.device_failure)
        if self.refuse_with is not None and not (isinstance(self.refuse_with, QueueFull) and request.continues):
            raise self.refuse_with
        if not request.prompt:
            raise RequestError("prompt", "empty", "at least one token")
        if request.max_tokens < 1:
            raise RequestError("max_tokens", str(request.max_tokens), "1 or more")
        with self._condition:
            self.requests.append(request)
            request_id = len(self.requests)
            parked = self.conversations.get(request.conversation, [])
            if request.conversation in self.conversations:
                self.conversations[request.conversation] = []
            warm = len(parked) < len(request.prompt) and request.prompt[: len(parked)] == parked
            self._running[request_id] = (request, [], len(parked) if warm else 0)
            self._changed()
            return request_id

    def cancel(self, request_id: int) -> None:
        with self._condition:
            self.cancelled.append(request_id)
            self._changed()

    def pause(self, request_id: int) -> None:
        with self._condition:
            self.pauses.append(request_id)
            self._paused[request_id] = self.pause_lag
            self._changed()

    def resume(self, request_id: int) -> None:
        with self._condition:
            self.resumes.append(request_id)
            self._paused.pop(request_id, None)
            self._changed()

    def open_conversation(self) -> int:
        with self._condition:
            self._conversations_opened += 1
            self.conversations[self._conversations_opened] = []
            return self._conversations_opened

    def close_conversation(self, conversation: int) -> None:
        with self._condition:
            self.conversations.pop(conversation, None)

    def event_fd(self) -> int:
        return self._descriptor

    def wait_events(self, timeout: float) -> list[Event]:
        with self._condition:
            self.waits += 1
            self.takers.append(threading.current_thread().name)
            self._condition.wait_for(lambda: self.closed or self._stepping(), timeout)
            events = [self._step(request_id) for request_id in self._stepping()]
            if self.closed:  # as the native engine does: what still runs after that step is cancelled
                self.cancelled += list(self._running)
                events += [self._step(request_id) for request_id in list(self._running)]
            self._changed()
            return events

    def wait_for(self, predicate: Callable[[], object]) -> None:
        """Waits until something that this engine was told or did makes `predicate` true."""
        with self._condition:
            assert self._condition.wait_for(predicate, timeout=10), "it did not happen within 10 s"

    def written(self, request_id: int) -> int:
        """How many tokens the request has been given so far; it must be running."""
        return len(self._running[request_id][1])

    def _stepping(self) -> list[int]:
        """The requests for which the next step has an event."""
        return [i for i in self._running if i in self.cancelled or (self.gate.is_set() and self._paused.get(i, 1) > 0)]

    def _changed(self) -> None:
        with self._condition:
            if self.closed or self._stepping():
                os.eventfd_write(self._descriptor, 1)
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._descriptor)
            self._condition.notify_all()

    def _step(self, request_id: int) -> Event:
        request, output, cached = self._running[request_id]
        if request_id in self._paused:
            self._paused[request_id] -= 1
        position = len(request.prompt) + len(output)
        tokens: list[int] = []
        reason, error, text_bytes = "", "", -1
        if request_id in self.cancelled:
            reason = "cancelled"
        elif self.fail_with:
            reason, error = "error", self.fail_with
        else:
            for _ in range(2 if request.drafting and self.options.drafters else 1):
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
            if request.conversation in self.conversations:
                self.conversations[request.conversation] = (request.prompt + output)[:-1]  # the last was not computed
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
            stats=self._stats(request, output, cached) if reason else {},
        )

    def _stop_position(self, request: Request, output: list[int]) -> int:
        if not request.stop_strings:
            return -1
        offsets, blob = self.token_bytes
        text = b"".join(blob[offsets[token] : offsets[token + 1]] for token in output)
        found = [position for stop in request.stop_strings if (position := text.find(stop)) >= 0]
        return min(found) if found else -1

    def _stats(self, request: Request, output: list[int], cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": len(request.prompt),
            "cached_tokens": cached,
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
        return {
            "steps": self.waits,
            "paused": len(self._paused),
            "conversations": len(self.conversations),
            "drafters": {name: drafter_figures() for name in self.options.drafters},
        }

    def close(self) -> None:
        with self._condition:
            self.closed = True
            self._changed()

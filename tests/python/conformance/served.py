"""A server in a process of its own, and the small model that it serves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2_grpc

from draftwerk_client.v1 import (
    generation_pb2_grpc,
    models_pb2_grpc,
    operations_pb2,
    operations_pb2_grpc,
    parameters_pb2,
)
from loading.tiny_files import HIDDEN, STRING, U32, VOCAB, TinyGguf
from service.serve_process import TIMEOUT, ServerProcess, end, start_serve

ROOT = Path(__file__).parents[3]
PROTOS = ROOT / "proto"
MAX_CONTEXT = 1 << 15
ENDLESS = parameters_pb2.StopConditions(max_tokens=MAX_CONTEXT - 100, ignore_end_tokens=True)
# The turns of Gemma 3, without its treatment of system messages.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_Found = TypeVar("_Found")


def write_model(path: Path, **changes: tuple[int, Any]) -> Path:
    """A GGUF file with tokenizer and chat template whose outputs look random: a step takes some 20 microseconds."""
    metadata: dict[str, Any] = {
        "general__name": (STRING, "tiny"),
        "gemma3__context_length": (U32, MAX_CONTEXT),
        "tokenizer__chat_template": (STRING, CHAT_TEMPLATE),
    }
    gguf = TinyGguf(**{**metadata, **changes})
    random = np.random.default_rng(5)
    for tensor in gguf.tensors:
        name, shape = tensor[0], tensor[1]
        if name == "token_embd.weight":  # Q8_0: logits with a standard deviation near 1.5
            blocks = np.empty((VOCAB * HIDDEN // 32, 34), np.uint8)
            blocks[:, :2] = np.frombuffer(np.float16(0.0025).tobytes(), np.uint8)
            blocks[:, 2:] = random.integers(-127, 128, (len(blocks), 32)).astype(np.int8).view(np.uint8)
            tensor[3] = blocks.tobytes()
        elif len(shape) == 1:
            tensor[3] = (1 + 0.3 * random.standard_normal(shape)).astype("<f4").tobytes()
        else:
            tensor[3] = (random.standard_normal(shape) / shape[1] ** 0.5).astype("<f2").tobytes()
    return gguf.write(path)


@dataclass
class Served:
    """A running `draftwerk serve`, with a stub for each of its services."""

    address: str
    process: ServerProcess

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address)
        self.generation = generation_pb2_grpc.GenerationStub(self.channel)
        self.models = models_pb2_grpc.ModelsStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    def stats(self) -> operations_pb2.GetStatsResponse:
        return self.operations.GetStats(operations_pb2.GetStatsRequest(), timeout=TIMEOUT)

    def wait_for_stats(self, **values: int) -> operations_pb2.GetStatsResponse:
        """The figures of the server, as soon as these have these values."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            stats = self.stats()
            if all(getattr(stats, name) == value for name, value in values.items()):
                return stats
            assert time.monotonic() < deadline, f"waited {TIMEOUT} s for {values}; there is\n{stats}"
            time.sleep(0.01)

    def wait_idle(self) -> operations_pb2.GetStatsResponse:
        """The figures of the server, as soon as nothing runs, waits or is paused and no session is open."""
        return self.wait_for_stats(running=0, waiting=0, paused=0, sessions=0)


@contextmanager
def serve(model: str | Path, *flags: str) -> Iterator[Served]:
    """A server of this model on a free port, once it serves. It ends with the context, and well."""
    arguments = ["--model", str(model), "--listen", "127.0.0.1:0", "--metrics-listen", "", "--threads", "1"]
    process = start_serve(*arguments, *flags)
    try:
        served = Served(str(process.wait_for("serving")["listen"]), process)
        with served.channel:
            yield served
    finally:
        code = end(process)
    assert code == 0, "".join(process.lines)


def wait_for(look: Callable[[], _Found | None], what: str) -> _Found:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {TIMEOUT} s for {what}"
        time.sleep(0.01)
    return found


@dataclass(frozen=True)
class Failure:
    """How a call failed, with Google's own messages for the details."""

    code: grpc.StatusCode
    message: str
    fields: tuple[str, ...]
    descriptions: tuple[str, ...]
    retry_delay: float | None
    preconditions: tuple[error_details_pb2.PreconditionFailure.Violation, ...]
    request_id: str
    trailers: dict[str, str | bytes]


def failure_of(error: grpc.RpcError) -> Failure:
    """From the trailers of a failed call."""
    trailers: dict[str, str | bytes] = dict(cast("Any", error.trailing_metadata()))
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    return failure_in(status, trailers)


def failure_in(status: Any, trailers: dict[str, str | bytes] | None = None) -> Failure:
    """From google.rpc.Status, or the equal draftwerk.v1.Status of a session."""
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    precondition, request = error_details_pb2.PreconditionFailure(), error_details_pb2.RequestInfo()
    retries = False
    for detail in status.details:
        assert any(detail.Unpack(kind) for kind in (bad, retry, precondition, request)), detail.type_url
        retries = retries or detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
    codes = {code.value[0]: code for code in grpc.StatusCode}
    return Failure(
        code=codes[status.code],
        message=status.message,
        fields=tuple(violation.field for violation in bad.field_violations),
        descriptions=tuple(violation.description for violation in bad.field_violations),
        retry_delay=retry.retry_delay.ToTimedelta().total_seconds() if retries else None,
        preconditions=tuple(precondition.violations),
        request_id=request.request_id,
        trailers=trailers or {},
    )

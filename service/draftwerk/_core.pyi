"""The native module: the model on its backend and the engine loop. Thin; `draftwerk.Engine` is what people use."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer

class RequestError(ValueError):
    """A request that cannot be served; args are (field, value, allowed), all strings."""

class QueueFull(RuntimeError):
    """Too many tokens are queued already."""

class EngineClosed(RuntimeError):
    """The engine was closed."""

class DeviceFailure(RuntimeError):
    """The device computes nothing any more."""

class Gpu:
    @property
    def number(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def refusal(self) -> str:
        """Why nothing can run on it, and what would work; empty: it can be used."""

def gpus(library: str) -> list[Gpu]:
    """The GPUs of this machine that the CUDA backend in the file `library` knows of, by their numbers.

    Raises:
        RuntimeError: it cannot be loaded, or there is none; says why.
    """

class Model:
    @property
    def description(self) -> str: ...
    @property
    def memory(self) -> tuple[int, int] | None:
        """(free, total) bytes of a GPU's memory; None on the processor."""

    @property
    def weight_bytes(self) -> int: ...
    def __init__(
        self,
        config: Mapping[str, object],
        *,
        gpu: Gpu | None = None,
        threads: int = 0,
        max_step_rows: int = 512,
        max_outputs: int = 0,
    ) -> None: ...
    def create_weight(self, name: str, type: str, rows: int, columns: int) -> None: ...
    def upload_rows(
        self, name: str, first_row: int, source_type: str, rows: int, data: npt.NDArray[np.uint8]
    ) -> None: ...
    def set_vector(self, name: str, values: npt.NDArray[np.float32]) -> None: ...
    def map_table(self, name: str, type: str, rows: int, columns: int, data: npt.NDArray[np.uint8]) -> None:
        """A table that is read row by row where it lies: keeps a reference to `data`."""

    def finish(self, full_head: bool = False) -> None: ...
    def logits(self, token_ids: Sequence[int], chunk: int = 0) -> npt.NDArray[np.float32]: ...
    def time_rows(self, rows: int, repeats: int, context: int) -> list[float]: ...

class MtpModel:
    """The MTP drafter of a finished model."""

    @property
    def weight_bytes(self) -> int: ...
    def __init__(self, target: Model, config: Mapping[str, object]) -> None: ...
    def create_weight(self, name: str, type: str, rows: int, columns: int) -> None: ...
    def upload_rows(
        self, name: str, first_row: int, source_type: str, rows: int, data: npt.NDArray[np.uint8]
    ) -> None: ...
    def set_vector(self, name: str, values: npt.NDArray[np.float32]) -> None: ...
    def set_indices(self, name: str, values: npt.NDArray[np.int32]) -> None: ...
    def finish(self) -> None: ...
    def draft(
        self,
        token_ids: Sequence[int],
        count: int,
        *,
        chunk: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """One round of drafts after `token_ids`, whose last token is the newest.

        Returns:
            The drafts, and the logits that they were chosen from, [count, vocabulary].
        """

    def time_drafts(self, sequences: int, count: int, repeats: int, context: int) -> list[float]:
        """Seconds of each of `repeats` rounds of `count` drafts for each of `sequences` sequences."""

class SyntheticDrafts:
    """Recorded plain runs, and how often a draft read off them shall be right."""

    def __init__(self, recordings: Sequence[Sequence[int]], acceptance: float, seed: int = 0) -> None: ...

class EngineOptions:
    kv_memory_bytes: int
    max_sequences: int
    prefill_chunk: int
    drafters: list[str]
    draft_length: int
    max_draft_length: int
    prefix_cache: bool
    max_queued_tokens: int
    eos_token_ids: list[int]
    max_context: int
    def __init__(self) -> None: ...

class Request:
    prompt: list[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    seed: int
    logprobs: int
    stop_token_ids: list[int]
    stop_strings: list[bytes]
    ignore_eos: bool
    drafting: bool
    max_draft_length: int
    salt: str
    conversation: int
    continues: bool
    def __init__(self) -> None: ...

class Event:
    """New tokens of one request in one step, or its end. A named tuple: reading an attribute converts nothing."""

    @property
    def request_id(self) -> int: ...
    @property
    def token_ids(self) -> tuple[int, ...]: ...
    @property
    def drafted(self) -> tuple[bool, ...]: ...
    @property
    def logprobs(self) -> tuple[float, ...]: ...
    @property
    def top_logprobs(self) -> Sequence[Sequence[tuple[int, float]]]: ...
    @property
    def position(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def text_bytes(self) -> int: ...
    @property
    def stats(self) -> dict[str, Any]: ...

class Engine:
    def __init__(
        self,
        model: Model,
        options: EngineOptions,
        token_bytes: tuple[npt.NDArray[np.uint32], bytes] | None = None,
        *,
        mtp: MtpModel | None = None,
        synthetic: SyntheticDrafts | None = None,
    ) -> None: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, request_id: int) -> None: ...
    def pause(self, request_id: int) -> None:
        """Sets a request aside before the next step: no events until resume(). Unknown ids are ignored, here too."""

    def resume(self, request_id: int) -> None: ...
    def open_conversation(self) -> int:
        """A number for Request.conversation: each of its requests starts from the K/V that the one before left."""

    def close_conversation(self, conversation: int) -> None: ...
    def wait_events(self, timeout: float) -> list[Event]: ...
    def event_fd(self) -> int: ...
    def stats(self) -> dict[str, Any]: ...
    def failure(self) -> str:
        """Why nothing is computed any more; empty as long as all is well."""

    def step_seconds(self) -> float:
        """Seconds since the step began that is being made; 0 while none is."""

    def close(self) -> None: ...

def dequantize(
    type: str, data: Buffer | npt.NDArray[np.uint8], columns: int, rows: int = 1
) -> npt.NDArray[np.float32]: ...

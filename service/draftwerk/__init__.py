"""Draftwerk: fast, reproducible serving of Gemma models with speculative decoding.

    from draftwerk import Engine, SamplingParams

    with Engine("gemma-3-270m") as engine:
        print(engine.generate("The history of the steam engine begins", SamplingParams(max_tokens=40)).text)

Names are imported when first used: `draftwerk --help` and `draftwerk.loading` do not wait for the native module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftwerk.conversation import Conversation
    from draftwerk.engine import Engine, EngineInfo
    from draftwerk.generation import Generation
    from draftwerk.loading import CheckpointError
    from draftwerk.requests import Chat, EngineClosed, EngineFailed, Prompt, QueueFull, RequestError, SamplingParams
    from draftwerk.results import Chunk, Completion, GenerationError, GenerationStats, TokenLogprobs

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "CheckpointError",
    "Chunk",
    "Completion",
    "Conversation",
    "Engine",
    "EngineClosed",
    "EngineFailed",
    "EngineInfo",
    "Generation",
    "GenerationError",
    "GenerationStats",
    "Prompt",
    "QueueFull",
    "RequestError",
    "SamplingParams",
    "TokenLogprobs",
]

_HOMES = {
    "Chat": "draftwerk.requests",
    "CheckpointError": "draftwerk.loading",
    "Conversation": "draftwerk.conversation",
    "Engine": "draftwerk.engine",
    "EngineInfo": "draftwerk.engine",
    "Generation": "draftwerk.generation",
    "EngineClosed": "draftwerk.requests",
    "EngineFailed": "draftwerk.requests",
    "Prompt": "draftwerk.requests",
    "QueueFull": "draftwerk.requests",
    "RequestError": "draftwerk.requests",
    "SamplingParams": "draftwerk.requests",
    "Chunk": "draftwerk.results",
    "Completion": "draftwerk.results",
    "GenerationError": "draftwerk.results",
    "GenerationStats": "draftwerk.results",
    "TokenLogprobs": "draftwerk.results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'draftwerk' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

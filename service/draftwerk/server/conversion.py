"""What a client asks for, from the protos' form to the engine's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from draftwerk.engine import Engine
from draftwerk.requests import Message, Prompt, RequestError, SamplingParams
from draftwerk.server.encoding import LONG_PROMPT_BYTES, off_loop
from draftwerk.server.errors import InvalidField, ModelNotFound
from draftwerk_client.v1 import parameters_pb2 as pb

MAX_LOGPROBS = 20
_MAX_SALT_BYTES = 256

_T = TypeVar("_T")


def check_known_fields(message: ProtoMessage, path: str = "") -> None:
    """Refuses fields that this server does not know, at any depth: they may be meant to change the output.

    Raises:
        InvalidField: names the field by its number.
    """
    for unknown in cast("Iterable[Any]", UnknownFieldSet(message)):  # the stubs do not know that it can be iterated
        raise InvalidField(
            f"{path}.{unknown.field_number}" if path else str(unknown.field_number),
            "set",
            "absent: this server does not know the field, so the client is newer; update the server, or leave it out",
        )
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if isinstance(value, ProtoMessage):
            check_known_fields(value, f"{path}.{field.name}" if path else field.name)
        else:
            for i, element in enumerate(value):
                check_known_fields(element, f"{path}.{field.name}[{i}]" if path else f"{field.name}[{i}]")


def check_model(asked: str, served: str) -> None:
    """Refuses a model that is not the one that is served; an empty name stands for whichever is.

    Raises:
        ModelNotFound: names both.
    """
    if asked not in ("", served):
        raise ModelNotFound(asked, served)


def check_token_ids(token_ids: Sequence[int], vocabulary_size: int, path: str) -> None:
    """Refuses token ids outside the vocabulary.

    Raises:
        InvalidField: names the first of them.
    """
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocabulary_size):
        return
    for i, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocabulary_size:
            raise InvalidField(f"{path}[{i}]", token_id, f"0 to {vocabulary_size - 1}")


# --- prompts ---------------------------------------------------------------------------------------------------


def prompt_of(prompt: pb.Prompt, engine: Engine, path: str = "prompt") -> Prompt:
    """The engine's form of a prompt.

    Args:
        path: of the prompt in the request, for errors.

    Raises:
        InvalidField: the prompt is absent, or the model has no means to read it.
    """
    content = prompt.WhichOneof("content")
    if content == "token_ids":
        longest = engine.info.max_context
        if len(prompt.token_ids.ids) > longest:  # before looking at each of perhaps millions
            count = len(prompt.token_ids.ids)
            raise InvalidField(f"{path}.token_ids.ids", f"{count} ids", f"at most {longest} (the longest sequence)")
        token_ids = list(prompt.token_ids.ids)
        check_token_ids(token_ids, engine.info.vocab_size, f"{path}.token_ids.ids")
        return token_ids
    if content is None:
        raise InvalidField(path, "absent", "text, token_ids or messages")
    if not engine.has_tokenizer:
        raise InvalidField(f"{path}.{content}", "given", "token_ids: the model was loaded without a tokenizer")
    if content == "text":
        return prompt.text
    if not engine.has_chat_template:
        raise InvalidField(f"{path}.messages", "given", "text or token_ids: the model has no chat template")
    if not prompt.messages.messages:
        raise InvalidField(f"{path}.messages.messages", "empty", "at least one message")
    return [{"role": message.role, "content": message.content} for message in prompt.messages.messages]


async def token_ids_of(
    prompt: pb.Prompt, engine: Engine, path: str = "prompt", *, add_bos: bool = True, after: Sequence[int] = ()
) -> list[int]:
    """The token ids of a prompt. Long ones are tokenised in another thread.

    Args:
        path: of the prompt in the request, for errors.
        add_bos: put the beginning-of-sequence token before text.
        after: the tokens that chat messages follow; if there are none, they begin a chat.

    Raises:
        InvalidField: the prompt is absent, or the model cannot read it.
    """
    content = prompt_of(prompt, engine, path)

    def encode() -> list[int]:
        try:
            if isinstance(content, str):
                return engine.tokenize(content, add_bos=add_bos)
            if prompt.HasField("messages"):
                return engine.continue_chat(after, cast("Sequence[Message]", content))
        except RequestError as error:
            raise InvalidField(f"{path}.{prompt.WhichOneof('content')}", error.value, error.allowed) from None
        return cast("list[int]", content)

    return await off_loop_if_long(_text_bytes(content), encode)


async def off_loop_if_long(size: int, function: Callable[[], _T]) -> _T:
    """Calls a function: here, or on an encoding thread if what it works on is long.

    Args:
        size: bytes of text, or tokens.
    """
    return function() if size < LONG_PROMPT_BYTES else await off_loop(function)


def _text_bytes(content: Prompt) -> int:
    """About as many bytes as there are to tokenise."""
    if isinstance(content, str):
        return len(content)
    return sum(len(part["content"]) for part in content if isinstance(part, Mapping))


# --- parameters ------------------------------------------------------------------------------------------------


def sampling_params(
    sampling: pb.SamplingParameters,
    stop: pb.StopConditions,
    drafting: pb.DraftingOptions,
    output: pb.OutputOptions,
    cache_salt: str,
    room: int,
) -> SamplingParams:
    """The engine's form of all parameters of a generation. What depends on the model is the engine's to check.

    Args:
        room: tokens that the context still takes; bounds max_tokens where the client names none.

    Raises:
        InvalidField: a value is out of range.
    """
    given: dict[str, Any] = {
        name: getattr(sampling, name)
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if sampling.HasField(name)
    }
    if stop.HasField("max_tokens"):
        given["max_tokens"] = stop.max_tokens
    else:
        given["max_tokens"] = max(1, min(SamplingParams.max_tokens, room))
    if drafting.HasField("enabled"):
        given["drafting"] = drafting.enabled
    if drafting.HasField("max_length"):
        given["max_draft_length"] = drafting.max_length
    if output.HasField("logprobs"):
        if not 0 <= output.logprobs <= MAX_LOGPROBS:
            raise InvalidField("output.logprobs", output.logprobs, f"0 to {MAX_LOGPROBS}")
        given["logprobs"] = output.logprobs
    if len(cache_salt.encode()) > _MAX_SALT_BYTES:
        raise InvalidField("cache_salt", f"{len(cache_salt.encode())} bytes", f"at most {_MAX_SALT_BYTES} bytes")
    return SamplingParams(
        **given,
        min_tokens=stop.min_tokens,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        stop=tuple(stop.strings),
        stop_token_ids=tuple(stop.token_ids),
        ignore_eos=stop.ignore_end_tokens,
        salt=cache_salt,
    )

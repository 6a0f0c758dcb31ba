"""What a client asks for, from the protos' form to the engine's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage
from google.protobuf.unknown_fields import UnknownFieldSet

from draftwerk.engine import Engine
from draftwerk.requests import Chat, Prompt, RequestError, SamplingParams
from draftwerk.server.encoding import LONG_PROMPT_BYTES, off_loop
from draftwerk.server.errors import InvalidField, ModelNotFound
from draftwerk_client.v1 import parameters_pb2 as pb

MAX_LOGPROBS = 20
MAX_CHAT_MESSAGES = 4096
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
    return chat_of(prompt.messages, f"{path}.messages")


def chat_of(chat: pb.ChatMessages, path: str) -> Chat:
    """The engine's form of a chat.

    Raises:
        InvalidField: it has no messages, or too many, or what should be JSON is not.
    """
    if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
        count = f"{len(chat.messages)} messages" if chat.messages else "empty"
        raise InvalidField(f"{path}.messages", count, f"at least one message, and at most {MAX_CHAT_MESSAGES}")
    return Chat(
        messages=[_message_of(message, f"{path}.messages[{i}]") for i, message in enumerate(chat.messages)],
        tools=[_json_object(tool, f"{path}.tools[{i}]") for i, tool in enumerate(chat.tools)],
        enable_thinking=chat.enable_thinking if chat.HasField("enable_thinking") else None,
        template_variables={
            name: _json_value(value, f"{path}.template_variables") for name, value in chat.template_variables.items()
        },
    )


def _message_of(message: pb.ChatMessage, path: str) -> dict[str, Any]:
    """The message with the keys that it has; a chat template knows others only as absent."""
    if message.structured_content and message.content:
        raise InvalidField(f"{path}.structured_content", "given", "absent beside content: give one of them")
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.structured_content:
        plain["content"] = _json_value(message.structured_content, f"{path}.structured_content")
    for name in ("reasoning_content", "tool_call_id", "name"):
        if value := getattr(message, name):
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _json_object(call.arguments or "{}", f"{path}.tool_calls[{i}].arguments"),
                },
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return plain


def _json_object(text: str, path: str) -> dict[str, Any]:
    value = _json_value(text, path)
    if not isinstance(value, dict):
        raise InvalidField(path, "given", "a JSON object")
    return value


def _json_value(text: str, path: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InvalidField(path, "given", f"JSON: {str(error).splitlines()[0]}") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


async def token_ids_of(
    prompt: pb.Prompt, engine: Engine, path: str = "prompt", *, add_bos: bool = True, after: Sequence[int] = ()
) -> list[int]:
    """The token ids of a prompt. Long ones are tokenised in another thread.

    Args:
        path: of the prompt in the request, for errors.
        add_bos: put the beginning-of-sequence token before text.
        after: the tokens, which are no chat, that chat messages follow; if there are none, they begin a chat.

    Raises:
        InvalidField: the prompt is absent, or the model cannot read it.
    """

    def encode() -> list[int]:
        content = prompt_of(prompt, engine, path)
        try:
            if isinstance(content, str):
                return engine.tokenize(content, add_bos=add_bos)
            if isinstance(content, Chat):
                if after:
                    return _behind(after, content, engine, path)
                return engine.tokenize(render_chat(content, engine, path), add_bos=False)
        except RequestError as error:
            raise InvalidField(f"{path}.{prompt.WhichOneof('content')}", error.value, error.allowed) from None
        return cast("list[int]", content)

    return await off_loop_if_long(0 if prompt.HasField("token_ids") else prompt.ByteSize(), encode)


def render_chat(chat: Chat, engine: Engine, path: str) -> str:
    """What the chat template writes for a chat.

    Args:
        path: of the prompt that it is, for errors.

    Raises:
        InvalidField: the template refuses it, or has no use for part of it.
    """
    try:
        return engine.render_chat(chat)
    except RequestError as error:
        below = error.field.partition(".")[2]  # the engine calls the prompt "prompt"
        field = f"{path}.messages.{below}" if below and below != "messages" else f"{path}.messages"
        raise InvalidField(field, error.value, error.allowed) from None


def _behind(token_ids: Sequence[int], chat: Chat, engine: Engine, path: str) -> list[int]:
    """The token ids that put messages behind tokens that are no chat."""
    if chat.tools or chat.enable_thinking is not None or chat.template_variables:
        raise InvalidField(
            f"{path}.messages",
            "given with tools, enable_thinking or template_variables",
            "without them: they belong to the beginning of a chat, and these messages follow what is none",
        )
    return engine.continue_chat(token_ids, chat.messages)


async def off_loop_if_long(size: int, function: Callable[[], _T]) -> _T:
    """Calls a function: here, or on an encoding thread if what it works on is long.

    Args:
        size: bytes of text, or tokens.
    """
    return function() if size < LONG_PROMPT_BYTES else await off_loop(function)


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
    given["special_tokens"] = output.special_tokens
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

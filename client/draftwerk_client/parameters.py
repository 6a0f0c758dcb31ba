"""From keyword arguments to the messages of a request. Types are settled here; ranges are the server's to check."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple, TypedDict, Union

from draftwerk_client.errors import invalid
from draftwerk_client.v1 import generation_pb2, parameters_pb2, session_pb2

Message = Mapping[str, Any]
"""One chat message: {"role": "user", "content": "Hello"}. Other keys are those of OpenAI's chat completions:
"reasoning_content" and "tool_calls" of the assistant, "tool_call_id" and "name" of the role "tool". Content that is no
string is sent as structured data: a list of parts, or what a function returned."""


@dataclass(frozen=True)
class Chat:
    """Chat messages and what else the model's chat template makes a prompt of."""

    messages: Sequence[Message]
    """In the order in which they were said; at least one."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call: {"type": "function", "function": {"name", "description", "parameters"}}."""
    enable_thinking: bool | None = None
    """Whether the model is to think before it answers. None: as the template does when it is not told."""
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    """More variables of the template."""


Prompt = Union[str, Sequence[int], Sequence[Message], Chat]
"""Text (the beginning-of-sequence token is added), token ids (taken as they are), or chat messages."""


class GenerationOptions(TypedDict, total=False):
    """How the tokens of one generation are chosen, where they end and what is told about them.

    Whatever is left out, or None, has the server's default. Together with the weights and the prompt tokens these
    values determine the output completely; only `drafting` and `max_draft_length` have no influence on it, and
    `special_tokens` only on its text.
    """

    max_tokens: int | None
    """At most this many tokens are generated; 1 or more. Default 256."""
    min_tokens: int | None
    """End tokens are excluded from the first `min_tokens` tokens. Default 0."""
    temperature: float | None
    """0, the default, takes the most probable token (greedy)."""
    top_k: int | None
    """Keep the k most probable tokens; 0, the default, keeps all."""
    top_p: float | None
    """Keep the most probable tokens up to this probability mass; 1, the default, keeps all."""
    min_p: float | None
    """Keep tokens at least this probable relative to the best; 0, the default, keeps all."""
    repetition_penalty: float | None
    """Divides (or multiplies, if negative) the logits of tokens in prompt and output; 1, the default, is off."""
    presence_penalty: float | None
    """Subtracted from the logit of every token already generated. Default 0."""
    frequency_penalty: float | None
    """Subtracted from the logit of a token once for every time it was generated. Default 0."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token ids."""
    seed: int | None
    """Keys the sampling noise; 0 to 2**64 - 1. Default 0."""
    logprobs: int | None
    """n: report the log-probability of each token and of the n most probable ones, 0 to 20. Default: none."""
    stop: Sequence[str] | None
    """Generation ends before the first of these texts that is complete with token `min_tokens` or later; the text is
    not part of the output."""
    stop_token_ids: Sequence[int] | None
    """Generation ends with any of these tokens, besides the model's own end tokens."""
    ignore_eos: bool | None
    """Go on after the model's end tokens, up to max_tokens. Default False."""
    drafting: bool | None
    """False generates without drafts. Default True."""
    max_draft_length: int | None
    """At most this many drafts per step. Default: the server's limit."""
    token_bytes: bool | None
    """Report the bytes of each token. Default False."""
    special_tokens: bool | None
    """Give control tokens their names in the text, which mark thoughts and calls of functions: see read_reply(). The
    token that ends the generation is no part of the text all the same. Default False."""


class RequestOptions(GenerationOptions, total=False):
    """The options of a generation, and those that hold for a whole call."""

    salt: str | None
    """Requests share cached prefixes only with requests of the same salt, at most 256 bytes. Default: empty."""
    model: str | None
    """The model that must answer; any other is refused with NotFound. Default: whichever is served."""


class _Field(NamedTuple):
    part: str
    """The message that the field is in; empty for the request itself."""
    name: str
    kind: str
    least: int = 0
    """Of an integer: the least that the server takes."""

    @property
    def path(self) -> str:
        return f"{self.part}.{self.name}" if self.part else self.name


_FIELDS = {
    "max_tokens": _Field("stop", "max_tokens", "int32", least=1),
    "min_tokens": _Field("stop", "min_tokens", "int32"),
    "temperature": _Field("sampling", "temperature", "float"),
    "top_k": _Field("sampling", "top_k", "int32"),
    "top_p": _Field("sampling", "top_p", "float"),
    "min_p": _Field("sampling", "min_p", "float"),
    "repetition_penalty": _Field("sampling", "repetition_penalty", "float"),
    "presence_penalty": _Field("sampling", "presence_penalty", "float"),
    "frequency_penalty": _Field("sampling", "frequency_penalty", "float"),
    "logit_bias": _Field("sampling", "logit_bias", "biases"),
    "seed": _Field("sampling", "seed", "uint64"),
    "logprobs": _Field("output", "logprobs", "int32"),
    "stop": _Field("stop", "strings", "strings"),
    "stop_token_ids": _Field("stop", "token_ids", "ids"),
    "ignore_eos": _Field("stop", "ignore_end_tokens", "bool"),
    "drafting": _Field("drafting", "enabled", "bool"),
    "max_draft_length": _Field("drafting", "max_length", "int32"),
    "token_bytes": _Field("output", "token_bytes", "bool"),
    "special_tokens": _Field("output", "special_tokens", "bool"),
    "salt": _Field("", "cache_salt", "string"),
    "model": _Field("", "model", "string"),
}
_INTEGERS = {"int32": (-(2**31), 2**31 - 1), "uint64": (0, 2**64 - 1)}


def generate_request(prompt: Prompt, options: Mapping[str, Any]) -> generation_pb2.GenerateRequest:
    """The request of Client.generate().

    Raises:
        TypeError: an option that does not exist.
        InvalidRequest: a value that cannot be sent.
    """
    request = generation_pb2.GenerateRequest(prompt=prompt_message(prompt))
    _fill(request, options, _FIELDS)
    return request


def session_open(options: Mapping[str, Any]) -> session_pb2.SessionRequest.Open:
    """The first action of a session. Raises as generate_request() does."""
    message = session_pb2.SessionRequest.Open()
    _fill(message, options, _FIELDS)
    return message


def session_generate(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> session_pb2.SessionRequest.Generate:
    """A generation of a session whose defaults these options override. Raises as generate_request() does."""
    known = {name: field for name, field in _FIELDS.items() if field.part}
    _check_names(options, known)
    # A part that is sent replaces that of `open` as a whole: it has to have the session's other values too.
    parts = {known[name].part for name in options}
    merged = {name: value for name, value in {**defaults, **options}.items() if _FIELDS[name].part in parts}
    message = session_pb2.SessionRequest.Generate()
    for part in parts:
        getattr(message, part).SetInParent()
    _fill(message, merged, known)
    return message


def prompt_message(prompt: Prompt) -> parameters_pb2.Prompt:
    """A prompt in the form that it has: text, token ids or chat messages.

    Raises:
        InvalidRequest: it is none of them.
    """
    if isinstance(prompt, str):
        return parameters_pb2.Prompt(text=_text("prompt.text", prompt))
    if isinstance(prompt, Chat):
        return parameters_pb2.Prompt(messages=_chat_messages("prompt.messages", prompt))
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, bytearray, Mapping)):
        raise invalid("prompt", prompt, "text, token ids, chat messages or a draftwerk_client.Chat")
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], Mapping):
        return parameters_pb2.Prompt(messages=_chat_messages("prompt.messages", Chat(items)))
    message = parameters_pb2.Prompt()
    message.token_ids.ids.extend(token_ids("prompt.token_ids.ids", items))
    message.token_ids.SetInParent()  # no token ids are a prompt too, which the server has an answer for
    return message


def token_ids(path: str, values: object) -> list[int]:
    """Token ids as integers that fit the wire.

    Raises:
        InvalidRequest: one is not.
    """
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise invalid(path, values, "a sequence of token ids")
    ids = list(values)
    try:
        parameters_pb2.TokenIds(ids=ids)  # checks them all, fast
    except (TypeError, ValueError):
        return [_integer(f"{path}[{i}]", value, 0, 2**31 - 1) for i, value in enumerate(ids)]
    return ids


def _check_names(options: Mapping[str, Any], known: Mapping[str, _Field]) -> None:
    for name in options:
        if name in known:
            continue
        if name in _FIELDS:
            raise TypeError(f"{name} holds for a whole session: give it to session() instead")
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
        raise TypeError(f"unknown option {name!r}: {hint}")


def _fill(message: Any, options: Mapping[str, Any], known: Mapping[str, _Field]) -> None:
    _check_names(options, known)
    for name, value in options.items():
        if value is None:
            continue
        field = known[name]
        part = getattr(message, field.part) if field.part else message
        if field.kind in _INTEGERS:
            setattr(part, field.name, _integer(field.path, value, *_INTEGERS[field.kind], least=field.least))
        elif field.kind == "float":
            setattr(part, field.name, _number(field.path, value))
        elif field.kind == "bool":
            setattr(part, field.name, bool(value))
        elif field.kind == "string":
            setattr(part, field.name, _text(field.path, value))
        elif field.kind == "ids":
            getattr(part, field.name).extend(token_ids(field.path, value))
        elif field.kind == "strings":
            getattr(part, field.name).extend(_strings(field.path, value))
        else:
            getattr(part, field.name).update(_biases(field.path, value))


def _integer(path: str, value: Any, lowest: int, highest: int, *, least: int = 0) -> int:
    """`value` if it fits the wire. `least` is the least that the server takes, which errors name."""
    try:
        number = operator.index(value)
    except TypeError:
        raise invalid(path, value, "an integer") from None
    if isinstance(value, bool):
        raise invalid(path, value, "an integer")
    if not lowest <= number <= highest:
        raise invalid(path, number, f"{least} to {highest}")
    return number


def _number(path: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes, bytearray)):  # float() would read text
        raise invalid(path, value, "a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise invalid(path, value, "a number") from None


def _text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(path, value, "a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(path, value, "valid Unicode text") from None
    return value


def _strings(path: str, values: Any) -> list[str]:
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, Iterable):
        raise invalid(path, values, "a sequence of strings")
    return [_text(f"{path}[{i}]", value) for i, value in enumerate(values)]


def _biases(path: str, values: Any) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise invalid(path, values, "a mapping from token id to number")
    return {_integer(path, token, 0, 2**31 - 1): _number(f"{path}[{token}]", bias) for token, bias in values.items()}


# --- chats ---------------------------------------------------------------------------------------------------------

_MESSAGE_KEYS = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name"})
_CALL_FORM = 'a mapping of the form {"id": ..., "type": "function", "function": {"name": ..., "arguments": ...}}'


def _chat_messages(path: str, chat: Chat) -> parameters_pb2.ChatMessages:
    if isinstance(chat.messages, (str, bytes, Mapping)) or not isinstance(chat.messages, Iterable):
        raise invalid(f"{path}.messages", chat.messages, "a sequence of chat messages")
    messages = parameters_pb2.ChatMessages(
        messages=[_chat_message(f"{path}.messages[{i}]", message) for i, message in enumerate(chat.messages)]
    )
    if isinstance(chat.tools, (str, bytes, Mapping)) or not isinstance(chat.tools, Iterable):
        raise invalid(f"{path}.tools", chat.tools, "a sequence of functions")
    messages.tools.extend([_json(f"{path}.tools[{i}]", tool) for i, tool in enumerate(chat.tools)])
    if chat.enable_thinking is not None:
        messages.enable_thinking = bool(chat.enable_thinking)
    if not isinstance(chat.template_variables, Mapping):
        raise invalid(f"{path}.template_variables", chat.template_variables, "a mapping from name to value")
    for name, value in chat.template_variables.items():
        variable = f"{path}.template_variables[{name!r}]"
        messages.template_variables[_text(variable, name)] = _json(variable, value)
    return messages


def _chat_message(path: str, message: Any) -> parameters_pb2.ChatMessage:
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & set(message):
        raise invalid(path, message, 'a mapping with "role", and "content" or "tool_calls"')
    unknown = [key for key, value in message.items() if key not in _MESSAGE_KEYS and value is not None]
    if unknown:
        raise invalid(path, message, f"without {unknown[0]!r}: a message has {', '.join(sorted(_MESSAGE_KEYS))}")
    sent = parameters_pb2.ChatMessage(role=_text(f"{path}.role", message["role"]))
    content = message.get("content")
    if isinstance(content, str):
        sent.content = _text(f"{path}.content", content)
    elif isinstance(content, (Mapping, list, tuple)):
        sent.structured_content = _json(f"{path}.content", content)
    elif content is not None:
        raise invalid(f"{path}.content", content, "a string, a list of parts, or what a function returned: a mapping")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    for name, value in (
        ("reasoning_content", reasoning),
        ("tool_call_id", message.get("tool_call_id")),
        ("name", message.get("name")),
    ):
        if value is not None:
            setattr(sent, name, _text(f"{path}.{name}", value))
    calls = message.get("tool_calls") or ()
    if isinstance(calls, (str, bytes, Mapping)) or not isinstance(calls, Iterable):
        raise invalid(f"{path}.tool_calls", calls, "a sequence of calls")
    sent.tool_calls.extend([_tool_call(f"{path}.tool_calls[{i}]", call) for i, call in enumerate(calls)])
    return sent


def _tool_call(path: str, call: Any) -> parameters_pb2.ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise invalid(path, call, _CALL_FORM)
    arguments = function.get("arguments", {})
    return parameters_pb2.ToolCall(
        id=_text(f"{path}.id", call.get("id") or ""),
        name=_text(f"{path}.function.name", function["name"]),
        arguments=(
            _text(f"{path}.function.arguments", arguments)  # JSON already, as OpenAI's clients have it
            if isinstance(arguments, str)
            else _json(f"{path}.function.arguments", arguments)
        ),
    )


def _json(path: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise invalid(path, value, "what JSON can hold") from None

"""What a user asks for: the prompt, the sampling parameters, and the errors of a request that cannot be served."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

import numpy as np

if TYPE_CHECKING:
    from draftwerk import _core

Message = Mapping[str, Any]
"""One chat message, such as {"role": "user", "content": "Hello"}. Other keys are those of OpenAI's chat completions:
"reasoning_content" and "tool_calls" of the assistant, "tool_call_id" and "name" of the role "tool"."""


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
"""Raw text (<bos> is added), token ids (taken as they are), or chat messages for the model's chat template."""

_INT32_MAX = 2**31 - 1
# The fields of SamplingParams that are plain numbers.
_INTEGERS = {"max_tokens": 1, "min_tokens": 0, "top_k": 0}  # and the least that each can be
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class RequestError(ValueError):
    """A request that cannot be served as it stands. Names the field, its value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.field = field
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.field} = {self.value}: must be {self.allowed}"


class QueueFull(RuntimeError):
    """The engine has as many tokens queued as it may; try again later."""


class EngineClosed(RuntimeError):
    """The engine was closed before the request could finish."""


class EngineFailed(RuntimeError):
    """The device has failed and computes nothing any more: only a new process helps."""


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and where they end.

    Together with the weights and the prompt tokens these values, the seed included, determine the output completely;
    only `drafting`, `max_draft_length` and `salt` have no influence on it, and `special_tokens` only on its text.
    """

    max_tokens: int = 256
    """At most this many tokens are generated; 1 or more."""
    min_tokens: int = 0
    """End tokens are excluded from the first `min_tokens` tokens."""
    temperature: float = 0.0
    """0 takes the most probable token (greedy)."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most probable tokens up to this probability mass; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the best; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides (or multiplies, if negative) the logits of tokens in prompt and output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token already generated."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for every time it was generated."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int = 0
    """Keys the sampling noise; 0 to 2**64 - 1."""
    logprobs: int | None = None
    """n: report the log-probability of each token and of the n most probable ones. None: none."""
    stop: Sequence[str] = ()
    """Generation ends before the first of these texts that is complete with token `min_tokens` or later; the text is
    not part of the output."""
    stop_token_ids: Sequence[int] = ()
    """Generation ends with any of these tokens, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on after the model's end tokens, up to max_tokens."""
    drafting: bool = True
    """False generates this request without drafts."""
    max_draft_length: int | None = None
    """At most this many drafts per step for this request; None: the engine's limit."""
    salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    special_tokens: bool = False
    """Give control tokens their names in the text: models mark thoughts and calls of functions with them, which
    draftwerk_client.read_reply() reads. The token that ends the generation is no part of the text all the same."""


_CHAT_FIELDS = ("messages", "tools", "enable_thinking", "add_generation_prompt")


def template_variables(path: str, chat: Chat, read: Collection[str], checkpoint: Collection[str]) -> dict[str, Any]:
    """The variables that a chat sets in its template, messages and tools aside.

    What the template would overlook is refused: a misspelt variable, or tools that the model would never hear of.

    Args:
        path: of the chat, for errors.
        read: names that the template reads.
        checkpoint: names that the checkpoint sets.

    Raises:
        RequestError: something of the chat is of the wrong form, or the template does not read it.
    """
    if isinstance(chat.tools, (str, bytes)) or not isinstance(chat.tools, Sequence):
        raise RequestError(f"{path}.tools", repr(chat.tools), "a sequence of functions")
    if chat.tools and "tools" not in read:
        raise RequestError(f"{path}.tools", f"{len(chat.tools)} functions", "absent: the chat template has no tools")
    for i, tool in enumerate(chat.tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            allowed = 'of the form {"type": "function", "function": {"name": ..., ...}}'
            raise RequestError(f"{path}.tools[{i}]", repr(tool)[:80], allowed)
    if not isinstance(chat.template_variables, Mapping):
        raise RequestError(f"{path}.template_variables", repr(chat.template_variables), "a mapping from name to value")
    for name in chat.template_variables:
        known = sorted(set(read) - {*_CHAT_FIELDS, *checkpoint})
        if name not in known:
            allowed = f"of the chat template's own: {', '.join(known)}" if known else "absent: the template reads none"
            raise RequestError(f"{path}.template_variables", repr(name)[:40], allowed)
    variables = dict(chat.template_variables)
    if chat.enable_thinking is not None:
        if not isinstance(chat.enable_thinking, bool):
            raise RequestError(f"{path}.enable_thinking", repr(chat.enable_thinking), "True, False or None")
        if chat.enable_thinking and "enable_thinking" not in read:
            raise RequestError(f"{path}.enable_thinking", True, "False or absent: the chat template knows no thinking")
        variables["enable_thinking"] = chat.enable_thinking
    return variables


def _integer(name: str, value: Any, lowest: int, highest: int, *, least: int = 0) -> int:
    """`value` if the engine's type can hold it. `least` is the least that the engine takes, which errors name."""
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(name, repr(value), "an integer") from None
    if isinstance(value, bool):
        raise RequestError(name, repr(value), "an integer")
    if not lowest <= number <= highest:
        raise RequestError(name, number, f"{least} to {highest}")
    return number


def _int32(params: SamplingParams, name: str) -> int:
    return _integer(name, getattr(params, name), -_INT32_MAX - 1, _INT32_MAX, least=_INTEGERS[name])


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes, bytearray)):  # float() would read text
        raise RequestError(name, repr(value), "a number")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(name, repr(value), "a number") from None


def token_id_list(name: str, values: object) -> list[int]:
    """`values` as a list of integers that may be token ids.

    Raises:
        RequestError: they are no such thing; `name` is the field.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise RequestError(name, repr(values), "a sequence of token ids")
    ids = list(values)
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= _INT32_MAX:  # a long prompt, checked fast
        return ids
    return [_integer(f"{name}[{i}]", value, 0, _INT32_MAX) for i, value in enumerate(ids)]


def _float32(number: float) -> float:
    """`number` as precise as the engine takes it, and as the API transports it."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


def _logit_bias(params: SamplingParams) -> dict[int, float]:
    if not isinstance(params.logit_bias, Mapping):
        raise RequestError("logit_bias", repr(params.logit_bias), "a mapping from token id to number")
    return {
        _integer("logit_bias", token, 0, _INT32_MAX): _number(f"logit_bias[{token}]", bias)
        for token, bias in params.logit_bias.items()
    }


def _seed(params: SamplingParams) -> int:
    return _integer("seed", params.seed, 0, 2**64 - 1)


def native_request(prompt_ids: Sequence[int], params: SamplingParams) -> _core.Request:
    """The native form of a request. Settles types here; ranges that depend on the model are the engine's to check.

    Raises:
        RequestError: a value has the wrong type or cannot be represented.
    """
    from draftwerk import _core

    request = _core.Request()
    request.prompt = token_id_list("prompt", prompt_ids)
    for name in _INTEGERS:
        setattr(request, name, _int32(params, name))
    for name in _NUMBERS:
        setattr(request, name, _number(name, getattr(params, name)))
    request.logit_bias = _logit_bias(params)
    request.seed = _seed(params)
    if params.logprobs is not None:
        request.logprobs = _integer("logprobs", params.logprobs, 0, _INT32_MAX)
    request.stop_token_ids = token_id_list("stop_token_ids", params.stop_token_ids)
    request.stop_strings = stop_bytes(params.stop)
    request.ignore_eos = bool(params.ignore_eos)
    request.drafting = bool(params.drafting)
    if params.max_draft_length is not None:
        request.max_draft_length = _integer("max_draft_length", params.max_draft_length, 0, _INT32_MAX)
    if not isinstance(params.salt, str):
        raise RequestError("salt", repr(params.salt), "a string")
    try:
        params.salt.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError("salt", repr(params.salt), "valid Unicode text") from None
    request.salt = params.salt
    return request


def unread_limit(max_unread_tokens: int | None) -> int | None:
    """`max_unread_tokens`, checked.

    Raises:
        RequestError: it is no number of tokens.
    """
    return None if max_unread_tokens is None else _integer("max_unread_tokens", max_unread_tokens, 0, _INT32_MAX)


def stop_bytes(stop: Sequence[str]) -> list[bytes]:
    """Stop texts in UTF-8, the form in which the engine looks for them."""
    if isinstance(stop, (str, bytes)) or not isinstance(stop, Iterable):
        raise RequestError("stop", repr(stop), "a sequence of strings")
    encoded = []
    for i, text in enumerate(stop):
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop[{i}]", repr(text), "a non-empty string")
        try:
            encoded.append(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise RequestError(f"stop[{i}]", repr(text), "valid Unicode text") from None
    return encoded


def output_fingerprint(weights: int, prompt_ids: Sequence[int], params: SamplingParams) -> int:
    """64 bits that identify an output: of everything that determines its tokens and where its text ends.

    Equal for equal requests on any engine with the same weights and arithmetic, and then the output is as well, unless
    the engines are of different builds, which this does not tell apart. What has no influence on that (`drafting`,
    `max_draft_length`, `salt`, `logprobs`, `special_tokens`) and the order of stop conditions make no difference.

    Args:
        weights: `Engine.info.fingerprint`.

    Raises:
        RequestError: a value has the wrong type or cannot be represented.
    """
    values = {
        **{name: _int32(params, name) for name in _INTEGERS},
        **{name: _float32(_number(name, getattr(params, name))) for name in _NUMBERS},
        "logit_bias": sorted((token, _float32(bias)) for token, bias in _logit_bias(params).items()),
        "seed": _seed(params),
        "stop": sorted({text.hex() for text in stop_bytes(params.stop)}),
        "stop_token_ids": sorted(set(token_id_list("stop_token_ids", params.stop_token_ids))),
        "ignore_eos": bool(params.ignore_eos),
    }
    digest = hashlib.blake2b(weights.to_bytes(8, "little"), digest_size=8)
    digest.update(json.dumps(values, sort_keys=True).encode())
    digest.update(np.asarray(token_id_list("prompt", prompt_ids), dtype="<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")

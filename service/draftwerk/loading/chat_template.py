"""Chat templates: the Jinja program in a checkpoint that writes a conversation as the model was trained to read it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from draftwerk.loading.errors import printable


class ChatTemplateError(ValueError):
    """A template that cannot be read, or a conversation that it refuses (roles that do not alternate, say)."""


# Stands for an answer of the model where the template's own text around it is looked for.
_ANSWER = "AnswerOfTheModel"
_ANSWERED = ({"role": "user", "content": "Question"}, {"role": "assistant", "content": _ANSWER})


class _GenerationBlock(Extension):
    """``{% generation %}`` marks the assistant's part for training; for a prompt its content is what counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(value: Any, **options: Any) -> str:
    # Jinja's own filter escapes HTML, and no model was trained on that.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _with_other_names(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with thoughts under both names that are in use, and arguments of calls as objects, not as JSON text."""
    read = dict(message)
    for name, other in (("reasoning_content", "reasoning"), ("reasoning", "reasoning_content")):
        if name in read:
            read.setdefault(other, read[name])
    calls = read.get("tool_calls")
    if isinstance(calls, Sequence) and not isinstance(calls, str):
        read["tool_calls"] = [_with_arguments(call) for call in calls]
    return read


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _is_of_tool(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "tool"


def _tool_name(response: Mapping[str, Any], calls: Sequence[Any]) -> str:
    """The function whose result this is."""
    for call in calls:
        if isinstance(call, Mapping) and call.get("id") and call.get("id") == response.get("tool_call_id"):
            return str(call.get("function", {}).get("name", "unknown"))
    return str(response.get("name") or "unknown")


class ChatTemplate:
    """A checkpoint's chat template, in the environment transformers gives it, sandboxed.

    The sandbox keeps it from files, modules and the network. It does not keep it from taking for ever or filling the
    memory: jinja2 limits neither, and where it lets operators be intercepted (``9**9**9``), as much can be done by
    filters, methods of texts, ``~`` and loops in loops. With those its author is trusted, as with the weights.

    Args:
        source: the Jinja text.
        special_tokens: names the template may use, e.g. ``{"bos_token": "<bos>"}``.

    Attributes:
        variables: names of the variables that the template reads, those included that it sets itself on some paths.

    Raises:
        ChatTemplateError: ``source`` is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            read = meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise ChatTemplateError(f"the chat template cannot be read: {printable(str(error), 200)}") from None
        self.variables = frozenset(read - environment.globals.keys())
        # The first templates of Gemma 4 know what a function returned only as a part of the assistant's message.
        self._knows_tool_responses = "tool_responses" in source
        self._knows_tool_messages = "tool_call_id" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for a conversation; begins with the ``<bos>`` that Gemma's templates write.

        Args:
            messages: ``{"role": "user" | "assistant" | "system" | "tool", "content": text or parts}``, oldest first,
                with the further keys of OpenAI's chat completions. What templates read under another name or in
                another place is found there too: ``reasoning_content`` as ``reasoning`` and the reverse, arguments of
                ``tool_calls`` that are JSON text, messages of the role ``tool`` as the assistant's ``tool_responses``.
            add_generation_prompt: end with the beginning of the model's turn.
            tools: JSON schemas of functions, for templates that know tools.
            extra: more variables of the template.

        Raises:
            ChatTemplateError: the template refuses the conversation or fails.
        """
        variables = {**self.special_tokens, "documents": None, **extra}
        try:
            return self._template.render(
                messages=self._as_read(messages), tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(f"the chat template failed: {printable(str(error) or repr(error), 200)}") from error

    def _as_read(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages with everything where templates look for it."""
        read = [_with_other_names(message) for message in messages]
        return self._with_tool_responses(read) if self._knows_tool_responses else read

    def _with_tool_responses(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Puts messages of tools, and the answer after them, into the message of the assistant that called the tools.

        Only where the template could not read them otherwise: not at all, or not if they are structured.
        """
        folded: list[dict[str, Any]] = []
        next_index = 0
        while next_index < len(messages):
            message = messages[next_index]
            next_index += 1
            folded.append(message)
            if message.get("role") != "assistant" or not message.get("tool_calls") or "tool_responses" in message:
                continue
            responses = list(takewhile(_is_of_tool, islice(messages, next_index, None)))
            structured = any(isinstance(response.get("content"), Mapping) for response in responses)
            if not responses or (self._knows_tool_messages and not structured):
                continue
            next_index += len(responses)
            message["tool_responses"] = [
                {"name": _tool_name(response, message["tool_calls"]), "response": response.get("content")}
                for response in responses
            ]
            answer = messages[next_index] if next_index < len(messages) else {}
            if answer.get("role") == "assistant" and not answer.get("tool_calls") and not message.get("content"):
                message["content"] = answer.get("content")
                next_index += 1
        return folded

    def after_answer(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
        """What follows an answer of the model when the conversation goes on with `messages`.

        Returns:
            what closes the answer (for Gemma 3 ``<end_of_turn>`` and a line break), and the whole text: it begins with
            that and ends with the beginning of the model's turn.

        Raises:
            ChatTemplateError: the template refuses these messages or fails, or it writes them elsewhere than behind the
                answer.
        """
        before = self.render(_ANSWERED, add_generation_prompt=False)
        after = self.render([*_ANSWERED, *messages])
        if before.count(_ANSWER) != 1:
            raise ChatTemplateError("the chat template does not write the model's answers as they are")
        if not after.startswith(before):
            raise ChatTemplateError(
                "the chat template changes what stands before them when these messages follow an answer, so that no "
                "sequence can go on with them; render the whole conversation as a new prompt"
            )
        closing = before.partition(_ANSWER)[2]
        return closing, closing + after[len(before) :]

"""Chat templates: the Jinja program in a checkpoint that writes a conversation as the model was trained to read it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
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


class ChatTemplate:
    """A checkpoint's chat template, in the environment transformers gives it, sandboxed.

    Args:
        source: the Jinja text.
        special_tokens: names the template may use, e.g. ``{"bos_token": "<bos>"}``.

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
        except (jinja2.TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise ChatTemplateError(f"the chat template cannot be read: {printable(str(error), 200)}") from None

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
            messages: ``{"role": "user" | "assistant" | "system", "content": text or parts}``, oldest first.
            add_generation_prompt: end with the beginning of the model's turn.
            tools: JSON schemas of functions, for templates that know tools.
            extra: more variables of the template.

        Raises:
            ChatTemplateError: the template refuses the conversation or fails.
        """
        variables = {**self.special_tokens, "documents": None, **extra}
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise ChatTemplateError(f"the chat template failed: {printable(str(error) or repr(error), 200)}") from error

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

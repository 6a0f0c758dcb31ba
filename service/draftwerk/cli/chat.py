"""`draftwerk chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console

from draftwerk.cli import options
from draftwerk.cli.failures import CommandError, reports_failures, reports_server_failures, usage_error
from draftwerk.cli.target import TlsCa, TlsCertificate, TlsKey, credentials_for

if TYPE_CHECKING:
    from draftwerk.cli.chat_branches import Conversations

EPILOG = """
[bold]Examples[/]

  draftwerk chat

  draftwerk chat --model ./gemma-3-1b-it --temperature 1 --top-k 64 --top-p 0.95 --seed 7

  draftwerk chat --model ./gemma-4-E2B-it --thinking

  draftwerk chat --target 127.0.0.1:50051 --show-drafts

  draftwerk chat --target gemma.example.org:50051 --tls-ca ca.pem

  printf 'What is a page table?\\nAnd a TLB?\\n' | draftwerk chat -m ./gemma-3-1b-it
"""

# What a server that runs already has settled.
_ENGINE_OPTIONS = ("model", "drafter", "draft_length", "weights", "device", "threads", "kv_memory")


@reports_failures
def chat(
    context: typer.Context,
    target: Annotated[
        Optional[str],
        typer.Option(
            "--target",
            help="A server that runs: HOST:PORT or unix:PATH.",
            metavar="ADDRESS",
            show_default="a server of its own, with --model",
        ),
    ] = None,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    model: options.Model = options.DEFAULT_MODEL,
    system: Annotated[
        Optional[str], typer.Option("--system", help="What the model is told before the first message.", metavar="TEXT")
    ] = None,
    thinking: Annotated[
        Optional[bool],
        typer.Option(
            "--thinking/--no-thinking",
            help="Let the model think before it answers, if it can.",
            show_default="as its chat template has it",
        ),
    ] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour every token by whether it was drafted.")
    ] = False,
    drafter: options.Drafter = "auto",
    draft_length: options.DraftLength = None,
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    kv_memory: options.KvMemory = None,
) -> None:
    """Chat with a model. Ctrl-C interrupts an answer and keeps the conversation.

    At the prompt, /help lists what else there is to do.

    Thoughts of the model are shown dimmed, and functions that it wants to call in a colour of their own.

    Without a terminal, each line of stdin is a message, and stdout gets the answers, without thoughts.
    """
    parameters: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    if target is not None:
        options.refuse_beside_target(context, *_ENGINE_OPTIONS)
    credentials = credentials_for(target, tls_ca, tls_certificate, tls_key)
    server: AbstractContextManager[str] = (
        nullcontext(target)
        if target is not None
        else options.server(
            model,
            drafter=drafter,
            draft_length=draft_length,
            max_draft_length=max(16, draft_length or 0),
            weights=weights,
            device=device,
            threads=threads,
            kv_memory=kv_memory,
        )
    )
    with server as address, reports_server_failures():
        from draftwerk_client import Client

        with Client(address, credentials=credentials) as client:
            served = client.model()
            if not served.has_tokenizer:
                raise usage_error(f"{served.name} has no tokenizer: a chat needs text")
            if not served.has_chat_template:
                options.messages.print(
                    f"{served.name} has no chat template: it goes on with what you write instead of answering it.",
                    style="yellow",
                    markup=False,
                    highlight=False,
                )
            if thinking and not served.has_thinking:
                raise usage_error(f"--thinking: the chat template of {served.name} knows no thinking")
            from draftwerk.cli.chat_branches import Conversations

            # The control tokens that mark thoughts and calls; other models' answers have none that would mean anything.
            parameters["special_tokens"] = served.has_thinking or served.has_tools
            with client.session() as session:
                conversations = Conversations(
                    session,
                    has_chat_template=served.has_chat_template,
                    system=system,
                    thinking=thinking if served.has_thinking else None,
                )
                if sys.stdin.isatty() and sys.stdout.isatty():
                    from draftwerk.cli.terminal_chat import TerminalChat

                    TerminalChat(
                        Console(),
                        conversations,
                        parameters,
                        served.name,
                        show_drafts=show_drafts,
                        has_thinking=served.has_thinking,
                    ).run()
                else:
                    answer_lines(conversations, parameters, sys.stdin)


def answer_lines(conversations: Conversations, parameters: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Answers each line that is not empty, on stdout. Thoughts are left out.

    Raises:
        CommandError: a message got no answer.
    """
    from draftwerk.cli.answer_parts import AnswerParts
    from draftwerk.cli.chat_branches import TurnRefused

    for line in lines:
        message = line.rstrip("\r\n")
        if not message.strip():
            continue
        parts = AnswerParts(marked=parameters.get("special_tokens", False), thoughts=False)
        try:
            for chunk in conversations.say(message, parameters):
                sys.stdout.write("".join(text for text, _ in parts.push(chunk.text)))
                sys.stdout.flush()
        except TurnRefused as error:
            raise CommandError(str(error)) from None
        sys.stdout.write("".join(text for text, _ in parts.finish()) + "\n")
        sys.stdout.flush()

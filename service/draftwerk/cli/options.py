"""Options that several commands share, and the engine that they describe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from draftwerk.cli.failures import usage_error

if TYPE_CHECKING:
    from draftwerk.engine import Engine

DEFAULT_MODEL = "gemma-3-270m"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A Hugging Face directory, a GGUF file, a name on the hub, or a built-in name.",
        metavar="M",
    ),
]
Drafter = Annotated[
    str,
    typer.Option(
        "--drafter",
        "-d",
        help="auto, lookup, none, or the path or hub name of an MTP drafter. Changes the speed alone.",
        metavar="D",
    ),
]
FullHead = Annotated[
    bool, typer.Option("--full-head", help="Compute all logits of every step: the same tokens, later.")
]
NoLookup = Annotated[bool, typer.Option("--no-lookup", help="Draft with the MTP drafter alone.")]
DraftLength = Annotated[
    Optional[int],
    typer.Option(
        "--draft-length", min=0, max=64, help="Drafts per step. Default: decided by measured costs.", metavar="N"
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:N.", metavar="DEVICE")
]
Threads = Annotated[int, typer.Option("--threads", "-t", min=0, max=511, help="Kernel threads; 0 uses all cores.")]
KvMemory = Annotated[
    Optional[str],
    typer.Option(
        "--kv-memory",
        help="Most memory of the KV cache, e.g. 512MiB. Default: 1GiB, or 25% of free memory if that is less.",
        metavar="SIZE",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights", help="auto, int8, int4, fp8, f32, f16 or bf16: how to hold float weights.", metavar="TYPE"
    ),
]
NoPrefixCache = Annotated[bool, typer.Option("--no-prefix-cache", help="Compute every prompt from its first token.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.", metavar="N")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the most probable token.", metavar="T")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the K most probable tokens; 0 keeps all.", metavar="K")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep this probability mass; 1 keeps all.", metavar="P")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens this probable relative to the best.")]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", help="1 is off.")]
PresencePenalty = Annotated[float, typer.Option("--presence-penalty", help="0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option("--frequency-penalty", help="0 is off.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same text.", metavar="S")]
Stop = Annotated[
    Optional[list[str]], typer.Option("--stop", help="End before this text. May be repeated.", metavar="TEXT")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put the prompt through the model's chat template, as a user's message.")
]

messages = Console(stderr=True)
"""Where everything goes that is not the command's result."""


def refuse_beside_target(context: typer.Context, *names: str) -> None:
    """Refuses the options of a model of one's own, which a server that runs already has settled.

    Raises:
        CommandError: one of these parameters was given on the command line.
    """
    refuse_beside(context, "--target", "the server that runs there has its own", *names)


def refuse_beside(context: typer.Context, given: str, reason: str, *names: str) -> None:
    """Refuses options that mean nothing beside one that is given.

    Raises:
        CommandError: one of these parameters was given on the command line.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise usage_error(f"{flags(context)[name].opts[0]} and {given} exclude each other: {reason}")


def flags(context: typer.Context) -> dict[str | None, Any]:
    """The command's options by the names of its parameters."""
    return {parameter.name: parameter for parameter in context.command.params}


@contextmanager
def loading_progress(model: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, as the function that reports to it."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,
    ) as bar:
        task = bar.add_task(escape(f"opening {model}"), total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report


class _LoadingNotes(logging.Handler):
    """What loading has to say of a checkpoint, such as that it takes the text part alone."""

    def emit(self, record: logging.LogRecord) -> None:
        messages.print(Text(record.getMessage()), style="dim")


@contextmanager
def _loading_notes() -> Iterator[None]:
    logger, notes = logging.getLogger("draftwerk.loading"), _LoadingNotes()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def open_engine(
    model: str,
    *,
    drafter: str,
    no_lookup: bool,
    full_head: bool,
    draft_length: int | None,
    device: str,
    threads: int,
    kv_memory: str | None,
    weights: str,
    prefix_cache: bool,
) -> Iterator[Engine]:
    """An engine for these options, with a progress bar on stderr while it loads."""
    from draftwerk.engine import Engine

    with loading_progress(model) as progress, _loading_notes():
        engine = Engine(
            model,
            drafter=drafter,
            lookup=not no_lookup,
            full_head=full_head,
            draft_length=draft_length,
            max_draft_length=max(16, draft_length or 0),
            device=device,
            threads=threads,
            kv_memory=kv_memory,
            weights=weights,
            prefix_cache=prefix_cache,
            progress=progress,
        )
    with engine:
        yield engine


@contextmanager
def server(model: str, **settings: str | int | bool | None) -> Iterator[str]:
    """A server of one's own with these settings, with a sign of life on stderr while it loads.

    Yields:
        Its address.
    """
    from draftwerk.cli.local_server import local_server

    with ExitStack() as stack:
        with messages.status(Text(f"loading {model}")):
            address = stack.enter_context(local_server(model, **settings))
        yield address

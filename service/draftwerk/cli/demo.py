"""`draftwerk demo`: what drafting does, made visible."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import CommandError, reports_failures

if TYPE_CHECKING:
    from draftwerk.engine import Engine
    from draftwerk.requests import SamplingParams
    from draftwerk.results import Completion

EPILOG = """
[bold]Examples[/]

  draftwerk demo

  draftwerk demo --prompt "1, 1, 2, 3, 5, 8," --max-tokens 64
"""

TERMS = (
    "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms\n"
    "and the Prohibited Use Policy: https://ai.google.dev/gemma/prohibited_use_policy"
)

# Text that repeats itself, as code, tables and edits do: there lookup drafting has something to find.
PROMPT = """\
The opening hours of the library, day by day:
- On Monday the library opens at 9:00 and closes at 18:00. The reading room upstairs closes one hour earlier.
- On Tuesday the library opens at 9:00 and closes at 18:00. The reading room upstairs closes one hour earlier.
- On Wednesday"""

_DRAFTED = "bold green"
_OWN = "yellow"
_ROUNDS = 3


@reports_failures
def demo(
    model: options.Model = options.DEFAULT_MODEL,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt", "-p", help="Another prompt.", metavar="TEXT", show_default="a text that repeats itself"
        ),
    ] = PROMPT,
    max_tokens: options.MaxTokens = 128,
    drafter: options.Drafter = "auto",
    threads: options.Threads = 0,
) -> None:
    """Generate with and without drafting; show which tokens were drafted, the speed of both, and that both agree."""
    show(Console(), model, prompt=prompt, max_tokens=max_tokens, drafter=drafter, threads=threads)


def show(
    console: Console,
    model: str = options.DEFAULT_MODEL,
    *,
    prompt: str = PROMPT,
    max_tokens: int = 128,
    drafter: str = "auto",
    threads: int = 0,
) -> None:
    """The demo on any console.

    Raises:
        CommandError: the outputs with and without drafting differ.
    """
    from draftwerk.requests import SamplingParams

    if model == options.DEFAULT_MODEL:
        console.print(TERMS, style="dim", highlight=False, soft_wrap=True)
        console.print()
    with options.open_engine(
        model, drafter=drafter, draft_length=None, threads=threads, kv_memory=None, weights="auto", prefix_cache=False
    ) as engine:
        console.print(Text(f"{engine.info.model} on {engine.info.backend}, drafter: {engine.info.drafter}"))
        with_drafting = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        _show_stream(console, engine, prompt, with_drafting)
        plain, drafted = _compare(engine, prompt, with_drafting)
    console.print(_speed_table(plain, drafted))
    if len({completion.token_ids for completion in (*plain, *drafted)}) != 1:
        raise CommandError("the outputs with and without drafting differ")
    console.print(
        f"All {len(plain) + len(drafted)} outputs are identical: drafting changes the speed, never the text.",
        style="bold",
        highlight=False,
    )


def _show_stream(console: Console, engine: Engine, prompt: str, params: SamplingParams) -> None:
    console.print(
        Text.assemble(
            ("drafted and accepted", _DRAFTED), "  ", ("chosen by the model itself", _OWN), "  ", ("prompt", "dim")
        )
    )
    console.print()
    console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
    for chunk in engine.stream(prompt, params):
        console.print(_coloured(engine, chunk.text, chunk.token_ids, chunk.drafted), end="", soft_wrap=True)
    console.print("\n")


def _coloured(engine: Engine, text: str, token_ids: tuple[int, ...], drafted: tuple[bool, ...]) -> Text:
    """The chunk's text with every token in its colour."""
    pieces = [engine.detokenize([token]) for token in token_ids]
    if "".join(pieces) != text:  # a character spread over several tokens: one colour for the chunk
        return Text(text, style=_DRAFTED if any(drafted) else _OWN)
    return Text.assemble(*((piece, _DRAFTED if d else _OWN) for piece, d in zip(pieces, drafted, strict=True)))


def _compare(engine: Engine, prompt: str, params: SamplingParams) -> tuple[list[Completion], list[Completion]]:
    """Completions without and with drafting, taking turns so that both meet the same machine."""
    plain: list[Completion] = []
    drafted: list[Completion] = []
    with options.messages.status("comparing with and without drafting"):
        for _ in range(_ROUNDS):
            plain.append(engine.generate(prompt, replace(params, drafting=False)))
            drafted.append(engine.generate(prompt, params))
    return plain, drafted


def _speed_table(plain: list[Completion], drafted: list[Completion]) -> Table:
    table = Table("", "tokens", "steps", "tokens/step", "tokens/s", "speed-up")
    base = statistics.median(c.stats.decode_tokens_per_second for c in plain)
    for name, completions in (("without drafting", plain), ("with drafting", drafted)):
        middle = sorted(completions, key=lambda c: c.stats.decode_tokens_per_second)[len(completions) // 2]
        speed = middle.stats.decode_tokens_per_second
        table.add_row(
            name,
            str(middle.stats.generated_tokens),
            str(middle.stats.steps),
            f"{middle.stats.tokens_per_step:.2f}",
            f"{speed:.1f}",
            f"{speed / base:.2f}x" if base else "-",
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table

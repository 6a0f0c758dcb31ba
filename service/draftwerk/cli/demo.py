"""`draftwerk demo`: what drafting does, made visible."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.draft_colours import DraftColours, legend
from draftwerk.cli.failures import CommandError, reports_failures, reports_server_failures

if TYPE_CHECKING:
    from draftwerk_client import Client, Completion

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
    device: options.Device = "auto",
    threads: options.Threads = 0,
) -> None:
    """Serve a model, generate with and without drafting; show what was drafted, both speeds, and that both agree."""
    show(Console(), model, prompt=prompt, max_tokens=max_tokens, drafter=drafter, device=device, threads=threads)


def show(
    console: Console,
    model: str = options.DEFAULT_MODEL,
    *,
    prompt: str = PROMPT,
    max_tokens: int = 128,
    drafter: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> None:
    """The demo on any console.

    Raises:
        CommandError: the server failed, or the outputs with and without drafting differ.
    """
    if model == options.DEFAULT_MODEL:
        console.print(TERMS, style="dim", highlight=False, soft_wrap=True)
        console.print()
    with (
        options.server(model, drafter=drafter, device=device, threads=threads, prefix_cache=False) as address,
        reports_server_failures(),
    ):
        from draftwerk_client import Client

        with Client(address) as client:
            served = client.model()
            console.print(Text(f"{served.name} on {served.backend}, drafter: {served.drafter}"))
            _show_stream(console, client, prompt, max_tokens)
            plain, drafted = _compare(client, prompt, max_tokens)
    console.print(_speed_table(plain, drafted))
    if len({completion.token_ids for completion in (*plain, *drafted)}) != 1:
        raise CommandError("the outputs with and without drafting differ")
    console.print(
        f"All {len(plain) + len(drafted)} outputs are identical: drafting changes the speed, never the text.",
        style="bold",
        highlight=False,
    )


def _show_stream(console: Console, client: Client, prompt: str, max_tokens: int) -> None:
    console.print(Text.assemble(legend(), "  ", ("prompt", "dim")))
    console.print()
    console.print(Text(prompt, style="dim"), end="", soft_wrap=True)
    colours = DraftColours()
    for chunk in client.stream(prompt, max_tokens=max_tokens, ignore_eos=True, token_bytes=True):
        console.print(colours.coloured(chunk.text, chunk.token_bytes or (), chunk.drafted), end="", soft_wrap=True)
    console.print("\n")


def _compare(client: Client, prompt: str, max_tokens: int) -> tuple[list[Completion], list[Completion]]:
    """Completions without and with drafting, taking turns so that both meet the same machine."""
    plain: list[Completion] = []
    drafted: list[Completion] = []
    with options.messages.status("comparing with and without drafting"):
        for _ in range(_ROUNDS):
            for drafting, completions in ((False, plain), (True, drafted)):
                completions.append(client.generate(prompt, max_tokens=max_tokens, ignore_eos=True, drafting=drafting))
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

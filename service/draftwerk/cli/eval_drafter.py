"""`draftwerk eval-drafter`: what a drafter is worth for a model, on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import reports_failures, usage_error
from draftwerk.cli.json_file import JsonFile, check_writable, print_and_write
from draftwerk.cli.training_display import TrainingDisplay
from draftwerk.cli.training_extra import naming_options, reports_training_failures

if TYPE_CHECKING:
    from draftwerk.training.evaluation import Evaluation
    from draftwerk.training.rounds import Acceptance
    from draftwerk.training.timing import Pace

EPILOG = """
[bold]Examples[/]

  draftwerk eval-drafter --model gemma-3-270m --drafter my-drafter/drafter

  draftwerk eval-drafter --model ./gemma-4-E2B-it --drafter ./my-drafter/drafter --prompts mine.txt --chat

  draftwerk eval-drafter --timed 0 --json -
"""

_GIVE = "give a directory, a GGUF file or a hub name"
# Options by the names that training has for them.
_OPTIONS = {
    **{name: name for name in ("max_tokens", "draft_length", "temperature", "top_k", "top_p", "seed")},
    "timed_prompts": "timed",
}


@reports_failures
def eval_drafter(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter",
            "-d",
            help="Directory, GGUF file or hub name of an MTP drafter; auto: the one that goes with the model.",
            metavar="D",
        ),
    ] = "auto",
    prompts: Annotated[
        Optional[Path],
        typer.Option(
            "--prompts",
            help='Lines of text, or JSON lines with "prompt", "messages" or "turns", and "category". '
            "Default: built-in openings.",
            metavar="FILE",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Lines of --prompts are a user's messages, for the model's chat template.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=4096, help="Most prompts.", metavar="N")] = 48,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Most tokens of a text; 32 or more.", metavar="N")
    ] = 128,
    draft_length: Annotated[
        int, typer.Option("--draft-length", help="Drafts a step where acceptance is measured, 1 to 7.", metavar="N")
    ] = 6,
    timed: Annotated[
        int, typer.Option("--timed", min=0, help="Prompts that speed is measured on; 0: none.", metavar="N")
    ] = 12,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of texts that are sampled; others are greedy.", metavar="T")
    ] = 1.0,
    top_k: options.TopK = 64,
    top_p: options.TopP = 0.95,
    seed: options.Seed = 0,
    weights: options.Weights = "auto",
    device: options.Device = "auto",
    threads: options.Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Measure what a drafter is worth: drafts accepted by depth and kind of prompt, and the time they gain."""
    check_writable(json_file)
    with reports_training_failures(), naming_options(context, _OPTIONS):
        from draftwerk.drafters import DRAFTERS
        from draftwerk.loading import find_assistant, is_hub_name, path_exists
        from draftwerk.training.evaluation import EvaluationOptions, Evaluator
        from draftwerk.training.evaluation_prompts import from_file, from_openings
        from draftwerk.training.prompts import read_prompts
        from draftwerk.training.sampling import Sampling
        from draftwerk.weights import open_model

        if drafter in DRAFTERS and drafter != "auto":
            raise usage_error(f"--drafter {drafter} is no MTP drafter: {_GIVE}")
        if chat and prompts is None:
            raise usage_error("--chat is for --prompts: the built-in openings use a chat template anyway")
        sampled = Sampling(temperature, top_k, top_p)
        how = EvaluationOptions(max_tokens, draft_length, timed, seed, threads, weights, device, sampled)
        given = None if prompts is None else read_prompts(prompts, chat=chat)
        with options.loading_progress(model) as progress:
            checkpoint = open_model(model, progress)
            found = find_assistant(checkpoint.path) if drafter == "auto" else drafter
        if found is None:
            raise usage_error(f"no drafter goes with {model}: give one by --drafter")
        # The engine's own message also offers what is no MTP drafter.
        if not (path_exists(found) or is_hub_name(str(found))):
            raise usage_error(f"--drafter {found}: no such file or directory; {_GIVE}")

        def chosen(engine: Any) -> Any:
            if given is None:
                return from_openings(engine, limit, seed=seed, room=max_tokens)
            return from_file(engine, given, limit, room=max_tokens)

        with TrainingDisplay() as display:
            evaluator = Evaluator(checkpoint, chosen, how, display.evaluating, display.loading)
            evaluation = evaluator.evaluate(found, str(found))
    print_and_write(partial(_print, evaluation), evaluation.as_dict(), json_file)


def _print(evaluation: Evaluation, console: Console) -> None:
    title = f"{evaluation.model}, drafter {evaluation.drafter}, {evaluation.prompts} prompts"
    title = title.encode(errors="backslashreplace").decode()  # a name of a file need not be UTF-8
    depths = range(2, evaluation.options.draft_length + 1)
    table = _table(title, "", "rounds", "tokens/step", "depth 1", *map(str, depths))
    for its in evaluation.acceptance:
        table.add_row(its.sampling, *_cells(its.before_loops))
        table.add_row(f"{its.sampling}, whole", *_cells(its.whole))
    console.print(table)
    table = _table("", "category", *(its.sampling for its in evaluation.acceptance))
    for category in evaluation.acceptance[0].by_category:
        of_category = [its.by_category[category] for its in evaluation.acceptance]
        table.add_row(
            Text(category or "-"), *(f"{its.tokens_per_step:.2f}" if its.rounds else "-" for its in of_category)
        )
    console.print(table)
    shares = ", ".join(f"{its.sampling} {its.loop_share:.0%}" for its in evaluation.acceptance)
    console.print(
        f"sampled: {evaluation.options.sampled}; "
        f"whole: with what comes when a text goes round in circles, {shares} of the tokens; "
        f"depth: how deep in the tree that the {evaluation.options.draft_length} drafts of a step form",
        style="dim",
        highlight=False,
    )
    if not evaluation.speeds:
        return
    table = _table(evaluation.backend, "drafts by", "plain tokens/s", "with drafts", "speed-up", "whole")
    for speed in evaluation.speeds:
        whole = "-" if speed.whole is None else f"{speed.whole.speedup:.2f}"
        table.add_row(f"{speed.drafter}, {speed.sampling}", *_pace(speed.before_loops), whole)
    console.print(table)
    tokens = {its.sampling: its.tokens_per_step for its in evaluation.acceptance}
    for expected in evaluation.expectations():
        console.print(
            f"expected of {expected.best} drafts a step, {expected.sampling}: {max(expected.by_draft_length):.2f} "
            f"times as fast ({tokens[expected.sampling][expected.best]:.2f} tokens/step)",
            highlight=False,
        )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(first, title=Text(title) if title else None)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _cells(acceptance: Acceptance) -> list[str]:
    shares = [f"{share:.0%}" for share in acceptance.by_position]
    return [f"{acceptance.rounds:,}", f"{acceptance.tokens_per_step:.2f}", *shares]


def _pace(pace: Pace | None) -> list[str]:
    return ["-"] * 3 if pace is None else [f"{pace.plain:.1f}", f"{pace.drafted:.1f}", f"{pace.speedup:.2f}"]

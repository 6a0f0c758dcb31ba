"""The `draftwerk` command."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from draftwerk import __version__
from draftwerk.cli import bench, chat, demo, eval_drafter, export_drafter, generate, models, tokenize, train_drafter

EPILOG = """
[bold]Examples[/]

  draftwerk demo

  draftwerk chat

  draftwerk generate --prompt "The history of the steam engine begins"

  draftwerk COMMAND --help
"""


class _Commands(TyperGroup):
    """Makes `serve` when it is called, and not before: its options come from Settings, whose library takes its time."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:1] == ["serve"]:
            from draftwerk.cli import serve

            alone = typer.Typer(rich_markup_mode="rich", add_completion=False)
            alone.command("serve", epilog=serve.EPILOG)(serve.serve)
            self.commands["serve"] = get_command(alone)
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="draftwerk",
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fast, reproducible generation with Gemma models. Drafts tokens ahead and verifies them in one pass; "
    "the text is the same with and without.",
    epilog=EPILOG,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"draftwerk {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options of `draftwerk` itself."""
    # gRPC writes lines of its own to stderr, such as those of TLS handshakes that fail: not between the lines of a
    # server's log, and not beside the one line with which a command ends.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


@app.command("serve")
def _serve() -> None:
    """Serve a model over gRPC, until SIGTERM or Ctrl-C."""


app.command("generate", epilog=generate.EPILOG)(generate.generate)
app.command("chat", epilog=chat.EPILOG)(chat.chat)
app.add_typer(bench.app, name="bench")
app.command("models", epilog=models.EPILOG)(models.models)
app.command("tokenize", epilog=tokenize.EPILOG)(tokenize.tokenize)
app.command("train-drafter", epilog=train_drafter.EPILOG)(train_drafter.train_drafter)
app.command("eval-drafter", epilog=eval_drafter.EPILOG)(eval_drafter.eval_drafter)
app.command("export-drafter", epilog=export_drafter.EPILOG)(export_drafter.export_drafter)
app.command("demo", epilog=demo.EPILOG)(demo.demo)

if __name__ == "__main__":
    app()

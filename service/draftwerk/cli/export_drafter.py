"""`draftwerk export-drafter`: a drafter as one quantised file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional, cast, get_args

import typer
from rich.text import Text

from draftwerk.cli import options
from draftwerk.cli.failures import reports_failures, usage_error
from draftwerk.cli.training_extra import reports_training_failures

EPILOG = """
[bold]Examples[/]

  draftwerk export-drafter my-drafter/drafter --gguf my-drafter.gguf

  draftwerk export-drafter my-drafter/drafter --gguf my-drafter.gguf --matrices q8_0 --license gemma

  draftwerk serve --model gemma-3-270m --drafter my-drafter.gguf
"""


@reports_failures
def export_drafter(
    drafter: Annotated[
        str,
        typer.Argument(
            metavar="D", help="Directory, GGUF file or hub name of an MTP drafter; of a training run it is DIR/drafter."
        ),
    ],
    gguf: Annotated[
        Path, typer.Option("--gguf", help="File to write; one that is there is not replaced.", metavar="FILE")
    ],
    matrices: Annotated[
        str,
        typer.Option(
            "--matrices",
            help="q4_0, q8_0 or bf16: what matrices become. With q4_0 those of the layers; the few around them are "
            "q8_0 then.",
            metavar="TYPE",
        ),
    ] = "q4_0",
    name: Annotated[
        Optional[str],
        typer.Option("--name", help="What the drafter calls itself. Default: FILE without .gguf.", metavar="NAME"),
    ] = None,
    license_name: Annotated[
        Optional[str],
        typer.Option("--license", help="The terms that it is under: those of its model.", metavar="NAME"),
    ] = None,
) -> None:
    """Write a drafter as one GGUF file, a third of the size: what is passed on.

    Fewer bits make drafts cheaper and may make them worse, and never change which text comes: draftwerk eval-drafter
    says what the file is worth.
    """
    with reports_training_failures():
        from draftwerk.training.gguf_export import Matrices, write_gguf

        if matrices not in get_args(Matrices):
            raise usage_error(f"--matrices {matrices}: must be one of q4_0, q8_0, bf16")
        if gguf.exists():
            raise usage_error(f"--gguf {gguf}: is there already; give another name, or remove it first")
        write_gguf(
            drafter,
            gguf,
            matrices=cast(Matrices, matrices),
            name=name or gguf.name.removesuffix(".gguf"),
            license_name=license_name,
        )
    size = f"{gguf.stat().st_size / 1e6:,.1f} MB"
    options.messages.print(Text(f"the drafter is {gguf}, {size}"), soft_wrap=True)

"""Figures as a file of JSON beside the tables that people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console

from draftwerk.cli import options
from draftwerk.cli.failures import usage_error

JsonFile = Annotated[
    Optional[Path], typer.Option("--json", help="Write the figures to this file; - is stdout.", metavar="OUT")
]


def check_writable(json_file: Path | None) -> None:
    """Tells of a mistyped path before the time is spent, not after."""
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise usage_error(f"--json: {json_file} cannot be written: no such directory, or a directory itself")


def result_console(json_file: Path | None) -> Console:
    """Tables go to stdout, unless the JSON goes there."""
    return options.messages if json_file is not None and str(json_file) == "-" else Console()


def write_json(values: dict[str, Any], json_file: Path | None) -> None:
    """Writes the figures, if they are wanted.

    Raises:
        OSError: they cannot be written, because the disk is full for instance. Names the file.
    """
    if json_file is None:
        return
    text = json.dumps(values, indent=2) + "\n"
    if str(json_file) == "-":
        print(text, end="")
        return
    try:
        json_file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(json_file)) from error

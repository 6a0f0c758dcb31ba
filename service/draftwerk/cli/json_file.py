"""Figures as a file of JSON beside the tables that people read."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def print_and_write(print_tables: Callable[[Console], None], values: dict[str, Any], json_file: Path | None) -> None:
    """Prints figures as tables, and writes them as JSON if that is wanted.

    Neither is lost with the other: a disk may be full, and whoever reads the tables may go away.

    Args:
        print_tables: prints them to a console: stdout, unless the JSON goes there.
        values: the figures.
        json_file: what JsonFile gave.

    Raises:
        OSError: they cannot be written, because the disk is full for instance. Names the file.
    """
    console = Console()
    try:
        if json_file is not None and str(json_file) == "-":
            console = options.messages
            print(json.dumps(values, indent=2))
        elif json_file is not None:
            _write(json_file, json.dumps(values, indent=2) + "\n")
    finally:
        print_tables(console)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

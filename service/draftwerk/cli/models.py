"""`draftwerk models`: the built-in models, and what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli.failures import reports_failures

EPILOG = """
[bold]Examples[/]

  draftwerk models

  draftwerk models gemma-3-270m

  draftwerk models ./my-checkpoint --json
"""


@reports_failures
def models(
    model: Annotated[
        Optional[str],
        typer.Argument(metavar="M", help="A checkpoint to look into: a directory, a GGUF file or a built-in name."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the built-in models, or show what is in a checkpoint."""
    if model is None:
        _list_builtin(json_output)
    else:
        _describe(model, json_output)


def _list_builtin(json_output: bool) -> None:
    from draftwerk.loading import BUILTIN_MODELS

    entries = [
        {
            "name": builtin.name,
            "description": builtin.description,
            "license": builtin.license,
            "package": builtin.package,
            "how_to_get": builtin.how_to_get,
            "installed": find_spec(builtin.module) is not None,
        }
        for builtin in BUILTIN_MODELS.values()
    ]
    if json_output:
        print(json.dumps(entries, ensure_ascii=False))
        return
    table = Table("name", "description", "licence", "weights")
    for entry in entries:
        weights = "installed" if entry["installed"] else str(entry["how_to_get"])
        table.add_row(*(Text(str(entry[name])) for name in ("name", "description", "license")), Text(weights))
    console = Console()
    console.print(table)
    console.print(
        "Any Gemma 3 text model works too: --model takes a Hugging Face directory or a GGUF file.", style="dim"
    )


def _describe(model: str, json_output: bool) -> None:
    from draftwerk.loading import open_checkpoint

    checkpoint = open_checkpoint(model)
    config = dataclasses.asdict(checkpoint.config)
    layer_types = list(config.pop("layer_types"))
    values: dict[str, Any] = {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "layers": len(layer_types),
        "full_attention_layers": [i for i, kind in enumerate(layer_types) if kind == "full_attention"],
        **config,
        "weight_types": dict(checkpoint.weight_types),
        "tokenizer": checkpoint.tokenizer is not None,
        "chat_template": checkpoint.chat_template is not None,
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_ids": list(checkpoint.eos_token_ids),
    }
    if json_output:
        print(json.dumps(values, ensure_ascii=False))
        return
    table = Table(show_header=False, title=Text(checkpoint.name))
    for name, value in values.items():
        table.add_row(name.replace("_", " "), Text(_readable(value)))
    Console().print(table)


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{kind} x{count}" for kind, count in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

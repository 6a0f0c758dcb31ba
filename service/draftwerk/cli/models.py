"""`draftwerk models`: the built-in models, and what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from draftwerk.cli.failures import reports_failures

if TYPE_CHECKING:
    from draftwerk.loading import AssistantCheckpoint, Checkpoint

EPILOG = """
[bold]Examples[/]

  draftwerk models

  draftwerk models gemma-3-270m

  draftwerk models ./my-checkpoint --json

  draftwerk models google/gemma-4-E2B-it-assistant
"""


# Fields of the configuration that say nothing where they are off, and those that are at times another one's value.
_WHERE_THERE_IS = {
    "draft_length",
    "value_norm",
    "layer_scalars",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "attention_k_eq_v",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "num_centroids",
    "centroid_intermediate_top_k",
    "draft_vocab_size",
}
_SAME_AS = {"global_head_dim": "head_dim", "num_global_key_value_heads": "num_key_value_heads"}


@reports_failures
def models(
    model: Annotated[
        Optional[str],
        typer.Argument(
            metavar="M",
            help="A model or drafter to look into: a directory, a GGUF file, a built-in name or one on the hub.",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the built-in models, or show what is in a checkpoint."""
    if model is None:
        _list_builtin(json_output)
    else:
        _describe(model, json_output)


def _list_builtin(json_output: bool) -> None:
    from draftwerk.loading import BUILTIN_MODELS, shipped_drafter

    entries = [
        {
            "name": builtin.name,
            "description": builtin.description,
            "license": builtin.license,
            "package": builtin.package,
            "how_to_get": builtin.how_to_get,
            "installed": find_spec(builtin.module) is not None,
            "drafter": None if (drafter := shipped_drafter(builtin.name)) is None else str(drafter),
        }
        for builtin in BUILTIN_MODELS.values()
    ]
    if json_output:
        print(json.dumps(entries, ensure_ascii=False))
        return
    table = Table("name", "description", "licence", "weights", "drafter")
    for entry in entries:
        weights = "installed" if entry["installed"] else str(entry["how_to_get"])
        drafts = "lookup" if entry["drafter"] is None else "MTP, included"
        named = (str(entry[name]) for name in ("name", "description", "license"))
        table.add_row(*map(Text, (*named, weights, drafts)))
    console = Console()
    console.print(table)
    console.print(
        "Any Gemma 3 or Gemma 4 text model works too: --model takes a Hugging Face directory, a GGUF file or a name on "
        "the Hugging Face hub.",
        style="dim",
    )


def _describe(model: str, json_output: bool) -> None:
    from draftwerk.loading import is_assistant, open_assistant, open_checkpoint

    values = _of_drafter(open_assistant(model)) if is_assistant(model) else _of_model(open_checkpoint(model))
    if json_output:
        print(json.dumps(values, ensure_ascii=False))
        return
    table = Table(show_header=False, title=Text(values["name"]))
    for name, value in values.items():
        if _matters(name, values):
            table.add_row(name.replace("_", " "), Text(_readable(value)))
    Console().print(table)


def _of_model(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "kind": "model",
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        **_of_layers(dataclasses.asdict(checkpoint.config)),
        "weight_types": dict(checkpoint.weight_types),
        "tokenizer": checkpoint.tokenizer is not None,
        "chat_template": checkpoint.chat_template is not None,
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_ids": list(checkpoint.eos_token_ids),
    }


def _of_drafter(checkpoint: AssistantCheckpoint) -> dict[str, Any]:
    config = dataclasses.asdict(checkpoint.config)
    return {
        "kind": "MTP drafter",
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "draft_length": checkpoint.draft_length,
        **_of_layers(config.pop("text")),
        **config,
        "weight_types": dict(checkpoint.weight_types),
    }


def _of_layers(config: dict[str, Any]) -> dict[str, Any]:
    """A text configuration with the layer types in short."""
    layer_types = list(config.pop("layer_types"))
    return {
        "layers": len(layer_types),
        "full_attention_layers": [i for i, kind in enumerate(layer_types) if kind == "full_attention"],
        **config,
    }


def _matters(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a row is worth reading: not what only other models have."""
    if name in _SAME_AS:
        return bool(values[name] != values[_SAME_AS[name]])
    if name == "rope_partial_rotary_factor":
        return bool(values[name] != 1.0)
    return name not in _WHERE_THERE_IS or bool(values[name])


def _readable(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{kind} x{count}" for kind, count in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)

"""What a draft costs: drafters with reduced heads and random weights for any target, timed beside its own passes.

    python bench/draft_times.py gemma-3-270m --heads shipped 16384/512 16384 --weights auto int8 int4

A head is TOKENS/CENTROIDS, of which 32 are chosen, or TOKENS alone; "shipped" is the drafter that goes with the model,
whole, with its own weights. Milliseconds are those of one draft for all sequences of a step, smallest / median: of
rounds right behind a pass of the target, which leaves the caches to itself, as in an engine's steps; and of rounds
behind each other. Numbers of sequences and of drafts take turns, so that a slow spell of the machine falls on all of
them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_llama_cpp import machine
from safetensors.torch import save_file

from draftwerk.loading import (
    AssistantCheckpoint,
    Checkpoint,
    TextConfig,
    find_assistant,
    open_assistant,
    open_checkpoint,
)
from draftwerk.loading.hugging_face_config import assistant_config_from_hugging_face
from draftwerk.weights import load_assistant, load_model

SEQUENCES = (1, 4, 8)
DRAFTS = (1, 2, 4, 8)
CHOSEN = 32
SLIDING, FULL = "sliding_attention", "full_attention"


def configuration(target: TextConfig, layers: int, tokens: int, centroids: int) -> dict[str, Any]:
    """A drafter as wide as its target, with heads and MLPs like its last layer's."""
    text = {
        "model_type": "gemma4_text",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": layers,
        "layer_types": [SLIDING] * (layers - 1) + [FULL],
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "num_global_key_value_heads": target.num_global_key_value_heads,
        "attention_k_eq_v": target.num_global_key_value_heads != target.num_key_value_heads,
        "head_dim": target.head_dim,
        "global_head_dim": target.global_head_dim,
        "sliding_window": target.sliding_window,
        "max_position_embeddings": target.max_position_embeddings,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
    }
    return {
        "model_type": "gemma4_assistant",
        "text_config": text,
        "backbone_hidden_size": target.hidden_size,
        "draft_vocab_size": tokens,
        "use_ordered_embeddings": centroids > 0,
        "num_centroids": centroids,
        "centroid_intermediate_top_k": CHOSEN,
    }


def write_drafter(directory: Path, config: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(0)
    parsed = assistant_config_from_hugging_face("config.json", config)
    tensors = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()
        for name, shape in parsed.expected_tensors().items()
    }
    order = torch.randperm(parsed.text.vocab_size, generator=generator)
    tensors["draft_token_ids"] = order[: parsed.draft_vocab_size].int()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def drafters(
    checkpoint: Checkpoint, head: str, layers: int, weights: Sequence[str], directory: Path
) -> Iterator[tuple[str, AssistantCheckpoint]]:
    """A drafter as it is held in each of these types.

    Raises:
        SystemExit: no drafter goes with the model.
    """
    if head == "shipped":
        found = find_assistant(checkpoint.path)
        if found is None:
            raise SystemExit(f"no drafter goes with {checkpoint.name}")
        yield "auto", open_assistant(found)
        return
    tokens, _, centroids = head.partition("/")
    config = configuration(checkpoint.config, layers, int(tokens), int(centroids or 0))
    assistant = open_assistant(write_drafter(directory / head.replace("/", "-"), config))
    for held in weights:
        yield held, assistant


def milliseconds(seconds: Sequence[float]) -> tuple[float, float]:
    """Smallest and median."""
    return min(seconds) * 1e3, statistics.median(seconds) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--heads", nargs="+", default=["shipped"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--weights", nargs="+", default=["auto", "int8", "int4"], help="of the drafter")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    target = load_model(checkpoint, threads=arguments.threads)
    report: dict[str, Any] = {"machine": machine(), "backend": target.description, "context": arguments.context}
    passes: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        for head in arguments.heads:
            for weights, assistant in drafters(checkpoint, head, arguments.layers, arguments.weights, Path(directory)):
                drafter = load_assistant(assistant, checkpoint, target, weights=weights)
                behind, again = defaultdict(list), defaultdict(list)
                for _ in range(arguments.rounds):
                    passes += target.time_rows(1, 3, arguments.context)
                    for sequences, count in itertools.product(SEQUENCES, DRAFTS):
                        # Which first computes the context: a pass of the target.
                        first, *others = drafter.time_drafts(sequences, count, 4, arguments.context)
                        behind[sequences, count].append(first / count)
                        again[sequences, count] += [seconds / count for seconds in others]
                print(f"{head} {weights}, {drafter.weight_bytes / 1e6:.1f} MB")
                figures = {}
                for sequences, count in behind:
                    figure = {
                        "behind": milliseconds(behind[sequences, count]),
                        "again": milliseconds(again[sequences, count]),
                    }
                    print(f"  {sequences} sequences, rounds of {count}", end="")
                    print("".join(f"  {least:.3f} / {median:.3f} {kind}" for kind, (least, median) in figure.items()))
                    figures[f"{sequences}x{count}"] = figure
                report[f"{head} {weights}"] = figures
    report["pass_ms"] = milliseconds(passes)
    print(f"{target.description}: a pass of the target {report['pass_ms'][0]:.1f} / {report['pass_ms'][1]:.1f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

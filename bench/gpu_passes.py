"""What a pass of a Gemma, a draft of its MTP drafter, a long prompt and decoding take on a GPU, against what reading
the weights and multiplying takes.

    python bench/gpu_passes.py E2B 12B 31B --weights auto int8 int4 --json passes.json

Weights are random and of the published sizes; they are made in memory and go straight to the device. The bandwidth that
figures are compared with is that of a copy on the same device, measured before (with torch, if it is there). A model
that does not fit the device is left out, and said to be. Decoding is that of gpu_decoding.py. The JSON is written as
figures come: who has to stop has what was measured until then. With --same-text-as, the JSON of another run, the exit
status is 1 if anything that both decoded is another text.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_decoding import decode, prompts_of
from random_gemma4 import TARGETS, RandomTensors, assistant_config, assistant_tensors, target_config, target_tensors

from draftwerk import _core
from draftwerk.devices import find_gpu
from draftwerk.loading.config import AssistantConfig
from draftwerk.loading.hugging_face_config import assistant_config_from_hugging_face, config_from_hugging_face
from draftwerk.loading.tensors import TensorView
from draftwerk.weights import load_assistant, load_model

# Of a pass: what a sequence decodes, what some do at once, and 16 with 8 drafts each. Beyond the most outputs of a step
# (128), logits are those of the last row alone.
ROWS = (1, 4, 8, 16, 32, 64, 128, 144)
DRAFTS = (1, 8)
PREFILL, PREFILL_CHUNK = 8192, 2048
STREAMS = (1, 16)
DECODED = 192
# For keys and values: 16 streams of 31B at 1,216 tokens take 16 GB, 14 of them in sliding layers.
KV_MEMORY = 24 << 30
# Of a value of a layer's matrix, scales of blocks included. The head is int8 beside int4 and fp8, too.
LAYER_BITS = {"auto": 16.0, "bf16": 16.0, "f16": 16.0, "int8": 8.5, "int4": 4.5, "fp8": 8.0}
_NUMBERS = 1 << 24  # random values that all matrices are cut from


class RandomCheckpoint:
    """A target or a drafter of random weights, as far as loading it asks for one."""

    path = "random weights"
    name = "random"
    tokenizer = None
    chat_template = None
    bos_token_id = 2
    eos_token_ids = (1,)

    def __init__(self, config: Any, tensors: list[tuple[str, tuple[int, ...]]], seed: int = 0) -> None:
        self.config = config
        # A drafter reads its target's embedding, and its own is its head alone.
        self._embedding = "lm_head.weight" if isinstance(config, AssistantConfig) else "model.embed_tokens.weight"
        self._tensors = tensors
        self._random = RandomTensors(seed)
        self._pools: dict[tuple[float, float, int], npt.NDArray[Any]] = {}
        self.head_token_ids: npt.NDArray[np.int32] | None = None
        if any(name.endswith("token_ordering") for name, _ in tensors):
            self.head_token_ids = np.random.default_rng(seed).permutation(config.text.vocab_size).astype(np.int32)

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor once."""
        for name, shape in self._tensors:
            if name.endswith("token_ordering"):
                continue
            if len(shape) == 1:
                values = next(self._random.chunks(name, shape)).astype(np.uint32) << 16
                yield TensorView(name, "f32", shape, (values.view(np.uint8),))
                continue
            rows, columns = int(np.prod(shape[:-1])), shape[-1]
            pool = self._pool(name, shape)
            run = pool.size // columns
            parts = [pool.view(np.uint8)] * -(-rows // run)
            if name == "model.embed_tokens.weight":  # rows of a head are taken one by one
                parts = [np.concatenate(parts)[: rows * columns * pool.itemsize]]
                name = self._embedding
            yield TensorView(name, "bf16", (rows, columns), tuple(parts), (), run)

    def _pool(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Rows of random values: the same for all matrices of their size and width, as making them takes longest."""
        mean, spread = self._random.scale(name, shape)
        key = (mean, spread, shape[-1])
        if key not in self._pools:
            self._pools[key] = next(self._random.chunks(name, (_NUMBERS // shape[-1], shape[-1])))
        return self._pools[key]


def copy_bandwidth() -> float | None:
    """Bytes a second that a copy on the device reads and writes."""
    try:
        import torch
    except ImportError:
        return None
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * source.nbytes / (time.perf_counter() - started))
    del source, target
    torch.cuda.empty_cache()
    return best


def multiplication_rate() -> float | None:
    """Multiply-adds a second of a large product in bfloat16 (torch's)."""
    try:
        import torch
    except ImportError:
        return None
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            left @ right
        torch.cuda.synchronize()
        best = max(best, 10 * 8192**3 / (time.perf_counter() - started))
    del left, right
    torch.cuda.empty_cache()
    return best


def multiplications(target: dict[str, Any]) -> int:
    """Multiply-adds of a row of a prompt in matrices, those of its experts among them; the head is for the last row."""
    total = 0
    for name, shape in target_tensors(target):
        if len(shape) == 3:
            total += target["top_k_experts"] * int(np.prod(shape[1:]))
        elif len(shape) == 2 and not name.startswith("model.embed_tokens"):
            total += int(np.prod(shape))
    return total


def bytes_read(target: dict[str, Any], weights: str, weight_bytes: int) -> float:
    """Of the bytes of all weights, what a pass of one row reads: of its experts those that are chosen."""
    experts = [math.prod(shape) for _, shape in target_tensors(target) if len(shape) == 3]
    unread = sum(experts) * (1 - target["top_k_experts"] / target["num_experts"]) if experts else 0.0
    return weight_bytes - unread * LAYER_BITS[weights] / 8


def load(size: str, weights: str, gpu: _core.Gpu | None) -> tuple[_core.Model, _core.MtpModel]:
    """A target of random weights and its drafter."""
    config = config_from_hugging_face(size, target_config(size))
    checkpoint: Any = RandomCheckpoint(config, list(target_tensors(target_config(size))))
    target = load_model(checkpoint, weights=weights, gpu=gpu, max_step_rows=PREFILL_CHUNK)
    values = assistant_config(size)
    tensors = list(assistant_tensors(values))
    assistant: Any = RandomCheckpoint(assistant_config_from_hugging_face(size, values), tensors, seed=1)
    return target, load_assistant(assistant, checkpoint, target, weights=weights)


def kv_memory(target: _core.Model) -> int:
    """Bytes for keys and values: KV_MEMORY, or what the device has left."""
    return min(KV_MEMORY, target.memory[0] * 9 // 10) if target.memory else KV_MEMORY


def measure(size: str, weights: str, gpu: _core.Gpu | None, context: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Figures of one model with one choice of weights, as they come."""
    values = target_config(size)
    started = time.perf_counter()
    target, drafter = load(size, weights, gpu)
    config = dataclasses.asdict(config_from_hugging_face(size, values))
    yield {
        "weight_bytes": target.weight_bytes,
        "bytes_read": bytes_read(values, weights, target.weight_bytes),
        "drafter_bytes": drafter.weight_bytes,
        "loading_seconds": time.perf_counter() - started,
        "gpu_memory": target.memory,
        "config": {field: value for field, value in config.items() if field != "layer_types"},
    }
    target.time_rows(1, 5, context)
    passes: dict[int, list[float]] = defaultdict(list)
    drafts: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for rows in ROWS:
            passes[rows].append(statistics.median(target.time_rows(rows, 10, context)))
        for count in DRAFTS:
            drafts[count].append(statistics.median(drafter.time_drafts(1, count, 10, context)) / count)
    yield {
        "backend": target.description,  # which says what became of launches
        "pass_ms": {rows: statistics.median(seconds) * 1e3 for rows, seconds in passes.items()},
        "draft_ms": {count: statistics.median(seconds) * 1e3 for count, seconds in drafts.items()},
    }
    chunks = range(0, PREFILL, PREFILL_CHUNK)
    prefill = sum(statistics.median(target.time_rows(PREFILL_CHUNK, 3, done)) for done in chunks)
    yield {
        "prefill_ms": prefill * 1e3,
        "prefill_multiply_adds_per_second": PREFILL * multiplications(values) / prefill,
    }
    memory = kv_memory(target)
    decoding: dict[int, Any] = {}
    for streams in STREAMS:
        prompts = prompts_of(streams, context)
        found = decode(target, drafter, prompts=prompts, tokens=DECODED, rounds=rounds, kv_memory=memory)
        decoding[streams] = {name: dataclasses.asdict(figures) for name, figures in found.items()}
        yield {"decoding": decoding}


def summary(figures: dict[str, Any], bandwidth: float | None, rate: float | None) -> str:
    """One line of what was measured of a model, which may be a part."""
    found: list[str] = []
    if "weight_bytes" in figures:
        found.append(f"{figures['weight_bytes'] / 1e9:.2f} GB")
    if "pass_ms" in figures:
        one = figures["pass_ms"][1]
        speed = f" ({figures['bytes_read'] / bandwidth * 1e5 / one:.0f}% of the copy's speed)" if bandwidth else ""
        found.append(f"1 row {one:.3f} ms{speed}")
        found += [f"{rows} rows {figures['pass_ms'][rows] / one:.2f}x" for rows in ROWS[1:]]
        found.append(f"a draft {figures['draft_ms'][max(DRAFTS)] / one * 100:.1f}%")
    if "prefill_ms" in figures:
        reached = figures["prefill_multiply_adds_per_second"]
        share = f" ({reached / rate * 100:.0f}% of torch's product)" if rate else ""
        found.append(f"{PREFILL} tokens of a prompt {figures['prefill_ms']:.0f} ms{share}")
    for streams, of in figures.get("decoding", {}).items():
        none, drafted = of["none"], of["drafted"]
        found.append(
            f"{streams} streams {none['tokens_per_second']:.0f} tokens/s, with {drafted['tokens_per_step']:.2f} tokens"
            f" a step {drafted['tokens_per_second'] / none['tokens_per_second']:.2f}x, {_outside(none)} a step and"
            f" {_outside(drafted)}"
        )
    if "failed" in figures:
        found.append(f"failed: {figures['failed']}")
    return ", ".join(found)


def _outside(decoding: dict[str, Any]) -> str:
    if decoding["idle_ms"] is None:
        return f"planning and accepting {decoding['host_ms'] * 1e3:.0f} us"
    return f"device idle {decoding['idle_ms'] * 1e3:.0f} us"


def other_texts(figures: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """Numbers of streams whose text is not that of an earlier run, of a model's figures.

    Raises:
        KeyError: the earlier run did not decode as many streams.
    """
    return [
        str(streams)
        for streams, of in figures.get("decoding", {}).items()
        if of["none"]["text_sha256"] != earlier["decoding"][str(streams)]["none"]["text_sha256"]
    ]


def write(path: Path, report: dict[str, Any]) -> None:
    """Replaces a file of results, which is whole at every moment."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--weights", nargs="+", choices=sorted(LAYER_BITS), default=["auto"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same-text-as", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    earlier = None if arguments.same_text_as is None else json.loads(arguments.same_text_as.read_text())
    same = True
    gpu = find_gpu("cuda")
    assert gpu is not None
    bandwidth = copy_bandwidth()
    rate = multiplication_rate()
    report: dict[str, Any] = {
        "gpu": gpu.name,
        "copy_bytes_per_second": bandwidth,
        "multiply_adds_per_second": rate,
        "context": arguments.context,
    }
    for size in arguments.sizes:
        for weights in arguments.weights:
            figures = report[f"{size} {weights}"] = {}
            try:
                for part in measure(size, weights, gpu, arguments.context, arguments.rounds):
                    figures.update(part)
                    if arguments.json is not None:
                        write(arguments.json, report)
            except (RuntimeError, ValueError, MemoryError) as error:
                figures["failed"] = f"{type(error).__name__}: {error}"
            gc.collect()  # of a failure, what the traceback held
            print(f"{size} {weights}: {summary(figures, bandwidth, rate)}", flush=True)
            if earlier is not None and (others := other_texts(figures, earlier[f"{size} {weights}"])):
                print(
                    f"{size} {weights}: another text than {arguments.same_text_as} has, of {', '.join(others)} streams"
                )
                same = False
            if arguments.json is not None:
                write(arguments.json, report)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

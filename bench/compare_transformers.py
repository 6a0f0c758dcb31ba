"""Tokens per second beside transformers on the same weights, with and without the MTP drafter.

    python bench/random_gemma4.py E2B DIR
    python bench/compare_transformers.py DIR/E2B --rounds 3 --json transformers.json

Greedy, one stream; the prompt is not part of the time. Each engine has a process of its own, and the processes take
turns, so that a slow spell of the machine falls on all of them and none computes beside another. The output of
draftwerk with the drafter has to be that without it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_llama_cpp import machine

PROMPT = [2, *range(1000, 1031)]


@dataclass(frozen=True)
class Speed:
    """One measurement."""

    tokens_per_second: float
    token_ids: tuple[int, ...]


def run_transformers(model: str, drafter: str | None, tokens: int, threads: int) -> Speed:
    """Loads, warms up and measures once."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    target = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    assistant = None
    if drafter is not None:
        assistant = transformers.AutoModelForCausalLM.from_pretrained(drafter, dtype=torch.bfloat16)
    inputs = torch.tensor([PROMPT])

    def generate(count: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        with torch.inference_mode():
            out = target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                assistant_model=assistant,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )
        return time.perf_counter() - start, out[0, len(PROMPT) :].tolist()

    generate(2)
    # The difference of two lengths leaves out the prompt.
    (short, _), (long, token_ids) = generate(1), generate(tokens)
    assert len(token_ids) == tokens
    return Speed((tokens - 1) / (long - short), tuple(token_ids))


def run_draftwerk(model: str, drafter: str | None, tokens: int, threads: int, weights: str) -> Speed:
    """Loads, warms up and measures once."""
    from draftwerk import Engine, SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with Engine(model, drafter=drafter or "none", lookup=False, weights=weights, threads=threads) as engine:
        engine.generate(PROMPT, params)
        completion = engine.generate(PROMPT, params)
    return Speed((tokens - 1) / completion.stats.decode_time, completion.token_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drafter", help="default: MODEL-assistant")
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"], help="of draftwerk")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    assistant = arguments.drafter or arguments.model.rstrip("/") + "-assistant"
    common = (arguments.tokens, arguments.threads)
    subjects: dict[str, tuple[Callable[..., Speed], tuple[Any, ...]]] = {}
    for name, drafter in (("no drafter", None), ("drafter", assistant)):
        subjects[f"transformers bf16, {name}"] = (run_transformers, (arguments.model, drafter, *common))
        for weights in arguments.weights:
            settings = (arguments.model, drafter, *common, weights)
            subjects[f"draftwerk {weights}, {name}"] = (run_draftwerk, settings)

    # All of them at once would not fit into memory: a round opens each anew.
    speeds: dict[str, list[float]] = {name: [] for name in subjects}
    texts: dict[str, tuple[int, ...]] = {}
    for _ in range(arguments.rounds):
        for name, (run, settings) in subjects.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                speed = pool.apply(run, settings)
            speeds[name].append(speed.tokens_per_second)
            if name.startswith("draftwerk"):
                undrafted = name.partition(",")[0]
                assert texts.setdefault(undrafted, speed.token_ids) == speed.token_ids, f"{name}: another text"
            print(f"{name:32} {speed.tokens_per_second:7.2f} tokens/s", flush=True)
    base = "transformers bf16, no drafter"
    print()
    report = {}
    for name, values in speeds.items():
        ratio = statistics.median(value / of for value, of in zip(values, speeds[base], strict=True))
        report[name] = {"tokens_per_second": statistics.median(values), "of_transformers": ratio}
        print(f"{name:32} {statistics.median(values):7.2f} tokens/s {ratio:6.2f}x")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "tokens": arguments.tokens, **report}, indent=2))


if __name__ == "__main__":
    main()

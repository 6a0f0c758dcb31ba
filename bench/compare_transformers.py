"""Tokens per second beside transformers on the same weights and device, with and without the MTP drafter.

    python bench/random_gemma4.py E2B DIR
    python bench/compare_transformers.py DIR/E2B --rounds 3 --json transformers.json
    python bench/compare_transformers.py DIR/E2B --device cuda --weights bf16 int8 int4 --told --json transformers.json

Greedy, one stream; the prompt is not part of the time. Each engine has a process of its own, and the processes take
turns, so that a slow spell of the machine falls on all of them and none computes beside another. The output of
draftwerk with the drafter has to be that without it.

Drafts of random weights are never right. --told adds what both would be with 8 drafts and 4.0 tokens in every step:
draftwerk is measured with drafts that are right that often (gpu_decoding.py), its drafter run for the time that it
takes; of transformers the steps per second with 8 drafts are measured, and multiplied by 4.0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare_llama_cpp import machine
from gpu_decoding import ACCEPTANCE, DRAFTS, decode

PROMPT = [2, *range(1000, 1031)]
TOLD = "told drafts"
TOLD_TOKENS = sum(ACCEPTANCE**accepted for accepted in range(DRAFTS + 1))  # of a step


@dataclass(frozen=True)
class Settings:
    """What is measured, whoever computes it."""

    model: str
    assistant: str
    tokens: int
    threads: int
    device: str
    told: bool


@dataclass(frozen=True)
class Speed:
    """One measurement."""

    tokens_per_second: float
    tokens_per_step: float
    token_ids: tuple[int, ...] = ()


def run_transformers(settings: Settings) -> dict[str, Speed]:
    """Loads, warms up and measures once."""
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    target, assistant = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(settings.device)
        for path in (settings.model, settings.assistant)
    )
    inputs = torch.tensor([PROMPT], device=settings.device)
    steps = 0

    def count_step(*_: Any) -> None:
        nonlocal steps
        steps += 1

    target.register_forward_hook(count_step)

    def generate(count: int, drafter: Any) -> tuple[float, int, list[int]]:
        before, start = steps, time.perf_counter()
        with torch.inference_mode():
            out = target.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                assistant_model=drafter,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
            )
        token_ids = out[0, len(PROMPT) :].tolist()  # waits for a GPU
        return time.perf_counter() - start, steps - before, token_ids

    def measure(drafter: Any) -> Speed:
        generate(2, drafter)
        # The difference of two lengths leaves out the prompt.
        short, few, _ = generate(1, drafter)
        long, many, token_ids = generate(settings.tokens, drafter)
        assert len(token_ids) == settings.tokens
        tokens = settings.tokens - 1
        return Speed(tokens / (long - short), tokens / (many - few), tuple(token_ids))

    found = {"no drafter": measure(None), "drafter": measure(assistant)}
    if settings.told:
        assistant.generation_config.num_assistant_tokens = DRAFTS
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        speed = measure(assistant)
        found[TOLD] = Speed(speed.tokens_per_second / speed.tokens_per_step * TOLD_TOKENS, TOLD_TOKENS)
    return found


def run_draftwerk(settings: Settings, weights: str) -> dict[str, Speed]:
    """Loads, warms up and measures once."""
    from draftwerk import Engine, SamplingParams

    params = SamplingParams(max_tokens=settings.tokens, ignore_eos=True)
    found = {}
    for name, drafter in (("no drafter", "none"), ("drafter", settings.assistant)):
        with Engine(
            settings.model,
            drafter=drafter,
            lookup=False,
            weights=weights,
            device=settings.device,
            threads=settings.threads,
            kv_memory="256MiB",
        ) as engine:
            engine.generate(PROMPT, params)
            completion = engine.generate(PROMPT, params)
        rate = (settings.tokens - 1) / completion.stats.decode_time
        found[name] = Speed(rate, settings.tokens / completion.stats.steps, completion.token_ids)
    assert found["drafter"].token_ids == found["no drafter"].token_ids, f"{weights}: drafts changed a token"
    if settings.told:
        found[TOLD] = run_told(settings, weights)
    return found


def run_told(settings: Settings, weights: str) -> Speed:
    """Drafts of draftwerk that are told."""
    from draftwerk.devices import find_gpu
    from draftwerk.loading import open_assistant, open_checkpoint
    from draftwerk.weights import load_assistant, load_model

    checkpoint = open_checkpoint(settings.model)
    gpu = find_gpu(settings.device)
    model = load_model(checkpoint, gpu=gpu, weights=weights, threads=settings.threads)
    mtp = load_assistant(open_assistant(settings.assistant), checkpoint, model, weights=weights)
    figures = decode(model, mtp, prompts=[PROMPT], tokens=settings.tokens, rounds=1, kv_memory=256 << 20)["drafted"]
    return Speed(figures.tokens_per_second, figures.tokens_per_step)


def device_name(device: str) -> str:
    """The GPU by its own name, or the processor by its."""
    if device == "cpu":
        return machine()
    import torch

    return torch.cuda.get_device_name(device)


def rounds(subjects: dict[str, tuple[Callable[..., dict[str, Speed]], tuple[Any, ...]]], count: int) -> Iterator[Any]:
    """(name, speed) of every measurement, round by round."""
    # All of them at once would not fit into memory: a round opens each anew.
    for _ in range(count):
        for subject, (run, arguments) in subjects.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found: dict[str, Speed] = pool.apply(run, arguments)
            for name, speed in found.items():
                print(f"{subject}, {name:12} {speed.tokens_per_second:9.2f} tokens/s", flush=True)
                yield f"{subject}, {name}", speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drafter", help="default: MODEL-assistant")
    parser.add_argument("--weights", nargs="+", default=["bf16", "int8", "int4"], help="of draftwerk")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, of both")
    parser.add_argument("--told", action="store_true", help="with drafts of which 4.0 tokens a step are kept, besides")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    assistant = arguments.drafter or arguments.model.rstrip("/") + "-assistant"
    settings = Settings(
        arguments.model, assistant, arguments.tokens, arguments.threads, arguments.device, arguments.told
    )
    subjects: dict[str, tuple[Callable[..., dict[str, Speed]], tuple[Any, ...]]] = {
        "transformers bf16": (run_transformers, (settings,))
    }
    for weights in arguments.weights:
        subjects[f"draftwerk {weights}"] = (run_draftwerk, (settings, weights))

    taken: dict[str, list[Speed]] = {}
    report: dict[str, Any] = {}
    for name, speed in rounds(subjects, arguments.rounds):
        taken.setdefault(name, []).append(speed)
        if name.startswith("draftwerk"):
            assert taken[name][0].token_ids == speed.token_ids, f"{name}: another text"
        # As it comes: who has to stop has what was measured until then.
        report = {name: figures_of(name, speeds, taken) for name, speeds in taken.items()}
        if arguments.json:
            arguments.json.write_text(
                json.dumps({"device": device_name(arguments.device), **asdict(settings), **report}, indent=2)
            )
    print()
    for name, figures in report.items():
        print(f"{name:32}", "  ".join(f"{figure}: {value:.2f}" for figure, value in figures.items()))


def figures_of(name: str, speeds: Sequence[Speed], taken: dict[str, list[Speed]]) -> dict[str, float]:
    """Medians of what was measured, and of its ratios to transformers without its drafter and with the same drafts."""
    figures = {
        "tokens_per_second": statistics.median(s.tokens_per_second for s in speeds),
        "tokens_per_step": statistics.median(s.tokens_per_step for s in speeds),
    }
    kind = name.rpartition(", ")[2]
    for of, base in (("of_transformers", "no drafter"), ("of_the_same_drafts", kind)):
        pairs = zip(speeds, taken[f"transformers bf16, {base}"], strict=False)  # of a round that may not be whole
        figures[of] = statistics.median(s.tokens_per_second / b.tokens_per_second for s, b in pairs)
    return figures


if __name__ == "__main__":
    main()

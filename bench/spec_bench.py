"""Decoding speed on prompts, drafted and not, beside llama.cpp on the same file: the table of docs/performance.md.

    python bench/spec_bench.py --prompts FILE.jsonl --llama-bin ~/llama.cpp/build/bin --threads 2 --json spec_bench.json

Prompts are completed as they are. Each goes through all of them in turn, so that a slow spell of the machine falls on
all. A speed is the tokens behind each answer's first over the time behind it, all prompts together: no prefill is in
it. "Before loops" stops an answer where a run of eight tokens has come for the third time: a base model's greedy text
goes round in circles, which is easy to draft. The tokens of llama.cpp are its own (its arithmetic differs), sampled by
its own sampler.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from compare_llama_cpp import command_line, machine

from draftwerk import Engine, SamplingParams
from draftwerk.loading import open_checkpoint
from draftwerk.measurement import BenchPrompt, StreamRecord, read_prompts, run_prompts
from draftwerk.training.repetition import length_before_loop

SAMPLINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 64, "top_p": 0.95}}
LLAMA_SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_k": 64, "top_p": 0.95, "min_p": 0.0},
}
GOALS = {"greedy": (3.0, 3.5), "sampled": (2.0, 2.3)}
"""Tokens per step, and speed against llama.cpp, that are aimed at."""
LOADING_TIMEOUT = 120.0
"""Seconds."""


@dataclass
class Pace:
    """Tokens behind the first of each answer, and what they took."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    def add(self, record: StreamRecord, length: int) -> None:
        """Adds the steps of an answer that lie whole within its first `length` tokens."""
        tokens = record.arrivals[0][1]
        for (before, _), (now, count) in pairwise(record.arrivals):
            tokens += count
            if tokens > length:
                break
            self.tokens += count
            self.seconds += now - before
            self.steps += 1


def main() -> None:
    arguments = parse_arguments()
    checkpoint = open_checkpoint(arguments.model)
    prompts = read_prompts(arguments.prompts, None)[:: arguments.every]
    names = ["draftwerk", "draftwerk, no drafts"]
    paces: dict[str, dict[str, Pace]] = {
        sampling: {name: Pace() for name in [*names, "draftwerk, before loops", "llama.cpp"]}
        for sampling in arguments.samplings
    }
    with (
        Engine(
            arguments.model,
            drafter=arguments.drafter,
            draft_length=arguments.draft_length,
            threads=arguments.threads,
            prefix_cache=False,
        ) as engine,
        llama(arguments, str(checkpoint.path)) as server,
    ):
        encoded = [engine.encode_prompt(prompt.text) for prompt in prompts]
        measure(
            engine, [(prompts[0], encoded[0])], SamplingParams(max_tokens=arguments.max_tokens)
        )  # touches the weights
        for sampling, measured in paces.items():
            for number, (prompt, token_ids) in enumerate(zip(prompts, encoded, strict=True)):
                print(f"\r{sampling}: prompt {number + 1} of {len(prompts)}", end="", file=sys.stderr, flush=True)
                for name in names if number % 2 else reversed(names):
                    params = SamplingParams(
                        max_tokens=arguments.max_tokens,
                        ignore_eos=True,
                        seed=number,
                        drafting=name == "draftwerk",
                        **SAMPLINGS[sampling],
                    )
                    (record,), _ = measure(engine, [(prompt, token_ids)], params)
                    measured[name].add(record, arguments.max_tokens)
                    if name == "draftwerk":
                        measured["draftwerk, before loops"].add(record, length_before_loop(record.token_ids))
                if server is not None:
                    tokens, seconds = ask_llama(server, token_ids, arguments.max_tokens, number, sampling)
                    measured["llama.cpp"].tokens += tokens
                    measured["llama.cpp"].seconds += seconds
            print(file=sys.stderr)
    table = render(arguments, len(prompts), paces)
    print(table)
    if arguments.json is not None:
        figures = {
            sampling: {
                name: {
                    **vars(pace),
                    "tokens_per_second": pace.tokens_per_second,
                    "tokens_per_step": pace.tokens_per_step,
                }
                for name, pace in measured.items()
            }
            for sampling, measured in paces.items()
        }
        report = {"command": command_line(), "machine": machine(), "figures": figures, "table": table}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines as `draftwerk bench` reads them")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth prompt")
    parser.add_argument("--llama-bin", type=Path, help="directory with llama-server")
    parser.add_argument("--model", default="gemma-3-270m", help="a GGUF file or a built-in name")
    parser.add_argument("--drafter", default="auto", help="as for `draftwerk serve`")
    parser.add_argument("--draft-length", type=int, help="drafts in every step; default: as measured costs say")
    parser.add_argument("--samplings", nargs="+", choices=sorted(SAMPLINGS), default=list(SAMPLINGS))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args()


def measure(
    engine: Engine,
    prompts: Sequence[tuple[BenchPrompt, Sequence[int]]],
    params: SamplingParams,
    streams: int | None = None,
) -> tuple[list[StreamRecord], float]:
    """Continues prompts, so many at a time or all; what became of each, and the seconds that it took."""
    concurrency = len(prompts) if streams is None else streams

    async def run() -> tuple[list[StreamRecord], float]:
        engine.deliver_on(asyncio.get_running_loop())
        return await run_prompts(lambda ids: engine.submit(ids, params), prompts, concurrency, lambda: None)

    return asyncio.run(run())


@contextmanager
def llama(arguments: argparse.Namespace, gguf: str) -> Iterator[str | None]:
    """Runs llama-server; yields where it listens, or None where there is no --llama-bin."""
    if arguments.llama_bin is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(arguments.llama_bin / "llama-server"), "-m", gguf, "-t", str(arguments.threads), "-c", "4096"]
    command += ["-np", "1", "--port", str(port), "--no-webui"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        server = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + LOADING_TIMEOUT
        while True:
            try:
                with urllib.request.urlopen(f"{server}/health"):
                    break
            except OSError:  # not listening yet, or 503 while it loads
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"llama-server did not start: {' '.join(command)}") from None
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()


def ask_llama(server: str, token_ids: Sequence[int], max_tokens: int, seed: int, sampling: str) -> tuple[int, float]:
    """Tokens behind the first one, and the seconds that they took by llama-server's own clock."""
    request = {
        "prompt": list(token_ids),
        "n_predict": max_tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "seed": seed,
        **LLAMA_SAMPLINGS[sampling],
    }
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{server}/completion", body, headers)) as response:
        timings = json.load(response)["timings"]
    return timings["predicted_n"] - 1, timings["predicted_ms"] / 1e3


def render(arguments: argparse.Namespace, prompts: int, paces: dict[str, dict[str, Pace]]) -> str:
    lines = [
        f"{machine()}, {datetime.date.today().isoformat()}, {arguments.model}, {arguments.threads} threads, {prompts} "
        f"prompts, {arguments.max_tokens} tokens each. Command: `{command_line()}`",
        "",
        "| | tokens/step | goal | tokens/s | of no drafts | of llama.cpp | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for sampling, measured in paces.items():
        plain, theirs = measured["draftwerk, no drafts"], measured["llama.cpp"]
        for name, pace in measured.items():
            if not pace.tokens:
                continue
            goals = GOALS[sampling] if name == "draftwerk" else None
            cells = [
                f"{sampling}, {name}",
                f"{pace.tokens_per_step:.2f}" if pace.steps else "1",
                f"{goals[0]}" if goals else "",
                f"{pace.tokens_per_second:.1f}",
                f"{pace.tokens_per_second / plain.tokens_per_second:.2f}",
                f"{pace.tokens_per_second / theirs.tokens_per_second:.2f}" if theirs.tokens else "-",
                f"{goals[1]}" if goals else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

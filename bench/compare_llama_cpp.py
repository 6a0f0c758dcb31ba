"""Measures draftwerk and llama.cpp side by side and prints the table of docs/performance.md.

    python bench/compare_llama_cpp.py --llama-bin ~/llama.cpp/build/bin --threads 2 --json comparison.json

Every round runs each measurement once, llama.cpp's and ours in turn, so that a slow spell of the machine falls on both.
The table shows medians over the rounds; a ratio is the median of the rounds' ratios. Without --llama-bin only ours is
measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from draftwerk import Engine, SamplingParams
from draftwerk.loading import open_checkpoint

DECODE_TOKENS = 64
PREFILL_TOKENS = 512
STREAMS = 16

# Continuations that copy from the prompt (edits, summaries, tables), and ones that do not.
REPETITIVE = [
    """Rewrite the function with type hints.

def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height

def perimeter(width, height):
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return 2 * (width + height)

With type hints:

def area(width: float, height: float) -> float:
    if width < 0""",
    """The meeting of the building committee was held on Tuesday. The chair reported that the new roof of the east wing
is finished, that the heating of the west wing will be replaced in spring, and that both are within the budget.

Summary: The meeting of the building committee was held on Tuesday. The chair reported that""",
    """city,country,population,area
Berlin,Germany,3600000,891
Madrid,Spain,3300000,604
Rome,Italy,2800000,1285

The same table as JSON lines:
{"city": "Berlin", "country": "Germany", "population": 3600000, "area": 891}
{"city": "Madrid",""",
]
PLAIN = [
    "The old lighthouse keeper had not spoken to anyone for three weeks when",
    "There are several reasons why small countries trade more than large ones. The first",
    "In the garden behind the museum, the sculptor explained how",
]
SAMPLED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
DRAFTERS = ("lookup", "auto")
"""Lookup alone, which any model has, and what an engine drafts with that is not told: the model's own drafter too."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the names of two figures, and the goal of their ratio."""

    title: str
    ours: str
    baseline: str | None
    unit: str
    goal: str


ROWS = [
    Row("decode, no drafting", "decode", "llama tg64", "tokens/s", ">= 1.4"),
    Row(f"prefill of {PREFILL_TOKENS} tokens", "prefill", "llama pp512", "tokens/s", ">= 1.2"),
    Row("one pass, 8 rows against 1", "pass of 8 rows", "pass of 1 row", "ms", "<= 1.2"),
    Row(f"{STREAMS} streams against one, no drafting", "16 streams", "decode", "tokens/s", ">= 3"),
    Row("lookup against none, text that repeats", "lookup, repeating", "none, repeating", "tokens/s", ">= 1.5"),
    Row("lookup against none, text that does not", "lookup, plain", "none, plain", "tokens/s", ">= 0.97"),
    Row("default drafters against none, text that repeats", "auto, repeating", "none, repeating", "tokens/s", "-"),
    Row("default drafters against none, text that does not", "auto, plain", "none, plain", "tokens/s", "-"),
    Row("start of the process to first token", "start", None, "s", "<= 2"),
    Row("resident memory at most, less KV in use, against weights", "memory less KV", "weights", "MiB", "<= 1.3"),
]


def main() -> None:
    arguments = parse_arguments()
    checkpoint = open_checkpoint(arguments.model)
    measured: dict[str, list[float]] = defaultdict(list)
    with engines(arguments) as opened:
        engine = opened["auto"]
        for each in opened.values():
            generate(each, [2] * 16, 16, drafting=False)  # touches the weights
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
            if arguments.llama_bin is not None:
                for name, value in run_llama_bench(arguments, checkpoint.path).items():
                    measured[name].append(value)
            measured["decode"].append(generate(engine, [2], DECODE_TOKENS + 1, drafting=False))
            measured["prefill"].append(prefill(engine, number))
            measured["16 streams"].append(side_by_side(engine))
            for kind, prompts, sampling in (("repeating", REPETITIVE, {}), ("plain", PLAIN, SAMPLED)):
                measured[f"none, {kind}"].append(total_speed(engine, prompts, False, sampling))
                for drafter, drafting in opened.items():
                    measured[f"{drafter}, {kind}"].append(total_speed(drafting, prompts, True, sampling))
            for name, value in run_commands(arguments).items():
                measured[name].append(value)
    table = render(arguments, measured)
    print(table)
    if arguments.json is not None:
        report = {"command": command_line(), "machine": machine(), "rounds": measured, "table": table}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bin", type=Path, help="directory with llama-bench")
    parser.add_argument("--model", default="gemma-3-270m", help="a GGUF file or a built-in name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args()


@contextmanager
def engines(arguments: argparse.Namespace) -> Iterator[dict[str, Engine]]:
    """An engine for each of DRAFTERS, by its name."""
    with ExitStack() as stack:
        yield {
            drafter: stack.enter_context(
                Engine(arguments.model, drafter=drafter, threads=arguments.threads, prefix_cache=False)
            )
            for drafter in DRAFTERS
        }


def generate(
    engine: Engine, prompt: list[int], tokens: int, *, drafting: bool, sampling: dict[str, float] | None = None
) -> float:
    """Decode speed of one stream, tokens per second after the first token."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, drafting=drafting, **(sampling or {}))  # type: ignore[arg-type]
    return engine.generate(prompt, params).stats.decode_tokens_per_second


def prefill(engine: Engine, seed: int) -> float:
    """Prompt tokens per second, from leaving the queue to the first token."""
    words = random.Random(seed)
    prompt = [2] + [words.randrange(1000, 200_000) for _ in range(PREFILL_TOKENS - 1)]
    stats = engine.generate(prompt, SamplingParams(max_tokens=1)).stats
    return PREFILL_TOKENS / (stats.time_to_first_token - stats.queue_time)


def side_by_side(engine: Engine) -> float:
    """Tokens per second of all streams together, while all of them decode."""
    params = SamplingParams(max_tokens=DECODE_TOKENS + 1, ignore_eos=True, drafting=False)
    generations = [engine.submit([2, 1000 + stream], params) for stream in range(STREAMS)]
    arrivals = [[(chunk.received_at, len(chunk.token_ids)) for chunk in generation] for generation in generations]
    begin = max(stream[0][0] for stream in arrivals)
    end = min(stream[-1][0] for stream in arrivals)
    tokens = sum(count for stream in arrivals for at, count in stream if begin < at <= end)
    return tokens / (end - begin)


def total_speed(engine: Engine, prompts: list[str], drafting: bool, sampling: dict[str, float]) -> float:
    """Decode speed over several prompts, one after the other: tokens over time, so that slow ones count in full."""
    tokens, seconds = 0, 0.0
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=2 * DECODE_TOKENS,
            ignore_eos=True,
            drafting=drafting,
            seed=seed,
            **sampling,  # type: ignore[arg-type]
        )
        stats = engine.generate(prompt, params).stats
        tokens += stats.generated_tokens - 1
        seconds += stats.decode_time
    return tokens / seconds


def run_llama_bench(arguments: argparse.Namespace, gguf: str) -> dict[str, float]:
    command = [str(arguments.llama_bin / "llama-bench"), "-m", gguf, "-t", str(arguments.threads)]
    command += ["-p", str(PREFILL_TOKENS), "-n", str(DECODE_TOKENS), "-r", "1", "-o", "json"]
    results = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {f"llama tg{r['n_gen']}" if r["n_gen"] else f"llama pp{r['n_prompt']}": r["avg_ts"] for r in results}


def run_commands(arguments: argparse.Namespace) -> dict[str, float]:
    """What only a process of its own can show: start-up, memory, and passes of the bare model."""
    draftwerk = [sys.executable, "-m", "draftwerk.cli.main"]
    common = ["--model", arguments.model, "--threads", str(arguments.threads)]
    start = seconds_to_first_output([*draftwerk, "generate", *common, "--prompt", "The", "--max-tokens", "1"])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run_quietly([*draftwerk, "bench", "rows", *common, "--max-rows", "8", "--repeats", "8", "--json", str(report)])
        rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
        prompts = Path(folder) / "prompts.jsonl"
        prompts.write_text(json.dumps({"turns": [REPETITIVE[1]]}) + "\n", encoding="utf-8")
        bench = ["bench", *common, "--prompts", str(prompts), "--max-tokens", "64"]
        run_quietly([*draftwerk, *bench, "--json", str(report)])
        figures = json.loads(report.read_text(encoding="utf-8"))
    return {
        "start": start,
        "pass of 1 row": rows["1"],
        "pass of 8 rows": rows["8"],
        "memory less KV": memory_besides_kv(figures),
        "weights": figures["settings"]["weight_bytes"] / 2**20,
    }


def seconds_to_first_output(command: list[str]) -> float:
    """From the start of a process to the first of what it prints; what it does after that does not count.

    Raises:
        CalledProcessError: it failed.
    """
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds


def memory_besides_kv(report: dict[str, Any]) -> float:
    """MiB that `draftwerk bench` had resident at most, without keys and values.

    Of the cache's memory only what has been used is resident: the budget is address space.
    """
    in_use: int = report["engine"]["kv"]["peak_bytes"]
    resident: float = report["peak_rss_mb"]
    return resident - in_use / 2**20


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def render(arguments: argparse.Namespace, measured: dict[str, list[float]]) -> str:
    lines = [
        f"{machine()}, {datetime.date.today().isoformat()}, {arguments.model}, {arguments.threads} threads, "
        f"medians of {arguments.rounds} rounds. Command: `{command_line()}`",
        "",
        "| | draftwerk | compared with | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        ours = measured[row.ours]
        cells = [row.title, f"{statistics.median(ours):.4g} {row.unit}"]
        baseline = measured.get(row.baseline) if row.baseline is not None else None
        if baseline:
            ratio = statistics.median(a / b for a, b in zip(ours, baseline, strict=True))
            cells += [f"{statistics.median(baseline):.4g} {row.unit} ({row.baseline})", f"{ratio:.2f}"]
        else:
            cells += ["-", "-"]
        lines.append("| " + " | ".join([*cells, row.goal]) + " |")
    return "\n".join(lines)


def machine() -> str:
    """The processor, by its own name."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.processor()


def command_line() -> str:
    """The command that took the figures, without where llama.cpp lies on this machine."""
    arguments = ["DIR" if before == "--llama-bin" else word for before, word in pairwise(["", *sys.argv])]
    return shlex.join(["python", *arguments])


if __name__ == "__main__":
    main()

"""What a pass of a large Gemma and a draft of its MTP drafter cost: time by rows, and resident memory.

    python bench/random_gemma4.py E2B DIR
    python bench/gemma4_passes.py DIR/E2B --weights int8 int4 --json passes.json

Each choice of weights has a process of its own. Times are medians; rows and drafts take turns, round by round, so that
a slow spell of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from compare_llama_cpp import machine

ROWS = (1, 4, 8)
DRAFTS = (1, 4, 8)


def resident_bytes() -> dict[str, int]:
    """What the process holds in memory of its own, and what it has mapped of files."""
    status = Path("/proc/self/status").read_text()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in status.splitlines() if line.startswith("Rss")}
    return {"own": kib["RssAnon"] << 10, "mapped": kib["RssFile"] << 10}


def measure(model: str, drafter: str, weights: str, threads: int, context: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and bytes of one choice of weights."""
    from draftwerk.loading import check_fits, open_assistant, open_checkpoint
    from draftwerk.weights import load_assistant, load_model

    checkpoint, assistant = open_checkpoint(model), open_assistant(drafter)
    check_fits(assistant, checkpoint)
    target = load_model(checkpoint, weights=weights, threads=threads)
    mtp = load_assistant(assistant, checkpoint, target, weights=weights)
    passes, drafts = defaultdict(list), defaultdict(list)
    for _ in range(rounds):
        for rows in ROWS:
            passes[rows].append(statistics.median(target.time_rows(rows, 3, context)))
        for count in DRAFTS:
            drafts[count].append(statistics.median(mtp.time_drafts(1, count, 5, context)) / count)
    return {
        "backend": target.description,
        "weight_bytes": target.weight_bytes,
        "drafter_bytes": mtp.weight_bytes,
        "resident_bytes": resident_bytes(),
        "pass_ms": {rows: statistics.median(seconds) * 1e3 for rows, seconds in passes.items()},
        "draft_ms": {count: statistics.median(seconds) * 1e3 for count, seconds in drafts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--drafter", help="default: MODEL-assistant")
    parser.add_argument("--weights", nargs="+", default=["int8"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    drafter = arguments.drafter or arguments.model.rstrip("/") + "-assistant"
    report: dict[str, Any] = {"machine": machine(), "context": arguments.context, "weights": {}}
    for weights in arguments.weights:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            settings = (arguments.model, drafter, weights, arguments.threads, arguments.context, arguments.rounds)
            result = pool.apply(measure, settings)
        report["weights"][weights] = result
        one = result["pass_ms"][1]
        print(f"{weights}: {result['backend']}, weights {result['weight_bytes'] / 1e9:.2f} GB, drafter ", end="")
        print(
            f"{result['drafter_bytes'] / 1e6:.0f} MB, resident {result['resident_bytes']['own'] / 1e9:.2f} GB", end=""
        )
        print(f" and {result['resident_bytes']['mapped'] / 1e9:.2f} GB of files")
        for rows, ms in result["pass_ms"].items():
            print(f"  {rows} rows  {ms:7.1f} ms  {ms / one:.2f} of one")
        for count, ms in result["draft_ms"].items():
            print(f"  a draft of {count}  {ms:7.2f} ms  {ms / one:.2%} of a pass")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

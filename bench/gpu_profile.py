"""Where the time of a step goes on a GPU: how long the device waits for the host, and in which kernels it is lost.

    python bench/gpu_profile.py steps E2B --streams 1 16 --json steps.json
    ncu --csv --log-file losses.csv --print-units base --metrics gpu__time_duration.sum,\\
dram__throughput.avg.pct_of_peak_sustained_elapsed --launch-skip 1000 --launch-count 470 \\
        python bench/gpu_profile.py passes E2B
    python bench/gpu_profile.py losses losses.csv --json losses.json

steps decodes without drafts and with 8 of the MTP drafter's own, and takes the device's times from torch's profiler, of
the later half of the steps. Idle is what no kernel and no copy fills: "after results", where the host has to act on
what a step gave, and "between launches". The profiler makes the host slower: its figures are upper bounds. Time of a
kernel is what it adds to those before it, as kernels overlap.

passes runs passes of one row and nothing else, for a profiler of kernels to look at. losses says from its table which
kernels take most time beyond what they would if they moved their bytes at the peak rate.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_decoding import CONTEXT, opened, prompts_of, run_once
from gpu_passes import kv_memory, load
from random_gemma4 import TARGETS

from draftwerk import _core
from draftwerk.devices import find_gpu

TOP = 10
TOKENS = 48  # of each stream: steps, as drafts of random weights are never right
PASSES = 20
_TIME, _SHARE = "gpu__time_duration.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed"


@dataclass(frozen=True)
class Activity:
    """A kernel or a copy on the device, in microseconds."""

    name: str
    start: float
    end: float

    @property
    def is_result(self) -> bool:
        """Whether it brings results to the host."""
        return "DtoH" in self.name


def short_name(kernel: str) -> str:
    """A kernel's name with its template arguments, without what all names have in common."""
    name = re.sub(r"\(anonymous namespace\)::|draftwerk::|cuda::|^void |\((?:int|bool|unsigned int)\)", "", kernel)
    return re.sub(r"\(.*", "", name).strip()[:60]


def activities(trace: dict[str, Any]) -> list[Activity]:
    """What the device did, in order, of a trace that torch's profiler has exported."""
    found = [
        Activity(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda one: (one.start, one.end))


def figures_of(done: Sequence[Activity], steps: int) -> dict[str, Any]:
    """Of a run of `steps` steps, which begin with prompts: microseconds of a step in its later half.

    Raises:
        ValueError: the device did nothing, or brought no results.
    """
    # Results of a step are some copies in a row; with a drafter there are those of its passes besides.
    results = [
        i + 1 for i, one in enumerate(done) if one.is_result and not (i + 1 < len(done) and done[i + 1].is_result)
    ]
    if not results:
        raise ValueError("the trace has no copy of results")
    of_step = max(round(len(results) / steps), 1)
    measured = len(results) // 2 // of_step
    if measured == 0:
        raise ValueError(f"the trace has {len(results)} results of {steps} steps: too few")
    cut = done[results[-1 - measured * of_step] - 1 : results[-1]]  # from the last copy of the step before
    gaps: dict[str, list[float]] = {"after results": [], "between launches": []}
    kernels: dict[str, list[float]] = defaultdict(list)
    until = cut[0].end
    for before, one in itertools.pairwise(cut):
        if one.start > until:
            gaps["after results" if before.is_result else "between launches"].append(one.start - until)
        kernels[short_name(one.name)].append(max(one.end - max(one.start, until), 0.0))
        until = max(until, one.end)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:TOP]
    return {
        "steps": measured,
        "step_us": (until - cut[0].end) / measured,
        "idle_us": {kind: sum(found) / measured for kind, found in gaps.items()},
        "gap_after_results_us": _spread(gaps["after results"]),
        "kernels": {
            name: {"launches": len(kernels[name]) / measured, "us": sum(kernels[name]) / measured} for name in longest
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": statistics.median(values), "p90": sorted(values)[len(values) * 9 // 10], "most": max(values)}


def print_steps(name: str, figures: dict[str, Any]) -> None:
    """A table."""
    idle, gap = figures["idle_us"], figures["gap_after_results_us"]
    print(
        f"{name}: {figures['step_us']:.0f} us a step, of which idle {idle['after results']:.0f} after results", end=""
    )
    print(f" and {idle['between launches']:.0f} between launches", end="")
    print("; a gap after results " + ", ".join(f"{kind} {us:.0f}" for kind, us in gap.items()) + " us" if gap else "")
    for kernel, of in figures["kernels"].items():
        print(f"  {of['us']:8.1f} us {of['us'] / figures['step_us']:6.1%} {of['launches']:6.1f} launches  {kernel}")


def profiled(engine: _core.Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """A run in an engine that has run already."""
    from torch.profiler import ProfilerActivity, profile

    run_once(engine, prompts, TOKENS)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        steps = run_once(engine, prompts, TOKENS).steps
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return figures_of(activities(json.loads(path.read_text(encoding="utf-8"))), steps)


def profile_steps(arguments: argparse.Namespace) -> None:
    """Decoding with and without drafts."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):  # it has to be there before the first graph of launches
        torch.zeros(1, device="cuda")
    gpu = find_gpu("cuda")
    assert gpu is not None
    target, drafter = load(arguments.size, arguments.weights, gpu)
    report: dict[str, Any] = {"gpu": gpu.name, "model": f"{arguments.size} {arguments.weights}"}
    for streams in arguments.streams:
        prompts = prompts_of(streams, arguments.context)
        for drafters in ([], ["mtp"]):
            name = f"{streams} streams, {'8 drafts' if drafters else 'no drafts'}"
            with opened(target, drafters, drafter if drafters else None, None, kv_memory(target)) as engine:
                report[name] = profiled(engine, prompts)
            print_steps(f"{arguments.size} {name}", report[name])
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def run_passes(arguments: argparse.Namespace) -> None:
    """Passes of one row, in memory that holds nothing yet: no launch is of another shape."""
    gpu = find_gpu("cuda")
    assert gpu is not None
    target, _ = load(arguments.size, arguments.weights, gpu)
    print(f"{statistics.median(target.time_rows(1, PASSES, 0)) * 1e3:.3f} ms under the profiler")


def losses(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Kernels by the time that they lose, of a profiler's table in base units; nanoseconds become microseconds.

    Raises:
        ValueError: there is no such table.
    """
    table = iter(lines)
    header = next((line for line in table if line.startswith('"ID"')), None)
    if header is None:
        raise ValueError("the file has no table of kernels")
    launches: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in csv.DictReader(table, next(csv.reader([header]))):
        if row["Metric Name"] in (_TIME, _SHARE):
            launches[row["ID"]][row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
            launches[row["ID"]]["name"] = short_name(row["Kernel Name"])
    kernels: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for launch in launches.values():
        if _TIME in launch and _SHARE in launch:
            kernels[launch["name"]].append((launch[_TIME] / 1e3, launch[_SHARE] / 100))
    found = [
        {
            "kernel": name,
            "launches": len(of),
            "us": sum(us for us, _ in of),
            "lost_us": sum(us * (1 - share) for us, share in of),
        }
        for name, of in kernels.items()
    ]
    return sorted(found, key=lambda one: -one["lost_us"])


def print_losses(arguments: argparse.Namespace) -> None:
    """A table of the largest."""
    with arguments.table.open(encoding="utf-8") as file:
        found = losses(file)
    total = sum(one["us"] for one in found)
    print(f"{sum(one['launches'] for one in found)} launches, {total:.0f} us; beyond the bytes at the peak rate:")
    for one in found[:TOP]:
        share = 1 - one["lost_us"] / one["us"]
        print(f"  {one['lost_us']:8.1f} us of {one['us']:8.1f} ({share:4.0%} of the peak)", end="")
        print(f" {one['launches']:4} launches  {one['kernel']}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("steps", profile_steps), ("passes", run_passes)):
        command = commands.add_parser(name)
        command.add_argument("size", choices=sorted(TARGETS))
        command.add_argument("--weights", default="auto")
        if run is profile_steps:
            command.add_argument("--streams", nargs="+", type=int, default=[1])
            command.add_argument("--context", type=int, default=CONTEXT)
            command.add_argument("--json", type=Path)
        command.set_defaults(run=run)
    command = commands.add_parser("losses")
    command.add_argument("table", type=Path)
    command.add_argument("--json", type=Path)
    command.set_defaults(run=print_losses)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

"""Whether drafting pays, or at least costs nothing, at any number of streams: the table of docs/performance.md.

    python bench/drafting_under_load.py --prompts FILE.jsonl --streams 1 4 16 64 --rounds 7 --json load.json

One engine serves the same prompts with drafts, without, and without once more, in turn, round by round, so that a slow
spell of the machine falls on all; who is first changes. Texts are as long for all of a round. With drafts some end
before others, and the last ones have the machine to themselves; with several prompts for each stream the next one takes
the place of one that has ended, as in a server that is always asked by so many. The ratio of a round is that of its
tokens per second, prompts included; that of none to none says what the machine alone makes of it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from compare_llama_cpp import command_line, machine
from spec_bench import SAMPLINGS, measure

from draftwerk import Engine, SamplingParams
from draftwerk.measurement import read_prompts


@dataclass
class Rounds:
    """Tokens per second of one sampling at one number of streams, by round; of the drafted ones tokens per step too."""

    drafted: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    tokens_per_step: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [drafted / plain for drafted, plain in zip(self.drafted, self.plain, strict=True)]

    @property
    def control(self) -> list[float]:
        return [again / plain for again, plain in zip(self.again, self.plain, strict=True)]

    @property
    def overall(self) -> float:
        """Of all rounds: the time that both took for the same tokens."""
        return sum(1.0 / speed for speed in self.plain) / sum(1.0 / speed for speed in self.drafted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines as `draftwerk bench` reads them")
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompts-per-stream", type=int, default=1, help="of a round, one after the other")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every figure here")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts, None)
    measured: dict[str, dict[int, Rounds]] = {sampling: {} for sampling in SAMPLINGS}
    with Engine(arguments.model, drafter=arguments.drafter, threads=arguments.threads, prefix_cache=False) as engine:
        encoded = [(prompt, engine.encode_prompt(prompt.text)) for prompt in prompts]
        for sampling, streams in itertools.product(SAMPLINGS, arguments.streams):
            rounds = measured[sampling][streams] = Rounds()
            taken = itertools.cycle(encoded)
            # The first round teaches the budget what rows and drafts cost at this load.
            for number in range(arguments.rounds + 1):
                chosen = list(itertools.islice(taken, streams * arguments.prompts_per_stream))
                speeds = {}
                subjects = ("drafted", "plain", "again")
                for subject in subjects[number % 3 :] + subjects[: number % 3]:
                    params = SamplingParams(
                        max_tokens=arguments.max_tokens,
                        ignore_eos=True,
                        seed=number,
                        drafting=subject == "drafted",
                        **SAMPLINGS[sampling],
                    )
                    records, seconds = measure(engine, chosen, params, streams)
                    tokens = sum(len(record.token_ids) for record in records)
                    steps = sum(len(record.arrivals) for record in records)
                    speeds[subject] = tokens / seconds, tokens / steps
                if number:
                    rounds.drafted.append(speeds["drafted"][0])
                    rounds.plain.append(speeds["plain"][0])
                    rounds.again.append(speeds["again"][0])
                    rounds.tokens_per_step.append(speeds["drafted"][1])
            print(row(sampling, streams, rounds), file=sys.stderr, flush=True)
    lines = [
        f"{machine()}, {datetime.date.today().isoformat()}, {arguments.model}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds, {arguments.max_tokens} tokens each. Command: `{command_line()}`",
        "",
        "| | streams | tokens/s | without drafts | tokens/step | ratio, median | least | most | of all time "
        "| none to none, median | least | most |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(sampling, streams, rounds) for sampling, of in measured.items() for streams, rounds in of.items()]
    table = "\n".join(lines)
    print(table)
    if arguments.json is not None:
        figures = {
            sampling: {
                streams: {**vars(rounds), "ratios": rounds.ratios, "control": rounds.control}
                for streams, rounds in of.items()
            }
            for sampling, of in measured.items()
        }
        report = {"command": command_line(), "machine": machine(), "figures": figures, "table": table}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def row(sampling: str, streams: int, rounds: Rounds) -> str:
    ratios, control = rounds.ratios, rounds.control
    cells = [
        sampling,
        f"{streams}",
        f"{statistics.median(rounds.drafted):.1f}",
        f"{statistics.median(rounds.plain):.1f}",
        f"{statistics.median(rounds.tokens_per_step):.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f}",
        f"{max(ratios):.2f}",
        f"{rounds.overall:.2f}",
        f"{statistics.median(control):.2f}",
        f"{min(control):.2f}",
        f"{max(control):.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()

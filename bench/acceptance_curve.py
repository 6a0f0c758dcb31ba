"""Speed-up over acceptance and draft length, with a drafter whose drafts are right as often as it is told.

    python bench/acceptance_curve.py --model gemma-3-270m --json curve.json
    python bench/acceptance_curve.py --model DIR/E2B --drafter DIR/E2B-assistant --weights int8 --tokens 64

The drafts come from a recorded plain run, so what is measured is the engine and nothing else; with --drafter, that MTP
drafter is run for the time it takes. For every acceptance the fixed lengths, 0 among them always, and the draft budget
take turns, round by round; speeds are medians over the rounds, and relative to 0 drafts. "budget" is what the budget
reaches of the fixed length with the best median: the median of the rounds' ratios. (The best of each round would be the
one that noise has favoured.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare_llama_cpp import machine

import draftwerk.engine
from draftwerk import Engine, SamplingParams
from draftwerk.drafters import SyntheticDrafter
from draftwerk.loading import open_checkpoint
from draftwerk.weights import load_model

ACCEPTANCES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
LENGTHS = (0, 1, 2, 3, 4, 6, 8)
BUDGET = "budget"


def prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Token ids of no particular text: greedy output is recorded, whatever it is."""
    return [[2, *((17 * i + 31 * j) % (vocabulary - 10) + 5 for j in range(12))] for i in range(count)]


class Runs:
    """Engines over one native model, one after the other."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.checkpoint = open_checkpoint(arguments.model)
        native = load_model(self.checkpoint, weights=arguments.weights, threads=arguments.threads)
        draftwerk.engine.load_model = lambda *_, **__: native  # type: ignore[assignment]
        self.prompts = prompts(arguments.streams, self.checkpoint.config.vocab_size)
        self.params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True)
        with self.engine("none", None) as engine:
            plain = engine.generate(self.prompts, self.params)
        self.expected = [completion.token_ids for completion in plain]
        self.recordings = [[*prompt, *ids] for prompt, ids in zip(self.prompts, self.expected, strict=True)]

    def engine(self, drafter: Any, length: int | None) -> Engine:
        arguments = self.arguments
        return Engine(self.checkpoint, drafter=drafter, draft_length=length, weights=arguments.weights)

    def speed(self, acceptance: float, length: int | str) -> float:
        """Tokens per second of all streams, after a warm-up that also teaches the budget what things cost."""
        drafter = SyntheticDrafter(self.recordings, acceptance, seed=1, assistant=self.arguments.drafter)
        with self.engine(drafter, None if length == BUDGET else int(length)) as engine:
            for _ in range(self.arguments.warm_up):
                engine.generate(self.prompts, self.params)
            start = time.perf_counter()
            completions = engine.generate(self.prompts, self.params)
            seconds = time.perf_counter() - start
        assert [completion.token_ids for completion in completions] == self.expected, "drafts changed a token"
        return sum(len(ids) for ids in self.expected) / seconds


def budget_of_best(measured: Mapping[int | str, Sequence[float]]) -> float:
    """What the budget reaches of the fixed length that is best; tokens per second of every round, by length."""
    best = max(
        (length for length in measured if length != BUDGET), key=lambda length: statistics.median(measured[length])
    )
    ratios = [budget / other for budget, other in zip(measured[BUDGET], measured[best], strict=True)]
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--drafter")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--warm-up", type=int, default=1, help="generations before the one that counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--acceptances", type=float, nargs="+", default=ACCEPTANCES)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="0 is measured in any case")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runs = Runs(arguments)
    fixed = [0, *(length for length in arguments.lengths if length != 0)]
    lengths: list[int | str] = [*fixed, BUDGET]
    print("acceptance  " + "".join(f"{length:>8}" for length in fixed) + "    auto  budget")
    curve = {}
    for acceptance in arguments.acceptances:
        measured: dict[int | str, list[float]] = defaultdict(list)
        for _ in range(arguments.rounds):
            for length in lengths:
                measured[length].append(runs.speed(acceptance, length))
        speed = {length: statistics.median(values) for length, values in measured.items()}
        share = budget_of_best(measured)
        plain = speed[0]
        columns = "".join(f"{speed[length] / plain:8.2f}" for length in lengths)
        print(f"{acceptance:10.2f}  {columns}  {share:6.1%}", flush=True)
        curve[acceptance] = {"tokens_per_second": speed, "budget_of_best": share}
    if arguments.json:
        settings = {key: value for key, value in vars(arguments).items() if key != "json"}
        arguments.json.write_text(json.dumps({"machine": machine(), "settings": settings, "curve": curve}, indent=2))


if __name__ == "__main__":
    main()

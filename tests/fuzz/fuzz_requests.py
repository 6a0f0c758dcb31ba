"""Fuzzes requests: whatever the fields of SamplingParams hold, a completion, a RequestError or QueueFull.

python tests/fuzz/fuzz_requests.py --seconds 30
python tests/fuzz/fuzz_requests.py --runs 2000 --seed 7
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "loading"))

from draftwerk import Engine, QueueFull, RequestError, SamplingParams

FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
# A request that is served has to end within this, or the engine hangs.
_PATIENCE = 60.0

_INTEGERS = [0, 1, -1, 2, 5, 64, 65, 127, 128, 129, 2**31 - 1, 2**31, -(2**31), 2**63, 2**64 - 1, 2**64, 10**30]
_FLOATS = [0.0, -0.0, 1.0, 0.5, 0.001, 1e-30, 5e-324, 1e38, 1e39, 1e308, -1e308, float("inf"), -float("inf")]
_FLOATS += [float("nan"), 2.0, -2.0, 100.0]
_TEXTS = ["", "a", "the", " ", "\0", "\ud800", "▁", "🙂", "x" * 5000, "<end_of_turn>"]
_OTHERS = [None, True, False, b"bytes", [], {}, (), object(), [[]], {"a": 1}, {1: None}, [None], 1j, "7", int]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type, hostile ones included."""
    kind = rng.randrange(7 if depth < 2 else 4)
    if kind == 0:
        return rng.choice(_INTEGERS)
    if kind == 1:
        return rng.choice(_FLOATS)
    if kind == 2:
        return rng.choice(_TEXTS)
    if kind == 3:
        return rng.choice(_OTHERS)
    if kind == 4:
        return [any_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 3, 200]))]
    if kind == 5:
        return {rng.choice(_INTEGERS): any_value(rng, depth + 1) for _ in range(rng.choice([1, 3, 50]))}
    return rng.uniform(-3.0, 3.0)


def sensible_value(rng: random.Random, name: str, vocabulary: int) -> Any:
    """A value that the field may well accept."""
    token = rng.randrange(vocabulary)
    return {
        "max_tokens": rng.randint(1, 12),
        "min_tokens": rng.randint(0, 4),
        "temperature": rng.choice([0.0, 0.7, 1.0, 100.0]),
        "top_k": rng.choice([0, 1, 5, vocabulary + 1]),
        "top_p": rng.choice([1.0, 0.9, 1e-6]),
        "min_p": rng.choice([0.0, 0.1, 1.0]),
        "repetition_penalty": rng.choice([1.0, 0.5, 1.5]),
        "presence_penalty": rng.uniform(-2.0, 2.0),
        "frequency_penalty": rng.uniform(-2.0, 2.0),
        "logit_bias": {token: rng.choice([-100.0, 3.0, 100.0])},
        "seed": rng.randrange(2**64),
        "logprobs": rng.choice([None, 0, 3]),
        "stop": rng.choice([(), ("a",), ("the", " world")]),
        "stop_token_ids": [token],
        "ignore_eos": rng.random() < 0.5,
        "drafting": rng.random() < 0.5,
        "max_draft_length": rng.choice([None, 0, 4]),
        "salt": rng.choice(["", "tenant"]),
        "special_tokens": rng.random() < 0.5,
    }[name]


def random_request(rng: random.Random, vocabulary: int) -> tuple[Any, SamplingParams]:
    """A prompt and parameters: some fields sensible, up to three hostile."""
    fields = {name: sensible_value(rng, name, vocabulary) for name in rng.sample(FIELDS, rng.randint(0, 6))}
    fields.setdefault("max_tokens", 8)
    prompt: Any = [rng.randrange(vocabulary) for _ in range(rng.randint(1, 20))]
    for name in rng.sample((*FIELDS, "prompt"), rng.randint(0, 3)):
        if name == "prompt":
            prompt = [rng.choice(_INTEGERS) for _ in range(rng.choice([0, 1, 3, 500]))]
        else:
            fields[name] = any_value(rng)
    return prompt, SamplingParams(**fields)


def check(engine: Engine, prompt: Any, params: SamplingParams) -> bool:
    """Submits one request and waits for its end; whether it was served.

    Raises:
        anything but RequestError and QueueFull: that is what is looked for.
    """
    try:
        completion = engine.submit(prompt, params).result(timeout=_PATIENCE)
    except (RequestError, QueueFull) as error:
        assert str(error)
        return False
    assert completion.finish_reason in ("stop", "length"), completion
    assert 1 <= len(completion.token_ids) <= params.max_tokens, completion
    assert all(0 <= token < engine.info.vocab_size for token in completion.token_ids), completion
    return True


def tiny_engine(directory: Path) -> Engine:
    """An engine on a tiny random model, its queue and KV memory small enough to be refused room."""
    import tiny_files as tiny

    path = tiny.TinyGguf().write(directory / "tiny.gguf")
    return Engine(path, threads=1, kv_memory="1MiB", max_queued_tokens=400, max_sequences=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000_000, help="requests to try")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    done = served = 0
    with tempfile.TemporaryDirectory() as directory, tiny_engine(Path(directory)) as engine:
        while done < options.runs and time.monotonic() < deadline:
            seed = options.seed * 1_000_000_007 + done  # one seed for each request: a failure can be repeated alone
            prompt, params = random_request(random.Random(seed), engine.info.vocab_size)
            try:
                served += check(engine, prompt, params)
            except BaseException:
                print(
                    f"request {done} of --seed {options.seed} failed: {prompt!r:.500}, {params!r:.2000}",
                    file=sys.stderr,
                )
                raise
            done += 1
    print(f"{done} requests, {served} of them served, no failure")


if __name__ == "__main__":
    main()

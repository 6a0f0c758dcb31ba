"""Drives a file reader with damaged files: coverage-guided by atheris where it is installed, at random elsewhere."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Lengths, counts and offsets that overflow, wrap or just miss.
_NUMBERS = [0, 1, 2, 8, 9, 13, 31, 32, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40]
_NUMBERS += [(1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 33, (1 << 64) - 1]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four pieces overwritten, inserted, removed, repeated or cut off; mostly near the start."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = int(len(out) * rng.random() ** 3)
        length = rng.randint(1, 16)
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + 8] = rng.choice(_NUMBERS).to_bytes(8, "little")
        elif kind == 1:
            out[at : at + 4] = (rng.choice(_NUMBERS) & 0xFFFF_FFFF).to_bytes(4, "little")
        elif kind == 2 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 3:
            out[at:at] = rng.randbytes(length)
        elif kind == 4:
            del out[at : at + length]
        elif kind == 5:
            out[at : at + length] = out[at // 2 : at // 2 + length]
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def fuzz(check: Callable[[Path], None], seeds: Callable[[], list[bytes]], suffix: str, description: str) -> None:
    """Runs ``check`` on damaged forms of the seeds until ``--runs`` or ``--seconds`` are used up; ends the process.

    The file that made ``check`` fail is kept and named.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000_000, help="files to try")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to spend")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    parser.add_argument("--engine", choices=["auto", "atheris", "random"], default="auto")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        if options.engine == "atheris":
            parser.error("atheris is not installed")
        atheris = None

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"input{suffix}"

        def run_one(data: bytes) -> None:
            path.write_bytes(data)
            try:
                check(path)
            except BaseException:
                kept = Path(tempfile.gettempdir()) / f"fuzz-failure-{abs(hash(data)):x}{suffix}"
                kept.write_bytes(data)
                print(f"failed on {kept} ({len(data)} bytes)", file=sys.stderr)
                raise

        if atheris is not None and options.engine != "random":
            with atheris.instrument_imports(include=["draftwerk.loading"]):
                import draftwerk.loading  # noqa: F401 (instrumented here, used by `check`)
            corpus = Path(directory) / "corpus"
            corpus.mkdir()
            for index, seed in enumerate(seeds()):
                (corpus / str(index)).write_bytes(seed)
            limits = [f"-runs={options.runs}", f"-max_total_time={max(1, round(options.seconds))}"]
            limits += [f"-seed={options.seed + 1}", "-max_len=65536", "-print_final_stats=1", "-verbosity=1"]
            atheris.Setup([sys.argv[0], *limits, str(corpus)], run_one, enable_python_coverage=True)
            atheris.Fuzz()  # does not return
        rng = random.Random(options.seed)
        originals = seeds()
        deadline = time.monotonic() + options.seconds
        done = 0
        while done < options.runs and time.monotonic() < deadline:
            run_one(mutated(rng.choice(originals), rng))
            done += 1
        print(f"{done} files, no failure")

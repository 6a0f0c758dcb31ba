"""Runs a GoogleTest program, its tests shared among processes, and ends with one line that counts them.

There are more shares than run at a time, so that no process is left with the long tests at the end.

python tests/run_cpp_tests.py [--processes 2] build/cpp/draftwerk_tests [--gtest_filter=...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHARES_OF_A_PROCESS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("program")
    arguments, of_gtest = parser.parse_known_args()
    program, shares = arguments.program, arguments.processes * SHARES_OF_A_PROCESS
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder) / f"{index}.json" for index in range(shares)]

        def run(share: int) -> int:
            done = subprocess.run(
                [program, "--gtest_brief=1", f"--gtest_output=json:{reports[share]}", *of_gtest],
                env={**os.environ, "GTEST_TOTAL_SHARDS": str(shares), "GTEST_SHARD_INDEX": str(share)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            print(done.stdout, end="", flush=True)
            return done.returncode

        with ThreadPoolExecutor(arguments.processes) as pool:
            codes = list(pool.map(run, range(shares)))
        counted = [json.loads(report.read_text(encoding="utf-8")) for report in reports if report.exists()]
    code = next((code for code in codes if code), 0)
    if len(counted) < shares:
        print(f"{program} ended with {code} before it could report", file=sys.stderr)
        return code or 1
    tests, failed, skipped = (sum(counts) for counts in zip(*map(numbers, counted), strict=True))
    print(f"cpp: {tests - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return code or (1 if tests == 0 else 0)


def numbers(report: dict[str, Any]) -> tuple[int, int, int]:
    """Tests of a report, and how many of them failed or were skipped."""
    skipped = sum(test.get("result") == "SKIPPED" for suite in report["testsuites"] for test in suite["testsuite"])
    failed: int = report["failures"] + report.get("errors", 0)
    return report["tests"], failed, skipped + report.get("disabled", 0)


if __name__ == "__main__":
    sys.exit(main())

"""Runs a GoogleTest program and ends with one line that counts its tests.

python tests/run_cpp_tests.py build/cpp/draftwerk_tests [--gtest_filter=...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    program, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [program, "--gtest_brief=1", f"--gtest_output=json:{report}", *arguments]
        code = subprocess.run(command, check=False).returncode
        if not report.exists():
            print(f"{program} ended with {code} before it could report", file=sys.stderr)
            return code or 1
        counts = json.loads(report.read_text(encoding="utf-8"))
    failed = counts["failures"] + counts.get("errors", 0)
    skipped = sum(test.get("result") == "SKIPPED" for suite in counts["testsuites"] for test in suite["testsuite"])
    disabled = counts.get("disabled", 0)
    print(f"cpp: {counts['tests'] - failed - skipped - disabled} passed, {failed} failed, {skipped + disabled} skipped")
    return code or (1 if counts["tests"] == 0 else 0)


if __name__ == "__main__":
    sys.exit(main())

"""The examples run as they are and print what they promise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTED = {
    "generate.py": "with the invention of the steam engine in 1800",
    "stream.py": "drafts accepted",
    "many_requests.py": "the same tokens alone and together",
    "asyncio_cancel.py": "cancelled: CancelledError",
    "conversation.py": "prompt tokens computed",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_example(real_model: str, name: str) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert EXPECTED[name] in result.stdout

"""What the scripts of bench/ make of what they measure, and that they measure what they say."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that the test names."""
    pytest.importorskip("draftwerk._core", reason="the native module is not built")
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module(request.param)


def of_script(name: str) -> Any:
    """Runs a test over a script of bench/."""
    return pytest.mark.parametrize("script", [name], indirect=True, ids=[name])


# --- bench/compare_llama_cpp.py -------------------------------------------------------------------------------------


@of_script("compare_llama_cpp")
def test_memory_is_counted_without_the_cache_that_is_in_use(script: ModuleType) -> None:
    kv = {"budget_bytes": 64 << 20, "peak_bytes": 3 << 20}
    assert script.memory_besides_kv({"peak_rss_mb": 295.0, "engine": {"kv": kv}}) == 292.0


@of_script("compare_llama_cpp")
def test_the_end_of_a_process_is_not_in_the_time_to_its_first_token(script: ModuleType) -> None:
    def seconds(text: str) -> float:
        found: float = script.seconds_to_first_output([sys.executable, "-S", "-c", text])
        return found

    assert seconds("import time; print('a', flush=True); time.sleep(0.5); print('b')") < 0.5
    assert seconds("import time; time.sleep(0.5); print('a')") >= 0.5
    with pytest.raises(subprocess.CalledProcessError):
        seconds("print('a', flush=True); raise SystemExit(1)")

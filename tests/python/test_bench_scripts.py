"""What the scripts of bench/ make of what they measure, and that they measure what they say."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tiny_gemma4

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


@pytest.fixture
def model_with_drafter(tmp_path: Path) -> str:
    """A tiny model and, beside it, its drafter."""
    model = tiny_gemma4.dense_k_eq_v(seed=1)
    tiny_gemma4.save(tiny_gemma4.assistant_for(model), tmp_path / "model-assistant")
    return str(tiny_gemma4.save(model, tmp_path / "model"))


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


@of_script("compare_llama_cpp")
def test_each_row_of_drafts_has_the_drafters_of_its_name(script: ModuleType, model_with_drafter: str) -> None:
    with script.engines(Namespace(model=model_with_drafter, threads=1)) as opened:
        drafters = {name: engine.info.drafter for name, engine in opened.items()}
    assert drafters == {"lookup": "lookup", "auto": "mtp+lookup"}
    rows = {row.title: (row.ours, row.baseline) for row in script.ROWS}
    assert rows["lookup against none, text that repeats"] == ("lookup, repeating", "none, repeating")
    assert rows["default drafters against none, text that repeats"] == ("auto, repeating", "none, repeating")


# --- bench/service_overhead.py --------------------------------------------------------------------------------------


@of_script("service_overhead")
def test_engine_and_server_draft_with_what_they_are_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    command = script.serve_command(Namespace(model="tiny", threads=1), "lookup", "127.0.0.1:1")
    assert command[command.index("--drafter") + 1] == "lookup"

    class Opened(Exception):
        pass

    def engine(model: str, *, drafter: str, **_: Any) -> None:
        raise Opened(model, drafter)

    monkeypatch.setattr(script, "Engine", engine)
    with pytest.raises(Opened) as opened:
        script.serve_engine(Pipe()[1], "tiny", 1, "lookup")
    assert opened.value.args == ("tiny", "lookup")


@of_script("service_overhead")
def test_each_row_is_measured_with_its_drafter(script: ModuleType) -> None:
    asked = []

    def side(drafter: str) -> Callable[..., Any]:
        def run(prompts: Any, streams: int, params: dict[str, Any]) -> Any:
            asked.append((drafter, params["drafting"]))
            return script.Run(1.0 + len(asked), [], "the same")

        return run

    sides = {drafter: {"in process": side(drafter), "service": side(drafter)} for drafter in ("lookup", "auto")}
    found = script.speeds(sides, [(None, [2])] * 8, 4, 0)
    of_rows = {"none": ("auto", False), "lookup": ("lookup", True), "auto": ("auto", True)}
    assert asked == [of_rows[name.rsplit(", ", 1)[1]] for name in found]
    assert {name.rsplit(", ", 1)[1] for name in found} == set(of_rows)

"""What the scripts of bench/ make of what they measure, and that they measure what they say."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from multiprocessing import Pipe
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
import tiny_files

import tiny_gemma4

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that the test names."""
    pytest.importorskip("draftwerk._core", reason="the native module is not built")
    monkeypatch.syspath_prepend(str(BENCH))
    return import_module(request.param)


def of_script(name: str) -> pytest.MarkDecorator:
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


# --- bench/service_load.py ------------------------------------------------------------------------------------------


class Streams:
    """A server of streams that all go at one pace, of a token each millisecond.

    Attributes:
        beside: how many others were open, at every read of a steady one.
    """

    def __init__(self, steady: list[Any]) -> None:
        self._steady = [id(request) for request in steady]
        self._open: set[Stream] = set()
        self.beside: list[int] = []
        self.cancelled = 0
        self.late = 0

    def Generate(self, request: Any, timeout: float | None = None) -> Stream:  # noqa: N802
        return Stream(self, request, timeout)

    def opened(self, stream: Stream) -> None:
        self._open.add(stream)

    def closed(self, stream: Stream) -> None:
        self._open.discard(stream)

    def read(self, stream: Stream) -> None:
        if id(stream.request) in self._steady:
            self.beside.append(sum(id(other.request) not in self._steady for other in self._open))


class Stream:
    """One of them."""

    def __init__(self, server: Streams, request: Any, timeout: float | None) -> None:
        self.request = request
        self._server = server
        self._left = request.stop.max_tokens
        self._reads_left = None if timeout is None else round(timeout * 1e3)
        server.opened(self)

    async def read(self) -> Any:
        self._server.read(self)
        await asyncio.sleep(0.001)
        if self._reads_left == 0:
            self._server.late += 1
            self._server.closed(self)
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED, nothing, nothing)
        if self._left == 0:
            self._server.closed(self)
            return grpc.aio.EOF
        self._left -= 1
        self._reads_left = None if self._reads_left is None else self._reads_left - 1
        return Namespace(token_ids=[7])

    def cancel(self) -> None:
        self._server.cancelled += 1
        self._server.closed(self)


@of_script("service_load")
async def test_as_many_streams_misbehave_as_behave_at_any_time(script: ModuleType) -> None:
    load = script.Load("127.0.0.1:1", [(None, [2, number]) for number in range(64)], 64)

    def server() -> Streams:
        load._stub = load._stalling = Streams(load.steady)
        found: Streams = load._stub
        return found

    server()
    await load.run_steady()
    load.pace = 1e3
    behaving = server()
    await load.beside_behaving(3)
    misbehaving = server()
    await load.beside_misbehaving(3)
    for streams in (behaving, misbehaving):
        assert len(streams.beside) == 40 * 65
        assert set(streams.beside) == {24}
    assert behaving.cancelled == behaving.late == 0
    assert misbehaving.cancelled > 8
    assert misbehaving.late > 8


@of_script("service_load")
async def test_no_part_of_a_round_is_always_the_first(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Load:
        stalled: tuple[()] = ()

        def __init__(self, *_: Any) -> None:
            self.parts: list[str] = []
            loads.append(self)

        async def run_steady(self) -> float:
            self.parts.append("steady")
            return 1.0

        async def beside_behaving(self, number: int) -> float:
            self.parts.append("behaving")
            return 1.0

        async def beside_misbehaving(self, number: int) -> tuple[float, list[Any]]:
            self.parts.append("misbehaving")
            return 1.0, []

        async def stats(self) -> Any:
            cache = Namespace(peak_bytes=0, used_bytes=0, reclaimable_bytes=0)
            return Namespace(resident_bytes=0, cache=cache)

        async def wait_for(self, **_: int) -> Any:
            return await self.stats()

    loads: list[Load] = []
    monkeypatch.setattr(script, "Load", Load)
    measured = await script.measure(Namespace(max_tokens=64, rounds=2), "127.0.0.1:1", [])
    assert {name: len(values) for name, values in measured.items()} == dict.fromkeys(
        ("alone", "beside 24", "beside the 24", "after the 24", "growth"), 2
    )
    first = ["steady", "behaving", "misbehaving", "steady"]
    assert loads[0].parts[2:] == [*first, "misbehaving", "steady", "behaving", "steady"]


# --- bench/kl_divergence.py -----------------------------------------------------------------------------------------


@of_script("kl_divergence")
def test_a_standard_error_is_that_of_windows(script: ModuleType) -> None:
    comparison = script.Comparison("one", 4)
    reference = np.log(np.array([0.5, 0.5]))
    for of_window in (0.1, 0.2, 0.3, 0.4):
        for _ in range(100):  # as neighbours that say the same a hundred times
            comparison.add(reference, reference - of_window, 0)
    result = comparison.result()
    assert result.mean_kl == pytest.approx(0.25)
    assert result.standard_error == pytest.approx(np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2)


SUPPORTED = {"general.architecture": "gemma3", "gemma3.block_count": 18, "gemma3.attention.key_length": 256}


@of_script("kl_divergence")
def test_the_reference_refuses_what_it_does_not_compute(script: ModuleType) -> None:
    script.refuse_others(Path("a.gguf"), SUPPORTED | {"gemma3.rope.scaling.type": "none"})
    for changes, said in (
        ({"general.architecture": "gemma4"}, "an architecture other than gemma3"),
        ({"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}, "RoPE scaling"),
        ({"gemma3.rope.freq_base_swa": 20_000.0}, "RoPE base"),
        ({"gemma3.attention.value_length": 128}, "values of another length"),
        ({"gemma3.attention.sliding_window_pattern": 5}, "every sixth"),
        ({"gemma3.final_logit_softcapping": 30.0}, "soft-capped"),
        ({"gemma3.block_count": 62}, "scale of attention"),
    ):
        with pytest.raises(ValueError, match=rf"a\.gguf: has .*{said}.*"):
            script.refuse_others(Path("a.gguf"), SUPPORTED | changes)


@of_script("kl_divergence")
def test_a_model_with_rope_scaling_has_no_reference(script: ModuleType, tmp_path: Path) -> None:
    scaled = tiny_files.TinyGguf(
        gemma3__rope__scaling__type=(tiny_files.STRING, "linear"), gemma3__rope__scaling__factor=(tiny_files.F32, 8.0)
    )
    with pytest.raises(ValueError, match="RoPE scaling"):
        script.reference_model(scaled.write(tmp_path / "scaled.gguf"))


# --- bench/acceptance_curve.py --------------------------------------------------------------------------------------


@of_script("acceptance_curve")
def test_the_budget_is_held_against_the_length_that_is_best_over_all_rounds(script: ModuleType) -> None:
    measured = {0: [100.0, 100.0, 180.0], 2: [150.0, 150.0, 150.0], script.BUDGET: [147.0, 150.0, 153.0]}
    assert script.budget_of_best(measured) == 1.0


@of_script("acceptance_curve")
def test_speed_up_is_relative_to_no_drafts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {0: 100.0, 2: 150.0, 4: 200.0, script.BUDGET: 210.0}
    monkeypatch.setattr(script, "Runs", lambda _: Namespace(speed=lambda _, length: speeds[length]))
    monkeypatch.setattr(sys, "argv", "acceptance_curve.py --acceptances 0.5 --lengths 4 2".split())
    script.main()
    titles, figures = capsys.readouterr().out.splitlines()
    assert titles.split() == ["acceptance", "0", "4", "2", "auto", "budget"]
    assert figures.split() == ["0.50", "1.00", "2.00", "1.50", "2.10", "105.0%"]

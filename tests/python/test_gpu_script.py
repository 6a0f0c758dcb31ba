"""How bench/gpu.sh goes on whatever fails, over programs that only pretend; what its measurements give on small models,
on the processor; and what bench/gpu_profile.py makes of what profilers say."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"

PRETENDED = {
    "cmake": """
case "$*" in
  *--build*)
    mkdir -p build/gpu service/draftwerk
    touch build/gpu/_core.so
    for name in arithmetic_tests tests kernel_tests; do
      printf '#!/bin/sh\\nseq 1 40\\nexit 3\\n' >build/gpu/draftwerk_gpu_$name
      chmod +x build/gpu/draftwerk_gpu_$name
    done ;;
esac
""",
    "nvidia-smi": "echo 9.0",
    "ncu": "exec sleep 20",
    "compute-sanitizer": "exit 9",
    "python3": f'exec {sys.executable} "$@"',
}


# Of a test program: what GoogleTest lists, and what it says of a suite.
SUITES = """#!/bin/bash
if [[ $* == *--gtest_list_tests* ]]; then
  printf 'Running main() from gtest_main.cc\\nFirst.\\n  Test\\nAll/Second.  # of types\\n  Test/0\\nThird.\\n  Test\\n'
else
  echo "$*"
  [[ $* != *All/Second.* ]]
fi
"""


class Script:
    """bench/gpu.sh in a tree of its own.

    Attributes:
        out: where its results go.
        programs: where pretended programs and modules lie.
        googletest: what says that GoogleTest is there.
    """

    def __init__(self, directory: Path) -> None:
        self.out = directory / "out"
        self._tree = directory / "tree"
        (self._tree / "bench").mkdir(parents=True)
        shutil.copy(BENCH / "gpu.sh", self._tree / "bench")
        self.programs = directory / "programs"
        self.programs.mkdir()
        for name, text in PRETENDED.items():
            self.program(name, text)
        self.module("torch", "")
        self.python("random_gemma4", "print('written')")
        self.python("gpu_passes", "import sys; print('passed', sys.argv[1])")
        self.python("gpu_profile", "print('profiled')")
        self.python("compare_transformers", "print('compared')")
        self.googletest = self._tree / "build/gpu/venv/src/gtest_vendor/src/gtest-all.cc"
        self.googletest.parent.mkdir(parents=True)
        self.googletest.touch()

    def program(self, name: str, text: str) -> None:
        """Pretends to be an executable."""
        path = self.programs / name
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def module(self, name: str, text: str) -> None:
        """Pretends to be an installed module."""
        (self.programs / f"{name}.py").write_text(text)

    def test_program(self, name: str, text: str) -> None:
        """Pretends to be the tests of a name, once they are built."""
        (self.programs / f"draftwerk_gpu_{name}").write_text(text)
        copied = f"cp {self.programs}/draftwerk_gpu_* build/gpu\n    chmod +x build/gpu/draftwerk_gpu_* ;;\n"
        self.program("cmake", PRETENDED["cmake"].replace("    done ;;\n", f"    done\n    {copied}"))

    def edit(self, old: str, new: str) -> None:
        """Changes the script."""
        path = self._tree / "bench" / "gpu.sh"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def python(self, name: str, text: str) -> None:
        """Pretends to be one of bench/."""
        (self._tree / "bench" / f"{name}.py").write_text(text)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The script from beginning to end."""
        path = f"{self.programs}:{os.environ['PATH']}"
        return subprocess.run(
            [self._tree / "bench" / "gpu.sh", *arguments, self.out],
            env={**os.environ, "PATH": path, "PYTHONPATH": str(self.programs)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def stages(self) -> dict[str, str]:
        """How each ended."""
        lines = (self.out / "stages.txt").read_text().splitlines()
        return {name: re.sub(r", \d+ s.*", "", ended) for name, _, ended in (line.partition(": ") for line in lines)}

    def archived(self, name: str) -> str:
        """A file of the archive."""
        with tarfile.open(self.out / "gpu.tar.gz") as archive:
            file = archive.extractfile(name)
            assert file is not None
            return file.read().decode()


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_what_fails_is_said_and_the_rest_goes_on(script: Script) -> None:
    result = script.run("--only", "arithmetic tests passes-E2B memcheck transformers losses")
    assert result.returncode == 1
    assert script.stages() == {
        "configure": "passed",
        "build": "passed",
        "arithmetic": "failed, status 3",
        "tests": "failed, status 3",
        "tests-ordered": "failed, status 3",
        "tests-single": "failed, status 3",
        "passes-E2B": "passed",
        "weights": "passed",
        "transformers": "passed",
        "memcheck": "failed, status 9",
    }
    tail = [f"  | {number}" for number in range(21, 41)]
    at = result.stdout.splitlines().index("tests-single: failed, status 3, 0 s")
    assert result.stdout.splitlines()[at + 1 : at + 22] == [*tail, "passes-E2B: passed, 0 s"], "the end of its log"
    assert "\npassed E2B\n" in result.stdout
    assert sorted(path.name for path in script.out.iterdir()) == ["gpu.tar.gz", "stages.txt"]
    assert script.archived("logs/tests.log").split() == [str(number) for number in range(1, 41)]


def test_a_stage_finds_those_before_it_in_the_archive(script: Script) -> None:
    script.program("ncu", f"tar -tzf {script.out}/gpu.tar.gz; echo launches $DRAFTWERK_CUDA_LAUNCHES")
    script.edit("tested arithmetic 15", "tested arithmetic 999")
    result = script.run("--seconds", "200", "--only", "arithmetic tests ncu")
    assert script.stages() == {
        "configure": "passed",
        "build": "passed",
        "arithmetic": "not started",
        "tests": "failed, status 3",
        "tests-ordered": "failed, status 3",
        "tests-single": "failed, status 3",
        "ncu": "passed",
    }
    assert {"logs/build.log", "logs/tests.log", "single"} <= set(script.archived("logs/ncu.log").split())
    assert result.returncode == 1


def test_without_time_there_is_no_build(script: Script) -> None:
    result = script.run("--seconds", "6")
    assert result.returncode == 1
    assert script.stages() == {"configure": "not started"}


def test_a_stage_is_ended_with_its_time(script: Script) -> None:
    script.program("cmake", "echo configuring; exec sleep 20")
    script.edit("run configure 60", "run configure 1")
    result = script.run()
    assert script.stages() == {"configure": "timed out"}
    assert "  | configuring" in result.stdout
    assert result.returncode == 1


def test_a_missing_package_is_named(script: Script) -> None:
    script.module("torch", "raise ImportError('no torch here')")
    result = script.run()
    assert result.returncode == 1
    assert result.stdout.endswith("has no torch\n")


def test_tests_that_do_not_compile_leave_the_rest(script: Script) -> None:
    script.program("cmake", PRETENDED["cmake"] + "[[ $* != *gpu_tests* ]]")
    script.run("--only", "passes-E2B")
    assert script.stages() == {
        "configure": "passed",
        "build": "failed, status 1",
        "library": "passed",
        "passes-E2B": "passed",
    }


def test_without_googletest_speed_is_measured(script: Script) -> None:
    script.googletest.unlink()
    script.program("cmake", "echo $* >>$(dirname $0)/cmake.txt" + PRETENDED["cmake"])
    result = script.run("--only", "arithmetic tests passes-E2B kernels memcheck")
    assert result.returncode == 1
    assert script.stages() == {
        "C++ tests": "left out, there is no ros-gtest-vendor among the wheels",
        "configure": "passed",
        "build": "passed",
        "passes-E2B": "passed",
    }
    configured, built = (script.programs / "cmake.txt").read_text().splitlines()
    assert "-DDRAFTWERK_BUILD_TESTS=OFF" in configured
    assert "gpu_tests" not in built


@pytest.mark.parametrize("passing", ["ordered", "single"])
def test_all_goes_on_with_launches_that_pass_the_tests(script: Script, passing: str) -> None:
    script.test_program("tests", f'#!/bin/sh\n[ "$DRAFTWERK_CUDA_LAUNCHES" = {passing} ]\n')
    script.python("gpu_passes", "import os; print('launches', os.environ.get('DRAFTWERK_CUDA_LAUNCHES'))")
    script.program("compute-sanitizer", "echo $DRAFTWERK_CUDA_LAUNCHES $*")
    result = script.run("--only", "tests passes-E2B synccheck memcheck-graphs")
    assert result.returncode == 1
    assert script.stages() == {
        "configure": "passed",
        "build": "passed",
        "tests": "failed, status 1",
        "tests-ordered": "passed" if passing == "ordered" else "failed, status 1",
        **({"tests-single": "passed"} if passing == "single" else {}),
        "launches": f"{passing} from here on",
        "passes-E2B": "passed",
        "synccheck": "passed",
        **({"memcheck-graphs": "passed"} if passing == "ordered" else {}),
    }
    assert f"\nlaunches {passing}\n" in result.stdout
    assert script.archived("logs/synccheck.log").startswith("single --tool synccheck ")


@pytest.mark.parametrize("passing", ["early", "ordered"])
def test_what_hangs_is_told_from_what_is_slow_by_a_few_tests(script: Script, passing: str) -> None:
    program = f"""#!/bin/bash
[[ $* == *MtpDrafter* ]] || exec sleep 20
echo "$DRAFTWERK_CUDA_LAUNCHES"
[[ $DRAFTWERK_CUDA_LAUNCHES == {passing} ]]
"""
    script.test_program("tests", program)
    script.edit("tested tests 60", "tested tests 1")
    script.run("--only", "tests ordered-E2B")
    assert script.stages() == {
        "configure": "passed",
        "build": "passed",
        "tests": "timed out",
        "tests-early": "passed" if passing == "early" else "failed, status 1",
        **({"ordered-E2B": "passed"} if passing == "early" else {}),
        **({"tests-ordered": "passed", "launches": "ordered from here on"} if passing == "ordered" else {}),
    }
    assert script.archived("logs/tests-early.log") == "early\n"


def test_somebody_is_at_the_gpu_until_the_end(script: Script) -> None:
    watching, ended = script.programs / "watching", script.programs / "ended"
    watch = f"touch {watching}; trap 'touch {ended}; exit' TERM; for _ in {{1..300}}; do sleep 0.1; done"
    script.program("nvidia-smi", f"[[ $1 == dmon ]] || exec echo 9.0; {watch}")
    script.python("gpu_passes", f"import os; print(os.listdir({str(script.programs)!r}))")
    script.run("--only", "passes-E2B")
    during = script.archived("logs/passes-E2B.log")
    assert "'watching'" in during
    assert "'ended'" not in during
    deadline = time.monotonic() + 10
    while not ended.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_suite_of_kernels_has_a_process(script: Script) -> None:
    script.test_program("kernel_tests", SUITES)
    script.run("--only", "kernels")
    assert script.stages()["kernels"] == "failed, status 1"
    assert script.archived("logs/kernels.log").splitlines() == [
        f"--gtest_filter={suite}.*" for suite in ("First", "All/Second", "Third")
    ]
    script.test_program("kernel_tests", "#!/bin/sh\n")
    script.run("--only", "kernels")
    assert script.stages()["kernels"] == "failed, status 1", "no tests are not all that there should be"


def test_sanitizers_run_tests_that_there_are() -> None:
    filters = "".join(re.findall(r"tiny\+?='(.*)'", (BENCH / "gpu.sh").read_text())).split(":")
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "cpp").glob("*_test.cc"))
    variant = re.compile(r"\*Gemma4Promise\*/([a-z]+)_(f32|q8_0)_(\w+)_(\d+)_clusters_of_(\d+)")
    for pattern in filters:
        if named := variant.fullmatch(pattern):
            kind, _, drafters, clusters, vocabulary = named.groups()
            assert f"Kind::{kind}" in sources
            assert f'Variant{{"{drafters}", {clusters}, {vocabulary}, ' in sources, pattern
        else:
            assert (
                f"TEST({pattern.replace('.', ', ')})" in sources or f"TEST_F({pattern.replace('.', ', ')})" in sources
            )
    assert len(filters) == 4


def test_parity_is_that_of_the_emulated_device() -> None:
    listed = re.search(r"CUDA_PYTHON_TESTS := .*?\n\n", (ROOT / "Makefile").read_text(), re.DOTALL)
    assert listed is not None
    stage = re.search(r"stage parity .*?\n[^ ]", (BENCH / "gpu.sh").read_text(), re.DOTALL)
    assert stage is not None
    assert set(re.findall(r"test_\w+\.py", stage[0])) == set(re.findall(r"test_\w+\.py", listed[0]))


# --- bench/gpu_passes.py --------------------------------------------------------------------------------------------

SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "full_every": 2,
}
SMALL_MODELS = {
    "of E2B's kind": {**SMALL, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 8192},
    "of 26B-A4B's kind": {
        **SMALL,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("draftwerk._core", reason="the native module is not built")
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_passes
    import random_gemma4

    monkeypatch.setattr(random_gemma4, "VOCABULARY", 8192)
    monkeypatch.setitem(random_gemma4._SHARED, "vocab_size", 8192)
    monkeypatch.setattr(random_gemma4, "_CHUNK", 1 << 18)
    monkeypatch.setattr(random_gemma4, "TARGETS", SMALL_MODELS)
    for name, value in {
        "ROWS": (1, 4),
        "PREFILL": 128,
        "PREFILL_CHUNK": 128,
        "STREAMS": (1, 2),
        "DECODED": 100,
        "KV_MEMORY": 16 << 20,
        "_NUMBERS": 1 << 18,
        "prompts_of": lambda streams, context: [[2, *range(i, context)] for i in range(1, streams + 1)],
    }.items():
        monkeypatch.setattr(gpu_passes, name, value)
    return gpu_passes


@pytest.mark.parametrize("size", SMALL_MODELS)
def test_everything_is_measured(passes: Any, size: str) -> None:
    figures: dict[str, Any] = {}
    for part in passes.measure(size, "auto", None, context=8, rounds=1):
        figures.update(part)
    assert set(figures["pass_ms"]) == {1, 4}
    assert figures["prefill_ms"] > 0
    assert set(figures["decoding"]) == {1, 2}
    for of in figures["decoding"].values():
        assert of["none"]["tokens_per_step"] == pytest.approx(1, abs=0.1)
        assert 2 < of["drafted"]["tokens_per_step"] < 7
        assert of["drafted"]["tokens_per_second"] > 0
    earlier = json.loads(json.dumps(figures))
    assert passes.other_texts(figures, earlier) == []
    earlier["decoding"]["2"]["none"]["text_sha256"] = "another"
    assert passes.other_texts(figures, earlier) == ["2"]
    line = passes.summary(figures, 1e9, 1e9)
    assert "of the copy's speed" in line
    assert "2 streams" in line


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_experts_that_are_not_chosen_are_not_among_the_bytes_read(
    passes: Any, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = "of 26B-A4B's kind"
    few = passes.load(size, weights, None)[0].weight_bytes
    values = passes.target_config(size)
    monkeypatch.setitem(SMALL_MODELS[size], "num_experts", 16)  # of which as many are chosen
    many = passes.load(size, weights, None)[0].weight_bytes
    more = passes.target_config(size)
    scales = 4 * 8 * 4  # of 8 experts more in 4 layers; routers have 16 rows in any case
    assert passes.bytes_read(more, weights, many) - passes.bytes_read(values, weights, few) == pytest.approx(scales)
    dense = "of E2B's kind"
    assert passes.bytes_read(passes.target_config(dense), weights, 1000) == 1000


def test_too_little_memory_for_all_streams_is_no_measurement(passes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KV_MEMORY", 1400 << 10)
    with pytest.raises(RuntimeError, match="gave way to another: too little memory"):
        list(passes.measure("of E2B's kind", "auto", None, context=60, rounds=1))


# --- bench/gpu_profile.py -------------------------------------------------------------------------------------------


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("draftwerk._core", reason="the native module is not built")
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_profile

    return gpu_profile


def trace(steps: Callable[[], list[tuple[str, float, float]]], count: int) -> dict[str, Any]:
    """(name, microseconds idle before, microseconds) one after the other, as torch's profiler exports them."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]
    now = 1000.0
    for _ in range(count):
        for name, idle, duration in steps():
            now += idle
            category = "gpu_memcpy" if name.startswith("Memcpy") else "kernel"
            events.append({"ph": "X", "cat": category, "name": name, "ts": now, "dur": duration})
            now += duration
    return {"traceEvents": events}


def test_idle_time_and_kernels_of_a_step(profile: Any) -> None:
    def step() -> list[tuple[str, float, float]]:
        return [
            ("Memcpy HtoD (Pinned -> Device)", 20, 1),
            ("void draftwerk::cuda::(anonymous namespace)::multiply<8, true>(draftwerk::cuda::Product)", 0, 50),
            ("void draftwerk::cuda::(anonymous namespace)::multiply<8, true>(draftwerk::cuda::Product)", 2, 50),
            ("attend(draftwerk::cuda::Span)", -10, 30),  # ends 20 after the product that it overlaps
            ("Memcpy DtoH (Device -> Pinned)", 0, 1),
            ("Memcpy DtoH (Device -> Pinned)", 0, 1),
        ]

    figures = profile.figures_of(profile.activities(trace(step, 8)), steps=8)
    assert figures["steps"] == 4
    assert figures["step_us"] == pytest.approx(145)
    assert figures["idle_us"] == {"after results": pytest.approx(20), "between launches": pytest.approx(2)}
    assert figures["gap_after_results_us"] == {kind: pytest.approx(20) for kind in ("median", "p90", "most")}
    assert list(figures["kernels"]) == [
        "multiply<8, true>",
        "attend",
        "Memcpy DtoH",
        "Memcpy HtoD",
    ]
    assert figures["kernels"]["multiply<8, true>"] == {"launches": pytest.approx(2), "us": pytest.approx(100)}
    assert figures["kernels"]["attend"]["us"] == pytest.approx(20)


def test_a_drafter_brings_results_of_its_own(profile: Any) -> None:
    def step() -> list[tuple[str, float, float]]:
        result = ("Memcpy DtoH (Device -> Pinned)", 0.0, 1.0)
        return [("draft", 30, 10), result, ("target", 0, 58), result]

    figures = profile.figures_of(profile.activities(trace(step, 6)), steps=6)
    assert (figures["steps"], figures["step_us"]) == (3, pytest.approx(100))
    assert figures["idle_us"]["after results"] == pytest.approx(30)


def test_a_trace_without_results_is_refused(profile: Any) -> None:
    with pytest.raises(ValueError, match="no copy of results"):
        profile.figures_of(profile.activities(trace(lambda: [("target", 0, 1)], 3)), steps=3)


TABLE = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","12","void multiply<8>(Product)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","75.00"
"0","12","void multiply<8>(Product)","gpu__time_duration.sum","ns","40,000"
"1","12","attend(Span)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","10"
"1","12","attend(Span)","gpu__time_duration.sum","ns","20,000"
"2","12","void multiply<8>(Product)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","85"
"2","12","void multiply<8>(Product)","gpu__time_duration.sum","ns","20,000"
"3","12","attend(Span)","gpu__time_duration.sum","ns","20,000"
"""


def test_the_kernel_that_loses_most_comes_first(profile: Any) -> None:
    found = profile.losses(TABLE.splitlines(keepends=True))
    assert [one["kernel"] for one in found] == ["attend", "multiply<8>"]
    assert found[0] == {"kernel": "attend", "launches": 1, "us": pytest.approx(20), "lost_us": pytest.approx(18)}
    assert found[1] == {"kernel": "multiply<8>", "launches": 2, "us": pytest.approx(60), "lost_us": pytest.approx(13)}
    with pytest.raises(ValueError, match="no table"):
        profile.losses(["==ERROR== nothing\n"])

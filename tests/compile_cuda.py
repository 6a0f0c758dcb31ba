"""Builds the wheel of the CUDA backend with nvcc, sees whether the core takes it, and looks at what ptxas says of its
kernels: one that has in local memory what should be in registers is slow. Compiles what only a GPU's tests have
(bench/gpu.sh) as well, without linking it: the rest of them is compiled for the processor anyway.

    python tests/compile_cuda.py build/cuda --architectures 80-real 90a-real

Needs no GPU. Without nvcc (on the PATH or in /usr/local/cuda) there is nothing to do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Bytes of stack that registers are known to be spilled to, by architecture and part of a kernel's name: of attention
# with heads of 512 over float16, on an architecture that it is not tuned for.
ALLOWED = {("sm_80", "attend_spansILi512ELi1EtEE"): 156}

# Of the GPU's tests; what they say of C++ is the same on all.
TESTS_ARCHITECTURE = "90a-real"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--architectures", nargs="+", default=["80-real", "90a-real", "90-virtual"])
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        print("nvcc is not there: the CUDA backend is not compiled", file=sys.stderr)
        return 0
    try:
        return compile_all(arguments.directory.resolve(), arguments.architectures, nvcc)
    except subprocess.CalledProcessError as error:
        print(error.stdout)
        return int(error.returncode)


def compile_all(directory: Path, architectures: list[str], nvcc: str) -> int:
    """Compiles everything to a directory; 0 if it is as it should be.

    Raises:
        subprocess.CalledProcessError: something does not compile; what the compiler said is its `stdout`.
    """
    binaries = ROOT / ".venv" / "bin"
    environment = {
        **os.environ,
        "CUDACXX": nvcc,
        "CMAKE_GENERATOR": "Ninja",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }
    wheels = directory / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    for compiled in directory.rglob("*.cu.o"):
        compiled.unlink()  # ptxas tells of what it compiles
    build: list[str | Path] = [binaries / "python", "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    build += ["-w", wheels, "-C", f"build-dir={directory}"]
    build += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}", ROOT / "cuda"]
    report = output_of(build, environment)
    kernels, slow = read_report(report)
    print(f"nvcc: {kernels} kernels, {len(slow)} of them use local memory")
    for kernel, architecture, local in slow:
        print(f"  {architecture} {local} bytes: {kernel}")
    waiting = remarks_on_warpgroups(report)
    for remark in waiting:
        print(f"  {remark}")
    if kernels == 0:
        print("ptxas told of no kernel: what became of -Xptxas -v?")
        return 1
    if problem := what_is_wrong_with(next(wheels.glob("*.whl")), wheels / "installed", binaries / "python"):
        print(problem)
        return 1
    files = compile_gpu_tests(directory / "tests", binaries, environment)
    print(f"nvcc: {files} files of tests for a GPU")
    if files == 0:
        print("there are no tests for a GPU: what became of their targets?")
        return 1
    return 0 if all(map(is_allowed, slow)) and not waiting else 1


def output_of(command: Sequence[str | Path], environment: dict[str, str]) -> str:
    """What it prints, errors among it.

    Raises:
        subprocess.CalledProcessError: it failed; what it printed is `stdout`.
    """
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
    )
    return done.stdout


def compile_gpu_tests(directory: Path, binaries: Path, environment: dict[str, str]) -> int:
    """Compiles the files of tests/cuda and tests/gpu that are for a GPU; objects go to a directory. How many there are.

    Raises:
        subprocess.CalledProcessError: one does not compile.
    """
    options = ["DRAFTWERK_BUILD_CUDA=ON", "DRAFTWERK_BUILD_TESTS=ON", "DRAFTWERK_BUILD_PYTHON=OFF"]
    options += ["CMAKE_BUILD_TYPE=None"]  # not optimised, as nothing of it runs
    options += [f"CMAKE_CUDA_ARCHITECTURES={TESTS_ARCHITECTURE}", f"Python_EXECUTABLE={binaries / 'python'}"]
    configure: list[str | Path] = [binaries / "cmake", "-S", ROOT, "-B", directory]
    configure += [f"-D{option}" for option in options]
    output_of(configure, environment)
    ninja: list[str | Path] = [binaries / "ninja", "-C", directory]
    targets = output_of([*ninja, "-t", "targets", "all"], environment)
    objects = re.findall(r"^(CMakeFiles/draftwerk_gpu_\w+\.dir/tests/(?:cuda|gpu)/\S+\.o):", targets, re.MULTILINE)
    if objects:  # without a name it would build everything
        output_of([*ninja, *objects], environment)
    return len(objects)


def is_allowed(slow: tuple[str, str, int]) -> bool:
    """Whether it is known that a kernel uses so many bytes of local memory."""
    name, architecture, local = slow
    return any(architecture == known and part in name and local <= most for (known, part), most in ALLOWED.items())


def what_is_wrong_with(wheel: Path, directory: Path, python: Path) -> str:
    """Nothing, if the installed core takes the wheel for its own; it is unpacked in a directory."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    ask = "from draftwerk.devices import find_gpu; find_gpu('cuda')"
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    done = subprocess.run([python, "-c", ask], env=environment, text=True, capture_output=True)
    if done.returncode == 0 or "driver" in done.stderr:  # which is the next thing that a machine without a GPU lacks
        return ""
    return f"{wheel.name} is not a backend of the installed draftwerk: {done.stderr}"


def read_report(output: str) -> tuple[int, list[tuple[str, str, int]]]:
    """The number of kernels that ptxas names, and (name, architecture, bytes) of those that have a stack frame, which
    is in local memory: of registers that are spilled, or of an array whose places are not known when it is compiled."""
    kernels = 0
    slow: list[tuple[str, str, int]] = []
    name = architecture = ""
    for line in output.splitlines():
        if compiled := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            name, architecture = compiled[1], compiled[2]
            kernels += 1
        elif used := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            local = max(int(used[1]), int(used[2]))
            if local > 0:
                slow.append((name, architecture, local))
    return kernels, slow


def remarks_on_warpgroups(output: str) -> list[str]:
    """What ptxas says where it made matrix instructions of a warpgroup wait for each other: C7510 to C7519."""
    return sorted({line for line in output.splitlines() if re.search(r"\(C751\d\)", line)})


if __name__ == "__main__":
    sys.exit(main())

"""The client distribution, installed into other Pythons as a user would, against the running server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.served import ROOT, Served
from draftwerk import Engine, SamplingParams

PROGRAM = Path(__file__).with_name("plain_client.py")


def interpreter(version: str) -> str:
    """A Python of this version, on PATH or made by pyenv; skips where there is none."""
    found = [shutil.which(f"python{version}"), *map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python"))]
    for python in filter(None, found):
        # A shim of pyenv may be on PATH for a version that is not active.
        asked = [python, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return python
    pytest.skip(f"no Python {version} with venv on this machine")


def install(python: Path, what: Path) -> subprocess.CompletedProcess[str]:
    """Installs with the pip of the Python that runs this: the other has none of its own, which would take longer."""
    options = ["--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-compile", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "--python", python, "install", *options, what]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's distribution, built of a copy, so that building leaves nothing in the checkout."""
    directory = tmp_path_factory.mktemp("client")
    sources = shutil.copytree(ROOT / "client", directory / "client", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(directory), str(sources)]
    subprocess.run(command, check=True, timeout=120)
    return next(directory.glob("*.whl"))


@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_client_on_python(version: str, wheel: Path, server: Served, reference: Engine, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([interpreter(version), "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    installed = install(python, wheel)
    if "connection" in installed.stderr.lower():
        pytest.skip(f"the package index is not there: {installed.stderr.strip().splitlines()[-1:]}")
    assert installed.returncode == 0, installed.stderr
    program = subprocess.run(
        [python, "-I", str(PROGRAM), server.address], capture_output=True, text=True, timeout=120, check=False
    )
    assert program.returncode == 0, program.stderr
    results = json.loads(program.stdout)
    assert results["python"] == [int(part) for part in version.split(".")]
    expected = list(reference.generate("hello world", SamplingParams(temperature=1.0, seed=4, max_tokens=16)).token_ids)
    assert results["token_ids"] == [expected] * 5

"""The client distribution, installed into other Pythons as a user would, against the running server."""

from __future__ import annotations

import json
import shutil
import subprocess
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


def install(python: str, *what: str) -> subprocess.CompletedProcess[str]:
    options = ["--quiet", "--disable-pip-version-check", "--no-cache-dir", "--retries", "1"]
    command = [python, "-m", "pip", "install", *options, *what]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("version", ["3.10", "3.12"])
def test_client_on_python(version: str, server: Served, reference: Engine, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([interpreter(version), "-m", "venv", environment], check=True, timeout=120)
    python = str(environment / "bin" / "python")
    builder = install(python, "hatchling")
    if builder.returncode != 0:
        pytest.skip(f"pip cannot install here: {builder.stderr.strip().splitlines()[-1:]}")
    # A copy, so that building leaves nothing in the checkout.
    sources = shutil.copytree(ROOT / "client", tmp_path / "client", ignore=shutil.ignore_patterns("__pycache__"))
    installed = install(python, "--no-build-isolation", str(sources))
    assert installed.returncode == 0, installed.stderr
    program = subprocess.run(
        [python, "-I", str(PROGRAM), server.address], capture_output=True, text=True, timeout=120, check=False
    )
    assert program.returncode == 0, program.stderr
    results = json.loads(program.stdout)
    assert results["python"] == [int(part) for part in version.split(".")]
    expected = list(reference.generate("hello world", SamplingParams(temperature=1.0, seed=4, max_tokens=16)).token_ids)
    assert results["token_ids"] == [expected] * 5

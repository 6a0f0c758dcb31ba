"""The examples of docs/client.md and of the client's README run against a server."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import TIMEOUT, RunningServer, ServerFactory

ROOT = Path(__file__).resolve().parents[3]


def blocks(document: str) -> list[str]:
    """The Python examples of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


EXAMPLES = [
    pytest.param(block, id=f"{document}-{i}")
    for document in ("docs/client.md", "client/README.md")
    for i, block in enumerate(blocks(document), start=1)
]
PLAIN = [example for example in EXAMPLES if "credentials" not in str(example.values[0])]
WITH_TLS = [example for example in EXAMPLES if "credentials" in str(example.values[0])]


def run(block: str, address: str, directory: Path) -> str:
    """What the example prints when it runs in a process of its own."""
    for documented in ("127.0.0.1:50051", "127.0.0.1:50052"):
        block = block.replace(documented, address)
    path = os.pathsep.join(part for part in sys.path if part)
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_there_are_examples() -> None:
    assert (len(PLAIN), len(WITH_TLS)) == (11, 1)


@pytest.mark.parametrize("block", PLAIN)
def test_example(block: str, server: RunningServer, tmp_path: Path) -> None:
    assert run(block, server.address, tmp_path).strip()


@pytest.mark.parametrize("block", WITH_TLS)
def test_example_with_tls(block: str, server_process: ServerFactory, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("makes its certificate with openssl, which is not installed")
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=draftwerk", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", "key.pem", "-out", "ca.pem"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        timeout=TIMEOUT,
    )
    flags = ("--tls-certificate", str(tmp_path / "ca.pem"), "--tls-key", str(tmp_path / "key.pem"))
    assert "tiny" in run(block, server_process(*flags).address, tmp_path)

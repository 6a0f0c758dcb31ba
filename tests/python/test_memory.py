"""How much memory is free, of a machine or of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftwerk.memory import available_memory, parse_size

LIMIT, USED, CACHED = 900_000, 700_000, 300_000  # bytes: far less than any machine has


def group(directory: Path, limit: str, cached: str = f"file 1\ninactive_file {CACHED}\nactive_file 7\n") -> Path:
    for name, text in (("max", limit), ("current", str(USED)), ("stat", cached)):
        (directory / f"memory.{name}").write_text(f"{text}\n")
    return directory


def test_files_that_were_read_leave_room_in_a_container(tmp_path: Path) -> None:
    assert available_memory(group(tmp_path, str(LIMIT))) == LIMIT - USED + CACHED
    assert available_memory(group(tmp_path, str(LIMIT), cached="anon 5")) == LIMIT - USED
    assert available_memory(group(tmp_path, str(USED - 400_000))) == 0


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    of_machine = available_memory(tmp_path / "nowhere")
    assert of_machine > 10**8
    assert available_memory(group(tmp_path, "max")) == pytest.approx(of_machine, rel=0.2)


def test_sizes_as_people_write_them() -> None:
    assert parse_size("512MiB") == 512 << 20
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("much")


@pytest.mark.parametrize("text", ["8589934592GiB", "9" * 400])
def test_a_size_that_no_memory_has(text: str) -> None:
    assert parse_size("8589934591GiB") == (1 << 63) - (1 << 30)
    with pytest.raises(ValueError, match="less than 8 EiB"):
        parse_size(text)

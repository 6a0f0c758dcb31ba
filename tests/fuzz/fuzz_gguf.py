"""Fuzzes opening a GGUF file: whatever the bytes, a checkpoint whose tensors can be read, or a CheckpointError.

python tests/fuzz/fuzz_gguf.py --seconds 30
python tests/fuzz/fuzz_gguf.py --runs 20000 --seed 7
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "loading"))

from mutations import fuzz


def seeds() -> list[bytes]:
    """Small valid files, with and without a vocabulary, of models and drafters, and one whose header alone is left."""
    import tiny_files as tiny
    import tiny_gemma4_files as tiny4

    with_template = tiny.TinyGguf(tokenizer__chat_template=(tiny.STRING, "{% for m in messages %}{{ m }}{% endfor %}"))
    plain = tiny.TinyGguf()
    for entry in ("tokens", "scores", "types"):
        del plain.entries[entry]
    models = [tiny4.TinyGemma4Gguf(), tiny4.TinyAssistantGguf(), tiny4.TinyReducedGguf()]
    with_merges = tiny4.TinyGemma4Gguf().bytes()
    for model in models:
        for entry in ("tokens", "scores", "types", "merges"):
            del model.entries[entry]
    headers = [plain.bytes()[:2000], b"GGUF" + struct.pack("<IQQ", 3, 0, 0)]
    return [plain.bytes(), with_template.bytes(), with_merges, *(model.bytes() for model in models), *headers]


def check(path: Path) -> None:
    """Opens the file and reads every tensor.

    Raises:
        anything but CheckpointError: that is what is looked for.
    """
    from draftwerk.loading import CheckpointError, is_assistant, open_assistant, open_checkpoint

    try:
        checkpoint = open_assistant(path) if is_assistant(path) else open_checkpoint(path)
        for tensor in checkpoint.tensors():
            rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
            assert tensor.rows_bytes() * rows == tensor.data.size, tensor.name
            int(tensor.data.sum())
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1, str(error)


if __name__ == "__main__":
    fuzz(check, seeds, ".gguf", __doc__ or "")

"""Fuzzes reading a safetensors file, by itself and as the weights of a Gemma 4 model, in FP8 too, and of drafters for
it, and reading the small files beside the weights: whatever the bytes, tensors inside the file, or a CheckpointError.

python tests/fuzz/fuzz_safetensors.py --seconds 30
python tests/fuzz/fuzz_safetensors.py --runs 20000 --seed 7
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "loading"))

from mutations import fuzz

SMALL_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def seeds() -> list[bytes]:
    """Small valid files."""
    import tiny_files as tiny
    import tiny_gemma4_files as tiny4
    from tiny_fp8_files import quantised

    tensors = {"a": ("F32", [2, 3], bytes(24)), "b": ("BF16", [4], bytes(8)), "empty": ("F16", [0, 7], b"")}
    plain = [tiny.safetensors_bytes(tensors), tiny.safetensors_bytes({}), tiny.safetensors_bytes(tensors, padding=1)]
    fp8 = quantised(tiny4.text_tensors())
    models = (tiny4.text_tensors(), fp8, tiny4.assistant_tensors(), tiny4.reduced_tensors())
    named = {"bos_token": "<bos>", "eos_token": {"content": "<end_of_turn>"}, "chat_template": "{{ messages }}"}
    ends = {"bos_token_id": 2, "eos_token_id": [1, 5], "num_assistant_tokens": 4}
    small = [json.dumps(value).encode() for value in (tiny.tokenizer_json(), named, ends)]
    return plain + small + [tiny.safetensors_bytes(tensors, padding=p) for tensors in models for p in (8, 1)]


def check(path: Path) -> None:
    """Reads the file and every byte of its tensors, and the checkpoints that it makes with a configuration.

    Raises:
        anything but CheckpointError: that is what is looked for.
    """
    from draftwerk.loading import CheckpointError, open_assistant, open_checkpoint
    from draftwerk.loading.safetensors import SafetensorsFile

    for directory in _directories(path):
        open_directory = open_assistant if directory.name.endswith("drafter") else open_checkpoint
        try:
            for view in open_directory(directory).tensors():
                int(view.data.sum())
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1, str(error)
    for directory in _directories_of_small_files(path):
        try:
            tokenizer = open_checkpoint(directory).tokenizer
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            continue
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("<start_of_turn>user\nhello the world \u2581"))
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return
    for tensor in file.tensors.values():
        data = file.file.bytes[tensor.offset : tensor.offset + tensor.size]
        assert data.size == tensor.size, tensor.name
        int(data.sum())


def _directories(path: Path) -> list[Path]:
    """Directories of two models and of two drafters whose weights are this file."""
    import tiny_gemma4_files as tiny4
    from tiny_fp8_files import QUANTISATION

    configs = {
        "model": tiny4.text_config(),
        "FP8 model": tiny4.text_config() | {"quantization_config": QUANTISATION},
        "drafter": tiny4.assistant_config(),
        "reduced drafter": tiny4.reduced_config(),
    }
    directories = [path.parent / name for name in configs]
    for directory, config in zip(directories, configs.values(), strict=True):
        if not directory.exists():
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            (directory / "model.safetensors").symlink_to(path)
    return directories


def _directories_of_small_files(path: Path) -> list[Path]:
    """Directories of models in each of which this file is one of those beside the weights."""
    import tiny_files as tiny

    directories = [path.parent / f"model with {name}" for name in SMALL_FILES]
    for directory, name in zip(directories, SMALL_FILES, strict=True):
        if not directory.exists():
            tiny.write_directory(directory)
            (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(path)
    return directories


if __name__ == "__main__":
    fuzz(check, seeds, ".safetensors", __doc__ or "")

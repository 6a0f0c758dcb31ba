"""Tensors reach the core whole, in whole groups of rows and as asked for, and the file's pages are given back."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_fp8_files
import tiny_gemma4_files as tiny4

from draftwerk.loading import CheckpointError, open_assistant, open_checkpoint
from draftwerk.loading.hugging_face_config import assistant_config_from_hugging_face
from draftwerk.weights import fingerprint, load_assistant, load_model
from fake_checkpoint import FakeCheckpoint, FakeTensor


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (40, 1024), (5000, 1024), (33, 200_000)])
def test_every_byte_of_a_matrix_is_uploaded_once(core: ModuleType, shape: tuple[int, int]) -> None:
    view = FakeTensor("w", "bf16", shape)
    seen: list[tuple[int, int]] = []
    model = load_model(FakeCheckpoint(views=[view]), progress=lambda _, done, total: seen.append((done, total)))
    chunks = model.matrices["w"]["chunks"]
    assert b"".join(data for *_, data in chunks) == view.data.tobytes()
    row = 0
    for first, dtype, rows, _ in chunks:
        assert (first, dtype) == (row, "bf16")
        assert rows % 16 == 0 or first + rows == shape[0]
        row += rows
    assert row == shape[0]
    assert all(len(data) <= max(4 << 20, 16 * shape[1] * 2) for *_, data in chunks)
    assert max(end for _, end in view.released) == view.data.nbytes
    assert seen[-1] == (view.data.nbytes, view.data.nbytes)
    assert model.finished


@pytest.mark.parametrize(
    ("weights", "dtype", "stored"),
    [
        ("auto", "q4_k", "q4_k"),
        ("auto", "f16", "f16"),
        ("int8", "bf16", "q8_0"),
        ("int8", "q6_k", "q6_k"),
        ("f32", "bf16", "f32"),
    ],
)
def test_weights_choose_the_stored_type(core: ModuleType, weights: str, dtype: str, stored: str) -> None:
    model = load_model(FakeCheckpoint(views=[FakeTensor("w", dtype, (16, 256))]), weights=weights)
    assert model.matrices["w"]["type"] == stored


def test_quantised_weights_cannot_become_floats(core: ModuleType) -> None:
    with pytest.raises(ValueError, match="tensor w is quantised already"):
        load_model(FakeCheckpoint(views=[FakeTensor("w", "q8_0", (16, 32))]), weights="f32")


def test_vectors_are_float32(core: ModuleType) -> None:
    view = FakeTensor("norm", "f32", (7,))
    model = load_model(FakeCheckpoint(views=[view]))
    assert model.vectors["norm"].dtype == np.float32
    assert model.vectors["norm"].tobytes() == view.data.tobytes()


# --- Gemma 4 ---------------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.up_proj.weight"
HEAD, CENTROIDS = "lm_head.weight", "masked_embedding.centroids.weight"


@pytest.mark.parametrize(
    ("weights", "name", "stored"),
    [
        ("int4", LAYER, "q4_0"),
        ("int4", "model.layers.0.experts.gate_up_proj", "q4_0"),
        ("int4", "model.layers.0.per_layer_input_gate.weight", "q4_0"),
        ("int4", "model.embed_tokens.weight", "q8_0"),
        ("int4", "model.per_layer_model_projection.weight", "q8_0"),
        ("int4", HEAD, "q8_0"),
        ("int4", CENTROIDS, "q8_0"),
        ("int4", "pre_projection.weight", "q8_0"),
        ("int4", "post_projection.weight", "q8_0"),
        ("fp8", LAYER, "f8_e4m3"),
        ("fp8", "model.layers.0.experts.gate_up_proj", "f8_e4m3"),
        ("fp8", "model.embed_tokens.weight", "q8_0"),
        ("fp8", HEAD, "q8_0"),
        ("fp8", "pre_projection.weight", "q8_0"),
        ("int8", LAYER, "q8_0"),
        ("int8", CENTROIDS, "q8_0"),
        ("f32", CENTROIDS, "f32"),
        *((weights, "model.layers.0.router.proj.weight", "bf16") for weights in ("auto", "int8", "int4", "fp8", "f32")),
    ],
)
def test_what_a_choice_means_for_each_tensor(core: ModuleType, weights: str, name: str, stored: str) -> None:
    model = load_model(FakeCheckpoint(views=[FakeTensor(name, "bf16", (16, 64))]), weights=weights)
    assert model.matrices[name]["type"] == stored


@pytest.mark.parametrize("weights", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q6_k"])
def test_quantised_matrices_are_left_as_they_are(core: ModuleType, dtype: str, weights: str) -> None:
    model = load_model(FakeCheckpoint(views=[FakeTensor(LAYER, dtype, (16, 256))]), weights=weights)
    assert model.matrices[LAYER]["type"] == dtype


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rows_that_are_no_whole_blocks_cannot_be_quantised(core: ModuleType, weights: str) -> None:
    checkpoint = FakeCheckpoint(views=[FakeTensor(LAYER, "bf16", (16, 48))])
    with pytest.raises(ValueError, match=f"'{weights}': tensor {LAYER} has rows of 48 values, .* no multiple of 32"):
        load_model(checkpoint, weights=weights)
    assert load_model(checkpoint, weights="f32").matrices[LAYER]["type"] == "f32"
    assert load_model(checkpoint, weights="fp8").matrices[LAYER]["type"] == "f8_e4m3"  # a scale for a whole row


@pytest.mark.parametrize("weights", ["auto", "int8", "int4", "f32"])
def test_per_layer_embeddings_are_mapped_and_not_touched(core: ModuleType, weights: str) -> None:
    table = FakeTensor("model.embed_tokens_per_layer.weight", "bf16", (320, 33))
    others = [FakeTensor("model.embed_tokens.weight"), FakeTensor("model.norm.weight", "f32", (5,))]
    seen: list[tuple[int, int]] = []
    model = load_model(
        FakeCheckpoint(views=[others[0], table, others[1]]),
        weights=weights,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert table.name not in model.matrices
    mapped = model.tables[table.name]
    assert (mapped["type"], mapped["rows"], mapped["columns"]) == ("bf16", 320, 33)
    assert mapped["data"] is table.data
    assert table.released == []
    assert {total for _, total in seen} == {others[0].nbytes + others[1].nbytes}


def handed_over(model: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the core was given: vectors, matrices in their source types, tables."""
    found = {name: ("f32", values.shape, values.tobytes()) for name, values in model.vectors.items()}
    for name, matrix in model.matrices.items():
        assert model.finished
        (source,) = {source for _, source, _, _ in matrix["chunks"]}
        data = b"".join(data for *_, data in matrix["chunks"])
        found[name] = (source, (matrix["rows"], matrix["columns"]), data)
    for name, table in model.tables.items():
        found[name] = (table["type"], (table["rows"], table["columns"]), table["data"].tobytes())
    return found


@pytest.mark.parametrize("form", ["directory", "FP8 directory", "gguf"])
def test_a_whole_checkpoint_reaches_the_core(core: ModuleType, form: str, tmp_path: Path) -> None:
    if form == "directory":
        checkpoint = open_checkpoint(tiny4.write_target(tmp_path))
    elif form == "FP8 directory":
        tensors = tiny_fp8_files.quantised(tiny4.text_tensors())
        checkpoint = open_checkpoint(tiny_fp8_files.write(tmp_path, tensors, config=tiny4.text_config()))
    else:
        checkpoint = open_checkpoint(tiny4.TinyGemma4Gguf().write(tmp_path / "x.gguf"))
    model = load_model(checkpoint)
    views = {view.name: (view.dtype, view.shape, view.data.tobytes()) for view in checkpoint.tensors()}
    assert handed_over(model) == views
    flat = {
        name: shape if len(shape) < 3 else (shape[0] * shape[1], shape[2])
        for name, shape in tiny4.text_shapes().items()
    }
    assert {name: shape for name, (_, shape, _) in views.items()} == flat
    assert model.config == dataclasses.asdict(checkpoint.config)
    assert list(model.tables) == ["model.embed_tokens_per_layer.weight"]


def test_the_head_of_a_drafter_lies_in_the_order_of_its_centroids(core: ModuleType, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny4.write_target(tmp_path / "target"))
    target = load_model(checkpoint)
    assistant = open_assistant(tiny4.write_assistant(tmp_path / "assistant"))
    seen: list[tuple[int, int]] = []
    drafter = load_assistant(assistant, checkpoint, target, progress=lambda _, done, total: seen.append((done, total)))
    assert drafter.target is target
    assert drafter.config == dataclasses.asdict(assistant.config)
    assert drafter.config["text"]["num_kv_shared_layers"] == tiny4.DRAFTER_LAYERS
    views = {view.name: (view.dtype, view.shape, view.data.tobytes()) for view in assistant.tensors()}
    found = handed_over(drafter)
    assert found.keys() == views.keys() == tiny4.assistant_shapes().keys() - {"model.embed_tokens.weight"} | {HEAD}
    order = tiny4.ordering()
    rows = np.frombuffer(views[HEAD][2], np.uint8).reshape(tiny4.VOCAB, -1)
    assert found.pop(HEAD) == ("bf16", (tiny4.VOCAB, tiny4.DRAFTER_HIDDEN), rows[order].tobytes())
    del views[HEAD]
    assert found == views
    ((name, permutation),) = drafter.indices.items()
    assert (name, permutation.dtype, permutation.tolist()) == (
        "masked_embedding.token_ordering",
        np.int32,
        order.tolist(),
    )
    assert seen[-1][0] == seen[-1][1]


def test_the_head_of_a_drafter_without_centroids_lies_as_it_is(core: ModuleType, tmp_path: Path) -> None:
    tensors = tiny4.assistant_tensors()
    for name in (CENTROIDS, "masked_embedding.token_ordering"):
        del tensors[name]
    config = tiny4.assistant_config() | {"use_ordered_embeddings": False}
    assistant = open_assistant(tiny4.write(tmp_path / "assistant", config, tensors))
    checkpoint = open_checkpoint(tiny4.write_target(tmp_path / "target"))
    target = load_model(checkpoint)
    drafter = load_assistant(assistant, checkpoint, target)
    assert handed_over(drafter)[HEAD][2] == tensors["model.embed_tokens.weight"][2]
    assert drafter.indices == {}
    with pytest.raises(ValueError, match=r"tensor masked_.*|tensor model\.layers.* no multiple of 32"):
        load_assistant(assistant, checkpoint, target, weights="int8")  # rows of 16 and 24
    with pytest.raises(ValueError, match="weights = 'int3'"):
        load_assistant(assistant, checkpoint, target, weights="int3")


@pytest.mark.parametrize(("weights", "stored"), [("auto", "bf16"), ("int8", "q8_0"), ("int4", "q8_0"), ("f32", "f32")])
def test_a_reduced_head_is_made_of_the_targets_rows(
    core: ModuleType, weights: str, stored: str, tmp_path: Path
) -> None:
    """In the type in which the target itself keeps them."""
    checkpoint = open_checkpoint(tiny4.write_target(tmp_path / "target"))
    config = tiny4.reduced_config() | {"use_ordered_embeddings": False}
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 32}  # rows that can be quantised
    shapes = assistant_config_from_hugging_face("config.json", config).expected_tensors()
    tensors = {name: ("BF16", shape, bytes(2 * math.prod(shape))) for name, shape in shapes.items()}
    tensors["draft_token_ids"] = tiny4.reduced_tensors()["draft_token_ids"]
    assistant = open_assistant(tiny4.write(tmp_path / "assistant", config, tensors))
    target = core.Model({})
    seen: list[tuple[int, int]] = []
    drafter = load_assistant(
        assistant, checkpoint, target, weights=weights, progress=lambda _, done, total: seen.append((done, total))
    )
    tokens = tiny4.draft_token_ids()
    head = drafter.matrices[HEAD]
    assert (head["type"], head["rows"], head["columns"]) == (stored, tiny4.DRAFT_VOCAB, tiny4.HIDDEN)
    rows = np.frombuffer(tiny4.text_tensors()["model.embed_tokens.weight"][2], np.uint8).reshape(tiny4.VOCAB, -1)
    assert handed_over(drafter)[HEAD] == ("bf16", (tiny4.DRAFT_VOCAB, tiny4.HIDDEN), rows[tokens].tobytes())
    ((name, indices),) = drafter.indices.items()
    assert (name, indices.dtype, indices.tolist()) == ("draft_token_ids", np.int32, tokens.tolist())
    assert seen[-1][0] == seen[-1][1]


def test_the_order_of_a_large_head_is_kept_across_chunks(core: ModuleType) -> None:
    class Head(FakeTensor):
        def rows_at(self, indices: np.ndarray) -> np.ndarray:
            return self.data.reshape(self.shape[0], -1)[indices].reshape(-1)

    @dataclasses.dataclass
    class Config:
        num_centroids: int = 4
        draft_vocab_size: int = 0

    head = Head(HEAD, "bf16", (20_000, 256))
    order = np.random.default_rng(3).permutation(20_000).astype(np.int32)
    assistant = FakeCheckpoint(views=[head])
    assistant.config, assistant.head_token_ids = Config(), order
    drafter = load_assistant(assistant, FakeCheckpoint(), core.Model({}))
    chunks = drafter.matrices[HEAD]["chunks"]
    assert len(chunks) > 2
    assert all(rows % 16 == 0 for _, _, rows, _ in chunks[:-1])
    assert b"".join(data for *_, data in chunks) == head.data.reshape(20_000, -1)[order].tobytes()


def test_sizes_that_the_core_refuses_are_a_checkpoint_error(
    core: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assistant = open_assistant(tiny4.write_assistant(tmp_path / "assistant"))
    checkpoint = open_checkpoint(tiny4.write_target(tmp_path / "target"))
    target = load_model(checkpoint)

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("model config: head_dim is 16, must be a multiple of 32")

    monkeypatch.setattr(core.MtpModel, "__init__", refuse)
    with pytest.raises(CheckpointError, match="assistant: model config: head_dim is 16"):
        load_assistant(assistant, checkpoint, target)
    monkeypatch.setattr(core.Model, "__init__", refuse)
    with pytest.raises(CheckpointError, match="target: model config: head_dim is 16"):
        load_model(checkpoint)


def test_everything_about_a_gemma_4_shows_in_its_fingerprint(tmp_path: Path) -> None:
    def of(path: Path, weights: str = "auto") -> int:
        return fingerprint(open_checkpoint(path), weights, "cpu")

    def bent(name: str, position: int) -> int:
        tensors = tiny4.text_tensors()
        dtype, shape, data = tensors[name]
        bytes_ = bytearray(data)
        bytes_[position] ^= 1
        tensors[name] = (dtype, shape, bytes(bytes_))
        return of(tiny4.write(tmp_path / "bent", tiny4.text_config(), tensors))

    plain = tiny4.write_target(tmp_path / "plain")
    assert of(plain) == of(tiny4.write_target(tmp_path / "renamed"))
    everything = [of(plain), of(plain, "f32"), of(plain, "f16")]
    everything += [bent(name, 0) for name in tiny4.text_shapes()] + [bent(name, -1) for name in tiny4.text_shapes()]
    rope = tiny4.text_config()["rope_parameters"]
    rope[tiny4.FULL]["partial_rotary_factor"] = 0.5
    for changes in (
        {"rope_parameters": rope},
        {"top_k_experts": 1},
        {"sliding_window": 9},
        {"final_logit_softcapping": None},
        {"eos_token_id": 5},
    ):
        everything.append(of(tiny4.write_target(tmp_path / "changed", **changes)))
    assert len(set(everything)) == len(everything)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
def test_the_table_of_a_directory_is_never_resident(tmp_path: Path) -> None:
    rows, width = 4096, 512
    config = tiny4.text_config() | {"hidden_size_per_layer_input": width, "vocab_size_per_layer_input": rows}
    tensors = tiny4.text_tensors()
    layers = len(tiny4.LAYER_TYPES)
    tensors["model.embed_tokens_per_layer.weight"] = ("BF16", (rows, layers * width), bytes(2 * rows * layers * width))
    tensors["model.per_layer_model_projection.weight"] = ("BF16", (layers * width, 32), bytes(64 * layers * width))
    tensors["model.per_layer_projection_norm.weight"] = ("BF16", (width,), bytes(2 * width))
    for index in range(layers):
        for part, shape in (("input_gate", (width, 32)), ("projection", (32, width))):
            tensors[f"model.layers.{index}.per_layer_{part}.weight"] = ("BF16", shape, bytes(64 * width))
    path = tiny4.write(tmp_path / "target", config, tensors)
    program = """
import sys
sys.path[:0] = sys.argv[2:]
import fake_core
sys.modules["draftwerk._core"] = fake_core
from draftwerk.loading import open_checkpoint
from draftwerk.weights import fingerprint, load_model
checkpoint = open_checkpoint(sys.argv[1])
model = load_model(checkpoint)
fingerprint(checkpoint, "auto", "cpu")
lines = open("/proc/self/smaps").read().splitlines()
start = next(i for i, line in enumerate(lines) if line.endswith("model.safetensors"))
print(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])
"""
    arguments = [str(path), *sys.path]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    table = 2 * rows * layers * width
    assert (path / "model.safetensors").stat().st_size > table
    assert int(done.stdout) * 1024 < table / 8

"""Tensors reach the core whole, in whole groups of rows, and the file's pages are given back."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from draftwerk.weights import load_model
from fake_checkpoint import FakeCheckpoint


class View:
    """A tensor that remembers what was released."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], item_bytes: int) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        size = int(np.prod(shape)) * item_bytes
        self.data = np.random.default_rng(size).integers(0, 255, size, dtype=np.uint8)
        self.released: list[tuple[int, int]] = []

    def release(self, first_byte: int, last_byte: int) -> None:
        self.released.append((first_byte, last_byte))


@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (40, 1024), (5000, 1024), (33, 200_000)])
def test_every_byte_of_a_matrix_is_uploaded_once(core: ModuleType, shape: tuple[int, int]) -> None:
    view = View("w", "bf16", shape, 2)
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
    model = load_model(FakeCheckpoint(views=[View("w", dtype, (16, 32), 2)]), weights=weights)
    assert model.matrices["w"]["type"] == stored


def test_quantised_weights_cannot_become_floats(core: ModuleType) -> None:
    with pytest.raises(ValueError, match="tensor w is quantised already"):
        load_model(FakeCheckpoint(views=[View("w", "q8_0", (16, 32), 1)]), weights="f32")


def test_vectors_are_float32(core: ModuleType) -> None:
    view = View("norm", "f32", (7,), 4)
    model = load_model(FakeCheckpoint(views=[view]))
    assert model.vectors["norm"].dtype == np.float32
    assert model.vectors["norm"].tobytes() == view.data.tobytes()

"""Tensors of a checkpoint as torch has them."""

from __future__ import annotations

import torch
from torch import Tensor

from draftwerk import _core
from draftwerk.loading import TensorView

_ROWS_AT_ONCE = 1 << 14  # of a matrix that is dequantised
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def torch_tensor(view: TensorView, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of a tensor, dequantised if need be.

    Args:
        view: the tensor.
        dtype: of the copy; by default that of the file, and bfloat16 for quantised ones.
    """
    if len(view.shape) == 1:
        return torch.frombuffer(bytearray(view.data), dtype=torch.float32).to(dtype or torch.float32)
    rows, columns = view.shape
    matrix = torch.empty(rows, columns, dtype=dtype or _FLOATS.get(view.dtype, torch.bfloat16))
    for first in range(0, rows, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, rows)
        data = view.rows(first, last)
        if view.dtype in _FLOATS:
            part = torch.frombuffer(bytearray(data), dtype=_FLOATS[view.dtype])
        else:
            part = torch.from_numpy(_core.dequantize(view.dtype, data.data, columns, last - first))
        matrix[first:last] = part.view(last - first, columns)
        view.release(0, last * view.rows_bytes())
    return matrix

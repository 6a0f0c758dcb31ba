"""Rows, keys and tokens in whole blocks, so that PyTorch multiplies matrices of few shapes.

oneDNN, which multiplies bf16 for PyTorch on processors, compiles a kernel for every shape that it has not met lately.
With AMX that takes 2 to 70 ms, and the product itself 1 to 20. Batches and steps of chains have any number of rows, so
that without this most products would be the first of their shape. With it there are some hundreds of shapes, which stay
compiled: oneDNN keeps 1,024 kernels. What was measured: docs/performance.md.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

BLOCK = 64


def whole_blocks(count: int) -> int:
    """The least multiple of a block that is not below ``count``."""
    return -(-count // BLOCK) * BLOCK


def fill_block(rows: Tensor) -> Tensor:
    """Rows [n, ...] and zeros behind them, up to a whole block."""
    return functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, whole_blocks(len(rows)) - len(rows)))

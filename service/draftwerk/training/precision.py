"""What training computes in: the frozen target, and the products of the drafter, whose weights are float32 anyway."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
"""By the names that runs have for them."""

# By PyTorch's names: products of bf16 on x86-64 with AVX-512 or AMX, and on ARM.
_BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of a new run.

    Args:
        name: one of `DTYPES`, or "auto": bf16 where the device multiplies it by itself. Elsewhere PyTorch converts
            every operand, which takes a processor with AVX2 alone eight times as long as products of f32.
        device: that trains.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "f32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(known) for known in _BF16_CAPABILITIES) else "f32"

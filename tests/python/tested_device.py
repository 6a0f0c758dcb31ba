"""The device on which tests of what a model computes run, and how near it has to be to transformers there.

It is the processor, or the GPU of the backend that the environment names (make test-cuda names the emulated one).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import transformers

from draftwerk import _core
from draftwerk.devices import find_gpu
from draftwerk.loading import Checkpoint
from draftwerk.weights import load_model

T = TypeVar("T")
Array = npt.NDArray[np.float32]

GPU = find_gpu("auto")
EMULATED = GPU is not None and GPU.name == "emulated"
# A GPU rounds what it multiplies to bfloat16. So its logits may be as far from the reference's in float32 as the
# reference's own in bfloat16 are, or a little more where rounding goes the other way.
SLACK = 2.0
LEAST_TOLERANCE = 1e-2
# Of drafts, each of which takes over what the one before was off by: twice the most that was measured (0.076).
DRAFT_TOLERANCE = 0.15


def few(on_the_processor: T, on_a_gpu: T) -> T:
    """What to try: less where threads are emulated, or a GPU's time is rare."""
    return on_the_processor if GPU is None else on_a_gpu


def load(checkpoint: Checkpoint, **options: Any) -> _core.Model:
    """The model on the tested device."""
    return load_model(checkpoint, gpu=GPU, threads=2, **options)


def relative_error(got: Array, reference: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    expected = reference.numpy()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def tolerance(model: transformers.PreTrainedModel, token_ids: Sequence[int], *, processor: float) -> float:
    """The relative error that logits of the tested device may have: `processor` on the processor."""
    if GPU is None:
        return processor
    with torch.inference_mode():
        exact, rounded = (of(torch.tensor([list(token_ids)])).logits[0].float() for of in (model, in_bfloat16(model)))
    return max(SLACK * relative_error(rounded.numpy(), exact), LEAST_TOLERANCE)


def in_bfloat16(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A copy that computes in bfloat16, but for the angles of positions, which nobody rounds."""
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if "inv_freq" not in name and buffer.is_floating_point():
                setattr(module, name, buffer.to(torch.bfloat16))
    return rounded


def check_drafts(
    drafts: list[int], logits: Array, expected: list[int], reference: Array, *, scored: int, processor: float
) -> None:
    """Holds drafts and the logits that they were taken from against a reference's.

    Args:
        scored: tokens that have logits in each row. In the reference the others have minus infinity or, as
            transformers has it, something below the smallest.
        processor: the relative error that the processor's may have.
    """
    finite = np.isfinite(logits)
    assert (finite.sum(-1) == scored).all()
    if GPU is None:
        assert drafts == expected
        assert relative_error(logits[finite], torch.from_numpy(reference[finite])) < processor
        return
    # Rounding may choose another token, after which the drafts are those of another text, and another cluster.
    alike = next((row for row, (a, b) in enumerate(zip(drafts, expected, strict=True)) if a != b), len(drafts) - 1) + 1
    both = (finite & (reference > reference.min(-1, keepdims=True)))[:alike]
    assert (both.sum(-1) >= scored // 2).all()
    assert relative_error(logits[:alike][both], torch.from_numpy(reference[:alike][both])) < DRAFT_TOLERANCE


def check_greedy_text(
    model: transformers.PreTrainedModel, token_ids: Sequence[int], text: Sequence[int], expected: Sequence[int]
) -> None:
    """Holds greedy text against transformers': on a GPU, each token's logit has to be the largest but for rounding."""
    if GPU is None:
        assert list(text) == list(expected)
        return
    whole = [*token_ids, *text[:-1]]
    with torch.inference_mode():
        logits = model(torch.tensor([whole])).logits[0, len(token_ids) - 1 :].float()
    missing = logits.max(-1).values - logits[torch.arange(len(text)), torch.tensor(text)]
    # The chosen one may be too large by the tolerance, and the best too small.
    allowed = 2 * tolerance(model, whole, processor=0.0) * float(logits.abs().max())
    assert float(missing.max()) <= allowed

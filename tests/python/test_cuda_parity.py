"""Gemma 3 on a GPU, or its emulation, against transformers, and quantised weights against the processor.

Gemma 4 and drafters have their tests in test_gemma4_parity.py and test_drafter_parity.py, on whichever device there is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_checkpoint
import tiny_gemma4
from draftwerk.loading import open_assistant, open_checkpoint
from draftwerk.weights import load_assistant, load_model
from test_gemma4_parity import prompt
from tested_device import GPU, few, load, relative_error, tolerance

pytestmark = pytest.mark.skipif(GPU is None, reason="needs a GPU or its emulation (make test-cuda)")


def test_logits_of_gemma3(tmp_path: Path) -> None:
    model = tiny_checkpoint.tiny_model(seed=2)
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path, dtype=torch.bfloat16)))
    for length in (1, 25, 70):
        reference = tiny_gemma4.reference_logits(model, prompt(length))
        got = native.logits(prompt(length))
        assert relative_error(got, reference) < tolerance(model, prompt(length), processor=0.0), f"{length} tokens"
    for chunk in few((1, 9, 64), (9, 64)):
        assert np.array_equal(native.logits(prompt(70), chunk=chunk), got), f"in chunks of {chunk}"


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_quantised_weights_are_those_of_the_processor(tmp_path: Path, weights: str) -> None:
    model = tiny_gemma4.dense_k_eq_v(seed=3)
    checkpoint = open_checkpoint(tiny_gemma4.save(model, tmp_path, dtype=torch.bfloat16))
    on_gpu = load(checkpoint, weights=weights).logits(prompt(30))
    on_cpu = load_model(checkpoint, weights=weights, threads=1).logits(prompt(30))
    assert relative_error(on_gpu, torch.from_numpy(on_cpu)) < 0.05


@pytest.mark.parametrize("centroids", [0, 32], ids=["full head", "centroids"])
def test_a_first_draft_is_that_of_the_processor(tmp_path: Path, centroids: int) -> None:
    model = tiny_gemma4.FAMILIES["ple_shared"](seed=6)
    assistant = tiny_gemma4.assistant_for(model, centroids=centroids, seed=7)
    checkpoint = open_checkpoint(tiny_gemma4.save(model, tmp_path / "target"))
    opened = open_assistant(tiny_gemma4.save(assistant, tmp_path / "assistant"))
    logits = []
    for gpu in (GPU, None):
        drafter = load_assistant(opened, checkpoint, load_model(checkpoint, gpu=gpu, threads=1))
        _, of_draft = drafter.draft(prompt(40), 1)
        logits.append(of_draft[0])
    both = np.isfinite(logits[0]) & np.isfinite(logits[1])  # the last cluster may be another one
    assert both.sum() >= (logits[0].size if centroids == 0 else logits[0].size * 2 // 32)
    assert relative_error(logits[0][both], torch.from_numpy(logits[1][both])) < 0.05

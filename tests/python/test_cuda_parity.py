"""Gemma 3 and 4 and their drafters on a GPU, or its emulation, against transformers and against the processor.

A GPU rounds what it multiplies to bfloat16. So its logits may be as far from the reference's in float32 as the
reference's own in bfloat16 are, or a little more where rounding goes the other way.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_checkpoint
import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.devices import DeviceError, find_gpu
from draftwerk.loading import open_assistant, open_checkpoint
from draftwerk.weights import load_assistant, load_model
from test_gemma4_parity import prompt, relative_error
from tiny_gemma4 import FAMILIES

TARGETS = {**FAMILIES, "gemma3": tiny_checkpoint.tiny_model}
SLACK = 2.0


def _gpu_is_there() -> bool:
    try:
        return find_gpu("cuda") is not None
    except DeviceError:
        return False


pytestmark = pytest.mark.skipif(not _gpu_is_there(), reason="needs a GPU or its emulation (make test-cuda)")


@pytest.mark.parametrize("family", TARGETS)
def test_logits(tmp_path: Path, family: str) -> None:
    model = TARGETS[family](seed=2)
    path = tiny_gemma4.save(model, tmp_path, dtype=torch.bfloat16)
    native = load_model(open_checkpoint(path), gpu=find_gpu("cuda"))
    for length in (1, 25, 70):
        reference = tiny_gemma4.reference_logits(model, prompt(length))
        with torch.no_grad():
            rounded = model.to(torch.bfloat16)(torch.tensor([prompt(length)])).logits[0].float()
        model.float()
        allowed = SLACK * relative_error(rounded.numpy(), reference)
        got = native.logits(prompt(length))
        assert relative_error(got, reference) < max(allowed, 0.01), f"{length} tokens"
    for chunk in (1, 9, 64):
        assert np.array_equal(native.logits(prompt(70), chunk=chunk), got), f"in chunks of {chunk}"


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_quantised_weights_are_those_of_the_processor(tmp_path: Path, weights: str) -> None:
    checkpoint = open_checkpoint(tiny_gemma4.save(FAMILIES["dense_k_eq_v"](seed=3), tmp_path, dtype=torch.bfloat16))
    on_gpu = load_model(checkpoint, gpu=find_gpu("cuda"), weights=weights).logits(prompt(30))
    on_cpu = load_model(checkpoint, weights=weights, threads=1).logits(prompt(30))
    assert relative_error(on_gpu, torch.from_numpy(on_cpu)) < 0.05


@pytest.mark.parametrize("centroids", [0, 32], ids=["full head", "centroids"])
def test_drafts(tmp_path: Path, centroids: int) -> None:
    model = FAMILIES["ple_shared"](seed=6)
    assistant = tiny_gemma4.assistant_for(model, centroids=centroids, seed=7)
    checkpoint = open_checkpoint(tiny_gemma4.save(model, tmp_path / "target"))
    opened = open_assistant(tiny_gemma4.save(assistant, tmp_path / "assistant"))
    logits = []
    for gpu in (find_gpu("cuda"), None):
        drafter = load_assistant(opened, checkpoint, load_model(checkpoint, gpu=gpu, threads=1))
        _, of_draft = drafter.draft(prompt(40), 1)
        assert np.array_equal(drafter.draft(prompt(40), 1, chunk=7)[1], of_draft)
        logits.append(of_draft[0])
    both = np.isfinite(logits[0]) & np.isfinite(logits[1])  # the last cluster may be another one
    assert both.sum() >= (logits[0].size if centroids == 0 else logits[0].size * 2 // 32)
    assert relative_error(logits[0][both], torch.from_numpy(logits[1][both])) < 0.05


def test_drafts_change_no_token(tmp_path: Path) -> None:
    model = FAMILIES["unified"](seed=4)
    path = tiny_gemma4.save(model, tmp_path / "target")
    assistant = tiny_gemma4.save(tiny_gemma4.assistant_for(model, seed=5), tmp_path / "assistant")
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, top_k=20, seed=3)
    found = []
    for drafter in ("none", "random", str(assistant)):
        with Engine(path, device="cuda", drafter=drafter, kv_memory="16MiB") as engine:
            found.append([c.token_ids for c in engine.generate([prompt(12), prompt(30, 1), prompt(3, 2)], params)])
    assert found[0] == found[1] == found[2]

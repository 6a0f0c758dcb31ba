"""Gemma 4 and its drafters against transformers: the same weights give the same logits, drafts and text.

Tolerances are relative to the largest logit, and what they are for is said in test_parity.py; on a GPU or its emulation
they are those of tested_device.py. The window of the tiny models is 24 positions, so prompts lie on both sides of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.loading import open_assistant, open_checkpoint
from draftwerk.weights import load_assistant
from tested_device import check_drafts, check_greedy_text, few, load, relative_error, tolerance
from tiny_drafters import reference_drafts
from tiny_gemma4 import BOS_TOKEN_ID, FAMILIES, VOCABULARY

F32_TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2
WINDOW = 24


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [BOS_TOKEN_ID, *rng.integers(3, VOCABULARY, length - 1).tolist()]


# --- logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_f32(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](seed=1)
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path)))
    for length in few((1, 2, 17, WINDOW, WINDOW + 1, 110), (1, WINDOW + 1, 60)):
        reference = tiny_gemma4.reference_logits(model, prompt(length))
        allowed = tolerance(model, prompt(length), processor=F32_TOLERANCE)
        whole = native.logits(prompt(length))
        assert relative_error(whole, reference) < allowed, f"{length} tokens"
    for chunk in few((1, 7, 16, WINDOW, 25, 64), (7, 25)):
        assert np.array_equal(native.logits(prompt(length), chunk=chunk), whole), f"in chunks of {chunk}"


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family](seed=2)
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path, dtype=torch.bfloat16)))
    for length in few((20, 110), (40,)):
        reference = tiny_gemma4.reference_logits(model, prompt(length))
        got = native.logits(prompt(length))
        allowed = tolerance(model, prompt(length), processor=BF16_TOLERANCE)
        assert relative_error(got, reference) < allowed, f"{length} tokens"
        assert np.array_equal(native.logits(prompt(length), chunk=9), got), f"{length} tokens in chunks"


SHAPES: dict[str, dict[str, Any]] = {
    "shared layers of both types behind one of each": {"num_kv_shared_layers": 5},
    "nothing shared": {"num_kv_shared_layers": 0, "use_double_wide_mlp": False},
    "no per-layer embeddings": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    "heads of one size": {"global_head_dim": 32},
    "a window of one": {"sliding_window": 1},
    "a window of a page": {"sliding_window": 16},
    "no softcap": {"final_logit_softcapping": None},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "all pairs of full layers rotate": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.0, "rope_theta": 1_000_000.0},
        }
    },
    "other frequencies": {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2_000.0},
        }
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_f32_of_other_shapes(tmp_path: Path, shape: str) -> None:
    model = tiny_gemma4.ple_shared(seed=3, **SHAPES[shape])
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path)))
    token_ids = prompt(few(70, 40))
    reference = tiny_gemma4.reference_logits(model, token_ids)
    assert relative_error(native.logits(token_ids), reference) < tolerance(model, token_ids, processor=F32_TOLERANCE)


@pytest.mark.parametrize("changes", [{"top_k_experts": 1}, {"top_k_experts": 8}, {"num_experts": 5}])
def test_f32_of_other_mixtures(tmp_path: Path, changes: dict[str, int]) -> None:
    model = tiny_gemma4.moe(seed=4, **changes)
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path)))
    token_ids = prompt(few(70, 40))
    reference = tiny_gemma4.reference_logits(model, token_ids)
    assert relative_error(native.logits(token_ids), reference) < tolerance(model, token_ids, processor=F32_TOLERANCE)


# Mean KL, as in test_parity.py. Random models amplify what quantising rounds, and mixtures may choose another expert;
# the bounds are twice the most that was measured over three seeds of each family (0.077 and 1.31).
@pytest.mark.parametrize(("weights", "bound"), [("int8", 0.16), ("int4", 2.6)])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised(tmp_path: Path, family: str, weights: str, bound: float) -> None:
    model = FAMILIES[family](seed=5)
    native = load(open_checkpoint(tiny_gemma4.save(model, tmp_path)), weights=weights)
    token_ids = prompt(few(100, 50))
    p = torch.log_softmax(tiny_gemma4.reference_logits(model, token_ids).double(), -1)
    q = torch.log_softmax(torch.from_numpy(native.logits(token_ids)).double(), -1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < bound


# --- drafts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centroids", [0, 32], ids=["full head", "centroids"])
@pytest.mark.parametrize("family", FAMILIES)
def test_drafts(tmp_path: Path, family: str, centroids: int) -> None:
    model = FAMILIES[family](seed=6)
    assistant = tiny_gemma4.assistant_for(model, centroids=centroids, seed=7)
    opened = open_checkpoint(tiny_gemma4.save(model, tmp_path / "target"))
    saved_assistant = tiny_gemma4.save(assistant, tmp_path / "assistant")
    drafter = load_assistant(open_assistant(saved_assistant), opened, load(opened))
    lengths = (2, 17, WINDOW, WINDOW + 1, WINDOW + 2, WINDOW + 3, 40, 110)
    for length in few(lengths, (2, WINDOW + 2, 40)):
        expected, reference = reference_drafts(model, assistant, prompt(length), 6)
        drafts, logits = drafter.draft(prompt(length), 6)
        scored = VOCABULARY if centroids == 0 else VOCABULARY * 4 // 32
        check_drafts(drafts, logits, expected, reference.numpy(), scored=scored, processor=F32_TOLERANCE)
        again, same_logits = drafter.draft(prompt(length), 6, chunk=5)
        assert again == drafts, f"{length} tokens in chunks"
        assert np.array_equal(same_logits, logits), f"{length} tokens in chunks"


def test_bf16_drafts(tmp_path: Path) -> None:
    model = tiny_gemma4.ple_shared(seed=8)
    assistant = tiny_gemma4.assistant_for(model, seed=9)
    saved = tiny_gemma4.save(model, tmp_path / "target", dtype=torch.bfloat16)
    saved_assistant = tiny_gemma4.save(assistant, tmp_path / "assistant", dtype=torch.bfloat16)
    opened = open_checkpoint(saved)
    drafter = load_assistant(open_assistant(saved_assistant), opened, load(opened))
    expected, reference = reference_drafts(model, assistant, prompt(60), 1)
    drafts, logits = drafter.draft(prompt(60), 1)
    check_drafts(drafts, logits, expected, reference.numpy(), scored=VOCABULARY, processor=BF16_TOLERANCE)


# --- text --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assisted_text() -> Callable[[str], list[int]]:
    """What transformers generates from prompt(20) with a family's model and assistant: greedy, so it is the same with
    any assistant, and generated once."""

    @functools.cache
    def generated(family: str) -> list[int]:
        model = FAMILIES[family](seed=10)
        assistant = tiny_gemma4.assistant_for(model, centroids=0, seed=11)
        # Of 20, which random models would reject, in every round.
        assistant.generation_config.num_assistant_tokens = 2
        text: list[int] = model.generate(
            torch.tensor([prompt(20)]),
            assistant_model=assistant,
            do_sample=False,
            max_new_tokens=few(220, 24),
            eos_token_id=None,
            pad_token_id=0,
        )[0, 20:].tolist()
        return text

    return generated


@pytest.mark.parametrize("centroids", [0, 32], ids=["full head", "centroids"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_assisted_generation(
    tmp_path: Path, assisted_text: Callable[[str], list[int]], family: str, centroids: int
) -> None:
    model = FAMILIES[family](seed=10)
    assistant = tiny_gemma4.assistant_for(model, centroids=centroids, seed=11)
    token_ids, count = prompt(20), few(220, 24)
    expected = assisted_text(family)
    directory = tiny_gemma4.save(model, tmp_path / "target")
    drafter = tiny_gemma4.save(assistant, tmp_path / "target-assistant")
    assert len(expected) == count
    for draft_length in few((None, 4), (4,)):
        with Engine(directory, drafter=drafter, lookup=False, draft_length=draft_length, threads=2) as engine:
            completion = engine.generate(token_ids, SamplingParams(max_tokens=count, ignore_eos=True))
        check_greedy_text(model, token_ids, completion.token_ids, expected)
        assert completion.stats.drafted > 0

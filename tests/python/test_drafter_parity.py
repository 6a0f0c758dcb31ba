"""Drafters of Gemma 4's kind for Gemma 3, and reduced heads for both, against transformers.

A reduced head is ours, so what it makes of the assistant's state is computed here from the target's own head.
Tolerances are those of test_gemma4_parity.py, and on a GPU or its emulation those of tested_device.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

import tiny_checkpoint
import tiny_gemma4
from draftwerk import Engine, SamplingParams, _core
from draftwerk.loading import check_fits, open_assistant, open_checkpoint
from draftwerk.weights import load_assistant
from tested_device import DRAFT_TOLERANCE, GPU, check_drafts, few, load, relative_error
from tiny_drafters import ReducedHead, reduced_head, reference_drafts, save_reduced

F32_TOLERANCE = 1e-4
BF16_TOLERANCE = 2e-2
WINDOW = 24
TOKENS = 96
LENGTHS = (2, 17, WINDOW, WINDOW + 1, WINDOW + 2, WINDOW + 3, 40, 110)
LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
# What scores the tokens: the assistant's own head, or rows of the target's, each also behind centroids.
HEADS = ("own", "own, centroids", "reduced", "reduced, centroids")


def target_of(family: str) -> transformers.PreTrainedModel:
    if family == "gemma3":
        return tiny_checkpoint.tiny_model(seed=6)
    if family == "gemma3, linear RoPE":
        return tiny_checkpoint.tiny_model(seed=6, rope_parameters=LINEAR)
    # Its logits are capped, near enough to 30 that the cap shows.
    return tiny_gemma4.dense_k_eq_v(seed=6, logit_scale=6.0)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return [tiny_gemma4.BOS_TOKEN_ID, *rng.integers(3, tiny_gemma4.VOCABULARY, length - 1).tolist()]


class Pair:
    """A target and a drafter for it, in transformers' form and in ours."""

    def __init__(self, directory: Path, family: str, head: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = target_of(family)
        centroids = "centroids" in head
        own = head.startswith("own")
        self.assistant = tiny_gemma4.assistant_for(self.model, centroids=32 if centroids and own else 0, seed=7)
        self.head: ReducedHead | None = None
        self.target_path = tiny_gemma4.save(self.model, directory / "target", dtype=dtype)
        if own:
            self.path = tiny_gemma4.save(self.assistant, directory / "drafter", dtype=dtype)
        else:
            self.head = reduced_head(self.model, TOKENS, centroids=16 if centroids else 0, top_k=3)
            self.path = save_reduced(self.assistant, self.head, directory / "drafter", dtype=dtype)
        target, drafter = open_checkpoint(self.target_path), open_assistant(self.path)
        check_fits(drafter, target)
        self.drafter: _core.MtpModel = load_assistant(drafter, target, load(target))

    def reference(self, token_ids: list[int], count: int) -> tuple[list[int], npt.NDArray[np.float32]]:
        drafts, logits = reference_drafts(self.model, self.assistant, token_ids, count, self.head)
        return drafts, logits.numpy()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["gemma3", "gemma3, linear RoPE", "gemma4"])
def test_drafts(tmp_path: Path, family: str, head: str) -> None:
    pair = Pair(tmp_path, family, head)
    drafted = set()
    scored = tiny_gemma4.VOCABULARY if pair.head is None else TOKENS
    if "centroids" in head:
        scored = scored * 4 // 32 if pair.head is None else TOKENS * 3 // 16
    for length in few(LENGTHS, (2, WINDOW + 2)):
        expected, reference = pair.reference(prompt(length), 6)
        drafts, logits = pair.drafter.draft(prompt(length), 6)
        check_drafts(drafts, logits, expected, reference, scored=scored, processor=F32_TOLERANCE)
        again, same_logits = pair.drafter.draft(prompt(length), 6, chunk=5)
        assert again == drafts, f"{length} tokens in chunks"
        assert np.array_equal(same_logits, logits), f"{length} tokens in chunks"
        drafted.update(expected)
    assert len(drafted) > few(5, 1)


@pytest.mark.parametrize("head", ["reduced", "reduced, centroids"])
def test_bf16_drafts(tmp_path: Path, head: str) -> None:
    pair = Pair(tmp_path, "gemma3", head, torch.bfloat16)
    _, reference = pair.reference(prompt(60), 1)
    _, logits = pair.drafter.draft(prompt(60), 1)
    scored = np.isfinite(logits) & np.isfinite(reference)  # rounding may choose another centroid
    assert scored.sum() >= TOKENS * 2 // 16
    allowed = BF16_TOLERANCE if GPU is None else DRAFT_TOLERANCE
    assert relative_error(logits[scored], torch.from_numpy(reference[scored])) < allowed


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_k=20, top_p=0.95, seed=3)])
@pytest.mark.parametrize("head", HEADS)
def test_an_engine_drafts_with_it_and_says_the_same(tmp_path: Path, head: str, sampling: SamplingParams) -> None:
    pair = Pair(tmp_path, "gemma3", head)
    params = SamplingParams(
        max_tokens=few(120, 20), ignore_eos=True, temperature=sampling.temperature, top_k=sampling.top_k,
        top_p=sampling.top_p, seed=sampling.seed,
    )  # fmt: skip
    options: dict[str, Any] = {"threads": 2, "kv_memory": "16MiB"}  # beside what else is on a GPU
    with Engine(pair.target_path, drafter="none", **options) as engine:
        expected = engine.generate(prompt(20), params).token_ids
    for draft_length in few((1, 5), (5,)):
        with Engine(pair.target_path, drafter=pair.path, lookup=False, draft_length=draft_length, **options) as engine:
            assert engine.info.drafter == "mtp"
            completion = engine.generate(prompt(20), params)
        assert completion.token_ids == expected
        assert completion.stats.drafted > few(100, 15)

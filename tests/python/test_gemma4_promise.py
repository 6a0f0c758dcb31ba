"""The promise of test_promise.py for every family of Gemma 4 and for MTP drafters of both Gemmas: who drafts changes no
token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_checkpoint
import tiny_gemma4
from test_promise import EXAMPLES, TINY_POOL, Case, Setup, Subject, check, setups, subject_of
from tested_device import few
from tiny_drafters import reduced_head, save_reduced
from tiny_gemma4 import FAMILIES

__all__ = ["subject_of"]  # the fixture

# The last ones choose among few tokens, and noise says more than the logits: drafts of a random model are accepted.
FEW = dict.fromkeys((5, 9, 17), 600.0)
_PLAIN = min(20, len(TINY_POOL) * 2 // 3)
CASES = [
    *TINY_POOL[:_PLAIN],
    *(
        Case(case.prompt, replace(case.params, temperature=20.0, logit_bias=FEW, seed=i))
        for i, case in enumerate(TINY_POOL[_PLAIN : _PLAIN + 6])
    ),
]
# What the matrices are stored as, and what they are loaded as.
VARIANTS = {"f32": (torch.float32, "auto"), "bf16": (torch.bfloat16, "auto"), "int8": (torch.bfloat16, "int8")}
TARGETS = {**FAMILIES, "gemma3": tiny_checkpoint.tiny_model}
# Whose drafters have reduced heads, with so many centroids.
REDUCED = {"gemma3": 32, "dense_k_eq_v": 0}
Subjects = Callable[[str, str], tuple[Subject, str]]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, subject_of: Callable[..., Subject]) -> Subjects:
    """By family and variant: the target, and the path of its drafter."""
    root = tmp_path_factory.mktemp("gemma4")
    made: dict[tuple[str, str], tuple[Subject, str]] = {}

    def make(family: str, variant: str) -> tuple[Subject, str]:
        if (family, variant) not in made:
            dtype, weights = VARIANTS[variant]
            model = TARGETS[family](seed=12)
            directory: Path = root / f"{family}-{variant}"
            tiny_gemma4.save(model, directory, dtype=dtype)
            path = directory.with_name(directory.name + "-drafter")
            if family in REDUCED:
                head = reduced_head(model, 320, centroids=REDUCED[family], top_k=REDUCED[family] // 4)
                drafter = save_reduced(tiny_gemma4.assistant_for(model, seed=13), head, path, dtype=dtype)
            else:
                # One with centroids, the others without.
                assistant = tiny_gemma4.assistant_for(model, centroids=32 if family == "ple_shared" else 0, seed=13)
                drafter = tiny_gemma4.save(assistant, path, dtype=dtype)
            made[family, variant] = subject_of(directory, weights), str(drafter)
        return made[family, variant]

    return make


@settings(
    max_examples=int(EXAMPLES or 40),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    setup=setups,
    family=st.sampled_from(sorted(TARGETS)),
    variant=st.sampled_from(sorted(VARIANTS)),
    mtp=st.booleans(),
    tight=st.booleans(),
    picks=st.sets(st.integers(0, len(CASES) - 1), min_size=1),
)
def test_random_setups(
    subjects: Subjects, setup: Setup, family: str, variant: str, mtp: bool, tight: bool, picks: set[int]
) -> None:
    subject, drafter = subjects(family, variant)
    if mtp:
        setup = replace(setup, drafter=drafter)
    if tight:
        setup = replace(setup, kv_memory=600_000 if variant == "f32" else 300_000)
    check(subject, [CASES[i] for i in sorted(picks)], setup)


@pytest.mark.parametrize("draft_length", few([1, 2, 5, 8], [5]))
@pytest.mark.parametrize("family", TARGETS)
def test_every_family_with_its_drafter(subjects: Subjects, family: str, draft_length: int) -> None:
    subject, drafter = subjects(family, "bf16")
    stats = check(subject, CASES, Setup(drafter, draft_length, batch=6, prefix_cache=True, rounds=2))
    assert stats["drafters"]["mtp"]["drafted"] + stats["drafters"]["lookup"]["drafted"] == stats["drafted"]
    assert stats["drafters"]["mtp"]["accepted"] > 0


def test_preemption_with_a_drafter(subjects: Subjects) -> None:
    subject, drafter = subjects("ple_shared", "bf16")
    setup = Setup(drafter, 4, batch=16, kv_memory=300_000, max_step_rows=128, prefill_chunk=32, rounds=few(2, 1))
    stats = check(subject, CASES, setup)
    assert stats["preemptions"] > 0

"""Tiny targets and drafters of training's own classes, and text for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import tiny_checkpoint
import tiny_gemma4
from draftwerk.loading import Checkpoint, open_checkpoint
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.initial import start_from_target
from draftwerk.training.shape import DrafterShape
from draftwerk.training.shards import Text
from draftwerk.training.target import FrozenTarget
from tiny_drafters import reduced_head, save_reduced

VOCABULARY = tiny_gemma4.VOCABULARY
WINDOW = 24
HEADS = ("own", "own, centroids", "reduced", "reduced, centroids")
MODELS: dict[str, Callable[..., Any]] = {"gemma3": tiny_checkpoint.tiny_model, **tiny_gemma4.FAMILIES}


def frozen(model: Any, directory: Path, **options: Any) -> FrozenTarget:
    """The target of a model of transformers, which is saved in between."""
    saved = tiny_checkpoint.save(model, directory)
    return FrozenTarget(open_checkpoint(saved), **{"dtype": torch.float32, **options})


def tiny_drafter(target: FrozenTarget, *, draft_vocab_size: int = 100, seed: int = 0, **sizes: int) -> DrafterModule:
    """A drafter that starts from its target and drafts every third token or so; clusters are of tokens by chance."""
    shape = DrafterShape.for_target(target.config, draft_vocab_size=draft_vocab_size, **sizes)
    chosen = np.random.default_rng(seed).permutation(target.config.vocab_size)[:draft_vocab_size]
    drafter = DrafterModule(shape, torch.from_numpy(np.sort(chosen)))
    start_from_target(drafter, target, seed)
    return drafter


def published(
    directory: Path,
    head: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    vocab_size: int = VOCABULARY,
    cluster_size: int = 11,
) -> tuple[Path, Checkpoint]:
    """A drafter that training did not make, with one of HEADS, and its target, of hidden size 64."""
    model = tiny_gemma4.dense_k_eq_v(seed=6, vocab_size=vocab_size)
    target = tiny_gemma4.save(model, directory / "target", dtype=dtype)
    own, centroids = head.startswith("own"), "centroids" in head
    assistant = tiny_gemma4.assistant_for(
        model, centroids=vocab_size // cluster_size if own and centroids else 0, seed=7
    )
    if own:
        drafter = tiny_gemma4.save(assistant, directory / "published", dtype=dtype)
    else:
        reduced = reduced_head(model, 96, centroids=16 if centroids else 0, top_k=3)
        drafter = save_reduced(assistant, reduced, directory / "published", dtype=dtype)
    return drafter, open_checkpoint(target)


def random_ids(*shape: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Random tokens; each sequence begins with <bos>."""
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, shape)
    ids[..., 0] = tiny_checkpoint.BOS_TOKEN_ID
    return ids


def text(ids: npt.NDArray[Any], prompt_length: int = 1) -> Text:
    """As a target would have written it."""
    return Text(ids.astype(np.int32), prompt_length, kind=0, end=0)

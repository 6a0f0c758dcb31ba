"""The frozen target against the engine and against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from tiny_training import MODELS, random_ids

import tiny_checkpoint
from draftwerk.loading import open_checkpoint
from draftwerk.training.target import FrozenTarget
from draftwerk.weights import load_model

TOLERANCE = 1e-4  # of the largest value, in float32


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < TOLERANCE * float(expected.abs().max())


@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_engine(tmp_path: Path, family: str) -> None:
    model = MODELS[family](seed=1)
    target = tiny_training.frozen(model, tmp_path)
    ids = random_ids(60)
    native = load_model(open_checkpoint(tmp_path), threads=1)
    logits = target.logits(target.features(torch.from_numpy(ids)[None]).states)[0]
    assert_close(logits, torch.from_numpy(native.logits(ids.tolist())))
    some = torch.tensor([5, 300, 7])
    assert_close(
        target.logits(target.features(torch.from_numpy(ids)[None]).states, target.embedding[some])[0], logits[:, some]
    )


@pytest.mark.parametrize("family", [name for name in MODELS if name != "gemma3"])
def test_keys_and_values_are_those_that_transformers_shares(tmp_path: Path, family: str) -> None:
    model = MODELS[family](seed=2)
    target = tiny_training.frozen(model, tmp_path)
    ids = torch.from_numpy(random_ids(2, 60))
    features = target.features(ids)
    with torch.inference_mode():
        shared = model(ids, use_cache=False, return_shared_kv_states=True).shared_kv_states
    assert features.keys.keys() == features.values.keys() == set(shared)
    for kind, (keys, values) in shared.items():
        assert_close(features.keys[kind], keys)
        assert_close(features.values[kind], values)


@pytest.mark.parametrize("family", MODELS)
def test_nothing_is_said(tmp_path: Path, family: str, capfd: pytest.CaptureFixture[str]) -> None:
    """No progress bars of transformers, and no warnings."""
    tiny_checkpoint.save(MODELS[family](seed=1), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    capfd.readouterr()
    FrozenTarget(checkpoint).features(torch.from_numpy(random_ids(2, 30)))
    assert capfd.readouterr() == ("", "")


def test_what_follows_a_sequence_changes_nothing(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=3), tmp_path)
    ids = torch.from_numpy(random_ids(1, 50))
    other = ids.clone()
    other[:, 40:] = 0
    assert torch.equal(target.features(ids).states[:, :40], target.features(other).states[:, :40])


def test_weights_are_as_the_engine_multiplies_by_them(tmp_path: Path) -> None:
    model = MODELS["gemma3"](seed=4)
    target = tiny_training.frozen(model, tmp_path)
    for view in open_checkpoint(tmp_path).tensors():
        weight = target.parameter(view.name)
        assert weight is not None
        expected = np.frombuffer(view.data, np.float32).reshape(view.shape)
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=1e-6)
    assert target.parameter("model.layers.0.nothing.weight") is None


def test_real_model_continues_as_it_should(real_model: str) -> None:
    """Dequantised and in bfloat16, and all the same for these tokens."""
    target = FrozenTarget(open_checkpoint(real_model))
    ids = [2, 818, 4083, 529, 506, 13379, 3958, 12502]
    for _ in range(8):
        states = target.features(torch.tensor([ids])).states
        ids.append(int(target.logits(states[:, -1]).argmax()))
    assert open_checkpoint(real_model).tokenizer.decode(ids[8:]) == " with the invention of the steam engine in"

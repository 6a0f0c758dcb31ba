"""What the engine samples is distributed as the softmax of the model's logits.

Gumbel-max sampling draws from softmax(logits / T) only if the noise is right and independent over tokens, positions and
seeds. The kernel has its own test in C++; here the whole way is tested: 204,800 draws through the engine, drafts and
batches included, each compared with the distribution that the model gives for its own prefix.

Every position has a distribution of its own, so draws are brought to a common one by the randomised probability
integral transform: with the tokens in a fixed order, u = P(before the token) + v P(token), v uniform, is uniform on
[0, 1) and independent of everything before if and only if the draws are right. The counts of u in bins are then tested
by chi-square. The order decides what shows best: by id, or from the most probable token down (temperature, filters).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from draftwerk import Engine, SamplingParams
from draftwerk.loading import open_checkpoint
from draftwerk.weights import load_model
from tiny_checkpoint import BOS_TOKEN_ID, save, tiny_model

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

VOCABULARY = 48
BINS = 64
# A chi-square of n degrees of freedom has mean n and variance 2n. Seeds are fixed: the test is not flaky.
STANDARD_DEVIATIONS = 5.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Wide logits have few likely tokens; these are flat enough for every token to be drawn.
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model(seed=9, vocab_size=VOCABULARY, logit_scale=0.5, **layers)
    return save(model, tmp_path_factory.mktemp("tiny"))


Draws = tuple[Array, Integers]  # logits [draws, vocabulary] before each drawn token; the tokens [draws]


@pytest.fixture(scope="module")
def draw(directory: Path) -> Callable[[SamplingParams, int, int], Draws]:
    """Samples `sequences` sequences of `length` tokens, seeds 0, 1, ..."""

    def draws(params: SamplingParams, sequences: int, length: int) -> Draws:
        with Engine(directory, drafter="random", draft_length=2, threads=1, kv_memory="256MiB") as engine:
            each = [replace(params, seed=seed, max_tokens=length, ignore_eos=True) for seed in range(sequences)]
            tokens = [list(done.token_ids) for done in engine.generate([[BOS_TOKEN_ID]] * sequences, each)]
            assert engine.stats()["accepted"] > 0
        model = load_model(open_checkpoint(directory), threads=1)
        # Row i holds the logits after <bos> and i tokens: the distribution of token i.
        logits = [model.logits([BOS_TOKEN_ID, *ids[:-1]]) for ids in tokens]
        return np.concatenate(logits).astype(np.float64), np.concatenate([np.array(ids) for ids in tokens])

    return draws


def softmax(logits: Array, temperature: float) -> Array:
    scaled = logits / temperature
    weights: Array = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def filtered(p: Array, top_k: int, top_p: float) -> Array:
    """The k most probable tokens, of these the fewest that reach `top_p` of their mass, renormalised."""
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    ranked[:, top_k:] = 0.0
    ranked /= ranked.sum(-1, keepdims=True)
    before = np.cumsum(ranked, -1) - ranked
    ranked[before >= top_p] = 0.0
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, ranked, -1)
    return np.asarray(kept / kept.sum(-1, keepdims=True))


def surprise(p: Array, tokens: Integers, *, by_probability: bool) -> float:
    """How many standard deviations the chi-square statistic of the transformed draws lies above its mean."""
    order = np.argsort(-p, axis=-1, kind="stable") if by_probability else np.tile(np.arange(p.shape[1]), (len(p), 1))
    ranked = np.take_along_axis(p, order, -1)
    place = np.argmax(order == tokens[:, None], axis=-1)
    rows = np.arange(len(p))
    mass = ranked[rows, place]
    assert (mass > 0).all(), "a token was drawn that has no probability"
    u = np.cumsum(ranked, -1)[rows, place] - np.random.default_rng(0).random(len(p)) * mass
    counts = np.bincount(np.minimum((u * BINS).astype(int), BINS - 1), minlength=BINS)
    expected = len(p) / BINS
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return float((chi_square - (BINS - 1)) / (2 * (BINS - 1)) ** 0.5)


def test_softmax(draw: Callable[[SamplingParams, int, int], Draws]) -> None:
    logits, tokens = draw(SamplingParams(temperature=1.0), 1024, 200)
    assert len(tokens) == 204_800
    assert np.bincount(tokens, minlength=VOCABULARY).min() > 100
    for by_probability in (False, True):
        p = softmax(logits, 1.0)
        assert surprise(p, tokens, by_probability=by_probability) < STANDARD_DEVIATIONS
    # And it would have shown: 5% of temperature, or one token's logit off by 0.5.
    assert surprise(softmax(logits, 1.05), tokens, by_probability=True) > 2 * STANDARD_DEVIATIONS
    shifted = logits + 0.5 * (np.arange(VOCABULARY) == int(np.bincount(tokens).argmax()))
    assert surprise(softmax(shifted, 1.0), tokens, by_probability=False) > 2 * STANDARD_DEVIATIONS


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 12, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.9)]
)
def test_temperature_and_filters(
    draw: Callable[[SamplingParams, int, int], Draws], temperature: float, top_k: int, top_p: float
) -> None:
    logits, tokens = draw(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p), 64, 400)
    p = filtered(softmax(logits, temperature), top_k or VOCABULARY, top_p)
    for by_probability in (False, True):
        assert surprise(p, tokens, by_probability=by_probability) < STANDARD_DEVIATIONS


def test_seeds_are_independent(directory: Path) -> None:
    """One position, many seeds: plain counts of each token against its probability."""
    draws = 20_000
    prompt = [BOS_TOKEN_ID, 7, 8, 9]
    with Engine(directory, drafter="none", threads=1) as engine:
        each = [SamplingParams(temperature=1.0, seed=seed, max_tokens=1, ignore_eos=True) for seed in range(draws)]
        tokens = [done.token_ids[0] for done in engine.generate([prompt] * draws, each)]
    logits = load_model(open_checkpoint(directory), threads=1).logits(prompt)[-1:]
    expected = draws * softmax(logits.astype(np.float64), 1.0)[0]
    assert expected.min() > 5
    counts = np.bincount(tokens, minlength=VOCABULARY)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < VOCABULARY - 1 + STANDARD_DEVIATIONS * (2 * (VOCABULARY - 1)) ** 0.5

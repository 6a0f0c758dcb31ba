"""How a model is served, in words, for the engine, and for the texts that its drafter learns from."""

from __future__ import annotations

import pytest

from draftwerk import SamplingParams
from draftwerk.training.errors import TrainingError
from draftwerk.training.sampling import Sampling
from draftwerk.training.text import KINDS, kinds_of_texts


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(), "temperature 1, top_k 64, top_p 0.95"),
        (Sampling(0.7, 0, 1.0), "temperature 0.7"),
        (Sampling(0.7, 0, 0.9), "temperature 0.7, top_p 0.9"),
        (Sampling(0.0), "greedy"),
    ],
)
def test_it_has_words(sampling: Sampling, words: str) -> None:
    assert str(sampling) == words


def test_the_engine_takes_it() -> None:
    assert Sampling(0.6, 20, 0.8).params == SamplingParams(temperature=0.6, top_k=20, top_p=0.8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 0, 1.0), "temperature = -1: must be 0, or 0.001 to 100"),
        ((1e-4, 0, 1.0), "temperature = 0.0001: must be 0, or 0.001 to 100"),
        ((float("nan"), 0, 1.0), "temperature = nan: must be 0, or 0.001 to 100"),
        ((1.0, -1, 1.0), "top_k = -1: must be 0 to 2147483647"),
        ((1.0, 0, 0.0), "top_p = 0: must be more than 0, and at most 1"),
        ((1.0, 0, float("nan")), "top_p = nan: must be more than 0, and at most 1"),
    ],
)
def test_values_out_of_range(values: tuple[float, int, float], message: str) -> None:
    with pytest.raises(TrainingError) as refused:
        Sampling(*values)
    assert str(refused.value) == message


def test_texts_are_sampled_as_the_model_is_served() -> None:
    assert kinds_of_texts(None) == KINDS
    served = Sampling(0.6, 20, 0.8)
    assert [(kind.share, kind.sampling) for kind in kinds_of_texts(served)] == [(1.0, served)]
    # A greedy text comes once for each prompt; what is there for its second turn has no share of the first.
    greedy, then = kinds_of_texts(Sampling(0.0))
    assert (greedy.share, str(greedy.sampling), then.share) == (1.0, "greedy", 0.0)
    assert then.sampling.temperature > 0.0

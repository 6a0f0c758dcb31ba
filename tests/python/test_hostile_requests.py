"""Whatever a request holds: a completion, RequestError or QueueFull, and the engine lives on."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftwerk import Engine, SamplingParams
from fake_checkpoint import NATIVE_MODULE_BUILT

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
import fuzz_requests

pytestmark = pytest.mark.skipif(not NATIVE_MODULE_BUILT, reason="the native module is not built")


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with fuzz_requests.tiny_engine(tmp_path_factory.mktemp("tiny")) as engine:
        yield engine


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_hostile_requests(seed: int, tiny_engine: Engine) -> None:
    prompt, params = fuzz_requests.random_request(random.Random(seed), tiny_engine.info.vocab_size)
    fuzz_requests.check(tiny_engine, prompt, params)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(fuzz_requests.FIELDS))
def test_one_hostile_field(seed: int, name: str, tiny_engine: Engine) -> None:
    fields = {"max_tokens": 4, name: fuzz_requests.any_value(random.Random(seed))}
    fuzz_requests.check(tiny_engine, [2, 3], SamplingParams(**fields))


def test_most_sensible_requests_are_served(tiny_engine: Engine) -> None:
    rng = random.Random(0)
    served = 0
    for _ in range(50):
        names = rng.sample(fuzz_requests.FIELDS, 4)
        fields = {name: fuzz_requests.sensible_value(rng, name, tiny_engine.info.vocab_size) for name in names}
        served += fuzz_requests.check(tiny_engine, [2, 3, 4], SamplingParams(**{"max_tokens": 6, **fields}))
    assert served > 30

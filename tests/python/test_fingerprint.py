"""Fingerprints: equal where the output has to be equal, different where anything may make it differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny

from draftwerk import Engine, RequestError, SamplingParams
from draftwerk.loading import open_checkpoint
from draftwerk.requests import output_fingerprint
from draftwerk.weights import fingerprint
from fake_checkpoint import Config, FakeCheckpoint, FakeTensor

WITHOUT_INFLUENCE = {
    "drafting": False,
    "max_draft_length": 3,
    "salt": "tenant",
    "logprobs": 2,
    "special_tokens": True,
}
WITH_INFLUENCE: dict[str, Any] = {
    "max_tokens": 257,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.75,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.125,
    "frequency_penalty": -0.125,
    "logit_bias": {7: 2.5},
    "seed": 2**64 - 1,
    "stop": ["é"],
    "stop_token_ids": [9],
    "ignore_eos": True,
}


def test_every_parameter_counts_or_has_no_influence() -> None:
    assert {field.name for field in fields(SamplingParams)} == {*WITHOUT_INFLUENCE, *WITH_INFLUENCE}
    plain = output_fingerprint(1, [2, 3], SamplingParams())
    for name, value in WITHOUT_INFLUENCE.items():
        assert output_fingerprint(1, [2, 3], replace(SamplingParams(), **{name: value})) == plain
    changed = [
        output_fingerprint(1, [2, 3], replace(SamplingParams(), **{name: value}))
        for name, value in WITH_INFLUENCE.items()
    ]
    others = [output_fingerprint(2, [2, 3], SamplingParams())]
    others += [output_fingerprint(1, ids, SamplingParams()) for ids in ([2], [3, 2], [2, 3, 0], [2, 259])]
    everything = [plain, *changed, *others]
    assert len(set(everything)) == len(everything)
    assert all(0 <= value < 2**64 for value in everything)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"stop": ["a", "b"]}, {"stop": ("b", "a", "b")}),
        ({"stop_token_ids": [5, 6]}, {"stop_token_ids": (6, 5, 5)}),
        ({"logit_bias": {1: 2, 3: 4}}, {"logit_bias": {3: 4.0, 1: 2.0}}),
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"temperature": 0.7}, {"temperature": float(np.float32(0.7))}),
        ({"seed": 5}, {"seed": np.int64(5)}),
    ],
)
def test_ways_to_say_the_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = (output_fingerprint(1, [2], SamplingParams(**values)) for values in (one, other))
    assert first == second
    assert output_fingerprint(1, (2,), SamplingParams(**other)) == output_fingerprint(
        1, np.array([2]), SamplingParams(**one)
    )


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    params = SamplingParams(temperature=0.7, top_k=64, seed=3, stop=["END"], logit_bias={5: -1.0})
    assert f"{output_fingerprint(0x0123456789ABCDEF, [2, 818, 4083], params):016x}" == "ba6f869a9cd7638c"


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("seed", -1), ("stop", "x"), ("logit_bias", 5)])
def test_what_cannot_be_requested_has_none(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name):
        output_fingerprint(1, [2], replace(SamplingParams(), **{name: value}))
    with pytest.raises(RequestError, match="prompt"):
        output_fingerprint(1, [-2], SamplingParams())


# --- of the weights --------------------------------------------------------------------------------------------------


def flipped(position: int) -> FakeTensor:
    view = FakeTensor()
    view.data[position] ^= 1
    return view


def of(*views: FakeTensor, weights: str = "auto", arithmetic: str = "cpu avx2", **changes: Any) -> int:
    return fingerprint(FakeCheckpoint(views=list(views), **changes), weights, arithmetic)


def test_equal_models_have_equal_fingerprints() -> None:
    assert of(FakeTensor(), FakeTensor("v")) == of(
        FakeTensor(), FakeTensor("v"), name="renamed", path=Path("elsewhere")
    )
    assert 0 <= of(FakeTensor()) < 2**64


@pytest.mark.parametrize(
    "changed",
    [
        lambda: of(flipped(0)),
        lambda: of(flipped(4095)),
        lambda: of(flipped(-1)),
        lambda: of(flipped(-4096)),
        lambda: of(FakeTensor("other")),
        lambda: of(FakeTensor(dtype="f16")),
        lambda: of(FakeTensor(shape=(256, 64))),
        lambda: of(FakeTensor(), FakeTensor()),
        lambda: of(),
        lambda: of(FakeTensor(), weights="int8"),
        lambda: of(FakeTensor(), weights="f32"),
        lambda: of(FakeTensor(), arithmetic="cpu avx512"),
        lambda: of(FakeTensor(), config=Config(max_position_embeddings=99)),
        lambda: of(FakeTensor(), eos_token_ids=(1, 5)),
    ],
)
def test_whatever_differs_shows(changed: Callable[[], int]) -> None:
    assert changed() != of(FakeTensor())


def test_only_samples_are_read_and_nothing_stays_resident() -> None:
    view = flipped(10_000)
    assert of(view) == of(FakeTensor())  # between the samples
    assert view.released == [(0, view.data.nbytes)]


def test_the_engine_says_what_it_loaded(core: ModuleType, tmp_path: Path) -> None:
    path = tiny.TinyGguf().write(tmp_path / "tiny.gguf")
    found = []
    for options in ({}, {"threads": 1, "drafter": "none", "max_context": 64}, {"weights": "int8"}):
        with Engine(path, **options) as engine:
            found.append(engine.info.fingerprint)
            assert engine.info.end_token_ids == open_checkpoint(path).eos_token_ids
    assert found[0] == found[1] != found[2]

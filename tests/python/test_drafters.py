"""What `drafter` stands for: found, refused or passed over."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import tiny_checkpoint
import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.drafters import SyntheticDrafter, choose_drafters
from draftwerk.loading import CheckpointError, open_checkpoint

MODEL = tiny_gemma4.dense_k_eq_v(seed=1)
OTHER = tiny_gemma4.dense_k_eq_v(seed=1, hidden_size=96)
PROMPT = [2, 5, 9, 17]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tiny_gemma4.save(MODEL, tmp_path / "model")


def beside(directory: Path) -> Path:
    return directory.with_name(directory.name + "-assistant")


def test_auto_takes_the_drafter_beside_the_model(directory: Path) -> None:
    with Engine(directory, threads=1) as engine:
        assert engine.info.drafter == "lookup"
        expected = engine.generate(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True)).token_ids
    tiny_gemma4.save(tiny_gemma4.assistant_for(MODEL), beside(directory))
    with Engine(directory, threads=1, draft_length=3) as engine:
        assert engine.info.drafter == "mtp+lookup"
        completion = engine.generate(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
        assert engine.stats()["drafters"]["mtp"]["drafted"] > 0
    assert completion.token_ids == expected
    with Engine(directory, threads=1, lookup=False) as engine:
        assert engine.info.drafter == "mtp"
    for name in ("lookup", "none", "random"):
        with Engine(directory, threads=1, drafter=name) as engine:
            assert engine.info.drafter == name


def test_auto_leaves_alone_what_is_no_drafter(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gemma4.save(MODEL, beside(directory))  # a whole model of that name
    assert choose_drafters("auto", open_checkpoint(directory), lookup=True).names == ("lookup",)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["misfit", "damaged"])
def test_auto_starts_without_a_drafter_that_cannot_be_used(
    directory: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_gemma4.save(tiny_gemma4.assistant_for(OTHER if kind == "misfit" else MODEL), beside(directory))
    if kind == "damaged":
        weights = beside(directory) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, logger="draftwerk"):
        assert choose_drafters("auto", open_checkpoint(directory), lookup=True).names == ("lookup",)
    assert [record.message.startswith("drafting by lookup alone") for record in caplog.records] == [True]
    with pytest.raises(CheckpointError):  # asked for by name it is refused
        choose_drafters(beside(directory), open_checkpoint(directory), lookup=True)


def test_auto_looks_for_nothing_beside_a_model_that_has_no_drafters(tmp_path: Path) -> None:
    directory = tiny_checkpoint.save(tiny_checkpoint.tiny_model(), tmp_path / "gemma3")
    tiny_gemma4.save(tiny_gemma4.assistant_for(MODEL), beside(directory))
    assert choose_drafters("auto", open_checkpoint(directory), lookup=True).names == ("lookup",)


def test_a_drafter_without_a_field_it_needs_is_one_line(directory: Path) -> None:
    drafter = tiny_gemma4.save(tiny_gemma4.assistant_for(MODEL), beside(directory))
    config = json.loads((drafter / "config.json").read_text())
    del config["text_config"]
    (drafter / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_config"):
        choose_drafters(drafter, open_checkpoint(directory), lookup=True)


@pytest.mark.parametrize("drafter", ["best", "./drafter.gguf", "", "auto "])
def test_a_name_that_is_none_is_refused(directory: Path, drafter: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, lookup, none, random"):
        choose_drafters(drafter, open_checkpoint(directory), lookup=True)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_a_synthetic_drafter_is_right_as_often_as_it_is_told(directory: Path, acceptance: float) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    with Engine(directory, threads=1, drafter="none") as engine:
        plain = engine.generate(PROMPT, params).token_ids
    drafter = SyntheticDrafter([[*PROMPT, *plain]], acceptance)
    with Engine(directory, threads=1, drafter=drafter, draft_length=1) as engine:
        completion = engine.generate(PROMPT, params)
    assert completion.token_ids == plain
    assert completion.stats.accepted / completion.stats.drafted == pytest.approx(acceptance, abs=0.12)


def test_a_synthetic_drafter_has_a_probability() -> None:
    with pytest.raises(ValueError, match=r"acceptance = 1\.5: must be 0 to 1"):
        SyntheticDrafter([], 1.5)

"""What `drafter` stands for: found, refused or passed over."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

import tiny_checkpoint
import tiny_gemma4
from draftwerk import Engine, SamplingParams
from draftwerk.drafters import SyntheticDrafter, choose_drafters
from draftwerk.loading import BUILTIN_MODELS, CheckpointError, builtin, open_checkpoint
from draftwerk.training.gguf_export import write_gguf
from tiny_drafters import reduced_head, save_reduced

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


@pytest.mark.parametrize("reduced", [False, True])
def test_a_gemma_3_may_have_a_drafter_beside_it(reduced: bool, tmp_path: Path) -> None:
    model = tiny_checkpoint.tiny_model()
    directory = tiny_checkpoint.save(model, tmp_path / "gemma3")
    assistant = tiny_gemma4.assistant_for(model)
    if reduced:
        save_reduced(assistant, reduced_head(model, 96), beside(directory))
    else:
        tiny_gemma4.save(assistant, beside(directory))
    chosen = choose_drafters("auto", open_checkpoint(directory), lookup=True)
    assert chosen.names == ("mtp", "lookup")
    assert chosen.assistant is not None
    assert chosen.assistant.config.draft_vocab_size == (96 if reduced else 0)


def test_a_built_in_model_has_the_drafter_that_comes_with_draftwerk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_checkpoint.tiny_model()
    directory = tiny_checkpoint.save(model, tmp_path / "gemma3")
    name = next(iter(BUILTIN_MODELS))
    monkeypatch.setattr(builtin, "_SHIPPED", tmp_path)
    target = dataclasses.replace(open_checkpoint(directory), path=name)  # as if it had been asked for by name
    assert choose_drafters("auto", target, lookup=True).names == ("lookup",)
    assert not caplog.records
    drafter = save_reduced(tiny_gemma4.assistant_for(model), reduced_head(model, 96), tmp_path / "drafter")
    write_gguf(drafter, tmp_path / BUILTIN_MODELS[name].drafter, matrices="q8_0", name=f"{name}-assistant")
    chosen = choose_drafters("auto", target, lookup=True)
    assert chosen.names == ("mtp", "lookup")
    assert chosen.assistant is not None
    assert chosen.assistant.name == f"{name}-assistant"


def test_a_drafter_without_a_field_it_needs_is_one_line(directory: Path) -> None:
    drafter = tiny_gemma4.save(tiny_gemma4.assistant_for(MODEL), beside(directory))
    config = json.loads((drafter / "config.json").read_text())
    del config["text_config"]
    (drafter / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="text_config"):
        choose_drafters(drafter, open_checkpoint(directory), lookup=True)


@pytest.mark.parametrize("drafter", ["best", "./drafter.gguf", "", "auto "])
def test_a_name_that_is_none_is_refused(directory: Path, drafter: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, lookup, none, or the path"):
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

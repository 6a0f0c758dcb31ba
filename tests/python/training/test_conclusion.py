"""The end of training runs of a tiny model: what is evaluated, on which prompts, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_training
import torch
from tiny_run import OPTIONS, Notes, begin, run
from tiny_training import HEADS
from tiny_writer import with_tokenizer

import tiny_checkpoint
from draftwerk.loading import Checkpoint, CheckpointError, open_assistant
from draftwerk.training.conclusion import conclude, evaluation_of_run
from draftwerk.training.evaluation import EvaluationOptions
from draftwerk.training.run import Run
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import read_options
from draftwerk.training.sampling import Sampling
from draftwerk.training.text import TextOptions
from fake_checkpoint import VOCABULARY

EVALUATION = EvaluationOptions(max_tokens=40, draft_length=3, timed_prompts=1)


@pytest.fixture(scope="module")
def trained(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run from a file of prompts, with a report."""
    where = tmp_path_factory.mktemp("runs")
    prompts = where / "prompts.txt"
    prompts.write_text("\n".join(f"Prompt {i}" for i in range(40)), encoding="utf-8")
    assert run(target, where / "run", prompts=str(prompts), clusters=0)
    assert finish(target, where / "run")
    return where / "run"


def finish(target: Checkpoint, directory: Path, notes: Notes | None = None, **changes: Any) -> bool:
    place = RunDirectory(directory)
    return conclude(
        place,
        read_options(place),
        target,
        notes or Notes(),
        **{"command": "the command", "threads": 1, "prompts": 6, "evaluation": EVALUATION, **changes},
    )


def test_a_run_ends_with_an_evaluation_and_a_report(trained: Path) -> None:
    values = json.loads((trained / "evaluation.json").read_text())
    # All that were set aside, though without them it would be fewer.
    assert (values["model"], values["drafter"], values["prompts"]) == ("tiny", "drafter", 8)
    assert values["format"] == 3
    assert values["prompts_from"] == "set aside from those given"
    assert [its["sampling"] for its in values["before"]] == [its["sampling"] for its in values["acceptance"]]
    assert values["acceptance"][0]["whole"]["rounds"] > 0
    # What fewer drafts bring, too, for both.
    assert all(len(its["tokens_per_step"]) == 4 for when in ("acceptance", "before") for its in values[when])
    # It learned something of a model whose text is far from random.
    after, before = (sum(its["whole"]["tokens_per_step"] for its in values[when]) for when in ("acceptance", "before"))
    assert after > before
    report = (trained / "report.html").read_text()
    assert "the command" in report
    assert "Sampled: temperature 1, top_k 64, top_p 0.95." in report
    assert not [path for path in trained.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("served", [None, Sampling(0.6, 20, 0.8), Sampling(0.0)])
def test_a_drafter_is_evaluated_as_its_model_will_be_served(served: Sampling | None) -> None:
    options = dataclasses.replace(OPTIONS, text=TextOptions(served=served))
    how = evaluation_of_run(options, EVALUATION, threads=3)
    sampled = served if served is not None and served.temperature > 0.0 else EVALUATION.sampled
    assert how == dataclasses.replace(EVALUATION, seed=OPTIONS.seed, threads=3, sampled=sampled)


def test_what_was_evaluated_is_only_reported_again(target: Checkpoint, trained: Path) -> None:
    before = (trained / "evaluation.json").read_bytes()
    (trained / "report.html").unlink()
    notes = Notes()
    assert finish(target, trained, notes)
    assert not notes.evaluated
    assert (trained / "evaluation.json").read_bytes() == before
    assert (trained / "report.html").exists()


def test_names_of_files_that_are_not_utf_8_keep_nothing_from_being_written(
    target: Checkpoint, trained: Path, tmp_path: Path
) -> None:
    named = shutil.copytree(trained / "drafter", tmp_path / os.fsdecode(b"drafter \xff"))
    checkpoint = dataclasses.replace(target, name=named.name)
    where = tmp_path / os.fsdecode(b"run \xff")
    assert run(checkpoint, where, start_from=str(named), tokens=300)
    assert finish(
        checkpoint, where, command=f"train --out {where}", evaluation=dataclasses.replace(EVALUATION, timed_prompts=0)
    )
    assert f"train --out {tmp_path}/run \\udcff" in (where / "report.html").read_text(encoding="utf-8")
    card = (where / "drafter" / "README.md").read_text(encoding="utf-8")
    assert "it started from the drafter drafter \\udcff" in card


def test_an_evaluation_of_another_format_is_done_again(target: Checkpoint, trained: Path, tmp_path: Path) -> None:
    place, notes = RunDirectory(shutil.copytree(trained, tmp_path / "run")), Notes()
    values = json.loads(place.evaluation.read_text())
    del values["format"]
    for its in values["acceptance"] + values["before"]:
        del its["tokens_per_step"]
    place.evaluation.write_text(json.dumps(values))
    assert finish(target, place.path, notes)
    assert notes.evaluated
    assert json.loads(place.evaluation.read_text())["format"] == 3


def test_text_that_was_written_for_steps_that_are_lost_is_no_step(
    target: Checkpoint, trained: Path, tmp_path: Path
) -> None:
    place, notes = RunDirectory(shutil.copytree(trained, tmp_path / "run")), Notes()
    last = place.entries()[-1]
    place.log({**last, "kind": "text", "step": last["step"] + 1, "shard": 9, "tokens": 5})
    assert finish(target, place.path, notes)
    assert not notes.evaluated


def test_an_evaluation_can_be_stopped(target: Checkpoint, trained: Path) -> None:
    before = (trained / "evaluation.json").read_bytes()
    (trained / "evaluation.json").write_bytes(b"{")
    notes = Notes()
    assert not finish(target, trained, notes, stop=lambda: len(notes.evaluated) >= 2)
    assert {what for what, _, _ in notes.evaluated} == {"drafts accepted, greedy"}
    (trained / "evaluation.json").write_bytes(before)


def test_a_drafter_is_gone_on_with(target: Checkpoint, trained: Path, tmp_path: Path) -> None:
    def tuned(directory: Path, **settings: Any) -> Path:
        start = str(trained / "drafter") if not (directory / "initial").exists() else "gone"
        options = dataclasses.replace(OPTIONS, start_from=start, tokens=600, layers=7, draft_vocab_size=3)
        place = RunDirectory(directory) if directory.exists() else begin(directory, options)
        Run(place, read_options(place), target, Notes(), device="cpu", threads=1, **settings).train()
        return directory

    def weights(directory: Path) -> dict[str, bytes]:
        tensors = safetensors.torch.load_file(directory / "model.safetensors")
        return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}

    tuned(tmp_path / "whole")
    assert weights(tmp_path / "whole" / "initial") == weights(trained / "drafter")
    assert weights(tmp_path / "whole" / "drafter") != weights(trained / "drafter")
    config = json.loads((tmp_path / "whole" / "drafter" / "config.json").read_text())
    assert config == json.loads((trained / "drafter" / "config.json").read_text())
    assert "the drafter drafter" in (tmp_path / "whole" / "drafter" / "README.md").read_text()
    # Killed before the first state, and gone on with where that drafter is gone.
    polls = iter(range(1000))
    tuned(tmp_path / "parts", stop=lambda: next(polls) == 30)
    tuned(tmp_path / "parts")
    assert weights(tmp_path / "parts" / "drafter") == weights(tmp_path / "whole" / "drafter")


@pytest.mark.parametrize("most_compared", [16_384, 64])
@pytest.mark.parametrize("head", HEADS)
def test_a_drafter_that_training_did_not_make_is_gone_on_with(
    tmp_path: Path, head: str, most_compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Google's are: for Gemma 4, with a head of its own, or with one of this project's."""
    monkeypatch.setattr("draftwerk.training.run.MOST_COMPARED", most_compared)
    published, checkpoint = tiny_training.published(tmp_path, head, vocab_size=VOCABULARY, cluster_size=13)
    target = with_tokenizer(Path(checkpoint.path))
    assert run(target, tmp_path / "run", start_from=str(published), tokens=600)
    assert finish(target, tmp_path / "run")
    assert (tmp_path / "run" / "vocabulary.npz").exists() == (most_compared == 64)
    assert open_assistant(tmp_path / "run" / "drafter").config == open_assistant(published).config
    values = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert values["acceptance"][0]["whole"]["rounds"] > 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_drafter_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint.tiny_model(vocab_size=VOCABULARY, hidden_size=96)
    checkpoint = with_tokenizer(tiny_checkpoint.save(other, tmp_path / "other"))
    options = dataclasses.replace(OPTIONS, start_from=str(trained / "drafter"))
    with pytest.raises(CheckpointError, match="it is for hidden size 64, and the model has 96"):
        Run(begin(tmp_path / "run", options), options, checkpoint, Notes())

"""Training runs of a tiny model: end to end, stopped, killed, gone on with, and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tiny_run
import torch
from tiny_run import OPTIONS, Notes, begin, log, run, weights

from draftwerk.loading import Checkpoint
from draftwerk.training import text
from draftwerk.training.errors import TrainingError
from draftwerk.training.prompts import read_prompts, set_aside
from draftwerk.training.run import Run
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, read_options
from draftwerk.training.shards import Text, count_shards
from draftwerk.training.text import TextOptions, TextProgress
from draftwerk.training.trainer import Trainer


@pytest.fixture(scope="module")
def whole(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Notes]:
    """A run that nobody stopped."""
    directory, notes = tmp_path_factory.mktemp("runs") / "whole", Notes()
    assert run(target, directory, notes=notes)
    return directory, notes


def test_a_run_writes_text_and_trains_on_it_as_it_comes(whole: tuple[Path, Notes]) -> None:
    directory, notes = whole
    planned = notes.steps[0].plan.steps
    assert [progress.figures.step for progress in notes.steps] == list(range(1, planned + 1))
    assert [entry["step"] for entry in log(directory, "step")] == list(range(1, planned + 1))
    last = notes.steps[-1]
    assert last.plan.steps == planned
    assert last.tokens == sum(progress.figures.tokens for progress in notes.steps)
    assert last.tokens == pytest.approx(OPTIONS.tokens, rel=0.1)
    shards = count_shards(directory / "text")
    assert shards > 1
    assert [entry["shard"] for entry in log(directory, "text")] == list(range(shards))
    assert last.written == sum(entry["tokens"] for entry in log(directory, "text"))
    assert {shard for shard, _ in notes.texts} == set(range(shards))
    # Not all text came before the first step.
    assert notes.steps[0].written < last.written
    assert 0.0 < last.writing < last.seconds


def test_what_it_leaves_is_a_drafter(whole: tuple[Path, Notes]) -> None:
    directory, _ = whole
    config = json.loads((directory / "drafter" / "config.json").read_text())
    assert config["draft_vocab_size"] == 64  # whole clusters
    assert (config["num_centroids"], config["centroid_intermediate_top_k"]) == (16, 4)
    tensors = safetensors.torch.load_file(directory / "drafter" / "model.safetensors")
    assert len(set(tensors["draft_token_ids"].tolist())) == 64
    assert tensors["masked_embedding.centroids.weight"].shape == (16, 64)
    assert not [path for path in directory.iterdir() if path.name.startswith(".")]
    assert not (directory / "features").exists()  # nobody needs them any more


def test_distributions_are_compared_over_the_most_frequent_tokens(
    target: Checkpoint, whole: tuple[Path, Notes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, and in one that goes on from its drafter, which drafts the same tokens in the same order."""
    monkeypatch.setattr("draftwerk.training.run.MOST_COMPARED", 4)
    monkeypatch.setattr("draftwerk.training.compared_tokens._BY_CHANCE", 0)
    assert run(target, tmp_path / "run", tokens=600)
    assert run(target, tmp_path / "next", tokens=600, start_from=str(tmp_path / "run" / "drafter"))
    told = [RunDirectory(tmp_path / name).vocabulary() for name in ("run", "next")]
    assert told[0] is not None
    assert told[1] is not None
    assert log(tmp_path / "run", "step")[0]["loss"] != pytest.approx(log(whole[0], "step")[0]["loss"], rel=1e-3)
    assert told[1].token_ids.tolist() == told[0].token_ids.tolist()
    assert told[1].counts.tolist() == told[0].counts.tolist()
    drafters = [tmp_path / name / "drafter" / "model.safetensors" for name in ("run", "next")]
    tensors = [safetensors.torch.load_file(drafter) for drafter in drafters]
    assert torch.equal(tensors[0]["draft_token_ids"], tensors[1]["draft_token_ids"])
    centroids = [its["masked_embedding.centroids.weight"] for its in tensors]
    assert not torch.equal(*centroids)


def test_a_run_is_a_function_of_what_it_is_told(target: Checkpoint, whole: tuple[Path, Notes], tmp_path: Path) -> None:
    directory, _ = whole
    assert run(target, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(directory)
    assert log(tmp_path / "again", "step") == log(directory, "step")
    assert run(target, tmp_path / "other", seed=6)
    assert weights(tmp_path / "other") != weights(directory)


@pytest.mark.parametrize("stop_at", ["the first text", "the target", "a text", "a step", "the last step"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    target: Checkpoint, whole: tuple[Path, Notes], tmp_path: Path, stop_at: str
) -> None:
    directory, complete = whole
    notes = Notes()
    stops = {
        "the first text": lambda: bool(notes.texts),
        "the target": lambda: "loading the target" in notes.phases,
        "a text": lambda: bool(notes.texts and notes.texts[-1][0] == 1 and notes.texts[-1][1].texts == 3),
        "a step": lambda: len(notes.steps) == 7,
        "the last step": lambda: len(notes.steps) == complete.steps[-1].plan.steps,
    }
    assert not run(target, tmp_path / "run", notes=notes, stop=stops[stop_at])
    assert (tmp_path / "run" / "drafter").exists() == (stop_at not in ("the first text", "the target"))
    rest = Notes()
    assert run(target, tmp_path / "run", notes=rest)
    assert [p.figures.step for p in (*notes.steps, *rest.steps)] == [p.figures.step for p in complete.steps]
    assert weights(tmp_path / "run") == weights(directory)
    for kind in ("step", "text"):
        assert log(tmp_path / "run", kind) == log(directory, kind)
    if rest.steps and notes.steps:
        assert rest.steps[0].seconds > notes.steps[-1].seconds


def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    model: Path, whole: tuple[Path, Notes], tmp_path: Path
) -> None:
    directory, complete = whole
    moments = random.Random(11)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tiny_run.__file__, str(model), str(tmp_path / "run")]
    duration = complete.steps[-1].seconds
    for kill in (True, True, False):
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            if not kill:
                assert process.wait() == 0
                break
            time.sleep(moments.uniform(0.2, 1.2) * duration / 2)
            process.kill()
        published = tmp_path / "run" / "drafter" / "model.safetensors"
        if published.exists():
            assert safetensors.torch.load_file(published)
    assert weights(tmp_path / "run") == weights(directory)
    for kind in ("step", "text"):
        assert log(tmp_path / "run", kind) == log(directory, kind)


class Clock:
    """Of a machine on which a text takes a second, and a batch, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        write, train = text._generate, Trainer._accumulate

        async def write_slowly(*arguments: Any) -> Text:
            written = await write(*arguments)
            self.now += 1.0
            return written

        def train_slowly(*arguments: Any) -> None:
            train(*arguments)
            self.now += 1.0

        monkeypatch.setattr(text, "_generate", write_slowly)
        monkeypatch.setattr(Trainer, "_accumulate", train_slowly)
        monkeypatch.setattr("draftwerk.training.run.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("draftwerk.training.trainer.time", SimpleNamespace(perf_counter=lambda: self.now))


def test_hours_are_kept(target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    notes = Notes()
    assert run(target, tmp_path / "run", notes=notes, tokens=None, hours=40.0 / 3600.0)
    plan = RunDirectory(tmp_path / "run").read()["plan"]
    assert plan["steps"] == notes.steps[-1].plan.steps
    assert 1 < len(notes.steps) <= plan["steps"]
    # It stops with the first step that ends after its time.
    assert all(progress.seconds <= 40.0 for progress in notes.steps[:-1])
    again = Notes()
    assert run(target, tmp_path / "run", notes=again)  # the time is up, or the steps are done
    assert not again.steps


@pytest.mark.parametrize("sizes", [{}, {"accumulate": 12}, {"tokens_per_batch": 4096}])
def test_hours_are_planned_for_whatever_a_step_is(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]
) -> None:
    """Many batches, so that a step needs more than one file of text, or one that is larger than such a file."""
    Clock(monkeypatch)
    notes = Notes()
    assert run(target, tmp_path / "run", notes=notes, tokens=None, hours=240.0 / 3600.0, **sizes)
    assert notes.steps[-1].seconds >= 0.8 * 240.0
    assert len(notes.steps) >= 0.9 * notes.steps[-1].plan.steps
    assert notes.steps[0].written < notes.steps[-1].written


def test_time_that_is_up_while_text_is_written_ends_the_run(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the first step, and once and for all."""
    clock, notes = Clock(monkeypatch), Notes()
    wrote = notes.writing

    def write_for_ever(shard: int, progress: TextProgress) -> None:
        wrote(shard, progress)
        clock.now += 1000.0 * (shard == 1)

    monkeypatch.setattr(notes, "writing", write_for_ever)
    assert run(target, tmp_path / "run", notes=notes, tokens=None, hours=500.0 / 3600.0)
    assert 1 <= [shard for shard, _ in notes.texts].count(1) <= OPTIONS.text.streams
    assert count_shards(tmp_path / "run" / "text") == 1
    steps = len(log(tmp_path / "run", "step"))
    assert 1 <= steps == len(notes.steps) < notes.steps[-1].plan.steps
    drafter = weights(tmp_path / "run")
    again = Notes()
    assert run(target, tmp_path / "run", notes=again)
    assert not again.texts
    assert not again.steps
    assert weights(tmp_path / "run") == drafter
    # A step is always taken, and what it needs is written.
    assert run(target, tmp_path / "short", tokens=None, hours=1e-6, accumulate=30)
    assert len(log(tmp_path / "short", "step")) == 1
    assert count_shards(tmp_path / "short" / "text") > 1


def test_prompts_are_copied(target: Checkpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One\nTwo\nThree\n", encoding="utf-8")
    assert run(target, tmp_path / "run", prompts=str(prompts), tokens=500)
    prompts.unlink()
    shutil.rmtree(tmp_path / "run" / "drafter")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert run(target, tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "drafter").exists()


def test_the_run_does_not_depend_on_the_working_directory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of models stay as they are, and a link has a name of its own."""
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(model)
    Path("mine.txt").write_text("One\n", encoding="utf-8")
    given = {"model": "link", "start_from": "./link"}
    told = read_options(begin(Path("one"), dataclasses.replace(OPTIONS, prompts="mine.txt", **given)))
    assert (told.model, told.start_from) == (str(tmp_path / "link"), str(tmp_path / "link"))
    assert RunDirectory(Path("one")).read()["options"]["prompts"] == str(tmp_path / "mine.txt")
    named = dataclasses.replace(OPTIONS, model="gemma-3-270m", start_from="google/gemma-4-E2B-it-assistant")
    assert read_options(begin(Path("two"), named)) == named


@pytest.mark.parametrize("threads", [1, 2, 0])
def test_threads_are_those_of_training_too(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    counts: set[int] = set()
    notes = Notes()
    monkeypatch.setattr(notes, "step", lambda _: counts.add(torch.get_num_threads()))
    place = begin(tmp_path / "run", dataclasses.replace(OPTIONS, tokens=500))
    torch.set_num_threads(3)
    try:
        assert Run(place, read_options(place), target, notes, device="cpu", threads=threads).train()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert counts == {threads or 3}


def test_text_is_written_with_the_weights_that_were_asked_for(target: Checkpoint, tmp_path: Path) -> None:
    written = {}
    for weights_type in ("auto", "int8"):
        notes = Notes()
        directory = tmp_path / weights_type
        stops = run(target, directory, notes=notes, stop=lambda notes=notes: bool(notes.texts), weights=weights_type)
        assert not stops
        written[weights_type] = json.loads((directory / "text" / "text.json").read_text())["fingerprint"]
    assert written["auto"] != written["int8"]
    values = json.loads((tmp_path / "auto" / "run.json").read_text())
    values["options"]["weights"] = "int8"
    (tmp_path / "auto" / "run.json").write_text(json.dumps(values))
    here = r"\(of the model's weights, --weights and the instruction set: cpu \w+ here\): go on with what it was begun"
    with pytest.raises(TrainingError, match=rf"holds text that was written with fingerprint = \w+, not \w+ {here}"):
        run(target, tmp_path / "auto")


def test_a_run_that_was_begun_before_there_were_weights_goes_on(tmp_path: Path) -> None:
    begin(tmp_path / "run", OPTIONS)
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    del values["options"]["weights"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(values))
    assert read_options(RunDirectory(tmp_path / "run")) == OPTIONS


def test_a_gradient_that_is_not_finite_before_there_is_a_drafter(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(TrainingError) as caught:
        run(target, tmp_path / "run")
    assert str(caught.value) == (
        "step 1: the gradient is not finite; begin in another directory with a smaller --learning-rate than 0.003"
    )


def test_there_is_a_whole_drafter_while_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drafter(weights: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.mkdir()
            (path / "config.json").write_text("the same")
            (path / "model.safetensors").write_text(weights)

        return write

    def seen() -> tuple[str, ...]:
        return tuple((directory.drafter / name).read_text() for name in ("config.json", "model.safetensors"))

    directory, moments = RunDirectory(tmp_path), set()
    directory.publish(drafter("first"))

    def watched(real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], None]:
        def move(path: Path, to: Path) -> None:
            moments.add(seen())
            real(path, to)
            moments.add(seen())

        return move

    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    directory.publish(drafter("second"))
    assert moments == {("the same", "first"), ("the same", "second")}
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_what_a_killed_run_left_of_a_drafter_is_replaced(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    (tmp_path / ".drafter.new").mkdir()
    directory.publish(lambda path: path.mkdir())
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "give either hours or tokens"),
        ({"hours": 1.0}, "give either hours or tokens"),
        ({"tokens": 0}, "tokens = 0: must be 1 to"),
        ({"tokens": None, "hours": 0.0}, "hours = 0.0: must be more than 0"),
        ({"tokens": None, "hours": float("nan")}, "hours = nan: must be more than 0"),
        ({"draft_vocab_size": 1000}, "draft_vocab_size = 1000: must be 1 to 260"),
        ({"clusters": 68}, "clusters = 68: must be 0 to 67"),
        ({"chosen_clusters": 0}, "chosen_clusters = 0: must be 1 to"),
        ({"layers": 0}, "layers = 0: must be 1 to"),
        ({"draft_depth": 99}, "draft_depth = 99: must be 1 to 32"),
        ({"length": 2}, "length = 2: must be"),
        ({"tokens_per_batch": 63}, "tokens_per_batch = 63: must be at least length = 64"),
    ],
)
def test_options_out_of_range_are_named_before_anything_is_done(
    target: Checkpoint, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    notes = Notes()
    with pytest.raises(TrainingError, match=message):
        run(target, tmp_path / "run", notes=notes, **changes)
    assert not notes.texts


def test_a_directory_in_use_is_refused(target: Checkpoint, whole: tuple[Path, Notes], tmp_path: Path) -> None:
    directory, _ = whole
    with pytest.raises(TrainingError, match="holds a training run: go on with it by --resume"):
        begin(directory, OPTIONS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TrainingError, match="is not empty"):
        begin(tmp_path, OPTIONS)
    with pytest.raises(TrainingError, match="is a file"):
        begin(tmp_path / "file", OPTIONS)


def test_a_run_is_one_process_s(tmp_path: Path) -> None:
    directory = begin(tmp_path / "run", OPTIONS)
    refused = pytest.raises(TrainingError, match=r"run: another process works on this run; wait for it, stop it, or")
    with directory.held():
        with refused, RunDirectory(directory.path).held():
            pass
        (directory.path / "prompts").write_text("of that process")
        with refused:
            begin(directory.path, OPTIONS)  # though it has done nothing yet, it may be about to
        assert (directory.path / "prompts").exists()
    begin(directory.path, OPTIONS)
    absent = pytest.raises(TrainingError, match="none holds no training run to go on with: there is no such")
    with absent, RunDirectory(tmp_path / "none").held():
        pass


def test_a_process_that_is_killed_holds_no_run(tmp_path: Path) -> None:
    directory = begin(tmp_path / "run", OPTIONS)
    program = (
        "import pathlib, sys, time; from draftwerk.training.run_directory import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(directory.path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match="another process"), directory.held():
            pass
        process.kill()
    with directory.held():
        pass


def test_a_run_that_has_done_nothing_can_be_begun_anew(target: Checkpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("x" * 10_000, encoding="utf-8")
    with pytest.raises(TrainingError, match="a prompt of 10001 tokens"):
        run(target, tmp_path / "run", prompts=str(prompts))
    options = dataclasses.replace(OPTIONS, seed=9)
    assert read_options(begin(tmp_path / "run", options)) == options
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_prompt_that_cannot_be_used_is_found_before_text_is_written(
    target: Checkpoint, tmp_path: Path, which: int
) -> None:
    """Whether text is written from it, or it is set aside for the evaluation."""
    prompts, notes = tmp_path / "prompts.txt", Notes()
    lines = [f"Prompt {i}" for i in range(40)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    side = set_aside(read_prompts(prompts), OPTIONS.seed)[which]
    assert side is not None
    line = side.prompts[2].line
    lines[line - 1] = "x" * 10_000
    prompts.write_text("\n".join(lines), encoding="utf-8")
    side = set_aside(read_prompts(prompts), OPTIONS.seed)[which]
    assert side is not None
    assert line in [prompt.line for prompt in side.prompts]
    with pytest.raises(TrainingError, match=rf"prompts\.txt:{line}: a prompt of 10001 tokens: must be at most"):
        run(target, tmp_path / "run", notes=notes, prompts=str(prompts))
    assert not notes.texts


def test_a_file_is_no_directory_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused = pytest.raises(TrainingError, match="file is a file: a training run is a directory")
    with refused, RunDirectory(tmp_path / "file").held():
        pass


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 0}', '{"format": 1}', '{"format": 1, "options": {}}'])
def test_a_directory_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=str(tmp_path)):
        read_options(RunDirectory(tmp_path))


def test_options_survive_the_file(tmp_path: Path) -> None:
    options = RunOptions(model="m", hours=1.5, seed=9, text=TextOptions(streams=3))
    assert read_options(begin(tmp_path / "run", options)) == options


def test_a_gpu_that_is_not_there_is_one_line(target: Checkpoint, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TrainingError, match="device = cuda: PyTorch finds no GPU here"):
        Run(RunDirectory(tmp_path), OPTIONS, target, Notes(), device="cuda")
    with pytest.raises(TrainingError, match="device = tpu: must be auto, cpu or cuda"):
        Run(RunDirectory(tmp_path), OPTIONS, target, Notes(), device="tpu")

"""`draftwerk train-drafter` and `draftwerk eval-drafter`: options, what is said, exit codes."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from tiny_run import begin
from tiny_writer import with_tokenizer
from typer.testing import CliRunner

import tiny_checkpoint
from draftwerk.cli.main import app
from draftwerk.cli.training_display import TrainingDisplay
from draftwerk.loading import Checkpoint, open_assistant, open_checkpoint
from draftwerk.training import run_options
from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.evaluation import EvaluationOptions
from draftwerk.training.export import write_drafter
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, read_options
from draftwerk.training.sampling import Sampling
from draftwerk.training.text import TextOptions
from fake_checkpoint import VOCABULARY


def run_command(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def drafter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tiny_training.FrozenTarget(open_checkpoint(model))
    fresh = tiny_training.tiny_drafter(target)
    directory = tmp_path_factory.mktemp("drafter") / "fresh"
    write_drafter(fresh, dict(fresh.named_parameters()), directory, target_name="tiny")
    return directory


@pytest.fixture
def opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """What every model name opens."""
    checkpoint = with_tokenizer(model)
    monkeypatch.setattr("draftwerk.weights.open_model", lambda *_: checkpoint)
    return checkpoint


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands write little: by default one file of text alone has 256 texts, of which every token is looked at."""
    little = functools.partial(TextOptions, max_tokens=40, texts_per_shard=48)
    monkeypatch.setattr("draftwerk.training.text.TextOptions", little)


@pytest.fixture
def trains(opened: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Lets runs and conclusions do something else; what they were called with."""

    def instead(train: Callable[[], bool] = lambda: True) -> list[Any]:
        calls: list[Any] = []

        class Run:
            def __init__(self, directory: RunDirectory, told: RunOptions, checkpoint: Checkpoint, *_: Any, **rest: Any):
                calls.append((directory, told, checkpoint, rest))

            def train(self) -> bool:
                return train()

        def conclude(*_: Any, **rest: Any) -> bool:
            calls.append(rest)
            return True

        monkeypatch.setattr("draftwerk.training.run.Run", Run)
        monkeypatch.setattr("draftwerk.training.conclusion.conclude", conclude)
        return calls

    return instead


# --- train-drafter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train-drafter", "eval-drafter", "export-drafter"])
def test_help_has_examples(command: str) -> None:
    result = run_command(command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout


def test_help_says_what_options_need() -> None:
    lines = [line.strip("│ ") for line in run_command("train-drafter", "--help").stdout.splitlines()]
    shown = " ".join(" ".join(lines).split())
    for needed in (
        'JSON lines with "prompt", "messages" or "turns", and "category"',
        "the evaluation, some minutes, comes on top. Either this or --tokens is needed.",
        "With --tokens, the same seed and --threads give the same drafter",
    ):
        assert needed in shown
    # Of a type that is shown one would think that it has to be given.
    assert [line.split()[1] for line in lines if line.startswith(("--resume ", "--chat "))] == ["Lines", "Go"]


def test_what_it_is_told_is_what_is_run(opened: Checkpoint, trains: Any, tmp_path: Path) -> None:
    calls = trains()
    out = tmp_path / "out"
    result = run_command(
        *f"train-drafter -m tiny --out {out} --tokens 500 --seed 7 --layers 1 --draft-vocabulary 64".split(),
        *"--clusters 8 --chosen-clusters 2 --learning-rate 0.001 --length 4096 --accumulate 3".split(),
        *"--device cpu -t 2 --weights int8 --precision f32 --temperature 0.6 --top-k 20 --top-p 0.8".split(),
    )
    assert result.exit_code == 0, result.stderr
    (directory, told, checkpoint, rest), conclusion = calls
    sizes = {"layers": 1, "draft_vocab_size": 64, "clusters": 8, "chosen_clusters": 2}
    batches = {"learning_rate": 0.001, "length": 4096, "tokens_per_batch": 4096, "accumulate": 3}
    forms = {"weights": "int8", "precision": "f32"}
    text = TextOptions(served=Sampling(0.6, 20, 0.8))
    assert told == RunOptions("tiny", tokens=500, seed=7, **sizes, **batches, **forms, text=text)
    assert told == read_options(directory)
    assert checkpoint is opened
    assert (rest["device"], rest["threads"]) == ("cpu", 2)
    assert conclusion["command"] == (
        f"draftwerk train-drafter --out {out} --model tiny --tokens 500 --seed 7 --layers 1 --draft-vocabulary 64 "
        "--clusters 8 --chosen-clusters 2 --learning-rate 0.001 --length 4096 --accumulate 3 "
        "--weights int8 --precision f32 --temperature 0.6 --top-k 20 --top-p 0.8 --device cpu --threads 2"
    )
    assert conclusion["evaluation"] == EvaluationOptions(weights="int8", device="cpu")
    assert f"the drafter is {out / 'drafter'}" in result.stderr
    assert result.stdout == ""


def test_a_run_that_another_process_works_on_is_one_line(
    opened: Checkpoint, trains: Callable[..., list[Any]], tmp_path: Path
) -> None:
    done = trains()
    directory = begin(tmp_path / "run", RunOptions(model="tiny", tokens=500))
    with directory.held():
        for arguments in (["--resume"], ["--tokens", "500"]):
            result = run_command("train-drafter", "--out", str(directory.path), *arguments)
            assert result.exit_code == 2
            assert "another process works on this run" in result.output
            assert "Traceback" not in result.output
    assert not done


def test_a_run_is_held_from_its_beginning(opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it is gone on with from before it is read: a run that has done nothing may be begun anew meanwhile."""
    place, moments = RunDirectory(tmp_path / "run"), []

    def during(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*arguments: Any, **named: Any) -> Any:
            with pytest.raises(TrainingError, match="another process works on this run"), place.held():
                pass
            moments.append(what)
            return real(*arguments, **named)

        return refused

    for name in ("begin", "read_options"):
        monkeypatch.setattr(run_options, name, during(name, getattr(run_options, name)))
    monkeypatch.setattr("draftwerk.training.run.Run.train", during("train", lambda _: False))
    arguments = "-m tiny --tokens 9 --draft-vocabulary 64 --device cpu".split()
    for how in (arguments, ["--resume"]):
        assert run_command("train-drafter", "--out", str(place.path), *how).exit_code == 130
    assert moments == ["begin", "read_options", "train", "read_options", "train"]


@pytest.mark.usefixtures("little_text")
@pytest.mark.parametrize("asked_by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_behind_a_step_and_the_run_can_be_gone_on_with(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_by: signal.Signals
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("draftwerk.cli.training_display._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(
        "draftwerk.training.evaluation.EvaluationOptions",
        functools.partial(EvaluationOptions, max_tokens=32, timed_prompts=2),
    )
    step = TrainingDisplay.step

    def step_and_signal(display: TrainingDisplay, progress: Any) -> None:
        step(display, progress)
        signal.raise_signal(asked_by)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDisplay, "step", step_and_signal)
        stopped = run_command(
            *f"train-drafter -m tiny --out {out} --tokens 1500 --layers 1 --draft-vocabulary 64 --clusters 0".split(),
            *"--length 256 --device cpu -t 1".split(),
        )
    assert stopped.exit_code == 130, stopped.stderr
    planned = RunDirectory(out).read()["plan"]["steps"]
    assert planned > 1
    assert f"step 1 of {planned}: loss " in stopped.stderr
    assert "acceptance by position " in stopped.stderr
    assert "stopping as soon as what was done can be gone on with" in stopped.stderr
    way = f"draftwerk train-drafter --out {out} --resume --device cpu --threads 1"
    assert f"error: stopped; go on with: {way}\n" in stopped.stderr
    done = run_command(*way.split()[1:])
    assert done.exit_code == 0, done.stderr
    assert f"step {planned} of {planned}: loss " in done.stderr
    assert f"what it is worth is in {out / 'report.html'}" in done.stderr
    steps = [entry["step"] for entry in RunDirectory(out).entries() if entry["kind"] == "step"]
    assert steps == list(range(1, planned + 1))


def test_the_second_ctrl_c_ends_it_at_once(trains: Any, tmp_path: Path) -> None:
    def interrupted() -> bool:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        return True

    trains(interrupted)
    out = tmp_path / "out"
    result = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(out))
    assert result.exit_code == 130
    assert result.stderr.endswith(f"error: interrupted; go on with: draftwerk train-drafter --out {out} --resume\n")


def test_prompts_are_read_before_a_model_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftwerk.weights.open_model", lambda *_: pytest.fail("the model was opened"))
    command = f"train-drafter -m tiny --tokens 9 --out {tmp_path / 'out'} --prompts /nowhere"
    assert "/nowhere: No such file" in run_command(*command.split()).stderr


def test_a_run_is_gone_on_with_as_it_was_told(trains: Any, tmp_path: Path) -> None:
    told = RunOptions("tiny", hours=2.0, seed=3)
    begin(tmp_path / "out", told)
    calls = trains()
    result = run_command("train-drafter", "--out", str(tmp_path / "out"), "--resume")
    assert result.exit_code == 0, result.stderr
    assert calls[0][1] == told
    assert "--hours 2.0 --seed 3" in calls[1]["command"]
    result = run_command("train-drafter", "--out", str(tmp_path / "out"), "--resume", "--tokens", "9")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --tokens and --resume exclude each other: the run has its own\n",
    )


def test_a_drafter_to_go_on_from_has_sizes_of_its_own(trains: Any, drafter: Path, tmp_path: Path) -> None:
    calls = trains()
    base = ["train-drafter", "-m", "tiny", "--tokens", "9", "--from", str(drafter)]
    result = run_command(*base, "--out", str(tmp_path / "a"))
    assert result.exit_code == 0, result.stderr
    assert (calls[0][1].start_from, calls[0][1].learning_rate) == (str(drafter.resolve()), 1e-4)
    assert f"--from {drafter.resolve()}" in calls[1]["command"]
    result = run_command(*base, "--out", str(tmp_path / "b"), "--layers", "3")
    assert (result.exit_code, result.stderr.startswith("error: --layers and --from exclude each other")) == (2, True)


def test_a_stopped_run_says_how_to_go_on(trains: Any, tmp_path: Path) -> None:
    calls = trains(lambda: False)
    result = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert f"stopped; go on with: draftwerk train-drafter --out {tmp_path / 'out'} --resume" in result.stderr
    assert len(calls) == 1


def test_the_way_to_go_on_is_one_for_a_shell(trains: Any, tmp_path: Path) -> None:
    out = tmp_path / "my drafter"
    trains(lambda: False)
    machine = ["--device", "cpu", "--threads", "3"]
    stopped = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(out), *machine)
    _, _, way = stopped.stderr.strip().partition("go on with: ")
    assert shlex.split(way) == ["draftwerk", "train-drafter", "--out", str(out), "--resume", *machine]
    calls = trains()
    assert run_command(*shlex.split(way)[1:]).exit_code == 0
    assert calls[0][0].path == out


def test_a_run_is_gone_on_with_from_any_directory(
    model: Path, drafter: Path, trains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwerk.weights.open_model", lambda name, *_: open_checkpoint(name))
    calls = trains(lambda: False)
    monkeypatch.chdir(model.parent)
    relative = ["--from", os.path.relpath(drafter, model.parent), "--model", model.name]
    stopped = run_command("train-drafter", *relative, "--tokens", "9", "--out", str(tmp_path / "out"))
    assert stopped.exit_code == 130, stopped.stderr
    monkeypatch.chdir(tmp_path)
    stopped = run_command("train-drafter", "--out", "out", "--resume")
    assert stopped.exit_code == 130, stopped.stderr
    assert calls[1][2].path == str(model)
    assert Path(calls[1][1].start_from).samefile(drafter)


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("One\nTwo\n", "2 prompts of prompts.txt, read as text"),
        ("prompt,category\n", "1 prompt of prompts.txt, read as text"),
        ('{"prompt": "One"}\n' * 1200, "1,200 prompts of prompts.txt, read as JSON"),
    ],
)
def test_it_is_said_how_prompts_were_read(
    trains: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, shown: str
) -> None:
    calls = trains()
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(content, encoding="utf-8")
    result = run_command(*"train-drafter -m tiny --tokens 9 --prompts prompts.txt --out out".split())
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == shown
    # The run's copy is no file to begin another run with: it is gone with the directory.
    assert f"--prompts {tmp_path / 'prompts.txt'} " in calls[1]["command"]
    assert "prompt" not in run_command("train-drafter", "--out", "out", "--resume").stderr


def test_a_prompt_that_cannot_be_used_is_named_by_the_file_that_was_given(opened: Checkpoint, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("One\n" + "x" * 10_000, encoding="utf-8")
    base = f"train-drafter -m tiny --tokens 500 --draft-vocabulary 64 --out {tmp_path / 'out'}"
    result = run_command(*base.split(), "--prompts", str(prompts))
    assert result.exit_code == 2
    assert f"error: {prompts}:2: a prompt of 10001 tokens: must be at most " in result.stderr


@pytest.mark.usefixtures("little_text")
def test_the_way_out_of_a_gradient_that_is_not_finite_works(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwerk.training.run._TOKENS_PER_SAVE", 1)
    monkeypatch.setattr("draftwerk.training.conclusion.conclude", lambda *_, **__: True)
    clip, norms = torch.nn.utils.clip_grad_norm_, [0.0, 0.0, math.inf]

    def clip_and_then_not_finite(*arguments: Any) -> Any:
        return clip(*arguments) + (norms.pop(0) if norms else 0.0)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip_and_then_not_finite)
    base = f"train-drafter -m tiny --tokens 4000 --length 256 --device cpu -t 1 --out {tmp_path}".split()
    base[-1] += "/an out"
    failed = run_command(*base, *"--layers 1 --draft-vocabulary 64 --learning-rate 0.002".split())
    assert failed.exit_code == 2
    way = (
        r"error: step 3: the gradient is not finite; begin in another directory with a smaller --learning-rate than "
        r"0\.002, and from the drafter as far as it came: (--from .*)\n"
    )
    found = re.search(way, failed.stderr)
    assert found, failed.stderr
    base[-1] = str(tmp_path / "another")
    done = run_command(*base, "--learning-rate", "0.001", *shlex.split(found[1]))
    assert done.exit_code == 0, done.stderr
    assert open_assistant(tmp_path / "another" / "drafter").config.draft_vocab_size == 64


def test_what_training_raises_is_one_line(trains: Any, tmp_path: Path) -> None:
    def fail() -> bool:
        raise TrainingError("it cannot be")

    trains(fail)
    result = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (2, "error: it cannot be\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left", "out/log.jsonl"), "out/log.jsonl: No space left; make room and "),
        (OSError(errno.EDQUOT, "Quota exceeded", "out/text"), "out/text: Quota exceeded; make room and "),
        (OSError(errno.EACCES, "Permission denied", "out/text"), "out/text: Permission denied; put that right and "),
        (WriteError("no state", OSError(errno.ENOSPC, "No space left")), "no state; make room and "),
    ],
)
def test_what_cannot_be_written_is_one_line_with_the_way_to_go_on(
    trains: Any, tmp_path: Path, error: Exception, line: str
) -> None:
    def fail() -> bool:
        raise error

    trains(fail)
    out = tmp_path / "out"
    result = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(out))
    assert result.stderr == f"error: {line}go on with: draftwerk train-drafter --out {out} --resume\n"
    assert result.exit_code == 1


def test_a_reader_of_messages_that_goes_away_is_no_file_of_the_run(trains: Any, tmp_path: Path) -> None:
    def fail() -> bool:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    trains(fail)
    result = run_command("train-drafter", "-m", "tiny", "--tokens", "9", "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give either --hours H or --tokens N"),
        ("--hours 1 --tokens 5", "give either --hours H or --tokens N"),
        ("--tokens 0", "error: --tokens 0: must be 1 to"),
        ("--hours -1", "error: --hours -1.0: must be more than 0"),
        ("--tokens 5 --chat", "error: --chat is for --prompts: the built-in openings use a chat template anyway"),
        ("--tokens 5 --draft-vocabulary 64 --layers 0", "error: --layers 0: must be 1 to 64"),
        ("--tokens 5 --draft-vocabulary 9999", "error: --draft-vocabulary 9999: must be 1 to 260"),
        ("--tokens 5 --draft-vocabulary 64 --clusters 65", "error: --clusters 65: must be 0 to 64"),
        ("--tokens 5 --draft-vocabulary 64 --clusters 2 --chosen-clusters 0", "error: --chosen-clusters 0: must be"),
        ("--tokens 5 --learning-rate 2", "error: --learning-rate 2.0: must be"),
        ("--tokens 5 --length 5", "error: --length 5: must be 6 to 1048576"),
        ("--tokens 5 --temperature -1", "error: --temperature -1: must be 0, or 0.001 to 100"),
        ("--tokens 5 --temperature 1 --top-p 2", "error: --top-p 2: must be more than 0"),
        ("--tokens 5 --top-k 9", "error: --top-k and --top-p are for --temperature"),
        ("--tokens 5 --accumulate 0", "error: --accumulate 0: must be"),
        ("--tokens 5 --seed -1", "error: --seed -1: must be"),
        ("--tokens 5 --weights int3", "error: --weights int3: must be one of auto, int8, int4"),
        ("--tokens 5 --precision f16", "error: --precision f16: must be auto, bf16 or f32"),
        ("--tokens 5 --draft-vocabulary 64 --device tpu", "error: --device tpu: must be auto, cpu or cuda"),
        ("--tokens 5 --prompts /nowhere", "/nowhere: No such file or directory"),
        (
            "--tokens 5 --from /nowhere.gguf",
            "error: /nowhere.gguf: no such file or directory, and no name on the hub: give a drafter's directory",
        ),
        ("--tokens 5 --from nowhere", "error: nowhere: no such file or directory, and no name on the hub: give"),
        ("--resume", "holds no training run to go on with"),
    ],
)
def test_wrong_options_are_one_line(opened: Checkpoint, tmp_path: Path, arguments: str, message: str) -> None:
    result = run_command("train-drafter", "--out", str(tmp_path / "out"), *arguments.split())
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_is_no_run_to_go_on_with(opened: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("mine")
    result = run_command("train-drafter", "--out", str(tmp_path / "afile"), "--resume")
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {tmp_path / 'afile'} is a file: a training run is a directory\n",
    )


def test_without_the_extra_it_says_how_to_get_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['torch'] = None; from draftwerk.cli.main import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", program, "train-drafter", "--tokens", "9", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert (
        result.stderr
        == 'error: torch is missing, which training needs: pip install ./client ".[train]", from a checkout\n'
    )
    assert not (tmp_path / "out").exists()


# --- export-drafter ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("matrices", "of_layers"), [(None, "q4_0"), ("q4_0", "q4_0"), ("q8_0", "q8_0")])
def test_a_drafter_is_exported(drafter: Path, tmp_path: Path, matrices: str | None, of_layers: str) -> None:
    file = tmp_path / "Mine.gguf"
    given = [] if matrices is None else ["--matrices", matrices]
    result = run_command("export-drafter", str(drafter), "--gguf", str(file), *given, "--license", "gemma")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"the drafter is {file}, {file.stat().st_size / 1e6:.1f} MB\n"
    exported = open_assistant(file)
    assert exported.name == "Mine"
    types = {".layers." in view.name: view.dtype for view in exported.tensors() if len(view.shape) > 1}
    assert types == {True: of_layers, False: "q8_0"}
    again = tmp_path / "again.gguf"
    assert run_command("export-drafter", str(file), "--gguf", str(again), "--name", "[x]").exit_code == 0
    assert open_assistant(again).name == "[x]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{drafter} --gguf {there}", "--gguf {there}: is there already; give another name, or remove it first"),
        (
            "{drafter} --gguf {out}/none/x.gguf",
            "{out}/none/x.gguf: the drafter cannot be written (No such file or direct",
        ),
        ("{drafter} --gguf {out}/x.gguf --matrices int4", "--matrices int4: must be one of q4_0, q8_0, bf16"),
        ("{model} --gguf {out}/x.gguf", "is a whole model"),
        ("{there} --gguf {out}/x.gguf", "{there}: "),
        ("nowhere --gguf {out}/x.gguf", "nowhere: no such file or directory, and no name on the hub: give a drafter's"),
        ("{run} --gguf {out}/x.gguf", "{run}: is the directory of a training run: its drafter is {run}/drafter"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    model: Path, drafter: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    there = tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    begin(tmp_path / "run", RunOptions("tiny", tokens=9))
    places = {"drafter": drafter, "model": model, "there": there, "out": tmp_path, "run": tmp_path / "run"}
    result = run_command("export-drafter", *arguments.format(**places).split())
    assert result.exit_code == 2
    assert message.format(**places) in result.stderr
    assert result.stderr.count("\n") == 1
    assert there.read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"there.gguf", "run"}


# --- eval-drafter ------------------------------------------------------------------------------------------------


def test_help_tells_the_limits_of_what_is_measured() -> None:
    shown = " ".join(run_command("eval-drafter", "--help").stdout.split())
    assert "Most tokens of a text; 32 or more." in shown
    assert "Drafts a step where acceptance is measured, 1 to 7." in shown


def test_a_drafter_is_evaluated(
    opened: Checkpoint, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the steps of so small a model come faster than they are read, and have no time.
    monkeypatch.setattr("draftwerk.training.evaluation.step_seconds", lambda *_: 0.01)
    prompts = tmp_path / "prompts.jsonl"
    entries = [{"prompt": f"Say {i}", "category": "[even]" if i % 2 == 0 else "odd"} for i in range(4)]
    prompts.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    result = run_command(
        *f"eval-drafter -m tiny -d {drafter} --prompts {prompts} --max-tokens 40 --draft-length 2".split(),
        *f"--timed 1 -t 1 --temperature 0.7 --top-k 0 --top-p 1 --json {tmp_path / 'out.json'}".split(),
    )
    assert result.exit_code == 0, result.stderr
    for shown in ("greedy", "depth 1", "sampled: temperature 0.7; whole", "[even]", "drafter and lookup", "4 prompts"):
        assert shown in result.stdout
    values = json.loads((tmp_path / "out.json").read_text())
    assert list(values["acceptance"][0]["by_category"]) == ["[even]", "odd"]
    assert len(values["speeds"]) == 6
    tokens_per_step = {its["sampling"]: its["tokens_per_step"] for its in values["acceptance"]}
    assert values["expected"]
    for expected in values["expected"]:
        best, sampling = expected["best_draft_length"], expected["sampling"]
        assert f"expected of {best} drafts a step, {sampling}: " in result.stdout
        assert f" times as fast ({tokens_per_step[sampling][best]:.2f} tokens/step)" in result.stdout
    assert "depth: how deep in the tree that the 2 drafts of a step form" in " ".join(result.stdout.split())


def test_a_drafter_in_a_file_whose_name_is_not_utf_8_is_evaluated(
    opened: Checkpoint, drafter: Path, tmp_path: Path
) -> None:
    named = shutil.copytree(drafter, tmp_path / os.fsdecode(b"\xff"))
    result = run_command(*"eval-drafter -m tiny --limit 1 --max-tokens 32 --timed 0 -t 1 -d".split(), str(named))
    assert result.exit_code == 0, result.stderr
    assert "\\udcff, 1 prompts" in " ".join(result.stdout.split())


def test_figures_alone_go_to_stdout(opened: Checkpoint, drafter: Path) -> None:
    arguments = f"eval-drafter -m tiny -d {drafter} --limit 2 --max-tokens 32 --timed 0 -t 1 --json -"
    result = run_command(*arguments.split())
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["speeds"] == []


def test_figures_that_a_full_disk_has_no_room_for_are_one_line(opened: Checkpoint, drafter: Path) -> None:
    arguments = f"eval-drafter -m tiny -d {drafter} --limit 2 --max-tokens 32 --timed 0 -t 1 --json /dev/full"
    result = run_command(*arguments.split())
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "error: /dev/full: No space left on device")
    assert "tokens/step" in result.stdout


def test_figures_are_in_their_file_though_nobody_reads_the_tables(
    opened: Checkpoint, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("draftwerk.cli.eval_drafter._print", broken)
    file = tmp_path / "figures.json"
    arguments = f"eval-drafter -m tiny -d {drafter} --limit 2 --max-tokens 32 --timed 0 -t 1 --json {file}"
    assert run_command(*arguments.split()).exit_code == 1
    assert json.loads(file.read_text())["prompts"] == 2


def test_texts_that_are_longer_than_the_context_are_one_line(opened: Checkpoint, drafter: Path) -> None:
    most = opened.config.max_position_embeddings - 1
    result = run_command(*f"eval-drafter -m tiny -d {drafter} -t 1 --max-tokens 200000".split())
    assert result.exit_code == 2
    assert f"error: --max-tokens 200000: must be at most {most} for this model\n" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no drafter goes with tiny: give one by --drafter"),
        ("-d lookup", "--drafter lookup is no MTP drafter"),
        ("-d none", "--drafter none is no MTP drafter"),
        (
            "-d ./nowhere",
            "--drafter ./nowhere: no such file or directory; give a directory, a GGUF file or a hub name\n",
        ),
        ("-d nowhere.gguf", "--drafter nowhere.gguf: no such file or directory; give"),
        ("-d ./nowhere --chat", "--chat is for --prompts"),
        ("-d ./nowhere --max-tokens 5", "error: --max-tokens 5: must be 32 to"),
        ("-d ./nowhere --draft-length 9", "error: --draft-length 9: must be 1 to 7"),
        ("-d ./nowhere --timed 99999999", "error: --timed 99999999: must be 0 to"),
        ("-d ./nowhere --seed -1", "error: --seed -1: must be 0 to"),
        ("-d ./nowhere --top-p 0", "error: --top-p 0: must be more than 0"),
        ("-d ./nowhere --prompts /nowhere", "/nowhere: No such file or directory"),
        ("-d ./nowhere --json /nowhere/at/all", "--json: /nowhere/at/all cannot be written"),
    ],
)
def test_wrong_options_of_an_evaluation_are_one_line(opened: Checkpoint, arguments: str, message: str) -> None:
    result = run_command("eval-drafter", "-m", "tiny", "-t", "1", *arguments.split())
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_has_its_drafter_in_a_directory(opened: Checkpoint, tmp_path: Path) -> None:
    run = begin(tmp_path / "run", RunOptions("tiny", tokens=9))
    result = run_command("eval-drafter", "-m", "tiny", "-d", str(run.path))
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {run.path}: is the directory of a training run: its drafter is {run.drafter}\n",
    )


@pytest.mark.parametrize("command", ["train-drafter --from {} --tokens 9 --out {out}", "eval-drafter -d {}"])
def test_a_whole_model_is_no_drafter(opened: Checkpoint, model: Path, tmp_path: Path, command: str) -> None:
    result = run_command(*command.format(model, out=tmp_path / "out").split(), "-m", "tiny")
    assert result.exit_code == 2
    # Whichever option it was given to.
    assert "is a whole model (model_type 'gemma3_text'), not a drafter: that is a checkpoint of type " in result.stderr


@pytest.mark.parametrize("command", ["train-drafter --from {} --tokens 9 --out {out}", "eval-drafter -d {}"])
def test_a_drafter_that_does_not_fit_is_one_line(
    opened: Checkpoint, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    wider = tiny_checkpoint.save(tiny_checkpoint.tiny_model(vocab_size=VOCABULARY, hidden_size=96), tmp_path / "wider")
    monkeypatch.setattr("draftwerk.weights.open_model", lambda *_: with_tokenizer(wider))
    result = run_command(*command.format(drafter, out=tmp_path / "out").split(), "-m", "wider")
    assert result.exit_code == 2
    assert "does not fit wider: it is for hidden size 64, and the model has 96" in result.stderr
    assert result.stderr.count("\n") == 1

"""Training runs that are killed, or find the disk full, at every write there is: they go on as if nothing had been."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from full_disk import full_disk
from tiny_run import OPTIONS, Notes, begin, log, run, weights

from draftwerk.cli.failures import file_error
from draftwerk.loading import Checkpoint
from draftwerk.training.conclusion import conclude
from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.evaluation import EvaluationOptions
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import prompts_of_run, read_options

# What a run writes, apart from features; "initial" and "drafter" are the weights of both.
FILES = {"run.json", "text.json", "vocabulary.npz", "initial", "drafter", "evaluation.json", "report.html", "log.jsonl"}
SHARDS = {f"shard-{number:06}.npz" for number in range(2)}
STATES = {f"step-{step:08}.safetensors" for step in (6, 12, 15)}


class Killed(BaseException):
    """What does not let anything else happen."""


@pytest.fixture(scope="module")
def whole(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run(target, directory)
    return directory


@pytest.fixture(autouse=True)
def saves_every_sixth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the second file of text is written for steps that are lost."""
    monkeypatch.setattr("draftwerk.training.run._TOKENS_PER_SAVE", 6 * OPTIONS.tokens_per_batch)


def finish(target: Checkpoint, directory: Path) -> bool:
    place, how = RunDirectory(directory), EvaluationOptions(max_tokens=40, draft_length=3, timed_prompts=0)
    told = read_options(place)
    return conclude(place, told, target, Notes(), command="it", threads=1, prompts=2, evaluation=how)


def assert_as_if_nothing_had_been(directory: Path, whole: Path) -> None:
    assert weights(directory) == weights(whole)
    for kind in ("step", "text"):
        assert log(directory, kind) == log(whole, kind)
    assert not list(directory.rglob(".*"))


class Writes:
    """Lets something happen at the first of a run's writes that nothing happened at before, one for every session."""

    def __init__(self, happens: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
        self._happens = happens
        self._last = ""
        self._at: str | None = None
        self.seen: set[str] = set()
        monkeypatch.setattr("draftwerk.training.atomic_file._sync", self._sync)

    def begin_session(self) -> None:
        self._at = None

    def _sync(self, path: Path) -> None:
        """Stands for bringing something to the disk: a new file before it takes its place, or its directory then."""
        moment = self._moment(path)
        if self._at is None and moment not in self.seen:
            self.seen.add(moment)
            self._at = moment
        if moment == self._at:
            self._happens(path)

    def _moment(self, path: Path) -> str:
        if path.is_dir():
            return f"{self._last}, replaced"
        if path.name == "log.jsonl":
            return "log.jsonl, a line"
        name = path.name[1:-9]  # without what makes it a temporary one
        if name in ("model.safetensors", "config.json", "README.md"):
            name = "initial" if "initial" in path.parent.name else "drafter"
        self._last = "features" if path.parent.name == "features" else name
        return self._last


def test_a_run_that_is_killed_at_any_write_goes_on(
    target: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(path: Path) -> None:
        if path.name == "log.jsonl":
            path.write_bytes(path.read_bytes()[:-9])  # in the middle of the line
        elif path.is_file():
            # A process that is killed leaves what it wrote; this one cleans up.
            shutil.copyfile(path, path.with_name(f"{path.name[:-1]}-"))
            if path.parent.name.startswith("."):
                shutil.copytree(path.parent, path.parent.with_name(f"{path.parent.name[:-1]}-"), dirs_exist_ok=True)
        raise Killed

    begin(tmp_path / "run", OPTIONS)
    writes = Writes(kill, monkeypatch)
    sessions, ended = 0, False
    while not ended:
        sessions += 1
        writes.begin_session()
        with suppress(Killed):
            ended = run(target, tmp_path / "run") and finish(target, tmp_path / "run")
    expected = FILES | SHARDS | STATES | {"features"}
    assert writes.seen == expected | {f"{name}, replaced" for name in expected} | {"log.jsonl, a line"}
    assert sessions == len(writes.seen) + 1
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


def test_a_disk_that_is_full_at_any_write_ends_the_run_in_one_line_and_it_goes_on(
    target: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    begin(tmp_path / "run", OPTIONS)
    writes = Writes(full, monkeypatch)
    # A run can do without features; and a state that is in its place was written, whatever was said.
    borne = {"features", "features, replaced", *(f"{name}, replaced" for name in STATES)}
    writes.seen |= borne
    lines: list[str] = []
    states: list[set[str]] = [set()]
    ended = False
    while not ended:
        writes.begin_session()
        before = set(writes.seen)
        try:
            ended = run(target, tmp_path / "run") and finish(target, tmp_path / "run")
        except (OSError, WriteError) as error:
            line = file_error(error) if isinstance(error, OSError) else str(error)
            (moment,) = writes.seen - before
            assert moment.partition(",")[0] in line
            assert "No space left on device" in line
            assert str(tmp_path / "run") in line
            lines.append(line)
        states.append({path.name for path in (tmp_path / "run" / "states").glob("*")})
        assert states[-1] >= states[-2] or len(states[-1]) == 2
    expected = FILES | SHARDS | STATES | {"features"}
    assert writes.seen == expected | {f"{name}, replaced" for name in expected} | {"log.jsonl, a line"}
    assert len(lines) == len(writes.seen - borne)
    assert not [line for line in lines if "\n" in line]
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


@pytest.mark.parametrize("what", [".step-", "log.jsonl", ".shard-", ".model.safetensors"])
def test_features_make_room(
    target: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    features, refused = tmp_path / "run" / "features", []

    def full_of_features(path: Path) -> None:
        if path.name.startswith(what) and features.exists():
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("draftwerk.training.atomic_file._sync", full_of_features)
    assert run(target, tmp_path / "run")
    assert len(refused) == 1  # then nothing is kept any more
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


def test_features_make_room_for_the_beginning_of_a_session(
    target: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    features, refused = tmp_path / "run" / "features", []
    features.mkdir()
    (features / "some.safetensors").write_bytes(b"some")

    def full_of_features(path: Path) -> None:
        if features.exists():
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("draftwerk.training.atomic_file._sync", full_of_features)
    assert run(target, tmp_path / "run")
    assert len(refused) == 1
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


def test_features_of_a_rehearsal_make_room_for_the_plan(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, refused = tmp_path / "run" / "features", []

    def full_of_features(path: Path) -> None:
        if path.name.startswith(".run.json") and features.exists():
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("draftwerk.training.atomic_file._sync", full_of_features)
    assert run(target, tmp_path / "run", tokens=None, hours=1e-6)
    assert len(refused) == 1


def test_a_run_that_is_over_writes_no_state(
    target: Checkpoint, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no room for it: all that is missing is a report."""
    shutil.copytree(whole, tmp_path / "run")
    written: list[str] = []
    monkeypatch.setattr("draftwerk.training.atomic_file._sync", lambda path: written.append(path.name))
    assert run(target, tmp_path / "run")
    assert not [name for name in written if name.startswith(".step-")]
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


def test_a_shard_that_is_written_again_has_one_line(target: Checkpoint, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for state in (tmp_path / "run" / "states").iterdir():
        state.unlink()
    (tmp_path / "run" / "text" / "shard-000000.npz").unlink()  # it was damaged, say
    assert run(target, tmp_path / "run")
    assert_as_if_nothing_had_been(tmp_path / "run", whole)


def test_a_line_that_was_cut_off_is_gone_before_the_next_one(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is logged by the first step too, before there is a state that tells which steps are lost."""
    run_log = tmp_path / "run" / "log.jsonl"

    def kill(path: Path) -> None:
        if path == run_log and len(log(tmp_path / "run", "text")) == 2:
            path.write_bytes(path.read_bytes()[:-9])
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("draftwerk.training.atomic_file._sync", kill)
        run(target, tmp_path / "run", tokens=None, hours=1e-6, accumulate=30)
    assert not run_log.read_bytes().endswith(b"\n")
    assert run(target, tmp_path / "run")
    texts = [entry["shard"] for entry in log(tmp_path / "run", "text")]
    assert texts == list(range(len(texts)))
    assert len(texts) >= 2


def test_steps_that_are_lost_cost_time_all_the_same(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(path: Path) -> None:
        raise Killed

    def kill_where_the_log_is_cut(path: Path) -> None:
        if path == tmp_path / "run":
            raise Killed

    notes, place = Notes(), RunDirectory(tmp_path / "run")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(notes, "step", kill)
        run(target, place.path, notes=notes)
    spent = place.entries()[-1]["seconds"]
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("draftwerk.training.atomic_file._sync", kill_where_the_log_is_cut)
        run(target, place.path)
    assert not log(place.path, "step")
    assert place.entries()[-1]["seconds"] >= spent > 0


def test_of_a_line_that_a_full_disk_cuts_off_nothing_is_left(tmp_path: Path) -> None:
    place, file = RunDirectory(tmp_path), tmp_path / "log.jsonl"
    place.log({"kind": "session"})
    with full_disk(file.stat().st_size + 5), pytest.raises(OSError, match="File too large") as refused:
        place.log({"kind": "text", "shard": 0})
    assert refused.value.filename == str(file)
    assert file.read_bytes() == b'{"kind": "session"}\n'
    assert place.entries() == [{"kind": "session"}]


# --- the beginning -----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_while_it_is_begun_can_be_begun_again(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(path: Path) -> None:
        if path.is_file():
            shutil.copyfile(path, path.with_name(f"{path.name[:-1]}-"))
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("draftwerk.training.atomic_file._sync", kill)
        begin(tmp_path / "run", OPTIONS)
    assert [path.name for path in (tmp_path / "run").iterdir()] != []
    with pytest.raises(TrainingError, match="holds no training run to go on with"):
        read_options(RunDirectory(tmp_path / "run"))
    assert run(target, tmp_path / "run", tokens=500)
    assert not list((tmp_path / "run").rglob(".*"))


@pytest.mark.parametrize("again", [False, True])
def test_a_run_that_is_killed_while_prompts_are_copied_has_those_it_was_told(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Whether it is the first that is begun there, or one before had other prompts and failed."""
    prompts, other = tmp_path / "prompts.txt", tmp_path / "other.txt"
    prompts.write_text("One\nTwo\n", encoding="utf-8")
    other.write_text("x" * 10_000, encoding="utf-8")
    if again:
        with pytest.raises(TrainingError, match="a prompt of 10001 tokens"):
            run(target, tmp_path / "run", prompts=str(other))

    def kill(path: Path) -> None:
        if path.name.startswith(".prompts."):
            raise Killed

    options = dataclasses.replace(OPTIONS, prompts=str(prompts), tokens=500)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("draftwerk.training.atomic_file._sync", kill)
        begin(tmp_path / "run", options)
    assert read_options(RunDirectory(tmp_path / "run")) == options
    assert run(target, tmp_path / "run")


def test_prompts_that_can_be_read_once_are_copied_as_they_were_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("One\nTwo\n", encoding="utf-8"))
    writer.start()
    place = begin(tmp_path / "run", dataclasses.replace(OPTIONS, prompts=str(pipe)))
    writer.join()
    prompts = prompts_of_run(place, read_options(place))
    assert prompts is not None
    assert prompts.path == pipe
    assert [prompt.content for prompt in prompts.prompts] == ["One", "Two"]


@pytest.mark.parametrize("part", ["vocabulary.npz", "initial", "drafter", "states"])
def test_a_run_that_has_done_something_is_not_begun_anew(tmp_path: Path, part: str) -> None:
    """Though it may have no text: a damaged shard is deleted to be written again."""
    begin(tmp_path, OPTIONS)
    (tmp_path / part).mkdir()
    with pytest.raises(TrainingError, match="holds a training run: go on with it by --resume"):
        begin(tmp_path, OPTIONS)

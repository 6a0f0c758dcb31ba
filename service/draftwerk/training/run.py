"""A whole training run: the target writes text, the drafter learns from it, until time or tokens are used up.

Both take turns: text is written when the first batch needs it. So a run that is stopped at any time has a drafter that
has learned from all that was written, and one that is gone on with takes the same steps as one that was never stopped.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from draftwerk.engine import Engine
from draftwerk.loading import AssistantCheckpoint, Checkpoint, check_fits, is_hub_name
from draftwerk.training.clusters import balanced_clusters
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.errors import TrainingError, WriteError
from draftwerk.training.export import open_drafter, read_drafter, write_drafter
from draftwerk.training.head_sizes import MOST_COMPARED, HeadSizes
from draftwerk.training.initial import fit_pre_projection, start_centroids, start_from_target
from draftwerk.training.kept_features import KeptFeatures
from draftwerk.training.memory_needs import MemoryNeeds
from draftwerk.training.options import TrainingOptions
from draftwerk.training.precision import DTYPES, choose_precision
from draftwerk.training.prompts import check_prompts, set_aside
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.run_options import RunOptions, prompts_of_run
from draftwerk.training.shape import DrafterShape
from draftwerk.training.shards import Shard, count_shards, read_shard
from draftwerk.training.state import last_step
from draftwerk.training.target import FrozenTarget
from draftwerk.training.text import TextProgress, TextWriter
from draftwerk.training.text_batches import REPLAYED, TextBatches
from draftwerk.training.text_figures import text_figures
from draftwerk.training.trainer import NotFiniteError, StepFigures, Trainer
from draftwerk.training.vocabulary import DraftVocabulary, choose_draft_vocabulary

_TOKENS_PER_SAVE = 65_536  # trained between two states: some minutes on a processor, seconds on a GPU
_REHEARSED_BATCHES = 3  # timed when a run is to last a number of hours
_MARGIN = 0.95  # of the time is planned for
# As PyTorch says it of a processor's memory, in an error without a type of its own.
_OUT_OF_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")
_FIT_SHAPE = (16, 256)  # of the text that the first projection is fitted to: sequences, tokens of each


@dataclass(frozen=True)
class Plan:
    """What a run settles once it has seen how fast things go.

    Attributes:
        steps: optimizer steps in all.
        save_every: steps between two states.
    """

    steps: int
    save_every: int


@dataclass(frozen=True)
class Progress:
    """Of a run.

    Attributes:
        plan: what is to be done.
        figures: of the latest step.
        seconds: spent so far, in all sessions; `writing` of them on text.
        tokens: trained on so far, repetitions included.
        written: tokens of text that the target wrote so far.
    """

    plan: Plan
    figures: StepFigures
    seconds: float
    writing: float
    tokens: int
    written: int


class Observer(Protocol):
    """Whoever wants to know how far a run is."""

    def phase(self, what: str) -> None:
        """Something else begins."""

    def loading(self, what: str, done: int, total: int) -> None:
        """Bytes of the model that are loaded."""

    def writing(self, shard: int, progress: TextProgress) -> None:
        """Text is being written."""

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""

    def evaluating(self, what: str, done: int, total: int) -> None:
        """The drafter is being evaluated."""


class Stopped(Exception):
    """The run was asked to stop."""


class _TimeIsUp(Exception):
    """The hours of the run are over, in the middle of a file of text."""


class Run:
    """A run in a directory.

    Args:
        directory: of the run.
        options: what it was told.
        checkpoint: the target.
        observer: told how far it is.
        stop: asked now and then; once it says so, the run ends with a state to go on from.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        threads: of the engine and of PyTorch; 0: all, as each of them counts.

    Raises:
        TrainingError: something of the run cannot be.
        CheckpointError: the model cannot be used.
        OSError: a file cannot be read or written.
    """

    def __init__(
        self,
        directory: RunDirectory,
        options: RunOptions,
        checkpoint: Checkpoint,
        observer: Observer,
        *,
        stop: Callable[[], bool] = lambda: False,
        device: str = "auto",
        threads: int = 0,
    ) -> None:
        self._directory = directory
        self._options = options
        self._training_options(1)  # what is out of range is told now, not when the first text is there
        self._checkpoint = checkpoint
        if options.start_from is None:
            vocabulary = checkpoint.config.vocab_size
            sizes = (options.draft_vocab_size, options.clusters, options.chosen_clusters)
            head = HeadSizes.of(*sizes, vocabulary=vocabulary, needed=max(1, len(set(checkpoint.eos_token_ids))))
            self._shape = DrafterShape.for_target(
                checkpoint.config,
                draft_vocab_size=head.tokens,
                layers=options.layers,
                num_centroids=head.clusters,
                centroid_intermediate_top_k=head.chosen,
            )
        else:
            check_fits(self._start(options.start_from), checkpoint)
        self._observer = observer
        self._stop = stop
        self._device = _device(device)
        self._threads = threads
        self._kept: KeptFeatures | None = None
        self._started = time.monotonic()
        self._spent = 0.0  # in the sessions before this one
        self._writing = 0.0
        self._step = 0
        self._may_end = False  # whether a step is done; before that text is written however long it takes
        self._tokens = 0
        self._written = 0

    def train(self) -> bool:
        """Runs to the end, or until it is asked to stop; False if that.

        Raises:
            As the class, and RuntimeError: the engine failed.
            TrainingError: there is too little memory.
        """
        self._recall()
        try:
            with _torch_threads(self._threads), self._engine() as engine:
                self._needs().check(self._device)
                self._train(self._writer(engine))
        except Stopped:
            return False
        except NotFiniteError as error:
            raise TrainingError(f"{error}; {self._another_way()}") from None
        except torch.OutOfMemoryError as error:
            raise TrainingError(f"the GPU has too little memory to train there ({error}); use --device cpu") from None
        except RuntimeError as error:
            wanted = _OUT_OF_MEMORY.search(str(error))
            if wanted is None:
                raise
            raise TrainingError(
                f"there is too little memory to train here: PyTorch could not have {int(wanted[1]) / 1e9:.1f} GB more; "
                "free some, or begin in another directory with a shorter --length"
            ) from None
        finally:
            self._kept = None
            if self._device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()  # an engine may need it next
        return True

    def _another_way(self) -> str:
        """What to do where steps get too large: they would be the same again if this run were gone on with."""
        way = f"begin in another directory with a smaller --learning-rate than {self._options.learning_rate:g}"
        if self._directory.drafter.exists():
            way += f", and from the drafter as far as it came: --from {shlex.quote(str(self._directory.drafter))}"
        return way

    @property
    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._started

    def _engine(self) -> Engine:
        text = self._options.text
        return Engine(
            self._checkpoint,
            drafter="lookup",
            device="cpu",  # a GPU's memory is for training
            threads=self._threads,
            weights=self._options.weights,
            max_sequences=text.streams,
            prefix_cache=False,
            progress=self._observer.loading,
        )

    def _needs(self) -> MemoryNeeds:
        start = self._options.start_from
        return MemoryNeeds.of(self._checkpoint, self._shape if start is None else self._start(start), self._precision())

    def _writer(self, engine: Engine) -> TextWriter:
        prompts, aside = prompts_of_run(self._directory, self._options), None
        if prompts is not None:
            prompts, aside = set_aside(prompts, self._options.seed)
        text = dataclasses.replace(self._options.text, seed=self._options.seed)
        writer = TextWriter(engine, self._directory.text, text, prompts)
        if aside is not None:
            check_prompts(engine, aside)
        return writer

    def _train(self, writer: TextWriter) -> None:
        options = self._options
        precision = self._precision()
        batches = TextBatches(
            lambda number: self._shard(writer, number),
            identity=writer.identity,
            length=options.length,
            tokens_per_batch=options.tokens_per_batch,
            seed=options.seed,
        )
        first = self._shard(writer, 0)
        self._phase("loading the target")
        target = FrozenTarget(self._checkpoint, device=self._device, dtype=DTYPES[precision])
        vocabulary = self._vocabulary(target, first)
        drafter = self._new_drafter(target, vocabulary, first)
        compared = None if vocabulary is None else torch.from_numpy(vocabulary.most_frequent(MOST_COMPARED))
        kept = self._kept = KeptFeatures(target, self._directory.features)

        def trainer_of(drafter: DrafterModule, options: TrainingOptions) -> Trainer:
            return Trainer(target, drafter, options, self._directory.states, compared, kept.features)

        plan = self._plan(lambda options: trainer_of(copy.deepcopy(drafter), options), batches)
        trainer = trainer_of(drafter, self._training_options(plan.steps))
        trainer.resume(batches)
        keep = partial(self._keep, trainer, batches)
        try:
            self._take_steps(trainer, batches, plan, keep)
        except Stopped:
            keep()
            raise
        except _TimeIsUp:
            self._log("end", {})  # the time that it took to write what is thrown away
        keep()
        kept.forget()

    def _take_steps(self, trainer: Trainer, batches: TextBatches, plan: Plan, keep: Callable[[], None]) -> None:
        self._may_end = trainer.step > 0
        if self._may_end and self._time_is_up():
            return  # it was up before, and the run lacks at most what comes after the steps
        for figures in trainer.steps(batches):
            self._may_end = True
            self._step = figures.step
            self._tokens += figures.tokens
            progress = Progress(plan, figures, self._seconds, self._writing, self._tokens, self._written)
            self._log("step", asdict(figures))
            self._observer.step(progress)
            if figures.step % plan.save_every == 0 and figures.step < plan.steps:
                keep()
            self._poll()
            if self._time_is_up():
                break

    def _phase(self, what: str) -> None:
        self._poll()
        self._observer.phase(what)

    def _poll(self) -> None:
        if self._stop():
            raise Stopped

    def _time_is_up(self) -> bool:
        return self._options.hours is not None and self._seconds > self._options.hours * 3600.0

    # --- text ---------------------------------------------------------------------------------------------------

    def _shard(self, writer: TextWriter, number: int) -> Shard:
        while number >= writer.shards:
            started = time.monotonic()
            log = partial(self._log_text, writer.shards, started)
            writer.write_shard(lambda done: self._wrote(writer.shards, done), log, self._with_room)
        return read_shard(self._directory.text, number)

    def _log_text(self, number: int, started: float, shard: Shard) -> None:
        self._writing += time.monotonic() - started
        self._written += shard.generated_tokens
        self._log("text", {"shard": number, "tokens": shard.generated_tokens})

    def _wrote(self, shard: int, progress: TextProgress) -> None:
        self._observer.writing(shard, progress)
        self._poll()
        if self._may_end and self._time_is_up():
            raise _TimeIsUp

    # --- the drafter --------------------------------------------------------------------------------------------

    def _new_drafter(self, target: FrozenTarget, vocabulary: DraftVocabulary | None, first: Shard) -> DrafterModule:
        """The drafter as it is before the first step: a function of the first text and the seed, or of another one."""
        if self._options.start_from is not None:
            start = self._start(self._options.start_from)
            if not self._directory.initial.exists():
                drafter = read_drafter(start, self._checkpoint)
                self._write(drafter, dict(drafter.named_parameters()), self._directory.initial)
            # As it was written, so that it is the same however often the run is gone on with.
            return read_drafter(self._start(self._options.start_from), self._checkpoint).to(target.device)
        assert vocabulary is not None
        drafter = DrafterModule(self._shape, torch.from_numpy(vocabulary.token_ids)).to(target.device)
        start_from_target(drafter, target, self._options.seed)
        start_centroids(drafter, target, torch.from_numpy(vocabulary.counts))
        text = _rectangle([text.token_ids for text in first.texts()])
        if text is not None and self._shape.text.hidden_size == target.config.hidden_size:
            fit_pre_projection(drafter, target, torch.from_numpy(text).to(target.device))
        if not self._directory.initial.exists():
            self._write(drafter, dict(drafter.named_parameters()), self._directory.initial)
        return drafter

    def _start(self, drafter: str) -> AssistantCheckpoint:
        """The drafter to go on from: the run's own copy of it once there is one."""
        return open_drafter(self._directory.initial if self._directory.initial.exists() else drafter)

    def _vocabulary(self, target: FrozenTarget, first: Shard) -> DraftVocabulary | None:
        """What can be drafted, and how often; None where a drafter to go on from says that, and all is compared."""
        given: npt.NDArray[np.int32] | None = None
        if self._options.start_from is not None:
            start = self._start(self._options.start_from)
            given = np.arange(target.config.vocab_size, dtype=np.int32)  # a head of its own
            if start.config.draft_vocab_size:
                assert start.head_token_ids is not None
                given = start.head_token_ids
            if len(given) <= MOST_COMPARED:
                return None
        saved = self._directory.vocabulary()
        if saved is not None:
            return saved
        self._phase("choosing the tokens that can be drafted")
        figures = text_figures(target, [text.token_ids for text in first.texts()])
        if given is None:
            always = self._checkpoint.eos_token_ids
            given = choose_draft_vocabulary(target.config, figures.counts, self._shape.draft_vocab_size, always)
            if self._shape.num_centroids:
                rows = target.embedding[torch.from_numpy(given)].float() @ figures.directions
                given = given[balanced_clusters(rows, self._shape.num_centroids).cpu().numpy()]
        vocabulary = DraftVocabulary(given, figures.counts[given])
        self._directory.save_vocabulary(vocabulary)
        return vocabulary

    def _keep(self, trainer: Trainer, batches: TextBatches) -> None:
        """Makes sure that state and drafter are those of the last step."""
        if trainer.step:
            self._with_room(lambda: self._save(trainer, batches))

    def _with_room(self, write: Callable[[], object]) -> None:
        """Writes something. The disk may be full of features, which can be computed again: they make room for it."""
        try:
            write()
        except (OSError, WriteError):
            if not self._directory.features.exists():
                raise
            if self._kept is not None:
                self._kept.forget()
            else:
                shutil.rmtree(self._directory.features, ignore_errors=True)
            write()

    def _save(self, trainer: Trainer, batches: TextBatches) -> None:
        if trainer.step != last_step(self._directory.states):
            trainer.save(batches)
        self._directory.publish(lambda directory: self._write(trainer.drafter, trainer.averaged, directory))

    def _write(self, drafter: DrafterModule, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        start = self._options.start_from
        if start is not None and not is_hub_name(start):
            start = Path(start).name
        write_drafter(drafter, weights, directory, target_name=self._checkpoint.name, started_from=start)

    def _precision(self) -> str:
        """What the run began with: it is the same wherever it is gone on with."""
        values = self._directory.read()
        if "precision" not in values:
            values["precision"] = choose_precision(self._options.precision, self._device)
            self._directory.write(values)
        precision: str = values["precision"]
        return precision

    # --- how long -----------------------------------------------------------------------------------------------

    def _plan(self, rehearsal: Callable[[TrainingOptions], Trainer], batches: TextBatches) -> Plan:
        """The plan that was made before, or a new one.

        Args:
            rehearsal: a trainer of a copy of the drafter.
            batches: to train on.
        """
        values = self._directory.read()
        if "plan" in values:
            return Plan(**values["plan"])
        if self._options.tokens is not None:
            steps = math.ceil(self._options.tokens / (self._options.accumulate * batches.mean_tokens))
        else:
            assert self._options.hours is not None
            self._phase("measuring how fast training goes")
            # A batch comes 1 + REPLAYED times, and what the target computes of it is there from the second time on.
            new = self._rehearse(rehearsal, batches)
            known = self._rehearse(rehearsal, batches)
            written = self._writing / (count_shards(self._directory.text) * batches.of_first_shard)
            seconds = self._options.accumulate * (new + REPLAYED * known + written) / (1 + REPLAYED)
            left = self._options.hours * 3600.0 - self._seconds
            steps = max(1, int(_MARGIN * left / seconds))
        tokens_per_step = self._options.accumulate * self._options.tokens_per_batch
        plan = Plan(steps, max(1, _TOKENS_PER_SAVE // tokens_per_step))
        self._with_room(lambda: self._directory.write({**values, "plan": asdict(plan)}))
        return plan

    def _rehearse(self, rehearsal: Callable[[TrainingOptions], Trainer], batches: TextBatches) -> float:
        """Seconds of a batch, measured on a drafter that is thrown away. No text is written meanwhile."""
        count = min(_REHEARSED_BATCHES + 1, batches.of_first_shard)
        trainer = rehearsal(dataclasses.replace(self._training_options(count), accumulate=1))
        taken = []
        for figures in trainer.steps(batches):
            taken.append(figures.tokens / figures.tokens_per_second)
            self._poll()
        return float(np.median(taken[1:] or taken))  # the first one warms up, where there are more

    def _training_options(self, steps: int) -> TrainingOptions:
        return TrainingOptions(
            steps=steps,
            draft_depth=self._options.draft_depth,
            learning_rate=self._options.learning_rate,
            accumulate=self._options.accumulate,
            warmup_steps=min(50, steps // 10),
            seed=self._options.seed,
        )

    # --- the log ------------------------------------------------------------------------------------------------
    #
    # What has a file of its own, a state or a shard, has its line before it has its file. So the log has no gap,
    # whenever a run is killed: it can only be ahead of the files, and a session begins with cutting it.

    def _recall(self) -> None:
        """Goes back to the state and the text that are there; steps that are lost cost time all the same."""
        self._directory.remove_leftovers()
        entries = self._directory.entries()
        if entries:
            self._spent, self._writing = entries[-1]["seconds"], entries[-1]["writing"]
        self._step = last_step(self._directory.states)
        shards = count_shards(self._directory.text)
        kept = [
            entry
            for entry in entries
            if not (entry["kind"] == "step" and entry["step"] > self._step)
            and not (entry["kind"] == "text" and entry["shard"] >= shards)
        ]
        self._tokens = sum(entry["tokens"] for entry in kept if entry["kind"] == "step")
        self._written = sum(entry["tokens"] for entry in kept if entry["kind"] == "text")
        self._with_room(lambda: self._directory.replace_log([*kept, self._line("session", {})]))

    def _log(self, kind: str, entry: Mapping[str, Any]) -> None:
        self._with_room(lambda: self._directory.log(self._line(kind, entry)))

    def _line(self, kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        """It has the "step" that was the last one then."""
        spent = {"seconds": self._seconds, "writing": self._writing, "trained_tokens": self._tokens}
        return {"kind": kind, "step": self._step, **entry, **spent}


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with so many threads meanwhile; 0: with as many as it chooses itself."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("device = cuda: PyTorch finds no GPU here; use auto or cpu")
    if name not in ("cpu", "cuda"):
        raise TrainingError(f"device = {name}: must be auto, cpu or cuda")
    return torch.device(name)


def _rectangle(texts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64] | None:
    """Beginnings of texts of one length, as many and as long as there are; None if there is next to nothing."""
    most, length = _FIT_SHAPE
    while length >= 8:
        long_enough = [text[:length] for text in texts if len(text) >= length]
        if len(long_enough) >= most or (length < 16 and long_enough):
            return np.stack(long_enough[:most]).astype(np.int64)
        length //= 2
    return None

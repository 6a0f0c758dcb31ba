"""What a drafter is worth, measured by the engine that will use it: drafts accepted, and time gained.

Acceptance is measured with a fixed number of drafts a step and without lookup, so that every step drafts as many; many
texts at once, which changes no token. Drafts form a tree, so a position is a depth in it, and what fewer drafts bring
is measured for each number: their tree is no more than a part of the first levels of a larger one, and misses more.
Time is measured one text at a time, with and without drafts in turn.
Base models that are greedy repeat themselves, and repetitions are easily drafted: the figures are there once more of
the texts up to where they begin to go round in circles (draftwerk.training.repetition).
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from draftwerk.drafters import Drafter
from draftwerk.engine import Engine
from draftwerk.loading import Checkpoint
from draftwerk.measurement import BenchPrompt, StreamRecord, run_prompts
from draftwerk.requests import SamplingParams
from draftwerk.training.errors import TrainingError
from draftwerk.training.evaluation_prompts import EvaluationPrompt
from draftwerk.training.repetition import length_before_loop
from draftwerk.training.rounds import Acceptance, whole_rounds
from draftwerk.training.sampling import Sampling
from draftwerk.training.timing import Pace, step_seconds, tokens_per_second
from draftwerk.weights import Progress

SAMPLINGS = ("greedy", "sampled")
"""The names of the ways of sampling that everything is measured with; the second is EvaluationOptions.sampled."""

DRAFTERS = ("drafter", "drafter and lookup", "lookup")
"""Whose drafts are timed. "drafter and lookup" is what `draftwerk serve` does with a drafter."""

LENGTH_TOKENS = 48
"""Of every text, on which what each number of drafts brings is measured: whole texts would take most of the time."""

_STREAMS = 16
_PREFILL_CHUNK = 256  # leaves a step the rows for the drafts of all streams: one without them would count as a miss
_COST_TOKENS = 32  # generated to time a step
_COST_ROUNDS = 5


@dataclass(frozen=True)
class EvaluationOptions:
    """How a drafter is evaluated.

    Attributes:
        max_tokens: most tokens of a text.
        draft_length: drafts of a step where acceptance is measured; fewer are measured where speed is.
        timed_prompts: prompts that speed is measured on, spread over all of them.
        seed: of sampling.
        threads: kernel threads; 0: all.
        weights: as for draftwerk.Engine; so is `device`.
        sampled: what "sampled" is.
    """

    max_tokens: int = 128
    draft_length: int = 6
    timed_prompts: int = 12
    seed: int = 0
    threads: int = 0
    weights: str = "auto"
    device: str = "auto"
    sampled: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("max_tokens", 32, 1 << 20),
            ("draft_length", 1, 7),
            ("timed_prompts", 0, 1 << 20),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise TrainingError(f"{name} = {value}: must be {least} to {most}")


@dataclass(frozen=True)
class SamplingAcceptance:
    """Acceptance with one way of sampling.

    Attributes:
        sampling: a name of SAMPLINGS.
        tokens: generated.
        loop_share: share of them from where texts begin to go round in circles.
        whole: of the texts as they are.
        before_loops: of what they say before that.
        by_category: the latter by category of the prompts, in alphabetical order.
        tokens_per_step: before loops, with so many drafts a step, from 0; of the first LENGTH_TOKENS tokens of texts.
            Empty if speed is not measured, or no step of some number could be counted.
    """

    sampling: str
    tokens: int
    loop_share: float
    whole: Acceptance
    before_loops: Acceptance
    by_category: dict[str, Acceptance]
    tokens_per_step: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """What is gained by drafts.

    Attributes:
        drafter: one of DRAFTERS.
        sampling: a name of SAMPLINGS.
        whole: of texts as they are; None if no text is long enough.
        before_loops: of what they say before they go round in circles.
    """

    drafter: str
    sampling: str
    whole: Pace | None
    before_loops: Pace | None


@dataclass(frozen=True)
class Expectation:
    """What the tokens and the time of a step let expect of one stream, before loops.

    Attributes:
        sampling: a name of SAMPLINGS.
        by_draft_length: speed-up of so many drafts a step, from 0.
        best: the draft length with the highest.
    """

    sampling: str
    by_draft_length: tuple[float, ...]

    @property
    def best(self) -> int:
        return max(range(len(self.by_draft_length)), key=self.by_draft_length.__getitem__)


@dataclass(frozen=True)
class Evaluation:
    """Of a drafter, on one machine.

    Attributes:
        model, drafter: names.
        backend: such as "cpu avx512, 2 threads".
        prompts: number of prompts.
        options: how it was measured.
        acceptance: by way of sampling.
        step_seconds: draft length to the seconds of a step of one stream, drafting included; from 0.
        speeds: empty if nothing was timed.
    """

    model: str
    drafter: str
    backend: str
    prompts: int
    options: EvaluationOptions
    acceptance: tuple[SamplingAcceptance, ...]
    step_seconds: tuple[float, ...]
    speeds: tuple[Speed, ...]

    def expectations(self) -> tuple[Expectation, ...]:
        """By way of sampling; none of those with nothing to go by."""
        if not self.step_seconds:
            return ()
        plain = self.step_seconds[0]
        return tuple(
            Expectation(
                its.sampling,
                tuple(
                    tokens * plain / seconds
                    for tokens, seconds in zip(its.tokens_per_step, self.step_seconds, strict=True)
                ),
            )
            for its in self.acceptance
            if its.tokens_per_step
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, what is expected included."""
        expected = [{**asdict(its), "best_draft_length": its.best} for its in self.expectations()]
        return {**asdict(self), "expected": expected}


Report = Callable[[str, int, int], None]
"""Called with (what is being measured, how many are done, of how many). What it raises ends the evaluation."""


class Evaluator:
    """Measures drafters of one model on the same prompts.

    Args:
        checkpoint: the model.
        prompts: gives them, at least one, each with room for a text behind it; called once.
        options: how.
        report: told how far it is.
        loading: told how far the model is loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompts: Callable[[Engine], Sequence[EvaluationPrompt]],
        options: EvaluationOptions,
        report: Report = lambda *_: None,
        loading: Progress | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._choose_prompts = prompts
        self._prompts: Sequence[EvaluationPrompt] = ()
        self._options = options
        self._report = report
        self._loading = loading

    def evaluate(self, drafter: Drafter, name: str) -> Evaluation:
        """All there is to know of a drafter.

        Args:
            drafter: as draftwerk.Engine takes it.
            name: what it is called.

        Raises:
            CheckpointError: the drafter cannot be used with the model.
            TrainingError: texts are longer than the model's context; a draft changed a token.
        """
        with self._engine(drafter, lookup=False, draft_length=self._options.draft_length) as engine:
            info = engine.info
            acceptance = asyncio.run(self._acceptance(engine))
            timed = self._timed()
            step_seconds = asyncio.run(self._step_seconds(engine, timed[0])) if timed else ()
        speeds: list[Speed] = []
        for setup in DRAFTERS if timed else ():
            drafts_by = "lookup" if setup == "lookup" else drafter
            with self._engine(drafts_by, lookup=setup != "drafter", draft_length=None) as engine:
                speeds += asyncio.run(self._speeds(engine, setup, timed))
        prompts = len(self._prompts)
        return Evaluation(
            info.model, name, info.backend, prompts, self._options, acceptance, step_seconds, tuple(speeds)
        )

    def acceptance(self, drafter: Drafter) -> tuple[SamplingAcceptance, ...]:
        """What evaluate() says of acceptance, alone."""
        with self._engine(drafter, lookup=False, draft_length=self._options.draft_length) as engine:
            return asyncio.run(self._acceptance(engine))

    def _engine(self, drafter: Drafter, *, lookup: bool, draft_length: int | None) -> Engine:
        return Engine(
            self._checkpoint,
            drafter=drafter,
            lookup=lookup,
            device=self._options.device,
            threads=self._options.threads,
            weights=self._options.weights,
            draft_length=draft_length,
            max_draft_length=max(16, self._options.draft_length),
            max_sequences=_STREAMS,
            prefill_chunk=_PREFILL_CHUNK,
            prefix_cache=False,
            progress=self._loading,
        )

    def _params(self, sampling: str, **changes: Any) -> SamplingParams:
        given = {"seed": self._options.seed, "max_tokens": self._options.max_tokens, **changes}
        params = self._options.sampled.params if sampling == "sampled" else SamplingParams()
        return dataclasses.replace(params, **given)

    # --- drafts accepted ----------------------------------------------------------------------------------------

    async def _acceptance(self, engine: Engine) -> tuple[SamplingAcceptance, ...]:
        engine.deliver_on(asyncio.get_running_loop())
        most = engine.info.max_context - 1  # a prompt has a token at least
        if self._options.max_tokens > most:
            raise TrainingError(f"max_tokens = {self._options.max_tokens}: must be at most {most} for this model")
        self._prompts = self._prompts or self._choose_prompts(engine)
        return tuple([await self._acceptance_with(engine, sampling) for sampling in SAMPLINGS])

    async def _acceptance_with(self, engine: Engine, sampling: str) -> SamplingAcceptance:
        length, most = self._options.draft_length, self._options.max_tokens
        texts = await self._generate_all(engine, sampling, f"drafts accepted, {sampling}")
        whole: list[int] = []
        before_loops: list[int] = []
        by_category: dict[str, list[int]] = {prompt.category: [] for prompt in self._prompts}
        tokens = looping = 0
        for prompt, text in zip(self._prompts, texts, strict=True):
            kept = length_before_loop(text.token_ids)
            tokens += len(text.token_ids)
            looping += len(text.token_ids) - kept
            whole += _rounds(text, length, most, len(text.token_ids))
            rounds = _rounds(text, length, most, kept)
            before_loops += rounds
            by_category[prompt.category] += rounds
        return SamplingAcceptance(
            sampling,
            tokens,
            looping / tokens if tokens else 0.0,
            Acceptance.of(whole, length),
            Acceptance.of(before_loops, length),
            {category: Acceptance.of(rounds, length) for category, rounds in sorted(by_category.items())},
            await self._tokens_per_step(engine, sampling, texts) if self._options.timed_prompts else (),
        )

    async def _tokens_per_step(self, engine: Engine, sampling: str, texts: Sequence[StreamRecord]) -> tuple[float, ...]:
        """By number of drafts; `texts` are those with the most. Empty if there is a number without a round."""
        length = self._options.draft_length
        until = [min(length_before_loop(text.token_ids), LENGTH_TOKENS) for text in texts]
        by_draft_length = [1.0]
        for drafts in range(1, length + 1):
            its, most = texts, self._options.max_tokens
            if drafts < length:
                most = min(LENGTH_TOKENS + drafts, most)  # the last round that counts has all its drafts, too
                what = f"tokens a step of {drafts}, {sampling}"
                its = await self._generate_all(engine, sampling, what, max_tokens=most, max_draft_length=drafts)
            rounds = [
                tokens for text, end in zip(its, until, strict=True) for tokens in _rounds(text, drafts, most, end)
            ]
            if not rounds:  # texts that end or repeat themselves at once
                return ()
            by_draft_length.append(Acceptance.of(rounds, drafts).tokens_per_step)
        return tuple(by_draft_length)

    async def _generate_all(self, engine: Engine, sampling: str, what: str, **changes: Any) -> list[StreamRecord]:
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            self._report(what, done, len(self._prompts))

        return await _generate(engine, self._prompts, self._params(sampling, **changes), one_more)

    # --- time ---------------------------------------------------------------------------------------------------

    def _timed(self) -> list[EvaluationPrompt]:
        """Those prompts that speed is measured on."""
        count = min(self._options.timed_prompts, len(self._prompts))
        return [self._prompts[i * len(self._prompts) // count] for i in range(count)]

    async def _step_seconds(self, engine: Engine, prompt: EvaluationPrompt) -> tuple[float, ...]:
        """Seconds of a step by its number of drafts, medians over some turns; empty if they are too short for it."""
        engine.deliver_on(asyncio.get_running_loop())
        measured: list[list[float]] = [[] for _ in range(self._options.draft_length + 1)]
        for turn in range(_COST_ROUNDS + 1):
            for drafts, seconds in enumerate(measured):
                most = min(_COST_TOKENS + drafts, self._options.max_tokens)
                params = self._params("greedy", max_tokens=most, max_draft_length=drafts, ignore_eos=True)
                (record,) = await _generate(engine, [prompt], params)
                its = step_seconds(record, drafts, most)
                if turn and its is not None:  # the first turn warms up
                    seconds.append(its)
            self._report("time of a step", turn, _COST_ROUNDS)
        return tuple(map(statistics.median, measured)) if all(measured) else ()

    async def _speeds(self, engine: Engine, drafter: str, prompts: Sequence[EvaluationPrompt]) -> list[Speed]:
        engine.deliver_on(asyncio.get_running_loop())
        await _generate(engine, prompts[:1], self._params("greedy"))  # teaches the draft budget what things cost
        return [await self._speed(engine, drafter, sampling, prompts) for sampling in SAMPLINGS]

    async def _speed(self, engine: Engine, drafter: str, sampling: str, prompts: Sequence[EvaluationPrompt]) -> Speed:
        pairs: list[tuple[StreamRecord, StreamRecord]] = []
        for index, prompt in enumerate(prompts):
            self._report(f"speed, {drafter}, {sampling}", index, len(prompts))
            records: dict[bool, StreamRecord] = {}
            for drafting in (True, False) if index % 2 else (False, True):
                (records[drafting],) = await _generate(engine, [prompt], self._params(sampling, drafting=drafting))
            plain, drafted = records[False], records[True]
            if plain.token_ids != drafted.token_ids:
                raise TrainingError(f"drafts by {drafter} changed the output ({sampling}): a defect of draftwerk")
            pairs.append((plain, drafted))
        self._report(f"speed, {drafter}, {sampling}", len(prompts), len(prompts))
        return Speed(
            drafter,
            sampling,
            Pace.of((tokens_per_second(plain), tokens_per_second(drafted)) for plain, drafted in pairs),
            Pace.of(map(_before_loops, pairs)),
        )


def _rounds(text: StreamRecord, drafts: int, max_tokens: int, until: int) -> list[int]:
    return whole_rounds([count for _, count in text.arrivals], drafts, max_tokens, until)


def _before_loops(pair: tuple[StreamRecord, StreamRecord]) -> tuple[float | None, float | None]:
    plain, drafted = pair
    kept = length_before_loop(plain.token_ids)
    return tokens_per_second(plain, kept), tokens_per_second(drafted, kept)


async def _generate(
    engine: Engine,
    prompts: Sequence[EvaluationPrompt],
    params: SamplingParams,
    on_done: Callable[[], None] = lambda: None,
) -> list[StreamRecord]:
    of = [(BenchPrompt("", prompt.category, ""), prompt.token_ids) for prompt in prompts]
    records, _ = await run_prompts(lambda token_ids: engine.submit(token_ids, params), of, _STREAMS, on_done)
    return records

"""Drafters whose worth is known are evaluated: their drafts are read off recorded runs; and one that drafts trees."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import tiny_training
from tiny_writer import tiny_engine

from draftwerk import Engine, SamplingParams
from draftwerk.drafters import SyntheticDrafter
from draftwerk.loading import Checkpoint
from draftwerk.measurement import run_prompts
from draftwerk.training.errors import TrainingError
from draftwerk.training.evaluation import SAMPLINGS, Evaluation, EvaluationOptions, Evaluator, Expectation
from draftwerk.training.evaluation_prompts import EvaluationPrompt, from_file, from_openings
from draftwerk.training.export import write_drafter
from draftwerk.training.prompts import encode_prompt, read_prompts
from draftwerk.training.repetition import length_before_loop
from fake_checkpoint import VOCABULARY

OPTIONS = EvaluationOptions(max_tokens=60, draft_length=3, timed_prompts=2, threads=1, seed=4)
PROMPTS = [EvaluationPrompt((2, 40 + i, 70, 90), "even" if i % 2 == 0 else "odd") for i in range(6)]


@pytest.fixture(scope="module")
def texts(target: Checkpoint) -> dict[str, list[list[int]]]:
    """Prompts with what the model makes of them, by sampling."""
    recorded: dict[str, list[list[int]]] = {}
    with tiny_engine(target) as engine:
        for sampling, params in zip(SAMPLINGS, (SamplingParams(), OPTIONS.sampled.params), strict=True):
            its = dataclasses.replace(params, seed=OPTIONS.seed, max_tokens=OPTIONS.max_tokens)
            texts = engine.generate([list(prompt.token_ids) for prompt in PROMPTS], its)
            recorded[sampling] = [[*text.prompt_token_ids, *text.token_ids] for text in texts]
    return recorded


def drafter(texts: dict[str, list[list[int]]], acceptance: float) -> SyntheticDrafter:
    return SyntheticDrafter([text for of_sampling in texts.values() for text in of_sampling], acceptance, seed=1)


def evaluator(target: Checkpoint, reports: list[tuple[str, int, int]] | None = None, **changes: int) -> Evaluator:
    def prompts(_: Engine) -> Sequence[EvaluationPrompt]:
        return PROMPTS

    def report(*progress: object) -> None:
        if reports is not None:
            reports.append(progress)  # type: ignore[arg-type]

    return Evaluator(target, prompts, dataclasses.replace(OPTIONS, **changes), report)


def test_drafts_that_are_always_right_are_accepted_at_every_position(
    target: Checkpoint, texts: dict[str, list[list[int]]]
) -> None:
    for acceptance in evaluator(target).acceptance(drafter(texts, 1.0)):
        assert acceptance.whole.rounds > 0
        assert acceptance.whole.by_position == (1.0, 1.0, 1.0)
        assert acceptance.whole.tokens_per_step == 4.0
        assert acceptance.before_loops.by_position == (1.0, 1.0, 1.0)


def test_drafts_that_are_never_right_are_accepted_nowhere(
    target: Checkpoint, texts: dict[str, list[list[int]]]
) -> None:
    for acceptance in evaluator(target).acceptance(drafter(texts, 0.0)):
        assert acceptance.whole.by_position == (0.0, 0.0, 0.0)
        assert acceptance.whole.tokens_per_step == 1.0


def test_acceptance_is_that_of_the_engines_statistics(target: Checkpoint, texts: dict[str, list[list[int]]]) -> None:
    (greedy, _) = evaluator(target).acceptance(drafter(texts, 0.6))
    accepted = drafted = 0
    with tiny_engine(target, drafter=drafter(texts, 0.6), draft_length=3) as engine:
        for prompt in PROMPTS:
            params = SamplingParams(seed=OPTIONS.seed, max_tokens=OPTIONS.max_tokens)
            completion = engine.generate(list(prompt.token_ids), params)
            assert completion.finish_reason == "length"
            # Whole rounds are those that drafted at the last position.
            accepted += completion.stats.accepted_by_position[-1]
            drafted += completion.stats.drafted_by_position[-1]
    assert 0 < accepted < drafted
    assert greedy.whole.rounds == drafted
    assert greedy.whole.by_position[-1] == accepted / drafted


def test_loops_and_categories_are_told_apart(target: Checkpoint, texts: dict[str, list[list[int]]]) -> None:
    acceptances = evaluator(target).acceptance(drafter(texts, 1.0))
    for acceptance in acceptances:
        outputs = [text[4:] for text in texts[acceptance.sampling]]
        assert acceptance.tokens == sum(map(len, outputs))
        kept = sum(map(length_before_loop, outputs))
        assert acceptance.loop_share == pytest.approx(1 - kept / acceptance.tokens)
        assert list(acceptance.by_category) == ["even", "odd"]
        of_categories = sum(its.rounds for its in acceptance.by_category.values())
        assert acceptance.before_loops.rounds == of_categories
        assert of_categories <= acceptance.whole.rounds
    assert acceptances[0].loop_share > 0


def test_an_evaluation_has_times(target: Checkpoint, texts: dict[str, list[list[int]]]) -> None:
    reports: list[tuple[str, int, int]] = []
    evaluation = evaluator(target, reports).evaluate(drafter(texts, 0.8), "a drafter")
    assert (evaluation.drafter, evaluation.prompts) == ("a drafter", len(PROMPTS))
    assert [(speed.drafter, speed.sampling) for speed in evaluation.speeds] == [
        (drafter, sampling) for drafter in ("drafter", "drafter and lookup", "lookup") for sampling in SAMPLINGS
    ]
    assert {what for what, _, _ in reports} == {
        *(f"drafts accepted, {sampling}" for sampling in SAMPLINGS),
        *(f"tokens a step of {drafts}, {sampling}" for drafts in (1, 2) for sampling in SAMPLINGS),
        "time of a step",
        *(f"speed, {speed.drafter}, {speed.sampling}" for speed in evaluation.speeds),
    }
    assert all(0 <= done <= of for _, done, of in reports)
    json.dumps(evaluation.as_dict(), allow_nan=False)


def test_what_is_expected_follows_from_the_tokens_and_the_time_of_a_step(
    target: Checkpoint, texts: dict[str, list[list[int]]]
) -> None:
    evaluation = evaluator(target).evaluate(drafter(texts, 1.0), "a drafter")
    timed = dataclasses.replace(evaluation, step_seconds=(0.010, 0.012, 0.015, 0.030))
    for expected in timed.expectations():
        assert expected.by_draft_length == pytest.approx((1.0, 2 / 1.2, 3 / 1.5, 4 / 3.0))
        assert expected.best == 2
    assert timed.as_dict()["expected"][0]["best_draft_length"] == 2


def test_nothing_is_expected_of_texts_that_repeat_themselves_at_once(
    target: Checkpoint, texts: dict[str, list[list[int]]]
) -> None:
    assert length_before_loop(texts["greedy"][0][4:]) <= OPTIONS.draft_length + 1
    acceptance = Evaluator(target, lambda _: PROMPTS[:1], OPTIONS).acceptance(drafter(texts, 1.0))
    assert [its.tokens_per_step for its in acceptance] == [(), (1.0, 2.0, 3.0, 4.0)]
    steps = (0.010,) * (OPTIONS.draft_length + 1)
    expected = Evaluation("tiny", "a drafter", "cpu", 1, OPTIONS, acceptance, steps, ()).expectations()
    assert [its.sampling for its in expected] == ["sampled"]


@pytest.fixture(scope="module")
def broad(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained drafter. It gives several first tokens a chance: its trees are broad, those of few drafts narrow."""
    fresh = tiny_training.tiny_drafter(tiny_training.FrozenTarget(target), draft_vocab_size=VOCABULARY)
    directory = tmp_path_factory.mktemp("drafter") / "fresh"
    write_drafter(fresh, dict(fresh.named_parameters()), directory, target_name="tiny")
    return str(directory)


def test_fewer_drafts_bring_what_trees_of_so_many_do(
    target: Checkpoint, broad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwerk.training.evaluation.LENGTH_TOKENS", OPTIONS.max_tokens)
    acceptance = evaluator(target).acceptance(broad)
    steps = (0.010,) * (OPTIONS.draft_length + 1)
    expected = Evaluation("tiny", "fresh", "cpu", len(PROMPTS), OPTIONS, acceptance, steps, ()).expectations()
    for drafts in range(1, OPTIONS.draft_length + 1):
        measured = evaluator(target, draft_length=drafts, timed_prompts=0).acceptance(broad)
        for its, of_so_many in zip(expected, measured, strict=True):
            assert its.by_draft_length[drafts] == pytest.approx(of_so_many.before_loops.tokens_per_step)
    (_, sampled), (_, by_draft_length) = acceptance, (its.by_draft_length for its in expected)
    assert (
        1.05 < by_draft_length[1] < sampled.before_loops.by_position[0] + 0.9
    )  # of three drafts the first, or another


def test_each_number_of_drafts_is_tried_on_the_same_tokens(
    target: Checkpoint, broad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftwerk.training.evaluation.LENGTH_TOKENS", 30)
    for drafts in (1, 2):
        # Once of texts that end behind those tokens, once of whole texts, as those with the most drafts are.
        cut, whole = (evaluator(target, draft_length=length).acceptance(broad) for length in (3, drafts))
        for some, most in zip(cut, whole, strict=True):
            assert some.tokens_per_step[drafts] == most.tokens_per_step[drafts]
        assert whole[1].tokens_per_step[drafts] != whole[1].before_loops.tokens_per_step  # of all 60 tokens


def test_a_draft_that_changes_a_token_is_not_passed_over(
    target: Checkpoint, texts: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count()

    async def changing(*arguments: Any) -> Any:
        records, seconds = await run_prompts(*arguments)
        call = next(calls)
        return [dataclasses.replace(record, token_ids=(call, *record.token_ids)) for record in records], seconds

    monkeypatch.setattr("draftwerk.training.evaluation.run_prompts", changing)
    with pytest.raises(TrainingError, match="changed the output"):
        evaluator(target).evaluate(drafter(texts, 1.0), "a drafter")


def test_nothing_is_timed_if_nobody_asks(target: Checkpoint, texts: dict[str, list[list[int]]]) -> None:
    evaluation = evaluator(target, timed_prompts=0).evaluate(drafter(texts, 1.0), "a drafter")
    assert (evaluation.step_seconds, evaluation.speeds, evaluation.expectations()) == ((), (), ())


def test_the_best_draft_length_is_that_with_the_highest_speed_up() -> None:
    assert Expectation("greedy", (1.0, 1.4, 1.6, 1.5)).best == 2
    assert Expectation("greedy", (1.0, 0.9)).best == 0


def test_texts_that_are_longer_than_the_context_are_named(
    target: Checkpoint, texts: dict[str, list[list[int]]]
) -> None:
    most = target.config.max_position_embeddings
    with pytest.raises(TrainingError, match=rf"^max_tokens = {most}: must be at most {most - 1} for this model$"):
        evaluator(target, max_tokens=most).acceptance(drafter(texts, 1.0))


def test_what_reports_raise_ends_an_evaluation(target: Checkpoint, texts: dict[str, list[list[int]]]) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Evaluator(target, lambda _: PROMPTS, OPTIONS, stop).acceptance(drafter(texts, 1.0))


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 31), ("draft_length", 0), ("draft_length", 8), ("timed_prompts", -1)]
)
def test_options_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(TrainingError, match=f"{name} = {value}: must be"):
        EvaluationOptions(**{name: value})


# --- prompts -----------------------------------------------------------------------------------------------------


def test_openings_are_different_ones_and_none_of_those_that_were_written_from(target: Checkpoint) -> None:
    with tiny_engine(target) as engine:
        first = from_openings(engine, 20, seed=3, room=32)
        assert len({prompt.token_ids for prompt in first}) == 20
        assert first == from_openings(engine, 20, seed=3, room=32)
        others = from_openings(engine, 20, seed=3, room=32, without={first[0].token_ids, first[5].token_ids})
        assert others[:18] == [*first[1:5], *first[6:]]


def test_prompts_of_a_file_are_spread_over_it(target: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("abcdefghij"), encoding="utf-8")
    prompts = read_prompts(path)
    with tiny_engine(target) as engine:
        chosen = from_file(engine, prompts, 5, room=32)
        assert [prompt.token_ids for prompt in chosen] == [
            encode_prompt(engine, prompts.prompts[i]) for i in range(0, 10, 2)
        ]
        assert len(from_file(engine, prompts, 99, room=32)) == 10
        with pytest.raises(TrainingError, match=r"prompts.txt:1: a prompt of 2 tokens: must be at most 1, as \d+ more"):
            from_file(engine, prompts, 5, room=engine.info.max_context - 1)

"""The watch over a model drafter's acceptance, on statistics that a script makes up."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fake_core
from draftwerk import SamplingParams
from draftwerk.acceptance import LEAST_REQUESTS, LOG_FIELDS, AcceptanceWarning, AcceptanceWatch
from draftwerk.acceptance_causes import Cause, Evidence, quantisation

BLOCK = 512  # rounds, see cpp/engine/acceptance_window.h
ROUNDS_TO_TELL = 66  # of which none is accepted
MARKER = 5
TEMPLATED, RAW = [2, MARKER, 9, 9], [2, 9, 9, 9]


def evidence(**known: Any) -> Evidence:
    return Evidence(
        **{"target": "m", "drafter": "m-assistant", "made_for": None, "quantised": None, "turn_marker": MARKER, **known}  # type: ignore[arg-type]
    )


class Scene:
    """An engine's statistics with a watch over them, at a time that the test sets."""

    def __init__(self, drafter: str = "mtp", *, draft_length: int | None = None, of: Evidence | None = None) -> None:
        self.drafter = drafter
        self.now = 0.0
        self.asked = 0
        self.evidence = of or evidence()
        self.watch = AcceptanceWatch(self._statistics, self.evidence, draft_length=draft_length, clock=lambda: self.now)
        self._blocks: list[list[bool]] = [[], []]

    def draft(self, outcomes: Sequence[bool]) -> None:
        """One round for each, of a single draft."""
        for accepted in outcomes:
            self._blocks[1].append(accepted)
            if len(self._blocks[1]) == BLOCK:
                self._blocks = [self._blocks[1], []]

    def end_requests(self, count: int = 1) -> None:
        """Requests end, a minute apart."""
        for _ in range(count):
            self.now += 60.0
            self.watch.request_ended()

    @property
    def warning(self) -> AcceptanceWarning | None:
        """The one in force."""
        return self.watch.look(self._figures()).get(self.drafter)

    def _statistics(self) -> dict[str, Any]:
        self.asked += 1
        return self._figures()

    def _figures(self) -> dict[str, Any]:
        recent = self._blocks[0] + self._blocks[1]
        counts = ([len(recent)], [sum(recent)]) if recent else ([], [])
        return {self.drafter: fake_core.drafter_figures(*counts)}


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[logging.LogRecord]]:
    """What has been logged so far."""
    caplog.set_level(logging.INFO, logger="draftwerk.acceptance")
    return lambda: caplog.records


# --- when ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    acceptance=st.floats(0.25, 1.0),
    seed=st.integers(0, 2**32),
    rounds=st.lists(st.integers(0, 300), min_size=1, max_size=40),
)
def test_a_drafter_that_accepts_well_is_never_warned_of(acceptance: float, seed: int, rounds: list[int]) -> None:
    scene, chance = Scene(), random.Random(seed)
    for count in rounds:
        scene.draft([chance.random() < acceptance for _ in range(count)])
        scene.end_requests()
        assert scene.warning is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rounds=st.lists(st.integers(0, 40), min_size=1, max_size=60))
def test_a_drafter_that_is_never_right_is_found_out_at_once(rounds: list[int]) -> None:
    """After the rounds and the requests that it takes, not before."""
    scene, drafted = Scene(), 0
    for requests, count in enumerate(rounds, 1):
        scene.draft([False] * count)
        drafted += count
        scene.end_requests()
        assert (scene.warning is not None) == (drafted >= ROUNDS_TO_TELL and requests >= LEAST_REQUESTS)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), good=st.integers(0, 5 * BLOCK))
def test_a_drafter_that_goes_bad_is_found_out_once_the_window_has_moved_on(seed: int, good: int) -> None:
    """One that guesses a word in fifty, whatever it was before."""
    scene, chance = Scene(), random.Random(seed)
    scene.draft([chance.random() < 0.7 for _ in range(good)])
    scene.end_requests(LEAST_REQUESTS)
    assert scene.warning is None
    scene.draft([chance.random() < 0.02 for _ in range(2 * BLOCK)])
    scene.end_requests()
    assert scene.warning is not None


@pytest.mark.parametrize(
    ("accepted", "rounds", "warned"),
    [(0, 65, False), (0, 66, True), (7, 200, True), (8, 200, False), (71, 1000, True), (72, 1000, False)],
)
def test_the_bounds(accepted: int, rounds: int, warned: bool) -> None:
    scene = Scene()
    scene.draft([True] * accepted + [False] * (rounds - accepted))
    scene.end_requests(LEAST_REQUESTS)
    assert (scene.warning is not None) == warned


def test_one_odd_request_is_not_enough() -> None:
    scene = Scene()
    scene.draft([False] * 1000)
    scene.end_requests(LEAST_REQUESTS - 1)
    assert scene.warning is None
    scene.end_requests()
    assert scene.warning is not None


def test_it_warns_once_and_again_only_after_it_has_recovered(logged: Callable[[], list[logging.LogRecord]]) -> None:
    scene = Scene()
    scene.end_requests(LEAST_REQUESTS)
    for _ in range(30):
        scene.draft([False] * 100)
        scene.end_requests()
    first = scene.warning
    assert [record.levelname for record in logged()] == ["WARNING"]
    scene.draft([True, *[False] * 9] * 110)  # in between: neither below nor above
    scene.end_requests()
    assert scene.warning is first
    scene.draft([True, False] * BLOCK)
    scene.end_requests()
    assert scene.warning is None
    assert [record.levelname for record in logged()] == ["WARNING", "INFO"]
    assert "accepted again" in logged()[1].getMessage()
    scene.draft([False] * 2 * BLOCK)
    scene.end_requests()
    assert [record.levelname for record in logged()] == ["WARNING", "INFO", "WARNING"]


@pytest.mark.parametrize("drafter", ["lookup", "random", "synthetic"])
def test_other_drafters_are_not_watched(drafter: str, logged: Callable[[], list[logging.LogRecord]]) -> None:
    scene = Scene(drafter)
    scene.draft([False] * 1000)
    scene.end_requests(LEAST_REQUESTS)
    assert scene.warning is None
    assert not logged()


def test_an_engine_without_model_drafter_is_never_asked() -> None:
    def refuse() -> dict[str, Any]:
        raise AssertionError("asked")

    watch = AcceptanceWatch(refuse, None)
    watch.request_submitted(RAW, 0.0)
    watch.request_ended()
    assert watch.look({"mtp": fake_core.drafter_figures([1000], [0])}) == {}


def test_requests_that_end_together_cost_one_look() -> None:
    scene = Scene()
    for _ in range(50):
        scene.watch.request_ended()
    assert scene.asked == 1
    scene.now += 5.0
    for _ in range(50):
        scene.watch.request_ended()
    assert scene.asked == 2


# --- what it says ----------------------------------------------------------------------------------------------------


def warning(**changes: Any) -> AcceptanceWarning:
    causes = (Cause("quantised_target", "bits are missing", True), Cause("wrong_drafter", "it is another's"))
    values = {"drafter": "mtp", "rounds": 90, "drafted_by_position": (90, 4), "accepted_by_position": (1, 0)}
    return AcceptanceWarning(**{**values, "draft_length": None, "causes": causes, **changes})


def test_the_line_has_figures_effect_and_causes() -> None:
    assert str(warning()) == (
        "drafter mtp: 1 of its last 90 first drafts were accepted (accepted/drafted by position: 1/90, 0/4); the draft "
        "budget has all but stopped drafting with it, and output is as slow as without it. Likely causes: (1) bits are "
        "missing; (2) it is another's"
    )
    fixed = str(warning(draft_length=4, accepted_by_position=(0, 0)))
    assert "none of its last 90 first drafts" in fixed
    assert "goes on drafting as draft_length = 4 asks, and output is slower than without it" in fixed
    assert "draft budget" not in fixed


def test_its_structured_forms() -> None:
    values = json.loads(json.dumps(warning().as_dict()))
    assert values["text"] == str(warning())
    assert (values["rounds"], values["drafted_by_position"], values["accepted_by_position"]) == (90, [90, 4], [1, 0])
    assert values["causes"][0] == {"name": "quantised_target", "text": "bits are missing", "seen": True}
    fields = warning().log_fields()
    assert tuple(fields) == LOG_FIELDS
    assert fields["likely_causes"] == ["quantised_target", "wrong_drafter"]


def test_the_log_has_the_line_and_the_fields(logged: Callable[[], list[logging.LogRecord]]) -> None:
    scene = Scene()
    scene.draft([False] * 100)
    scene.end_requests(LEAST_REQUESTS)
    (record,) = logged()
    assert record.getMessage() == str(scene.warning)
    assert "\n" not in record.getMessage()
    assert record.__dict__["drafted_by_position"] == (100,)
    assert record.__dict__["likely_causes"] == ["wrong_drafter", "other_checkpoint", "unlike_training"]


# --- why -------------------------------------------------------------------------------------------------------------


def names(causes: Sequence[Cause], *, seen: bool | None = None) -> list[str]:
    return [cause.name for cause in causes if seen in (None, cause.seen)]


def test_what_nothing_points_to_comes_by_the_share_of_accepted_drafts() -> None:
    """Another fine-tune's drafter is right now and then, one of another model is not."""
    assert names(evidence().causes(0.0)) == ["wrong_drafter", "other_checkpoint", "unlike_training"]
    assert names(evidence().causes(0.03)) == ["other_checkpoint", "wrong_drafter", "unlike_training"]
    assert names(evidence().causes(0.0), seen=True) == []


def test_what_points_to_a_cause_comes_first() -> None:
    known = evidence(target="gemma-4-E2B-it", drafter="other", quantised="weights = int4")
    for _ in range(3):
        known.see_request(RAW, 2.0)
    known.see_request(TEMPLATED, 0.0)
    causes = known.causes(0.03)
    assert names(causes, seen=True) == ["hot_sampling", "no_chat_template", "other_checkpoint", "quantised_target"]
    assert names(causes) == [*names(causes, seen=True), "wrong_drafter", "unlike_training"]
    text = {cause.name: cause.text for cause in causes}
    assert "in 3 of the last 4 requests" in text["hot_sampling"]
    assert "(3 of the last 4)" in text["no_chat_template"]
    assert "it is called other, the model is called gemma-4-E2B-it" in text["other_checkpoint"]
    assert "weights = int4" in text["quantised_target"]


def test_requests_count_only_where_they_are_the_most_and_while_they_are_recent() -> None:
    known = evidence()
    for _ in range(300):
        known.see_request(RAW, 1.5)
    for _ in range(128):
        known.see_request(TEMPLATED, 1.0)
    assert names(known.causes(0.0), seen=True) == []
    known.see_request(RAW, 1.5)  # the 257th from the end is forgotten
    known.see_request(RAW, 1.5)
    assert names(known.causes(0.0), seen=True) == []
    for _ in range(200):
        known.see_request(RAW, 1.0)
    assert names(known.causes(0.0), seen=True) == ["no_chat_template"]


def test_a_model_without_chat_template_misses_none() -> None:
    known = evidence(turn_marker=None)
    known.see_request(RAW, 0.0)
    assert "no_chat_template" not in names(known.causes(0.0))


@pytest.mark.parametrize(
    ("target", "drafter", "made_for", "pair"),
    [
        ("gemma-4-E2B-it", "gemma-4-E2B-it-assistant", None, True),
        ("Gemma 4 E2B It", "gemma-4-e2b-it-assistant-bf16", None, True),
        ("google/gemma-4-E2B-it", "google/gemma-4-E4B-it-assistant", None, False),
        ("gemma-4-E2B-it", "gemma-4-E2B-it", None, False),
        ("gemma-4-E2B-it-medical", "gemma-4-E2B-it-assistant", None, False),
        ("gemma-4-E2B-it", "drafter", None, False),
        ("gemma-4-E2B-it", "drafter", "gemma-4-E2B-it", True),
        ("gemma-4-E2B-it", "drafter", "google/gemma-4-E2B-it", True),
        ("gemma-4-E2B-it-medical", "drafter", "gemma-4-E2B-it", False),
    ],
)
def test_a_drafter_says_what_it_is_for_or_bears_the_name_of_its_target(
    target: str, drafter: str, made_for: str | None, pair: bool
) -> None:
    causes = evidence(target=target, drafter=drafter, made_for=made_for).causes(0.0)
    assert (names(causes, seen=True) == []) == pair
    if not pair and made_for is not None:
        assert f"it says it is for {made_for}, the model is called {target}" in causes[0].text


def test_how_weights_are_quantised() -> None:
    assert quantisation("auto", {"bf16": 9, "f32": 3}) is None
    assert quantisation("bf16", {"f32": 3}) is None
    for weights in ("int8", "int4", "fp8"):
        assert quantisation(weights, {"bf16": 9}) == f"weights = {weights}"
    assert quantisation("auto", {"f8_e4m3": 7, "bf16": 3}) == "f8_e4m3 in the checkpoint"
    assert quantisation("auto", {"q8_0": 1, "q4_k": 5, "f32": 3}) == "q4_k, q8_0 in the checkpoint"


# --- in an engine ----------------------------------------------------------------------------------------------------


def test_statistics_have_no_warning_of_lookup(engine: Any, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted, "stats", lambda: {"drafters": {"lookup": fake_core.drafter_figures([1000], [0])}})
    for _ in range(2 * LEAST_REQUESTS):
        engine.generate("a", SamplingParams(max_tokens=2))
    figures = engine.stats()["drafters"]["lookup"]
    assert figures["warning"] is None
    assert figures["recent"]["rounds"] == 1000


def test_the_line_never_quotes_a_prompt() -> None:
    """It goes to the server's log, where nothing of a prompt may be: its numbers are counts, no tokens."""
    scene = Scene()
    scene.evidence.see_request([2, 77777, 88888], 0.0)
    scene.draft([False] * 100)
    scene.end_requests(LEAST_REQUESTS)
    assert not re.search("77777|88888", json.dumps(scene.warning.as_dict() if scene.warning else {}))

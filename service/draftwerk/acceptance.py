"""Watches how many of a model drafter's drafts are accepted, and says so when hardly any are.

That is worth a warning because nothing else shows it: the output is right whatever the drafts are, and only slower.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftwerk.acceptance_causes import Cause, Evidence

MODEL_DRAFTERS = ("mtp",)
"""Drafters that were trained to be accepted. Of lookup's drafts as many are accepted as the text repeats itself."""

USEFUL = 0.1
"""Share of accepted first drafts below which a drafter is of no use."""

LEAST_REQUESTS = 5
"""That must have ended before anything is said: one odd request is not enough."""

LOG_FIELDS = ("drafter", "rounds", "drafted_by_position", "accepted_by_position", "likely_causes")
"""What a record of the log has beside its text."""

# Probability that a drafter right at USEFUL is taken for one below, or above, in one look. The draft budget soon asks a
# useless drafter only now and then, once in 32 steps or less, so few rounds have to be enough: 66 if none is accepted.
_DOUBT = 1e-3
_INTERVAL = 5.0  # seconds between two looks when requests end

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AcceptanceWarning:
    """That a drafter's first drafts are almost never accepted. As text it is one line.

    Attributes:
        drafter: its name, such as "mtp".
        rounds: latest rounds that this is about; each has one first draft.
        drafted_by_position: [i]: rounds that drafted more than i tokens ahead.
        accepted_by_position: [i]: rounds that accepted more than i drafts.
        draft_length: drafts per step, where that is fixed.
        causes: likely ones first.
    """

    drafter: str
    rounds: int
    drafted_by_position: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    draft_length: int | None
    causes: tuple[Cause, ...]

    def __str__(self) -> str:
        counts = zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        positions = ", ".join(f"{accepted}/{drafted}" for accepted, drafted in counts)
        if self.draft_length is None:
            effect = "the draft budget has all but stopped drafting with it, and output is as slow as without it"
        else:
            effect = (
                f"it goes on drafting as draft_length = {self.draft_length} asks, and output is slower than without it"
            )
        causes = "; ".join(f"({number}) {cause.text}" for number, cause in enumerate(self.causes, 1))
        accepted = self.accepted_by_position[0] or "none"
        return (
            f"drafter {self.drafter}: {accepted} of its last {self.rounds} first drafts were accepted "
            f"(accepted/drafted by position: {positions}); {effect}. Likely causes: {causes}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the text included."""
        return {"text": str(self), **asdict(self)}

    def log_fields(self) -> dict[str, Any]:
        """Values of LOG_FIELDS."""
        values = asdict(self) | {"likely_causes": [cause.name for cause in self.causes]}
        return {name: values[name] for name in LOG_FIELDS}


class AcceptanceWatch:
    """Looks at the statistics of an engine's drafters now and then. Any thread.

    Warns in the log when the share of accepted first drafts in the latest rounds of a model drafter is below USEFUL,
    beyond doubt; once, until it is above, beyond doubt again. First drafts, because the later ones of a round fail with
    it.

    Args:
        statistics: gives those of the engine's drafters by name, as draftwerk.Engine.stats() has them.
        evidence: of why drafts may fail; None if there is no model drafter.
        draft_length: drafts per step, if the engine's draft budget does not decide.
        clock: seconds.
    """

    def __init__(
        self,
        statistics: Callable[[], Mapping[str, Any]],
        evidence: Evidence | None,
        *,
        draft_length: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._statistics = statistics
        self._evidence = evidence
        self._draft_length = draft_length
        self._clock = clock
        self._next_look = -math.inf
        self._lock = threading.Lock()
        self._ended = 0
        self._in_force: dict[str, AcceptanceWarning] = {}

    def request_submitted(self, prompt_ids: Sequence[int], temperature: float) -> None:
        """To be called for each request that may be drafted for."""
        if self._evidence is not None:
            self._evidence.see_request(prompt_ids, temperature)

    def request_ended(self) -> None:
        """To be called when a request has ended: looks, unless it has looked a moment ago."""
        if self._evidence is None:
            return
        with self._lock:
            self._ended += 1
        if self._clock() < self._next_look:
            return
        self._next_look = self._clock() + _INTERVAL
        self.look(self._statistics())

    def look(self, drafters: Mapping[str, Any]) -> dict[str, AcceptanceWarning]:
        """Judges these statistics; the warnings in force, by drafter."""
        if self._evidence is None:
            return {}
        begun: list[AcceptanceWarning] = []
        ended: list[str] = []
        with self._lock:
            for name in (name for name in MODEL_DRAFTERS if name in drafters):
                recent = drafters[name]["recent"]
                rounds, accepted = recent["rounds"], sum(recent["accepted_by_position"][:1])
                if name not in self._in_force:
                    if self._ended >= LEAST_REQUESTS and _is_below(accepted, rounds):
                        begun.append(self._warning(name, recent, self._evidence.causes(accepted / rounds)))
                        self._in_force[name] = begun[-1]
                elif _is_above(accepted, rounds):
                    ended.append(f"drafter {name}: {accepted} of the last {rounds} first drafts were accepted again")
                    del self._in_force[name]
            in_force = dict(self._in_force)
        # Not under the lock: whoever handles the log may ask for statistics.
        for warning in begun:
            _logger.warning("%s", warning, extra=warning.log_fields())
        for message in ended:
            _logger.info("%s", message)
        return in_force

    def _warning(self, name: str, recent: Mapping[str, Any], causes: tuple[Cause, ...]) -> AcceptanceWarning:
        drafted, accepted = tuple(recent["drafted_by_position"]), tuple(recent["accepted_by_position"])
        return AcceptanceWarning(name, recent["rounds"], drafted, accepted, self._draft_length, causes)


def _is_below(accepted: int, rounds: int) -> bool:
    """Whether so few would be a surprise at USEFUL: at most 0 of 66, 1 of 89, 7 of 200, 71 of 1,000."""
    return accepted < USEFUL * rounds and _at_most(accepted, rounds) < _DOUBT


def _is_above(accepted: int, rounds: int) -> bool:
    """Whether so many would be a surprise at USEFUL."""
    return accepted > USEFUL * rounds and 1.0 - _at_most(accepted - 1, rounds) < _DOUBT


def _at_most(accepted: int, rounds: int) -> float:
    """Probability of at most `accepted` successes in `rounds` trials that succeed with USEFUL each."""

    def log_choices(k: int) -> float:
        return math.lgamma(rounds + 1) - math.lgamma(k + 1) - math.lgamma(rounds - k + 1)

    success, failure = math.log(USEFUL), math.log1p(-USEFUL)
    return math.fsum(math.exp(log_choices(k) + k * success + (rounds - k) * failure) for k in range(accepted + 1))

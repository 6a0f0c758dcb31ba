"""Prompts that a drafter is evaluated on: none that text was written from for it, as far as that can be known."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from draftwerk.engine import Engine
from draftwerk.training.openings import Openings
from draftwerk.training.prompts import PromptsFile, encode_prompt

_STREAM = 3  # of random numbers; those of text.py are 0 to 2


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt.

    Attributes:
        token_ids: of it.
        category: of what kind it is; "" if nobody said.
    """

    token_ids: tuple[int, ...]
    category: str


def from_openings(
    engine: Engine, count: int, *, seed: int, room: int, without: Container[tuple[int, ...]] = frozenset()
) -> list[EvaluationPrompt]:
    """Different built-in openings, drawn apart from those that text is written from.

    Args:
        engine: of the model.
        count: how many.
        seed: of the choice.
        room: tokens that they have to leave for a text.
        without: token ids of openings that shall not be among them.

    Raises:
        TrainingError: the model's context has no room for one.
    """
    openings = Openings()
    found: dict[tuple[int, ...], EvaluationPrompt] = {}
    index = 0
    while len(found) < count:
        opening = openings.draw(np.random.default_rng([seed, index, _STREAM]), chat=engine.has_chat_template)
        index += 1
        token_ids = encode_prompt(engine, opening, room=room)
        if token_ids not in without:
            found.setdefault(token_ids, EvaluationPrompt(token_ids, opening.category))
    return list(found.values())


def from_file(engine: Engine, prompts: PromptsFile, limit: int, *, room: int) -> list[EvaluationPrompt]:
    """Prompts of a file, spread over it if there are more than `limit`.

    Args:
        room: tokens that they have to leave for a text.

    Raises:
        TrainingError: one cannot be used.
    """
    count = min(limit, len(prompts.prompts))
    chosen = [prompts.prompts[i * len(prompts.prompts) // count] for i in range(count)]
    return [EvaluationPrompt(encode_prompt(engine, prompt, prompts, room), prompt.category) for prompt in chosen]

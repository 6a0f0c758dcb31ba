"""The built-in openings: many registers, all slots filled, the same ones from the same seed."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from draftwerk.training.openings import Openings
from draftwerk.training.prompts import TextPrompt


@pytest.fixture(scope="module")
def openings() -> Openings:
    return Openings()


def draw(openings: Openings, count: int, *, seed: int = 0, chat: bool = False) -> list[TextPrompt]:
    return [openings.draw(np.random.default_rng([seed, i]), chat=chat) for i in range(count)]


def test_there_are_hundreds_in_many_registers(openings: Openings) -> None:
    assert len(openings.registers) >= 20
    assert sum(len(register.openings) for register in openings.registers) >= 250
    assert sum(len(register.requests) for register in openings.registers) >= 100
    for register in openings.registers:
        assert register.share > 0
        assert register.openings, register.name
        assert register.requests, register.name
        both = (*register.openings, *register.requests)
        assert len(set(both)) == len(both), register.name
        assert all(template.strip() for template in both), register.name


def test_every_template_can_be_filled(openings: Openings) -> None:
    random = np.random.default_rng(0)
    for register in openings.registers:
        for template in (*register.openings, *register.requests):
            text = openings._fill(template, random)
            assert re.search(r"\{\{\w+\}\}", text) is None, template
            assert len(text) < 700, template


def test_every_register_comes_about_as_often_as_its_share_says(openings: Openings) -> None:
    drawn = Counter(prompt.category for prompt in draw(openings, 4000))
    total = sum(register.share for register in openings.registers)
    of_registers = 4000 - drawn["nothing"]
    assert 150 < drawn["nothing"] < 350  # one of sixteen
    for register in openings.registers:
        expected = of_registers * register.share / total
        assert abs(drawn[register.name] - expected) < 5 * expected**0.5, register.name


def test_the_seed_decides(openings: Openings) -> None:
    assert draw(openings, 50) == draw(openings, 50)
    first, other = ({p.content for p in draw(openings, 500, seed=seed)} for seed in (0, 1))
    assert len(first) > 400
    assert len(first & other) < 100


def test_models_with_a_chat_template_are_mostly_asked(openings: Openings) -> None:
    prompts = draw(openings, 1000, chat=True)
    chats = [prompt for prompt in prompts if not isinstance(prompt.content, str)]
    assert 830 < len(chats) < 920  # seven of eight
    assert all(len(prompt.content) == 1 and prompt.content[0]["role"] == "user" for prompt in chats)
    assert all(isinstance(prompt.content, str) for prompt in draw(openings, 200))


def test_they_are_in_many_scripts(openings: Openings) -> None:
    texts = "".join(str(prompt.content) for prompt in draw(openings, 3000))
    for script in ("а", "の", "的", "은", "ا", "है", "ส", "Μ", "å", "é"):
        assert script in texts

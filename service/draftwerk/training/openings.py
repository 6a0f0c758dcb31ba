"""What texts begin with when nobody has given prompts: openings of many registers and languages, combined by chance."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from draftwerk.training.prompts import TextPrompt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = "openings.toml"
_SLOT = re.compile(r"\{\{(\w+)\}\}")
_NUMBERS: dict[str, Callable[[np.random.Generator], str]] = {
    "number": lambda random: str(random.integers(2, 100)),
    "large": lambda random: str(random.integers(100, 100_000)),
    "year": lambda random: str(random.integers(1700, 2031)),
    "price": lambda random: f"{random.integers(1, 1000)}.{5 * random.integers(1, 20):02}",
}
_EMPTY = "nothing"
"""The register of texts that begin with <bos> alone."""

# Of the openings for a model without a chat template: nothing but <bos>, and requests, which people put to base models.
_EMPTY_SHARE = 1 / 16
_REQUEST_SHARE = 3 / 16
# For a model with one: openings of documents, which are completed without the template.
_DOCUMENT_SHARE = 1 / 8


@dataclass(frozen=True)
class Register:
    """Openings of one kind.

    Attributes:
        name: such as "maths".
        share: weight against the other registers.
        openings: how documents begin.
        requests: what one says to an assistant.
    """

    name: str
    share: float
    openings: tuple[str, ...]
    requests: tuple[str, ...]


class Openings:
    """The openings that come with draftwerk.

    Attributes:
        registers: all of them.
        sha256: of the openings, for telling whether two runs have the same.
    """

    def __init__(self) -> None:
        data = (resources.files(__package__) / _FILE).read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        contents: Mapping[str, Any] = tomllib.loads(data.decode())
        self._slots: dict[str, list[str]] = contents["slots"]
        self.registers = tuple(
            Register(entry["name"], entry["share"], tuple(entry["openings"]), tuple(entry["requests"]))
            for entry in contents["registers"]
        )
        shares = np.array([register.share for register in self.registers], dtype=np.float64)
        self._shares = shares / shares.sum()

    def draw(self, random: np.random.Generator, *, chat: bool) -> TextPrompt:
        """One opening, determined by `random` alone.

        Args:
            random: where the choices come from.
            chat: whether the model has a chat template; then most openings are requests, as chat messages.
        """
        place = random.random()
        if not chat and place < _EMPTY_SHARE:
            return TextPrompt("", _EMPTY)
        register = self.registers[random.choice(len(self.registers), p=self._shares)]
        as_request = place >= _DOCUMENT_SHARE if chat else place < _EMPTY_SHARE + _REQUEST_SHARE
        templates = register.requests if as_request else register.openings
        text = self._fill(templates[random.integers(len(templates))], random)
        return TextPrompt(({"role": "user", "content": text},) if chat and as_request else text, register.name)

    def _fill(self, template: str, random: np.random.Generator) -> str:
        def value(slot: re.Match[str]) -> str:
            name = slot[1]
            if name in _NUMBERS:
                return _NUMBERS[name](random)
            values = self._slots[name]
            return values[random.integers(len(values))]

        return _SLOT.sub(value, template)

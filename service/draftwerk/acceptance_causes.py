"""Why the drafts of a model drafter may fail: what an engine and its requests show of it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftwerk.requests import RequestError

if TYPE_CHECKING:
    from draftwerk.engine import Engine

_FLOAT_TYPES = {"f32", "f16", "bf16"}
_REQUESTS = 256  # looked at: the latest
_PROMPT_HEAD = 16  # tokens among which a templated prompt has its first turn marker: behind <bos>
_HOT = 1.3  # temperatures above make text that nothing foretells; Gemma's own is 1.0
_NOISE = 0.005  # below this share of accepted drafts they might as well be random; another fine-tune's guess better


@dataclass(frozen=True)
class Cause:
    """Something that makes drafts fail.

    Attributes:
        name: "wrong_drafter", "other_checkpoint", "quantised_target", "no_chat_template", "hot_sampling" or
            "unlike_training".
        text: as a part of a sentence, with what points to it.
        seen: whether something does.
    """

    name: str
    text: str
    seen: bool = False


class Evidence:
    """What an engine and its latest requests show of why drafts may fail.

    Args:
        target: name of the model.
        drafter: name of the drafter.
        made_for: name of the model that it was made for; None if it does not say.
        quantised: how the model's weights are quantised (see quantisation()), if they are.
        turn_marker: see turn_marker().
    """

    def __init__(
        self, *, target: str, drafter: str, made_for: str | None, quantised: str | None, turn_marker: int | None
    ) -> None:
        self._target = target
        self._drafter = drafter
        self._made_for = made_for
        self._quantised = quantised
        self._turn_marker = turn_marker
        self._requests: deque[tuple[bool, bool]] = deque(maxlen=_REQUESTS)  # has turn markers, is hot

    def see_request(self, prompt_ids: Sequence[int], temperature: float) -> None:
        """Takes note of a request. Any thread; takes a microsecond."""
        self._requests.append((self._turn_marker in prompt_ids[:_PROMPT_HEAD], temperature > _HOT))

    def causes(self, acceptance: float) -> tuple[Cause, ...]:
        """What may be the cause of so small a share of accepted first drafts, likely ones first.

        First what was seen: in most requests, then in the names, then in the weights.
        """
        requests = self._requests.copy()
        untemplated = sum(not marked for marked, _ in requests)
        hot = sum(is_hot for _, is_hot in requests)
        seen: list[Cause] = []
        if 2 * hot > len(requests):
            text = f"temperatures above {_HOT} (in {hot} of the last {len(requests)} requests)"
            seen.append(Cause("hot_sampling", text, True))
        if self._turn_marker is not None and 2 * untemplated > len(requests):
            text = f"prompts without the chat template's turn markers ({untemplated} of the last {len(requests)})"
            seen.append(Cause("no_chat_template", text, True))
        likelier, other = _OTHER_CHECKPOINT, _WRONG_DRAFTER
        if acceptance < _NOISE:
            likelier, other = other, likelier
        possible = [likelier, other, _UNLIKE_TRAINING]
        if not _is_pair(self._target, self._drafter, self._made_for):
            says = f"is called {self._drafter}" if self._made_for is None else f"says it is for {self._made_for}"
            text = f"{likelier.text} (it {says}, the model is called {self._target})"
            seen.append(replace(likelier, text=text, seen=True))
            possible.remove(likelier)
        if self._quantised is not None:
            text = f"the model's weights are quantised ({self._quantised}), unlike those that the drafter was made for"
            seen.append(Cause("quantised_target", text, True))
        return (*seen, *possible)


_WRONG_DRAFTER = Cause("wrong_drafter", "the drafter was made for another model of the same shape")
_OTHER_CHECKPOINT = Cause("other_checkpoint", "the drafter was made for another fine-tune or version of the model")
_UNLIKE_TRAINING = Cause("unlike_training", "text unlike what the drafter was trained on")


def quantisation(weights: str, stored_types: Mapping[str, int]) -> str | None:
    """How a model's weights are quantised; None if they are not.

    Args:
        weights: as for draftwerk.weights.load_model().
        stored_types: type name to number of tensors, of the checkpoint.
    """
    if weights in ("int8", "int4", "fp8"):
        return f"weights = {weights}"
    quantised = sorted(stored_types.keys() - _FLOAT_TYPES)
    return f"{', '.join(quantised)} in the checkpoint" if quantised else None


def turn_marker(engine: Engine, bos_token_id: int | None) -> int | None:
    """The control token with which the model's chat template begins a turn; None if there is none."""
    if not engine.has_chat_template:
        return None
    try:
        prompt = engine.encode_prompt([{"role": "user", "content": "Hello"}])
    except RequestError:
        return None
    spelt = zip(prompt, engine.token_bytes(prompt), strict=True)
    return next((token for token, text in spelt if not text and token != bos_token_id), None)


def _is_pair(target: str, drafter: str, made_for: str | None) -> bool:
    """Whether a drafter says that it is for the target, or bears its name as published ones do: with "-assistant"."""
    if made_for is not None and _plain(made_for.split("/")[-1]) == _plain(target.split("/")[-1]):
        return True
    return _plain(drafter).startswith(_plain(target)) and "assistant" in _plain(drafter)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())

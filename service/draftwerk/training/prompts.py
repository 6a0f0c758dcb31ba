"""Prompts from a file, as text or as chat messages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from draftwerk.requests import Message, RequestError
from draftwerk.training.errors import TrainingError

if TYPE_CHECKING:
    from draftwerk.engine import Engine

_FORMS = '{"prompt": "..."}, {"messages": [{"role": "user", "content": "..."}]} or {"turns": ["..."]}'
_CONTENTS = ("prompt", "messages", "turns")
_CONTENT = 'text, or a list of parts such as {"type": "text", "text": "..."}'  # of a message
_ANSWERERS = ("assistant", "model")  # the same to Gemma's chat templates
_SHOWN = 60  # characters of what is wrong
_LEAST_ROOM = 128  # tokens that a prompt has to leave for the text: as many as the evaluation of a run generates
_ASIDE = 16  # one prompt in so many is for evaluation,
_LEAST_ASIDE, _MOST_ASIDE = 8, 64  # but so many at least and at most
_LEAST_TO_SHARE = 32  # different prompts of a file; with fewer there is nothing to spare
_STREAM = 4  # of random numbers; those of text.py and evaluation_prompts.py are 0 to 3


@dataclass(frozen=True)
class TextPrompt:
    """Something to begin a text with.

    Attributes:
        content: text, or chat messages.
        category: of what kind it is; "" if nobody said.
        line: of the file that it is from; 0 if it is from none.
    """

    content: Union[str, tuple[Message, ...]]
    category: str = ""
    line: int = 0


@dataclass(frozen=True)
class PromptsFile:
    """The prompts of a file.

    Attributes:
        path: the file.
        data: its content.
        prompts: at least one, in the order of the file.
        sha256: of the file's content and of how it is read.
        form: "text" or "JSON", which is what the first line decides.
    """

    path: Path
    data: bytes
    prompts: tuple[TextPrompt, ...]
    sha256: str
    form: str = "text"


def read_prompts(path: Path, *, chat: bool = False) -> PromptsFile:
    """Reads a file of prompts, one a line: plain text, or JSON objects if the first line that is not empty is one.

    A JSON object has "prompt" (text), "messages" (chat messages) or "turns" (texts, of which the first is the prompt),
    and may have "category". Where messages end with an answer, that is left out: the model writes its own. Empty lines
    are skipped. What is JSON of another form, or in part, is refused: as text it would be trained on without a word.

    Args:
        path: the file.
        chat: whether texts are what a user says to a model, and not what it is to continue.

    Raises:
        TrainingError: the file is not UTF-8 text, a line is of another form (says which and why), or there are none.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TrainingError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02X})") from None
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise TrainingError(
            f"{path}:{line}: holds a NUL byte: prompts are text in UTF-8, not in UTF-16, and no binary file"
        )
    lines = [(number, line.strip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise TrainingError(f"{path}: no prompts: the file is empty")
    as_json = lines[0][1].lstrip().startswith("{")
    if not as_json:
        _refuse_other_json(path, text, lines)
    there = tuple(
        _from_json(path, number, line) if as_json else TextPrompt(line, line=number) for number, line in lines
    )
    prompts = tuple(_without_answer(path, prompt) for prompt in there)
    # Text that was written when answers were still left in does not go with what is written without them.
    how = b"\0without answers" * (prompts != there) + b"\0chat" * chat
    if chat:
        prompts = tuple(map(_as_message, prompts))
    sha256 = hashlib.sha256(data + how).hexdigest()
    return PromptsFile(path, data, prompts, sha256, "JSON" if as_json else "text")


def set_aside(prompts: PromptsFile, seed: int) -> tuple[PromptsFile, PromptsFile | None]:
    """Parts prompts into those that text is written from, and some for evaluation; None if there are too few to share.

    Every category is in both by its share, as far as numbers allow. A prompt that comes several times is on one side
    each time: logs of what people ask repeat themselves.

    Args:
        prompts: of a file.
        seed: of the choice.
    """
    different = {_said(prompt): prompt for prompt in reversed(prompts.prompts)}  # where each comes first
    count = len(different)
    if count < _LEAST_TO_SHARE:
        return prompts, None
    names = list(different)
    order = [names[index] for index in np.random.default_rng([seed, _STREAM]).permutation(count)]
    order.sort(key=lambda name: different[name].category)
    wanted = min(max(count // _ASIDE, _LEAST_ASIDE), _MOST_ASIDE)
    aside = {order[i * count // wanted] for i in range(wanted)}
    written = tuple(prompt for prompt in prompts.prompts if _said(prompt) not in aside)
    evaluated = sorted((different[name] for name in aside), key=lambda prompt: prompt.line)
    return (
        dataclasses.replace(prompts, prompts=written),
        dataclasses.replace(prompts, prompts=tuple(evaluated)),
    )


def _said(prompt: TextPrompt) -> str:
    """The same for prompts that say the same, whatever their category and line."""
    return json.dumps(prompt.content)


def _as_message(prompt: TextPrompt) -> TextPrompt:
    if not isinstance(prompt.content, str):
        return prompt
    return dataclasses.replace(prompt, content=({"role": "user", "content": prompt.content},))


def encode_prompt(
    engine: Engine, prompt: TextPrompt, prompts: PromptsFile | None = None, room: int = _LEAST_ROOM
) -> tuple[int, ...]:
    """The prompt's tokens.

    Args:
        engine: of the model.
        prompt: a prompt.
        prompts: the file that it is from, for errors.
        room: tokens that it has to leave for a text.

    Raises:
        TrainingError: they cannot be made, or leave no room.
    """
    place = "prompt" if prompts is None else f"{prompts.path}:{prompt.line}"
    content = prompt.content if isinstance(prompt.content, str) else list(prompt.content)
    try:
        prompt_ids = engine.encode_prompt(content)
    except RequestError as error:
        raise TrainingError(f"{place}: {error}") from None
    most = engine.info.max_context - room
    if len(prompt_ids) > most:
        raise TrainingError(
            f"{place}: a prompt of {len(prompt_ids)} tokens: must be at most {most}, "
            f"as {room} more have to fit into the model's context of {engine.info.max_context}"
        )
    return tuple(prompt_ids)


def check_prompts(engine: Engine, prompts: PromptsFile) -> None:
    """Makes sure that every prompt of a file can be used: what cannot is found now, not in the middle of the night.

    Raises:
        TrainingError: one cannot; says which.
    """
    for prompt in prompts.prompts:
        encode_prompt(engine, prompt, prompts)


def _refuse_other_json(path: Path, text: str, lines: Sequence[tuple[int, str]]) -> None:
    """Refuses what is read as text, by its first line, and was hardly meant so."""
    number, first = lines[0]
    if first.lstrip()[0] in '["' and (_json(first) is not None or _json(text) is not None):
        what = "a JSON array" if first.lstrip()[0] == "[" else "a JSON string"
        raise TrainingError(f"{path}:{number}: {what}: {_shown(first)}; a line is plain text, or like {_FORMS}")
    for number, line in lines[1:]:
        entry = _json(line) if line.lstrip().startswith("{") else None
        if isinstance(entry, dict) and any(name in entry for name in _CONTENTS):
            raise TrainingError(
                f"{path}:{number}: JSON, in a file that begins with plain text: {_shown(line)}; "
                f"every line has to be text, or every line like {_FORMS}"
            )


def _json(text: str) -> Any:
    """What it is as JSON; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _shown(line: str) -> str:
    return repr(_beginning(line))


def _beginning(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _from_json(path: Path, number: int, line: str) -> TextPrompt:
    def wrong(reason: str) -> TrainingError:
        return TrainingError(f"{path}:{number}: {reason}: {_shown(line)}; a line is like {_FORMS}")

    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise wrong(f"not JSON ({reason})") from None
    if not isinstance(entry, dict):
        raise wrong("not a JSON object")
    given = [name for name in _CONTENTS if name in entry]
    if len(given) != 1:
        raise wrong(f"{' and '.join(given)} exclude each other" if given else "no prompt")
    content: Any = entry[given[0]]
    if given[0] == "turns":
        content = content[0] if isinstance(content, list) and content else None
    if given[0] == "messages":
        if not isinstance(content, list) or not content or not all(map(_is_message, content)):
            raise wrong("messages is not a list of messages")
        content = tuple(content)
    elif not isinstance(content, str) or not content:
        raise wrong(f"{given[0]} is not text")
    category = str(entry.get("category") or "")
    for name, said in ((given[0], json.dumps(content, ensure_ascii=False)), ("category", category)):
        if not _is_unicode(said):
            raise wrong(f"{name} holds a lone surrogate, which no text can")
    return TextPrompt(content, category, number)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _without_answer(path: Path, prompt: TextPrompt) -> TextPrompt:
    """The prompt up to the last thing that the model is to answer.

    Raises:
        TrainingError: a message of it says nothing, or none is the user's.
    """
    if isinstance(prompt.content, str):
        return prompt
    messages = list(prompt.content)
    while messages and messages[-1]["role"] in _ANSWERERS:
        messages.pop()
    for index, message in enumerate(messages):
        if not _says_something(message):
            content = _beginning(json.dumps(message["content"])) if "content" in message else "absent"
            raise TrainingError(f"{path}:{prompt.line}: messages[{index}].content = {content}: must be {_CONTENT}")
    if not any(message["role"] == "user" for message in messages):
        raise TrainingError(f'{path}:{prompt.line}: no message has the role "user": there is nothing to answer')
    return dataclasses.replace(prompt, content=tuple(messages))


def _says_something(message: Message) -> bool:
    """Whether a chat template has something to write. Of what is of another form many write an empty turn."""
    role, content = message["role"], message.get("content")
    if role == "tool" and isinstance(content, (dict, list)):
        return True  # what a function returned, as data
    if role in _ANSWERERS and not content and message.get("tool_calls"):
        return True
    if isinstance(content, list) and all(map(_is_part, content)):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if not isinstance(content, str):
        return False
    return bool(content.strip()) or role not in ("user", *_ANSWERERS)


def _is_part(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        return False
    return value["type"] != "text" or isinstance(value.get("text"), str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

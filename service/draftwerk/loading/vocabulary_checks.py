"""What both forms of checkpoints say about tokens, checked against the size of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from draftwerk.loading.chat_template import ChatTemplate, ChatTemplateError
from draftwerk.loading.config import AssistantConfig, TextConfig
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.tensors import FoundTensors, Source
from draftwerk.loading.tokenizer import Tokenizer

INTEGER_TYPES = {"i32": "<i4", "i64": "<i8"}
HEAD = "lm_head.weight"
TOKEN_ORDERING = "masked_embedding.token_ordering"
DRAFT_TOKEN_IDS = "draft_token_ids"
_END_OF_TEXT = "<eos>"
# Tokens at which models that chat end, though many a file names only one of them or `<eos>` alone. At Gemma 4's last
# one the model has called a tool and waits for what it says; its `generation_config.json` names it too.
_ENDS_OF_TURNS = ("<end_of_turn>", "<turn|>", "<|tool_response>")


def checked_ids(path: str, config: TextConfig, ids: Sequence[int]) -> tuple[int, ...]:
    """``ids`` without repetitions, each inside the vocabulary.

    Raises:
        CheckpointError: one is outside.
    """
    for token_id in ids:
        if not 0 <= token_id < config.vocab_size:
            raise CheckpointError(path, f"token id {token_id} is outside the vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(ids))


def end_token_ids(
    path: str, config: TextConfig, named: Sequence[int | None], tokenizer: Tokenizer | None, *, chats: bool
) -> tuple[int, ...]:
    """The tokens at which generation ends: those that a checkpoint names and, if it chats, the ends of turns.

    Args:
        path: names the checkpoint in errors.
        config: its configuration.
        named: the ids that its files name; without any it is ``<eos>`` of the vocabulary.
        tokenizer: its tokenizer, if it has one.
        chats: whether it has a chat template.

    Raises:
        CheckpointError: an id is outside the vocabulary, or there is a vocabulary and no end is known.
    """
    ids = [token_id for token_id in named if token_id is not None]
    if tokenizer is None:
        return checked_ids(path, config, ids)
    ends = _ENDS_OF_TURNS if chats else ()
    names = ends if ids else (_END_OF_TEXT, *ends)
    ids += [token_id for name in names if (token_id := tokenizer.id_of(name)) is not None]
    if not ids:
        raise CheckpointError(path, f"no file names an end token, and the vocabulary has no {_END_OF_TEXT}")
    return checked_ids(path, config, ids)


def head_token_ids(found: FoundTensors, config: AssistantConfig) -> npt.NDArray[np.int32] | None:
    """The tokens of a drafter's head, in the order of its centroids if it has some, taken out of what was found.

    Returns:
        See :class:`draftwerk.loading.checkpoint.AssistantCheckpoint`.

    Raises:
        CheckpointError: they are missing, of another type or length, or not distinct tokens of the vocabulary; or what
            was found does not go together: a head beside draft tokens, an order of tokens without centroids.
    """
    ordering, drafted = found.take(TOKEN_ORDERING), found.take(DRAFT_TOKEN_IDS)
    if not config.draft_vocab_size:
        if drafted is not None:
            raise found.error(DRAFT_TOKEN_IDS, "is there, but the configuration has no draft_vocab_size")
        if config.num_centroids:
            return _permutation(found, ordering, config.text.vocab_size)
        if ordering is not None:
            raise found.error(TOKEN_ORDERING, "is there, but no centroids are")
        return None
    size = config.draft_vocab_size
    if HEAD in found:
        raise found.error(
            HEAD, f"is there beside draft_vocab_size = {size}, which stands for rows of the target's head"
        )
    if ordering is not None:
        raise found.error(TOKEN_ORDERING, f"is there beside draft_vocab_size = {size}: {DRAFT_TOKEN_IDS} has the order")
    tokens = _integers(found, DRAFT_TOKEN_IDS, drafted, size)
    outside = tokens[(tokens < 0) | (tokens >= config.text.vocab_size)]
    if outside.size:
        raise found.error(
            DRAFT_TOKEN_IDS, f"holds {outside[0]}, which is outside the vocabulary of {config.text.vocab_size}"
        )
    distinct, counts = np.unique(tokens, return_counts=True)
    if distinct.size != size:
        raise found.error(DRAFT_TOKEN_IDS, f"holds {distinct[counts > 1][0]} twice")
    return tokens.astype(np.int32)


def _permutation(found: FoundTensors, source: Source | None, vocabulary: int) -> npt.NDArray[np.int32]:
    order = _integers(found, TOKEN_ORDERING, source, vocabulary)
    seen = np.zeros(vocabulary, dtype=bool)
    inside = (order >= 0) & (order < vocabulary)
    seen[order[inside]] = True
    if not seen.all():
        raise found.error(TOKEN_ORDERING, f"is no permutation of the tokens: {int(np.argmin(seen))} is not in it")
    return order.astype(np.int32)


def _integers(
    found: FoundTensors, name: str, source: Source | None, count: int
) -> npt.NDArray[np.int32] | npt.NDArray[np.int64]:
    if source is None:
        raise found.error(name, "is missing")
    if source.dtype not in INTEGER_TYPES or source.shape != (count,):
        raise found.error(
            name, f"is {list(source.shape)} of {source.dtype}, not [{count}] of {' or '.join(sorted(INTEGER_TYPES))}"
        )
    return np.frombuffer(source.ranges[0].bytes().tobytes(), dtype=INTEGER_TYPES[source.dtype])


def chat_template(path: str, source: str | None, special: Mapping[str, str]) -> ChatTemplate | None:
    """The template of this Jinja text, if there is one.

    Raises:
        CheckpointError: it cannot be read.
    """
    if source is None:
        return None
    try:
        return ChatTemplate(source, special)
    except ChatTemplateError as error:
        raise CheckpointError(path, str(error)) from None

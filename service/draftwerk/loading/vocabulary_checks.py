"""What both forms of checkpoints say about tokens, checked against the size of the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from draftwerk.loading.chat_template import ChatTemplate, ChatTemplateError
from draftwerk.loading.config import TextConfig
from draftwerk.loading.errors import CheckpointError
from draftwerk.loading.tensors import FoundTensors, Source

INTEGER_TYPES = {"i32": "<i4", "i64": "<i8"}


def checked_ids(path: str, config: TextConfig, ids: Sequence[int | None]) -> tuple[int, ...]:
    """``ids`` without repetitions and ``None``, each inside the vocabulary.

    Raises:
        CheckpointError: one is outside.
    """
    for token_id in ids:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise CheckpointError(path, f"token id {token_id} is outside the vocabulary of {config.vocab_size}")
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def token_ordering(found: FoundTensors, name: str, source: Source | None, vocabulary: int) -> npt.NDArray[np.int32]:
    """The tokens in the order of their centroids: a permutation of the vocabulary.

    Raises:
        CheckpointError: it is missing, of another type or length, or no permutation.
    """
    if source is None:
        raise found.error(name, "is missing")
    if source.dtype not in INTEGER_TYPES or source.shape != (vocabulary,):
        raise found.error(
            name,
            f"is {list(source.shape)} of {source.dtype}, not [{vocabulary}] of {' or '.join(sorted(INTEGER_TYPES))}",
        )
    order = np.frombuffer(source.ranges[0].bytes().tobytes(), dtype=INTEGER_TYPES[source.dtype])
    seen = np.zeros(vocabulary, dtype=bool)
    inside = (order >= 0) & (order < vocabulary)
    seen[order[inside]] = True
    if not seen.all():
        raise found.error(name, f"is no permutation of the tokens: {int(np.argmin(seen))} is not in it")
    return order.astype(np.int32)


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

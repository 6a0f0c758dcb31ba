"""An opened checkpoint: one view of a GGUF file or a Hugging Face directory.

Tensors come under their Hugging Face names, in the order of the forward pass, as the file holds them (quantised blocks
stay quantised), except that vectors become float32 and Gemma 3's norms the factor that the engine multiplies by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from draftwerk.loading.chat_template import ChatTemplate
from draftwerk.loading.config import AssistantConfig, TextConfig
from draftwerk.loading.tensors import Source, TensorView, views
from draftwerk.loading.tokenizer import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model that was opened; its weights are read when :meth:`tensors` is iterated.

    Attributes:
        path: the file or directory.
        name: what the model calls itself, else the name of the file or directory.
        config: sizes and constants.
        tokenizer: ``None`` if the checkpoint has none; then only token ids can be used.
        chat_template: ``None`` if the checkpoint has none.
        bos_token_id: put in front of raw text; ``None`` only if unknown and there is no tokenizer.
        eos_token_ids: generation ends at any of them; empty only if none is known and there is no tokenizer.
        weight_types: type name to number of tensors stored so.
    """

    path: str
    name: str
    config: TextConfig
    tokenizer: Tokenizer | None
    chat_template: ChatTemplate | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    weight_types: dict[str, int]
    _sources: dict[str, Source | None] = field(repr=False)
    _norms_add_one: bool = field(default=False, repr=False)

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor once, embedding first; vectors as float32 (norms ``1 + w`` where files store ``w`` for that).

        Raises:
            CheckpointError: a vector holds a value that is not finite; matrices are not looked at.
        """
        return views(self._sources, add_one=self._norms_add_one)


@dataclass(frozen=True)
class AssistantCheckpoint:
    """A multi-token-prediction drafter that was opened.

    Attributes:
        path: the file or directory.
        name: as for :class:`Checkpoint`.
        config: sizes and constants.
        head_token_ids: int32 [config.head_tokens], the tokens that its head can score, those of each centroid together;
            ``None`` if it has neither centroids nor a reduced head: all, in their own order.
        draft_length: how many tokens it was made to draft in a step; ``None`` if the checkpoint does not say.
        base_model: name of the model that it was made for; ``None`` likewise.
        weight_types: type name to number of tensors stored so.
    """

    path: str
    name: str
    config: AssistantConfig
    head_token_ids: npt.NDArray[np.int32] | None = field(repr=False)
    draft_length: int | None
    base_model: str | None
    weight_types: dict[str, int]
    _sources: dict[str, Source | None] = field(repr=False)

    def tensors(self) -> Iterator[TensorView]:
        """Every tensor once, as for a :class:`Checkpoint`; a head of its own in the order of the tokens.

        Raises:
            CheckpointError: a vector holds a value that is not finite.
        """
        return views(self._sources, add_one=False)

"""Tokenizers of Gemma checkpoints.

Four sources, one behaviour: the SentencePiece data in a GGUF file and ``tokenizer.model`` (both through
``sentencepiece``), and the merges in a Gemma 4 GGUF file and ``tokenizer.json`` (both through ``tokenizers``). All are
BPE with byte fallback over text whose spaces are written U+2581.

Any Unicode text survives ``decode(encode(text, add_bos=False), skip_special_tokens=False)`` unchanged. Two decisions:

* The name of a special token in a text (``<bos>``, ``<start_of_turn>``) becomes that token, as transformers and
  llama.cpp have it for prompts; chat templates depend on it.
* U+2581 itself becomes its three byte tokens. The libraries take it for a space, and the text would come back changed.

What Gemma has as control tokens are control tokens here, whatever type a file gives them.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from draftwerk.loading import byte_spans
from draftwerk.loading import sentencepiece_model as proto
from draftwerk.loading.errors import CheckpointError, printable
from draftwerk.loading.gguf import GgufFile, StringArray
from draftwerk.loading.mapped_file import MappedFile

_logger = logging.getLogger(__name__)
_SPACE = "\u2581"
_SPACE_BYTES = _SPACE.encode()
_BYTE_PIECE = re.compile(rb"<0x([0-9A-F]{2})>")
# What `tokenizer.json` and `tokenizer_config.json` of Gemma 3 and 4 have as special. Other files type some of them as
# text: `tokenizer.model` the turn markers and images; llama.cpp's converter Gemma 4's channels, calls, responses and
# quotes, for its own parser to see; files of other hands the turn markers of either, even as pieces of ordinary text.
_TURN_MARKERS = ("<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>")
_CONTROL_TOKENS = (
    *("<pad>", "<eos>", "<bos>"),
    *_TURN_MARKERS,
    *("<|channel>", "<channel|>", "<|think|>", '<|"|>', "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>"),
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
_CONTROL_TOKEN_PIECES = re.compile(
    b"%b(%b)(?=%b|\\Z)"
    % (byte_spans.SEPARATOR, b"|".join(re.escape(name.encode()) for name in _CONTROL_TOKENS), byte_spans.SEPARATOR)
)
_MAX_TOKENS = 1 << 22


class TokenTexts(NamedTuple):
    """What each token adds to the text, in the order of the ids: ``blob[offsets[i] : offsets[i + 1]]``."""

    blob: bytes
    offsets: npt.NDArray[np.uint32]
    special_ids: frozenset[int]
    """Control tokens, which stand for no text."""

    @classmethod
    def of(cls, joined: bytes, kinds: npt.NDArray[np.int64]) -> TokenTexts:
        """From the pieces (see :mod:`draftwerk.loading.byte_spans`) and their types.

        In pieces U+2581 stands for a space, and a BYTE piece, written ``<0x0A>``, for that byte.

        Raises:
            ValueError: a byte piece is written otherwise.
        """
        # A space may have been written as it is; U+2581 cannot be hidden in another character or across two pieces.
        data, starts, lengths = byte_spans.split(joined.replace(_SPACE_BYTES, b" "))
        special = (kinds == proto.CONTROL) | (kinds == proto.UNKNOWN)
        lengths[special] = 0
        for token in np.flatnonzero(kinds == proto.BYTE).tolist():
            piece = data[starts[token] : starts[token] + lengths[token]].tobytes()
            byte = _BYTE_PIECE.fullmatch(piece)
            if byte is None:
                raise ValueError(f"byte token {printable(repr(piece))} is not of the form <0x0A>")
            starts[token], lengths[token] = data.size + int(byte[1], 16), 1
        every_byte = np.arange(256, dtype=np.uint8)
        blob = byte_spans.gather(np.concatenate([data, every_byte]), starts, lengths).tobytes()
        offsets = np.zeros(kinds.size + 1, dtype=np.uint32)
        np.cumsum(lengths, out=offsets[1:])
        return cls(blob, offsets, frozenset(np.flatnonzero(special).tolist()))


def _with_control_tokens(path: str, joined: bytes, kinds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The types of the pieces, CONTROL for those that Gemma has as control tokens."""
    kinds = kinds.copy()
    markers = []
    for found in _CONTROL_TOKEN_PIECES.finditer(joined):
        token = joined.count(byte_spans.SEPARATOR, 0, found.start())
        if kinds[token] != proto.CONTROL:
            kinds[token] = proto.CONTROL
            name = found[1].decode()
            if name in _TURN_MARKERS:
                markers.append(name)
    if markers:
        _logger.info("%s has %s as text: taken as control tokens, which they are", path, " and ".join(markers))
    return kinds


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids; may differ from the model's number of embedding rows.
        bos_token_id: what ``add_bos`` prepends.
        special_ids: control tokens (``<bos>``, ``<end_of_turn>``): they stand for no text.

    Args:
        path: names the file in errors.
        texts: its tokens.
        bos_token: name or id of the beginning-of-sequence token; ``<bos>`` where the checkpoint names none.

    Raises:
        CheckpointError: the vocabulary has no such token, without which Gemma answers nonsense, or lacks byte tokens.
    """

    def __init__(self, path: str, texts: TokenTexts, bos_token: str | int | None) -> None:
        self.vocab_size = len(texts.offsets) - 1
        self.special_ids = texts.special_ids
        self.bos_token_id = self._bos_id(path, "<bos>" if bos_token is None else bos_token)
        self._offsets = texts.offsets
        self._blob = texts.blob
        byte_ids = [self.id_of(f"<0x{byte:02X}>") for byte in range(256)]
        if None in byte_ids:
            missing = byte_ids.index(None)
            raise CheckpointError(
                path, f"the vocabulary has no byte token <0x{missing:02X}>: only BPE with byte fallback is supported"
            )
        self._space_ids = [cast(int, byte_ids[byte]) for byte in _SPACE_BYTES]

    def _bos_id(self, path: str, token: str | int) -> int:
        token_id = self.id_of(token) if isinstance(token, str) else token
        if token_id is None or not 0 <= token_id < self.vocab_size:
            raise CheckpointError(
                path, f"bos token {printable(repr(token))} is not in the vocabulary of {self.vocab_size}"
            )
        return token_id

    @abstractmethod
    def _encode_segment(self, text: str) -> list[int]:
        """The ids of a text without U+2581."""

    @abstractmethod
    def id_of(self, piece: str) -> int | None:
        """The id of the token whose piece is ``piece`` (``"<end_of_turn>"``, ``"▁the"``); ``None`` if there is none."""

    @abstractmethod
    def piece_of(self, token_id: int) -> str:
        """The token as the vocabulary writes it, ``"▁the"`` or ``"<bos>"``; ``""`` for an id beyond the vocabulary."""

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The token ids of ``text``.

        Args:
            text: any Unicode text; names of special tokens in it become those tokens.
            add_bos: put the beginning-of-sequence token in front, unless the text already begins with it.

        Raises:
            ValueError: ``text`` holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from None
        ids: list[int] = []
        for index, segment in enumerate(text.split(_SPACE)):
            if index:
                ids += self._space_ids
            if segment:
                ids += self._encode_segment(segment)
        if add_bos and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Bytes that are no UTF-8 become U+FFFD; ids beyond the vocabulary have no text."""
        if skip_special_tokens:
            parts = (self.token_bytes(token_id) for token_id in ids)
        else:
            parts = (
                self.piece_of(token_id).encode() if token_id in self.special_ids else self.token_bytes(token_id)
                for token_id in ids
            )
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: ``b""`` for special tokens and ids beyond the vocabulary.

        Raises:
            ValueError: ``token_id`` is negative.
        """
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        if token_id >= self.vocab_size:
            return b""
        return self._blob[self._offsets[token_id] : self._offsets[token_id + 1]]

    def token_bytes_table(self) -> tuple[npt.NDArray[np.uint32], bytes]:
        """(offsets [vocab_size + 1], blob): token ``i`` adds ``blob[offsets[i] : offsets[i + 1]]`` to the text."""
        return self._offsets, self._blob


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE vocabulary.

    Args:
        path: names the file in errors.
        vocabulary: its pieces.
        bos_token: as for :class:`Tokenizer`.

    Raises:
        CheckpointError: the vocabulary is no BPE vocabulary with byte fallback, or has no such token.
    """

    def __init__(self, path: str, vocabulary: proto.Vocabulary, bos_token: str | int | None) -> None:
        import sentencepiece  # here, not above: large, and only of use when there is a vocabulary

        try:
            _check_pieces(vocabulary)
            kinds = _with_control_tokens(path, vocabulary.joined, vocabulary.kinds)
            vocabulary = replace(vocabulary, kinds=kinds)
            texts = TokenTexts.of(vocabulary.joined, vocabulary.kinds)
            model = proto.write_model(_matching_special_tokens(vocabulary))
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise CheckpointError(path, f"unusable vocabulary: {str(error).removeprefix('INTERNAL: ')}") from None
        super().__init__(path, texts, bos_token)

    def _encode_segment(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def id_of(self, piece: str) -> int | None:
        # Whatever it does not know has the id of the unknown piece, which lies behind the vocabulary.
        found = self._processor.piece_to_id(piece)
        return None if found >= self.vocab_size else found

    def piece_of(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id) if 0 <= token_id < self.vocab_size else ""


def _check_pieces(vocabulary: proto.Vocabulary) -> None:
    """Raises ValueError for pieces that are not UTF-8 (sentencepiece does not check) or of no known type."""
    _check_kinds(vocabulary.kinds)
    joined = vocabulary.joined
    try:
        joined.replace(byte_spans.SEPARATOR, b"\n").decode()
    except UnicodeDecodeError as error:
        token = joined.count(byte_spans.SEPARATOR, 0, error.start) - 1
        raise ValueError(f"string {token} is not UTF-8") from None


def _check_kinds(kinds: npt.NDArray[np.int64]) -> None:
    unknown = np.flatnonzero((kinds < proto.NORMAL) | (kinds > proto.BYTE))
    if unknown.size:
        raise ValueError(f"token {unknown[0]} has unknown type {kinds[unknown[0]]}")


def _matching_special_tokens(vocabulary: proto.Vocabulary) -> proto.Vocabulary:
    """The vocabulary with special tokens as user-defined symbols, so that sentencepiece finds their names in a text.

    It finds no unknown token in a text, but needs one: a piece behind the vocabulary that byte fallback never lets it
    use. Its name has a space, which no other piece has.
    """
    kinds = vocabulary.kinds.copy()
    kinds[(kinds == proto.CONTROL) | (kinds == proto.UNKNOWN)] = proto.USER_DEFINED
    return proto.Vocabulary(
        # GGUF converters write runs of spaces as they are.
        vocabulary.joined.replace(b" ", _SPACE_BYTES) + byte_spans.SEPARATOR + b"<no token>",
        np.append(vocabulary.scores, np.float32(0.0)),
        np.append(kinds, proto.UNKNOWN),
    )


class BpeTokenizer(Tokenizer):
    """A BPE tokenizer of the ``tokenizers`` library in Gemma's form: byte fallback, spaces written U+2581.

    Args:
        path: names the file in errors.
        tokenizer: a ``tokenizers.Tokenizer``.
        texts: its tokens.
        bos_token: as for :class:`Tokenizer`.

    Raises:
        CheckpointError: the tokenizer does not give back the text it was given, or has no such token.
    """

    # Everything that tokenizers of another form lose or change.
    _PROBE = " A\u0301 \u00e9\u212b  \ufb01\t\n\n x\x00\u4e2d\U0010ffff\u2581 "

    def __init__(self, path: str, tokenizer: Any, texts: TokenTexts, bos_token: str | int | None) -> None:
        self._tokenizer = tokenizer
        super().__init__(path, texts, bos_token)
        if self.decode(self.encode(self._PROBE, add_bos=False), skip_special_tokens=False) != self._PROBE:
            raise CheckpointError(path, "is not a Gemma tokenizer: it does not give back the text it was given")

    def _encode_segment(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def id_of(self, piece: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(piece)
        return found

    def piece_of(self, token_id: int) -> str:
        # The library's ids have 32 bits.
        return self._tokenizer.id_to_token(token_id) or "" if 0 <= token_id < self.vocab_size else ""


@contextmanager
def _refusals(path: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into a CheckpointError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, CheckpointError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        raise CheckpointError(path, f"is refused by the tokenizers library: {error}") from None


def _from_json(path: str, bos_token: str | int | None) -> BpeTokenizer:
    """The tokenizer in a ``tokenizer.json``."""
    import tokenizers  # see SentencePieceTokenizer

    written = MappedFile(path).bytes.tobytes()
    with _refusals(path):
        tokenizer = tokenizers.Tokenizer.from_buffer(written)
        # All three can be left over from training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if isinstance(tokenizer.model, tokenizers.models.BPE):
            tokenizer.model.dropout = None
        added = tokenizer.get_added_tokens_decoder()
        size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(index + 1 for index in added)])
        if size > _MAX_TOKENS:
            raise CheckpointError(path, f"it claims {size} tokens (at most {_MAX_TOKENS} are accepted)")
        pieces: list[bytes] = []
        kinds: npt.NDArray[np.int64] = np.full(size, proto.NORMAL, dtype=np.int64)
        for index in range(size):
            token = added.get(index)
            if token is None:
                piece = (tokenizer.id_to_token(index) or "").encode()
                if _BYTE_PIECE.fullmatch(piece):
                    kinds[index] = proto.BYTE
            else:
                piece = token.content.encode()
                kinds[index] = proto.CONTROL if token.special else proto.USER_DEFINED
            pieces.append(byte_spans.SEPARATOR + piece)
        joined = b"".join(pieces)
        kinds = _with_control_tokens(path, joined, kinds)
        # Those among them that were ordinary pieces are not found in a text otherwise; the others are there already.
        tokenizer.add_special_tokens([name for name in _CONTROL_TOKENS if tokenizer.token_to_id(name) is not None])
        texts = TokenTexts.of(joined, kinds)
    return BpeTokenizer(path, tokenizer, texts, bos_token)


def _from_merges(
    path: str, tokens: StringArray, kinds: npt.NDArray[np.int64], merges: StringArray, bos_token_id: int | None
) -> BpeTokenizer:
    """The tokenizer of a Gemma 4 GGUF: its scores say nothing, but it has the merges of the ``tokenizer.json``."""
    import tokenizers
    from tokenizers import models, normalizers

    try:
        _check_kinds(kinds)
        pieces = [tokens[index].decode() for index in range(len(tokens))]
        pairs = [merge.decode().partition(" ") for merge in map(merges.__getitem__, range(len(merges)))]
        joined = tokens.joined()
        kinds = _with_control_tokens(path, joined, kinds)
        texts = TokenTexts.of(joined, kinds)
    except ValueError as error:
        raise CheckpointError(path, f"unusable vocabulary: {error}") from None
    unknown = next((pieces[index] for index in np.flatnonzero(kinds == proto.UNKNOWN).tolist()), None)
    with _refusals(path):
        model = models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[(first, second) for first, _, second in pairs],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        for special, chosen in (
            (True, (kinds == proto.CONTROL) | (kinds == proto.UNKNOWN)),
            (False, kinds == proto.USER_DEFINED),
        ):
            # All at once: each call makes the library build its matcher anew.
            tokenizer.add_tokens(
                [
                    tokenizers.AddedToken(pieces[index], special=special, normalized=False)
                    for index in np.flatnonzero(chosen).tolist()
                ]
            )
    return BpeTokenizer(path, tokenizer, texts, bos_token_id)


def tokenizer_from_gguf(gguf: GgufFile) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata; ``None`` if it holds no vocabulary.

    Raises:
        CheckpointError: the vocabulary is damaged or not of the SentencePiece kind.
    """
    tokens = gguf.strings("tokenizer.ggml.tokens")
    if tokens is None:
        return None
    model = gguf.string("tokenizer.ggml.model")
    if model not in ("llama", "gemma4"):
        raise CheckpointError(
            gguf.path,
            f"tokenizer model {printable(repr(model))} is not supported "
            "(supported: 'llama', SentencePiece, and 'gemma4')",
        )
    bos_id = gguf.integer("tokenizer.ggml.bos_token_id")
    types = _column(gguf, "tokenizer.ggml.token_type", len(tokens), "iu").astype(np.int64)
    if model == "gemma4":
        merges = gguf.strings("tokenizer.ggml.merges")
        if merges is None:
            raise CheckpointError(gguf.path, "metadata tokenizer.ggml.merges is missing")
        return _from_merges(gguf.path, tokens, types, merges, bos_id)
    scores = _column(gguf, "tokenizer.ggml.scores", len(tokens), "f").astype(np.float32)
    try:
        joined = tokens.joined()
    except ValueError as error:
        raise CheckpointError(gguf.path, f"unusable vocabulary: {error}") from None
    return SentencePieceTokenizer(gguf.path, proto.Vocabulary(joined, scores, types), bos_id)


def _column(gguf: GgufFile, key: str, tokens: int, kinds: str) -> npt.NDArray[np.generic]:
    """One number for each token, of an element type in ``kinds``."""
    column = gguf.numbers(key)
    if column is None or len(column) != tokens:
        found = "missing" if column is None else f"{len(column)} long"
        raise CheckpointError(gguf.path, f"metadata {key} is {found}; tokenizer.ggml.tokens has {tokens}")
    if column.dtype.kind not in kinds:
        raise CheckpointError(gguf.path, f"metadata {key} has the wrong element type")
    return column


def tokenizer_from_directory(directory: Path, bos_token: str | int | None) -> Tokenizer | None:
    """The tokenizer in a Hugging Face directory: ``tokenizer.json``, else ``tokenizer.model``; ``None`` if neither.

    Args:
        directory: the directory.
        bos_token: as for :class:`Tokenizer`.

    Raises:
        CheckpointError: the file is damaged or of an unsupported kind, or has no such token.
    """
    if (path := directory / "tokenizer.json").exists():
        return _from_json(str(path), bos_token)
    if (path := directory / "tokenizer.model").exists():
        return _from_model_file(str(path), bos_token)
    return None


def _from_model_file(path: str, bos_token: str | int | None) -> SentencePieceTokenizer:
    model = MappedFile(path).bytes.tobytes()
    try:
        vocabulary = proto.Vocabulary.of(proto.read_pieces(model))
    except (ValueError, OverflowError) as error:
        raise CheckpointError(path, f"unusable vocabulary: {error}") from None
    return SentencePieceTokenizer(path, vocabulary, bos_token)

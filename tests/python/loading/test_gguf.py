"""The GGUF reader: right on files other writers made, and one clear error for anything else."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_files as tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftwerk.loading import CheckpointError, open_checkpoint
from draftwerk.loading.gguf import BLOCK_TYPES, TENSOR_TYPES, GgufFile


def test_reads_what_the_reference_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "reference.gguf"
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -5)
    writer.add_uint64("a.u64", 2**63)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Größe ▁")
    writer.add_array("a.strings", ["", "x", "日本"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    random = np.random.default_rng(1)
    matrix = random.standard_normal((6, 256)).astype(np.float32)
    quantised = {}
    for name in ("Q8_0", "Q4_0", "Q5_0", "BF16"):
        kind = gguf.GGMLQuantizationType[name]
        quantised[name.lower()] = gguf.quants.quantize(matrix, kind)
        writer.add_tensor(f"matrix.{name.lower()}", quantised[name.lower()], raw_dtype=kind)
    for name in ("Q4_K", "Q6_K"):  # the package cannot quantise to these: any bytes will do
        kind = gguf.GGMLQuantizationType[name]
        blocks = random.integers(0, 255, (6, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        quantised[name.lower()] = blocks
        writer.add_tensor(f"matrix.{name.lower()}", blocks, raw_dtype=kind)
    writer.add_tensor("matrix.f32", matrix)
    writer.add_tensor("vector", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile(path)
    assert file.integer("a.u32") == 4_000_000_000
    assert file.integer("a.i32") == -5
    assert file.integer("a.u64") == 2**63
    assert file.number("a.f32") == 0.5
    assert file.number("a.f64") == 0.1
    assert file.metadata["a.bool"] is True
    assert file.string("a.string") == "Größe ▁"
    strings = file.strings("a.strings")
    assert strings is not None
    assert list(strings) == [b"", b"x", "日本".encode()]
    assert strings[2] == "日本".encode()
    ints, floats = file.numbers("a.ints"), file.numbers("a.floats")
    assert ints is not None
    assert ints.tolist() == [1, -2, 3]
    assert floats is not None
    assert floats.tolist() == [0.5, -1.5]
    for name, blocks in quantised.items():
        tensor = file.tensors[f"matrix.{name}"]
        assert (tensor.type.name, tensor.shape) == (name, (6, 256))
        assert file.file.bytes[tensor.offset : tensor.offset + tensor.size].tobytes() == blocks.tobytes()
    assert file.tensors["vector"].shape == (256,)


def test_block_sizes_are_those_of_the_reference_package() -> None:
    for name, block in BLOCK_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == (block.block_size, block.block_bytes)


def test_every_type_of_ggml_has_its_name(tmp_path: Path) -> None:
    model = tiny.TinyGguf()
    for kind in set(gguf.GGMLQuantizationType) - {gguf.GGMLQuantizationType(number) for number in TENSOR_TYPES}:
        model.tensor(GATE)[2] = kind
        with pytest.raises(CheckpointError, match=f"type {kind.name.lower()} is not supported"):
            GgufFile(model.write(tmp_path / "tiny.gguf"))


def test_opens_a_tiny_checkpoint(tmp_path: Path) -> None:
    model = tiny.TinyGguf()
    checkpoint = open_checkpoint(model.write(tmp_path / "tiny.gguf"))
    config = checkpoint.config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("gemma3", tiny.VOCAB, tiny.HIDDEN)
    assert config.layer_types == ("sliding_attention",) * 2
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling_factor) == (1e6, 1e4, 1.0)
    assert config.query_pre_attn_scalar == tiny.HEAD_DIM
    assert checkpoint.name == "Tiny"
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))
    assert checkpoint.weight_types == {"f16": 14, "f32": 13, "q8_0": 1}
    views = {view.name: view for view in checkpoint.tensors()}
    assert {name: view.shape for name, view in views.items()} == tiny.hugging_face_shapes()
    assert next(iter(views)) == "model.embed_tokens.weight"
    assert views["model.embed_tokens.weight"].rows_bytes() == 34
    pairs = {
        "blk.1.ffn_norm.weight": "model.layers.1.pre_feedforward_layernorm.weight",
        "blk.0.post_ffw_norm.weight": "model.layers.0.post_feedforward_layernorm.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for stored, canonical in pairs.items():
        assert views[canonical].data.tobytes() == model.tensor(stored)[3]  # norms too: GGUF stores 1 + w
        views[canonical].release(0, views[canonical].data.size)
        assert views[canonical].data.tobytes() == model.tensor(stored)[3]


def test_layer_pattern_scaling_and_attention_scale(tmp_path: Path) -> None:
    model = tiny.TinyGguf(
        gemma3__rope__scaling__type=(tiny.STRING, "linear"),
        gemma3__rope__scaling__factor=(tiny.F32, 8.0),
        gemma3__attention__sliding_window_pattern=(tiny.U32, 2),
        gemma3__final_logit_softcapping=(tiny.F32, 30.0),
    )
    config = open_checkpoint(model.write(tmp_path / "tiny.gguf")).config
    assert config.layer_types == ("sliding_attention", "full_attention")
    assert config.rope_scaling_factor == 8.0
    assert config.final_logit_softcapping == 30.0
    model.entries["gemma3.attention.sliding_window_pattern"] = tiny.array(
        "gemma3.attention.sliding_window_pattern", tiny.BOOL, [0, 1]
    )
    config = open_checkpoint(model.write(tmp_path / "flags.gguf")).config
    assert config.layer_types == ("full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("kind", "factor", "expected"),
    [(None, 8.0, 8.0), (None, 0.0, 1.0), ("none", 8.0, 1.0), ("none", None, 1.0), ("linear", 8.0, 8.0)],
)
def test_rope_scaling_is_that_of_llama_cpp(
    kind: str | None, factor: float | None, expected: float, tmp_path: Path
) -> None:
    model = tiny.TinyGguf(
        gemma3__rope__scaling__type=None if kind is None else (tiny.STRING, kind),
        gemma3__rope__scaling__factor=None if factor is None else (tiny.F32, factor),
    )
    assert open_checkpoint(model.write(tmp_path / "tiny.gguf")).config.rope_scaling_factor == expected


def test_version_2_and_files_without_a_vocabulary(tmp_path: Path) -> None:
    model = tiny.TinyGguf()
    model.version = 2
    for entry in ("tokens", "scores", "types"):
        del model.entries[entry]
    checkpoint = open_checkpoint(model.write(tmp_path / "tiny.gguf"))
    assert checkpoint.tokenizer is None
    assert checkpoint.eos_token_ids == (1,)


def test_without_ids_the_vocabulary_has_both_ends_of_a_text(tmp_path: Path) -> None:
    unknown = {f"tokenizer.ggml.{kind}_token_id": None for kind in ("bos", "eos")}
    checkpoint = open_checkpoint(tiny.TinyGguf(**unknown).write(tmp_path / "tiny.gguf"))
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))
    assert checkpoint.tokenizer is not None
    assert checkpoint.tokenizer.encode("hello")[0] == 2


def test_turn_markers_end_generation_of_a_chat_model(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    model = tiny.TinyGguf(tokenizer__chat_template=(tiny.STRING, template))
    checkpoint = open_checkpoint(model.write(tmp_path / "tiny.gguf"))
    assert checkpoint.eos_token_ids == (1, 5)
    assert checkpoint.chat_template is not None
    assert checkpoint.chat_template.render([{"role": "user", "content": "hi"}]) == "<bos>user: hi<eos>"


Change = Callable[[tiny.TinyGguf], object]


def changed(field: str, value: object) -> Change:
    return lambda model: setattr(model, field, value)


def tensor(name: str, position: int, value: object) -> Change:
    return lambda model: model.tensor(name).__setitem__(position, value)


def entry(name: str, value: bytes | None) -> Change:
    return lambda model: model.entries.pop(name) if value is None else model.entries.__setitem__(name, value)


def having(name: str, kind: int, value: object) -> Change:
    return entry(name, tiny.key(name, kind, value))


def unnamed(model: tiny.TinyGguf, token: str) -> None:
    """Neither the metadata nor the vocabulary tells which token this is."""
    del model.entries[f"tokenizer.ggml.{token}_token_id"]
    pieces = [piece.replace(f"<{token}>", "<unused0>") for piece, _, _ in tiny.vocabulary()]
    model.entries["tokens"] = tiny.array("tokenizer.ggml.tokens", tiny.STRING, pieces)


def moved(name: str, onto: str) -> Change:
    """Puts one tensor's bytes at another's offset."""

    def change(model: tiny.TinyGguf) -> None:
        offset = 0
        for other in model.tensors:
            if other[0] == onto:
                model.tensor(name)[4] = offset
            offset += -(-len(other[3]) // 32) * 32

    return change


NORM = "blk.0.attn_norm.weight"
GATE = "blk.1.ffn_gate.weight"
OWN_HEAD = ["output.weight", (32, 32), 1, bytes(2048), None]
BAD_FILES: dict[str, tuple[Change, str | None, str]] = {
    "magic": (changed("magic", b"GGML"), None, "not a GGUF file: it starts with b'GGML'"),
    "version": (changed("version", 1), None, "version 1 is not supported"),
    "big-endian": (changed("version", 3 << 24), None, "big-endian"),
    "tensor count": (changed("tensor_count", 1 << 60), None, f"claims {1 << 60} tensors"),
    "tensor count, a little": (changed("tensor_count", 60), None, ""),
    "tensor count, above the bytes": (changed("tensor_count", 60_000), None, "claims 60000 tensors"),
    "strings above the bytes": (
        entry("x", tiny.string("x") + struct.pack("<IIQ", 9, 8, 1 << 20)),
        None,
        f"claims {1 << 20} strings",
    ),
    "key count": (changed("key_count", 1 << 63), None, f"claims {1 << 63} metadata keys"),
    "fewer keys": (changed("key_count", 3), None, ""),
    "architecture": (
        having("general.architecture", tiny.STRING, "llama"),
        None,
        "'llama' is not supported (supported: gemma3, gemma4)",
    ),
    "no architecture": (entry("general.architecture", None), None, "general.architecture is missing"),
    "architecture type": (having("general.architecture", tiny.U32, 3), None, "is not a string"),
    "missing key": (entry("gemma3.block_count", None), None, "gemma3.block_count is missing"),
    "absurd layers": (having("gemma3.block_count", tiny.U32, 2**32 - 1), None, "gemma3.block_count = 4294967295"),
    "zero heads": (having("gemma3.attention.head_count_kv", tiny.U32, 0), None, "head_count_kv = 0"),
    "size is text": (having("gemma3.embedding_length", tiny.STRING, "big"), None, "is not an integer"),
    "not a number": (having("gemma3.rope.freq_base", tiny.F32, float("nan")), None, "not a finite number"),
    "negative epsilon": (having("gemma3.attention.layer_norm_rms_epsilon", tiny.F32, -1.0), None, "is not positive"),
    "RoPE scaling": (
        entry("x", tiny.key("gemma3.rope.scaling.type", tiny.STRING, "yarn")),
        None,
        "'yarn' is not supported",
    ),
    "linear RoPE without a factor": (
        entry("x", tiny.key("gemma3.rope.scaling.type", tiny.STRING, "linear")),
        None,
        "gemma3.rope.scaling.factor is missing: linear RoPE scaling needs one above 0",
    ),
    "linear RoPE by nothing": (
        lambda model: model.entries.update(
            {
                "type": tiny.key("gemma3.rope.scaling.type", tiny.STRING, "linear"),
                "factor": tiny.key("gemma3.rope.scaling.factor", tiny.F32, 0.0),
            }
        ),
        None,
        "gemma3.rope.scaling.factor is 0.0: linear RoPE scaling needs one above 0",
    ),
    "RoPE by less than nothing": (
        entry("x", tiny.key("gemma3.rope.scaling.factor", tiny.F32, -8.0)),
        None,
        "gemma3.rope.scaling.factor is -8.0",
    ),
    "key twice": (entry("x", tiny.key("general.name", tiny.STRING, "x")), None, "general.name appears twice"),
    "value type": (entry("x", tiny.string("x") + struct.pack("<I", 13)), None, "unknown value type 13"),
    "nested array": (entry("x", tiny.string("x") + struct.pack("<IIQ", 9, 9, 1)), None, "nested array"),
    "array element": (entry("x", tiny.string("x") + struct.pack("<IIQ", 9, 77, 1)), None, "unknown element type 77"),
    "array count": (
        entry("x", tiny.string("x") + struct.pack("<IIQ", 9, 0, 1 << 62)),
        None,
        f"claims {1 << 62} elements",
    ),
    "string array count": (
        entry("x", tiny.string("x") + struct.pack("<IIQ", 9, 8, 1 << 40)),
        None,
        f"claims {1 << 40} strings",
    ),
    "string in array": (entry("x", tiny.string("x") + struct.pack("<IIQQ", 9, 8, 2, 1 << 40)), None, "beyond the end"),
    "string length": (
        entry("x", tiny.string("x") + struct.pack("<IQ", 8, 1 << 40)),
        None,
        f"string of {1 << 40} bytes",
    ),
    "key not UTF-8": (entry("x", tiny.string(b"\xff") + struct.pack("<IB", 0, 1)), None, "not UTF-8"),
    "alignment": (entry("x", tiny.key("general.alignment", tiny.U32, 24)), None, "general.alignment is 24"),
    "alignment zero": (entry("x", tiny.key("general.alignment", tiny.U32, 0)), None, "general.alignment is 0"),
    "split": (entry("x", tiny.key("split.count", tiny.U32, 4)), None, "one of 4 parts"),
    "another part of a split": (
        changed("entries", {"x": tiny.key("split.count", tiny.U32, 4)}),
        None,
        "one of 4 parts",
    ),
    "vision part": (
        having("general.architecture", tiny.STRING, "clip"),
        None,
        "vision or audio part of a model (architecture 'clip'): give the GGUF file of its text model",
    ),
    "type": (tensor(NORM, 2, 99), NORM, "type number 99 is not supported"),
    "known type": (
        tensor("token_embd.weight", 2, 10),
        "token_embd.weight",
        "type q2_k is not supported (supported: bf16, f16, f32, q4_0, q4_k, q5_0, q6_k, q8_0); files called BF16, F16, "
        "Q8_0, Q6_K, Q4_K_M and Q4_0 can be read",
    ),
    "quantised norm": (tensor("output_norm.weight", 2, 8), "output_norm.weight", "type q8_0 is not supported here"),
    "shape": (
        tensor(GATE, 1, (tiny.HIDDEN, tiny.MLP)),
        GATE,
        "has shape [32, 64], but the configuration asks for [64, 32]",
    ),
    "shape of a norm": (tensor(NORM, 1, (1, tiny.HIDDEN)), NORM, "has shape [1, 32]"),
    "huge shape": (tensor(GATE, 1, (1 << 63, 32)), GATE, "reach beyond the end of the file"),
    "overflowing shape": (tensor(GATE, 1, (1 << 63, 1 << 63)), GATE, "reach beyond the end of the file"),
    "empty shape": (tensor(GATE, 1, (0, 32)), GATE, "empty dimension"),
    "no dimension": (tensor(GATE, 1, ()), GATE, "has 0 dimensions"),
    "five dimensions": (tensor(GATE, 1, (1, 1, 1, 64, 32)), GATE, "has 5 dimensions"),
    "part of a block": (
        tensor("token_embd.weight", 1, (tiny.VOCAB * 2, 16)),
        "token_embd.weight",
        "no multiple of q8_0's 32",
    ),
    "offset outside": (tensor(GATE, 4, 1 << 62), GATE, "reach beyond the end of the file"),
    "offset unaligned": (tensor(GATE, 4, 33), GATE, "no multiple of the alignment 32"),
    "overlap": (moved(GATE, "blk.0.ffn_up.weight"), GATE, "overlaps tensor"),
    "tensor twice": (tensor(GATE, 0, NORM), NORM, "appears twice"),
    "tensor missing": (lambda model: model.tensors.pop(5), "blk.0.attn_v.weight", "is missing"),
    "no embedding": (lambda model: model.tensors.pop(0), "token_embd.weight", "is missing"),
    "foreign tensor": (tensor(GATE, 0, "blk.0.ssm_a.weight"), "blk.0.ssm_a.weight", "not part of a Gemma 3 model"),
    "layer beyond": (tensor(GATE, 0, "blk.2.ffn_gate.weight"), "blk.2.ffn_gate.weight", "not part of this model"),
    "layer spelt otherwise": (
        tensor(GATE, 0, "blk.01.ffn_gate.weight"),
        "blk.01.ffn_gate.weight",
        "not part of this model",
    ),
    "own head": (lambda model: model.tensors.append(OWN_HEAD), "output.weight", "not part of a Gemma 3 model"),
    "tokenizer kind": (
        having("tokenizer.ggml.model", tiny.STRING, "gpt2"),
        None,
        "tokenizer model 'gpt2' is not supported",
    ),
    "scores missing": (entry("scores", None), None, "tokenizer.ggml.scores is missing"),
    "types too few": (
        entry("types", tiny.array("tokenizer.ggml.token_type", tiny.I32, [1])),
        None,
        "token_type is 1 long",
    ),
    "token type": (
        entry("types", tiny.array("tokenizer.ggml.token_type", tiny.I32, [9] * tiny.VOCAB)),
        None,
        "unknown type 9",
    ),
    "no byte tokens": (
        entry("types", tiny.array("tokenizer.ggml.token_type", tiny.I32, [1] * tiny.VOCAB)),
        None,
        "unusable vocabulary: there are not 256 byte pieces",
    ),
    "equal tokens": (
        entry("tokens", tiny.array("tokenizer.ggml.tokens", tiny.STRING, ["x"] * tiny.VOCAB)),
        None,
        "unusable vocabulary",
    ),
    "token not UTF-8": (
        entry("tokens", tiny.array("tokenizer.ggml.tokens", tiny.STRING, [b"\xff"] * tiny.VOCAB)),
        None,
        "string 0 is not UTF-8",
    ),
    "bos": (having("tokenizer.ggml.bos_token_id", tiny.U32, 1 << 31), None, "is not in the vocabulary"),
    "no bos": (lambda model: unnamed(model, "bos"), None, "bos token '<bos>' is not in the vocabulary"),
    "no eos": (
        lambda model: unnamed(model, "eos"),
        None,
        "no file names an end token, and the vocabulary has no <eos>",
    ),
    "eos": (having("tokenizer.ggml.eos_token_id", tiny.U32, 1 << 31), None, "outside the vocabulary"),
    "infinite norm": (tensor(NORM, 3, b"\x00\x00\x80\x7f" * 32), NORM, "not finite"),
    "template": (
        entry("x", tiny.key("tokenizer.chat_template", tiny.STRING, "{% if %}\n")),
        None,
        "chat template cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, name, reason = BAD_FILES[case]
    model = tiny.TinyGguf()
    change(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(path).tensors())
    error = caught.value
    assert (error.path, error.tensor) == (str(path), name) or case in ("tensor count, a little", "fewer keys")
    assert reason in error.reason
    assert str(error).startswith(str(path))
    assert len(str(error).splitlines()) == 1


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = tiny.TinyGguf().bytes()
    path = tmp_path / "cut.gguf"
    last = tiny.TinyGguf().tensors[-1][3]
    end = len(whole) - (-len(last) % 32)
    for size in [*range(0, 3000, 7), *range(3000, end, 997), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize("kind", ["missing", "empty", "directory", "NUL"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(CheckpointError):
        open_checkpoint(f"{path}\0" if kind == "NUL" else path)


def test_a_hostile_name_cannot_break_the_line(tmp_path: Path) -> None:
    model = tiny.TinyGguf()
    model.tensor(GATE)[0] = "x\n\x1b[31m\u2028" * 20
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model.write(tmp_path / "bad.gguf"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


WHOLE = tiny.TinyGguf().bytes()
NUMBERS = [
    number.to_bytes(8, "little")
    for number in (
        0,
        1,
        0xFF,
        0x7FFF_FFFF,
        0x8000_0000,
        0xFFFF_FFFF,
        1 << 32,
        1 << 40,
        (1 << 63) - 1,
        1 << 63,
        (1 << 64) - 1,
    )
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 12_000),
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NUMBERS)),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.integers(0, len(WHOLE))),
)
def test_damaged_files_never_raise_anything_else(
    edits: list[tuple[int, bytes]], cut: int | None, tmp_path: Path
) -> None:
    data = bytearray(WHOLE)
    for at, patch in edits:
        data[at : at + len(patch)] = patch
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data[:cut])
    try:
        for view in open_checkpoint(path).tensors():
            assert view.rows_bytes() * (view.shape[0] if len(view.shape) == 2 else 1) == view.data.size
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1

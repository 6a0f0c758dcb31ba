"""Hugging Face directories: both generations of configurations, shards, multimodal checkpoints, damaged ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny

from draftwerk.loading import CheckpointError, TextConfig, is_assistant, open_assistant, open_checkpoint

Json = dict[str, Any]


def legacy_config() -> Json:
    """As transformers 4.50 wrote it."""
    config = tiny.hugging_face_config()
    del config["layer_types"], config["rope_parameters"]
    config |= {
        "rope_theta": 500_000.0,
        "rope_local_base_freq": 20_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    }
    return config


def test_reads_the_configuration_of_transformers_5(tmp_path: Path) -> None:
    config = tiny.hugging_face_config()
    config["rope_parameters"]["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    config["final_logit_softcapping"] = 30.0
    checkpoint = open_checkpoint(tiny.write_directory(tmp_path / "tiny-model", config=config))
    assert checkpoint.config == TextConfig(
        architecture="gemma3",
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.HIDDEN,
        intermediate_size=tiny.MLP,
        num_attention_heads=tiny.HEADS,
        num_key_value_heads=tiny.KV_HEADS,
        num_global_key_value_heads=tiny.KV_HEADS,
        head_dim=tiny.HEAD_DIM,
        global_head_dim=tiny.HEAD_DIM,
        sliding_window=tiny.WINDOW,
        layer_types=("sliding_attention", "full_attention"),
        rope_theta=2e6,
        rope_local_theta=1e4,
        rope_scaling_factor=8.0,
        rope_partial_rotary_factor=1.0,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=32.0,
        max_position_embeddings=128,
        final_logit_softcapping=30.0,
        value_norm=False,
        layer_scalars=False,
        num_kv_shared_layers=0,
        use_double_wide_mlp=False,
        attention_k_eq_v=False,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        num_experts=0,
        top_k_experts=0,
        moe_intermediate_size=0,
    )
    assert checkpoint.name == "tiny-model"
    assert checkpoint.tokenizer is None
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))


def test_reads_the_configuration_of_transformers_4(tmp_path: Path) -> None:
    config = open_checkpoint(tiny.write_directory(tmp_path, config=legacy_config())).config
    assert config.layer_types == ("sliding_attention", "full_attention")
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling_factor) == (5e5, 2e4, 8.0)


def test_one_set_of_rope_parameters_is_that_of_the_full_layers(tmp_path: Path) -> None:
    raw = tiny.hugging_face_config() | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}}
    config = open_checkpoint(tiny.write_directory(tmp_path, config=raw)).config
    assert (config.rope_theta, config.rope_local_theta, config.rope_scaling_factor) == (3e5, 1e4, 2.0)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 3e5, "rope_local_base_freq": 2e4},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7e5}}},
        {"sliding_window_pattern": 3, "num_hidden_layers": 7},
    ],
)
def test_agrees_with_transformers(rope: Json) -> None:
    transformers = pytest.importorskip("transformers")
    from draftwerk.loading.hugging_face_config import config_from_hugging_face

    raw = tiny.hugging_face_config()
    del raw["layer_types"], raw["rope_parameters"]
    raw |= rope
    reference = transformers.Gemma3TextConfig(**json.loads(json.dumps(raw)))
    full, sliding = (reference.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    for source in (raw, json.loads(reference.to_json_string())):
        config = config_from_hugging_face("config.json", source)
        assert list(config.layer_types) == reference.layer_types
        assert config.rope_theta == full["rope_theta"]
        assert config.rope_scaling_factor == full.get("factor", 1.0)
        assert config.rope_local_theta == sliding["rope_theta"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_norms_become_the_factor_and_matrices_stay(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_directory(tmp_path, dtype=dtype))
    assert checkpoint.weight_types == {dtype.lower(): 28}
    expected = tiny.weights()
    views = list(checkpoint.tensors())
    assert {view.name for view in views} == set(expected)
    for view in views:
        stored = tiny.stored(expected[view.name], dtype)
        if len(view.shape) == 2:
            assert (view.dtype, view.data.tobytes()) == (dtype.lower(), stored)
            assert view.rows_bytes() * view.shape[0] == view.data.size
            view.release(0, view.data.size)
            assert view.data.tobytes() == stored
        else:
            assert view.dtype == "f32"
            kept = {"F32": 24, "F16": 11, "BF16": 8}[dtype]  # bits of the significand
            factor = 1 + expected[view.name]
            np.testing.assert_allclose(view.data.view(np.float32), factor, rtol=2.0**-kept, atol=2.0**-kept * 4)
            view.release(0, view.data.size)


def test_bfloat16_norms_are_converted_exactly(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_directory(tmp_path))
    norm = tiny.weights()["model.norm.weight"]
    truncated = (norm.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    view = next(view for view in checkpoint.tensors() if view.name == "model.norm.weight")
    assert (view.data.view(np.float32) == np.float32(1) + truncated).all()


def test_tensors_that_lie_unaligned_are_copied(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    values = tiny.weights()
    tensors = {name: ("F32", value.shape, tiny.stored(value, "F32")) for name, value in values.items()}
    for shift in range(4):
        padded = tiny.safetensors_bytes({**tensors, "x" * shift + "rotary_emb.inv_freq": ("U8", [0], b"")}, padding=1)
        (directory / "model.safetensors").write_bytes(padded)
        for view in open_checkpoint(directory).tensors():
            assert view.data.ctypes.data % 4 == 0
            if len(view.shape) == 2:
                assert (view.data.view(np.float32) == values[view.name].ravel()).all()


def write_shards(directory: Path) -> dict[str, str]:
    tensors = {name: ("BF16", value.shape, tiny.stored(value, "BF16")) for name, value in tiny.weights().items()}
    weight_map = {}
    for index in range(3):
        part = dict(list(tensors.items())[index::3])
        name = f"model-{index + 1:05}-of-00003.safetensors"
        (directory / name).write_bytes(tiny.safetensors_bytes(part))
        weight_map |= dict.fromkeys(part, name)
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_one_model(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    single = {view.name: view.data.tobytes() for view in open_checkpoint(directory).tensors()}
    write_shards(directory)
    assert {view.name: view.data.tobytes() for view in open_checkpoint(directory).tensors()} == single


def test_an_index_beside_a_single_file_is_left_over(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    single = (directory / "model.safetensors").read_bytes()
    expected = {view.name: view.data.tobytes() for view in open_checkpoint(directory).tensors()}
    write_shards(directory)
    for shard in directory.glob("model-*.safetensors"):
        shard.write_bytes(b"something else")
    (directory / "model.safetensors").write_bytes(single)
    assert {view.name: view.data.tobytes() for view in open_checkpoint(directory).tensors()} == expected


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", ".", "..", "a/b", "a\0b", 3, None])
def test_an_index_opens_no_file_elsewhere(shard: Any, tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    weight_map: dict[str, Any] = dict(write_shards(directory))
    weight_map["model.norm.weight"] = shard
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="is not a file name"):
        open_checkpoint(directory)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    weight_map = write_shards(directory)
    names = sorted(weight_map)
    weight_map[names[0]] = next(shard for shard in weight_map.values() if shard != weight_map[names[0]])
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="the index says it is here"):
        open_checkpoint(directory)
    for bad in ({}, {"weight_map": {}}, {"weight_map": []}):
        (directory / "model.safetensors.index.json").write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="weight_map is missing"):
            open_checkpoint(directory)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_checkpoint(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = tiny.hugging_face_config()
    del text["head_dim"], text["rms_norm_eps"]  # the hub's configs leave out what is Gemma3TextConfig's default
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 5]}
    directory = tiny.write_directory(
        tmp_path, config={**config, "text_config": {**text, "head_dim": tiny.HEAD_DIM}}, prefix=prefix
    )
    with caplog.at_level(logging.INFO, logger="draftwerk"):
        checkpoint = open_checkpoint(directory)
    assert "only its text model" in caplog.text
    assert checkpoint.config.rms_norm_eps == 1e-6
    assert checkpoint.eos_token_ids == (1, 5)
    assert {view.name for view in checkpoint.tensors()} == set(tiny.weights())


def test_tensors_of_other_modalities_and_a_tied_head_are_left_out(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    tensors = {name: ("BF16", value.shape, tiny.stored(value, "BF16")) for name, value in tiny.weights().items()}
    tensors["vision_tower.x"] = ("I64", (1,), bytes(8))
    tensors["lm_head.weight"] = ("BF16", (tiny.VOCAB, tiny.HIDDEN), bytes(2 * tiny.VOCAB * tiny.HIDDEN))
    (directory / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    assert {view.name for view in open_checkpoint(directory).tensors()} == set(tiny.weights())
    tensors["lm_head.weight"] = ("BF16", (1, tiny.HIDDEN), bytes(2 * tiny.HIDDEN))
    (directory / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: has shape"):
        open_checkpoint(directory)


def test_generation_config_names_the_end_tokens(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    for eos, expected in ((5, (5,)), ([1, 5, 1], (1, 5)), (None, (1,))):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "bos_token_id": 2}))
        assert open_checkpoint(directory).eos_token_ids == expected
    for bad in ("1", [1, "5"], 10**6, -1, [], True, {"a": 1}):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(CheckpointError):
            open_checkpoint(directory)


def test_without_ids_the_tokenizer_names_the_ends_of_a_text(tmp_path: Path) -> None:
    config = tiny.hugging_face_config()
    del config["eos_token_id"], config["bos_token_id"]
    directory = tiny.write_directory(tmp_path, config=config)
    assert open_checkpoint(directory).eos_token_ids == ()
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<eos>"}, "bos_token": "<bos>", "chat_template": "{{ bos_token }}x"})
    )
    checkpoint = open_checkpoint(directory)
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1, 5))
    assert checkpoint.chat_template is not None
    assert checkpoint.chat_template.render([]) == "<bos>x"


@pytest.mark.parametrize(
    ("eos_token", "template", "expected"),
    [
        ("<end_of_turn>", "{{ bos_token }}", (1, 5)),
        ("<eos>", "{{ bos_token }}", (1, 5)),
        ("<table>", "{{ bos_token }}", (1, 14, 5)),  # the end of a turn of a chat that is not Gemma's
        ("<end_of_turn>", None, (1,)),
    ],
)
def test_a_chat_model_ends_at_the_end_of_its_turn(
    eos_token: str, template: str | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    directory = tiny.write_directory(tmp_path)  # its configuration names <eos> alone
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    named = {"bos_token": "<bos>", "eos_token": eos_token, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    assert open_checkpoint(directory).eos_token_ids == expected


@pytest.mark.parametrize("place", ["jinja", "json", "config", "list"])
def test_chat_templates_have_four_homes(place: str, tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    source = "{{ messages[0].content }}!"
    if place == "jinja":
        (directory / "chat_template.jinja").write_text(source)
    elif place == "json":
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    else:
        template: Any = (
            source
            if place == "config"
            else [{"name": "rag", "template": "no"}, {"name": "default", "template": source}]
        )
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    template = open_checkpoint(directory).chat_template
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi!"


def without(field: str) -> Callable[[Json], object]:
    return lambda config: config.pop(field)


def having(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config.update(fields)


BAD_CONFIGS: dict[str, tuple[Callable[[Json], object], str]] = {
    **{
        f"no {field}": (without(field), f"field {field} is missing")
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "sliding_window",
            "max_position_embeddings",
            "rms_norm_eps",
            "query_pre_attn_scalar",
        )
    },
    "model type": (having(model_type="llama"), "model_type 'llama' is not supported (supported: gemma3_text, gemma3, "),
    "no model type": (without("model_type"), "model_type None is not supported"),
    "odd model type": (having(model_type=["gemma3"]), "is not supported"),
    "no text_config": (having(model_type="gemma3"), "field text_config is missing"),
    "text": (having(hidden_size="32"), "field hidden_size = '32' is not an integer"),
    "boolean": (having(hidden_size=True), "field hidden_size = True is not an integer"),
    "fraction": (having(hidden_size=32.0), "field hidden_size = 32.0 is not an integer"),
    "absurd layers": (having(num_hidden_layers=10**12, layer_types=None), "field num_hidden_layers = 1000000000000"),
    "layer types": (having(layer_types=["full_attention"]), "field layer_types is not a list of 2"),
    "layer type": (having(layer_types=["full_attention", "linear"]), "field layer_types is not a list of 2"),
    "pattern": (having(layer_types=None, sliding_window_pattern=0), "sliding_window_pattern = 0"),
    "heads": (having(num_attention_heads=3, num_key_value_heads=2), "no multiple of"),
    "odd head": (having(head_dim=15), "is odd"),
    "epsilon": (having(rms_norm_eps=0), "rms_norm_eps = 0.0 is not positive"),
    "not a number": (having(rms_norm_eps=float("nan")), "not a finite number"),
    "RoPE type": (having(rope_scaling={"rope_type": "yarn", "factor": 2}), "RoPE type 'yarn' is not supported"),
    "RoPE factor": (having(rope_scaling={"rope_type": "linear"}), "field factor is missing"),
    "RoPE list": (having(rope_parameters=[1]), "rope_parameters is not an object"),
    "RoPE entry": (having(rope_parameters={"full_attention": 3}), "rope_parameters.full_attention is not an object"),
    "sliding scaled": (
        having(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2}}),
        "sliding layers",
    ),
    "untied": (having(tie_word_embeddings=False), "field tie_word_embeddings = False is not supported"),
    "bias": (having(attention_bias=True), "attention_bias = True is not supported"),
    "bidirectional": (having(use_bidirectional_attention=True), "use_bidirectional_attention = True is not supported"),
    "activation": (having(hidden_activation="relu"), "hidden_activation = 'relu' is not supported"),
    "softcap": (having(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0 is not supported"),
    "quantised": (having(quantization_config={"bits": 4}), "quantization_config"),
    "wrong size": (having(intermediate_size=65), "has shape [64, 32], but the configuration asks for [65, 32]"),
    "fewer layers": (having(num_hidden_layers=1, layer_types=["full_attention"]), "is not part of this model"),
    "more layers": (having(num_hidden_layers=3, layer_types=["full_attention"] * 3), "is missing"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_CONFIGS[case]
    config = tiny.hugging_face_config()
    change(config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny.write_directory(tmp_path, config=config))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.path.startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b'{"a":' * 100_000, b'{"a":1,"a":2}'])
def test_damaged_json_files(name: str, text: bytes, tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    (directory / name).write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    assert caught.value.path.endswith(name)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["bos_token", "eos_token", "pad_token"])
def test_a_special_token_that_is_no_text(kind: str, tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path, config={**tiny.hugging_face_config(), "bos_token_id": None})
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    (directory / "tokenizer_config.json").write_text(json.dumps({kind: "\ud800"}))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {kind} = '\\ud800' is not valid Unicode"):
        open_checkpoint(directory)


def test_a_link_to_a_name_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("x" * 300)
    with pytest.raises(CheckpointError, match=r"config\.json: File name too long"):
        open_checkpoint(tmp_path)


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    directory = tiny.write_directory(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(directory)
    with pytest.raises(CheckpointError, match=r"no such file or directory, and not a built-in model \(gemma"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint("")
    too_long = "x" * 5000
    with pytest.raises(CheckpointError, match=f"{too_long}: File name too long"):
        open_checkpoint(too_long)
    assert not is_assistant(too_long)


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("adapter_config.json", "is a LoRA adapter: merge it into its model"),
        ("model-Q8_0.gguf", "holds GGUF files and no safetensors checkpoint: give the path of one, such as {file}"),
        ("run.json", "is the directory of a training run: its drafter is {directory}/drafter"),
    ],
)
def test_a_directory_of_something_else(file: str, reason: str, configured: bool, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    (tmp_path / "mmproj-F16.gguf").touch()  # no model
    if configured:
        (tmp_path / "config.json").write_text(json.dumps(tiny.hugging_face_config()))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {reason.format(directory=tmp_path, file=tmp_path / file)}")


def test_a_file_of_weights_is_no_model(tmp_path: Path) -> None:
    weights = tiny.write_directory(tmp_path) / "model.safetensors"
    for open_it in (open_checkpoint, open_assistant):
        with pytest.raises(CheckpointError, match=rf"{weights}: is a file of weights.*: give its directory"):
            open_it(weights)


def test_unsupported_tensor_types_are_named(tmp_path: Path) -> None:
    directory = tiny.write_directory(tmp_path)
    tensors = {name: ("BF16", value.shape, tiny.stored(value, "BF16")) for name, value in tiny.weights().items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = ("F8_E4M3", (tiny.MLP, tiny.HIDDEN), bytes(tiny.MLP * tiny.HIDDEN))
    (directory / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match=f"tensor {name}: type f8_e4m3 is not supported"):
        open_checkpoint(directory)

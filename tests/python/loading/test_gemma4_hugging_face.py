"""Gemma 4 in Hugging Face directories: what transformers makes of a configuration, what it saves, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny_gemma4
from draftwerk.loading import CheckpointError, TextConfig, open_checkpoint
from draftwerk.loading.config import FULL, SLIDING
from draftwerk.loading.hugging_face_config import assistant_config_from_hugging_face, config_from_hugging_face

Json = dict[str, Any]
TEXT_CLASSES = {
    "gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM),
    "gemma4_unified_text": (transformers.Gemma4UnifiedTextConfig, transformers.Gemma4UnifiedForCausalLM),
}


# --- configurations --------------------------------------------------------------------------------------------------


@st.composite
def text_configs(draw: st.DrawFn) -> Json:
    """Configurations with any of the fields that have a default left out; small sizes where tensors depend on them."""
    unified = draw(st.booleans())
    layers = draw(st.integers(1, 8))
    types = [*draw(st.lists(st.sampled_from([SLIDING, FULL]), min_size=layers - 1, max_size=layers - 1)), FULL]
    most_shared = layers - max(types.index(kind) for kind in set(types)) - 1
    config: Json = {
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "num_hidden_layers": layers,
        "layer_types": types,
        "num_kv_shared_layers": draw(st.integers(0, most_shared)),
        "vocab_size": 16,
        "hidden_size": draw(st.sampled_from([8, 24])),
        "intermediate_size": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "num_global_key_value_heads": draw(st.sampled_from([None, 1, 2])),
        "head_dim": draw(st.sampled_from([4, 6])),
        "global_head_dim": draw(st.sampled_from([4, 8, 10])),
        "attention_k_eq_v": draw(st.booleans()),
        "use_double_wide_mlp": draw(st.booleans()),
        "sliding_window": draw(st.sampled_from([5, 512])),
        "max_position_embeddings": 99,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "final_logit_softcapping": draw(st.sampled_from([None, 30.0])),
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 3e4]))},
            FULL: draw(
                st.sampled_from(
                    [
                        {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e5},
                        {"rope_type": "proportional", "rope_theta": 1e5, "factor": 4.0},
                        {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 2e5},
                        {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
                        {"rope_theta": 4e5},
                    ]
                )
            ),
        },
    }
    if not unified:
        config |= {
            "hidden_size_per_layer_input": draw(st.sampled_from([0, 2])),
            "vocab_size_per_layer_input": draw(st.sampled_from([16, 20])),
            "enable_moe_block": draw(st.booleans()),
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 6,
        }
    can_be_left_out = config.keys() - {
        "model_type",
        "hidden_size",
        "num_experts",
        "top_k_experts",
        "moe_intermediate_size",
    }
    for field in draw(st.sets(st.sampled_from(sorted(can_be_left_out)), max_size=4)):
        del config[field]
    # Each of these depends on others that may have been left out.
    if len(config.get("layer_types", ())) != config.get("num_hidden_layers"):
        config.pop("layer_types", None)
        config["num_kv_shared_layers"] = 0
    if "vocab_size" not in config:
        config.pop("vocab_size_per_layer_input", None)
    return config


def reference(raw: Json) -> Any:
    """The configuration object of transformers."""
    values = json.loads(json.dumps(raw))
    config_class, _ = TEXT_CLASSES[values.pop("model_type")]
    return config_class(**values)


@settings(deadline=None, max_examples=80)
@given(text_configs())
def test_agrees_with_transformers_in_every_form_of_a_configuration(raw: Json) -> None:
    expected = reference(raw)
    multimodal = {"model_type": raw["model_type"].removesuffix("_text"), "text_config": raw}
    saved = json.loads(expected.to_json_string())
    explicit = reference(raw)
    explicit.serialize_explicit_per_layer_config = True
    configs = [
        config_from_hugging_face("config.json", form)
        for form in (raw, multimodal, saved, json.loads(explicit.to_json_string()))
    ]
    assert configs.count(configs[0]) == len(configs)
    config = configs[0]
    assert list(config.layer_types) == expected.layer_types
    for index, kind in enumerate(config.layer_types):
        layer = expected.per_layer_config[index]
        assert (config.head_dim_of(kind), config.kv_heads_of(kind)) == (layer.head_dim, layer.num_key_value_heads)
    for field in ("vocab_size", "hidden_size", "num_attention_heads", "sliding_window", "max_position_embeddings"):
        assert getattr(config, field) == getattr(expected, field)
    assert config.final_logit_softcapping == (expected.final_logit_softcapping or 0.0)
    assert (config.rms_norm_eps, config.query_pre_attn_scalar) == (expected.rms_norm_eps, 1.0)
    assert (config.architecture, config.value_norm, config.layer_scalars) == ("gemma4", True, True)
    for kind, base, factor, share in (
        (SLIDING, config.rope_local_theta, 1.0, 1.0),
        (FULL, config.rope_theta, config.rope_scaling_factor, config.rope_partial_rotary_factor),
    ):
        if kind in config.layer_types:
            np.testing.assert_allclose(
                frequencies(base, factor, share, config.head_dim_of(kind)), reference_frequencies(expected, kind), 1e-6
            )


@settings(deadline=None, max_examples=50)
@given(text_configs())
def test_expects_the_tensors_that_the_model_of_transformers_has(raw: Json) -> None:
    raw = {**raw, "hidden_size": 8, "num_hidden_layers": raw.get("num_hidden_layers", 3)}
    if len(raw.get("layer_types", ())) != raw["num_hidden_layers"]:
        raw.pop("layer_types", None)
    config = config_from_hugging_face("config.json", raw)
    with torch.device("meta"):
        model = TEXT_CLASSES[raw["model_type"]][1](reference(raw))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert config.expected_tensors() == shapes


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 256), st.floats(0.01, 1.0))
def test_the_rotating_pairs_are_counted_as_in_transformers(half: int, share: float) -> None:
    raw = tiny4.text_config() | {"global_head_dim": 2 * half, "attention_k_eq_v": False}
    raw["rope_parameters"][FULL]["partial_rotary_factor"] = share
    config = config_from_hugging_face("config.json", raw)
    rotating = np.count_nonzero(reference_frequencies(reference(raw), FULL))
    assert int(config.rope_partial_rotary_factor * config.global_head_dim / 2) == rotating


def frequencies(base: float, factor: float, share: float, head_dim: int) -> np.ndarray:
    """As the engine computes them."""
    pairs = np.arange(head_dim // 2)
    return np.where(pairs < int(share * head_dim / 2), base ** (-2.0 * pairs / head_dim) / factor, 0.0)


def reference_frequencies(config: Any, layer_type: str) -> np.ndarray:
    kind = config.rope_parameters[layer_type].get("rope_type", "default")
    compute = ROPE_INIT_FUNCTIONS.get(
        kind, transformers.models.gemma4.modeling_gemma4.Gemma4TextRotaryEmbedding.compute_default_rope_parameters
    )
    return compute(config.per_layer_config[layer_type], layer_type=layer_type)[0].numpy()


@pytest.mark.parametrize("assistant_type", ["gemma4_assistant", "gemma4_unified_assistant"])
@pytest.mark.parametrize("centroids", [0, 8])
@pytest.mark.parametrize("k_eq_v", [False, True])
def test_drafters_expect_the_tensors_that_those_of_transformers_have(
    assistant_type: str, centroids: int, k_eq_v: bool
) -> None:
    unified = assistant_type == "gemma4_unified_assistant"
    raw = tiny4.assistant_config() | {"model_type": assistant_type, "use_ordered_embeddings": centroids > 0}
    raw["text_config"] |= {
        "attention_k_eq_v": k_eq_v,
        "model_type": f"gemma4{'_unified' * unified}_text",
        "final_logit_softcapping": 30.0,  # which the model does not look at
    }
    if unified:
        for field in ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block", "num_experts"):
            del raw["text_config"][field]
    config = assistant_config_from_hugging_face("config.json", raw)
    classes = (
        (transformers.Gemma4UnifiedAssistantConfig, transformers.Gemma4UnifiedAssistantForCausalLM)
        if unified
        else (transformers.Gemma4AssistantConfig, transformers.Gemma4AssistantForCausalLM)
    )
    values = json.loads(json.dumps(raw))
    del values["model_type"]
    with torch.device("meta"):
        model = classes[1](classes[0](**values))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    del shapes["model.embed_tokens.weight"]  # lm_head.weight under another name
    if centroids:
        assert shapes.pop("masked_embedding.token_ordering") == (tiny4.VOCAB,)
    assert config.expected_tensors() == shapes
    # With K = V alone the other number of KV heads counts.
    assert config.text.kv_heads_of(FULL) == (tiny4.GLOBAL_KV_HEADS if k_eq_v else tiny4.KV_HEADS)
    assert (config.text.final_logit_softcapping, config.text.attention_k_eq_v) == (0.0, False)


def test_the_last_layer_sees_everything(caplog: pytest.LogCaptureFixture) -> None:
    raw = tiny4.text_config() | {"layer_types": [FULL, SLIDING, FULL, SLIDING]}
    assert config_from_hugging_face("config.json", raw).layer_types == (FULL, SLIDING, FULL, FULL)
    assert "the last layer is taken for a full_attention layer" in caplog.text
    assert reference(raw).layer_types == [FULL, SLIDING, FULL, FULL]


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        (["head_dim"], "head_dim = 256"),
        (["sliding_window", "num_attention_heads"], "num_attention_heads = 8, sliding_window = 512"),
        (["enable_moe_block", "num_kv_shared_layers", "use_double_wide_mlp"], None),  # without them: no such part
    ],
)
def test_says_what_it_takes_for_a_missing_field(
    fields: list[str], values: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tiny4.text_config()
    for field in fields:
        del raw[field]
    config_from_hugging_face("config.json", raw)
    lines = [record.getMessage() for record in caplog.records]
    said = f"config.json: missing fields are taken as transformers takes them: {values}"
    assert lines == ([] if values is None else [said])


@pytest.mark.parametrize("form", ["raw", "saved", "per layer"])
def test_a_complete_configuration_is_taken_without_a_word(form: str, caplog: pytest.LogCaptureFixture) -> None:
    raw = tiny4.text_config()
    if form != "raw":
        config = reference(raw)
        config.serialize_explicit_per_layer_config = form == "per layer"
        raw = json.loads(config.to_json_string())
    config_from_hugging_face("config.json", raw)
    assert not caplog.records


def changed(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config.update(fields)


def without(field: str) -> Callable[[Json], object]:
    return lambda config: config.pop(field)


def rope(layer_type: str, **fields: Any) -> Callable[[Json], object]:
    return lambda config: config["rope_parameters"].__setitem__(layer_type, fields)


def per_layer(value: Any) -> Callable[[Json], object]:
    return changed(per_layer_config=value)


BAD_CONFIGS: dict[str, tuple[Callable[[Json], object], str]] = {
    **{f"no {field}": (without(field), f"field {field} is missing")
       for field in ("hidden_size", "num_experts", "top_k_experts", "moe_intermediate_size")},
    "null size": (changed(hidden_size=None), "field hidden_size is missing"),
    "text": (changed(head_dim="16"), "field head_dim = '16' is not an integer"),
    "flag is a number": (changed(attention_k_eq_v=1), "field attention_k_eq_v = 1 is not true or false"),
    "odd global head": (changed(global_head_dim=31), "global_head_dim = 31 is odd"),
    "global heads": (changed(num_global_key_value_heads=3), "4 attention heads are no multiple of 3 key-value heads"),
    "all layers share": (changed(num_kv_shared_layers=4), "num_kv_shared_layers = 4: at least one of the 4 layers"),
    "more layers share": (changed(num_kv_shared_layers=9), "num_kv_shared_layers = 9: at least one of the 4 layers"),
    "negative sharing": (changed(num_kv_shared_layers=-1), "num_kv_shared_layers = -1 is not an integer from 0"),
    "no owner": (
        changed(layer_types=[SLIDING, SLIDING, SLIDING, FULL]),
        "layer 3 shares the K/V of a full_attention layer, but none of the first 2 layers is one",
    ),
    "PLE vocabulary": (
        changed(vocab_size_per_layer_input=319), "vocab_size_per_layer_input = 319 is less than vocab_size = 320",
    ),
    "too many experts chosen": (changed(top_k_experts=5), "top_k_experts = 5 is more than num_experts = 4"),
    "no expert chosen": (changed(top_k_experts=0), "field top_k_experts = 0 is not an integer from 1"),
    "RoPE list": (changed(rope_parameters=[]), "field rope_parameters is not an object"),
    "flat RoPE": (changed(rope_parameters={"rope_theta": 1e4}), f"field rope_parameters.{FULL} is missing"),
    "one RoPE": (lambda config: config["rope_parameters"].pop(SLIDING), f"field rope_parameters.{SLIDING} is missing"),
    "RoPE number": (lambda config: config["rope_parameters"].update({FULL: 3}), f"rope_parameters.{FULL} is not an ob"),
    "no base": (rope(FULL, rope_type="default"), f"field rope_parameters.{FULL}.rope_theta is missing"),
    "RoPE type": (rope(FULL, rope_type="yarn", rope_theta=1e6), "RoPE type 'yarn' of full_attention layers is not"),
    "RoPE type of sliding layers": (
        rope(SLIDING, rope_type="llama3", rope_theta=1e4), "RoPE type 'llama3' of sliding_attention layers is not",
    ),
    "linear and partial": (
        rope(FULL, rope_type="linear", factor=2.0, rope_theta=1e6, partial_rotary_factor=0.5),
        "RoPE type 'linear' of full_attention layers is not supported",
    ),
    "sliding layers partially": (
        rope(SLIDING, rope_type="proportional", rope_theta=1e4, partial_rotary_factor=0.5), "sliding layers is not su",
    ),
    "no pair": (
        rope(FULL, rope_type="proportional", rope_theta=1e6, partial_rotary_factor=0), "partial_rotary_factor = 0.0",
    ),
    "more than all pairs": (
        rope(FULL, rope_type="proportional", rope_theta=1e6, partial_rotary_factor=1.5), "partial_rotary_factor = 1.5",
    ),
    "bidirectional": (changed(use_bidirectional_attention="all"), "use_bidirectional_attention = 'all' is not"),
    "untied": (changed(tie_word_embeddings=False), "field tie_word_embeddings = False is not supported"),
    "bias": (changed(attention_bias=True), "attention_bias = True is not supported"),
    "activation": (changed(hidden_activation="silu"), "hidden_activation = 'silu' is not supported"),
    "quantised": (changed(quantization_config={"bits": 4}), "quantization_config"),
    "no text_config": (changed(model_type="gemma4"), "field text_config is missing"),
    "layer types": (changed(layer_types=[FULL]), "field layer_types is not a list of 4"),
    "layers differ": (
        per_layer({"1": {"head_dim": 32, "num_key_value_heads": 1}}),
        "full_attention layers differ: layer 1 has head_dim 32, num_key_value_heads 1, layer 3 head_dim 16",
    ),
    "overrides": (per_layer([]), "field per_layer_config is not an object"),
    "override": (per_layer({"1": 32}), "field per_layer_config.1 is not an object"),
    "layer beyond": (per_layer({"4": {"head_dim": 32}}), "field per_layer_config has no layer '4' (0 to 3)"),
    "no layer": (per_layer({"-1": {"head_dim": 32}}), "field per_layer_config has no layer '-1'"),
    "layer twice": (per_layer({"1": {"head_dim": 32}, "01": {"head_dim": 32}}), "per_layer_config has layer 1 twice"),
    "other override": (per_layer({"1": {"sliding_window": 9}}), "per_layer_config.1.sliding_window is not supported"),
    "override of no size": (per_layer({"1": {"head_dim": -2}}), "field head_dim of layer 1 = -2 is not an integer"),
    # Sizes that fit together, and not the tensors.
    "wrong head": (changed(global_head_dim=64), "has shape [128, 32], but the configuration asks for [256, 32]"),
    "single-width MLP": (changed(use_double_wide_mlp=False), "has shape [128, 32], but the configuration asks for [64"),
    "separate values": (changed(attention_k_eq_v=False), "has shape [32, 32], but the configuration asks for [64, 32]"),
    "fewer experts": (changed(num_experts=3), "but the configuration asks for [3, 32]"),
    "no experts": (changed(enable_moe_block=False), "is not part of this model (gemma4, 4 layers)"),
    "no PLE": (changed(hidden_size_per_layer_input=0), "is not part of this model (gemma4, 4 layers)"),
    "fewer shared": (changed(num_kv_shared_layers=1), "k_proj.weight: is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_CONFIGS[case]
    config = tiny4.text_config()
    change(config)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny4.write(tmp_path, config, tiny4.text_tensors()))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.path.startswith(str(tmp_path))


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([SLIDING, FULL]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([SLIDING, FULL, "1", "x"]), inner),
    max_leaves=6,
)
FIELDS = sorted({*tiny4.text_config(), "per_layer_config", "quantization_config"})
DRAFTER_FIELDS = sorted(tiny4.assistant_config())


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=3), st.booleans())
def test_whatever_a_configuration_says_is_accepted_or_one_line(changes: Json, drafter: bool) -> None:
    config = tiny4.assistant_config() if drafter else tiny4.text_config()
    (config["text_config"] if drafter else config).update(changes)
    accepted_or_one_line(config, drafter)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.sampled_from(DRAFTER_FIELDS), ANY_JSON, min_size=1, max_size=2))
def test_whatever_the_configuration_of_a_drafter_says_is_accepted_or_one_line(changes: Json) -> None:
    accepted_or_one_line(tiny4.assistant_config() | changes, True)


def accepted_or_one_line(config: Json, drafter: bool) -> None:
    read = assistant_config_from_hugging_face if drafter else config_from_hugging_face
    try:
        assert all(size > 0 for shape in read("config.json", config).expected_tensors().values() for size in shape)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1


# --- tensors ---------------------------------------------------------------------------------------------------------


def views(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {view.name: (view.dtype, view.shape, view.data.tobytes()) for view in open_checkpoint(path).tensors()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_vectors_are_taken_as_they_are_and_experts_are_flattened(dtype: str, tmp_path: Path) -> None:
    found = views(tiny4.write(tmp_path, tiny4.text_config(), tiny4.text_tensors(dtype)))
    values = tiny4.weights(tiny4.text_shapes())
    assert found.keys() == values.keys()
    for name, (kind, shape, data) in found.items():
        stored = tiny.stored(values[name], dtype)
        if values[name].ndim == 1:
            assert (kind, shape) == ("f32", values[name].shape)
            kept = {"F32": 24, "F16": 11, "BF16": 7}[dtype]
            np.testing.assert_allclose(np.frombuffer(data, np.float32), values[name], rtol=2.0**-kept)
        else:
            assert (kind, data) == (dtype.lower(), stored)
            assert shape == (int(np.prod(values[name].shape[:-1])), values[name].shape[-1])
    assert found["model.layers.2.experts.gate_up_proj"][1] == (4 * 32, 32)


def bent(change: Callable[[tiny4.Tensors], object]) -> tiny4.Tensors:
    tensors = tiny4.text_tensors()
    change(tensors)
    return tensors


def test_a_missing_layer_scalar_is_one(tmp_path: Path) -> None:
    """As in transformers, which fills a buffer that the file does not have as it was made."""
    name = "model.layers.1.layer_scalar"
    assert views(tiny4.write(tmp_path, tiny4.text_config(), bent(lambda t: t.pop(name))))[name] == (
        "f32",
        (1,),
        np.ones(1, np.float32).tobytes(),
    )
    model = tiny_gemma4.dense_k_eq_v()
    saved = tiny_gemma4.save(model, tmp_path / "saved")
    tensors = {k: v for k, v in model.state_dict().items() if k not in ("lm_head.weight", name)}
    from safetensors.torch import save_file

    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    reloaded = transformers.Gemma4ForCausalLM.from_pretrained(saved)
    assert reloaded.get_buffer(name).item() == 1.0
    assert reloaded.get_buffer("model.layers.0.layer_scalar").item() != 1.0
    assert views(saved)[name][2] == np.ones(1, np.float32).tobytes()


def test_keys_and_values_of_layers_that_share_them_are_ignored(tmp_path: Path) -> None:
    plain = views(tiny4.write_target(tmp_path / "plain"))
    unused: tiny4.Tensors = {
        f"model.layers.{index}.self_attn.{part}.weight": ("BF16", (3,), bytes(6))
        for index in (2, 3)
        for part in ("k_proj", "v_proj", "k_norm")
    }
    assert views(tiny4.write(tmp_path / "more", tiny4.text_config(), bent(lambda t: t.update(unused)))) == plain


BAD_TENSORS: dict[str, tuple[Callable[[tiny4.Tensors], object], str]] = {
    "missing": (
        lambda t: t.pop("model.layers.0.router.scale"), "tensor model.layers.0.router.scale: is missing",
    ),
    "no experts": (lambda t: t.pop("model.layers.3.experts.down_proj"), "experts.down_proj: is missing"),
    "no table": (lambda t: t.pop("model.embed_tokens_per_layer.weight"), "embed_tokens_per_layer.weight: is missing"),
    "flat experts": (
        lambda t: t.update({"model.layers.0.experts.down_proj": ("BF16", (128, 16), bytes(4096))}),
        "experts.down_proj: has shape [128, 16], but the configuration asks for [4, 32, 16]",
    ),
    "scalar of no dimension": (
        lambda t: t.update({"model.layers.0.layer_scalar": ("BF16", (), bytes(2))}),
        "layer_scalar: has shape [], but the configuration asks for [1]",
    ),
    "value projection": (
        lambda t: t.update({"model.layers.1.self_attn.v_proj.weight": ("BF16", (32, 32), bytes(2048))}),
        "v_proj.weight: is not part of this model (gemma4, 4 layers)",
    ),
    "infinite scalar": (
        lambda t: t.update({"model.layers.0.layer_scalar": ("F32", (1,), b"\x00\x00\x80\x7f")}), "not finite",
    ),
    "float8 experts": (
        lambda t: t.update({"model.layers.0.experts.down_proj": ("F8_E4M3", (4, 32, 16), bytes(2048))}),
        "type f8_e4m3 is not supported here",
    ),
    "foreign": (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": ("BF16", (64,), bytes(128))}),
                "q_proj.bias: is not part of this model"),
    "twice": (lambda t: t.update({"language_model.model.norm.weight": ("BF16", (32,), bytes(64))}), "same tensor as"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_end_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TENSORS[case]
    with pytest.raises(CheckpointError) as caught:
        list(open_checkpoint(tiny4.write(tmp_path, tiny4.text_config(), bent(change))).tensors())
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- what transformers saves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", ["1GB", "50KB"])
@pytest.mark.parametrize("form", ["text", "multimodal"])
@pytest.mark.parametrize("family", tiny_gemma4.FAMILIES)
def test_reads_what_transformers_saves(
    family: str, form: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_gemma4.FAMILIES[family](seed=2)
    tiny_gemma4.save(model, tmp_path / "text", dtype=torch.bfloat16, max_shard_size=shards)
    if form == "multimodal":
        whole = tiny_gemma4.multimodal(model)
        tiny_gemma4.save(whole, tmp_path / "multimodal", dtype=torch.bfloat16, max_shard_size=shards)
    with caplog.at_level(logging.INFO, logger="draftwerk"):
        checkpoint = open_checkpoint(tmp_path / form)
    assert caplog.text.count("only its text model is loaded") == (form == "multimodal")
    assert views(tmp_path / form) == tiny_gemma4.loaded_form(model)
    assert checkpoint.config == config_from_hugging_face("", json.loads(model.config.to_json_string()))
    assert (checkpoint.bos_token_id, checkpoint.eos_token_ids) == (2, (1,))
    assert list(checkpoint.config.expected_tensors()) == [view.name for view in checkpoint.tensors()]


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_every_place_where_the_text_model_lies(prefix: str, tmp_path: Path) -> None:
    tensors = {prefix + name.removeprefix("model."): value for name, value in tiny4.text_tensors().items()}
    for other in (
        "model.vision_tower.encoder.layers.0.mlp.up_proj.input_max",
        "model.audio_tower.layers.0.self_attn.per_dim_scale",
        "model.embed_vision.embedding_projection.weight",
        "model.embed_audio.embedding_projection.weight",
        "model.vision_embedder.patch_dense.bias",
        f"{prefix}rotary_emb.full_attention_inv_freq",
        f"{prefix}rotary_emb.sliding_attention_original_inv_freq",
    ):
        tensors[other] = ("F32", (), bytes(4))
    config = {"model_type": "gemma4", "text_config": tiny4.text_config(), "vision_config": {}, "eos_token_id": [1, 5]}
    path = tiny4.write(tmp_path / "multimodal", config, tensors)
    assert views(path) == views(tiny4.write_target(tmp_path / "text"))
    assert open_checkpoint(path).eos_token_ids == (1, 5)


def test_files_without_a_part_of_the_text_model_are_not_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny4.write(tmp_path, {"model_type": "gemma4", "text_config": tiny4.text_config()}, tiny4.text_tensors())
    (path / "model.safetensors").rename(path / "text.safetensors")
    weight_map = dict.fromkeys(tiny4.text_tensors(), "text.safetensors")
    weight_map |= {f"model.vision_tower.{index}": "not-there.safetensors" for index in range(7)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with caplog.at_level(logging.INFO, logger="draftwerk"):
        assert views(path).keys() == tiny4.text_shapes().keys()
    assert "7 other tensors are skipped" in caplog.text


def test_the_tokenizer_and_template_of_a_chat_model(tmp_path: Path) -> None:
    path = tiny4.write_target(tmp_path)
    tokenizer = tiny.tokenizer_json()
    markers = ["<|turn>", "<turn|>", "<|tool_call>", "<|channel>"]
    size = tiny4.VOCAB
    for index, marker in enumerate(markers, size - len(markers)):  # ids that a file may choose
        tokenizer["model"]["vocab"] = {k: v for k, v in tokenizer["model"]["vocab"].items() if v != index}
        vocab = tokenizer["model"]["vocab"]
        tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if {*m, "".join(m)} <= vocab.keys()]
        vocab[marker] = index
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": index, "content": marker})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eot_token": "<turn|>"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, size - 3, size - 2]}))
    source = "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>{% endfor %}<|turn>model"
    (path / "chat_template.jinja").write_text(source)
    checkpoint = open_checkpoint(path)
    assert checkpoint.eos_token_ids == (1, size - 3, size - 2, 5)  # the tiny vocabulary has the marker of Gemma 3 too
    assert checkpoint.tokenizer is not None
    assert checkpoint.chat_template is not None
    text = checkpoint.chat_template.render([{"role": "user", "content": "hello"}])
    assert text == "<bos><|turn>user\nhello<turn|><|turn>model"
    ids = checkpoint.tokenizer.encode(text)
    assert [ids.count(size - 4 + index) for index in range(4)] == [2, 1, 0, 0]
    assert checkpoint.tokenizer.decode(ids) == "user\nhellomodel"


def as_dict(config: TextConfig) -> Mapping[str, Any]:
    return {field: getattr(config, field) for field in config.__dataclass_fields__}


def test_gemma_3_has_none_of_it(tmp_path: Path) -> None:
    config = as_dict(open_checkpoint(tiny.write_directory(tmp_path)).config)
    assert (config["global_head_dim"], config["num_global_key_value_heads"]) == (tiny.HEAD_DIM, tiny.KV_HEADS)
    off = ("value_norm", "layer_scalars", "use_double_wide_mlp", "attention_k_eq_v", "num_kv_shared_layers")
    off += ("hidden_size_per_layer_input", "vocab_size_per_layer_input", "num_experts", "top_k_experts")
    assert not any(config[field] for field in off)

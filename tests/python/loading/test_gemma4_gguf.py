"""Gemma 4 in GGUF files: as the gguf package writes them, in both dialects of drafters, and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
import torch

import tiny_gemma4
from draftwerk.loading import CheckpointError, TextConfig, open_assistant, open_checkpoint
from draftwerk.loading.config import FULL, SLIDING
from draftwerk.loading.gguf import GgufFile
from draftwerk.loading.gguf_config import config_from_gguf

GGML = gguf.GGMLQuantizationType


def views(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {view.name: (view.dtype, view.shape, view.data.tobytes()) for view in open_checkpoint(path).tensors()}


def approximately(config: TextConfig) -> dict[str, Any]:
    """Its fields; GGUF has numbers in float32."""
    values = {field: getattr(config, field) for field in config.__dataclass_fields__}
    return {field: pytest.approx(value) if isinstance(value, float) else value for field, value in values.items()}


def test_a_file_says_the_same_as_a_directory(tmp_path: Path) -> None:
    directory = open_checkpoint(tiny4.write_target(tmp_path / "directory"))
    file = open_checkpoint(tiny4.TinyGemma4Gguf().write(tmp_path / "target.gguf"))
    assert approximately(file.config) == approximately(directory.config)
    assert [view.name for view in file.tensors()] == [view.name for view in directory.tensors()]
    assert (file.name, file.bos_token_id, file.eos_token_ids) == ("Tiny", 2, (1,))
    drafter = open_assistant(tiny4.TinyAssistantGguf().write(tmp_path / "assistant.gguf"))
    expected = open_assistant(tiny4.write_assistant(tmp_path / "assistant"))
    assert approximately(drafter.config.text) == approximately(expected.config.text)
    assert drafter.config.num_centroids == expected.config.num_centroids
    assert drafter.config.centroid_intermediate_top_k == expected.config.centroid_intermediate_top_k
    assert drafter.config.backbone_hidden_size == expected.config.backbone_hidden_size
    assert drafter.head_token_ids is not None
    assert (drafter.head_token_ids == tiny4.ordering()).all()
    assert [view.name for view in drafter.tensors()] == [view.name for view in expected.tensors()]
    assert drafter.draft_length is None


# --- as the gguf package writes them ---------------------------------------------------------------------------------


def write_with_package(model: Any, path: Path, matrices: GGML = GGML.BF16) -> Path:
    """A model of tiny_gemma4 by gguf.GGUFWriter, with the keys and the treatment of llama.cpp's converter."""
    config = model.config
    full, sliding = config.per_layer_config[FULL], config.per_layer_config[SLIDING]
    writer = gguf.GGUFWriter(str(path), "gemma4")
    layers = config.num_hidden_layers
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(getattr(config, "hidden_size_per_layer_input", 0))
    writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(sliding.head_dim)
    writer.add_value_length_swa(sliding.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(sliding.head_dim)
    if config.use_double_wide_mlp:
        owning, width = layers - config.num_kv_shared_layers, config.intermediate_size
        writer.add_feed_forward_length([width if index < owning else 2 * width for index in range(layers)])
    else:
        writer.add_feed_forward_length(config.intermediate_size)
    if full.num_key_value_heads == sliding.num_key_value_heads:
        writer.add_head_count_kv(full.num_key_value_heads)
    else:
        writer.add_head_count_kv([config.per_layer_config[i].num_key_value_heads for i in range(layers)])
    if getattr(config, "enable_moe_block", False):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight",))
        if name.endswith("router.scale"):
            stored = f"blk.{name.split('.')[2]}.ffn_gate_inp.scale"
        elif name.endswith("per_expert_scale"):
            stored = f"blk.{name.split('.')[2]}.ffn_down_exps.scale"
        elif not stored.endswith(".weight"):  # layer scalars and experts, which have no suffix of their own
            stored += ".weight"
        values = tensor.numpy()
        if values.ndim == 1 or name.endswith("router.proj.weight"):
            writer.add_tensor(stored, values)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(values, matrices), raw_dtype=matrices)
    share = config.rope_parameters[FULL]["partial_rotary_factor"]
    turning = int(share * full.head_dim / 2)
    still = full.head_dim // 2 - turning
    writer.add_tensor("rope_freqs.weight", np.array([1.0] * turning + [1e30] * still, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", tiny_gemma4.FAMILIES)
def test_reads_what_the_gguf_package_writes(family: str, tmp_path: Path) -> None:
    model = tiny_gemma4.FAMILIES[family](seed=3)
    directory = tiny_gemma4.save(model, tmp_path / "directory", dtype=torch.bfloat16)
    path = write_with_package(model, tmp_path / "model.gguf")
    assert approximately(open_checkpoint(path).config) == approximately(open_checkpoint(directory).config)
    expected = tiny_gemma4.loaded_form(model)
    for index in range(model.config.num_hidden_layers) if family == "moe" else ():  # the router stays float32
        name = f"model.layers.{index}.router.proj.weight"
        expected[name] = ("f32", expected[name][1], model.state_dict()[name].numpy().tobytes())
    assert views(path) == expected


@pytest.mark.parametrize("kind", [GGML.F32, GGML.F16, GGML.Q8_0, GGML.Q4_0, GGML.Q5_0])
def test_quantised_matrices_stay_as_they_are(kind: GGML, tmp_path: Path) -> None:
    model = tiny_gemma4.moe(seed=4)
    path = write_with_package(model, tmp_path / "model.gguf", kind)
    found = views(path)
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and name != "lm_head.weight" and not name.endswith("router.proj.weight"):
            dtype, shape, data = found[name]
            blocks = gguf.quants.quantize(tensor.numpy(), kind)
            assert (dtype, data) == (kind.name.lower(), blocks.tobytes())
            assert shape == (tensor.numel() // tensor.shape[-1], tensor.shape[-1])


def configuration(model: tiny4.TinyGemma4Gguf, path: Path) -> TextConfig:
    """What the metadata says, whatever the tensors are."""
    return config_from_gguf(GgufFile(model.write(path)))


@pytest.mark.parametrize("head", [96, 94, 98])  # of the others some shares are rounded down
def test_any_number_of_turning_pairs(head: int, tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        model.entries[f"gemma4.{key}"] = tiny.key(f"gemma4.{key}", tiny.U32, head)
    for pairs in range(1, head // 2 + 1):
        divisors = np.array([1.0] * pairs + [1e30] * (head // 2 - pairs), dtype="<f4").tobytes()
        model.tensor("rope_freqs.weight")[1:4] = [(head // 2,), tiny.GGML_F32, divisors]
        config = configuration(model, tmp_path / "model.gguf")
        assert int(config.rope_partial_rotary_factor * config.global_head_dim / 2) == pairs
    with pytest.raises(CheckpointError, match="but the configuration asks for"):  # heads of another size
        open_checkpoint(tmp_path / "model.gguf")


def test_layers_that_share_keys_and_values_may_have_a_plain_mlp(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    for width, double in ((tiny4.MLP, False), (2 * tiny4.MLP, True)):
        listing("feed_forward_length", tiny.U32, [tiny4.MLP] * 2 + [width] * 2)(model)
        config = configuration(model, tmp_path / "model.gguf")
        assert (config.intermediate_size, config.use_double_wide_mlp) == (tiny4.MLP, double)


def test_a_model_without_full_layers(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    listing("attention.sliding_window_pattern", tiny.BOOL, [True] * 4)(model)
    listing("attention.head_count_kv", tiny.U32, [tiny4.KV_HEADS] * 4)(model)
    lacking("rope_freqs.weight")(model)
    config = configuration(model, tmp_path / "model.gguf")
    assert (config.attention_k_eq_v, config.rope_partial_rotary_factor) == (False, 1.0)


# --- variants --------------------------------------------------------------------------------------------------------


def separate_experts(model: tiny4.TinyGemma4Gguf) -> None:
    for index in range(len(tiny4.LAYER_TYPES)):
        fused = model.tensor(f"blk.{index}.ffn_gate_up_exps.weight")
        values = np.frombuffer(fused[3], dtype="<f2").reshape(fused[1])
        model.tensors.remove(fused)
        for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
            name = f"blk.{index}.ffn_{part}_exps.weight"
            model.tensors.append([name, half.shape, tiny.GGML_F16, half.tobytes(), None])


def test_gate_and_up_of_the_experts_may_be_two_tensors(tmp_path: Path) -> None:
    expected = views(tiny4.TinyGemma4Gguf().write(tmp_path / "one.gguf"))
    model = tiny4.TinyGemma4Gguf()
    separate_experts(model)
    path = model.write(tmp_path / "two.gguf")
    assert views(path) == expected
    view = next(v for v in open_checkpoint(path).tensors() if v.name == "model.layers.1.experts.gate_up_proj")
    width, whole = view.rows_bytes(), expected[view.name][2]
    for first, last in [(0, 1), (3, 40), (15, 17), (16, 32), (31, 65), (127, 128), (50, 50)]:
        assert view.rows(first, last).tobytes() == whole[first * width : last * width]
        view.release(0, last * width)
    assert view.data.tobytes() == whole
    assert view.nbytes == len(whole)


def test_keys_and_values_of_layers_that_share_them_are_ignored(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    expected = views(model.write(tmp_path / "plain.gguf"))
    for part in ("attn_k", "attn_v", "attn_k_norm"):
        model.tensors.append([f"blk.3.{part}.weight", (32,), tiny.GGML_F32, bytes(128), None])
    path = model.write(tmp_path / "more.gguf")
    assert views(path) == expected
    assert open_checkpoint(path).config.attention_k_eq_v


def test_a_missing_layer_scale_is_one(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    model.tensors.remove(model.tensor("blk.2.layer_output_scale.weight"))
    name = "model.layers.2.layer_scalar"
    assert views(model.write(tmp_path / "x.gguf"))[name] == ("f32", (1,), np.ones(1, np.float32).tobytes())


def test_values_of_their_own_in_full_layers(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    model.tensors.append(["blk.1.attn_v.weight", (32, 32), tiny.GGML_F16, bytes(2048), None])
    checkpoint = open_checkpoint(model.write(tmp_path / "x.gguf"))
    assert not checkpoint.config.attention_k_eq_v
    assert "model.layers.1.self_attn.v_proj.weight" in {view.name for view in checkpoint.tensors()}


def test_the_older_dialect_of_drafters(tmp_path: Path) -> None:
    class Older(tiny4.TinyAssistantGguf):
        architecture = "gemma4_assistant"

        def fields(self) -> dict[str, tuple[int, Any]]:
            fields = super().fields()
            fields["n_embd_backbone"] = fields.pop("embedding_length_out")
            del fields["nextn_predict_layers"]
            return fields

    expected = open_assistant(tiny4.TinyAssistantGguf().write(tmp_path / "newer.gguf"))
    model = Older()
    for new, old in (
        ("nextn.pre_projection.weight", "mtp.pre_projection.weight"),
        ("nextn.post_projection.weight", "mtp.post_projection.weight"),
        ("masked_embd_centroids.weight", "mtp.centroids.weight"),
        ("masked_embd_ordering", "mtp.token_ordering.weight"),
    ):
        model.tensor(new)[0] = old
    drafter = open_assistant(model.write(tmp_path / "older.gguf"))
    assert drafter.config == expected.config
    assert [(view.name, view.data.tobytes()) for view in drafter.tensors()] == [
        (view.name, view.data.tobytes()) for view in expected.tensors()
    ]
    assert (drafter.head_token_ids == expected.head_token_ids).all()


def test_a_drafter_without_centroids(tmp_path: Path) -> None:
    """As llama.cpp's converter writes even those that have them."""
    model = tiny4.TinyAssistantGguf()
    for name in ("masked_embd_centroids.weight", "masked_embd_ordering"):
        model.tensors.remove(model.tensor(name))
    del model.entries["gemma4-assistant.centroid_top_k"]
    drafter = open_assistant(model.write(tmp_path / "x.gguf"))
    assert (drafter.config.num_centroids, drafter.config.centroid_intermediate_top_k) == (0, 0)
    assert drafter.head_token_ids is None
    with_default = tiny4.TinyAssistantGguf()
    del with_default.entries["gemma4-assistant.centroid_top_k"]
    with pytest.raises(CheckpointError, match="centroid_intermediate_top_k = 32 is more than num_centroids = 8"):
        open_assistant(with_default.write(tmp_path / "y.gguf"))


# --- the vocabulary --------------------------------------------------------------------------------------------------


def test_merges_give_the_tokens_of_tokenizer_json(tmp_path: Path) -> None:
    import json

    directory = tiny4.write_target(tmp_path / "directory")
    (directory / "tokenizer.json").write_text(json.dumps(tiny.tokenizer_json()))
    expected = open_checkpoint(directory).tokenizer
    found = open_checkpoint(tiny4.TinyGemma4Gguf().write(tmp_path / "x.gguf")).tokenizer
    assert expected is not None
    assert found is not None
    texts = ["hello the world", "  in\n\n\n\n\nan  éà日本語🙂", "<start_of_turn>user\n▁\x00<table>\t<unk><eos>", ""]
    for text in texts:
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text, add_bos=False), skip_special_tokens=False) == text
    everything = range(tiny4.VOCAB)
    assert [found.token_bytes(i) for i in everything] == [expected.token_bytes(i) for i in everything]
    assert [found.piece_of(i) for i in everything] == [expected.piece_of(i) for i in everything]
    assert found.special_ids == expected.special_ids
    assert found.bos_token_id == 2


def test_a_chat_model_ends_at_each_of_its_markers(tmp_path: Path) -> None:
    pieces = [piece for piece, _, _ in tiny.vocabulary()]
    pieces[4:6] = ["<turn|>", "<|tool_response>"]
    model = tiny4.TinyGemma4Gguf()
    model.entries["tokens"] = tiny.array("tokenizer.ggml.tokens", tiny.STRING, pieces)
    model.entries["template"] = tiny.key("tokenizer.chat_template", tiny.STRING, "{{ bos_token }}")
    assert open_checkpoint(model.write(tmp_path / "x.gguf")).eos_token_ids == (1, 4, 5)


def test_an_end_token_beyond_32_bits(tmp_path: Path) -> None:
    model = tiny4.TinyGemma4Gguf()
    model.entries["tokenizer.ggml.eos_token_id"] = tiny.key("tokenizer.ggml.eos_token_id", tiny.U64, 1 << 32)
    with pytest.raises(CheckpointError, match=f"token id {1 << 32} is outside the vocabulary"):
        open_checkpoint(model.write(tmp_path / "x.gguf"))


# --- damaged ---------------------------------------------------------------------------------------------------------

Change = Callable[[Any], object]


def having(key: str, kind: int, value: object) -> Change:
    return lambda model: model.entries.__setitem__(model.key(key), tiny.key(model.key(key), kind, value))


def listing(key: str, kind: int, values: list[Any]) -> Change:
    return lambda model: model.entries.__setitem__(model.key(key), tiny.array(model.key(key), kind, values))


def without(key: str) -> Change:
    return lambda model: model.entries.pop(model.key(key))


def tensor(name: str, position: int, value: object) -> Change:
    return lambda model: model.tensor(name).__setitem__(position, value)


def lacking(name: str) -> Change:
    return lambda model: model.tensors.remove(model.tensor(name))


def frequencies(*values: float) -> Change:
    return tensor("rope_freqs.weight", 3, np.array(values, dtype="<f4").tobytes())


def sharing(layers: int) -> Change:
    """That many layers share K/V, and all MLPs have one width."""
    return lambda model: [
        having("attention.shared_kv_layers", tiny.U32, layers)(model),
        having("feed_forward_length", tiny.U32, tiny4.MLP)(model),
    ]


def merging(*merges: str | bytes) -> Change:
    return lambda model: model.entries.update(merges=tiny.array("tokenizer.ggml.merges", tiny.STRING, merges))


def integers_for_queries(model: tiny4.TinyGemma4Gguf) -> None:
    model.tensor("blk.0.attn_q.weight")[2:4] = [tiny4.GGML_I32, bytes(8192)]


def cut_in_half(model: tiny4.TinyGemma4Gguf, name: str) -> None:
    """Gives an MLP of double width the single one."""
    entry = model.tensor(name)
    entry[1] = tuple(tiny4.MLP if size == 2 * tiny4.MLP else size for size in entry[1])
    entry[3] = entry[3][: len(entry[3]) // 2]


def one_expert_matrix(model: tiny4.TinyGemma4Gguf) -> None:
    separate_experts(model)
    lacking("blk.2.ffn_up_exps.weight")(model)


def unequal_experts(model: tiny4.TinyGemma4Gguf) -> None:
    separate_experts(model)
    model.tensor("blk.2.ffn_up_exps.weight")[1:4] = [(4, 16, 32), tiny.GGML_F32, bytes(8192)]


def both_forms_of_experts(model: tiny4.TinyGemma4Gguf) -> None:
    fused = list(model.tensor("blk.0.ffn_gate_up_exps.weight"))
    separate_experts(model)
    model.tensors.append(fused)


MODEL, DRAFTER = tiny4.TinyGemma4Gguf, tiny4.TinyAssistantGguf
BAD_FILES: dict[str, tuple[type[tiny4.TinyGemma4Gguf], Change, str]] = {
    **{f"no {key}": (MODEL, without(key), f"metadata gemma4.{key} is missing")
       for key in ("embedding_length", "block_count", "context_length", "feed_forward_length", "attention.head_count",
                   "attention.head_count_kv", "attention.key_length", "attention.key_length_swa", "expert_used_count",
                   "attention.sliding_window", "attention.layer_norm_rms_epsilon", "expert_feed_forward_length")},
    "no pattern": (MODEL, without("attention.sliding_window_pattern"), "does not have one entry per layer (4)"),
    "pattern of a period": (
        MODEL, having("attention.sliding_window_pattern", tiny.U32, 2), "does not have one entry per layer (4)",
    ),
    "short pattern": (
        MODEL, listing("attention.sliding_window_pattern", tiny.BOOL, [1, 0]), "does not have one entry per layer (4)",
    ),
    "too few heads": (
        MODEL, listing("attention.head_count_kv", tiny.U32, [1]), "head_count_kv does not have one integer per layer",
    ),
    "fractional heads": (
        MODEL, listing("attention.head_count_kv", tiny.F32, [1.0] * 4), "does not have one integer per layer (4)",
    ),
    "no KV heads": (
        MODEL, listing("attention.head_count_kv", tiny.U32, [2, 0, 2, 0]), "head_count_kv = 0 is not an integer from 1",
    ),
    "KV heads differ": (
        MODEL, listing("attention.head_count_kv", tiny.U32, [2, 1, 4, 1]),
        "head_count_kv differs between sliding_attention layers: not supported",
    ),
    "heads differ": (
        MODEL, listing("attention.head_count", tiny.U32, [4, 8, 4, 8]), "head_count differs between the layers",
    ),
    "MLP widths": (
        MODEL, listing("feed_forward_length", tiny.U32, [64, 96, 128, 128]),
        "feed_forward_length is neither the same in all layers nor doubled in those that share K/V",
    ),
    "MLP three times as wide": (
        MODEL, listing("feed_forward_length", tiny.U32, [64, 64, 192, 192]), "feed_forward_length is neither the same",
    ),
    "all layers share": (MODEL, sharing(4), "num_kv_shared_layers = 4: at least one of the 4 layers needs K/V of its"),
    "no owner": (MODEL, sharing(3), "layer 1 shares the K/V of a full_attention layer, but none of the first 1 layers"),
    "value heads": (MODEL, having("attention.value_length", tiny.U32, 16), "value_length = 16 differs from the head"),
    "sliding value heads": (
        MODEL, having("attention.value_length_swa", tiny.U32, 32), "value_length_swa = 32 differs from the head size",
    ),
    "partial rotation": (
        MODEL, having("rope.dimension_count_swa", tiny.U32, 8), "dimension_count_swa = 8 differs from the head size",
    ),
    "RoPE scaling": (MODEL, having("rope.scaling.type", tiny.STRING, "yarn"), "RoPE scaling 'yarn' is not supported"),
    "too many experts chosen": (MODEL, having("expert_used_count", tiny.U32, 5), "top_k_experts = 5 is more than"),
    "no frequencies": (MODEL, lacking("rope_freqs.weight"), "tensor rope_freqs.weight: is missing"),
    "few frequencies": (MODEL, tensor("rope_freqs.weight", 1, (4,)), "is [4] of f32, not [16] of f32"),
    "no pair turns": (MODEL, frequencies(*[1e30] * 16), "holds other values than some 1 and then 1e30"),
    "frequencies in turn": (MODEL, frequencies(*[1.0, 1e30] * 8), "holds other values than some 1 and then 1e30"),
    "other frequencies": (MODEL, frequencies(*[1.0] * 4, *[8.0] * 12), "holds other values than some 1 and then 1e30"),
    "frequencies of no number": (MODEL, frequencies(*[1.0] * 4, *[float("nan")] * 12), "holds other values than so"),
    "no table": (MODEL, lacking("per_layer_token_embd.weight"), "tensor per_layer_token_embd.weight: is missing"),
    "small table": (MODEL, tensor("per_layer_token_embd.weight", 1, (160, 64)), "vocab_size_per_layer_input = 160 is"),
    "flat table": (MODEL, tensor("per_layer_token_embd.weight", 1, (320 * 32,)), "not two dimensions"),
    "no router": (MODEL, lacking("blk.1.ffn_gate_inp.weight"), "tensor blk.1.ffn_gate_inp.weight: is missing"),
    "no router scale": (MODEL, lacking("blk.1.ffn_gate_inp.scale"), "tensor blk.1.ffn_gate_inp.scale: is missing"),
    "no expert scale": (MODEL, lacking("blk.1.ffn_down_exps.scale"), "tensor blk.1.ffn_down_exps.scale: is missing"),
    "no experts": (MODEL, lacking("blk.1.ffn_gate_up_exps.weight"), "blk.1.ffn_gate_up_exps.weight: is missing"),
    "one expert matrix": (MODEL, one_expert_matrix, "tensor blk.2.ffn_up_exps.weight: is missing"),
    "unequal experts": (
        MODEL, unequal_experts,
        "is [4, 16, 32] of f32, but blk.2.ffn_gate_exps.weight is [4, 16, 32] of f16",
    ),
    "experts of another width": (
        MODEL, lambda model: (separate_experts(model), having("expert_feed_forward_length", tiny.U32, 8)(model)),
        "blk.0.ffn_gate_exps.weight: has 16 rows for each expert, but the configuration asks for 8",
    ),
    "both forms of experts": (MODEL, both_forms_of_experts, "the same tensor as blk.0.ffn_gate_up_exps.weight"),
    "some value projections": (
        MODEL,
        lambda model: (
            sharing(0)(model),
            model.tensors.append(["blk.1.attn_v.weight", (32, 32), tiny.GGML_F16, bytes(2048), None]),
            model.tensors.append(["blk.2.attn_k.weight", (32, 32), tiny.GGML_F16, bytes(2048), None]),
            model.tensors.append(["blk.2.attn_v.weight", (32, 32), tiny.GGML_F16, bytes(2048), None]),
            model.tensors.append(["blk.2.attn_k_norm.weight", (16,), tiny.GGML_F32, bytes(64), None]),
            model.tensors.append(["blk.3.attn_k.weight", (32, 32), tiny.GGML_F16, bytes(2048), None]),
            [cut_in_half(model, f"blk.{i}.ffn_{part}.weight") for i in (2, 3) for part in ("gate", "up", "down")],
        ),
        "tensor blk.3.attn_v.weight: is missing",
    ),
    "foreign tensor": (MODEL, tensor("blk.0.post_norm.weight", 0, "blk.0.ssm_a.weight"), "not part of a Gemma 4 model"),
    "own head": (
        MODEL, lambda model: model.tensors.append(["output.weight", (32, 32), 1, bytes(2048), None]),
        "output.weight: is not part of a Gemma 4 model",
    ),
    "integers for a matrix": (
        MODEL, integers_for_queries,
        "blk.0.attn_q.weight: type i32 is not supported here",
    ),
    "infinite scale": (
        MODEL, tensor("blk.0.layer_output_scale.weight", 3, b"\x00\x00\x80\x7f"), "holds a value that is not finite",
    ),
    "no merges": (MODEL, lambda model: model.entries.pop("merges"), "metadata tokenizer.ggml.merges is missing"),
    "merge of unknown tokens": (
        MODEL, merging("zz yy"), "is refused by the tokenizers library",
    ),
    "merges not UTF-8": (
        MODEL, merging(b"\xff \xfe"), "unusable vocabulary",
    ),
    "token type": (
        MODEL,
        lambda model: model.entries.update(types=tiny.array("tokenizer.ggml.token_type", tiny.I32, [9] * tiny4.VOCAB)),
        "unknown type 9",
    ),
    "no backbone": (DRAFTER, without("embedding_length_out"), "gemma4-assistant.embedding_length_out is missing"),
    "some layers share": (
        DRAFTER, having("attention.shared_kv_layers", tiny.U32, 1), "all 2 layers of an assistant have to share K/V",
    ),
    "drafter with experts": (DRAFTER, having("expert_count", tiny.U32, 4), "an assistant has no experts or per-layer"),
    "no projection": (DRAFTER, lacking("nextn.pre_projection.weight"), "nextn.pre_projection.weight: is missing"),
    "no ordering": (DRAFTER, lacking("masked_embd_ordering"), "tensor masked_embd_ordering: is missing"),
    "ordering alone": (DRAFTER, lacking("masked_embd_centroids.weight"), "is there, but no centroids are"),
    "ordering of floats": (DRAFTER, tensor("masked_embd_ordering", 2, tiny.GGML_F32), "is [320] of f32, not [320] of"),
    "short ordering": (DRAFTER, tensor("masked_embd_ordering", 1, (319,)), "is [319] of i32, not [320] of i32 or i64"),
    "no permutation": (DRAFTER, tensor("masked_embd_ordering", 3, bytes(4 * 320)), "is no permutation of the tokens"),
    "centroids that do not divide": (
        DRAFTER, tensor("masked_embd_centroids.weight", 1, (7, 16)), "num_centroids = 7 does not divide vocab_size",
    ),
    "too many centroids chosen": (DRAFTER, having("centroid_top_k", tiny.U32, 9), "centroid_intermediate_top_k = 9 is"),
    "target's tensor": (
        DRAFTER, tensor("nextn.pre_projection.weight", 0, "per_layer_model_proj.weight"),
        "per_layer_model_proj.weight: is not part of a Gemma 4 assistant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    kind, change, reason = BAD_FILES[case]
    model = kind()
    change(model)
    path = model.write(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError) as caught:
        list((open_assistant if kind is DRAFTER else open_checkpoint)(path).tensors())
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.path == str(path)

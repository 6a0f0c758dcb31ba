"""FP8 checkpoints in the form of compressed-tensors: matrices with the scales of their rows, and what is refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
from tiny_fp8_files import QUANTISATION, Tensors, e4m3, quantised, write

from draftwerk.loading import CheckpointError, TensorView, open_assistant, open_checkpoint

Json = dict[str, Any]

NAME = "model.layers.0.mlp.up_proj.weight"
SCALES = f"{NAME}_scale"


def plain() -> Tensors:
    return {name: ("BF16", value.shape, tiny.stored(value, "BF16")) for name, value in tiny.weights().items()}


def floats(tensor: tuple[str, Any, bytes]) -> np.ndarray:
    kind, _, data = tensor
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).astype(np.float32)


def expect_rows(view: TensorView, scales: np.ndarray, values: bytes) -> None:
    """A view of e4m3: each row its scale and its values, by whatever way it is read."""
    rows, columns = view.shape
    want = np.empty((rows, 4 + columns), np.uint8)
    want[:, :4] = np.broadcast_to(scales, rows).astype(np.float32).view(np.uint8).reshape(rows, 4)
    want[:, 4:] = np.frombuffer(values, np.uint8).reshape(rows, columns)
    assert view.dtype == "f8_e4m3"
    assert (view.rows_bytes(), view.nbytes) == (4 + columns, want.size)
    assert view.data.tobytes() == want.tobytes()
    assert view.rows(1, rows - 1).tobytes() == want[1:-1].tobytes()
    view.release(0, view.nbytes)
    if not view._run:
        order = np.random.default_rng(0).permutation(rows)
        assert view.rows_at(order).tobytes() == want[order].tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("one_scale", [False, True], ids=["channel", "tensor"])
def test_matrices_come_with_the_scales_of_their_rows(one_scale: bool, dtype: str, tmp_path: Path) -> None:
    tensors = quantised(plain(), one_scale=one_scale, dtype=dtype)
    quantisation = copy.deepcopy(QUANTISATION)
    quantisation["config_groups"]["group_0"]["weights"]["strategy"] = "tensor" if one_scale else "channel"
    checkpoint = open_checkpoint(write(tmp_path, tensors, quantisation))
    views = {view.name: view for view in checkpoint.tensors()}
    assert views.keys() == tiny.weights().keys()
    seen = 0
    for name, view in views.items():
        if f"{name}_scale" in tensors:
            seen += 1
            expect_rows(view, floats(tensors[f"{name}_scale"]), tensors[name][2])
    assert checkpoint.weight_types["f8_e4m3"] == seen == 14
    assert views["model.embed_tokens.weight"].dtype == "bf16"


def test_those_of_a_multimodal_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The configuration of its quantisation lies outside; the vision tower is left out with its scales."""
    text = quantised(plain())
    tensors = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in text.items()}
    tensors["lm_head.weight"] = ("F8_E4M3", (tiny.VOCAB, tiny.HIDDEN), bytes(tiny.VOCAB * tiny.HIDDEN))
    tensors["lm_head.weight_scale"] = ("F32", (1,), bytes(4))
    tensors["model.vision_tower.x.weight"] = ("F8_E4M3", (2, 2), bytes(4))
    tensors["model.vision_tower.x.weight_scale"] = ("F32", (2, 1), bytes(8))
    config = {"model_type": "gemma3", "text_config": tiny.hugging_face_config(), "eos_token_id": 1}
    with caplog.at_level(logging.INFO, logger="draftwerk"):
        checkpoint = open_checkpoint(write(tmp_path, tensors, config=config))
    assert sum("asks for quantised activations: they are not quantised" in line for line in caplog.messages) == 1
    (view,) = [view for view in checkpoint.tensors() if view.name == NAME]
    expect_rows(view, floats(text[SCALES]), text[NAME][2])


def test_scales_of_activations_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = quantised(plain())
    tensors["model.layers.0.mlp.up_proj.input_scale"] = ("BF16", (1,), bytes(2))
    quantisation = copy.deepcopy(QUANTISATION)
    quantisation["config_groups"]["group_0"] |= {"input_activations": None, "format": None}
    quantisation["sparsity_config"] = {"format": "dense", "targets": []}
    with caplog.at_level(logging.INFO, logger="draftwerk"):
        views = list(open_checkpoint(write(tmp_path, tensors, quantisation)).tensors())
    assert {view.name for view in views} == tiny.weights().keys()
    assert "activations" not in caplog.text


@pytest.mark.parametrize("fp8", [True, False])
def test_experts_that_lie_apart_become_one_tensor(fp8: bool, tmp_path: Path) -> None:
    joined = tiny4.text_tensors()
    apart: Tensors = {}
    for name, (kind, shape, data) in joined.items():
        if ".experts." not in name:
            apart[name] = (kind, shape, data)
            continue
        prefix = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        rows = shape[1] // len(parts)
        pieces = np.frombuffer(data, np.uint8).reshape(tiny4.EXPERTS, len(parts), -1)
        for e in range(tiny4.EXPERTS):
            for index, part in enumerate(parts):
                apart[f"{prefix}{e}.{part}.weight"] = (kind, (rows, shape[2]), pieces[e, index].tobytes())
    config = tiny4.text_config()
    if not fp8:
        checkpoint = open_checkpoint(tiny4.write(tmp_path, config, apart))
        whole = open_checkpoint(tiny4.write(tmp_path / "whole", config, joined))
        assert {view.name: (view.shape, view.data.tobytes()) for view in checkpoint.tensors()} == {
            view.name: (view.shape, view.data.tobytes()) for view in whole.tensors()
        }
        return
    tensors = quantised(apart)
    checkpoint = open_checkpoint(write(tmp_path, tensors, config=config))
    view = next(view for view in checkpoint.tensors() if view.name == "model.layers.1.experts.gate_up_proj")
    names = [f"model.layers.1.experts.{e}.{part}.weight" for e in range(4) for part in ("gate_proj", "up_proj")]
    scales = np.concatenate([floats(tensors[f"{name}_scale"]) for name in names])
    expect_rows(view, scales, b"".join(tensors[name][2] for name in names))

    missing = {name: tensor for name, tensor in tensors.items() if not name.startswith(names[5])}
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight: is missing"):
        open_checkpoint(write(tmp_path, missing, config=config))
    mixed = tensors | {names[3]: apart[names[3]]}
    del mixed[f"{names[3]}_scale"]
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight: is \[16, 32\] of bf16, but experts must"):
        open_checkpoint(write(tmp_path, mixed, config=config))


def test_drafters_may_be_quantised_too(tmp_path: Path) -> None:
    tensors = quantised(tiny4.assistant_tensors())
    head = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = ("F8_E4M3", head[1], e4m3(head[1], 1))
    tensors["lm_head.weight_scale"] = ("F32", (head[1][0], 1), np.ones(head[1][0], "<f4").tobytes())
    del tensors["model.embed_tokens.weight"]
    assistant = open_assistant(write(tmp_path, tensors, config=tiny4.assistant_config()))
    views = {view.name: view for view in assistant.tensors()}
    expect_rows(views["lm_head.weight"], np.ones(1, np.float32), tensors["lm_head.weight"][2])
    name = "pre_projection.weight"
    expect_rows(views[name], floats(tensors[f"{name}_scale"]), tensors[name][2])


def weights(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(fields)


def outside(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config.update(fields)


GROUP = "quantization_config.config_groups.group_0"
BAD_CONFIGS: dict[str, tuple[Callable[[Json], object], str]] = {
    "method": (
        outside(quant_method="fp8"),
        "quantization_config.quant_method = 'fp8' is not supported (supported: comp",
    ),
    "no method": (lambda config: config.pop("quant_method"), "quant_method = None is not supported"),
    "format": (outside(format="pack-quantized"), "quantization_config.format = 'pack-quantized' is not supported"),
    "format of a group": (
        lambda config: config["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"),
        f"{GROUP}.format = 'nvfp4-pack-quantized' is not supported (supported: float-quantized)",
    ),
    "blocks": (
        weights(strategy="block", block_structure=[128, 128]),
        f"{GROUP}.weights.strategy = 'block' is not supp",
    ),
    "groups": (
        weights(strategy="group", group_size=128),
        "strategy = 'group' is not supported (supported: channel, te",
    ),
    "no strategy": (weights(strategy=None), "strategy = None is not supported"),
    "strategy of lists": (weights(strategy=["channel"]), "strategy = ['channel'] is not supported"),
    "bits": (weights(num_bits=4), f"{GROUP}.weights.num_bits = 4 is not supported (supported: 8)"),
    "integers": (weights(type="int"), f"{GROUP}.weights.type = 'int' is not supported (supported: float)"),
    "asymmetric": (weights(symmetric=False), f"{GROUP}.weights.symmetric = False is not supported"),
    "dynamic": (weights(dynamic=True), f"{GROUP}.weights.dynamic = True is not supported"),
    "no weights": (lambda config: config["config_groups"]["group_0"].pop("weights"), f"{GROUP}.weights is missing"),
    "weights of numbers": (
        lambda config: config["config_groups"]["group_0"].update(weights=8),
        f"{GROUP}.weights is not an object",
    ),
    "two groups": (
        lambda config: config["config_groups"].update(group_1={"weights": {"num_bits": 4}}),
        "group_1.weights.num_bits = 4 is not supported",
    ),
    "no groups": (outside(config_groups={}), "config_groups is empty"),
    "groups missing": (lambda config: config.pop("config_groups"), "config_groups is missing"),
    "list of groups": (outside(config_groups=[1]), "config_groups is not an object"),
    "odd group": (outside(config_groups={"a\nb": 1}), r"config_groups.a\nb is not an object"),
    "keys and values": (
        outside(kv_cache_scheme={"num_bits": 8}),
        "quantization_config.kv_cache_scheme is not supported",
    ),
    "rotations": (outside(transform_config={"config_groups": {"u": {}}}), "transform_config is not supported"),
    "sparse": (outside(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_other_quantisations_are_refused(case: str, tmp_path: Path) -> None:
    change, reason = BAD_CONFIGS[case]
    quantisation = copy.deepcopy(QUANTISATION)
    change(quantisation)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(write(tmp_path, quantised(plain()), quantisation))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("quantisation", [[], "fp8", 8, True])
def test_a_quantisation_that_is_no_object(quantisation: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="field quantization_config is not an object"):
        open_checkpoint(write(tmp_path, plain(), quantisation))


def test_a_quantisation_of_the_text_part_is_looked_at(tmp_path: Path) -> None:
    text = tiny.hugging_face_config() | {"quantization_config": {"quant_method": "gptq"}}
    config = {"model_type": "gemma3", "text_config": text}
    tensors = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in plain().items()}
    with pytest.raises(
        CheckpointError, match=r"text_config\.quantization_config\.quant_method = 'gptq' is not supported"
    ):
        open_checkpoint(write(tmp_path, tensors, None, config))


def bent(**tensors: Any) -> Callable[[Tensors], object]:
    """Changes of the matrix (``values``) and of its scales."""

    def change(all_tensors: Tensors) -> None:
        for what, tensor in tensors.items():
            name = {"values": NAME, "scales": SCALES, "zero_points": f"{NAME}_zero_point"}[what]
            if tensor is None:
                del all_tensors[name]
            else:
                all_tensors[name] = tensor

    return change


def scales_with(value: float) -> Any:
    scales = np.ones(tiny.MLP, np.float32)
    scales[-1] = value
    return ("F32", (tiny.MLP, 1), scales.tobytes())


def values_with(byte: int, place: int) -> Any:
    values = bytearray(tiny.MLP * tiny.HIDDEN)
    values[place] = byte
    return ("F8_E4M3", (tiny.MLP, tiny.HIDDEN), bytes(values))


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scales": (bent(scales=None), f"tensor {NAME}: is f8_e4m3, but {SCALES} is missing"),
    "too few scales": (
        bent(scales=("F32", (tiny.MLP - 1, 1), bytes(4 * (tiny.MLP - 1)))),
        f"tensor {SCALES}: has shape [63, 1], neither [64, 1] nor [1]",
    ),
    "flat scales": (bent(scales=("F32", (tiny.MLP,), bytes(4 * tiny.MLP))), "has shape [64], neither [64, 1] nor [1]"),
    "scales of blocks": (bent(scales=("F32", (tiny.MLP, 2), bytes(8 * tiny.MLP))), "has shape [64, 2], neither"),
    "scales of columns": (bent(scales=("F32", (1, tiny.HIDDEN), bytes(4 * tiny.HIDDEN))), "has shape [1, 32], neither"),
    "no numbers as scales": (bent(scales=("F32", (0,), b"")), "has shape [0], neither [64, 1] nor [1]"),
    "integers as scales": (bent(scales=("I32", (1,), bytes(4))), "type i32 is not supported for scales"),
    "e4m3 as scales": (bent(scales=("F8_E4M3", (1,), bytes(1))), "type f8_e4m3 is not supported for scales"),
    "scale NaN": (bent(scales=scales_with(float("nan"))), f"tensor {NAME}: has a scale that is negative or not finite"),
    "scale infinity": (bent(scales=scales_with(float("inf"))), "has a scale that is negative or not finite"),
    "negative scale": (bent(scales=scales_with(-1.0)), "has a scale that is negative or not finite"),
    "NaN": (bent(values=values_with(0x7F, 5)), f"tensor {NAME}: holds a value that is not a number"),
    "-NaN": (bent(values=values_with(0xFF, tiny.MLP * tiny.HIDDEN - 1)), "holds a value that is not a number"),
    "zero points": (
        bent(zero_points=("F8_E4M3", (tiny.MLP, 1), bytes(tiny.MLP))),
        f"tensor {NAME}_zero_point: is f8_e4m3, but",
    ),
    "other zero points": (bent(zero_points=("I8", (tiny.MLP, 1), bytes(tiny.MLP))), "is not part of this model"),
    "scales of floats": (
        bent(values=("BF16", (tiny.MLP, tiny.HIDDEN), bytes(2 * tiny.MLP * tiny.HIDDEN))),
        "is not pa",
    ),
    "e5m2": (
        bent(values=("F8_E5M2", (tiny.MLP, tiny.HIDDEN), bytes(tiny.MLP * tiny.HIDDEN)), scales=None),
        "type f8_e5m2 is not supported here",
    ),
    "a vector": (
        lambda tensors: tensors.update({"model.norm.weight": ("F8_E4M3", (tiny.HIDDEN,), bytes(tiny.HIDDEN))}),
        "tensor model.norm.weight: f8_e4m3 of shape [32] is not supported: only matrices are",
    ),
    "experts in one": (
        lambda tensors: tensors.update({"model.layers.0.experts.down_proj": ("F8_E4M3", (2, 2, 2), bytes(8))}),
        "f8_e4m3 of shape [2, 2, 2] is not supported: only matrices are",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_damaged_tensors_end_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TENSORS[case]
    tensors = quantised(plain())
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        for view in open_checkpoint(write(tmp_path, tensors)).tensors():
            assert view.data.size
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_without_its_configuration_e4m3_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not part of this model|type f8_e4m3 is not supported"):
        open_checkpoint(write(tmp_path, quantised(plain()), None))

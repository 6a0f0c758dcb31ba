"""MTP drafters: what transformers saves, which one belongs to a model, and which one does not fit it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4
import torch

import tiny_gemma4
from draftwerk.loading import (
    AssistantCheckpoint,
    CheckpointError,
    TextConfig,
    check_fits,
    find_assistant,
    is_assistant,
    open_assistant,
    open_checkpoint,
)
from draftwerk.loading.config import FULL, SLIDING

Json = dict[str, Any]


@pytest.mark.parametrize("shards", ["1GB", "30KB"])
@pytest.mark.parametrize("centroids", [0, 32])
@pytest.mark.parametrize("family", tiny_gemma4.FAMILIES)
def test_reads_what_transformers_saves(family: str, centroids: int, shards: str, tmp_path: Path) -> None:
    model = tiny_gemma4.FAMILIES[family]()
    drafter = tiny_gemma4.assistant_for(model, centroids=centroids, seed=5)
    tiny_gemma4.save(model, tmp_path / "model")
    saved = tiny_gemma4.save(drafter, tmp_path / "model-assistant", dtype=torch.bfloat16, max_shard_size=shards)
    opened = open_assistant(saved)
    expected = tiny_gemma4.loaded_form(drafter)
    expected["lm_head.weight"] = expected.pop("model.embed_tokens.weight")
    order = expected.pop("masked_embedding.token_ordering", None)
    found = {view.name: (view.dtype, view.shape, view.data.tobytes()) for view in opened.tensors()}
    assert found == expected
    assert (opened.config.num_centroids, opened.config.centroid_intermediate_top_k) == (
        (centroids, 4) if centroids else (0, 0)
    )
    assert opened.config.backbone_hidden_size == model.config.hidden_size
    if order is None:
        assert opened.head_token_ids is None
    else:
        assert opened.head_token_ids is not None
        assert opened.head_token_ids.dtype == np.int32
        assert opened.head_token_ids.astype(np.int64).tobytes() == order[2]
    check_fits(opened, open_checkpoint(tmp_path / "model"))
    assert find_assistant(tmp_path / "model") == saved


def test_the_head_may_have_either_name(tmp_path: Path) -> None:
    def head(tensors: tiny4.Tensors) -> bytes:
        path = tiny4.write(tmp_path, tiny4.assistant_config(), tensors)
        (view,) = (view for view in open_assistant(path).tensors() if view.name == "lm_head.weight")
        return view.data.tobytes()

    tensors = tiny4.assistant_tensors()
    expected = tensors["model.embed_tokens.weight"]
    assert head(tensors) == expected[2]
    assert head(tensors | {"lm_head.weight": expected}) == expected[2]
    del tensors["model.embed_tokens.weight"]
    assert head(tensors | {"lm_head.weight": expected}) == expected[2]


def test_the_draft_length_is_in_the_generation_config(tmp_path: Path) -> None:
    path = tiny4.write_assistant(tmp_path)
    assert open_assistant(path).draft_length is None
    for given, expected in ((6, 6), (None, None)):
        (path / "generation_config.json").write_text(json.dumps({"num_assistant_tokens": given}))
        assert open_assistant(path).draft_length == expected
    for bad in (0, -1, "4", 4.0, True, 10**6):
        (path / "generation_config.json").write_text(json.dumps({"num_assistant_tokens": bad}))
        with pytest.raises(CheckpointError, match=r"num_assistant_tokens = .* is not an integer from 1 to 1024"):
            open_assistant(path)


@pytest.mark.parametrize(("given", "read"), [("a model", "a model"), (["one", "two"], None), (None, None)])
def test_the_model_that_it_is_for_is_a_remark(tmp_path: Path, given: object, read: str | None) -> None:
    path = tiny4.write(tmp_path, tiny4.assistant_config() | {"base_model": given}, tiny4.assistant_tensors())
    assert open_assistant(path).base_model == read


# --- refused ---------------------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config.update(fields)


def text(**fields: Any) -> Callable[[Json], object]:
    return lambda config: config["text_config"].update(fields)


BAD_CONFIGS: dict[str, tuple[Callable[[Json], object], str]] = {
    "no text_config": (lambda config: config.pop("text_config"), "field text_config is missing"),
    "text type": (text(model_type="gemma3_text"), "text_config: model_type 'gemma3_text' is not supported"),
    "other model": (changed(model_type="llama"), "model_type 'llama' is not supported as a drafter"),
    "centroids": (changed(num_centroids=7), "num_centroids = 7 does not divide vocab_size = 320"),
    "too many chosen": (changed(centroid_intermediate_top_k=9), "centroid_intermediate_top_k = 9 is more than"),
    "none chosen": (changed(centroid_intermediate_top_k=0), "field centroid_intermediate_top_k = 0 is not an integer"),
    "no number of centroids": (changed(num_centroids=None), "field num_centroids is missing"),
    "flag": (changed(use_ordered_embeddings="yes"), "field use_ordered_embeddings = 'yes' is not true or false"),
    "backbone": (changed(backbone_hidden_size=33), "has shape [16, 64], but the configuration asks for [16, 66]"),
    "absurd backbone": (changed(backbone_hidden_size=1 << 40), "field backbone_hidden_size = 1099511627776 is not"),
    "not all share": (text(num_kv_shared_layers=1), "all 2 layers of an assistant have to share K/V"),
    "per-layer embeddings": (text(hidden_size_per_layer_input=8), "hidden_size_per_layer_input = 8, num_experts = 0"),
    "default per-layer embeddings": (
        lambda config: config["text_config"].pop("hidden_size_per_layer_input"), "hidden_size_per_layer_input = 256",
    ),
    "experts": (text(enable_moe_block=True), "an assistant has no per-layer embeddings, experts or double-wide MLP"),
    "double-wide": (text(use_double_wide_mlp=True), "use_double_wide_mlp = True"),
    "ordering unused": (
        changed(use_ordered_embeddings=False),
        "token_ordering: is there, but no centroids are",
    ),
    "untied": (changed(tie_word_embeddings=False) , "tie_word_embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_CONFIGS[case]
    config = tiny4.assistant_config()
    del config["text_config"]["tie_word_embeddings"]
    change(config)
    with pytest.raises(CheckpointError) as caught:
        open_assistant(tiny4.write(tmp_path, config, tiny4.assistant_tensors()))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


ORDERING = "masked_embedding.token_ordering"
BAD_TENSORS: dict[str, tuple[Callable[[tiny4.Tensors], object], str]] = {
    "no ordering": (lambda t: t.pop(ORDERING), f"tensor {ORDERING}: is missing"),
    "no centroids": (lambda t: t.pop("masked_embedding.centroids.weight"), "centroids.weight: is missing"),
    "no head": (lambda t: t.pop("model.embed_tokens.weight"), "lm_head.weight: is missing"),
    "no projection": (lambda t: t.pop("post_projection.weight"), "post_projection.weight: is missing"),
    "ordering of floats": (
        lambda t: t.update({ORDERING: ("F64", (320,), bytes(2560))}), "is [320] of f64, not [320] of i32 or i64",
    ),
    "short ordering": (lambda t: t.update({ORDERING: ("I64", (319,), bytes(2552))}), "is [319] of i64"),
    "a token twice": (
        lambda t: t.update({ORDERING: ("I64", (320,), np.minimum(np.arange(320), 318).astype("<i8").tobytes())}),
        "is no permutation of the tokens: 319 is not in it",
    ),
    "a token beyond": (
        lambda t: t.update({ORDERING: ("I64", (320,), np.arange(1, 321).astype("<i8").tobytes())}),
        "is no permutation of the tokens: 0 is not in it",
    ),
    "a negative token": (
        lambda t: t.update({ORDERING: ("I64", (320,), np.arange(-1, 319).astype("<i8").tobytes())}),
        "is no permutation of the tokens: 319 is not in it",
    ),
    "keys": (
        lambda t: t.update({"model.layers.0.self_attn.v_norm.weight": ("BF16", (16,), bytes(32))}),
        "v_norm.weight: is not part of this model (an assistant of 2 layers)",
    ),
    "head's shape": (
        lambda t: t.update({"model.embed_tokens.weight": ("BF16", (320, 8), bytes(5120))}),
        "model.embed_tokens.weight: has shape [320, 8], but the configuration asks for [320, 16]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_end_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TENSORS[case]
    tensors = tiny4.assistant_tensors()
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        open_assistant(tiny4.write(tmp_path, tiny4.assistant_config(), tensors))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_each_is_refused_in_the_place_of_the_other(tmp_path: Path) -> None:
    models = [tiny4.write_target(tmp_path / "a"), tiny4.TinyGemma4Gguf().write(tmp_path / "a.gguf")]
    models += [tiny.write_directory(tmp_path / "b"), tiny.TinyGguf().write(tmp_path / "b.gguf")]
    drafters = [tiny4.write_assistant(tmp_path / "c"), tiny4.TinyAssistantGguf().write(tmp_path / "c.gguf")]
    for path in drafters:
        assert is_assistant(path)
        with pytest.raises(
            CheckpointError, match=r"is an MTP drafter \(.*\): |give it to --drafter, and its target to"
        ):
            open_checkpoint(path)
    for path in models:
        assert not is_assistant(path)
        with pytest.raises(CheckpointError, match=r"is a whole model \(.*\), not a drafter: that is a"):
            open_assistant(path)
    for path in (tmp_path / "nowhere", tmp_path, tmp_path / "c" / "config.json", "gemma-3-270m", ""):
        assert not is_assistant(path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_assistant(tmp_path / "nowhere")


# --- belonging together ----------------------------------------------------------------------------------------------


def opened(tmp_path: Path) -> tuple[AssistantCheckpoint, Any]:
    return open_assistant(tiny4.write_assistant(tmp_path / "d")), open_checkpoint(tiny4.write_target(tmp_path / "my-t"))


def of_target(**changes: Any) -> Callable[[TextConfig], TextConfig]:
    return lambda config: dataclasses.replace(config, **changes)


MISFITS: dict[str, tuple[Callable[[TextConfig], TextConfig], str]] = {
    "hidden size": (of_target(hidden_size=48), "it is for hidden size 32, and the model has 48"),
    "vocabulary": (of_target(vocab_size=400), "it is for a vocabulary of 320, and the model has 400"),
    "head size": (of_target(head_dim=64), "it is for sliding layers with head size 16, and the model has 64"),
    "global head size": (of_target(global_head_dim=64), "is for full layers with head size 32, and the model has 64"),
    "KV heads": (of_target(num_key_value_heads=4), "it is for sliding layers with KV heads 2, and the model has 4"),
    "global KV heads": (
        of_target(num_global_key_value_heads=2), "it is for full layers with KV heads 1, and the model has 2",
    ),
    "window": (of_target(sliding_window=16), "it is for sliding layers with a window of 8, and the model has 16"),
    "no sliding layers": (of_target(layer_types=(FULL,) * 4), "it reads the K/V of sliding layers, and the model has"),
    "no full layers of its own": (
        of_target(layer_types=(SLIDING, SLIDING, SLIDING, FULL)), "it reads the K/V of full layers, and the model has",
    ),
    "base": (of_target(rope_theta=5e5), "full layers with RoPE base 1000000.0, and the model has 500000.0"),
    "sliding base": (of_target(rope_local_theta=5e4), "sliding layers with RoPE base 10000.0, and the model has 5000"),
    "factor": (of_target(rope_scaling_factor=8.0), "full layers with RoPE factor 1.0, and the model has 8.0"),
    "share": (of_target(rope_partial_rotary_factor=0.5), "with a rotating share of 0.25, and the model has 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_a_drafter_of_another_model_is_refused_with_both_values(case: str, tmp_path: Path) -> None:
    change, reason = MISFITS[case]
    assistant, target = opened(tmp_path)
    check_fits(assistant, target)
    with pytest.raises(CheckpointError) as caught:
        check_fits(assistant, dataclasses.replace(target, config=change(target.config)))
    assert reason in str(caught.value)
    assert "does not fit my-t" in str(caught.value)
    assert caught.value.path == assistant.path


def test_a_model_of_either_architecture_may_have_a_drafter(tmp_path: Path) -> None:
    assistant, target = opened(tmp_path)
    check_fits(assistant, dataclasses.replace(target, config=dataclasses.replace(target.config, architecture="gemma3")))


def test_only_the_layer_types_of_the_drafter_count(tmp_path: Path) -> None:
    assistant, target = opened(tmp_path)
    full = dataclasses.replace(assistant.config.text, layer_types=(FULL, FULL))
    assistant = dataclasses.replace(assistant, config=dataclasses.replace(assistant.config, text=full))
    other = dataclasses.replace(target.config, sliding_window=99, head_dim=64, num_key_value_heads=4)
    check_fits(assistant, dataclasses.replace(target, config=other))


def test_the_drafter_lies_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny4.write_target(tmp_path / "model")
    file = tiny4.TinyGemma4Gguf().write(tmp_path / "model.Q8_0.gguf")
    assert find_assistant(model) is None
    assert find_assistant(file) is None
    (tmp_path / "model-assistant").mkdir()
    assert find_assistant(model) is None  # an empty directory is none
    drafter = tiny4.write_assistant(tmp_path / "model-assistant")
    drafter_file = tiny4.TinyAssistantGguf().write(tmp_path / "model.Q8_0-assistant.gguf")
    assert find_assistant(model) == drafter
    assert find_assistant(f"{model}/") == drafter
    assert find_assistant(file) == drafter_file
    monkeypatch.chdir(model)
    assert find_assistant(".") == drafter
    assert find_assistant("../model") == drafter
    (tmp_path / "link").symlink_to(model)
    assert find_assistant(tmp_path / "link") is None
    (tmp_path / "link-assistant").symlink_to(drafter)
    assert find_assistant(tmp_path / "link") == tmp_path / "link-assistant"
    assert find_assistant(tmp_path / "nowhere") is None
    assert find_assistant("/") is None

"""Drafters that score some rows of their target's head: read from both forms of files, and refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_files as tiny
import tiny_gemma4_files as tiny4

from draftwerk.loading import CheckpointError, check_fits, is_assistant, open_assistant, open_checkpoint

Json = dict[str, Any]
TOKENS = "draft_token_ids"
ORDERING = "masked_embedding.token_ordering"
CENTROIDS = "masked_embedding.centroids.weight"


@pytest.mark.parametrize("centroids", [True, False])
@pytest.mark.parametrize("form", ["directory", "gguf"])
def test_a_reduced_head_is_read(form: str, centroids: bool, tmp_path: Path) -> None:
    if form == "directory":
        tensors = tiny4.reduced_tensors()
        if not centroids:
            del tensors[CENTROIDS]
        config = tiny4.reduced_config() | {"use_ordered_embeddings": centroids}
        path = tiny4.write(tmp_path / "drafter", config, tensors)
    else:
        file = tiny4.TinyReducedGguf()
        if not centroids:
            file.tensors.remove(file.tensor("masked_embd_centroids.weight"))
        path = file.write(tmp_path / "drafter.gguf")
    assert is_assistant(path)
    drafter = open_assistant(path)
    config = drafter.config
    assert (config.draft_vocab_size, config.text.vocab_size) == (tiny4.DRAFT_VOCAB, tiny4.VOCAB)
    assert (config.num_centroids, config.centroid_intermediate_top_k) == ((tiny4.CENTROIDS, 3) if centroids else (0, 0))
    assert drafter.head_token_ids is not None
    assert drafter.head_token_ids.dtype == np.int32
    assert np.array_equal(drafter.head_token_ids, tiny4.draft_token_ids())
    expected = tiny4.reduced_shapes()
    if not centroids:
        del expected[CENTROIDS]
    assert {view.name: view.shape for view in drafter.tensors()} == expected
    check_fits(drafter, open_checkpoint(tiny4.write_target(tmp_path / "target")))


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_the_tokens_may_be_of_either_integer_type(dtype: str, tmp_path: Path) -> None:
    data = tiny4.draft_token_ids().astype({"I32": "<i4", "I64": "<i8"}[dtype]).tobytes()
    tensors = tiny4.reduced_tensors() | {TOKENS: (dtype, (tiny4.DRAFT_VOCAB,), data)}
    drafter = open_assistant(tiny4.write(tmp_path, tiny4.reduced_config(), tensors))
    assert np.array_equal(drafter.head_token_ids, tiny4.draft_token_ids())


def test_no_draft_vocab_size_is_a_head_of_its_own(tmp_path: Path) -> None:
    for value in ({}, {"draft_vocab_size": None}):
        drafter = open_assistant(tiny4.write(tmp_path, tiny4.assistant_config() | value, tiny4.assistant_tensors()))
        assert drafter.config.draft_vocab_size == 0
        assert "lm_head.weight" in drafter.config.expected_tensors()


def test_the_rope_of_a_gemma_3_is_read(tmp_path: Path) -> None:
    def rope(full: Json) -> tuple[float, float, float, float]:
        config = tiny4.reduced_config()
        config["text_config"]["rope_parameters"] = {
            tiny4.SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            tiny4.FULL: full,
        }
        text = open_assistant(tiny4.write(tmp_path, config, tiny4.reduced_tensors())).config.text
        return text.rope_local_theta, text.rope_theta, text.rope_scaling_factor, text.rope_partial_rotary_factor

    assert rope({"rope_type": "default", "rope_theta": 1e6}) == (1e4, 1e6, 1.0, 1.0)
    assert rope({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}) == (1e4, 1e6, 8.0, 1.0)

    file = tiny4.TinyReducedGguf(rope__scaling__type=(tiny.STRING, "linear"), rope__scaling__factor=(tiny.F32, 8.0))
    file.tensor("rope_freqs.weight")[3] = tiny4.rope_freqs(turning=tiny4.GLOBAL_HEAD_DIM // 2)
    text = open_assistant(file.write(tmp_path / "x.gguf")).config.text
    assert (text.rope_theta, text.rope_scaling_factor, text.rope_partial_rotary_factor) == (1e6, 8.0, 1.0)


# --- refused ---------------------------------------------------------------------------------------------------------


def tokens(values: np.ndarray) -> Callable[[tiny4.Tensors], object]:
    data = values.astype("<i4").tobytes()
    return lambda tensors: tensors.update({TOKENS: ("I32", values.shape, data)})


def with_token(index: int, token: int) -> np.ndarray:
    values = tiny4.draft_token_ids()
    values[index] = token
    return values


FIRST = int(tiny4.draft_token_ids()[0])
BAD_TENSORS: dict[str, tuple[Callable[[tiny4.Tensors], object], str]] = {
    "no tokens": (lambda t: t.pop(TOKENS), f"tensor {TOKENS}: is missing"),
    "too few": (tokens(tiny4.draft_token_ids()[:-1]), f"tensor {TOKENS}: is [47] of i32, not [48] of i32 or i64"),
    "a matrix": (tokens(tiny4.draft_token_ids().reshape(2, 24)), "is [2, 24] of i32, not [48] of i32 or i64"),
    "floats": (lambda t: t.update({TOKENS: ("F32", (48,), bytes(192))}), "is [48] of f32, not [48] of i32 or i64"),
    "beyond": (tokens(with_token(5, 320)), f"tensor {TOKENS}: holds 320, which is outside the vocabulary of 320"),
    "negative": (tokens(with_token(5, -1)), f"tensor {TOKENS}: holds -1, which is outside the vocabulary of 320"),
    "twice": (tokens(with_token(5, FIRST)), f"tensor {TOKENS}: holds {FIRST} twice"),
    "a head": (
        lambda t: t.update({"lm_head.weight": ("BF16", (320, 16), bytes(10240))}),
        "tensor lm_head.weight: is there beside draft_vocab_size = 48, which stands for rows of the target's head",
    ),
    "an embedding": (
        lambda t: t.update({"model.embed_tokens.weight": ("BF16", (320, 16), bytes(10240))}),
        "tensor model.embed_tokens.weight: is there beside draft_vocab_size = 48",
    ),
    "an ordering": (
        lambda t: t.update({ORDERING: ("I64", (320,), tiny4.ordering().astype("<i8").tobytes())}),
        f"tensor {ORDERING}: is there beside draft_vocab_size = 48: {TOKENS} has the order",
    ),
    "no centroids": (lambda t: t.pop(CENTROIDS), f"tensor {CENTROIDS}: is missing"),
    "narrow centroids": (
        lambda t: t.update({CENTROIDS: ("BF16", (8, 16), bytes(256))}),
        f"tensor {CENTROIDS}: has shape [8, 16], but the configuration asks for [8, 32]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_end_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TENSORS[case]
    tensors = tiny4.reduced_tensors()
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        open_assistant(tiny4.write(tmp_path, tiny4.reduced_config(), tensors))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


BAD_CONFIGS: dict[str, tuple[Json, str]] = {
    "more than there are": ({"draft_vocab_size": 328}, "draft_vocab_size = 328 is more than vocab_size = 320"),
    "none": ({"draft_vocab_size": 0}, "field draft_vocab_size = 0 is not an integer from 1 to 16777216"),
    "a flag": ({"draft_vocab_size": True}, "field draft_vocab_size = True is not an integer"),
    "text": ({"draft_vocab_size": "48"}, "field draft_vocab_size = '48' is not an integer"),
    "centroids": ({"num_centroids": 7}, "num_centroids = 7 does not divide draft_vocab_size = 48"),
    "forgotten": ({"draft_vocab_size": None}, f"{TOKENS}: is there, but the configuration has no draft_vocab_size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_configuration_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    changes, reason = BAD_CONFIGS[case]
    with pytest.raises(CheckpointError) as caught:
        open_assistant(tiny4.write_reduced(tmp_path, **changes))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def bent(change: Callable[[tiny4.TinyReducedGguf], object]) -> tiny4.TinyReducedGguf:
    file = tiny4.TinyReducedGguf()
    change(file)
    return file


def without(*names: str) -> Callable[[tiny4.TinyReducedGguf], object]:
    return lambda file: [file.tensors.remove(file.tensor(name)) for name in names]


def embedding(file: tiny4.TinyReducedGguf) -> None:
    file.tensors.append(["token_embd.weight", (320, 16), tiny.GGML_F16, bytes(10240), None])


BAD_FILES: dict[str, tuple[Callable[[tiny4.TinyReducedGguf], object], str]] = {
    "no tokens": (without(TOKENS), f"tensor {TOKENS}: is missing"),
    "no vocabulary": (
        lambda file: file.entries.pop("gemma4-assistant.vocab_size"), "metadata gemma4-assistant.vocab_size is missing",
    ),
    "an embedding": (embedding, "tensor token_embd.weight: is there beside draft_vocab_size = 48"),
    "forgotten": (
        lambda file: (file.entries.pop("gemma4-assistant.draft_vocab_size"), embedding(file)),
        f"tensor {TOKENS}: is there, but the configuration has no draft_vocab_size",
    ),
    "repeated": (
        lambda file: file.tensor(TOKENS).__setitem__(3, bytes(4 * tiny4.DRAFT_VOCAB)),
        f"tensor {TOKENS}: holds 0 twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_ends_in_one_clear_line(case: str, tmp_path: Path) -> None:
    change, reason = BAD_FILES[case]
    with pytest.raises(CheckpointError) as caught:
        open_assistant(bent(change).write(tmp_path / "x.gguf"))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_target_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    drafter = tiny4.write_reduced(tmp_path / "drafter")
    config = json.loads((drafter / "config.json").read_text())
    config["text_config"]["vocab_size"] = 400
    (drafter / "config.json").write_text(json.dumps(config))
    target = open_checkpoint(tiny4.write_target(tmp_path / "target"))
    with pytest.raises(CheckpointError, match="is for a vocabulary of 400, and the model has 320"):
        check_fits(open_assistant(drafter), target)

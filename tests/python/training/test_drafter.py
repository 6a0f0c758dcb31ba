"""The drafter module against transformers' assistant, given the same keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
import transformers
from tiny_training import MODELS, VOCABULARY, WINDOW, random_ids

import tiny_gemma4
from draftwerk.loading import open_assistant, open_checkpoint
from draftwerk.training.drafter import DrafterModule
from draftwerk.training.export import configuration, read_drafter, write_drafter
from draftwerk.training.initial import fit_pre_projection, start_centroids
from draftwerk.training.rows import Rows
from draftwerk.training.target import Features, FrozenTarget
from draftwerk.weights import load_assistant, load_model

TOLERANCE = 1e-4  # of the largest value, in float32
STEPS = 3
CLUSTERS = {"num_centroids": 20, "centroid_intermediate_top_k": 7}
STARTS = (1, 2, 17, WINDOW, WINDOW + 1, WINDOW + 2, WINDOW + 3, 40, 299, 305)


def reference_chain(
    assistant: Any, target: FrozenTarget, features: Features, ids: torch.Tensor, start: int
) -> list[tuple[Any, Any]]:
    """Normed state (as the head sees it: its logits) and projection of each step of a chain from a position.

    Args:
        ids: [T] of one sequence, and ``features`` of it alone.
    """
    shared = {kind: (features.keys[kind][:, :, :start], features.values[kind][:, :, :start]) for kind in features.keys}
    previous, steps = features.states[:, start - 1 : start], []
    for step in range(STEPS):
        embedded = target.embed(ids[None, start + step : start + step + 1])
        with torch.inference_mode():
            output = assistant(
                inputs_embeds=torch.cat([embedded, previous], dim=-1),
                position_ids=torch.tensor([[start]]),
                shared_kv_states=shared,
            )
        previous = output.last_hidden_state
        steps.append((output.logits[0, 0], previous[0, 0]))
    return steps


def assert_same_chains(drafter: DrafterModule, assistant: Any, target: FrozenTarget) -> None:
    """For several starts in two sequences at once."""
    ids = torch.from_numpy(random_ids(2, 310))
    rows = Rows(torch.tensor([0] * len(STARTS) + [1] * len(STARTS)), torch.tensor(STARTS * 2))
    features = target.features(ids)
    previous = features.states[rows.sequence, rows.position - 1]
    alone = [target.features(ids[sequence : sequence + 1]) for sequence in (0, 1)]
    expected = [
        reference_chain(assistant, target, alone[sequence], ids[sequence], start)
        for sequence in (0, 1)
        for start in STARTS
    ]
    head = assistant.lm_head.weight.detach()
    for step in range(STEPS):
        embedded = target.embed(ids[rows.sequence, rows.position + step])
        with torch.no_grad():
            states, previous = drafter(embedded, previous, rows, features.keys, features.values)
        logits, projected = (torch.stack(parts) for parts in zip(*(chain[step] for chain in expected), strict=True))
        for got, wanted in ((states @ head.T, logits), (previous, projected)):
            assert float((got - wanted).abs().max()) < TOLERANCE * float(wanted.abs().max()), f"step {step}"


@pytest.mark.parametrize("family", tiny_gemma4.FAMILIES)
def test_gemma4_assistants(tmp_path: Path, family: str) -> None:
    model = MODELS[family](seed=1)
    target = tiny_training.frozen(model, tmp_path / "target")
    assistant = tiny_gemma4.assistant_for(model, seed=2)
    saved = tiny_gemma4.save(assistant, tmp_path / "drafter")
    drafter = read_drafter(open_assistant(saved), open_checkpoint(tmp_path / "target"))
    assert_same_chains(drafter, assistant, target)


def test_a_row_does_not_depend_on_the_others(tmp_path: Path) -> None:
    """All starts of sequences, so many that not all of them attend together, and a few of them."""
    target = tiny_training.frozen(MODELS["gemma3"](seed=2), tmp_path)
    drafter = tiny_training.tiny_drafter(target)
    ids = torch.from_numpy(random_ids(3, 600))
    features = target.features(ids)
    every = Rows.from_starts(torch.ones(3, dtype=torch.int64), torch.tensor([600, 40, 300]))
    assert len(every) == 599 + 39 + 299
    assert [(span.sequence, span.last - span.first) for span in every.spans] == [
        (0, 256), (0, 256), (0, 87), (1, 39), (2, 256), (2, 43),
    ]  # fmt: skip
    some = torch.tensor([0, 254, 255, 256, 257, 400, 598, 599, 637, 638, 936])
    outputs = []
    for rows in (every, every.those(some)):
        embedded = target.embed(ids[rows.sequence, rows.position])
        previous = features.states[rows.sequence, rows.position - 1]
        with torch.no_grad():
            outputs.append(drafter(embedded, previous, rows, features.keys, features.values)[1])
    torch.testing.assert_close(outputs[0][some], outputs[1], rtol=TOLERANCE, atol=TOLERANCE)


ROPE_OF_LARGE_MODELS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"query_pre_attn_scalar": 100}, {"rope_parameters": ROPE_OF_LARGE_MODELS}, {"num_key_value_heads": 1}],
    ids=["plain", "another attention scale", "linear RoPE", "one KV head"],
)
def test_gemma3_is_absorbed_in_the_format(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The drafter that starts from a Gemma 3 target, as transformers reads its configuration and weights."""
    target = tiny_training.frozen(MODELS["gemma3"](seed=3, **changes), tmp_path)
    drafter = tiny_training.tiny_drafter(target)
    torch.nn.init.normal_(drafter.pre_projection.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    config = configuration(drafter.shape)
    assistant = transformers.Gemma4AssistantForCausalLM(transformers.Gemma4AssistantConfig(**config)).eval()
    missing, unexpected = assistant.load_state_dict(drafter.state_dict(), strict=False)
    assert set(missing) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not unexpected
    torch.nn.init.normal_(assistant.lm_head.weight, generator=torch.Generator().manual_seed(1))
    assert_same_chains(drafter, assistant, target)


@pytest.mark.parametrize("sizes", [{}, CLUSTERS], ids=["all tokens", "clusters"])
@pytest.mark.parametrize("family", MODELS)
def test_the_engine_drafts_what_the_module_drafts(tmp_path: Path, family: str, sizes: dict[str, int]) -> None:
    """A drafter that was written, with rows of the target's embedding as its head."""
    target = tiny_training.frozen(MODELS[family](seed=4), tmp_path / "target")
    written = tiny_training.tiny_drafter(target, **sizes)
    torch.nn.init.normal_(written.pre_projection.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    write_drafter(written, dict(written.named_parameters()), tmp_path / "drafter", target_name="tiny")
    checkpoint, assistant = open_checkpoint(tmp_path / "target"), open_assistant(tmp_path / "drafter")
    native = load_assistant(assistant, checkpoint, load_model(checkpoint, threads=1))
    drafter = read_drafter(assistant, checkpoint)  # as it was written, in bfloat16
    head = target.embedding[drafter.draft_token_ids]
    drafted = set()
    for start in STARTS[:-2]:
        ids = torch.from_numpy(random_ids(1, start + 1, seed=start))
        drafts, logits = native.draft(ids[0].tolist(), STEPS)
        drafted.update(drafts)
        features = target.features(ids)
        rows, previous = Rows(torch.tensor([0]), torch.tensor([start])), features.states[:, start - 1]
        for step, token in enumerate([int(ids[0, start]), *drafts[:-1]]):
            embedded = target.embed(torch.tensor([token]))
            with torch.no_grad():
                _, previous = drafter(embedded, previous, rows, features.keys, features.values)
            scored = target.logits(previous, head)[0]
            if sizes:
                scores = drafter.masked_embedding.centroids(previous)[0].detach()
                chosen = scores.topk(sizes["centroid_intermediate_top_k"]).indices
                left_out = torch.ones(scores.shape[0], dtype=torch.bool).index_fill(0, chosen, False)
                scored.view(scores.shape[0], -1)[left_out] = -torch.inf
            expected = torch.full((VOCABULARY,), -torch.inf)
            expected[drafter.draft_token_ids] = scored
            torch.testing.assert_close(torch.from_numpy(logits[step]), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(drafted) > 5


def test_it_starts_from_the_targets_last_layers(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=5, query_pre_attn_scalar=100), tmp_path)
    drafter = tiny_training.tiny_drafter(target)
    assert drafter.shape.text.layer_types == ("sliding_attention", "full_attention")
    for here, there in ((0, 2), (1, 3)):
        for part in ("mlp.gate_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight"):
            assert torch.equal(
                drafter.get_parameter(f"model.layers.{here}.{part}"), target.parameter(f"model.layers.{there}.{part}")
            )
        norm = target.parameter(f"model.layers.{there}.self_attn.q_norm.weight")
        assert norm is not None
        torch.testing.assert_close(drafter.get_parameter(f"model.layers.{here}.self_attn.q_norm.weight"), norm / 10)
    assert torch.equal(drafter.get_parameter("model.norm.weight"), target.parameter("model.norm.weight"))
    assert torch.equal(drafter.get_parameter("post_projection.weight"), torch.eye(64))


def test_centroids_start_as_weighted_means_of_their_tokens(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=5), tmp_path)
    drafter = tiny_training.tiny_drafter(target, **CLUSTERS)
    counts = torch.ones(100, dtype=torch.long)
    counts[15:20] = torch.tensor([4, 0, 9, 16, 25])
    start_centroids(drafter, target, counts)
    centroids = drafter.get_parameter("masked_embedding.centroids.weight")
    rows = target.embedding[drafter.draft_token_ids].view(20, 5, 64)
    torch.testing.assert_close(centroids[2], rows[2].mean(0))
    torch.testing.assert_close(centroids[3], torch.tensor([2.0, 1.0, 3.0, 4.0, 5.0]) @ rows[3] / 15.0)


def test_the_first_projection_is_the_one_that_fits_best(tmp_path: Path) -> None:
    target = tiny_training.frozen(MODELS["gemma3"](seed=5), tmp_path)
    drafter = tiny_training.tiny_drafter(target)
    ids = torch.from_numpy(random_ids(40, 40))
    explained = fit_pre_projection(drafter, target, ids)
    wanted = target.inputs_of_layer(2, ids)[:, 1:]
    given = torch.cat([target.embed(ids)[:, 1:], target.features(ids).states[:, :-1]], dim=-1)

    def left(weight: torch.Tensor) -> float:
        return float((wanted - given @ weight.T).square().sum())

    fitted = left(drafter.pre_projection.weight.detach())
    best = torch.linalg.lstsq(given.flatten(0, 1).double(), wanted.flatten(0, 1).double()).solution
    assert fitted < 1.001 * left(best.float().T)
    assert explained == pytest.approx(1 - fitted / float((wanted - wanted.mean((0, 1))).square().sum()), rel=1e-3)

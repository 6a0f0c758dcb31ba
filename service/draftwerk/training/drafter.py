"""The drafter as a torch module: one draft step for many rows of many sequences at once.

The same arithmetic as cpp/model/mtp.h and transformers' ``gemma4_assistant``, whose parameter names it has. Rows
differ in what they may attend to, so a row attends to a slice of the target's K/V, under a mask: full layers see the
positions before the row's own, sliding layers the last ``window + 1`` of those. Rows and keys are multiplied in whole
blocks (:mod:`.whole_blocks`); what fills the last one up is dropped, or hidden by the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftwerk.loading.config import FULL, SLIDING, TextConfig
from draftwerk.training.rows import Rows
from draftwerk.training.shape import DrafterShape
from draftwerk.training.whole_blocks import fill_block, whole_blocks

CENTROIDS = "masked_embedding.centroids.weight"

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [R, 1, head size / 2] of the rows' positions."""


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension in float32; the factor is the weight itself."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._epsilon = epsilon

    def forward(self, values: Tensor) -> Tensor:
        return functional.rms_norm(values.float(), self.weight.shape, self.weight, self._epsilon)


class QueryOnlyAttention(nn.Module):
    """Attention over keys and values that are given; scores are not scaled, the norm of the queries does that."""

    def __init__(self, config: TextConfig, layer_type: str) -> None:
        super().__init__()
        self._head_dim = config.head_dim_of(layer_type)
        self._reach = config.sliding_window + 1 if layer_type == SLIDING else None
        width = config.num_attention_heads * self._head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.q_norm = RmsNorm(self._head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rows: Rows, rotation: Rotation, keys: Tensor, values: Tensor) -> Tensor:
        queries = self.q_norm(self.q_proj(hidden)[: len(rows)].view(len(rows), -1, self._head_dim))
        attended = _attend(_rotated(queries, rotation), rows, keys, values, self._reach)
        output: Tensor = self.o_proj(fill_block(attended.flatten(1)))
        return output


class Mlp(nn.Module):
    """``down(gelu_tanh(gate(x)) * up(x))``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        gate = functional.gelu(self.gate_proj(hidden), approximate="tanh")
        output: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return output


class DecoderLayer(nn.Module):
    """A layer of Gemma 4 that reads the target's K/V."""

    layer_scalar: Tensor

    def __init__(self, config: TextConfig, layer_type: str) -> None:
        super().__init__()

        def norm() -> RmsNorm:
            return RmsNorm(config.hidden_size, config.rms_norm_eps)

        self.self_attn = QueryOnlyAttention(config, layer_type)
        self.mlp = Mlp(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, hidden: Tensor, rows: Rows, rotation: Rotation, keys: Tensor, values: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), rows, rotation, keys, values)
        hidden = hidden + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        output: Tensor = hidden * self.layer_scalar
        return output


class Stack(nn.Module):
    """The layers and the norm behind them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, kind) for kind in config.layer_types)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)


class MaskedEmbedding(nn.Module):
    """Centroids of the clusters of a reduced head: they score [R, clusters] of what the tokens are scored by."""

    def __init__(self, width: int, clusters: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(width, clusters, bias=False)


class DrafterModule(nn.Module):
    """A drafter of a shape. Its head stays as it is: the target's embedding, or what it came with.

    The centroids of a reduced head are parameters: they are all of it that is the drafter's own.

    Attributes:
        shape: its sizes.
        draft_token_ids: int64, the tokens that it can draft, those of a cluster together; all of the vocabulary where
            it has a head of its own.
        head: a head of its own (``lm_head.weight`` [vocabulary, hidden]), its centroids and what belongs to them, by
            canonical name; empty where it is some rows of the target's embedding.

    Args:
        shape: its sizes.
        draft_token_ids: [draft vocabulary], distinct.
        head: see above.
    """

    draft_token_ids: Tensor

    def __init__(self, shape: DrafterShape, draft_token_ids: Tensor, head: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.head = dict(head or {})
        self.register_buffer("draft_token_ids", draft_token_ids.long(), persistent=False)
        config, backbone = shape.text, shape.backbone_hidden_size
        self.pre_projection = nn.Linear(2 * backbone, config.hidden_size, bias=False)
        self.model = Stack(config)
        self.post_projection = nn.Linear(config.hidden_size, backbone, bias=False)
        if shape.draft_vocab_size and shape.num_centroids:
            self.masked_embedding = MaskedEmbedding(backbone, shape.num_centroids)
        for kind in dict.fromkeys(config.layer_types):
            self.register_buffer(f"_frequencies_{kind}", _frequencies(config, kind), persistent=False)

    def forward(
        self,
        embedded: Tensor,
        previous: Tensor,
        rows: Rows,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """One draft step.

        Args:
            embedded: [R, backbone], the target's scaled embedding of each row's last token.
            previous: [R, backbone], the target's final state before that token, or what the step before returned.
            rows: R rows, at the same positions in every step of a chain.
            keys: layer type to the target's keys [B, KV heads, T, head size].
            values: layer type to the target's values.

        Returns:
            The normed states [R, hidden], and their projection [R, backbone], the next step's ``previous``.
        """
        inputs = torch.cat([embedded.float(), previous.float()], dim=-1)
        hidden = self.pre_projection(fill_block(inputs)).float()
        kinds = self.shape.text.layer_types
        rotations = {kind: self._rotation(kind, rows.position) for kind in dict.fromkeys(kinds)}
        for kind, layer in zip(kinds, self.model.layers, strict=True):
            hidden = layer(hidden, rows, rotations[kind], keys[kind], values[kind])
        states = self.model.norm(hidden)
        return states[: len(rows)], self.post_projection(states)[: len(rows)]

    def _rotation(self, layer_type: str, position: Tensor) -> Rotation:
        angles = position[:, None, None].float() * self.get_buffer(f"_frequencies_{layer_type}")
        return angles.cos(), angles.sin()


def _frequencies(config: TextConfig, layer_type: str) -> Tensor:
    """RoPE's frequencies [head size / 2]; those of pairs that do not rotate are 0."""
    size = config.head_dim_of(layer_type)
    theta = config.rope_theta if layer_type == FULL else config.rope_local_theta
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float) / size)
    if layer_type == FULL:
        frequencies /= config.rope_scaling_factor
        frequencies[int(config.rope_partial_rotary_factor * size / 2) :] = 0.0
    return frequencies


def _rotated(queries: Tensor, rotation: Rotation) -> Tensor:
    """Queries [R, heads, head size] with the pairs (i, i + half) rotated."""
    cosines, sines = rotation
    low, high = queries.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def _attend(queries: Tensor, rows: Rows, keys: Tensor, values: Tensor, reach: int | None) -> Tensor:
    """What each row sees, [R, heads, head size]. K/V have no gradients, so that autograd computes none."""
    kv_heads, length = keys.shape[1], keys.shape[2]
    attended = []
    for span in rows.spans:
        last = min(whole_blocks(span.most), length)
        first = 0 if reach is None else max(0, last - whole_blocks(last - max(0, span.least - reach)))
        position = rows.position[span.first : span.last]
        key_position = torch.arange(first, last, device=queries.device)
        hidden = key_position >= position[:, None]
        if reach is not None:
            hidden |= key_position < position[:, None] - reach
        mask = fill_block(torch.zeros_like(hidden, dtype=torch.float).masked_fill_(hidden, -torch.inf))
        # Heads that share K/V attend as so many rows more.
        asked = fill_block(queries[span.first : span.last])
        asked = asked.view(len(asked), kv_heads, -1, queries.shape[-1]).permute(1, 2, 0, 3)
        heads, count = asked.shape[1:3]
        scores = asked.flatten(1, 2) @ keys[span.sequence, :, first:last].transpose(1, 2)
        weights = torch.softmax(scores.float().view(kv_heads, heads, count, -1) + mask, dim=-1).flatten(1, 2)
        seen = weights.to(values.dtype) @ values[span.sequence, :, first:last]
        seen = seen.view(kv_heads, heads, count, -1).permute(2, 0, 1, 3)
        attended.append(seen[: span.last - span.first].flatten(1, 2))
    return torch.cat(attended)

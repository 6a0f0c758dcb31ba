"""Which sizes a drafter has, and how they follow from its target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from draftwerk.loading.config import FULL, SLIDING, AssistantConfig, TextConfig, gemma4_text
from draftwerk.training.errors import TrainingError

_DEFAULT_LAYERS = 2
_WIDEST_DEFAULT = 1024  # as wide as Google's own drafters for large targets
_ROUND_TO = 64


@dataclass(frozen=True)
class DrafterShape:
    """Sizes of a drafter in the format of ``gemma4_assistant``.

    Attributes:
        text: its layers, which all share the target's K/V. Whatever the target's family, its conventions are Gemma 4's.
        backbone_hidden_size: width of the target's states.
        draft_vocab_size: tokens that it can draft, scored by the target's own embedding; 0: it has a head of its own
            over the whole vocabulary.
        head_softcap: cap of the draft logits, ``c * tanh(logits / c)``: the target's where its embedding is the head;
            0.0: none.
        num_centroids: clusters of the vocabulary that the head scores first; 0: none.
        centroid_intermediate_top_k: clusters whose tokens get logits.
    """

    text: TextConfig
    backbone_hidden_size: int
    draft_vocab_size: int
    head_softcap: float = 0.0
    num_centroids: int = 0
    centroid_intermediate_top_k: int = 0

    @classmethod
    def for_target(
        cls,
        target: TextConfig,
        *,
        draft_vocab_size: int,
        layers: int = _DEFAULT_LAYERS,
        hidden: int | None = None,
        intermediate: int | None = None,
        num_centroids: int = 0,
        centroid_intermediate_top_k: int = 0,
    ) -> DrafterShape:
        """The shape of a drafter to train from scratch.

        The last layer is a full one where the target has such layers, the others are sliding ones, as in Google's own
        drafters.

        Args:
            target: the target's configuration.
            draft_vocab_size: tokens that it can draft.
            layers: decoder layers.
            hidden: width of its layers; by default the target's, at most 1,024.
            intermediate: width of its MLPs; by default that of the target's last layer, in proportion to ``hidden``.
            num_centroids: clusters of those tokens, all of the same size; 0: none.
            centroid_intermediate_top_k: clusters whose tokens get logits.

        Raises:
            TrainingError: a size is out of range.
        """
        width = min(target.hidden_size, _WIDEST_DEFAULT) if hidden is None else hidden
        if intermediate is None:
            of_target = target.intermediate_size * (
                2 if target.use_double_wide_mlp and target.num_kv_shared_layers else 1
            )
            intermediate = -(-of_target * width // target.hidden_size // _ROUND_TO) * _ROUND_TO
            if width == target.hidden_size:
                intermediate = of_target
        for name, value, most in (
            ("layers", layers, 64),
            ("hidden", width, 1 << 16),
            ("intermediate", intermediate, 1 << 18),
            ("draft_vocab_size", draft_vocab_size, target.vocab_size),
        ):
            if not 1 <= value <= most:
                raise TrainingError(f"{name} = {value}: must be 1 to {most}")
        text = gemma4_text(
            {
                "vocab_size": target.vocab_size,
                "hidden_size": width,
                "intermediate_size": intermediate,
                "num_attention_heads": target.num_attention_heads,
                "num_key_value_heads": target.num_key_value_heads,
                "num_global_key_value_heads": target.num_global_key_value_heads,
                "head_dim": target.head_dim,
                "global_head_dim": target.global_head_dim,
                "sliding_window": target.sliding_window,
                "layer_types": _layer_types(target, layers),
                "rope_theta": target.rope_theta,
                "rope_local_theta": target.rope_local_theta,
                "rope_scaling_factor": target.rope_scaling_factor,
                "rope_partial_rotary_factor": target.rope_partial_rotary_factor,
                "rms_norm_eps": target.rms_norm_eps,
                "max_position_embeddings": target.max_position_embeddings,
                "final_logit_softcapping": 0.0,
                "num_kv_shared_layers": layers,
                "use_double_wide_mlp": False,
                "attention_k_eq_v": False,
                "hidden_size_per_layer_input": 0,
                "vocab_size_per_layer_input": 0,
                "num_experts": 0,
                "top_k_experts": 0,
                "moe_intermediate_size": 0,
            }
        )
        return cls(
            text=text,
            backbone_hidden_size=target.hidden_size,
            draft_vocab_size=draft_vocab_size,
            head_softcap=target.final_logit_softcapping,
            num_centroids=num_centroids,
            centroid_intermediate_top_k=centroid_intermediate_top_k,
        )

    @classmethod
    def of(cls, config: AssistantConfig, target: TextConfig) -> DrafterShape:
        """The shape of a drafter that there is, for a target that it fits."""
        return cls(
            text=config.text,
            backbone_hidden_size=config.backbone_hidden_size,
            draft_vocab_size=config.draft_vocab_size,
            head_softcap=target.final_logit_softcapping if config.draft_vocab_size else 0.0,
            num_centroids=config.num_centroids,
            centroid_intermediate_top_k=config.centroid_intermediate_top_k,
        )

    def layers_of(self, target: TextConfig) -> Iterator[tuple[int, int]]:
        """Pairs (layer here, layer of a target to start from): the target's last layers of the same types, in order."""
        left = {
            kind: [index for index, its in enumerate(target.layer_types) if its == kind] for kind in (SLIDING, FULL)
        }
        pairs = []
        for index in reversed(range(self.text.num_hidden_layers)):
            candidates = left[self.text.layer_types[index]]
            pairs.append((index, candidates.pop() if len(candidates) > 1 else candidates[0]))
        yield from reversed(pairs)


def _layer_types(target: TextConfig, layers: int) -> tuple[str, ...]:
    owned = target.layer_types[: target.first_shared_layer]
    if FULL not in owned:
        raise TrainingError("the target has no full attention layers, and the last layer of a drafter has to be one")
    others = SLIDING if SLIDING in owned else FULL
    return (*[others] * (layers - 1), FULL)

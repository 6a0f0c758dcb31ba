"""How far the draft's distribution is from the target's, and what that makes of a chain of drafts.

Both distributions are those over the tokens that can be drafted; the target's is renormalised on them. The vocabulary
is wide and a batch has many rows, so that logits of all rows at once would fill the memory: rows are taken some at a
time, and the gradient with respect to the states is computed in the same go, while the logits are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draftwerk.training.target import softcap
from draftwerk.training.whole_blocks import fill_block

_ROWS_AT_ONCE = 128


@dataclass(frozen=True)
class TargetDistribution:
    """The target's distribution over the draft vocabulary at all positions of a batch.

    Attributes:
        logits: [N, draft vocabulary], N = B * T.
        normaliser: [N], float32; log of the sum of the exponentials of each row.
        best: [N], index of the likeliest.
    """

    logits: Tensor
    normaliser: Tensor
    best: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> TargetDistribution:
        """From logits [N, draft vocabulary]."""
        normaliser, best = [], []
        for rows in _some_at_a_time(logits.shape[0]):
            normaliser.append(torch.logsumexp(logits[rows].float(), -1))
            best.append(logits[rows].argmax(-1))
        return cls(logits, torch.cat(normaliser), torch.cat(best))


@dataclass(frozen=True)
class StepLoss:
    """Of the rows of one draft step, each [R].

    Attributes:
        divergence: KL(target || draft) in nats; the only one with a gradient.
        overlap: sum of the smaller of both probabilities: how often a draft is accepted at temperature 1, at best.
        agrees: whether both have the same likeliest token.
        kept: probability that the text's own next token, had it been drafted, is accepted:
            ``min(1, draft / target)``; 0 where it cannot be drafted.
    """

    divergence: Tensor
    overlap: Tensor
    agrees: Tensor
    kept: Tensor


def step_loss(
    states: Tensor, head: Tensor, cap: float, target: TargetDistribution, position: Tensor, following: Tensor
) -> StepLoss:
    """Compares the drafts of one step with the target.

    Args:
        states: [R, width], what the head scores.
        head: [draft vocabulary, width], without gradient.
        cap: of the draft logits; 0.0: none.
        target: the target's distribution.
        position: [R], rows of ``target`` to compare with.
        following: [R], index of the text's next token in the draft vocabulary; -1: it is not there.
    """
    results = _Divergence.apply(states, head, cap, target, position, following)  # type: ignore[no-untyped-call]
    return StepLoss(*results)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        cap: float,
        target: TargetDistribution,
        position: Tensor,
        following: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(states.device.type, enabled=False):
            of_states, divergence, overlap, agrees, kept = _compare(states, head, cap, target, position, following)
        ctx.save_for_backward(of_states)
        ctx.mark_non_differentiable(overlap, agrees, kept)
        return divergence, overlap, agrees, kept

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        (of_states,) = ctx.saved_tensors
        return gradient[0][:, None] * of_states, None, None, None, None, None


def _compare(
    states: Tensor, head: Tensor, cap: float, target: TargetDistribution, position: Tensor, following: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the divergence with respect to the states, and the fields of a StepLoss."""
    count = states.shape[0]
    states, position, following = fill_block(states), fill_block(position), fill_block(following)
    results: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    gradients = []
    for rows in _some_at_a_time(states.shape[0]):
        raw = functional.linear(states[rows].to(head.dtype), head)
        logits = softcap(raw, cap).float()
        slope = 1.0 - (logits / cap) ** 2 if cap else None
        at = position[rows]
        agrees = logits.argmax(-1) == target.best[at]
        log_draft = logits.sub_(torch.logsumexp(logits, -1, keepdim=True))
        log_target = target.logits[at].float().sub_(target.normaliser[at, None])
        known = following[rows, None]
        index = known.clamp_min(0)
        kept = (log_draft.gather(1, index) - log_target.gather(1, index)).clamp_max_(0.0).exp_()
        kept = kept.masked_fill_(known < 0, 0.0)[:, 0]
        probability = log_target.exp()
        divergence = log_target.sub_(log_draft).mul_(probability).sum(-1)
        # draft - target: the gradient of the divergence with respect to the logits.
        difference = log_draft.exp_().sub_(probability)
        overlap = 1.0 - 0.5 * torch.linalg.vector_norm(difference, ord=1, dim=-1)
        if slope is not None:
            difference *= slope
        gradients.append(raw.copy_(difference) @ head)
        results.append((divergence, overlap, agrees, kept))
    of_states = torch.cat(gradients)[:count].to(states.dtype)
    divergence, overlap, agrees, kept = (torch.cat(parts)[:count] for parts in zip(*results, strict=True))
    return of_states, divergence, overlap, agrees, kept


def _some_at_a_time(rows: int) -> Iterator[slice]:
    for first in range(0, rows, _ROWS_AT_ONCE):
        yield slice(first, first + _ROWS_AT_ONCE)

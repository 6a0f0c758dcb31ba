"""The loss of a draft step against its definition, on whole logits and by autograd."""

from __future__ import annotations

import pytest
import torch

from draftwerk.training import loss
from draftwerk.training.loss import TargetDistribution, step_loss

TOKENS, WIDTH, POSITIONS = 37, 16, 50


@pytest.fixture(autouse=True)
def several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_ROWS_AT_ONCE", 13)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_a_step_is_what_it_is_defined_as(cap: float) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(TOKENS, WIDTH, generator=generator)
    position = torch.randperm(POSITIONS, generator=generator)[:40]
    following = torch.randint(-1, TOKENS, (40,), generator=generator)
    following[:3] = -1
    states = torch.randn(40, WIDTH, generator=generator, requires_grad=True)
    target_logits = 2.0 * torch.randn(POSITIONS, TOKENS, generator=generator)
    target_logits[position] += 0.5 * (states @ head.T).detach()
    weights = torch.rand(40, generator=generator)

    result = step_loss(states, head, cap, TargetDistribution.of(target_logits), position, following)
    (result.divergence * weights).sum().backward()

    expected_states = states.detach().clone().requires_grad_()
    logits = expected_states @ head.T
    if cap:
        logits = cap * torch.tanh(logits / cap)
    draft = torch.softmax(logits, -1)
    target = torch.softmax(target_logits[position], -1)
    divergence = (target * (target.log() - draft.log())).sum(-1)
    (divergence * weights).sum().backward()
    torch.testing.assert_close(result.divergence, divergence)
    torch.testing.assert_close(states.grad, expected_states.grad)
    torch.testing.assert_close(result.overlap, torch.minimum(target, draft).sum(-1))
    assert torch.equal(result.agrees, target.argmax(-1) == draft.argmax(-1))
    assert 5 < result.agrees.sum() < 35
    of_text = (draft / target).gather(1, following.clamp_min(0)[:, None])[:, 0].clamp_max(1.0)
    torch.testing.assert_close(result.kept, of_text.where(following >= 0, 0.0).detach())
    assert (result.kept[:3] == 0.0).all()


def test_the_target_has_no_gradient_and_the_head_neither() -> None:
    head = torch.ones(TOKENS, WIDTH, requires_grad=True)
    states = torch.ones(2, WIDTH, requires_grad=True)
    target = TargetDistribution.of(torch.zeros(2, TOKENS))
    result = step_loss(states, head, 0.0, target, torch.tensor([0, 1]), torch.tensor([0, -1]))
    assert not any(part.requires_grad for part in (result.overlap, result.agrees, result.kept))
    result.divergence.sum().backward()
    assert head.grad is None

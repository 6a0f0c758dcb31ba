"""What a drafter starts from: the target's last layers, and a first projection fitted to what they are used to."""

from __future__ import annotations

import torch
from torch import Tensor

from draftwerk.training.drafter import CENTROIDS, DrafterModule
from draftwerk.training.target import FrozenTarget

_RIDGE = 1e-3  # of the mean square of the inputs


@torch.no_grad()
def start_from_target(drafter: DrafterModule, target: FrozenTarget, seed: int) -> None:
    """Sets every weight: from the target's last layers where it has one of the same shape, else at random.

    Gemma 3's conventions are absorbed: its norms come as their whole factor, and its attention scale goes into the norm
    of the queries.
    """
    generator = torch.Generator().manual_seed(seed)
    text, config = drafter.shape.text, target.config
    sources = {f"model.layers.{here}.": f"model.layers.{there}." for here, there in drafter.shape.layers_of(config)}
    for name, weight in (*drafter.named_parameters(), *drafter.named_buffers()):
        layer = next((prefix for prefix in sources if name.startswith(prefix)), "")
        source = target.parameter(sources.get(layer, "") + name[len(layer) :])
        if source is not None and source.shape == weight.shape:
            scale = config.query_pre_attn_scalar**-0.5 if name.endswith("q_norm.weight") else 1.0
            weight.copy_(source * scale)
        elif weight.dim() == 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        elif name.endswith("q_norm.weight"):
            weight.fill_(text.head_dim**-0.5)
    if drafter.post_projection.weight.shape[0] == drafter.post_projection.weight.shape[1]:
        torch.nn.init.eye_(drafter.post_projection.weight)


@torch.no_grad()
def start_centroids(drafter: DrafterModule, target: FrozenTarget, counts: Tensor) -> None:
    """Sets the centroids, if there are some: means of their tokens' rows, weighted by the square root of the counts.

    A cluster is worth choosing for its likely tokens. For gemma-3-270m, whose states chose 64 of 2,048 clusters, these
    had 88% of the probability, without any training; 80% with plain means, and 86% with the counts as weights.

    Args:
        drafter: a reduced head, or any other.
        target: what it drafts for.
        counts: [draft vocabulary], how often the drafter's tokens are to be expected.
    """
    centroids = dict(drafter.named_parameters()).get(CENTROIDS)
    if centroids is None:
        return
    rows = target.embedding[drafter.draft_token_ids].float().view(centroids.shape[0], -1, centroids.shape[1])
    # One that does not occur counts as the rarest that do, so that no weight is all there is.
    weights = counts.to(rows.device).double().clamp_min(1.0).sqrt().float().view(*rows.shape[:2], 1)
    centroids.copy_((rows * weights).sum(1) / weights.sum(1))


@torch.no_grad()
def fit_pre_projection(drafter: DrafterModule, target: FrozenTarget, token_ids: Tensor) -> float:
    """Sets the first projection to the one that best foretells what the target's own layers get, by least squares.

    The layers come from the target, where the one in front of the first of them saw the token; here there is only the
    token's embedding and the state before it.

    Args:
        drafter: as wide as the target.
        target: what it reads.
        token_ids: [B, T], text without padding; a few thousand tokens.

    Returns:
        The share of the variance that it explains.
    """
    _, layer = next(iter(drafter.shape.layers_of(target.config)))
    states = target.features(token_ids).states[:, :-1]
    given = torch.cat([target.embed(token_ids)[:, 1:].float(), states.float()], dim=-1).flatten(0, 1).double()
    wanted = target.inputs_of_layer(layer, token_ids)[:, 1:].flatten(0, 1).double()
    gram = given.T @ given
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, given.T @ wanted)
    drafter.pre_projection.weight.copy_(weight.T)
    left = (wanted - given @ weight).square().sum() / (wanted - wanted.mean(0)).square().sum()
    return 1.0 - float(left)

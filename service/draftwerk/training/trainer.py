"""The training loop.

Text that the target wrote is the teacher. Every position of it starts a chain of drafts, as a round of the engine
would: the first draft from the target's state there, each further one from the text's next token and the state of the
draft before. A further draft is only reached if those before it were accepted, so a row goes on with the probability
with which its draft is (min(1, draft / target) of the text's own token): later drafts count as often as they happen,
and cost as much.

Distributions are compared over the likeliest of the tokens that can be drafted (:mod:`.compared_tokens`). Centroids
need all of these tokens, but far fewer rows, and get a loss of their own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from draftwerk.loading.vocabulary_checks import HEAD
from draftwerk.training.batches import Batch, BatchSource
from draftwerk.training.cluster_loss import ClusteredHead, ClusterLoss
from draftwerk.training.compared_tokens import TokenChoice
from draftwerk.training.drafter import CENTROIDS, DrafterModule
from draftwerk.training.errors import TrainingError
from draftwerk.training.loss import TargetDistribution, step_loss
from draftwerk.training.options import TrainingOptions
from draftwerk.training.rows import Rows
from draftwerk.training.state import load_state, save_state
from draftwerk.training.target import Features, FrozenTarget
from draftwerk.training.whole_blocks import whole_blocks

_POSITIONS_PER_TAUGHT = 8  # every so many positions of a batch centroids learn from one


@dataclass(frozen=True)
class StepFigures:
    """Of one optimizer step.

    Attributes:
        step: its number, from 1.
        tokens: of text, in this step.
        loss: divergence in nats of a whole chain, averaged over its starts.
        reached: draft position to the share of chains that got there.
        agreement: draft position to the share of rows there in which draft and target have the same likeliest token.
        overlap: draft position to what temperature 1 would accept there at best, given that it is reached.
        gradient_norm: before clipping, without that of centroids.
        learning_rate: that it took.
        tokens_per_second: of text, everything included but states.
        cluster_recall: how probable the target finds it, of what can be drafted, that its token is in the clusters
            that centroids choose; None without centroids.
    """

    step: int
    tokens: int
    loss: float
    reached: tuple[float, ...]
    agreement: tuple[float, ...]
    overlap: tuple[float, ...]
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    cluster_recall: float | None = None


class NotFiniteError(TrainingError):
    """The gradient of a step is not finite. Going on from the state before would end in the same."""


class Trainer:
    """Trains a drafter.

    Attributes:
        drafter: what is trained, weights in float32.
        averaged: the moving average of its weights, by name.
        step: optimizer steps done.

    Args:
        target: what it shall foretell.
        drafter: on the target's device.
        options: of the run.
        directory: where its states lie.
        compared: token ids [n], those that every batch compares distributions over, beside tokens of its own; by
            default all tokens that can be drafted.
        features: gives what ``target.features`` does, such as :meth:`.kept_features.KeptFeatures.features`.
    """

    def __init__(
        self,
        target: FrozenTarget,
        drafter: DrafterModule,
        options: TrainingOptions,
        directory: Path,
        compared: Tensor | None = None,
        features: Callable[[Tensor], Features] | None = None,
    ) -> None:
        self._target = target
        self._features = target.features if features is None else features
        self.drafter = drafter
        self._options = options
        self._directory = directory
        own = drafter.head.get(HEAD)
        self._own_head = None if own is None else own.to(target.device, target.dtype)
        frequent = None if compared is None else compared.to(target.device)
        self._choice = TokenChoice(drafter.draft_token_ids, frequent, target.config.vocab_size)
        self._weights = dict(drafter.named_parameters())
        self._clustered: ClusteredHead | None = None
        if CENTROIDS in self._weights:
            rows = target.embedding[drafter.draft_token_ids]
            chosen_clusters = drafter.shape.centroid_intermediate_top_k
            self._clustered = ClusteredHead(rows, self._weights[CENTROIDS], chosen_clusters)
        # Centroids have a loss of their own: they neither decay nor count for the clipping of the others.
        self._clipped = [weight for name, weight in self._weights.items() if name != CENTROIDS]
        decaying = [weight for weight in self._clipped if weight.dim() > 1]
        others = [weight for name, weight in self._weights.items() if weight.dim() == 1 or name == CENTROIDS]
        self._optimizer = torch.optim.AdamW(
            [{"params": decaying, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.averaged = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.step = 0

    def steps(self, batches: BatchSource) -> Iterator[StepFigures]:
        """Trains to the end of the run; yields after every optimizer step, which is when :meth:`save` may be called.

        Raises:
            NotFiniteError: the gradient is not finite.
        """
        options = self._options
        while self.step < options.steps:
            started = time.perf_counter()
            chain = _Sums(options.draft_depth)
            for part in range(options.accumulate):
                self._accumulate(batches[self.step * options.accumulate + part], part, chain)
            rate = options.learning_rate_at(self.step)
            norm = self._apply(rate)
            self.step += 1
            yield chain.figures(self.step, norm, rate, time.perf_counter() - started)

    def save(self, batches: BatchSource) -> None:
        """Writes a state, from which :meth:`resume` goes on.

        Raises:
            WriteError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            moments = self._optimizer.state[weight]
            tensors |= {
                f"weight.{name}": weight,
                f"averaged.{name}": self.averaged[name],
                f"first_moment.{name}": moments["exp_avg"],
                f"second_moment.{name}": moments["exp_avg_sq"],
            }
        save_state(self._directory, self.step, tensors, {"step": self.step, **self._run(batches)})

    def resume(self, batches: BatchSource) -> bool:
        """Goes on from the last state of the directory, as if the run had never stopped; False if there is none.

        Raises:
            TrainingError: it is unreadable, or that of another run.
        """
        found = load_state(self._directory)
        if found is None:
            return False
        tensors, about = found
        for name, value in self._run(batches).items():
            if about.get(name) != value:
                raise TrainingError(
                    f"{self._directory}: holds the state of another run: {name} was {about.get(name)}, and is {value}"
                )
        for name, weight in self._weights.items():
            kept = tensors.get(f"weight.{name}")
            if kept is None or kept.shape != weight.shape:
                was = "is not there" if kept is None else f"was {list(kept.shape)}"
                raise TrainingError(
                    f"{self._directory}: holds the state of another run: {name} {was}, and is {list(weight.shape)}"
                )
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[f"weight.{name}"])
                self.averaged[name].copy_(tensors[f"averaged.{name}"])
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(about["step"]), device=weight.device),
                    "exp_avg": tensors[f"first_moment.{name}"].to(weight.device),
                    "exp_avg_sq": tensors[f"second_moment.{name}"].to(weight.device),
                }
        self.step = about["step"]
        return True

    def _run(self, batches: BatchSource) -> dict[str, Any]:
        """What a state has to agree with."""
        return {
            **dataclasses.asdict(self._options),
            "layers": self.drafter.shape.text.num_hidden_layers,
            "hidden": self.drafter.shape.text.hidden_size,
            "draft_vocab_size": self.drafter.shape.draft_vocab_size,
            "text": batches.fingerprint,
        }

    def _accumulate(self, batch: Batch, part: int, chain: _Sums) -> None:
        """Adds the gradient of a batch."""
        generator = torch.Generator().manual_seed(_seed(self._options.seed, self.step, part))
        with self._autocast():
            loss = self._chains(batch, part, generator, chain)
        torch.autograd.backward(loss / self._options.accumulate)

    def _chains(self, batch: Batch, part: int, generator: torch.Generator, chain: _Sums) -> Tensor:
        """The divergence of the chains from every start of a batch, averaged over them, and the loss of clusters."""
        device = self._target.device
        lengths = batch.lengths.to(device)
        width = whole_blocks(batch.token_ids.shape[1])
        token_ids = functional.pad(batch.token_ids, (0, width - batch.token_ids.shape[1])).to(device)
        features = self._features(token_ids)
        compared = self._choice.of_batch(token_ids, generator)
        target_head = self._target.embedding[compared.token_ids]
        head = target_head if self._own_head is None else self._own_head[compared.token_ids]
        target = TargetDistribution.of(self._target.logits(features.states.flatten(0, 1), target_head))
        # [B * T]: the index of the token behind each position, -1 behind the last.
        following = compared.index[token_ids.roll(-1, 1)]
        following[torch.arange(token_ids.shape[0], device=device), lengths - 1] = -1
        following, flat_ids = following.flatten(), token_ids.flatten()

        rows = Rows.from_starts(batch.starts.to(device), lengths)
        starts = len(rows)
        at = rows.sequence * width + rows.position
        previous = features.states.flatten(0, 1)[at - 1]
        clusters = self._cluster_loss(features.states.flatten(0, 1), at, part)
        loss = torch.zeros((), device=device)
        for depth in range(self._options.draft_depth):
            embedded = self._target.embed(flat_ids[at])
            states, projected = self.drafter(embedded, previous, rows, features.keys, features.values)
            scored = projected if self.drafter.shape.draft_vocab_size else states
            result = step_loss(scored, head, self.drafter.shape.head_softcap, target, at, following[at])
            loss = loss + result.divergence.sum()
            chain.add(depth, result.overlap, result.agrees)
            if clusters is not None:
                clusters.add(projected, at)
            draws = torch.rand(len(rows), generator=generator).to(device)
            goes_on = torch.nonzero(draws < result.kept)[:, 0]
            if depth + 1 == self._options.draft_depth or not len(goes_on):
                break
            rows, at, previous = rows.those(goes_on), at[goes_on] + 1, projected[goes_on]
        loss = loss / starts
        chain.end(float(loss.detach()), batch.tokens)
        if clusters is not None:
            chain.add_clusters(clusters)
            loss = loss + clusters.mean()
        return loss

    def _cluster_loss(self, states: Tensor, at: Tensor, part: int) -> ClusterLoss | None:
        """Of some of the positions ``at``, others in every batch; None without centroids."""
        if self._clustered is None:
            return None
        batch = self.step * self._options.accumulate + part
        positions = at[batch % _POSITIONS_PER_TAUGHT :: _POSITIONS_PER_TAUGHT]
        return ClusterLoss(self._target, self._clustered, states, positions)

    def _apply(self, rate: float) -> float:
        """Takes the optimizer's step; returns the norm of the gradient."""
        norm = float(torch.nn.utils.clip_grad_norm_(self._clipped, self._options.clip))
        centroids = self._weights.get(CENTROIDS)
        finite = centroids is None or centroids.grad is None or bool(centroids.grad.isfinite().all())
        if not (finite and norm < float("inf")):
            raise NotFiniteError(f"step {self.step + 1}: the gradient is not finite")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        decay = self._options.ema_decay_at(self.step)
        with torch.no_grad():
            for name, weight in self._weights.items():
                self.averaged[name].lerp_(weight, 1.0 - decay)
        return norm

    def _autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self._target.device.type, self._target.dtype, enabled=self._target.dtype != torch.float32)


class _Sums:
    """Figures of the batches of a step."""

    def __init__(self, depth: int) -> None:
        self._rows = [0] * depth
        self._overlap = [0.0] * depth
        self._agrees = [0.0] * depth
        self._losses: list[float] = []
        self._tokens = 0
        self._clustered_rows = 0
        self._recall = 0.0

    def add(self, depth: int, overlap: Tensor, agrees: Tensor) -> None:
        self._rows[depth] += overlap.shape[0]
        self._overlap[depth] += float(overlap.sum())
        self._agrees[depth] += float(agrees.sum())

    def add_clusters(self, clusters: ClusterLoss) -> None:
        self._clustered_rows += clusters.rows
        self._recall += clusters.recall

    def end(self, loss: float, tokens: int) -> None:
        self._losses.append(loss)
        self._tokens += tokens

    def figures(self, step: int, norm: float, rate: float, seconds: float) -> StepFigures:
        def of_reached(sums: list[float]) -> tuple[float, ...]:
            return tuple(value / rows if rows else 0.0 for value, rows in zip(sums, self._rows, strict=True))

        return StepFigures(
            step=step,
            tokens=self._tokens,
            loss=sum(self._losses) / len(self._losses),
            reached=tuple(rows / self._rows[0] for rows in self._rows),
            agreement=of_reached(self._agrees),
            overlap=of_reached(self._overlap),
            gradient_norm=norm,
            learning_rate=rate,
            tokens_per_second=self._tokens / seconds,
            cluster_recall=self._recall / self._clustered_rows if self._clustered_rows else None,
        )


def _seed(*numbers: int) -> int:
    """One seed of several numbers: another stream for every change of one."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))

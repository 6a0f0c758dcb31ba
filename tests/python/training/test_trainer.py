"""Training tiny drafters: what is learned, and that a run that was cut off goes on as if it had not been."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_training
import torch
from tiny_training import HEADS, MODELS, random_ids, text
from torch.utils._python_dispatch import TorchDispatchMode

from draftwerk.loading import open_assistant
from draftwerk.loading.vocabulary_checks import HEAD
from draftwerk.training.batches import Batches
from draftwerk.training.drafter import CENTROIDS
from draftwerk.training.errors import TrainingError
from draftwerk.training.export import read_drafter, write_drafter
from draftwerk.training.options import TrainingOptions
from draftwerk.training.target import FrozenTarget
from draftwerk.training.trainer import NotFiniteError, StepFigures, Trainer
from draftwerk.training.whole_blocks import BLOCK
from draftwerk.weights import load_assistant, load_model

OPTIONS = TrainingOptions(
    steps=6, draft_depth=3, learning_rate=3e-3, warmup_steps=2, accumulate=2, ema_decay=0.5, seed=7
)
SAVE_EVERY = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> FrozenTarget:
    return tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def batches() -> Batches:
    ids = random_ids(12, 40)
    texts = [text(row[: 40 - 2 * index]) for index, row in enumerate(ids)]
    return Batches(texts, length=40, tokens_per_batch=120, seed=3)


def trainer_of(target: FrozenTarget, directory: Path, options: TrainingOptions = OPTIONS) -> Trainer:
    return Trainer(target, tiny_training.tiny_drafter(target), options, directory)


def run(trainer: Trainer, batches: Batches, steps: int | None = None) -> list[StepFigures]:
    """Trains to the end, or as many steps and no further: the rest is lost as it is in a process that is killed."""
    figures = []
    for step in trainer.steps(batches):
        figures.append(dataclasses.replace(step, tokens_per_second=0.0))
        if trainer.step % SAVE_EVERY == 0:
            trainer.save(batches)
        if len(figures) == steps:
            break
    return figures


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.drafter.named_parameters()} | {
        f"averaged {name}": weight for name, weight in trainer.averaged.items()
    }


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


class ProductSizes(TorchDispatchMode):
    """Rows and columns of all bf16 matrices that are multiplied meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            matrices = [argument for argument in args if argument.dtype == torch.bfloat16]
            self.sizes.update(size for matrix in matrices for size in matrix.shape[-2:])
        return func(*args, **(kwargs or {}))


def test_a_run_is_a_function_of_its_seed(target: FrozenTarget, batches: Batches, tmp_path: Path) -> None:
    one, two = trainer_of(target, tmp_path / "one"), trainer_of(target, tmp_path / "two")
    assert run(one, batches) == run(two, batches)
    assert_same_weights(one, two)
    other = trainer_of(target, tmp_path / "other", dataclasses.replace(OPTIONS, seed=8))
    run(other, batches)
    assert not all(torch.equal(weight, weights(other)[name]) for name, weight in weights(one).items())


@pytest.mark.parametrize("killed_after", [3, 5])
def test_resuming_is_exact(target: FrozenTarget, batches: Batches, tmp_path: Path, killed_after: int) -> None:
    whole = trainer_of(target, tmp_path / "whole")
    figures = run(whole, batches)
    run(trainer_of(target, tmp_path / "cut"), batches, killed_after)
    resumed = trainer_of(target, tmp_path / "cut")
    with torch.no_grad():
        for weight in resumed.drafter.parameters():
            weight.zero_()
    assert resumed.resume(batches)
    assert resumed.step == 3
    assert run(resumed, batches) == figures[3:]
    assert_same_weights(resumed, whole)


def test_there_is_nothing_to_resume(target: FrozenTarget, batches: Batches, tmp_path: Path) -> None:
    trainer = trainer_of(target, tmp_path / "nothing")
    assert not trainer.resume(batches)
    assert trainer.step == 0


def test_another_run_is_not_resumed(target: FrozenTarget, batches: Batches, tmp_path: Path) -> None:
    run(trainer_of(target, tmp_path), batches, 3)
    changed = trainer_of(target, tmp_path, dataclasses.replace(OPTIONS, learning_rate=1e-3))
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.003, and is 0\.001"):
        changed.resume(batches)
    other_text = Batches([text(row) for row in random_ids(4, 30)], length=40, tokens_per_batch=120, seed=3)
    with pytest.raises(TrainingError, match="text was"):
        trainer_of(target, tmp_path).resume(other_text)


def test_training_beats_its_initialisation(target: FrozenTarget, tmp_path: Path) -> None:
    batches = Batches([text(row) for row in random_ids(64, 40)], length=40, tokens_per_batch=320, seed=0)
    options = TrainingOptions(steps=60, draft_depth=3, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, seed=0)
    figures = run(trainer_of(target, tmp_path, options), batches)
    first, last = figures[0], figures[-5:]
    assert np.mean([step.agreement[0] for step in last]) > first.agreement[0] + 0.1
    assert np.mean([step.overlap[0] for step in last]) > first.overlap[0] + 0.1
    assert np.mean([step.reached[1] for step in last]) > first.reached[1] + 0.05


def test_centroids_learn_to_find_the_clusters(target: FrozenTarget, tmp_path: Path) -> None:
    batches = Batches([text(row) for row in random_ids(64, 40)], length=40, tokens_per_batch=320, seed=0)
    options = TrainingOptions(steps=50, draft_depth=3, learning_rate=6e-3, warmup_steps=5, ema_decay=0.9, seed=0)
    drafter = tiny_training.tiny_drafter(target, num_centroids=20, centroid_intermediate_top_k=4)
    figures = run(Trainer(target, drafter, options, tmp_path), batches)
    recall = [step.cluster_recall or 0.0 for step in figures]
    assert np.mean(recall[-25:]) > np.mean(recall[:5]) + 0.06
    plain = run(Trainer(target, tiny_training.tiny_drafter(target), options, tmp_path / "plain"), batches, 10)
    # Centroids adapt to the drafter, and not the other way round.
    assert [step.loss for step in figures[:10]] == [step.loss for step in plain]


def test_frequent_tokens_are_compared_with_those_of_the_text(target: FrozenTarget, tmp_path: Path) -> None:
    """All of them being frequent, it is as without; few of them, it is another loss, which falls as well."""
    batches = Batches([text(row) for row in random_ids(64, 40)], length=40, tokens_per_batch=320, seed=0)
    options = TrainingOptions(steps=60, draft_depth=3, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, seed=0)

    def losses(name: str, compared: torch.Tensor | None, steps: int = 5) -> list[float]:
        trainer = Trainer(target, tiny_training.tiny_drafter(target), options, tmp_path / name, compared)
        return [step.loss for step in run(trainer, batches, steps)]

    drafted = tiny_training.tiny_drafter(target).draft_token_ids
    by_default = losses("default", None)
    assert np.allclose(losses("all", drafted.sort().values), by_default, rtol=1e-3)
    few = losses("few", drafted[:10], steps=60)
    assert few[0] != by_default[0]
    assert np.mean(few[-5:]) < np.mean(few[:5])


def test_rows_of_a_head_of_its_own_are_chosen_with_those_of_the_target(tmp_path: Path) -> None:
    """In whatever order: each token is scored by its own row."""
    path, checkpoint = tiny_training.published(tmp_path, "own")
    target = FrozenTarget(checkpoint, dtype=torch.float32)
    batches = Batches([text(row) for row in random_ids(16, 40)], length=40, tokens_per_batch=320, seed=0)
    options = TrainingOptions(steps=1, draft_depth=2, learning_rate=0.0, warmup_steps=0, seed=0)

    def loss(compared: torch.Tensor | None, scaled: float = 1.0) -> float:
        drafter = read_drafter(open_assistant(path), checkpoint)
        drafter.head[HEAD] = drafter.head[HEAD] * scaled
        trainer = Trainer(target, drafter, options, tmp_path / "states", compared)
        return run(trainer, batches)[0].loss

    everything = torch.randperm(checkpoint.config.vocab_size, generator=torch.Generator().manual_seed(1))
    assert loss(everything) == pytest.approx(loss(None), rel=1e-4)
    assert loss(everything, scaled=-1.0) != pytest.approx(loss(None), rel=1e-3)


@pytest.mark.parametrize("compared", [None, 40])
@pytest.mark.parametrize("head", HEADS)
def test_a_published_drafter_is_trained_on(tmp_path: Path, head: str, compared: int | None) -> None:
    """Of its head all tokens are compared, or some."""
    path, checkpoint = tiny_training.published(tmp_path, head)
    target = FrozenTarget(checkpoint, dtype=torch.float32)
    drafter = read_drafter(open_assistant(path), checkpoint)
    came_with = {name: tensor.clone() for name, tensor in drafter.head.items()}
    batches = Batches([text(row) for row in random_ids(32, 40)], length=40, tokens_per_batch=320, seed=0)
    options = TrainingOptions(steps=30, draft_depth=2, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, seed=0)
    some = None if compared is None else drafter.draft_token_ids[:compared]
    trainer = Trainer(target, drafter, options, tmp_path / "states", some)
    figures = run(trainer, batches)
    assert np.mean([step.overlap[0] for step in figures[-5:]]) > figures[0].overlap[0] + 0.03
    assert drafter.head.keys() == came_with.keys()
    assert all(torch.equal(tensor, came_with[name]) for name, tensor in drafter.head.items())
    write_drafter(drafter, trainer.averaged, tmp_path / "drafter", target_name="tiny")
    resumed = Trainer(target, read_drafter(open_assistant(path), checkpoint), options, tmp_path / "states", some)
    assert resumed.resume(batches)
    assert_same_weights(resumed, trainer)
    native = load_model(checkpoint, threads=1)
    drafts, _ = load_assistant(open_assistant(tmp_path / "drafter"), checkpoint, native).draft([2, 5, 7], 4)
    assert len(drafts) == 4


def test_the_state_of_a_drafter_of_another_shape_is_refused(
    target: FrozenTarget, batches: Batches, tmp_path: Path
) -> None:
    run(trainer_of(target, tmp_path), batches, 3)
    other = tiny_training.tiny_drafter(target, intermediate=32)
    with pytest.raises(TrainingError, match=r"another run: .*gate_proj\.weight was \[96, 64\], and is \[32, 64\]"):
        Trainer(target, other, OPTIONS, tmp_path).resume(batches)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_ends_the_run(
    target: FrozenTarget, batches: Batches, tmp_path: Path, value: float
) -> None:
    trainer = trainer_of(target, tmp_path)
    run(trainer, batches, 3)
    with torch.no_grad():
        trainer.drafter.get_parameter("post_projection.weight")[0, 0] = value
    with pytest.raises(NotFiniteError, match="step 4: the gradient is not finite"):
        run(trainer, batches)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.safetensors"]


def test_a_gradient_of_centroids_alone_that_is_not_finite_ends_the_run(
    target: FrozenTarget, batches: Batches, tmp_path: Path
) -> None:
    """They count for no norm, and drafts by spoilt ones would be of any cluster."""
    drafter = tiny_training.tiny_drafter(target, num_centroids=20, centroid_intermediate_top_k=4)
    trainer = Trainer(target, drafter, OPTIONS, tmp_path)
    drafter.get_parameter(CENTROIDS).register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NotFiniteError, match="step 1: the gradient is not finite"):
        run(trainer, batches)


@pytest.mark.parametrize("clusters", [{}, {"num_centroids": 20, "centroid_intermediate_top_k": 7}])
def test_products_have_few_shapes(tmp_path: Path, clusters: dict[str, int]) -> None:
    """Whole blocks, and sizes of the models, however many rows there are: some processors compile for each shape."""
    target = tiny_training.frozen(MODELS["gemma3"](seed=1), tmp_path / "target", dtype=torch.bfloat16)
    drafter = tiny_training.tiny_drafter(target, draft_vocab_size=100, **clusters)
    lengths = np.random.default_rng(1).integers(30, 400, 30)
    texts = [text(random_ids(int(length), seed=index)) for index, length in enumerate(lengths)]
    with ProductSizes() as products:
        run(Trainer(target, drafter, OPTIONS, tmp_path), Batches(texts, length=300, tokens_per_batch=700, seed=3))
    fixed = {size for parameter in drafter.parameters() for size in parameter.shape} | {target.config.head_dim, 100}
    blocks = {size for size in products.sizes if size % BLOCK == 0}
    assert products.sizes - blocks <= fixed
    assert len(blocks) > 3

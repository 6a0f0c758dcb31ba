"""Training on a pretended GPU: everything that it computes with is there, which training on a CPU would never tell.

The arithmetic is the CPU's, so that a run comes to the same bit by bit; nobody promises that of a true GPU.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_training
import torch
from pretend_gpu import GPU, GpuTensor, pretend_gpu
from tiny_run import Notes, log, run, weights
from tiny_training import MODELS
from tiny_writer import with_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from draftwerk.loading import Checkpoint
from draftwerk.training.errors import TrainingError
from draftwerk.training.run_directory import RunDirectory
from draftwerk.training.text import TextOptions
from fake_checkpoint import VOCABULARY

SMALL: dict[str, Any] = {
    "precision": "f32",
    "tokens": 280,
    "tokens_per_batch": 128,
    "text": TextOptions(max_tokens=24, texts_per_shard=4, streams=4),
}

_aten = torch.ops.aten
PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten._linalg_eigh, _aten._linalg_solve_ex}
UPDATES = {_aten._fused_adamw_, _aten.lerp_}  # of weights with gradients and moments, and of their average


class Devices(TorchDispatchMode):
    """Of what is given to the operations that cost something.

    Attributes:
        seen: names of operations to types of devices.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS | UPDATES:
            lists = [value if isinstance(value, (list, tuple)) else [value] for value in args]
            tensors = [value for values in lists for value in values if isinstance(value, torch.Tensor)]
            self.seen[func.overloadpacket.__name__] |= {tensor.device.type for tensor in tensors}
        return func(*args, **(kwargs or {}))


def run_on_gpu(target: Checkpoint, directory: Path, **changes: Any) -> bool:
    """A run, all of whose products and updates are there, and which leaves nothing there for an engine to miss."""
    left = []

    def empty_cache() -> None:
        left.append([known for known in gc.get_objects() if type(known) is GpuTensor])

    with pretend_gpu(), pytest.MonkeyPatch.context() as patch, Devices() as devices:
        patch.setattr(torch.cuda, "empty_cache", empty_cache)
        ended = run(target, directory, device="cuda", **{**SMALL, **changes})
    assert {"mm", "bmm", "_fused_adamw_", "lerp_"} <= devices.seen.keys()
    assert all(types == {"cuda"} for types in devices.seen.values()), dict(devices.seen)
    assert left == [[]]
    return ended


def run_on_cpu(target: Checkpoint, directory: Path, **changes: Any) -> bool:
    return run(target, directory, **{**SMALL, **changes})


def state(directory: Path) -> dict[str, torch.Tensor]:
    """The last state of a run: weights, their average and moments."""
    return safetensors.torch.load_file(max((directory / "states").iterdir()))


def assert_same(one: Path, other: Path) -> None:
    """Two runs came to the same."""
    assert log(one, "step") == log(other, "step")
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert weights(one) == weights(other)


@pytest.fixture(scope="module", autouse=True)
def some_tokens_compared() -> Iterator[None]:
    """As with large vocabularies: those of a batch are chosen anew every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("draftwerk.training.run.MOST_COMPARED", 8)
        patch.setattr("draftwerk.training.compared_tokens._BY_CHANCE", 0)
        yield


@pytest.fixture(scope="module")
def whole(target: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the CPU."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert run_on_cpu(target, directory)
    assert len(log(directory, "step")) > 2
    return directory


def test_a_run_on_a_gpu_is_the_one_on_the_cpu(target: Checkpoint, whole: Path, tmp_path: Path) -> None:
    assert run_on_gpu(target, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_so_it_is_in_bf16_and_with_gradients_that_are_added_up(target: Checkpoint, tmp_path: Path) -> None:
    assert run_on_cpu(target, tmp_path / "cpu", precision="bf16", accumulate=2)
    assert run_on_gpu(target, tmp_path / "gpu", precision="bf16", accumulate=2)
    assert_same(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("head", ["own, centroids", "reduced, centroids"])
def test_so_it_is_with_a_drafter_to_go_on_from(tmp_path: Path, head: str) -> None:
    """Gemma 4's; no clusters are learned with a head of its own."""
    published, checkpoint = tiny_training.published(tmp_path, head, vocab_size=VOCABULARY, cluster_size=13)
    target = with_tokenizer(Path(checkpoint.path))
    assert run_on_cpu(target, tmp_path / "cpu", start_from=str(published))
    assert run_on_gpu(target, tmp_path / "gpu", start_from=str(published))
    assert_same(tmp_path / "gpu", tmp_path / "cpu")


@pytest.mark.parametrize("parts", [(run_on_cpu, run_on_gpu), (run_on_gpu, run_on_cpu)], ids=["to a GPU", "from a GPU"])
def test_a_run_goes_on_on_another_device(
    target: Checkpoint, whole: Path, tmp_path: Path, parts: tuple[Callable[..., bool], Callable[..., bool]]
) -> None:
    notes = Notes()
    assert not parts[0](target, tmp_path / "run", notes=notes, stop=lambda: len(notes.steps) == 2)
    assert parts[1](target, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_a_run_of_hours_is_rehearsed_on_a_gpu(target: Checkpoint, tmp_path: Path) -> None:
    assert run_on_gpu(target, tmp_path / "run", tokens=None, hours=1e-6, clusters=0)
    assert len(log(tmp_path / "run", "step")) == RunDirectory(tmp_path / "run").read()["plan"]["steps"] == 1


# Not experts: on a GPU transformers multiplies them by kernels that there are for CUDA alone.
@pytest.mark.parametrize("family", [family for family in MODELS if family != "moe"])
def test_what_a_target_computes_on_a_gpu(tmp_path: Path, family: str) -> None:
    """In transformers' classes, some of which make tensors on the way."""
    model, ids = MODELS[family](seed=2), torch.from_numpy(tiny_training.random_ids(2, 40))
    with pretend_gpu():
        here = tiny_training.frozen(model, tmp_path / "here")
        there = tiny_training.frozen(model, tmp_path / "there", device="cuda")
        expected, features = here.features(ids), there.features(ids.to("cuda"))
        pairs = [(features.states, expected.states), (there.logits(features.states), here.logits(expected.states))]
        pairs += [(features.keys[kind], keys) for kind, keys in expected.keys.items()]
        pairs += [(features.values[kind], values) for kind, values in expected.values.items()]
        pairs += [(there.inputs_of_layer(2, ids.to("cuda")), here.inputs_of_layer(2, ids))]
    for on_gpu, on_cpu in pairs:
        assert on_gpu.device == GPU
        assert torch.equal(on_gpu.cpu(), on_cpu)


def test_a_gpu_with_too_little_memory_is_one_line(
    target: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_gpu(free=1000), pytest.raises(TrainingError, match=r"more of the GPU, and 0\.0 are free: .*cpu"):
        run(target, tmp_path / "little", device="cuda", **SMALL)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("draftwerk.training.run.Trainer.steps", full)
    message = r"the GPU has too little memory to train there \(CUDA out of memory.*\); use --device cpu"
    with pretend_gpu(), pytest.raises(TrainingError, match=message):
        run(target, tmp_path / "less", device="cuda", **SMALL)

"""The pretended GPU, on which training is tested: it refuses what CUDA refuses, and computes what the CPU computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pretend_gpu import GPU, pretend_gpu
from torch import Tensor, nn
from torch.nn import functional


@dataclass
class Tensors:
    """Some of one device."""

    rows: Tensor
    index: Tensor
    number: Tensor

    @classmethod
    def on(cls, device: str) -> Tensors:
        rows = torch.arange(12.0, device=device).view(4, 3)
        return cls(rows, torch.tensor([2, 0, 1], device=device), torch.tensor(2.0, device=device))


Case = Callable[[Tensors, Tensors], object]

# What CUDA says "Expected all tensors to be on the same device" of, or the like.
REFUSED: dict[str, Case] = {
    "a sum": lambda there, here: there.rows + here.rows,
    "a sum with a number": lambda there, here: there.number + here.rows,
    "a sum that goes into a tensor of the CPU": lambda there, here: here.rows.add_(there.rows),
    "a number of the CPU that is changed": lambda there, here: here.number.add_(there.number),
    "a result of the CPU": lambda there, here: torch.exp(there.number, out=here.number),
    "a product": lambda there, here: there.rows @ here.rows.T,
    "a product with a number": lambda there, here: torch.dot(there.rows[0], here.number.expand(3)),
    "a linear layer": lambda there, here: functional.linear(here.rows, there.rows),
    "an embedding": lambda there, here: functional.embedding(here.index, there.rows),
    "values that are gathered": lambda there, here: there.rows.gather(0, here.index[None]),
    "values that are scattered": lambda there, here: there.rows.scatter_(0, here.index[None], 0.0),
    "rows that are chosen": lambda there, here: there.rows.index_select(0, here.index),
    "a mask": lambda there, here: there.rows.masked_fill(here.rows > 3, 0.0),
    "a choice": lambda there, here: torch.where(here.rows > 3, there.rows, there.rows),
    "tensors side by side": lambda there, here: torch.cat([there.rows, here.rows]),
    "numbers side by side": lambda there, here: torch.stack([there.number, here.number]),
    "a comparison of tensors": lambda there, here: torch.equal(there.rows, here.rows),
    "an index into a tensor of the CPU": lambda there, here: here.rows[there.index],
    "values to put behind an index": lambda there, here: there.rows.index_put_((there.index,), here.rows[:3]),
    "an optimizer's state": lambda there, here: torch._fused_adamw_(
        [there.rows], [there.rows], [there.rows], [here.rows], [], [there.number],
        lr=0.1, beta1=0.9, beta2=0.9, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
    ),
}  # fmt: skip

ACCEPTED: dict[str, Callable[[Tensors, Tensors], Tensor]] = {
    "a product with a number": lambda there, here: there.rows * here.number,
    "a number in front": lambda there, here: here.number - there.rows,
    "a limit": lambda there, here: torch.maximum(there.rows, here.number),
    "a choice of a number": lambda there, here: torch.where(there.rows > 3, there.rows, here.number),
    "a number behind a mask": lambda there, here: there.rows.masked_fill(there.rows > 3, here.number),
    "a copy from the CPU": lambda there, here: there.rows.copy_(here.rows + 1.0),
    "an index": lambda there, here: there.rows[here.index],
    "a mask as an index": lambda there, here: there.rows[here.rows[:, 0] > 3],
    "a number of the GPU as an index": lambda there, here: there.rows[here.index[0]],
    "rows behind an index": lambda there, here: there.rows.index_put((here.index,), there.rows[:3]),
    "a number behind an index": lambda there, here: there.rows.index_put((here.index,), here.number),
}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with pretend_gpu():
        yield


@pytest.mark.parametrize("name", REFUSED)
def test_tensors_of_both_devices_are_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="on the same device"):
        REFUSED[name](Tensors.on("cuda"), Tensors.on("cpu"))


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_cuda_does_with_tensors_of_both_devices(name: str) -> None:
    result = ACCEPTED[name](Tensors.on("cuda"), Tensors.on("cpu"))
    assert result.device == GPU
    assert torch.equal(result.cpu(), ACCEPTED[name](Tensors.on("cpu"), Tensors.on("cpu")))


def test_a_copy_to_the_cpu() -> None:
    there, here = Tensors.on("cuda"), Tensors.on("cpu")
    assert here.rows.copy_(there.rows + 1.0).device.type == "cpu"
    assert here.rows.tolist() == (there.rows + 1.0).tolist()


def test_arrays_of_numpy_are_on_the_cpu() -> None:
    tensor = torch.ones(2, device="cuda")
    for attempt in (lambda: tensor.numpy(), lambda: np.asarray(tensor)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            attempt()
    assert tensor.cpu().numpy().tolist() == [1.0, 1.0]


def test_numbers_by_chance_come_from_a_generator_of_the_same_device() -> None:
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, generator=torch.Generator(), device="cuda")


def test_tensors_are_where_they_were_asked_for() -> None:
    there = torch.device("cuda")
    moved = torch.ones(2).to(there)
    on_gpu = [
        torch.zeros(2, device=there),
        torch.tensor([1.0], device="cuda:0", requires_grad=True),
        torch.ones(2).cuda(),
        torch.zeros_like(torch.ones(2), device=there),
        torch.ones(2).to(moved),
        moved.new_zeros(3),
        moved.to(torch.bfloat16),
        moved[:1].exp(),
    ]
    assert {tensor.device for tensor in on_gpu} == {GPU}
    assert all(tensor.is_cuda for tensor in on_gpu)
    assert moved.to(there) is moved
    for tensor in (torch.ones(2), moved.cpu(), moved.to("cpu", torch.bfloat16), torch.zeros_like(moved, device="cpu")):
        assert tensor.device.type == "cpu"


def test_a_change_of_a_part_changes_the_whole() -> None:
    whole = torch.zeros(3, 2, device="cuda")
    whole[1:].add_(1.0)
    whole[0, 0] = 5.0
    assert whole.tolist() == [[5.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


def test_gradients_go_from_one_device_to_the_other() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    there = weight.to("cuda")
    (there * there).to("cpu").sum().backward()
    assert weight.grad is not None
    assert weight.grad.device.type == "cpu"
    assert weight.grad.tolist() == [2.0, 4.0]


def test_a_module_that_is_moved_keeps_its_parameters() -> None:
    module = nn.Linear(2, 2)
    before = list(module.parameters())
    module.to("cuda")
    assert all(one is other for one, other in zip(module.parameters(), before, strict=True))
    for parameter in (*before, *copy.deepcopy(module).parameters()):
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert parameter.device == GPU
    module(torch.ones(2, device="cuda")).sum().backward()
    assert {parameter.grad.device for parameter in before if parameter.grad is not None} == {GPU}


def test_autocast_is_that_of_the_cpu() -> None:
    rows = torch.ones(2, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        assert (rows @ rows).dtype == torch.bfloat16
    assert (rows @ rows).dtype == torch.float32

"""A GPU that is pretended, for tests of which device tensors are on: they say "cuda:0" and are computed by the CPU.

Within `with pretend_gpu():` PyTorch finds a GPU. What is made or moved there holds a tensor on the CPU, on which its
operations are done. Refused is what CUDA refuses: tensors of both devices in one operation, `numpy()` of one that is
there, a generator of the other device. Accepted is what CUDA accepts: copies, indices on the CPU into a tensor that is
there, and, where elements are computed one by one, a tensor of the CPU without dimensions beside those that are there.

It cannot show what CUDA's kernels compute, for which types of numbers there are any, and which round otherwise every
time; what autocast does there (here it is the CPU's); copies that nobody waited for; memory; or speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda:0")
CPU = torch.device("cpu")
BYTES = 1 << 40  # of its memory, all of it free

_aten = torch.ops.aten
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_MASKED = {_aten.masked_fill, _aten.masked_fill_}  # element by element, though PyTorch does not list them so


class GpuTensor(torch.Tensor):
    """A tensor that is there. For PyTorch's C++ it is one of the CPU without memory, for Python it is on the GPU.

    Attributes:
        held: what it is in truth.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> GpuTensor:
        strides, offset = held.stride(), held.storage_offset()
        make: Any = torch.Tensor._make_wrapper_subclass
        made: GpuTensor = make(cls, held.shape, strides, offset, dtype=held.dtype, device=CPU)
        made.held = held
        return made

    # Its operations are seen below, and calls of Python's by _Placement.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given: dict[int, torch.Tensor] = {}  # by what they are in truth

        def held(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            truth = value.held if isinstance(value, GpuTensor) else value
            given[id(truth)] = value
            return truth

        def placed(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            tensor = given.get(id(value))  # what is changed in place is returned as it was given
            if tensor is None:
                return GpuTensor(value)
            assert tensor.shape == value.shape, f"{func}: a change of shape in place is not pretended"
            return tensor

        held_args = _each(held, args)
        held_kwargs = {name: _each(held, value) for name, value in (kwargs or {}).items()}
        _check_devices(func, args, [tensor for tensor in given.values() if not isinstance(tensor, GpuTensor)])
        return _each(placed, func(*held_args, **held_kwargs))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _moved(self, *args, **kwargs)

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return _moved(self, CPU)

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"can't convert {GPU} device type tensor to numpy. Use Tensor.cpu() to copy it first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.held.tolist()

    def __format__(self, format_spec: str) -> str:
        return format(self.held, format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GpuTensor({self.held!r})"

    def untyped_storage(self) -> torch.UntypedStorage:
        """By which tensors are told that share their memory."""
        return self.held.untyped_storage()


class _Placement(TorchFunctionMode):
    """Sees every call of Python's meanwhile, and so which device it asks for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return _moved(*args, **kwargs)
        if func is torch.Tensor.cuda:
            return _moved(args[0], GPU)
        asked = kwargs.get("device")
        if asked is None or torch.device(asked).type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        on_gpu = torch.device(asked).type == "cuda"
        generator = kwargs.get("generator")
        if on_gpu and generator is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
        kwargs["device"] = CPU
        made = func(*args, **kwargs)
        if isinstance(made, GpuTensor) == on_gpu:
            return made
        return GpuTensor(made.detach()).requires_grad_(made.requires_grad) if on_gpu else made.held


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = tensor.dtype
        held = _held(tensor).to(dtype, copy=True)
        return held if isinstance(tensor, GpuTensor) else GpuTensor(held)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Move.apply(gradient[0], ctx.dtype), None  # type: ignore[no-untyped-call]


@contextmanager
def pretend_gpu(free: int = BYTES) -> Iterator[None]:
    """PyTorch finds a GPU meanwhile.

    Args:
        free: bytes of its memory that are said to be.
    """
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def autocast_of_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def is_enabled_for_cpu(device_type: str = "cuda") -> bool:
        return is_enabled("cpu" if device_type == "cuda" else device_type)

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("is_available", lambda: True),
            ("is_bf16_supported", lambda including_emulation=True: True),
            ("mem_get_info", lambda device=None: (free, BYTES)),
            ("empty_cache", lambda: None),
        ):
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "autocast", autocast_of_cpu)
        patch.setattr(torch, "is_autocast_enabled", is_enabled_for_cpu)
        # A module that is moved keeps its parameters, as between true devices.
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with _Placement():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Of a value, or of each of those in a list or tuple, however deep."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(function, inner) for inner in value)
    return function(value)


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, GpuTensor) else tensor


def _moved(tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to`."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    there = isinstance(tensor, GpuTensor)
    with torch._C.DisableTorchFunction():
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or (device.type == "cuda") == there:
            return torch.Tensor.to(tensor, None if there else device, dtype, copy=copy, memory_format=memory_format)
        moved: torch.Tensor = _Move.apply(tensor, dtype or tensor.dtype)  # type: ignore[no-untyped-call]
        return moved


def _check_devices(func: Any, args: Any, here: list[torch.Tensor]) -> None:
    """Refuses what CUDA refuses.

    Args:
        func: an operation on tensors, some of which are there.
        args: that it is given.
        here: the tensors among all that it is given that are not there.
    """
    packet = func.overloadpacket
    if not here or packet is _aten.copy_:
        return
    if packet in _INDEXED:
        indexed, indices, *values = args
        there = isinstance(indexed, GpuTensor)
        if not there and any(isinstance(index, GpuTensor) for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        put = values[0] if packet is not _aten.index else indexed
        if isinstance(put, GpuTensor) == there or put.dim() == 0:
            return
    elif (torch.Tag.pointwise in func.tags or packet in _MASKED) and all(tensor.dim() == 0 for tensor in here):
        written = [place for place, argument in enumerate(func._schema.arguments) if argument.is_write]
        if all(place < len(args) and isinstance(args[place], GpuTensor) for place in written):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! "
        f"(when checking the arguments of {func})"
    )

"""A simulated GPU: CUDA's rules without CUDA.

Its tensors say that they are on "cuda:0" and hold their values on the CPU, which computes. torch's
fake tensors check devices too, but have no values: nothing could be sampled, accepted or
constrained.

An operation that mixes devices raises RuntimeError, as on a GPU, except for explicit copies and
tensors without dimensions. What makes Python wait until the GPU has computed all that is queued is
recorded: values that Python reads, shapes that depend on values, and copies between devices, which
wait in both directions (unless the memory is pinned, which isn't simulated).
"""

import sys
from pathlib import Path
from typing import Any, Callable, Iterator, List

import torch
from torch.overrides import TorchFunctionMode

import llama

CUDA = torch.device("cuda", 0)
PACKAGE = Path(llama.__file__).parent
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
READING = (aten.item.default, aten.is_nonzero.default)


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated GPU; on the CPU for torch's C++, which may come without CUDA."""

    held: torch.Tensor
    gpu: "SimulatedGPU"
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor, gpu: "SimulatedGPU") -> "DeviceTensor":
        # In inference mode, a view of a tensor from before it is none of inference mode's.
        with torch.inference_mode(held.is_inference()):
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype
            )
        made.held, made.gpu = held.detach(), gpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tensors = [*_tensors((args, kwargs or {}))]
        gpu = next(x.gpu for x in tensors if isinstance(x, DeviceTensor))
        return gpu.compute(func, tensors, args, kwargs or {})


class SimulatedGPU(TorchFunctionMode):
    """While entered, tensors can be made on and copied to CUDA.

    Attributes:
        waits: where in the package Python waited for queued computation: "loop._sample", ...
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: List[str] = []
        self._queued = False  # whether anything was computed since Python last waited

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        here = isinstance(first, DeviceTensor)
        if func is torch.Tensor.tolist and here:
            self._wait()
            return first.held.tolist()
        if func in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.data_ptr) and here:
            if func is not torch.Tensor.cpu:
                raise TypeError(f"{func.__name__} of a tensor on {CUDA}")
            self._wait()
            return first.held.clone()
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            made = func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor):
                self._wait()  # from Python's values
            elif "empty" not in func.__name__:
                self._queued = True
            return DeviceTensor(made, self)
        return func(*args, **kwargs)

    def _to(self, tensor, *args, **kwargs):
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (torch.device, str))]
        target = torch.device(given[0]) if given else tensor.device
        if CUDA.type not in (target.type, tensor.device.type):
            return tensor.to(*args, **kwargs)
        dtypes = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
        dtype = dtypes[0] if dtypes else tensor.dtype
        if target.type == tensor.device.type:
            return tensor.to(dtype)
        self._wait()
        if isinstance(tensor, DeviceTensor):
            return tensor.held.to(dtype, copy=True)
        return DeviceTensor(tensor.to(dtype, copy=True), self)

    def compute(self, func, tensors, args, kwargs):
        """One of torch's operations, with at least one tensor on the GPU."""
        computes = not (func.is_view or "empty" in func.name())
        if func in INDEXING:
            # Lists of indices are copied to the GPU; tensors of bool are searched for True, except
            # to set their places to one value.
            indices = [i for i in args[1] if i is not None]
            value = args[2] if len(args) > 2 else None
            masked = any(i.dtype == torch.bool for i in indices)
            fills = len(indices) == 1 and value is not None and not isinstance(value, DeviceTensor)
            self._queued |= masked and not fills
            if (masked and not fills) or not all(isinstance(i, DeviceTensor) for i in indices):
                self._wait()
            tensors = [x for x in tensors if not any(x is i for i in indices)]
        elif func is aten.copy_.default:
            if not all(isinstance(x, DeviceTensor) for x in tensors[:2]):
                self._wait()
            tensors = []
        elif func in READING or torch.Tag.data_dependent_output in func.tags:
            self._wait()
            computes = False
        elif torch.Tag.dynamic_output_shape in func.tags or func is aten.where.default:
            self._queued = True
            self._wait()
            computes = False
        wrong = [tuple(x.shape) for x in tensors if x.dim() and not isinstance(x, DeviceTensor)]
        if wrong:
            raise RuntimeError(f"{func} mixes devices: {wrong} on the CPU, the others on {CUDA}")
        found = func(*_map(_held, args), **_map(_held, kwargs))
        self._queued |= computes
        if func._schema.is_mutable:  # what was written to is returned
            assert found is None or found is _held(args[0]), func
            return found if found is None else args[0]
        # `x.float()` of fp32 is x itself.
        same = next((x for x in tensors if found is _held(x)), None)
        return _map(lambda x: DeviceTensor(x, self), found) if same is None else same

    def _wait(self) -> None:
        if self._queued:
            self.waits.append(next(_places()))
        self._queued = False


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple, dict)):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _tensors(part)


def _map(function: Callable[[torch.Tensor], Any], found: Any) -> Any:
    """The same with each tensor replaced. (torch's pytrees do this, ten times slower.)"""
    if isinstance(found, torch.Tensor):
        return function(found)
    if isinstance(found, dict):
        return {name: _map(function, part) for name, part in found.items()}
    return type(found)(_map(function, x) for x in found) if type(found) in (list, tuple) else found


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, DeviceTensor) else tensor


def _places() -> Iterator[str]:
    """The package's functions that are being called, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        if path.is_relative_to(PACKAGE):
            yield f"{path.stem}.{name.split('.<locals>')[0]}"
        frame = frame.f_back
    yield "outside of the package"

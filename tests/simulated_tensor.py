"""Tensors of a simulated device: they say `cuda:0`, and what is done with them is queued on a stream."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from simulated_device import BACKEND, DEVICE, Memory, Simulator, plain
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
_OWN_TYPES = (DEVICE.type, BACKEND.type)
_READ_BY_HOST = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_OF_UNKNOWN_SIZE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device. values: where its values will be, in host memory. memory: what holds them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]
    memory: Memory
    device = property(lambda self: DEVICE)

    @staticmethod
    def __new__(cls, values: torch.Tensor, memory: Memory) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=BACKEND,  # which autograd accepts without CUDA
        )
        made.values, made.memory = values, memory
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        simulator = next(t.memory.simulator for t in tree_leaves((args, kwargs)) if isinstance(t, DeviceTensor))
        return dispatched(simulator, function, args, kwargs or {})

    # What torch's own methods would ask CUDA for before they dispatch.

    def item(self) -> Any:
        return aten._local_scalar_dense.default(self)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def cpu(self, memory_format: Any = None) -> torch.Tensor:
        return aten._to_copy.default(self, device=torch.device("cpu"))

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of the simulated device cannot become a numpy array")

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "DeviceTensor":
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> "DeviceTensor":
        return self if self.is_contiguous() else aten.clone.default(self, memory_format=memory_format)

    def new_tensor(self, data: Any, **how: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=self.dtype).to(DEVICE)

    def __getitem__(self, index: Any) -> torch.Tensor:
        view, tensors = self._indexed(index)
        return view if tensors is None else aten.index.Tensor(view, tensors)

    def __setitem__(self, index: Any, value: Any) -> None:
        view, tensors = self._indexed(index)
        if tensors is not None:
            value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=self.dtype).to(DEVICE)
            aten.index_put_.default(view, tensors, value)
        elif isinstance(value, torch.Tensor):
            view.copy_(value)
        else:
            view.fill_(value)

    def _indexed(self, index: Any) -> tuple[torch.Tensor, list[torch.Tensor | None] | None]:
        """The view that the plain indices select, and a tensor or None for each of its first dimensions."""
        index = [torch.as_tensor(i) if isinstance(i, (list, np.ndarray)) else i for i in _as_tuple(index)]
        taken = sum(i.ndim if _is_mask(i) else 1 for i in index if i is not None and i is not Ellipsis)
        at = next((n for n, i in enumerate(index) if i is Ellipsis), None)
        if at is not None:
            index[at : at + 1] = [slice(None)] * (self.ndim - taken)
        view: torch.Tensor = self
        dim, tensors = 0, list[torch.Tensor | None]()
        for i in index:
            if isinstance(i, torch.Tensor):
                tensors.append(i)
                dim += i.ndim if _is_mask(i) else 1
            elif i is None or isinstance(i, slice):
                if i is None:
                    view = view.unsqueeze(dim)
                elif i != slice(None):
                    view = aten.slice.Tensor(view, dim, i.start, i.stop, i.step or 1)
                tensors.append(None)
                dim += 1
            else:
                view = aten.select.int(view, dim, int(i))
        return view, tensors if any(tensor is not None for tensor in tensors) else None


def _as_tuple(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple) else (index,)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


class Dispatch(TorchDispatchMode):
    """Sees the operations of which no argument is a tensor of the device, but whose result may be."""

    def __init__(self, simulator: Simulator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._simulator = simulator

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(self._simulator, function, args, kwargs or {}, self)


@contextmanager
def tensors_made_on_host(patch: pytest.MonkeyPatch, simulator: Simulator) -> Iterator[None]:
    """Make `torch.tensor(..., device=...)`, which looks for a real device before it dispatches, copy instead."""
    made = torch.tensor

    def tensor(data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
        values = made(data, **how)
        return values if device is None or torch.device(device).type == "cpu" else values.to(device)

    patch.setattr(torch, "tensor", tensor)
    yield


def dispatched(simulator: Simulator, function: Any, args: Any, kwargs: Any, mode: Any = None) -> Any:
    """Do what an operation does: queue it, unless it is the host's or makes the host wait."""
    leaves = tree_leaves((args, kwargs))
    own = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
    if not own and not any(isinstance(leaf, torch.device) and leaf.type in _OWN_TYPES for leaf in leaves):
        return _on_host(simulator, function, args, kwargs)
    if function._can_decompose():
        with mode or nullcontext():
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if function is aten._to_copy.default:
        moved = _moved(simulator, args[0], kwargs)
        if moved is not None:
            return moved
        kwargs = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking")}
    elif function is aten.copy_.default:
        return _copied(simulator, *args, **kwargs)
    else:
        _require_one_device(simulator, function, args, leaves)
    return _on_device(simulator, function, args, kwargs, own)


def _on_host(simulator: Simulator, function: Any, args: Any, kwargs: Any) -> Any:
    """An operation without the device; page-locked memory is locked until the process ends, as torch keeps it."""
    if not kwargs.get("pin_memory"):
        return function(*args, **kwargs)
    made = function(*args, **{**kwargs, "pin_memory": False})
    _spoil(made)
    simulator.locked[made.data_ptr()] = made.nbytes
    simulator.kept.append(made)
    return made


def _moved(simulator: Simulator, source: torch.Tensor, how: dict[str, Any]) -> torch.Tensor | None:
    """A copy on the other device; None if there is no other."""
    dtype, is_async = how.get("dtype") or source.dtype, bool(how.get("non_blocking"))
    if not isinstance(source, DeviceTensor):
        like = plain(lambda: torch.empty_like(source, device="meta"))
        target = empty(simulator, like.shape, like.stride(), dtype)
        return _copied(simulator, target, source, is_async)
    device = how.get("device")
    if device is None or torch.device(device).type in _OWN_TYPES:
        return None
    with _disable_current_modes():
        host = torch.empty(source.shape, dtype=dtype)
    return _copied(simulator, host, source, is_async)


def _copied(
    simulator: Simulator, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
) -> torch.Tensor:
    """`target.copy_(source)`, between devices or on the simulated one.

    The driver may copy late from and to host memory, locked or not, when it is told that nobody waits.
    """
    values = source.values if isinstance(source, DeviceTensor) else source
    if isinstance(target, DeviceTensor):
        place = target.values
        if not isinstance(source, DeviceTensor) and not non_blocking:
            simulator.host_waits("copy from host")
            values = plain(source.clone)
        simulator.stream.push(lambda: place.copy_(values))
        if not isinstance(source, DeviceTensor) and non_blocking and not simulator.is_locked(source):
            simulator.host_waits("copy from pageable memory")
        return target
    if non_blocking:
        if not simulator.is_locked(target):
            simulator.host_waits("copy to pageable memory")
        simulator.stream.push(lambda: target.copy_(values))
        return target
    simulator.wait_for_values("copy to host")
    with _disable_current_modes(), torch.inference_mode(target.is_inference()):
        target.copy_(values)
    return target


def _spoil(target: torch.Tensor) -> None:
    """Overwrite host memory that holds nothing yet."""
    with _disable_current_modes(), torch.inference_mode():
        if target.is_floating_point():
            target.fill_(float("nan"))
        elif target.dtype != torch.bool:
            target.fill_(torch.iinfo(target.dtype).max)


def _require_one_device(simulator: Simulator, function: Any, args: Any, leaves: Sequence[Any]) -> None:
    """Refuse tensors of host memory beside tensors of the device; indices are copied, for which the host waits."""
    host = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, DeviceTensor)]
    mixed = [t for t in host if t.ndim and t.device.type != "meta"]
    if mixed and function in _INDEXED and not any(t is args[0] for t in mixed):
        simulator.host_waits("index from host")
    elif mixed:
        sizes = [(tuple(t.shape), t.dtype) for t in mixed]
        raise RuntimeError(f"expected all tensors to be on the same device; {function} got {sizes} in host memory")


def _on_device(simulator: Simulator, function: Any, args: Any, kwargs: Any, own: Sequence[DeviceTensor]) -> Any:
    """Queue an operation all of whose tensors are on the device; returns its result, not yet computed."""
    kwargs = {name: _on_cpu(name, value, "cpu") for name, value in kwargs.items() if name != "pin_memory"}
    real_args, real_kwargs = tree_map(_values, args), tree_map(_values, kwargs)
    if function in _READ_BY_HOST:
        simulator.wait_for_values("value")
        with _disable_current_modes():
            return function(*real_args, **real_kwargs)
    if _is_view(function):
        with _disable_current_modes():
            views = function(*real_args, **real_kwargs)
        with torch.inference_mode(own[0].is_inference()):  # autograd shares the version of what is viewed
            return tree_map(lambda t: DeviceTensor(t, own[0].memory) if isinstance(t, torch.Tensor) else t, views)
    if function in _OF_UNKNOWN_SIZE or (function in _INDEXED and any(map(_is_mask, args[1] or ()))):
        simulator.wait_for_values("size")
        found = plain(lambda: function(*real_args, **real_kwargs))
        if function._schema.is_mutable:
            return args[0]
        return tree_map(lambda t: filled(simulator, t) if isinstance(t, torch.Tensor) else t, found)
    if function._schema.is_mutable:
        simulator.stream.push(lambda: function(*real_args, **real_kwargs))
        if not function._schema.returns:  # of several tensors at once
            return None
        written = [args[i] if i < len(args) else kwargs[a.name] for i, a in enumerate(function._schema.arguments)
                   if a.alias_info is not None and a.alias_info.is_write]  # fmt: skip
        return written[0] if len(written) == 1 else tuple(written)
    return _computed(simulator, function, real_args, real_kwargs)


def _computed(simulator: Simulator, function: Any, args: Any, kwargs: Any) -> Any:
    """New tensors for a function's results, whose sizes are found without computing them."""
    if function is aten.mm.dtype:  # which torch has for CUDA only
        a, b, dtype = args[0], args[1], args[2]
        product = empty(simulator, (a.shape[0], b.shape[1]), (b.shape[1], 1), dtype)
        place = product.values
        simulator.stream.push(lambda: place.copy_(a.to(dtype) @ b.to(dtype)))
        return product
    found = _shapes_of_results(function, args, kwargs)
    results = tree_map(lambda t: empty(simulator, t.shape, t.stride(), t.dtype) if _is_tensor(t) else t, found)
    places = [t.values for t in tree_leaves(results) if isinstance(t, DeviceTensor)]

    def compute() -> None:
        values = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, torch.Tensor)]
        for place, value in zip(places, values, strict=True):
            place.copy_(value)

    simulator.stream.push(compute)
    return results


_known: dict[Any, Any] = {}


def _shapes_of_results(function: Any, args: Any, kwargs: Any) -> Any:
    """Tensors without values in the place of a function's results; found once for arguments of the same sizes."""
    leaves = [(t.shape, t.stride(), t.dtype) if _is_tensor(t) else t for t in tree_leaves((args, kwargs))]
    key = (function, tuple(kwargs), repr(leaves), len(args))
    if key not in _known:
        with _disable_current_modes(), torch.inference_mode():
            shaped = tree_map(_shape_of, (args, {n: _on_cpu(n, v, "meta") for n, v in kwargs.items()}))
            _known[key] = function(*shaped[0], **shaped[1])
    return _known[key]


def _on_cpu(name: str, value: Any, device: str) -> Any:
    return torch.device(device) if name == "device" and value is not None else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, DeviceTensor) else value


def _shape_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _is_view(function: Any) -> bool:
    returned = function._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def empty(simulator: Simulator, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> DeviceTensor:
    """A new tensor on the current stream, filled with NaN."""
    count = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    memory = simulator.allocate(count * dtype.itemsize)
    block = memory.block
    return DeviceTensor(plain(lambda: block[: count * dtype.itemsize].view(dtype).as_strided(size, stride)), memory)


def filled(simulator: Simulator, values: torch.Tensor) -> DeviceTensor:
    """A new tensor with these values."""
    made = empty(simulator, values.shape, plain(values.contiguous).stride(), values.dtype)
    place = made.values
    simulator.stream.push(lambda: place.copy_(values))
    return made

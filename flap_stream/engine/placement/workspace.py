"""The workspace of a layer, found by running it on fake tensors, which have sizes but no memory."""

import json
import weakref
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flap_stream.arithmetic.moments import window_moments
from flap_stream.engine.memory import OWN_BLOCK_BYTES, give_back_heap
from flap_stream.engine.wide_attention import wide_attention
from flap_stream.model.skeleton import LayerCall, Skeleton

Way = Literal["forward", "backward", "experts", "fit"]


def layer_workspace(
    config: Mapping[str, Any], batch: tuple[int, int], dtype: torch.dtype, device: str, way: Way
) -> tuple[int, int]:
    """Peak bytes alive, without weights but with the batch itself, while one batch runs through any layer.

    Only the widest and the largest layer are tried. Results are cached.
    config: of config.json. batch: windows and tokens of each. device: the type of the one that the job is for.
    way: whether gradients flow `backward` through the layers, also to the outputs of mixtures of `experts`, or to the
    layers' own tensors, to `fit` them.
    The second figure counts only tensors smaller than `memory.OWN_BLOCK_BYTES`.
    """
    return _workspace(json.dumps(config), batch, dtype, device, way)


@lru_cache(maxsize=256)
def _workspace(config: str, batch: tuple[int, int], dtype: torch.dtype, device: str, way: Way) -> tuple[int, int]:
    skeleton = _skeleton(config)
    indices = range(len(skeleton.layers))
    widest = max(indices, key=lambda i: skeleton.layer_shape(i).neurons)
    largest = max(indices, key=lambda i: sum(map(prod, skeleton.layer_tensors(i).values())))
    peak, small_peak, dtypes = 0, 0, skeleton.dtypes(dtype)
    # The same mode on every call: what a module caches in one call must be usable in the next.
    differentiates = way != "forward"
    with torch.set_grad_enabled(differentiates), torch.inference_mode(not differentiates), _fake_mode():
        embeds, live = torch.empty((*batch, skeleton.config["hidden_size"]), dtype=dtype), _LiveBytes()
        with live:
            _, calls = skeleton.outer.record(embeds)
            hidden = torch.empty((*batch, skeleton.state.width), dtype=dtype)
        for index in {widest, largest}:
            sizes = skeleton.layer_tensors(index)
            weights = {name: torch.empty(size, dtype=dtypes(name)) for name, size in sizes.items()}
            handles = [] if differentiates else _take_moments(skeleton, index, device)
            with live:
                if differentiates:
                    with wide_attention(dtype, device):
                        if way == "fit":
                            _run_fit(skeleton, index, weights, hidden, calls[index])
                        else:
                            _run_backward(skeleton, index, weights, hidden, calls[index], way == "experts")
                else:
                    skeleton.run_layer(index, weights, hidden, calls[index])
            peak, small_peak = max(peak, live.peak), max(small_peak, live.small_peak)
            for handle in handles:
                handle.remove()
    give_back_heap()  # fake tensors leave more behind than real ones
    return peak, small_peak


@lru_cache(maxsize=1)
def _skeleton(config: str) -> Skeleton:
    """A skeleton for nothing else, since these runs leave traces in it."""
    skeleton = Skeleton(json.loads(config), "the model")
    skeleton.ignore_values()  # fake tensors have none
    return skeleton


def _run_backward(
    skeleton: Skeleton,
    index: int,
    weights: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    call: LayerCall,
    of_experts: bool,
) -> None:
    """Do what the loss stage does with a layer; what whole experts take after that is less than the graph."""
    leaf = hidden.detach().requires_grad_()
    reads: list[torch.Tensor] = []
    handles = [
        projection.register_forward_pre_hook(lambda _module, inputs: reads.append(inputs[0]))
        for projection in _output_projections(skeleton, index)
    ]
    if of_experts and skeleton.layer_shape(index).experts:
        experts = skeleton.mixture(index).experts
        handles.append(experts.register_forward_hook(lambda _module, _inputs, output: reads.append(output)))
    output = skeleton.run_layer(index, weights, leaf, call)
    for handle in handles:
        handle.remove()
    torch.autograd.grad(output, [leaf, *reads], torch.empty_like(output))  # of which sums are taken in small blocks


def _run_fit(
    skeleton: Skeleton, index: int, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor, call: LayerCall
) -> None:
    """Do what a reconstruction does with a layer, whose parameters' gradients count elsewhere."""
    sources = [weight.requires_grad_() for weight in weights.values()]
    output = skeleton.run_layer(index, weights, hidden, call)
    error = (output.float() - torch.empty_like(output).float()).square().mean(dim=-1).sum()
    torch.autograd.grad(error, sources, allow_unused=True)


def _take_moments(skeleton: Skeleton, index: int, device: str) -> list[Any]:
    """Hooks that compute the moments that collection takes on a device; returns their handles."""

    def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        window_moments(inputs[0] if inputs[0].ndim == 3 else inputs[0][None], device)

    return [projection.register_forward_pre_hook(hook) for projection in _output_projections(skeleton, index)]


def _output_projections(skeleton: Skeleton, index: int) -> list[nn.Module]:
    """The modules of a layer whose inputs are pruned, without those of which nothing is left."""
    layer, tensors = skeleton.layers[index], skeleton.layer_tensors(index)
    names = (part.kind.output.name for part in skeleton.family.parts(skeleton.layer_shape(index)))
    return [layer.get_submodule(name) for name in names if f"{name}.weight" in tensors]


@lru_cache(maxsize=1)
def _fake_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, for as long as anyone holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.small_live = self.small_peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if any(value.alias_info is not None for value in function._schema.returns):
            return output  # a view takes no memory, even if what it is of has not been seen, such as a weight
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return output

    def _count(self, change: int) -> None:
        self.live += change
        self.small_live += change if abs(change) < OWN_BLOCK_BYTES else 0
        self.peak, self.small_peak = max(self.peak, self.live), max(self.small_peak, self.small_live)

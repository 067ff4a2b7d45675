"""A decoder layer's mixture of experts while its router chooses among some of them only."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from flap_stream.model.architecture import Family
from flap_stream.modeling.modeling_flap_stream import router_modules, run_experts


def expert_share(config: PreTrainedConfig, experts: int) -> float:
    """Share of a layer's experts that a token is routed to; 1 without experts."""
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    chosen = max(chosen) if isinstance(chosen, list) else chosen  # of HunYuan one for each layer
    return (chosen or experts) / experts if experts else 1.0


class Mixture:
    """The module of a decoder layer that has a router and separate experts.

    path: of the module inside the layer. needs: the least number of experts that the router can choose among: those
    that a token goes to; two for a router that scores groups of experts by the best two of each.
    groups: into which the router divides its experts; 1 if it does not.
    """

    def __init__(self, layer: nn.Module, family: Family) -> None:
        self.path = family.mixture_path
        self.module: Any = layer.get_submodule(self.path)
        self.experts: Any = self.module.experts
        names = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        self._axes = family.router_axes(names)
        routers = router_modules(self.module)
        self.groups = max(getattr(router, "num_group", 1) or 1 for router in routers)
        grouped = any(hasattr(router, "num_group") for router in routers)
        self.needs = max(2 if grouped else 1, *(getattr(router, "top_k", 1) for router in routers))

    @contextmanager
    def only(self, kept: Sequence[int]) -> Iterator[None]:
        """In the block, the experts are these, ascending; the module is to run with the tensors that `cut` returns."""
        counted = [module for module in router_modules(self.module) if hasattr(module, "num_experts")]
        before = [module.num_experts for module in counted]
        each = self.experts.each  # whose modules may be replaced while the block runs
        self.experts.forward = lambda *inputs: run_experts([each[number] for number in kept], *inputs)
        for module in counted:
            module.num_experts = len(kept)
        try:
            yield
        finally:
            del self.experts.forward
            for module, count in zip(counted, before, strict=True):
                module.num_experts = count

    def cut(self, weights: Mapping[str, torch.Tensor], kept: Sequence[int]) -> dict[str, torch.Tensor]:
        """The layer's tensors, those of the router cut to these experts."""
        found = dict(weights)
        for name, axis in self._axes.items():
            found[name] = weights[name].index_select(axis, torch.tensor(kept, device=weights[name].device))
        return found

    def without_experts(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The module's tensors but the experts', by their names in it, from those of the layer."""
        own = {name.removeprefix(f"{self.path}."): t for name, t in weights.items() if name.startswith(f"{self.path}.")}
        return {name: tensor for name, tensor in own.items() if not name.startswith("experts.")}

    def of_experts(self, weights: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Each expert's tensors, by their names in it, from those of the layer."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.experts.each]
        for name, tensor in weights.items():
            if name.startswith(prefix := f"{self.path}.experts.each."):
                number, _, own = name.removeprefix(prefix).partition(".")
                found[int(number)][own] = tensor
        return found

    def run_expert(self, number: int, tensors: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """The output of one expert, `[token, hidden]`. tensors: its own."""
        return functional_call(self.experts.each[number], tensors, (inputs,))

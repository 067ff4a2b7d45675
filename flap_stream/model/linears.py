"""Which tensors of a model are the weights of plain linears, which transformers' FP8 quantisation is about."""

from torch import nn

from flap_stream.model.skeleton import Skeleton


def linear_weights(skeleton: Skeleton) -> frozenset[str]:
    """Full names of the weights of the linears in decoder layers, except those of routers."""
    found = set()
    for i, layer in enumerate(skeleton.layers):
        linears = {f"{path}.weight" for path, module in layer.named_modules() if type(module) is nn.Linear}
        if skeleton.family.experts is not None:
            linears -= skeleton.family.router_axes(skeleton.layer_tensors(i)).keys()
            linears = {name for name in linears if "router" not in name.split(".")}
        found |= {f"{skeleton.family.layer_prefix(i)}{name}" for name in linears}
    return frozenset(found)

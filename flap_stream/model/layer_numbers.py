"""A model that loses whole decoder layers: the others are numbered anew, in its config.json, too.

What a layer computes may depend on its number. Whether config.json can say the same of the new numbers is not a matter
of families here: the model is built from both, without weights, and the layers are compared.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from flap_stream.errors import UnsupportedModel
from flap_stream.model.skeleton import Skeleton, settings

# Keys of config.json: with a value for each layer; with the numbers of some layers; with the number of the layer where
# something begins, or that is the last of something.
_OF_EACH = (
    *("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta"),
    *("num_attention_heads_per_layer", "num_experts", "moe_topk", "pruned_expert_sizes", "pruned_neurons"),
)
_OF_SOME = ("mlp_only_layers", "moe_layers")
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_LAST = "moe_layer_end_index"
_NUMBERS = ("layer_idx", "training")  # attributes of a layer's modules that are not compared


def renumbered_config(skeleton: Skeleton, kept: Sequence[int]) -> dict[str, Any]:
    """The contents of config.json for a model that has these layers only, ascending.

    skeleton: of the model with all layers.
    Raises UnsupportedModel if a layer would compute something else under its new number, or if no layer is left whose
    KV cache counts tokens.
    """
    if not skeleton.state.is_plain:
        raise UnsupportedModel(
            f"no layers can be removed from {skeleton.where}, where they hand on more than hidden states; prune "
            "neurons instead"
        )
    known, count = skeleton.hf_config.to_dict(), len(skeleton.layers)
    config = {**skeleton.config, **_renumbered({**skeleton.config, **known}, kept, count)}
    cut = Skeleton(config, skeleton.where)
    renumbered = _renumbered(cut.hf_config.to_dict(), range(len(kept)), len(kept))
    changed = [key for key in _OF_EACH if key in renumbered and renumbered[key] != config[key]]
    if changed:
        raise UnsupportedModel(
            f"no layers can be removed from {skeleton.where}: transformers derives {', '.join(changed)} from layers' "
            "numbers, whatever config.json says; prune heads and neurons instead"
        )
    for number, layer in zip(kept, cut.layers, strict=True):
        if not _are_alike(layer, skeleton.layers[number]):
            raise UnsupportedModel(
                f"no layers can be removed from {skeleton.where}: what layer {number} computes depends on its number "
                "in a way that config.json cannot say of another; prune heads and neurons instead"
            )
    if not _counts_tokens(cut):
        raise UnsupportedModel(
            f"of {skeleton.where} no attention would be left whose cache counts tokens, only layers {list(kept)}; "
            "lower the ratio"
        )
    return config


def _counts_tokens(skeleton: Skeleton) -> bool:
    """Whether a model's cache knows how many tokens it has seen."""
    layers = DynamicCache(config=skeleton.hf_config).layers
    return not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)


def _renumbered(config: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """What a config says of layers by their number, for those that are kept of `count`."""
    found: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in _OF_EACH:
        if isinstance(values := config.get(key), list | tuple) and len(values) == count:
            found[key] = [values[number] for number in kept]
    for key in _OF_SOME:
        if isinstance(values := config.get(key), list | tuple):
            found[key] = [new for new, number in enumerate(kept) if number in values]
    for key in _FIRST:
        if isinstance(first := config.get(key), int):
            found[key] = sum(number < first for number in kept)
    if isinstance(last := config.get(_LAST), int) and last >= 0:
        found[_LAST] = sum(number <= last for number in kept) - 1
    if isinstance(layers := config.get("per_layer_config"), Mapping):
        own = {int(number): values for number, values in layers.items()}
        found["per_layer_config"] = {str(new): own[number] for new, number in enumerate(kept) if number in own}
    return found


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two layers compute the same with the same weights."""
    pairs = list(zip(one.named_modules(), other.named_modules(), strict=False))
    return len(pairs) == len(list(one.modules())) == len(list(other.modules())) and all(
        name == name_there and _is_alike(own, there) for (name, own), (name_there, there) in pairs
    )


def _is_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are, without those in them."""
    values, there = (
        {key: value for key, value in settings(module).items() if key not in _NUMBERS} for module in (one, other)
    )
    shapes = [{name: p.shape for name, p in module.named_parameters(recurse=False)} for module in (one, other)]
    buffers = [dict(module.named_buffers(recurse=False)) for module in (one, other)]
    same = type(one) is type(other) and values == there and shapes[0] == shapes[1]
    return (
        same
        and buffers[0].keys() == buffers[1].keys()
        and all(torch.equal(own, buffers[1][name]) for name, own in buffers[0].items())
    )

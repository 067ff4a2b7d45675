"""Which matrices of a checkpoint are written in FP8, and what config.json says of that, as transformers reads it."""

import logging
from collections.abc import Iterator
from math import gcd
from typing import Any

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.config import FP8_BLOCK, RewriteConfig
from flap_stream.errors import InvalidOption
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.linears import linear_weights
from flap_stream.model.safetensors_format import FORWARD_DTYPES
from flap_stream.model.skeleton import Skeleton
from flap_stream.output.pruned_model import PrunedModel
from flap_stream.output.shard_plan import OutputTensor, ShardPlan

logger = logging.getLogger(__name__)


def fp8_linears(source: Checkpoint, options: RewriteConfig, skeleton: Skeleton | None = None) -> frozenset[str] | None:
    """Names of the weights that are to be written in FP8 if their sizes allow it; None if none are.

    skeleton: of the model; None makes one. Raises InvalidOption for a model of which hardly any matrix could be.
    """
    if options.output_dtype != "fp8":
        return None
    if source.config["hidden_size"] % FP8_BLOCK:
        raise InvalidOption(
            f"--output-dtype fp8 needs matrices whose rows and columns are multiples of {FP8_BLOCK}, but the hidden "
            f"size of {source.source} is {source.config['hidden_size']}; leave it out"
        )
    return linear_weights(skeleton or Skeleton(source.config, source.source))


def fp8_config(pruned: PrunedModel, plan: ShardPlan) -> dict[str, Any]:
    """The keys of config.json; none if nothing is written in FP8."""
    if pruned.linears is None:
        return {}
    dtype = next(tensor.codes_of.dtype for tensor in _tensors(plan) if tensor.codes_of is not None)
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "modules_to_not_convert": _not_converted(pruned, plan),
    }
    return {"dtype": FORWARD_DTYPES[dtype], "quantization_config": quantization}


def tell_unconverted(pruned: PrunedModel, plan: ShardPlan, warns: bool) -> None:
    """Warn of pruned linears that stay as they are because their sizes do not fill blocks.

    warns: whether to; only one of several ranks should. Raises InvalidOption if all of them stay.
    """
    if pruned.linears is None:
        return
    converted = sum(tensor.codes_of is not None for tensor in _tensors(plan))
    units = _unit_weights(pruned)
    left = [tensor for tensor in _tensors(plan) if tensor.codes_of is None and tensor.name in units]
    if not converted:
        raise InvalidOption(
            f"--output-dtype fp8 would write nothing in FP8: no matrix of the pruned {pruned.source.source} has "
            f"rows and columns that are multiples of {FP8_BLOCK}; prune with {_remedy(pruned)}"
        )
    if left and warns:
        logger.warning(
            "%d matrices are not written in FP8, such as %s with %s; rows and columns must be multiples of %d, for "
            "which prune with %s",
            len(left),
            left[0].name,
            " x ".join(map(str, left[0].shape)),
            FP8_BLOCK,
            _remedy(pruned),
        )


def _unit_weights(pruned: PrunedModel) -> set[str]:
    """Names, in the files, of the linears' weights whose sizes pruning decides."""
    assert pruned.linears is not None
    outer = str if pruned.source.wrapper is None else pruned.source.wrapper.outer
    names = {
        f"{pruned.family.layer_prefix(i)}{projection.name}.weight"
        for i, (shape, _) in enumerate(pruned.kept)
        for part in pruned.family.parts(shape)
        for projection in part.kind.projections
    }
    return set(map(outer, names & pruned.linears))


def _remedy(pruned: PrunedModel) -> str:
    """The options with which more matrices have whole blocks."""
    shape, remedy = pruned.shapes[0], f"--round-neurons-to {FP8_BLOCK}"
    if shape.head_dim % FP8_BLOCK == 0 or not pruned.family.prunes(Sublayer.ATTENTION):
        return remedy
    heads = FP8_BLOCK // gcd(FP8_BLOCK, shape.head_dim) * shape.heads_per_group
    return f"{remedy} and --round-heads-to {heads}"


def _tensors(plan: ShardPlan) -> Iterator[OutputTensor]:
    return (tensor for shard in plan.shards for tensor in shard.tensors)


def _not_converted(pruned: PrunedModel, plan: ShardPlan) -> list[str]:
    """Modules that are not in FP8: outside the decoder layers by the first name that tells them from these.

    A name that begins a module's path covers everything in it. Experts, whose own linears are in FP8, are named by the
    end of their path, which covers nothing else: transformers would put its own in their place.
    """
    family, wrapper = pruned.family, pruned.source.wrapper
    inner, outer = (str, str) if wrapper is None else (wrapper.inner, wrapper.outer)
    layers = outer(f"{family.layers}.0.").removesuffix(".0.").split(".")
    found = {family.head_path} | (set() if family.experts is None else {family.experts_path})
    for tensor in _tensors(plan):
        module, _, last = tensor.name.rpartition(".")
        if last != "weight" or tensor.codes_of is not None or len(tensor.shape) < 2:
            continue
        index = family.layer_of(inner(tensor.name))
        if index is None or index >= len(pruned.kept):
            module = _apart_from(module.split("."), layers)
            if wrapper is not None:  # whose files may leave out what transformers puts in front
                found.add(f"model.{module}")
        found.add(module)
    return sorted(found)


def _apart_from(names: list[str], others: list[str]) -> str:
    """The beginning of a path, up to the first name in which it differs from another."""
    same = next((i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1]), len(others))
    return ".".join(names[: same + 1])

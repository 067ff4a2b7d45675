"""What the options of a target mean for one model: the price of every unit, in parameters or in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, gcd

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.targets import LayerPrices, Target
from flap_stream.config import FP8_BLOCK, PlanConfig, RewriteConfig, TargetConfig
from flap_stream.errors import InvalidOption

_FP8_ITEM = 1 + Fraction(4, FP8_BLOCK**2)  # bytes of a code and its part of a scale
_SHARD_BYTES = 48  # at most: of the header of one more shard, without its tensors


@dataclass(frozen=True)
class Fp8Sizes:
    """Sizes of a dense checkpoint if its linears were written in FP8, all blocks whole.

    rest_bytes: of the tensors that belong to no units. unit_bytes, header_bytes: as in `ModelSizes`.
    """

    rest_bytes: int
    unit_bytes: Sequence[tuple[int, int]]
    header_bytes: tuple[int, int]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a dense checkpoint.

    parameters, weight_bytes: of all tensors. unit_bytes: of each layer's KV groups and neurons, biases included.
    header_bytes: of the headers of weight files, as if there were one file, without and with added biases.
    expert_bytes: of what goes with each layer's experts besides their neurons. fp8: see `in_fp8`; None if the model
    allows none, or an older version did not record it.
    written_bytes: unit_bytes in the files that are written; None is the same.
    """

    parameters: int
    weight_bytes: int
    unit_bytes: Sequence[tuple[int, int]]
    header_bytes: tuple[int, int]
    expert_bytes: Sequence[int]
    fp8: Fp8Sizes | None = None
    written_bytes: Sequence[tuple[int, int]] | None = None

    def in_fp8(self, shapes: Sequence[LayerShape], options: PlanConfig) -> "ModelSizes":
        """The sizes of weights that are written in FP8; at most these, whatever the scores.

        Units whose number need not fill blocks count as in the dense model's dtype.
        """
        assert self.fp8 is not None
        written, weight_bytes = [], self.fp8.rest_bytes
        for shape, dense, packed in zip(shapes, self.unit_bytes, self.fp8.unit_bytes, strict=True):
            groups_fill, neurons_fill = _fill_blocks(shape, options)
            group, neuron = (packed if groups_fill else dense)[0], (packed if neurons_fill else dense)[1]
            written.append((group, neuron))
            weight_bytes += shape.kv_groups * group + shape.neurons * neuron
        return replace(self, weight_bytes=weight_bytes, header_bytes=self.fp8.header_bytes, written_bytes=written)


def fp8_bytes(elements: int) -> int:
    """Bytes of so many values in FP8, with their part of the scales, rounded up."""
    return ceil(elements * _FP8_ITEM)


def _fill_blocks(shape: LayerShape, options: PlanConfig) -> tuple[bool, bool]:
    """Whether any number of KV groups, and of neurons, that a layer may keep fills blocks of FP8."""
    groups = options.round_heads_to // gcd(options.round_heads_to, shape.heads_per_group)
    neurons = [options.neuron_multiple]
    if options.method == "reap":  # which removes whole experts and nothing else
        groups, neurons = shape.kv_groups, list(shape.experts or (shape.neurons,))
    return groups * shape.head_dim % FP8_BLOCK == 0, all(count % FP8_BLOCK == 0 for count in neurons)


def target_of(
    options: TargetConfig,
    shapes: Sequence[LayerShape],
    sizes: ModelSizes,
    restore: str,
    max_shard_bytes: int = RewriteConfig.max_shard_bytes,
) -> Target | None:
    """The target of some options for a model; None if they have none.

    restore: the restoration whose biases are counted. max_shard_bytes: of the files whose headers are counted.
    Raises InvalidOption for a memory target if no layer has KV groups.
    """
    name = options.target
    if name is None:
        return None
    if name == "target_parameters":
        prices = [
            LayerPrices(
                shape.group_cost + shape.group_biases,
                shape.neuron_cost + shape.neuron_biases,
                shape.attention_rest,
                shape.mlp_rest,
                shape.expert_rest + (0 if restore == "none" else shape.expert_added),
            )
            for shape in shapes
        ]
        dense, added = sizes.parameters, sum(shape.added_biases for shape in shapes)
    else:
        if name == "target_memory" and not any(shape.kv_groups for shape in shapes):
            raise InvalidOption(
                "--target-memory counts the KV cache by the KV groups that stay, but of this model attention is left "
                "whole; use --target-size"
            )
        tokens = 0 if name == "target_size" else (options.context or 0) * (options.batch or 1)
        layers = list(zip(shapes, sizes.unit_bytes, strict=True))
        written = sizes.written_bytes or sizes.unit_bytes
        prices = [_byte_prices(*own, units, tokens) for own, units in zip(layers, written, strict=True)]
        with_rest = zip(prices, layers, sizes.expert_bytes, strict=True)
        prices = [replace(p, expert_rest=rest + _expert_bias_bytes(*own, restore)) for p, own, rest in with_rest]
        dense = sizes.weight_bytes + sum(shape.kv_groups * _cache_bytes(shape, own, tokens) for shape, own in layers)
        added = sum(shape.added_biases * max(_item_bytes(shape, own)) for shape, own in layers)
    headers = 0
    if name == "target_size":
        plain, with_biases = sizes.header_bytes
        dense += plain
        headers = (plain if restore == "none" else with_biases) - plain
        headers += _SHARD_BYTES * _more_shards(sizes.weight_bytes, max_shard_bytes)
    whole = dense + headers + (0 if restore == "none" else added)
    bare = whole - sum(_all_units(shape, price) for shape, price in zip(shapes, prices, strict=True))
    return Target(name, getattr(options, name), dense, bare, prices)


def _all_units(shape: LayerShape, price: LayerPrices) -> int:
    units = sum(shape.units(sublayer) * price.unit(sublayer) + price.rest(sublayer) for sublayer in Sublayer)
    return units + len(shape.experts) * price.expert_rest


def _expert_bias_bytes(shape: LayerShape, unit_bytes: tuple[int, int], restore: str) -> int:
    """Bytes of the output bias that a restoration adds to each expert."""
    return 0 if restore == "none" else shape.expert_added * _item_bytes(shape, unit_bytes)[1]


def _byte_prices(shape: LayerShape, unit_bytes: tuple[int, int], written: tuple[int, int], tokens: int) -> LayerPrices:
    """Prices in bytes. written: of units in the files; unit_bytes: in the dense ones. tokens: in the KV cache."""
    attention, mlp = _item_bytes(shape, unit_bytes)
    return LayerPrices(
        written[0] + _cache_bytes(shape, unit_bytes, tokens),
        written[1],
        attention * shape.attention_rest,
        mlp * shape.mlp_rest,
    )


def _cache_bytes(shape: LayerShape, unit_bytes: tuple[int, int], tokens: int) -> int:
    """Keys and values of one KV group."""
    return 2 * shape.head_dim * _item_bytes(shape, unit_bytes)[0] * tokens


def _item_bytes(shape: LayerShape, unit_bytes: tuple[int, int]) -> tuple[int, int]:
    """Bytes of one weight of attention and of the MLP; 0 where the layer has none."""
    elements = (shape.group_cost + shape.group_biases, shape.neuron_cost + shape.neuron_biases)
    attention, mlp = (nbytes // max(count, 1) for nbytes, count in zip(unit_bytes, elements, strict=True))
    return attention, mlp


def _more_shards(weight_bytes: int, max_shard_bytes: int) -> int:
    """How many more files than one there can be: any two in a row are larger than the limit."""
    return 0 if weight_bytes <= max_shard_bytes else 2 * weight_bytes // max_shard_bytes + 1

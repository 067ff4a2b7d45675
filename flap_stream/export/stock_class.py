"""Which of transformers' own classes can hold a pruned checkpoint, and the sizes that all of its layers then have."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.config import FAST_MULTIPLE
from flap_stream.errors import InvalidModel, UnsupportedModel
from flap_stream.model.architecture import Family
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import COMPUTE_AS_LLAMA, FAMILIES
from flap_stream.model.model_code import decoded
from flap_stream.model.skeleton import Skeleton
from flap_stream.model.units import ROWS, Projection

_BIAS_FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias")
_SHARED_KEYS = (
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "max_position_embeddings", "num_hidden_layers", "pad_token_id", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip
_PRUNED_KEYS = (
    "auto_map",
    "allow_global_per_layer_attribute_access",
    "pruned_output_bias",
    "attention_is_whole",
    "pruned_neurons",
    "pruned_expert_sizes",
)
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size")


@dataclass(frozen=True)
class StockSizes:
    """Sizes that a stock class has in every layer.

    kv_groups, neurons: of a layer. lists_neurons: whether every layer has neurons of its own number all the same, as
    its config.json lists; `neurons` is then that of the widest.
    experts, expert_neurons: of a mixture of experts, and of each of them; 0 without.
    """

    kv_groups: int
    neurons: int
    experts: int = 0
    expert_neurons: int = 0
    lists_neurons: bool = False

    def of(self, shape: LayerShape) -> LayerShape:
        """A layer in these sizes; one of a mixture model that has no MLP gets none."""
        if shape.experts:
            experts = (self.expert_neurons,) * self.experts
            return replace(shape, kv_groups=self.kv_groups, neurons=sum(experts), experts=experts)
        neurons = 0 if self.experts and not shape.neurons else self.neurons
        neurons = shape.neurons if self.lists_neurons else neurons
        return replace(shape, kv_groups=self.kv_groups, neurons=neurons)


def common_sizes(source: Checkpoint, family: Family, shapes: Sequence[LayerShape], pad: bool) -> StockSizes:
    """The sizes that all layers have, or will have when padded. Raises UnsupportedModel if there are none."""
    where, has_groups = source.source, family.prunes(Sublayer.ATTENTION)
    mixtures = [shape.experts for shape in shapes if shape.experts]
    widths = {width for experts in mixtures for width in experts}
    step = FAST_MULTIPLE if pad and len(widths) > 1 else 1  # torch multiplies all experts at once only if so aligned
    sizes = StockSizes(
        kv_groups=max(shape.kv_groups for shape in shapes),
        neurons=max((shape.neurons for shape in shapes if not shape.experts), default=0),
        experts=max(map(len, mixtures), default=0),
        expert_neurons=-(-max(widths, default=0) // step) * step,
        lists_neurons=isinstance(source.config.get(family.width), list),
    )
    fewer = next((i for i, shape in enumerate(shapes) if 0 < len(shape.experts) < sizes.experts), None)
    if fewer is not None:
        raise UnsupportedModel(
            f"layer {fewer} of {where} has {len(shapes[fewer].experts)} experts, others up to {sizes.experts}, but no "
            "class of transformers has mixtures of different sizes; prune with --method reap, or with "
            "--round-experts-to N, N above half of the dense model's experts, so that every mixture keeps N"
        )
    odd = next((i for i, shape in enumerate(shapes) if sizes.of(shape) != shape), None)
    if odd is not None and not pad:
        remedy = "--structure ul-um, which gives all layers one size"
        remedy = "--method reap, which removes nothing but experts" if mixtures else remedy
        raise UnsupportedModel(
            f"layer {odd} of {where} has {_described(shapes[odd])}, others up to {_described(sizes.of(shapes[odd]))}, "
            "but no class of transformers has layers of different sizes; add --pad to pad with zeros, or prune with "
            f"{remedy}"
        )
    if (has_groups and not sizes.kv_groups) or not (sizes.neurons or mixtures):
        units = "neurons" if sizes.kv_groups else "attention heads"
        raise UnsupportedModel(f"no layer of {where} has any {units} left")
    return sizes


def _described(shape: LayerShape) -> str:
    """A layer's sizes in words."""
    least, most = min(shape.experts, default=0), max(shape.experts, default=0)
    widths = f"{least}" if least == most else f"{least} to {most}"
    neurons = f"experts of {widths} neurons" if shape.experts else f"{shape.neurons} neurons"
    return f"{shape.kv_groups} KV groups and {neurons}"


def choose_class(
    source: Checkpoint, shapes: Sequence[LayerShape], sizes: StockSizes, pad: bool
) -> tuple[Skeleton, StockSizes]:
    """The model in the first stock class that can hold every tensor, and the sizes of its layers.

    Some classes require a number of heads that divides the hidden size: with `pad`, heads are added up to the dense
    model's number until one fits. Raises UnsupportedModel if none does.
    """
    dense_groups = source.config.get("num_key_value_heads") or source.config["num_attention_heads"]
    misfits: list[str] = []
    for groups in range(sizes.kv_groups, dense_groups + 1 if pad else sizes.kv_groups + 1):
        own = replace(sizes, kv_groups=groups)
        for config in _candidates(source.config, own, shapes[0]):
            try:
                skeleton = Skeleton(config, source.source)
            except InvalidModel:
                continue  # its class does not accept these sizes
            if not _has_sizes(skeleton, [own.of(shape) for shape in shapes]):
                continue  # some of its sizes follow from others
            held, cut = skeleton.tensors(), cut_tensors(skeleton.family, shapes)
            misfits = [name for name in source.tensors if name not in held]
            absent = [name for name in held if name not in source.tensors]
            emptied = _emptied_modules(source, skeleton.family, shapes)
            others = [name for name in held.keys() & source.tensors.keys() if name not in cut]
            if any(held[name] != source.tensors[name].shape for name in others):
                continue  # such as shared experts, which are as wide as the others in some classes
            if not misfits and all(name.endswith(".bias") or name.startswith(emptied) for name in absent):
                return skeleton, own
    raise _no_class(source, sizes, shapes[0], misfits)


def _has_sizes(skeleton: Skeleton, wanted: Sequence[LayerShape]) -> bool:
    found = [skeleton.layer_shape(i) for i in range(len(skeleton.layers))]
    return [(shape.kv_groups, shape.neurons, shape.experts) for shape in found] == [
        (shape.kv_groups, shape.neurons, shape.experts) for shape in wanted
    ]


def _no_class(source: Checkpoint, sizes: StockSizes, shape: LayerShape, misfits: Sequence[str]) -> UnsupportedModel:
    """The error if no class can hold it. shape: of a layer. misfits: tensors that the last one tried does not have."""
    family = source.config["model_type"]
    if misfits:
        return UnsupportedModel(
            f"no class of transformers for {family} has tensor {misfits[0]} of {source.source}; prune with --restore "
            "none, which adds no biases"
        )
    if sizes.experts:
        return UnsupportedModel(
            f"no class of transformers for {family} accepts {sizes.experts} experts of {sizes.expert_neurons} neurons "
            "beside what else is in its layers; prune with --method reap, which removes nothing but experts"
        )
    if not FAMILIES[family].prunes(Sublayer.ATTENTION):
        return UnsupportedModel(f"no class of transformers for {family} accepts {sizes.neurons} neurons in every layer")
    return UnsupportedModel(
        f"no class of transformers for {family} accepts {sizes.kv_groups * shape.heads_per_group} heads with hidden "
        f"size {source.config['hidden_size']}; add --pad, which adds heads until the class accepts their number"
    )


def cut_tensors(family: Family, shapes: Sequence[LayerShape]) -> dict[str, tuple[Projection, int, int]]:
    """The tensors that have rows or columns of units, by name: the projection, its layer, the number of its part."""
    return {
        f"{family.layer_prefix(i)}{projection.name}.{name}": (projection, i, number)
        for i, shape in enumerate(shapes)
        for number, part in enumerate(family.parts(shape))
        for projection in part.kind.projections
        for name in (("weight", "bias") if projection.axis == ROWS else ("weight",))
    }


def _emptied_modules(source: Checkpoint, family: Family, shapes: Sequence[LayerShape]) -> tuple[str, ...]:
    """Path prefixes of the modules that have no units left."""
    return tuple(
        f"{family.layer_prefix(i)}{part.kind.module}."
        for i, shape in enumerate(shapes)
        for part in family.parts(shape)
        if f"{family.layer_prefix(i)}{part.kind.output.name}.weight" not in source.tensors
    )


def _candidates(config: Mapping[str, Any], sizes: StockSizes, layer: LayerShape) -> Iterator[dict[str, Any]]:
    """Stock configs in order of preference: the family's own, with all its biases, Llama's, SeedOss's."""
    heads = sizes.kv_groups * layer.heads_per_group
    family = FAMILIES[config["model_type"]]
    own_sizes: dict[str, Any] = {family.width: sizes.neurons} if sizes.neurons else {}
    if sizes.lists_neurons:
        own_sizes = {family.width: config["pruned_neurons"]}
    if family.prunes(Sublayer.ATTENTION):
        own_sizes |= {"num_attention_heads": heads, "num_key_value_heads": sizes.kv_groups, "head_dim": layer.head_dim}
    uniform = {key: value for key, value in config.items() if key not in _PRUNED_KEYS}
    if not family.varies_sizes:  # else they are the dense model's
        uniform.pop("per_layer_config", None)
    own = uniform | own_sizes
    if sizes.experts:
        yield from (_named(own | experts) for experts in _expert_keys(config, sizes))
        return
    yield _named(own)
    known = CONFIG_MAPPING[config["model_type"]].from_dict(decoded(uniform))  # its validation may refuse the new sizes
    flags = {flag: True for flag in _BIAS_FLAGS if hasattr(known, flag)}
    if flags:
        yield _named(own | flags)
    # Llama's class, or SeedOss's with any number of heads, can hold these too.
    if config["model_type"] in COMPUTE_AS_LLAMA and not _has_window(known):
        given = {**known.to_dict(), **config}
        shared = {key: given[key] for key in _SHARED_KEYS if given.get(key) is not None} | own_sizes
        flags = dict.fromkeys(_BIAS_FLAGS, True)
        yield _named({**shared, **flags, "model_type": "llama"})
        yield _named({**shared, **flags, "model_type": "seed_oss", "residual_dropout": 0.0})


def _expert_keys(config: Mapping[str, Any], sizes: StockSizes) -> Iterator[dict[str, int]]:
    """What a config.json may say of these experts: their number, and their neurons under one of two names."""
    counts = {key: sizes.experts for key in _EXPERT_COUNTS if key in config}
    yield from (counts | {key: sizes.expert_neurons} for key in _EXPERT_WIDTHS if key in config)


def _named(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"architectures": [FAMILIES[config["model_type"]].causal_class]}


def _has_window(known: PreTrainedConfig) -> bool:
    """Whether some layer attends only to the last tokens."""
    types = getattr(known, "layer_types", None)
    return any(t != "full_attention" for t in types) if types else getattr(known, "sliding_window", None) is not None

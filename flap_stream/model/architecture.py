"""What a model family is: where its decoder layers are, and what their units are made of. `families.py` has all."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from math import prod
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.errors import InvalidModel
from flap_stream.model.unit_kinds import ATTENTION, MLP
from flap_stream.model.units import COLUMNS, ROWS, Part, UnitKind

PRUNED_TYPE = "flap_stream_"  # before the dense model's model_type in the config.json of a pruned checkpoint
# Modules of Gemma 3n and 4 beside the layers, the embedding and the norm, in a base model's checkpoint.
_FOR_LAYERS = (
    *("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
    *("altup_projections", "altup_unembed_projections"),
)
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class Family:
    """A model family: where its decoder layers are and what its units are made of.

    causal_class: the causal language model in transformers; base_class: the model without a head, by default of the
    same prefix. Their pruned forms in `modeling/` are named `Pruned<class>`.
    layers: module path of the decoder layers in the causal language model.
    attention: its KV groups; None where it stays whole, as everything must that no group can be cut out of: norms over
    all heads, latent attention, linear attention, state spaces.
    mlp: the neurons of its MLP, where a layer has one without experts.
    experts: the kind of an expert's neurons, with a placeholder for its number in the names; None without experts.
    transposed_experts: whether dense checkpoints hold them with input rows first, all of a layer in one tensor.
    mixture_returns_scores: whether the module of router and experts returns scores beside its output.
    renames: pattern and replacement for tensor names that differ between dense checkpoints and the pruned class.
    norms_outputs: whether attention and MLP outputs are normalised before the residual addition.
    width: the key of config.json for the neurons of its MLP.
    is_parallel: whether the MLP reads what attention reads, and not its output.
    keeps_neurons: the key of config.json that is above 0 for layers whose MLP stays whole, since whether one neuron is
    active depends on all.
    varies_sizes: whether the dense model's config names sizes of its own for each layer.
    """

    causal_class: str
    base_class: str = ""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm"
    head: str = "lm_head.weight"
    attention: UnitKind | None = ATTENTION
    mlp: UnitKind = MLP
    experts: UnitKind | None = None
    transposed_experts: bool = False
    mixture_returns_scores: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    norms_outputs: bool = False
    is_parallel: bool = False
    width: str = "intermediate_size"
    keeps_neurons: str = ""
    varies_sizes: bool = False

    @property
    def kinds(self) -> tuple[UnitKind, ...]:
        """The kinds of its units, in the order in which layers run them."""
        return (self.mlp,) if self.attention is None else (self.attention, self.mlp)

    @property
    def base_path(self) -> str:
        """Path of the module that has the decoder layers."""
        return self.layers.rpartition(".")[0]

    @property
    def head_path(self) -> str:
        """Path of the head."""
        return self.head.rpartition(".")[0]

    @property
    def experts_path(self) -> str:
        """Path, inside the decoder layer, of the module that has its experts."""
        assert self.experts is not None
        return self.experts.output.name.partition(".each.")[0]

    @property
    def mixture_path(self) -> str:
        """Path, inside the decoder layer, of the module that has a router and its experts; empty for the layer."""
        return self.experts_path.rpartition(".")[0]

    def router_axes(self, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """The tensors of a layer's router, and the axis of each that is the experts.

        tensors: relative name to shape, of a layer with experts.
        """
        if not self.mixture_path:
            return {}  # no expert is removed as a whole
        own = re.compile(rf"{re.escape(self.mixture_path)}\.((gate|router)\.(\w+\.)*)?\w+")
        names = [name for name in tensors if own.fullmatch(name)]
        return {n: ROWS if n.endswith(".weight") or len(tensors[n]) == 1 else COLUMNS for n in names}

    def prunes(self, sublayer: Sublayer) -> bool:
        """Whether it has units in this half of a layer."""
        return sublayer is Sublayer.MLP or self.attention is not None

    def left_whole(self, names: Iterable[str], shapes: Iterable[LayerShape]) -> list[str]:
        """What of its layers loses nothing, in the words of messages. names: of a model's tensors."""
        whole = [] if self.attention is not None else ["attention"]
        if self.experts is not None and not self.mixture_path:
            whole.append("MLP beside the experts")
        sparse = [i for i, shape in enumerate(shapes) if shape.neurons and not shape.neuron_cost]
        if sparse:
            whole.append(f"MLP of layers {sparse[0]} to {sparse[-1]}, whose active neurons depend on one another")
        return [*whole, "shared experts"] if any(".shared_expert" in name for name in names) else whole

    def parts(self, shape: LayerShape) -> list[Part]:
        """The modules of a layer that units belong to."""
        found = []
        for kind in self.kinds:
            if kind.name == Sublayer.MLP and shape.experts:
                assert self.experts is not None
                firsts = np.cumsum([0, *shape.experts]).tolist()
                found += [Part(self.experts.numbered(i), firsts[i], n) for i, n in enumerate(shape.experts)]
            else:
                found.append(Part(kind, 0, shape.units(kind.name)))
        return found

    def kept_parts(self, shape: LayerShape, keep: LayerKeep) -> Iterator[tuple[Part, np.ndarray]]:
        """The same, each with the units of its own that are kept, int64 `[kept]`."""
        for part in self.parts(shape):
            yield part, part.own(keep.of(part.kind.name))

    def norm_before(self, kind: UnitKind) -> str | None:
        """Path of the norm that only this kind of units reads from, if it is known."""
        return None if self.norms_outputs or self.is_parallel else kind.norm

    def with_prefix(self, name: str) -> str:
        """The name in the causal model of a tensor that was saved from the base model."""
        base, _, layers = self.layers.rpartition(".")
        beside = (path.removeprefix(f"{base}.").partition(".")[0] for path in (self.embedding, self.norm))
        own = (layers, *beside, *_FOR_LAYERS)
        return f"{base}.{name}" if name.partition(".")[0] in own else name

    def layer_prefix(self, number: int) -> str:
        """What the names of a decoder layer's tensors begin with."""
        return f"{self.layers}.{number}."

    def layer_of(self, name: str) -> int | None:
        """The number of the decoder layer that a tensor belongs to; None for any other tensor."""
        found = re.match(rf"{re.escape(self.layers)}\.(\d+)\.", name)
        return None if found is None else int(found[1])

    def canonical(self, name: str) -> str:
        """The name that the pruned class has for a tensor of a checkpoint."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def dense_name(self, name: str) -> str:
        """A name that dense checkpoints have for a tensor of the pruned class; the inverse of `canonical`."""
        found = name
        for pattern, replacement in self.renames:
            tried = _replaced_back(pattern, replacement, found)
            found = tried if self.canonical(tried) == name else found
        return found

    @property
    def pruned_classes(self) -> dict[str, str]:
        """Auto class to the class in `modeling/`, as `auto_map` has them."""
        base = self.base_class or self.causal_class.removesuffix("ForCausalLM") + "Model"
        return {"AutoModel": f"Pruned{base}", "AutoModelForCausalLM": f"Pruned{self.causal_class}"}


def _replaced_back(pattern: str, replacement: str, name: str) -> str:
    """The name of which `re.sub(pattern, replacement, ...)` makes this one; it itself if there is none.

    pattern: of text without special meaning, groups, and `^` in front.
    """
    groups = re.findall(r"\([^)]*\)", pattern)
    parts = re.split(r"\\(\d)", replacement)  # text and numbers of groups in turn
    inverse = "".join(re.escape(part) if i % 2 == 0 else groups[int(part) - 1] for i, part in enumerate(parts))
    before = pattern.removeprefix("^")
    for number, group in enumerate(groups):
        before = before.replace(group, rf"\{number + 1}", 1)
    anchor = "^" if pattern.startswith("^") else ""
    return re.sub(anchor + inverse, re.sub(r"\\\.", ".", before), name)


def is_pruned(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a pruned checkpoint's."""
    return "pruned_output_bias" in config


def dense_type(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json, its model_type replaced by the dense model's if pruning gave it one of its own."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type.startswith(PRUNED_TYPE):
        return config
    return {**config, "model_type": model_type.removeprefix(PRUNED_TYPE)}


def with_layer_count(config: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json with its number of layers, where it only lists what each one is."""
    kinds = config.get("layers_block_type")
    if isinstance(kinds, list) and config.get("num_hidden_layers") is None:
        return {**config, "num_hidden_layers": len(kinds)}
    return config


def further_layers(config: Mapping[str, Any]) -> range:
    """Numbers of the layers after the last that predict tokens further ahead; nothing else reads them."""
    sizes = (config.get(name) for name in ("num_hidden_layers", "num_nextn_predict_layers"))
    count, further = (size if isinstance(size, int) else 0 for size in sizes)
    return range(count, count + further)


def require_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise InvalidModel unless the sizes in a config.json are positive whole numbers that are consistent."""
    optional = [name for name in ("num_key_value_heads", "head_dim") if config.get(name) is not None]
    for name in (*_SIZES, *optional):
        value = config.get(name)
        if name == "intermediate_size" and isinstance(value, list) and value:
            value = min(value, key=lambda size: size if type(size) is int else 0)  # one for each layer
        if type(value) is not int or value < 1:
            raise InvalidModel(f"{where}/config.json has {name} {value!r}; expected a whole number of at least 1")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        raise InvalidModel(f"{where}/config.json has {heads} heads for {kv_heads} KV heads; expected a multiple")


def layer_shape(family: Family, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> LayerShape:
    """Sizes of one decoder layer; unit counts and costs are derived from its tensors.

    tensors: relative name (`self_attn.q_proj.weight`) to shape, already checked against the architecture.
    """
    heads = config["num_attention_heads"]
    heads_per_group = heads // (config.get("num_key_value_heads") or heads)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    block_size = LayerShape(0, heads_per_group, head_dim, 0, 0, 0).block_size

    def units_of(kind: UnitKind) -> int:
        weight = tensors.get(f"{kind.output.name}.weight")
        return 0 if weight is None else weight[COLUMNS] // sum(map(block_size, kind.output.blocks))

    def cost_of(kind: UnitKind) -> int:
        weights = [(p, tensors.get(f"{p.name}.weight")) for p in kind.projections]
        return sum(sum(map(block_size, p.blocks)) * w[1 - p.axis] for p, w in weights if w is not None)

    def biases_of(kind: UnitKind) -> int:
        return sum(block_size(block) for p in kind.readers if f"{p.name}.bias" in tensors for block in p.blocks)

    attention, mlp = family.attention, family.mlp
    attention_rest, mlp_rest = 0 if attention is None else _rest(attention, tensors), _rest(mlp, tensors)
    experts: tuple[int, ...] = ()
    if family.experts is not None and any(name.startswith(f"{family.experts_path}.") for name in tensors):
        held = takewhile(lambda kind: _has_output(kind, tensors), map(family.experts.numbered, count()))
        experts = tuple(map(units_of, held))
        mlp, mlp_rest = family.experts.numbered(0), 0  # see expert_rest
    outputs = [] if attention is None else [attention.output.name]
    outputs += [kind.output.name for kind in _experts_of(family, experts)] or [mlp.output.name]
    expert_rest, expert_added = _beside_neurons(family, tensors, mlp.output.name, len(experts)) if experts else (0, 0)
    unbiased = [tensors[f"{n}.weight"] for n in outputs if f"{n}.weight" in tensors and f"{n}.bias" not in tensors]
    return LayerShape(
        kv_groups=0 if attention is None else units_of(attention),
        heads_per_group=heads_per_group,
        head_dim=head_dim,
        neurons=sum(experts) if experts else units_of(mlp),
        group_cost=0 if attention is None else cost_of(attention),
        neuron_cost=cost_of(mlp),
        experts=experts,
        group_biases=0 if attention is None else biases_of(attention),
        neuron_biases=biases_of(mlp),
        attention_rest=attention_rest,
        mlp_rest=mlp_rest,
        added_biases=sum(weight[ROWS] for weight in unbiased),
        expert_rest=expert_rest,
        expert_added=expert_added,
        elements=sum(map(prod, tensors.values())),
    )


def _has_output(kind: UnitKind, tensors: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether anything of a kind's output projection is there; a pruning may have left its bias alone."""
    return any(f"{kind.output.name}.{name}" in tensors for name in ("weight", "bias"))


def _beside_neurons(
    family: Family, tensors: Mapping[str, tuple[int, ...]], output: str, experts: int
) -> tuple[int, int]:
    """Elements that go with a whole expert besides its neurons' weights, and those that its added bias has.

    output: the path of an expert's output projection.
    """
    router = sum(prod(tensors[name]) for name in family.router_axes(tensors)) // experts
    bias = tensors.get(f"{output}.bias")
    return (router, tensors[f"{output}.weight"][ROWS]) if bias is None else (router + prod(bias), 0)


def _experts_of(family: Family, sizes: tuple[int, ...]) -> list[UnitKind]:
    return [] if family.experts is None else [family.experts.numbered(i) for i in range(len(sizes))]


def _rest(kind: UnitKind, tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Elements of a module's tensors that belong to no unit, except the output's bias, which is kept.

    0 where the layer has none: another kind of attention, a state space, a sublayer that was pruned away.
    """
    if f"{kind.output.name}.weight" not in tensors:
        return 0
    cut = {f"{p.name}.weight" for p in kind.projections} | {f"{p.name}.bias" for p in kind.projections}
    return sum(prod(shape) for name, shape in tensors.items() if name.startswith(f"{kind.module}.") and name not in cut)

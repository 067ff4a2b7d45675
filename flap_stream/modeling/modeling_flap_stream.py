"""Decoder-only models whose layers have sizes of their own, after structured pruning by flap-stream.

This file travels with the checkpoint (`auto_map` in config.json) and needs torch and transformers alone. It reads

- `per_layer_config`: for every layer its `num_attention_heads`, `num_key_value_heads` and `intermediate_size`; the
  global sizes are those of the dense model. Releases of transformers without per-layer configs keep the raw dict.
- `pruned_output_bias`: whether the output projections (o_proj, down_proj) have the bias that pruning adds.
- `pruned_expert_sizes`, of a mixture of experts: for every layer the neurons of each expert, none for a dense MLP;
  where there are fewer than in the dense model, the router chooses among these;
- `attention_is_whole`, if what mixes tokens (attention of any kind, a state space) is as in the dense model, with
  `pruned_neurons`, those of every layer, in place of `per_layer_config`.

A layer may have lost its attention or its MLP altogether; the bias of the output projection is then all that is left.
No class here is named after attention: transformers looks for such names when it switches implementations.

In config.json `model_type` is the dense model's with `flap_stream_` in front, which transformers does not know: so
loading without `trust_remote_code=True` asks for it. A config that has been loaded has the dense model's.
"""

import torch
import transformers
from torch import nn

OWN_TYPE = "flap_stream_"  # what model_type begins with in config.json
_LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
# What modules are called: that of the MLP in a layer; the linears whose rows are neurons, with how many each has of
# them; the linear that reads the neurons.
_MLPS = ("mlp", "feed_forward", "shared_mlp", "mixer")  # a mixer may also be attention or a state space
_NEURON_ROWS = {
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3", "dense_h_to_4h"), 1),
    **dict.fromkeys(("gate_up_proj", "input_linear"), 2),
}
_ATTENTION_OUTPUTS = ("o_proj", "dense")
_EXPERT_WIDTHS = ("intermediate_dim", "expert_dim", "intermediate_size")
_ROUTERS = ("gate", "router")  # of a mixture of experts
_MLP_OUTPUTS = ("down_proj", "fc2", "c_proj", "w2", "dense_4h_to_h", "output_linear")


class PrunedConfig:
    """A dense model's config in all but its file, where it has a `model_type` of its own."""

    _auto_class = "AutoConfig"

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        """The contents of config.json with the dense model's type, and the keywords that are left."""
        config, left = super().get_config_dict(*args, **kwargs)
        return cls._dense(config), left

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The config that the contents of config.json make."""
        return super().from_dict(cls._dense(config_dict), **kwargs)

    @classmethod
    def _dense(cls, config):
        is_own = config.get("model_type") == OWN_TYPE + cls.model_type
        return {**config, "model_type": cls.model_type} if is_own else config

    def to_diff_dict(self):
        """What config.json will hold."""
        return {**super().to_diff_dict(), "model_type": OWN_TYPE + self.model_type}

    def __getattribute__(self, name):
        """A size of the dense model, without transformers' warning: the classes here know that layers have others."""
        if name in _LAYER_SIZES:
            read = getattr(super(), "_getattr_without_heterogeneous_validation", None)
            if read is not None:
                return read(name)
        return super().__getattribute__(name)


def layer_size(config, layer_idx, name):
    """A size of one layer; the global one where the layer does not say."""
    if name == "intermediate_size" and hasattr(config, "pruned_neurons"):
        return config.pruned_neurons[layer_idx]
    layers = config.per_layer_config
    if isinstance(layers, dict):  # no per-layer configs in this transformers
        return {int(key): value for key, value in layers.items()}.get(layer_idx, {}).get(name, getattr(config, name))
    return getattr(layers[layer_idx], name)


class OutputBias(nn.Module):
    """Stands for a sublayer without units: gives the bias of its output projection, or zeros."""

    def __init__(self, projection, hidden_size, bias):
        super().__init__()
        self.projection = projection
        self.add_module(projection, nn.Module())
        self.get_submodule(projection).register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size)) if bias else None
        )

    def forward(self, hidden_states):
        """`[sample, token, hidden]`, the same for every token."""
        bias = self.get_submodule(self.projection).bias
        return torch.zeros_like(hidden_states) if bias is None else bias.expand_as(hidden_states)


class OutputBiasWithCache(OutputBias):
    """`OutputBias` in the place of attention: the cache goes on counting the positions that it has seen."""

    def __init__(self, projection, hidden_size, bias, layer_idx):
        super().__init__(projection, hidden_size, bias)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        """The output as of `OutputBias`, and no attention weights."""
        if past_key_values is not None:
            positions = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            past_key_values.update(positions, positions, self.layer_idx)
        return super().forward(hidden_states), None


class LayerConfig:
    """A config in which some sizes are one layer's own; everything else is the model's, now and later."""

    def __init__(self, config, **sizes):
        self.__dict__.update(sizes, _model_config=config)

    def __getattr__(self, name):
        """What the layer does not say itself."""
        if name == "_model_config":  # asked for by copy and pickle before there is one
            raise AttributeError(name)
        return getattr(self._model_config, name)


class Expert(nn.Module):
    """One gated MLP of its own width. dense: transformers' experts that it is one of."""

    def __init__(self, dense, hidden_size, width, bias):
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = dense.act_fn

    def forward(self, hidden_states):
        """`[token, hidden]`."""
        return self.down(self.act_fn(self.gate(hidden_states)) * self.up(hidden_states))


class UngatedExpert(nn.Module):
    """One MLP of two linears of its own width; between them is what the dense experts have."""

    def __init__(self, dense, hidden_size, width, bias):
        super().__init__()
        hidden_size = dense.up_proj.shape[-1]  # which may be narrower than the model
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = dense.act_fn

    def forward(self, hidden_states):
        """`[token, hidden]`."""
        return self.down(self.act_fn(self.up(hidden_states)))


class FusedExpert(nn.Module):
    """`Expert` whose gate and up projections are the halves of one linear."""

    def __init__(self, dense, hidden_size, width, bias):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = dense.act_fn

    def forward(self, hidden_states):
        """`[token, hidden]`."""
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(up * self.act_fn(gate))


class PairedExpert(nn.Module):
    """`Expert` whose gate and up projections are one linear with biases, a row of each in turn: gpt-oss'."""

    def __init__(self, dense, hidden_size, width, bias):
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width)
        self.down = nn.Linear(width, hidden_size)
        self.alpha, self.limit = dense.alpha, dense.limit
        self.gated = type(dense)._apply_gate  # of alpha, limit and pairs

    def forward(self, hidden_states):
        """`[token, hidden]`."""
        return self.down(self.gated(self, self.gate_up(hidden_states)))


def _expert_class(dense):
    """The class of one of transformers' experts."""
    if hasattr(dense, "gate_up_proj_bias"):
        return PairedExpert
    if not hasattr(dense, "gate_up_proj"):
        return UngatedExpert
    return FusedExpert if hasattr(dense, "expert_dim") else Expert


class SeparateExperts(nn.Module):
    """Experts of sizes of their own, in the place of transformers' single tensor for all.

    The names of its weights are none that transformers gathers into that tensor.
    """

    def __init__(self, dense, hidden_size, widths, bias):
        super().__init__()
        kind = _expert_class(dense)
        self.each = nn.ModuleList(kind(dense, hidden_size, width, bias) for width in widths)

    def forward(self, hidden_states, top_k_index=None, top_k_weights=None):
        """`[token, hidden]`: every token's experts, weighted. top_k_index, top_k_weights: `[token, choice]`.

        Without those, `[expert * token, hidden]`: what each expert gives for its own rows, of which those of zeros are
        tokens that are not routed to it.
        """
        return run_experts(self.each, hidden_states, top_k_index, top_k_weights)


def run_experts(each, hidden_states, top_k_index=None, top_k_weights=None):
    """What `SeparateExperts` returns for these experts, numbered in this order."""
    result = torch.zeros_like(hidden_states)
    if top_k_index is None:
        tokens = len(hidden_states) // len(each)
        for number, expert in enumerate(each):
            own = slice(number * tokens, (number + 1) * tokens)
            token = hidden_states[own].ne(0).any(dim=-1).nonzero()[:, 0]
            if len(token):
                result[own][token] = expert(hidden_states[own][token]).to(result.dtype)
        return result
    for number, expert in enumerate(each):
        token, choice = torch.where(top_k_index == number)
        if len(token):
            output = expert(hidden_states[token]) * top_k_weights[token, choice, None]
            result.index_add_(0, token, output.to(result.dtype))
    return result


def router_modules(mixture):
    """The modules that choose among a mixture's experts, itself included: it may have a bias for that."""
    routers = (getattr(mixture, name, None) for name in _ROUTERS)
    return [mixture, *(module for router in routers if router is not None for module in router.modules())]


def cut_router(mixture, experts):
    """Let a mixture's router choose among so many experts: weights have a row for each, biases an element."""
    for module in router_modules(mixture):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            own = tensor.new_zeros(*tensor.shape[:-1], experts)
            if name == "weight":
                own = tensor.new_zeros(experts, *tensor.shape[1:])
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(module, name, nn.Parameter(own, tensor.requires_grad) if is_parameter else own)
        if hasattr(module, "num_experts"):
            module.num_experts = experts


def _experts_holder(layer):
    """What has a layer's experts: its MLP, or the layer itself, whose MLP is then beside them; None without."""
    mlp = getattr(layer, _first(layer, _MLPS) or "", None)
    return next((module for module in (mlp, layer) if getattr(module, "experts", None) is not None), None)


def separate_experts(model, sizes=None, bias=False):
    """Give a model's mixtures of experts separate ones. sizes: a layer's widths; None keeps the dense ones."""
    for layer_idx, layer in enumerate(model.layers):
        holder = _experts_holder(layer)
        if holder is not None:
            dense = holder.experts
            width = next(getattr(dense, name) for name in _EXPERT_WIDTHS if hasattr(dense, name))
            widths = [width] * dense.num_experts if sizes is None else sizes[layer_idx]
            if len(widths) < dense.num_experts:
                cut_router(holder, len(widths))
            holder.experts = SeparateExperts(dense, model.config.hidden_size, widths, bias)


def _keep_routers_alone_in_float32(model):
    """Have transformers keep the routers that it names `gate` in float32, and not what experts have of that name."""
    for module in model.modules():
        kept = getattr(module, "_keep_in_fp32_modules_strict", None)
        if kept:
            module._keep_in_fp32_modules_strict = {"mlp.gate.weight" if n == "gate.weight" else n for n in kept}


class PrunedMixin:
    """Gives every decoder layer of the dense architecture its own sizes."""

    def __init__(self, config):
        super().__init__(config)
        # Of a multimodal model the text decoder is pruned.
        config, decoder = getattr(config, "text_config", config), self.base_model
        decoder = getattr(decoder, "language_model", decoder)
        decoder = decoder if hasattr(decoder, "layers") else decoder.model  # a causal model may be its own base_model
        for layer_idx, layer in enumerate(decoder.layers):
            if not getattr(config, "attention_is_whole", False):
                self._resize_heads(config, layer, layer_idx)
            mlp = _first(layer, _MLPS)
            if mlp is not None and _experts_holder(layer) is None:
                self._resize_mlp(config, layer, layer_idx, mlp)
        separate_experts(decoder, getattr(config, "pruned_expert_sizes", None), config.pruned_output_bias)
        _keep_routers_alone_in_float32(self)
        self.post_init()

    @staticmethod
    def _resize_heads(config, layer, layer_idx):
        dense = layer.self_attn
        groups, output = layer_size(config, layer_idx, "num_key_value_heads"), _first(dense, _ATTENTION_OUTPUTS)
        heads = groups * dense.num_key_value_groups
        has_bias = config.pruned_output_bias or getattr(dense, output).bias is not None
        if not groups:
            layer.self_attn = OutputBiasWithCache(output, config.hidden_size, has_bias, layer_idx)
            return
        query_size, key_value_size = heads * dense.head_dim, groups * dense.head_dim
        sizes = {"q_proj": query_size, "k_proj": key_value_size, "v_proj": key_value_size}
        sizes["qkv_proj"] = query_size + 2 * key_value_size
        _resize(dense, sizes, (output, query_size, has_bias), config.hidden_size)
        for name, count in (("q_norm", heads), ("k_norm", groups)):
            weight = getattr(getattr(dense, name, None), "weight", None)
            if weight is not None and weight.ndim == 2:  # a row for each head
                getattr(dense, name).weight = nn.Parameter(torch.ones(count, dense.head_dim))
        if hasattr(dense, "qkv_proj"):  # it is cut apart by these
            dense.num_key_value_heads = groups
            dense.config = LayerConfig(config, num_attention_heads=heads, num_key_value_heads=groups)

    @staticmethod
    def _resize_mlp(config, layer, layer_idx, name):
        dense = getattr(layer, name)
        width, output = layer_size(config, layer_idx, "intermediate_size"), _first(dense, _MLP_OUTPUTS)
        if output is None:
            return
        has_bias = config.pruned_output_bias or getattr(dense, output).bias is not None
        if not width:
            setattr(layer, name, OutputBias(output, config.hidden_size, has_bias))
            return
        sizes = {rows: count * width for rows, count in _NEURON_ROWS.items()}
        _resize(dense, sizes, (output, width, has_bias), config.hidden_size)


def _first(module, names):
    return next((name for name in names if hasattr(module, name)), None)


def _resize(module, sizes, output, hidden_size):
    """New linears in the place of those that the module has. output: name, inputs and bias of the last one."""
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, nn.Linear(hidden_size, size, getattr(module, name).bias is not None))
    name, size, has_bias = output
    setattr(module, name, nn.Linear(size, hidden_size, has_bias))


class _Base(PrunedMixin):
    _auto_class = "AutoModel"


class _CausalLM(PrunedMixin):
    _auto_class = "AutoModelForCausalLM"  # save_pretrained copies this file; transformers 4 does so only if it is set


class _Multimodal(PrunedMixin):
    _auto_class = "AutoModelForImageTextToText"


_MIXINS = {"Config": PrunedConfig, "ForCausalLM": _CausalLM, "ForConditionalGeneration": _Multimodal}


def __getattr__(name):
    """`Pruned<Class>` for a model's or a config's class of transformers, made when it is asked for.

    So this file loads in every release of transformers, whichever families that has.
    """
    dense = getattr(transformers, name.removeprefix("Pruned"), None)
    if not name.startswith("Pruned") or dense is None:
        raise AttributeError(f"module {__name__} has no {name}; transformers {transformers.__version__} may be too old")
    mixin = next((mixin for suffix, mixin in _MIXINS.items() if name.endswith(suffix)), _Base)
    members = {"__module__": __name__, "__doc__": f"{dense.__name__}, pruned."}
    if mixin is not PrunedConfig:
        members["config_class"] = _made(f"Pruned{dense.config_class.__name__}")
    globals()[name] = type(name, (mixin, dense), members)
    return globals()[name]


def _made(name):
    return globals()[name] if name in globals() else __getattr__(name)

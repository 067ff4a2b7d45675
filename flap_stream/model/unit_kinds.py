"""The kinds of units that families share: projections of attention, MLPs and experts, by their usual names."""

from dataclasses import replace

from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.model.units import COLUMNS, ROWS, Projection, UnitKind

ATTENTION = UnitKind(
    Sublayer.ATTENTION,
    (
        Projection("self_attn.q_proj", ROWS, ("query",)),
        Projection("self_attn.k_proj", ROWS, ("key_value",)),
        Projection("self_attn.v_proj", ROWS, ("key_value",)),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
    norm="input_layernorm",
)
NORMED_ATTENTION = replace(  # whose queries and keys have norms with weights of each head's own
    ATTENTION,
    projections=(
        Projection("self_attn.q_norm", ROWS, ("query_head",)),
        Projection("self_attn.k_norm", ROWS, ("key_value_head",)),
        *ATTENTION.projections,
    ),
)
FUSED_ATTENTION = UnitKind(
    Sublayer.ATTENTION,
    (
        Projection("self_attn.qkv_proj", ROWS, ("query", "key_value", "key_value")),
        Projection("self_attn.o_proj", COLUMNS, ("query",)),
    ),
    norm="input_layernorm",
)


def mlp_kind(
    rows: str, output: str, module: str = "mlp", fused: int = 1, norm: str | None = "post_attention_layernorm"
) -> UnitKind:
    """The neurons of an MLP. rows: the linears that have rows for them, `fused` in each."""
    readers = tuple(Projection(f"{module}.{name}", ROWS, ("neuron",) * fused) for name in rows.split())
    return UnitKind(Sublayer.MLP, (*readers, Projection(f"{module}.{output}", COLUMNS, ("neuron",))), norm=norm)


MLP = mlp_kind("gate_proj up_proj", "down_proj")
FUSED_MLP = mlp_kind("gate_up_proj", "down_proj", fused=2)
UNGATED_MLP = mlp_kind("up_proj", "down_proj")
EXPERT = mlp_kind("gate up", "down", "mlp.experts.each.{}", norm=None)
PAIRED_EXPERT = UnitKind(  # a neuron's gate and up projection are rows next to each other
    Sublayer.MLP,
    (
        Projection("mlp.experts.each.{}.gate_up", ROWS, ("neuron_pair",)),
        Projection("mlp.experts.each.{}.down", COLUMNS, ("neuron",)),
    ),
)

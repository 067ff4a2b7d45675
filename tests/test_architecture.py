import numpy as np
import pytest
from models import tiny_config

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.errors import UnsupportedModel
from flap_stream.model.architecture import layer_shape
from flap_stream.model.families import FAMILIES, family_of
from flap_stream.model.skeleton import Skeleton
from flap_stream.model.units import COLUMNS, ROWS, Part, Projection, UnitKind

SHAPE = LayerShape(kv_groups=3, heads_per_group=2, head_dim=4, neurons=5, group_cost=0, neuron_cost=0)


def test_kept_rows_of_a_group_are_its_heads_rows() -> None:
    query = Projection("q", ROWS, ("query",)).kept_indices(np.array([0, 2]), 3, SHAPE)
    assert query.tolist() == [*range(8), *range(16, 24)]
    key = Projection("k", ROWS, ("key_value",)).kept_indices(np.array([1]), 3, SHAPE)
    assert key.tolist() == [4, 5, 6, 7]


def test_a_fused_projection_is_cut_block_by_block() -> None:
    fused = Projection("qkv", ROWS, ("query", "key_value", "key_value"))
    assert fused.size(3, SHAPE) == 48
    indices = fused.kept_indices(np.array([1]), 3, SHAPE)
    assert indices.tolist() == [*range(8, 16), *range(28, 32), *range(40, 44)]


def test_channels_of_a_part_are_kept_or_removed() -> None:
    output = Projection("o", COLUMNS, ("query",))
    part, kept = Part(UnitKind(Sublayer.ATTENTION, (output,)), 0, 3), np.array([1])
    assert part.removed_channels(kept, SHAPE).tolist() == [*range(8), *range(16, 24)]
    both = [*part.removed_channels(kept, SHAPE), *output.kept_indices(kept, 3, SHAPE)]
    assert sorted(both) == list(range(output.size(3, SHAPE)))
    assert part.removed_channels(np.arange(3), SHAPE).tolist() == []


def test_costs_come_from_tensor_shapes() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    tensors = {
        **{f"self_attn.{name}.weight": (rows, 32) for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))},
        "self_attn.o_proj.weight": (32, 32),
        **{f"mlp.{name}.weight": (7, 32) for name in ("gate_proj", "up_proj")},
        "mlp.down_proj.weight": (32, 7),
    }
    shape = layer_shape(FAMILIES["llama"], config, tensors)
    assert (shape.kv_groups, shape.heads_per_group, shape.head_dim, shape.neurons) == (2, 2, 8, 7)
    assert shape.group_cost == 32 * 8 * (2 * 2 + 2) and shape.neuron_cost == 3 * 32
    assert shape.prunable == sum(rows * columns for rows, columns in tensors.values())


def test_units_of_a_column_projection_are_its_inputs() -> None:
    for family in FAMILIES.values():
        assert all(kind.output.axis == COLUMNS for kind in family.kinds)
        assert all(p.axis == ROWS for kind in family.kinds for p in kind.projections[:-1])


def test_other_families_are_refused_with_those_of_similar_names() -> None:
    with pytest.raises(
        UnsupportedModel, match=rf"'gpt2', which is none of the {len(FAMILIES)} supported families \(the"
    ):
        family_of({"model_type": "gpt2"}, "somewhere")
    with pytest.raises(UnsupportedModel, match=r"'qwen3_4', .* \(of similar names: qwen3, .*; the project"):
        family_of({"model_type": "qwen3_4"}, "somewhere")


def test_a_mixture_larger_than_the_machine_can_be_looked_at() -> None:
    config = tiny_config("mixtral", hidden_size=1 << 16, intermediate_size=1 << 20, num_local_experts=8).to_dict()
    shape = Skeleton(config, "here").layer_shape(1)  # whose experts' weights are 6 TiB
    assert shape.experts == (1 << 20,) * 8 and shape.neuron_cost == 3 << 16

"""Sizes of one decoder layer, as all decisions and counts see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    heads_per_group: query heads that read one KV head; 1 is multi-head attention.
    group_cost, neuron_cost: weights that go with one KV group, with one neuron.
    group_biases, neuron_biases: elements of biases that go with them.
    attention_rest, mlp_rest: elements of other tensors of the module, which go with its last unit.
    added_biases: elements of the output biases that a restoration adds, where there are none.
    experts: neurons of each expert, one after another in `neurons`; empty for an MLP without experts.
    """

    kv_groups: int
    heads_per_group: int
    head_dim: int
    neurons: int
    group_cost: int
    neuron_cost: int
    experts: tuple[int, ...] = ()
    group_biases: int = 0
    neuron_biases: int = 0
    attention_rest: int = 0
    mlp_rest: int = 0
    added_biases: int = 0

    @property
    def prunable(self) -> int:
        """Weights of the layer's pruned projections."""
        return self.kv_groups * self.group_cost + self.neurons * self.neuron_cost

    def units(self, kind: str) -> int:
        """How many units of a kind (`attention` or `mlp`) the layer has."""
        return self.kv_groups if kind == "attention" else self.neurons

    def block_size(self, block: str) -> int:
        """Rows or columns that one unit has in a block of a projection."""
        return {"query": self.heads_per_group * self.head_dim, "key_value": self.head_dim, "neuron": 1}[block]

"""The two sublayers of a decoder layer, and the sizes of a layer as every decision and count sees them."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Sublayer(StrEnum):
    """The two halves of a decoder layer; their names are those of stored arrays.

    The units of attention are KV groups: a KV head and the query heads that read it. Those of an MLP are neurons.
    """

    ATTENTION = "attention"
    MLP = "mlp"

    @property
    def units(self) -> str:
        """What its units are called in messages."""
        return "KV groups" if self is Sublayer.ATTENTION else "neurons"

    @property
    def minimum_option(self) -> str:
        """The option for how many of them every layer keeps."""
        return "--min-heads" if self is Sublayer.ATTENTION else "--min-neurons"


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer.

    heads_per_group: query heads that read one KV head; 1 is multi-head attention.
    group_cost, neuron_cost: weights that are removed with one KV group, with one neuron; 0 if none can be removed.
    group_biases, neuron_biases: elements of biases that are removed with them.
    attention_rest, mlp_rest: elements of other tensors of the module, which are removed with its last unit.
    added_biases: elements of the output biases that a restoration adds where the model has none.
    experts: neurons of each expert, one after another in `neurons`; empty for an MLP without experts.
    expert_rest: elements of other tensors that are removed with a whole expert: of the router, and its output bias.
    expert_added: elements of the output bias that a restoration adds to each expert.
    router_needs: the least number of experts that the router can choose among.
    elements: of all tensors of the layer.
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
    expert_rest: int = 0
    expert_added: int = 0
    router_needs: int = 0
    elements: int = 0

    @property
    def prunable(self) -> int:
        """Weights of the layer's pruned projections."""
        return self.kv_groups * self.group_cost + self.neurons * self.neuron_cost

    @property
    def attention_channels(self) -> int:
        """Input channels of attention's output projection."""
        return self.kv_groups * self.heads_per_group * self.head_dim

    def expert_sizes(self, neurons: np.ndarray) -> np.ndarray:
        """How many of these neurons each expert has, int64 `[expert]`. neurons: ascending indices."""
        return np.diff(np.searchsorted(neurons, np.cumsum((0, *self.experts))))

    def kept_experts(self, neurons: np.ndarray) -> list[int]:
        """The experts with at least one neuron, if these are kept."""
        return np.flatnonzero(self.expert_sizes(neurons)).tolist()

    def units(self, sublayer: Sublayer) -> int:
        """How many units one of its sublayers has."""
        return self.kv_groups if sublayer == Sublayer.ATTENTION else self.neurons

    def unit_cost(self, sublayer: Sublayer) -> int:
        """Weights that are removed with one unit."""
        return self.group_cost if sublayer == Sublayer.ATTENTION else self.neuron_cost

    def block_size(self, block: str) -> int:
        """Rows or columns of one unit in a block of a projection.

        block: `query`, `key_value`, `neuron` or `neuron_pair`; `query_head` and `key_value_head` where a row is a whole
        head.
        """
        query, heads = self.heads_per_group * self.head_dim, {"query_head": self.heads_per_group, "key_value_head": 1}
        return {"query": query, "key_value": self.head_dim, "neuron": 1, "neuron_pair": 2, **heads}[block]

"""The sizes that a decision leads to: parameters, removed shares, widths. All that is printed or stored of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import FAST_MULTIPLE

# Measured in bf16 with a hidden size of 8192, for 512 and 16384 tokens; 21016 are as fast as the dense model's 22016.
_SLOW_WIDTH = "on an H200, 21015 neurons take 7 times as long as 21016"


@dataclass(frozen=True)
class PrunedSizes:
    """Sizes of a pruned model.

    decoder_ratio: removed share of the decoder layers' prunable weights. parameters_before, parameters_after: elements
    of all tensors in the files, including the added_biases of a restoration; model_ratio: the share of them that is
    removed. width_multiple: the largest number of which every width is a multiple (KV groups times head_dim, neurons,
    each expert's); 0 if nothing is kept. experts_before, experts_after: those of all layers.
    """

    decoder_ratio: float
    model_ratio: float
    parameters_before: int
    parameters_after: int
    added_biases: int
    width_multiple: int
    experts_before: int
    experts_after: int

    def record(self) -> dict[str, Any]:
        """As pruning.json and `plan --json` hold them; experts only if any is removed."""
        experts = {"before": self.experts_before, "after": self.experts_after}
        return {
            "realised_ratio": {"decoder": self.decoder_ratio, "model": self.model_ratio},
            "parameters": {
                "before": self.parameters_before,
                "after": self.parameters_after,
                "added_biases": self.added_biases,
            },
            **({"experts": experts} if self.experts_after < self.experts_before else {}),
            "width_multiple": self.width_multiple,
        }


def pruned_sizes(
    shapes: Sequence[LayerShape], keeps: Sequence[LayerKeep], parameters: int, restore: str
) -> PrunedSizes:
    """Sizes of a model of `parameters` parameters after a decision, with a restoration (`none` adds no biases)."""
    pairs = list(zip(shapes, keeps, strict=True))
    prunable = sum(shape.prunable for shape in shapes)
    removed = prunable - sum(keep.cost(shape) for shape, keep in pairs)
    added = 0 if restore == "none" else sum(_added_biases(shape, keep) for shape, keep in pairs)
    after = parameters + added - removed - sum(_removed_besides(shape, keep) for shape, keep in pairs)
    return PrunedSizes(
        decoder_ratio=removed / prunable,
        model_ratio=(parameters - after) / parameters,
        parameters_before=parameters,
        parameters_after=after,
        added_biases=added,
        width_multiple=_width_multiple(pairs),
        experts_before=sum(len(shape.experts) for shape in shapes),
        experts_after=sum(len(shape.kept_experts(keep.neurons)) for shape, keep in pairs),
    )


def _added_biases(shape: LayerShape, keep: LayerKeep) -> int:
    """Elements of the output biases that a restoration adds to what is kept."""
    if keep.is_gone:
        return 0
    return shape.added_biases - _removed_experts(shape, keep) * shape.expert_added


def _removed_experts(shape: LayerShape, keep: LayerKeep) -> int:
    return len(shape.experts) - len(shape.kept_experts(keep.neurons))


def _removed_besides(shape: LayerShape, keep: LayerKeep) -> int:
    """Elements removed besides the pruned weights.

    They are biases of units, what goes with an expert, norms of a module that loses all its units, and all that a whole
    layer has.
    """
    if keep.is_gone:
        return shape.elements - shape.prunable
    groups, neurons = len(keep.kv_groups), len(keep.neurons)
    biases = (shape.kv_groups - groups) * shape.group_biases + (shape.neurons - neurons) * shape.neuron_biases
    biases += _removed_experts(shape, keep) * shape.expert_rest
    return biases + (0 if groups else shape.attention_rest) + (0 if neurons else shape.mlp_rest)


def _width_multiple(pairs: Sequence[tuple[LayerShape, LayerKeep]]) -> int:
    widths: list[int] = []
    for shape, keep in pairs:
        own = shape.expert_sizes(keep.neurons).tolist() if shape.experts else [len(keep.neurons)]
        widths += [len(keep.kv_groups) * shape.head_dim, *own]
    return gcd(*widths)


def width_note(width_multiple: int) -> str:
    """What the widths mean for speed, as a sentence."""
    if width_multiple % FAST_MULTIPLE == 0:
        return f"every width is a multiple of {FAST_MULTIPLE}, which GPUs need in bf16 and fp16: {_SLOW_WIDTH}"
    return (
        f"not every width is a multiple of {FAST_MULTIPLE}, so GPUs are slow in bf16 and fp16: {_SLOW_WIDTH}; "
        f"--round-neurons-to {FAST_MULTIPLE}, the default, rounds all that the dense sizes allow"
    )

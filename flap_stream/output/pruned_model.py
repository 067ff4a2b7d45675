"""What is written, as a value: the dense model, what is kept of it, and what compensates for the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.config import PlanConfig
from flap_stream.model.architecture import Family
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import family_of
from flap_stream.model.safetensors_format import TensorEntry


@dataclass(frozen=True)
class Restoration:
    """What compensates for the removed channels: biases from means, refitted tensors, or nothing.

    means: a layer's mean inputs by kind (`attention`, `mlp`), float64 `[channel]`; None adds no biases.
    refitted: tensor name to the entry that replaces it, its file as an absolute path.
    digests: of the files of the refitted tensors. how: what pruning.json records of the refit.
    """

    means: Sequence[dict[str, np.ndarray]] | None = None
    refitted: Mapping[str, TensorEntry] = field(default_factory=dict)
    digests: Sequence[str] = ()
    how: dict[str, Any] | None = None


@dataclass(frozen=True)
class PrunedModel:
    """Everything that decides the bytes of a pruned checkpoint, except its division into shards.

    source: the dense checkpoint. shapes, keeps: dense sizes and kept units of each layer. options: of the plan.
    restore: one of `config.RESTORATIONS`; restoration: the values that it needs.
    calibration: what pruning.json records of the calibration. code: names of the tokenizer's own code files, where the
    user trusts them, which are copied. target: what pruning.json records of a target; None without one.
    recipe: the contents of recipe.toml. config: of the dense model, for the layers that are kept; None if all are.
    linears: names of the weights that are written in FP8 if their sizes allow it; None writes all tensors in the dtypes
    that they have.
    """

    source: Checkpoint
    shapes: Sequence[LayerShape]
    options: PlanConfig
    keeps: Sequence[LayerKeep]
    restore: str
    restoration: Restoration
    calibration: dict[str, Any]
    code: Sequence[str] = ()
    target: dict[str, Any] | None = None
    recipe: bytes = b""
    config: dict[str, Any] | None = None
    linears: frozenset[str] | None = None

    @cached_property
    def family(self) -> Family:
        """The model family of the dense checkpoint."""
        return family_of(self.source.config, self.source.source)

    @property
    def kept(self) -> list[tuple[LayerShape, LayerKeep]]:
        """Dense sizes and kept units of the layers that are not removed as a whole."""
        return [(shape, keep) for shape, keep in self.layers if not keep.is_gone]

    @property
    def layers(self) -> list[tuple[LayerShape, LayerKeep]]:
        """Dense sizes and kept units, by layer."""
        return list(zip(self.shapes, self.keeps, strict=True))

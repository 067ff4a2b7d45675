"""Units of pruning: which rows and columns of which projections are kept or removed together.

A unit is one KV group of attention (its key and value head with the query heads that read it) or one neuron of the MLP.
"""

from dataclasses import dataclass, replace

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer

ROWS, COLUMNS = 0, 1
HOLE = -1  # in place of an index: a row or column of zeros


@dataclass(frozen=True)
class Projection:
    """A linear whose rows (or columns) belong to units.

    name: module path inside the decoder layer.
    axis: ROWS or COLUMNS of its `[out, in]` weight.
    blocks: what that axis consists of, in order; a fused projection has several.
    """

    name: str
    axis: int
    blocks: tuple[str, ...]

    def kept_indices(self, kept_units: np.ndarray, units: int, shape: LayerShape) -> np.ndarray:
        """Kept rows or columns, ascending int64. kept_units: int64 indices into `units` units."""
        offset, parts = 0, []
        for block in self.blocks:
            size = shape.block_size(block)
            parts.append((offset + kept_units[:, None] * size + np.arange(size)[None, :]).ravel())
            offset += units * size
        return np.concatenate(parts).astype(np.int64)

    def padded_indices(self, units: int, wanted: int, shape: LayerShape) -> np.ndarray:
        """Rows or columns of `units` units, padded with HOLE up to `wanted` units; int64."""
        offset, parts = 0, []
        for block in self.blocks:
            size = shape.block_size(block)
            length = units * size
            parts += [np.arange(offset, offset + length), np.full(wanted * size - length, HOLE)]
            offset += length
        return np.concatenate(parts).astype(np.int64)

    def size(self, units: int, shape: LayerShape) -> int:
        """Length of the pruned axis for a number of units."""
        return units * sum(shape.block_size(block) for block in self.blocks)


@dataclass(frozen=True)
class UnitKind:
    """A kind of unit: all projections that are cut when one is removed. Statistics are of the last one's inputs.

    expert: the number of the expert whose neurons they are; None if they are no expert's.
    norm: path, inside the decoder layer, of the norm that only they read from, in families that do not norm outputs;
    None if there is none, or it is not known.
    """

    name: Sublayer
    projections: tuple[Projection, ...]
    norm: str | None = None
    expert: int | None = None

    @property
    def readers(self) -> list[Projection]:
        """The projections that read the hidden states."""
        return [projection for projection in self.projections if projection.axis == ROWS]

    @property
    def output(self) -> Projection:
        """The projection that reads the units' outputs (o_proj, down_proj)."""
        return self.projections[-1]

    def numbered(self, number: int) -> "UnitKind":
        """The same kind for one expert, its number put into the names."""
        projections = tuple(replace(p, name=p.name.format(number)) for p in self.projections)
        return replace(self, projections=projections, expert=number)

    @property
    def module(self) -> str:
        """Path, inside the decoder layer, of the module that is removed with its last unit."""
        return self.output.name.rpartition(".")[0]


@dataclass(frozen=True)
class Part:
    """Units of one module in a layer: all of a kind or, in a mixture of experts, those of one expert.

    first: the first of them among the layer's units of that kind; units: how many.
    """

    kind: UnitKind
    first: int
    units: int

    def own(self, kept_units: np.ndarray) -> np.ndarray:
        """Those of the layer's kept units that belong to this part, counted from its first."""
        low, high = np.searchsorted(kept_units, (self.first, self.first + self.units))
        return kept_units[low:high] - self.first

    def channels(self, shape: LayerShape) -> slice:
        """The slice of its output projection's inputs within those of the whole kind."""
        per_unit = self.kind.output.size(1, shape)
        return slice(self.first * per_unit, (self.first + self.units) * per_unit)

    def removed_channels(self, units: np.ndarray, shape: LayerShape) -> np.ndarray:
        """Removed inputs of its output projection, ascending int64. units: its kept units, as from `own`."""
        removed = np.setdiff1d(np.arange(self.units), units)
        return self.kind.output.kept_indices(removed, self.units, shape)

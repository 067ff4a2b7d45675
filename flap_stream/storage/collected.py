"""What a collection leaves in a run directory: its calibration tokens, and the statistics of each layer."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from flap_stream.arithmetic.layer_shape import LayerShape
from flap_stream.arithmetic.scoring import BlockStatistics, ChannelStatistics, ExpertStatistics, LayerStatistics
from flap_stream.errors import CorruptRun
from flap_stream.storage import arrays
from flap_stream.storage.journal import COST
from flap_stream.storage.run_files import KINDS, Committed, RunFiles, layer_name
from flap_stream.storage.run_manifest import Manifest, tokens_digest
from flap_stream.storage.schema import natural

ARRAYS = ("count", "mean", "m2", "released_fluctuation", "released_baseline", "weight_squared_norm", "weight_abs_mean")
_TOKENS = "tokens.zarr"
_STATISTICS = "statistics.zarr"
_ATTRIBUTES = {kind: {"samples": natural} for kind in KINDS}
# What is stored besides, for some methods: the field of LayerStatistics, and its type.
_BESIDE: dict[str, tuple[str, type]] = {"reap": ("experts", ExpertStatistics), "shortgpt": ("block", BlockStatistics)}


@dataclass(frozen=True)
class TokenStore:
    """The calibration windows, in tokens.zarr."""

    run_files: RunFiles
    manifest: Manifest

    def write(self, tokens: np.ndarray) -> None:
        """Store the windows, int64 `[sample, token]`."""
        digest = self.run_files.commit_group(_TOKENS, {"tokens": tokens}, {})
        self.run_files.journal.append("tokens", "tokens", digest=digest)

    def exists(self) -> bool:
        """Whether the windows are stored."""
        return self.run_files.journal.find("tokens", "tokens") is not None

    def read(self) -> np.ndarray:
        """The stored windows, int64 `[sample, token]`.

        Raises CorruptRun if they are missing, altered, or not those the run was made for.
        """
        found = self.committed()
        if not found:
            raise self.run_files.incomplete(_TOKENS)
        (tokens,), _ = self.run_files.read_group(found[0], self._array_specs())
        in_vocabulary = not tokens.size or 0 <= tokens.min() <= tokens.max() < self.manifest["sizes"]["vocabulary"]
        if not in_vocabulary or tokens_digest(tokens) != self.manifest["tokens"]["sha256"]:
            raise CorruptRun(
                f"{self.run_files.path / _TOKENS} holds other tokens than the run was made for; delete the run "
                "directory and collect again"
            )
        return tokens

    def committed(self) -> list[Committed]:
        """The windows, if they are stored."""
        entry = self.run_files.journal.find("tokens", "tokens")
        return [] if entry is None else [Committed(_TOKENS, entry["digest"], arrays.max_bytes(self._array_specs()))]

    def _array_specs(self) -> dict[str, arrays.ArraySpec]:
        samples, length = self.manifest["tokens"]["shape"]
        return {"tokens": ("int64", (samples, length))}


@dataclass(frozen=True)
class LayerCost:
    """What collecting one layer took, from the end of the layer before it until its statistics were ready to write.

    tokens: tokens run through the layer. peak_host_bytes, peak_device_bytes: of the process so far.
    """

    seconds: float
    tokens: int
    peak_host_bytes: int
    peak_device_bytes: int


@dataclass(frozen=True)
class StatisticsStore:
    """The statistics of each layer, in statistics.zarr.

    shapes: those of all layers. method: for which they are collected; some need more than channels.
    """

    run_files: RunFiles
    shapes: list[LayerShape]
    method: str = "flap"

    def complete_layers(self) -> int:
        """How many layers, counted from the first, have their statistics stored."""
        done = {entry["name"] for entry in self.run_files.journal.of_kind("statistics")}
        count = 0
        while count < len(self.shapes) and layer_name(count) in done:
            count += 1
        return count

    def write(self, layer: int, statistics: LayerStatistics, weights: str, cost: LayerCost | None = None) -> None:
        """Store a layer's statistics, all or nothing.

        weights: checksum of the weights they were collected with.
        """
        values: dict[str, np.ndarray] = {}
        attributes: dict[str, dict[str, int]] = {}
        for kind in KINDS:
            channels = statistics.of(kind)
            values |= {f"{kind}/{array}": getattr(channels, array) for array in ARRAYS}
            attributes[kind] = {"samples": channels.samples}
        if self.method in _BESIDE:
            beside, _ = _BESIDE[self.method]
            values |= {f"{beside}/{name}": array for name, array in vars(getattr(statistics, beside)).items()}
        journal = self.run_files.journal
        if journal.find("statistics-root", "layers") is None:
            self.run_files.commit_group(_STATISTICS, {}, {}, groups=("layers",))
            journal.append("statistics-root", "layers")
        name = _path(layer)
        digest = self.run_files.commit_group(name, values, attributes)
        optional = {} if cost is None else {"cost": asdict(cost)}
        journal.append("statistics", layer_name(layer), digest=digest, weights=weights, **optional)

    def read(self, layer: int) -> LayerStatistics:
        """A layer's statistics. Raises CorruptRun if they are missing or altered."""
        entry = self.run_files.journal.find("statistics", layer_name(layer))
        if entry is None:
            raise self.run_files.incomplete(_path(layer))
        committed, specs = self._committed(layer, entry), self._array_specs(layer)
        found, attributes = self.run_files.read_group(committed, specs, _ATTRIBUTES)
        parts: dict[str, Any] = {}
        for i, name in enumerate(KINDS):
            values: dict[str, Any] = dict(zip(ARRAYS, found[i * len(ARRAYS) :], strict=False))
            parts[name] = ChannelStatistics(samples=attributes[name]["samples"], **values)
        if self.method in _BESIDE:
            beside, kind = _BESIDE[self.method]
            parts[beside] = kind(*found[len(KINDS) * len(ARRAYS) :])
        return LayerStatistics(**parts)

    def weights_checksums(self) -> list[str]:
        """Checksums of the weights that the complete layers were collected with, by layer."""
        return [entry["weights"] for entry in self._entries()]

    def costs(self) -> list[LayerCost | None]:
        """What collecting each complete layer took; None where that was not recorded."""
        found = (entry.get("cost") for entry in self._entries())
        return [None if cost is None else LayerCost(**{name: cost[name] for name in COST}) for cost in found]

    def committed(self) -> list[Committed]:
        """The statistics of all complete layers."""
        return [self._committed(layer, entry) for layer, entry in enumerate(self._entries())]

    def _entries(self) -> list[dict[str, Any]]:
        """The newest journal entry of each complete layer."""
        newest = {entry["name"]: entry for entry in self.run_files.journal.of_kind("statistics")}
        return [newest[layer_name(layer)] for layer in range(self.complete_layers())]

    def _committed(self, layer: int, entry: dict[str, Any]) -> Committed:
        return Committed(_path(layer), entry["digest"], arrays.max_bytes(self._array_specs(layer)))

    def _array_specs(self, layer: int) -> dict[str, arrays.ArraySpec]:
        shape = self.shapes[layer]
        channels = {"attention": shape.attention_channels, "mlp": shape.neurons}
        specs: dict[str, arrays.ArraySpec] = {
            f"{kind}/{array}": ("int64" if array == "count" else "float64", (channels[kind],))
            for kind in KINDS
            for array in ARRAYS
        }
        if self.method in _BESIDE:
            beside, kind = _BESIDE[self.method]
            size = (len(shape.experts) if beside == "experts" else 1,)
            for own in fields(kind):
                specs[f"{beside}/{own.name}"] = "int64" if own.name == "count" else "float64", size
        return specs


def _path(layer: int) -> str:
    return f"{_STATISTICS}/layers/{layer_name(layer)}"

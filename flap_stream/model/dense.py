"""Describes an unpruned model, from its config and headers, to a user who mistakes it for a result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flap_stream.errors import InvalidInput
from flap_stream.model.families import FAMILIES
from flap_stream.model.opening import open_checkpoint


@dataclass(frozen=True)
class DenseModel:
    """A model as its config.json describes it; None for what is missing there.

    parameters, weight_bytes: of all tensors in its files. is_prunable: whether it is of a supported family.
    """

    model_type: str
    architecture: str | None
    layers: int | None
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    neurons: int | None
    parameters: int
    weight_bytes: int
    is_prunable: bool

    def __str__(self) -> str:
        """A short description."""
        kind = self.architecture or f"model_type {self.model_type}"
        layers = "" if self.layers is None else f"{self.layers} layers, "
        return f"a dense model ({kind}, {layers}{self.parameters:,} parameters)"


def dense_model(place: Path) -> DenseModel | None:
    """The model in a directory; None if there is no config.json.

    Raises InvalidModel for one that cannot be read.
    """
    if not (place / "config.json").is_file():
        return None
    with open_checkpoint(place) as source:
        config, architectures = source.config, source.config.get("architectures")
        return DenseModel(
            model_type=str(config.get("model_type")),
            architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
            layers=_count(config, "num_hidden_layers"),
            hidden_size=_count(config, "hidden_size"),
            heads=_count(config, "num_attention_heads"),
            kv_heads=_count(config, "num_key_value_heads"),
            neurons=_count(config, "intermediate_size"),
            parameters=source.parameters,
            weight_bytes=source.nbytes,
            is_prunable=str(config.get("model_type")) in FAMILIES,
        )


def _count(config: dict[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) else None


def nothing_pruned(place: Path) -> InvalidInput:
    """The error for a directory that holds neither a run nor a pruned checkpoint."""
    model = dense_model(place)
    if model is None:
        return InvalidInput(f"{place} is neither a run directory (run.json) nor a pruned checkpoint (pruning.json)")
    return InvalidInput(
        f"{place} is {model}, in which nothing was pruned; give a run directory or a pruned checkpoint, "
        f"both of which flap-stream prune {place} OUT --keep-run makes"
    )

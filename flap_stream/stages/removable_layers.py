"""Whether whole layers can be removed from a model, and what its config.json says without them."""

from collections.abc import Sequence
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep, kept_layers
from flap_stream.config import CollectConfig
from flap_stream.config.options import removes_layers
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.layer_numbers import renumbered_config
from flap_stream.model.skeleton import Skeleton


def require_removable_layers(model: StreamedModel, options: CollectConfig) -> None:
    """Raise UnsupportedModel if whole layers are to be removed of a model of which they cannot be.

    What that means for each choice of layers is looked at when it has been made: see `config_of_kept`.
    """
    if not removes_layers(options):
        return
    if model.checkpoint.wrapper is not None:
        raise UnsupportedModel(
            f"{model.checkpoint.source} is a multimodal model, which may add features of images between layers, so "
            "none can be removed; prune heads and neurons instead"
        )
    if len(model.layers) > 1:
        renumbered_config(model.skeleton, range(1, len(model.layers)))


def config_of_kept(source: Checkpoint, keeps: Sequence[LayerKeep]) -> dict[str, Any]:
    """The contents of config.json for the layers that are not removed as a whole.

    Raises UnsupportedModel if the others cannot be removed.
    """
    kept = kept_layers(keeps)
    if len(kept) == len(keeps):
        return source.config
    return renumbered_config(Skeleton(source.config, source.source), kept)

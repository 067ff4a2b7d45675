"""What is shown of a job before its first layer: the model, how it runs, and the predicted memory."""

from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.progress import format_bytes


def model_row(source: Checkpoint, layers: int) -> dict[str, str]:
    """The row that names the model."""
    kind = source.config.get("model_type")
    return {"model": f"{source.source} ({kind}, {layers} layers, {source.parameters:,} parameters)"}


def engine_rows(model: StreamedModel, placement: Placement, samples: int, length: int) -> dict[str, str]:
    """The rows that say how the layers run over `samples` windows of `length` tokens, and the memory."""
    device, dtype = model.device, str(model.dtype).removeprefix("torch.")
    how = [f"{dtype} on {device}"]
    if samples:
        how.append(f"{min(placement.batch_size, samples)} of {samples} windows of {length} tokens at once")
        how.append(f"hidden states on the {placement.hidden_place}")
    how.append("one layer read ahead" if placement.prefetch else "no layer read ahead")
    memory = f"{format_bytes(placement.host_bytes)} at its peak by prediction"
    if device.type != "cpu":
        memory += f", {format_bytes(placement.device_bytes)} on {device}"
    each = f", each of {model.ranks.world} ranks" if model.ranks.world > 1 else ""
    return {"run as": ", ".join(how), "memory": memory + each}

"""What the backward pass takes, before it runs: for the placement, the disk and the forecast."""

from dataclasses import replace

from flap_stream.config import CollectConfig
from flap_stream.engine.placement import Job
from flap_stream.engine.streamed_model import StreamedModel


def backward_job(model: StreamedModel, options: CollectConfig, samples: int, tokens: int) -> Job | None:
    """The job of the backward pass after a collection over that many windows of `tokens` tokens; None if there is none.

    Its batches may be smaller than those of the collection, since the activations of a batch stay alive.
    """
    windows = min(options.loss_windows, samples)
    if not windows:
        return None
    job = model.job(windows, tokens, head=True, backward=True)
    return replace(job, keeps_batch_size=False, of_experts=options.whole_experts)


def kept_input_bytes(backward: Job | None) -> int:
    """Bytes of the layer inputs on the disk, and of the last layer's output."""
    if backward is None:
        return 0
    values = backward.samples * backward.tokens * backward.state_size
    return (len(backward.layers) + 1) * values * backward.dtype.itemsize


def backward_operations(backward: Job, layers: int) -> int:
    """Multiplications and additions of a forward and a backward pass to what layers and the head read.

    layers: of all layers' products in a forward pass over the same windows.
    """
    head = 0 if backward.head is None else backward.head.shape[0] * backward.head.shape[1]
    return 2 * (layers + 2 * head * backward.samples * backward.tokens)

"""What the sweep by the loss takes, before it runs: for the placement, the disk and the forecast."""

from dataclasses import replace

from flap_stream.config import CollectConfig
from flap_stream.engine.placement import Job
from flap_stream.engine.streamed_model import StreamedModel


def sweep_job(model: StreamedModel, options: CollectConfig, samples: int, tokens: int) -> Job | None:
    """The job of the sweep after a collection over that many windows of `tokens` tokens; None if there is none.

    Its batches may be smaller than those of the collection, since the activations of a batch stay alive.
    """
    windows = min(options.loss_windows, samples)
    if not windows:
        return None
    job = model.job(windows, tokens, head=True, backward=True)
    return replace(job, keeps_batch_size=False, of_experts=options.whole_experts)


def kept_input_bytes(sweep: Job | None) -> int:
    """Bytes of the layer inputs on the disk, and of the last layer's output."""
    if sweep is None:
        return 0
    return (len(sweep.layers) + 1) * sweep.samples * sweep.tokens * sweep.state_size * sweep.dtype.itemsize


def sweep_operations(sweep: Job, layers: int) -> int:
    """Multiplications and additions of the sweep: a forward and a backward pass to what layers and the head read.

    layers: of all layers' products in a forward pass over the same windows.
    """
    head = 0 if sweep.head is None else sweep.head.shape[0] * sweep.head.shape[1]
    return 2 * (layers + 2 * head * sweep.samples * sweep.tokens)

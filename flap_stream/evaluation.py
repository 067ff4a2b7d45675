"""Streaming perplexity of a dense or pruned checkpoint."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from flap_stream.calibration import evaluation_tokens, load_tokenizer
from flap_stream.checkpoint import open_checkpoint
from flap_stream.config import EvaluateConfig
from flap_stream.layers import BatchSizes, StreamedModel
from flap_stream.planner import Placement
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity over `windows` windows of `sequence_length` tokens, and what it took."""

    perplexity: float
    windows: int
    sequence_length: int
    seconds: float
    bytes_read: int
    peak_host_bytes: int
    peak_device_bytes: int


def evaluate(model: str | Path, options: EvaluateConfig, progress: Progress | None = None) -> EvaluateResult:
    """Perplexity of a model (directory or Hub id), one decoder layer in memory at a time.

    Every window predicts its tokens but the first from those before them in the window; the perplexity is the
    exponential of the mean negative log-likelihood of all predictions (eval_ppl in lib/eval.py of the released code).
    Raises InvalidInput for a model or text that cannot be evaluated.
    """
    started = time.monotonic()
    progress = progress or Progress()
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        streamed = StreamedModel(checkpoint, options)
        tokens = evaluation_tokens(
            options.text,
            options.samples,
            options.sequence_length,
            lambda: load_tokenizer(checkpoint.directory, options.trust_remote_code),
            streamed.vocab_size,
        )
        placement = streamed.place(options, *tokens.shape, head=True)
        mean = _mean_negative_log_likelihood(streamed, tokens, placement, progress)
    return EvaluateResult(
        perplexity=float(np.exp(mean)),
        windows=len(tokens),
        sequence_length=tokens.shape[1],
        seconds=time.monotonic() - started,
        bytes_read=checkpoint.bytes_read,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
    )


def _mean_negative_log_likelihood(
    model: StreamedModel, tokens: np.ndarray, placement: Placement, progress: Progress
) -> float:
    """Mean over all predicted tokens, in nats; summed in float64. tokens: int64 `[sample, token]`."""
    samples, length = tokens.shape
    batch, sizes = placement.batch_size, BatchSizes(placement.batch_size)
    with model.hidden_states(placement.hidden_place, samples, length) as hidden:
        with progress.stage("evaluate", len(model.layers)) as stage:
            model.embed(tokens, batch, hidden)
            for i, weights in model.stream(prefetch=placement.prefetch):
                model.forward_layer(i, weights, hidden, sizes)
                stage.advance(tokens=tokens.size, bytes_moved=model.layer_bytes(i))
        logits_of, total = model.head(), 0.0
        for start, values in hidden.stream(batch):
            inputs = values[:, :-1].reshape(-1, model.hidden_size)  # [prediction, hidden]
            targets = torch.from_numpy(tokens[start : start + len(values), 1:].reshape(-1)).to(model.device)
            for first, logits in logits_of(inputs):
                chunk = targets[first : first + len(logits)]
                total += float(functional.cross_entropy(logits, chunk, reduction="sum"))
    return total / (samples * (length - 1))

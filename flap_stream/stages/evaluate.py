"""Streaming perplexity of a dense or pruned checkpoint."""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from flap_stream.config import EngineConfig, EvaluateConfig
from flap_stream.config.rules import options_of, warn_of_positions
from flap_stream.engine.device import in_use
from flap_stream.engine.layer_pass import Batch, LayerPass
from flap_stream.engine.membership import joined
from flap_stream.engine.memory import give_back_heap
from flap_stream.engine.placement.prediction import Placement
from flap_stream.engine.streamed_model import Logits, StreamedModel
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.hub import base_name
from flap_stream.model.opening import open_checkpoint
from flap_stream.output.evaluations import Evaluation, require_pruned, save_evaluation
from flap_stream.output.pruning_record import fingerprint_digest
from flap_stream.progress import Progress, peak_device_bytes, peak_host_bytes
from flap_stream.stages.job_header import engine_rows, model_row
from flap_stream.storage.run_manifest import tokens_digest
from flap_stream.text.tokenization import load_tokenizer
from flap_stream.text.windows import TextWanted, check_text, evaluation_text, evaluation_tokens


@dataclass(frozen=True)
class EvaluateResult:
    """Perplexity over `windows` windows of `sequence_length` tokens, and what the call took.

    standard_error: of the perplexity, from the spread of the windows; None for a single window. window_nll: each
    window's mean negative log-likelihood in nats; compare two models by the paired differences of theirs.
    """

    perplexity: float
    windows: int
    sequence_length: int
    seconds: float
    bytes_read: int
    peak_host_bytes: int
    peak_device_bytes: int
    standard_error: float | None = None
    window_nll: tuple[float, ...] = field(default=(), repr=False)


def evaluate(
    model: str | Path,
    options: EvaluateConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> EvaluateResult:
    """Perplexity of a model (directory or Hub id), streamed one decoder layer at a time.

    Every token of a window but the first is predicted from those before it in the window; perplexity is the
    exponential of the mean negative log-likelihood over all predictions (eval_ppl in lib/eval.py of the released code).
    keywords: the fields of `EvaluateConfig`, in place of `options`. progress: True shows it on stderr.
    Raises InvalidInput for a model or text that cannot be evaluated.
    """
    options = options_of(EvaluateConfig, "evaluate", options, keywords)
    started, progress = time.monotonic(), Progress.of(progress)
    wanted = evaluation_text(options.text, options.samples, options.sequence_length, options)
    with joined() as ranks, torch.inference_mode(), ExitStack() as opened:
        ranks.from_first(lambda: check_text(wanted, model))
        if options.save is not None:
            ranks.from_first(lambda: require_pruned(Path(str(options.save))))
        checkpoint = opened.enter_context(open_checkpoint(model))
        streamed = StreamedModel(checkpoint, options, ranks)
        opened.enter_context(in_use(streamed.device))
        progress.header(model_row(checkpoint, len(streamed.layers)))
        progress.say("reading the text")
        tokens = ranks.from_first(lambda: windows_of(wanted, streamed, options))
        warn_of_positions(checkpoint.config, tokens.shape[1])
        give_back_heap()
        placement = streamed.place(options, streamed.job(*tokens.shape, head=True))
        progress.header(engine_rows(streamed, placement, *tokens.shape))
        scores, _ = score_tokens(streamed, tokens, placement, progress)
        bytes_read = sum(ranks.gathered(checkpoint.bytes_read))
        perplexity = perplexity_of(scores)
        if options.save is not None and ranks.is_first:
            _save(Path(options.save), checkpoint, options.text, tokens, perplexity)
    window_nll = -scores.reshape(len(tokens), -1).mean(axis=1, dtype=np.float64)
    return EvaluateResult(
        perplexity=perplexity,
        standard_error=standard_error_of(window_nll),
        window_nll=tuple(window_nll.tolist()),
        windows=len(tokens),
        sequence_length=tokens.shape[1],
        seconds=time.monotonic() - started,
        bytes_read=bytes_read,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(streamed.device),
    )


def _save(out: Path, checkpoint: Checkpoint, text: Sequence[str], tokens: np.ndarray, perplexity: float) -> None:
    """Note a result in a pruned checkpoint. tokens: int64 `[sample, token]`."""
    name, fingerprint = base_name(checkpoint.source), fingerprint_digest(checkpoint.fingerprint)
    names = tuple(Path(source).name for source in text)
    windows, length = tokens.shape
    save_evaluation(out, Evaluation(name, fingerprint, names, length, windows, perplexity, tokens_digest(tokens)))


def windows_of(wanted: TextWanted, model: StreamedModel, options: EngineConfig) -> np.ndarray:
    """The windows of an evaluation text, int64 `[sample, token]`."""
    return evaluation_tokens(
        wanted,
        lambda: load_tokenizer(model.checkpoint.directory, options.trust_remote_code),
        model.vocab_size,
        model.room(options),
    ).tokens


def score_tokens(
    model: StreamedModel,
    tokens: np.ndarray,
    placement: Placement,
    progress: Progress,
    wanted: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score each token given those before it in its window.

    tokens: int64 `[sample, token]`. wanted: bool `[sample, token - 1]`, the predictions to make; None makes all.
    Returns log-probabilities, float32 in nats, and whether each token is the most likely one; both are
    `[wanted prediction]`, in order of windows. Every rank runs its share of the windows and gets all results.
    """
    batch = placement.batch_size
    own = model.ranks.share(len(tokens), batch)
    own_tokens, own_wanted = tokens[own.start : own.stop], None if wanted is None else wanted[own.start : own.stop]
    with model.hidden_states(placement.hidden_place, *own_tokens.shape) as hidden:
        with progress.stage("evaluate", len(model.layers), device=model.device) as stage:
            batches = LayerPass(model, placement, own_tokens, [hidden])
            for i, weights in batches.layers(stage):
                batches.run_all(i, weights)
        found = model.ranks.gathered(score_outputs(model, model.head(), hidden.stream(batch), own_tokens, own_wanted))
    return np.concatenate([scores for scores, _ in found]), np.concatenate([likeliest for _, likeliest in found])


def score_outputs(
    model: StreamedModel,
    logits_of: Logits,
    outputs: Iterable[Batch],
    tokens: np.ndarray,
    wanted: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Score tokens from the outputs of the last layer; see `score_tokens`.

    logits_of: see `StreamedModel.head`. outputs: batches that cover the windows of `tokens` in order.
    """
    wanted = np.ones((len(tokens), tokens.shape[1] - 1), dtype=bool) if wanted is None else wanted
    scores, likeliest = [np.zeros(0, dtype=np.float32)], [np.zeros(0, dtype=bool)]
    start = 0
    for _, values in outputs:
        here = wanted[start : start + len(values)]
        inputs = values[:, :-1][torch.from_numpy(here).to(model.device)]  # [prediction, hidden]
        targets = torch.from_numpy(tokens[start : start + len(values), 1:][here]).to(model.device)
        start += len(values)
        for first, logits in logits_of(inputs):
            chunk = targets[first : first + len(logits)]
            scores.append(-functional.cross_entropy(logits, chunk, reduction="none").cpu().numpy())
            likeliest.append((logits.argmax(dim=1) == chunk).cpu().numpy())
    return np.concatenate(scores), np.concatenate(likeliest)


def perplexity_of(scores: np.ndarray) -> float:
    """Exponential of the mean negative log-likelihood. scores: float32 log-probabilities in nats."""
    return float(np.exp(-scores.mean(dtype=np.float64)))


def standard_error_of(window_nll: np.ndarray) -> float | None:
    """Standard error of the perplexity if windows are drawn independently; None for a single window.

    window_nll: float64 `[sample]`, mean negative log-likelihoods of windows of equal length. The error of their mean
    is propagated through the exponential to first order.
    """
    if len(window_nll) < 2:
        return None
    return float(np.exp(window_nll.mean()) * window_nll.std(ddof=1) / np.sqrt(len(window_nll)))

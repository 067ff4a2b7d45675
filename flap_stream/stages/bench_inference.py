"""What pruning gains at inference: models compared through transformers, each in a separate process.

All processes keep their model loaded and measure in turn, one at a time, so that other load on the machine affects all
alike and memory is measured separately. Run as a program, this module is such a process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

from flap_stream.config import BenchInferenceConfig
from flap_stream.config.rules import options_of
from flap_stream.errors import FlapStreamError, InsufficientMemory, InvalidOption, UnsupportedModel
from flap_stream.model.model_code import load_model, require_known_code
from flap_stream.progress import Progress, peak_host_bytes


@dataclass(frozen=True)
class Setting:
    """Prompts per batch, tokens per prompt, and tokens generated after each."""

    batch_size: int
    prompt_length: int
    generate: int


@dataclass(frozen=True)
class Measurement:
    """One run of a setting. Peaks are those of this run; kv_cache_bytes: the whole batch, at the end."""

    prompt_seconds: float
    generation_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class Summary:
    """Medians of a model at a setting: tokens per second over the whole batch, and memory."""

    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    peak_host_bytes: int
    peak_device_bytes: int
    kv_cache_bytes: int


@dataclass(frozen=True)
class BenchRow:
    """Results of a setting. Speedups are medians of the ratios in each round; above 1 the pruned model is faster."""

    setting: Setting
    dense: Summary = field(repr=False)
    pruned: Summary = field(repr=False)
    prompt_speedup: float
    generation_speedup: float


@dataclass(frozen=True)
class BenchResult:
    """Rows in order of the options, and bytes of each model's weights; `device` and `dtype` as the dense model ran."""

    device: str
    dtype: str
    rounds: int
    weight_bytes: dict[str, int]
    rows: list[BenchRow]


def bench_inference(
    dense: str | Path,
    pruned: str | Path,
    options: BenchInferenceConfig | None = None,
    progress: Progress | bool | None = None,
    **keywords: Any,
) -> BenchResult:
    """Time prompts and generation of a dense and a pruned model (directories or Hub ids), in turn.

    keywords: the fields of `BenchInferenceConfig`, in place of `options`. progress: True shows it on stderr.
    Raises InvalidModel, InvalidOption or InsufficientMemory if a model cannot be run.
    """
    options = options_of(BenchInferenceConfig, "bench_inference", options, keywords)
    settings = [
        Setting(batch, length, options.generate) for batch in options.batch_sizes for length in options.prompt_lengths
    ]
    models = {"dense": str(dense), "pruned": str(pruned)}
    loaded, found = side_by_side(models, settings, options, Progress.of(progress))
    rows = []
    for setting, rounds in zip(settings, found, strict=True):
        pairs = [(one["dense"], one["pruned"]) for one in rounds]
        rows.append(
            BenchRow(
                setting=setting,
                dense=summary(setting, [before for before, _ in pairs]),
                pruned=summary(setting, [after for _, after in pairs]),
                prompt_speedup=median(before.prompt_seconds / after.prompt_seconds for before, after in pairs),
                generation_speedup=median(
                    before.generation_seconds / after.generation_seconds for before, after in pairs
                ),
            )
        )
    return BenchResult(
        device=loaded["dense"]["device"],
        dtype=loaded["dense"]["dtype"],
        rounds=options.rounds,
        weight_bytes={name: body["weight_bytes"] for name, body in loaded.items()},
        rows=rows,
    )


def summary(setting: Setting, measured: Sequence[Measurement]) -> Summary:
    """Medians over rounds, and the largest peaks of memory."""
    tokens, generated = setting.batch_size * setting.prompt_length, setting.batch_size * setting.generate
    return Summary(
        prompt_tokens_per_second=tokens / median(m.prompt_seconds for m in measured),
        generation_tokens_per_second=generated / median(m.generation_seconds for m in measured),
        peak_host_bytes=max(m.peak_host_bytes for m in measured),
        peak_device_bytes=max(m.peak_device_bytes for m in measured),
        kv_cache_bytes=measured[0].kv_cache_bytes,
    )


def side_by_side(
    models: Mapping[str, str], settings: Sequence[Setting], options: BenchInferenceConfig, progress: Progress
) -> tuple[dict[str, dict[str, Any]], list[list[dict[str, Measurement]]]]:
    """Measure every setting with every model in turn, in an order that is reversed every round.

    models: name to directory or Hub id. Returns `device`, `dtype` and `weight_bytes` of each model, and the rounds of
    each setting, without the first, which warms up.
    """
    places = {name: _require_runs(model, settings, options) for name, model in models.items()}
    vocabulary = min(place["vocabulary"] for place in places.values())
    with ExitStack() as stack:
        workers = {}
        for name, place in places.items():
            workers[name] = stack.enter_context(_Worker(models[name], place, options))
        loaded = {name: worker.ask() for name, worker in workers.items()}
        with progress.stage("bench-inference", len(settings) * (options.rounds + 1), unit="round") as stage:
            found = []
            for setting in settings:
                rounds = []
                for number in range(options.rounds + 1):
                    names = list(workers) if number % 2 else list(reversed(workers))
                    asked = {**asdict(setting), "vocabulary": vocabulary}
                    measured = {name: Measurement(**workers[name].ask(asked)) for name in names}
                    rounds.append({name: measured[name] for name in workers})
                    stage.advance(tokens=len(workers) * setting.batch_size * setting.prompt_length)
                found.append(rounds[1:])
    return loaded, found


def _require_runs(model: str, settings: Iterable[Setting], options: BenchInferenceConfig) -> dict[str, Any]:
    """What a worker needs to know of a model; raises if transformers cannot run it at these settings."""
    from flap_stream.model.opening import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        if checkpoint.wrapper is not None:
            raise UnsupportedModel(f"{model} is multimodal; bench-inference times text-only language models")
        config, directory = checkpoint.config, checkpoint.directory
    if not options.trust_remote_code:
        require_known_code(config, directory, model)
    longest = max(setting.prompt_length + setting.generate for setting in settings)
    if longest > config.get("max_position_embeddings", longest):
        raise InvalidOption(
            f"prompt and generation together are {longest} tokens, but {model} takes at most "
            f"{config['max_position_embeddings']}; shorten --prompt-lengths or --generate"
        )
    return {
        "directory": str(directory),
        "vocabulary": config["vocab_size"],
        "trust_remote_code": options.trust_remote_code,
    }


class _Worker:
    """A process that holds one model and measures on request."""

    def __init__(self, name: str, place: dict[str, Any], options: BenchInferenceConfig) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flap_stream.stages.bench_inference"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        self._send({**place, "device": options.device, "dtype": options.dtype})

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            assert stream is not None
            with suppress(BrokenPipeError):  # it died before it had read everything
                stream.close()
        self._process.wait()

    def ask(self, question: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a question; without one, the answer to its start."""
        if question is not None:
            self._send(question)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {self._process.wait()}"
            raise FlapStreamError(f"the process that runs {self._name} failed ({reason})")
        answer = json.loads(line)
        if "out_of_memory" in answer:
            raise InsufficientMemory(
                f"{self._name} does not fit on {answer['out_of_memory']} next to the other model, as both are loaded; "
                "choose smaller --batch-sizes or --prompt-lengths, or --device cpu"
            )
        return answer

    def _send(self, body: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it died; reading its answer says why
            self._process.stdin.write(json.dumps(body) + "\n")
            self._process.stdin.flush()


def _serve() -> None:
    """Load the model that the first line of stdin names, then measure what each further line asks for.

    Answers are lines of JSON on stdout.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that other output is printed to stderr

    def answer(body: dict[str, Any]) -> None:
        answers.write(json.dumps(body) + "\n")
        answers.flush()

    import torch

    from flap_stream.engine.device import choose_device, is_out_of_memory

    start = json.loads(sys.stdin.readline())
    device = choose_device(start["device"])
    try:
        dtype = "auto" if start["dtype"] == "auto" else getattr(torch, start["dtype"])
        model = load_model(Path(start["directory"]), dtype, start["trust_remote_code"]).eval().to(device)
        weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        answer({"device": str(device), "dtype": dtype, "weight_bytes": sum(weights.values())})
        for line in sys.stdin:
            asked = json.loads(line)
            vocabulary = asked.pop("vocabulary")
            answer(asdict(_measure(model, Setting(**asked), vocabulary, device)))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        answer({"out_of_memory": str(device)})


def _measure(model: Any, setting: Setting, vocabulary: int, device: Any) -> Measurement:
    """Run one batch of random prompts, then generate greedily, one token at a time, with the cache."""
    import torch

    from flap_stream.engine.device import peak_bytes, reset_peaks, synchronize

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (setting.batch_size, setting.prompt_length), generator=generator).to(device)
    reset_peaks(device)
    with suppress(OSError):  # then the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    with torch.inference_mode():
        started = clock()
        output = model(ids, use_cache=True, logits_to_keep=1)
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        prompted = clock()
        for _ in range(setting.generate):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
        ended = clock()
    kept = [tensor for layer in cache.layers for tensor in _tensors_of(layer)]
    return Measurement(
        prompt_seconds=prompted - started,
        generation_seconds=ended - prompted,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_bytes(device)[1],
        kv_cache_bytes=sum(tensor.nbytes for tensor in kept),
    )


def _tensors_of(layer: Any) -> list[Any]:
    """What a layer of a cache keeps: keys and values, or the states of another kind of attention."""
    import torch

    states = (getattr(layer, name, None) or {} for name in ("conv_states", "recurrent_states"))
    kept = [*(getattr(layer, name, None) for name in ("keys", "values")), *(t for own in states for t in own.values())]
    return [tensor for tensor in kept if isinstance(tensor, torch.Tensor)]


if __name__ == "__main__":
    _serve()

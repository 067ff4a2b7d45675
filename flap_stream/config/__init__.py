"""What a user can choose: one frozen, self-checking dataclass a stage, and their union for the whole job."""

import re
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from flap_stream.config.values import Dtype, GgufType, Ratios, Share, Size, converted
from flap_stream.config.values import parse_ratios as parse_ratios
from flap_stream.config.values import parse_size as parse_size
from flap_stream.errors import InvalidOption

METRICS = ("wifv", "ifv", "wifn", "fisher")
STRUCTURES = ("al-am", "al-mm", "ul-mm", "ul-um")
METHODS = ("flap", "wanda-sp", "magnitude-sp")
HEAD_SCORES = ("mean-z", "l2")
STATISTICS = ("exact", "released")
RESTORATIONS = ("bias", "none", "least-squares")
REFIT_TARGETS = ("own", "dense", "aligned", "joint")
ALIGNING_TARGETS = ("aligned", "joint")  # for which what reads hidden states is refitted, too
SWEPT_RESTORATIONS = ("bias", "none")  # those that masked_layers.py can put into a dense layer
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BOS = CHAT_TEMPLATE = ("auto", "always", "never")
DTYPES = ("auto", "bfloat16", "float16", "float32")

LOSS_WINDOWS = 256  # that the metric fisher sweeps back, unless another number is given
# In fp16 and bf16 that is 16 bytes, which a GPU's matrix units need; larger multiples gave nothing on an H200.
FAST_MULTIPLE = 8

_Part = TypeVar("_Part")


def _require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidOption(f"--{option} {value!r} is unknown; choose one of {', '.join(choices)}")


def _require_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidOption(f"--{option} is {value}; it must be at least {least}")


def _require_ratio(ratio: float, option: str = "ratio") -> None:
    if not 0 < ratio < 1:
        raise InvalidOption(f"--{option} is {ratio}; it must lie between 0 and 1, both excluded, such as 0.2 or 20%")


@dataclass(frozen=True, kw_only=True, repr=False)
class _Options:
    """End of the chain of checks, so that every class below can call the next one's."""

    def __post_init__(self) -> None:
        """Bring every value to the type of its field; InvalidOption if it cannot be."""
        for field in fields(self):
            object.__setattr__(self, field.name, converted(type(self), field.name, getattr(self, field.name)))

    def __repr__(self) -> str:
        """The options that are not at their default."""
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in changed_options(self).items())})"


def changed_options(options: Any) -> dict[str, Any]:
    """Fields of a config that are neither at their default nor what the default comes to, with their values."""
    own = {field.name: (getattr(options, field.name), field.default) for field in fields(options)}
    different = {name: pair for name, pair in own.items() if pair[0] != pair[1]}
    return {name: value for name, (value, default) in different.items() if value != _implied(options, name, default)}


def _implied(options: Any, name: str, default: Any) -> Any:
    """What a field at its default comes to with the others as they are; None if that is refused."""
    try:
        return getattr(replace(options, **{name: default}), name)
    except InvalidOption:
        return None


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(_Options):
    """How decoder layers are run.

    device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
    dtype: of the forward; `auto` is the checkpoint's.
    batch_size: windows that run through a layer at once; None lets the planner choose.
    device_memory, host_memory: most bytes to take; None is what is free, minus a margin.
    prefetch: layers that are read ahead (0 or 1); None lets the planner choose.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: int | None = None
    device_memory: Size | None = None
    host_memory: Size | None = None
    prefetch: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _require_choice("dtype", self.dtype, DTYPES)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InvalidOption(f"--device {self.device!r} is unknown; write auto, cpu, cuda or cuda:N")
        if self.batch_size is not None:
            _require_at_least("batch-size", self.batch_size, 1)
        for name, nbytes in (("host-memory", self.host_memory), ("device-memory", self.device_memory)):
            if nbytes is not None:
                _require_at_least(name, nbytes, 1)
        if self.prefetch not in (None, 0, 1):
            raise InvalidOption(f"--prefetch is {self.prefetch}; it must be 0 or 1")


@dataclass(frozen=True, kw_only=True, repr=False)
class TextConfig(_Options):
    """How text becomes windows of tokens.

    bos: begin every window with the model's beginning-of-text token: `auto` where its tokenizer puts one before a text.
    text_column: of files with rows; None is `text`, else `content`, else conversations, else the only one of strings.
    chat_template: put conversations (`messages`) through the tokenizer's template: `auto` where there is no text,
    `always` where there is, too.
    """

    bos: str = "auto"
    text_column: str | None = None
    chat_template: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _require_choice("bos", self.bos, BOS)
        _require_choice("chat-template", self.chat_template, CHAT_TEMPLATE)

    def _have_released_windows(self) -> None:
        """The released code begins no window with a token of its own."""
        if self.bos == "always":
            raise InvalidOption("--statistics released uses the released code's windows, which --bos always alters")
        object.__setattr__(self, "bos", "never")


@dataclass(frozen=True, kw_only=True, repr=False)
class CollectConfig(TextConfig, EngineConfig):
    """Pass 1: what the statistics are collected from.

    calibration: `wikitext2`, `c4` or `ptb`, or files (.txt, .jsonl, .json, .parquet, packed or not, a directory of
    them, or one .npy).
    sequence_length: tokens in a calibration window.
    loss_windows: windows of which the loss's gradient is swept back through the layers, for `metric="fisher"`.
    ratio and what follows it: concern `wanda-sp` alone, whose pruned layers feed the next.
    snapshot_interval: layers between two snapshots of the hidden states; None chooses it by their cost.
    """

    calibration: tuple[str, ...] = ("wikitext2",)
    samples: int = 1024
    sequence_length: int = 128
    seed: int = 0
    loss_windows: int = 0
    method: str = "flap"
    ratio: Share = 0.2
    min_heads: int = 1
    min_neurons: int = 1
    round_heads_to: int = 1
    round_neurons_to: int | None = None
    tensor_parallel: int = 1
    snapshot_interval: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.round_neurons_to is None:
            object.__setattr__(self, "round_neurons_to", FAST_MULTIPLE)
        _require_choice("method", self.method, METHODS)
        _require_at_least("samples", self.samples, 1)
        _require_at_least("sequence-length", self.sequence_length, 2)
        _require_at_least("loss-windows", self.loss_windows, 0)
        if self.loss_windows and self.method != "flap":
            raise InvalidOption(f"--loss-windows is only valid with --method flap, not with {self.method}")
        _require_ratio(self.ratio)
        if not self.calibration:
            raise InvalidOption("--calibration names nothing; give wikitext2, c4, ptb or at least one file")


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanConfig(_Options):
    """The decision: which KV groups and neurons stay.

    ratio: share of the decoder layers' prunable weights (q k v o gate up down) that goes.
    remove_heads: query heads to remove in all layers together, for `al-mm` and `ul-mm` alone.
    min_heads, min_neurons: that many stay in every layer.
    round_heads_to, round_neurons_to: every layer keeps a multiple of so many query heads, of so many neurons. None is
    `FAST_MULTIPLE` neurons, or 1 with `statistics="released"`. 1 is what the scores give, as published; above it, KV
    groups times head_dim is a multiple of `FAST_MULTIPLE`, too.
    tensor_parallel: KV groups and neurons of every layer can be divided among so many ranks.
    structure: None is the method's own (`al-am` for flap, `ul-um` for the baselines).
    """

    method: str = "flap"
    ratio: Share = 0.2
    metric: str = "wifv"
    structure: str | None = None
    head_score: str = "mean-z"
    statistics: str = "exact"
    remove_heads: int | None = None
    min_heads: int = 1
    min_neurons: int = 1
    round_heads_to: int = 1
    round_neurons_to: int | None = None
    tensor_parallel: int = 1

    @property
    def rounds(self) -> bool:
        """Whether sizes are rounded."""
        return max(self.round_heads_to, self.neuron_multiple, self.tensor_parallel) > 1

    @property
    def neuron_multiple(self) -> int:
        """What `round_neurons_to` comes to."""
        return self.round_neurons_to or FAST_MULTIPLE

    def __post_init__(self) -> None:
        """Refuse values out of range and combinations that mean nothing."""
        if self.structure is None:
            object.__setattr__(self, "structure", "al-am" if self.method == "flap" else "ul-um")
        if self.round_neurons_to is None:
            object.__setattr__(self, "round_neurons_to", 1 if self.statistics == "released" else FAST_MULTIPLE)
        super().__post_init__()
        _require_choice("method", self.method, METHODS)
        _require_choice("metric", self.metric, METRICS)
        _require_choice("structure", str(self.structure), STRUCTURES)
        _require_choice("head-score", self.head_score, HEAD_SCORES)
        _require_choice("statistics", self.statistics, STATISTICS)
        _require_ratio(self.ratio)
        _require_at_least("min-heads", self.min_heads, 0)
        _require_at_least("min-neurons", self.min_neurons, 0)
        for name in ("round_heads_to", "round_neurons_to", "tensor_parallel"):
            _require_at_least(name.replace("_", "-"), getattr(self, name), 1)
        if self.rounds and self.method == "flap" and self.statistics == "released":
            raise InvalidOption("--statistics released decides as the released code does, which rounds no sizes")
        if self.method != "flap" and self.structure != "ul-um":
            raise InvalidOption(f"--structure {self.structure} does not go with --method {self.method}, which is ul-um")
        needs_heads = str(self.structure).endswith("-mm")
        if needs_heads and self.remove_heads is None:
            raise InvalidOption(
                f"--structure {self.structure} needs --remove-heads N, the query heads to remove in all"
            )
        if not needs_heads and self.remove_heads is not None:
            raise InvalidOption(f"--remove-heads goes with al-mm and ul-mm alone, not with {self.structure}")
        if self.remove_heads is not None:
            _require_at_least("remove-heads", self.remove_heads, 0)


@dataclass(frozen=True, kw_only=True, repr=False)
class RewriteConfig(EngineConfig):
    """Pass 2: how the pruned checkpoint is written.

    restore: `bias` adds W[:, removed]·mean[removed]; `least-squares` refits what o_proj and down_proj keep, running
    the layers once more, for which the options of the engine are; None is the method's own (`bias` for flap, else
    `none`).
    refit_target: what `least-squares` refits to: `own`, the projection's dense output for the inputs that it gets in
    the pruned model; `dense`, the dense model's hidden states, which takes about twice as long; `aligned`, which
    beside that refits what reads hidden states (q, k, v, gate, up, and the head unless it is the embedding) to what it
    reads in the dense model; or `joint`, which beside that lets gate and up make up for neurons that are gone.
    max_shard_bytes: no shard is larger, except one that holds a single larger tensor.
    """

    restore: str | None = None
    refit_target: str = "own"
    max_shard_bytes: Size = 5 * 10**9

    @property
    def refits(self) -> bool:
        """Whether projections are refitted, for which the layers are run once more."""
        return self.restore == "least-squares"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.restore is not None:
            _require_choice("restore", self.restore, RESTORATIONS)
        _require_choice("refit-target", self.refit_target, REFIT_TARGETS)
        _require_at_least("max-shard-size", self.max_shard_bytes, 1)


def require_restoration(method: str, restore: str | None) -> str:
    """The restoration in force: the one asked for, else the method's own.

    Raises InvalidOption for any with a baseline method, which is defined without one.
    """
    if method != "flap" and restore not in (None, "none"):
        what = "a bias" if restore == "bias" else "a refit"
        raise InvalidOption(f"--restore {restore} goes with --method flap alone; {method} is defined without {what}")
    return restore or ("bias" if method == "flap" else "none")


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneConfig(PlanConfig, CollectConfig, RewriteConfig):
    """The whole job: all options of the three stages.

    `statistics="released"` runs one window at a time unless a batch size is given, and begins none with a token of its
    own, since the released code does so.
    """

    keep_run: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range, and a restoration that the method has no statistics for."""
        super().__post_init__()
        require_restoration(self.method, self.restore)
        if self.metric == "fisher" and not self.loss_windows:
            object.__setattr__(self, "loss_windows", LOSS_WINDOWS)
        if self.statistics == "released":
            self._have_released_windows()
            if self.batch_size is None:
                object.__setattr__(self, "batch_size", 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluateConfig(TextConfig, EngineConfig):
    """Perplexity: which text, in windows of how many tokens.

    text: as `calibration` of pass 1.
    samples: at most so many windows, from the beginning of the text; None is all.
    """

    text: tuple[str, ...] = ("wikitext2",)
    sequence_length: int = 128
    samples: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _require_at_least("sequence-length", self.sequence_length, 2)
        if self.samples is not None:
            _require_at_least("samples", self.samples, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class SweepConfig(PlanConfig, TextConfig, EngineConfig):
    """Many ratios of one collection, and the perplexity of each; `ratio` itself is not used.

    evaluate: text as of `EvaluateConfig`, whose other options follow; empty only plans.
    restore: as of pass 2.
    max_perplexity_increase: also look for the largest ratio at which perplexity rises by at most this share of the
    dense model's. resolution: how closely.
    """

    ratios: Ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    evaluate: tuple[str, ...] = ()
    sequence_length: int = 128
    samples: int | None = None
    restore: str | None = None
    max_perplexity_increase: Share | None = None
    resolution: Share = 0.005

    def __post_init__(self) -> None:
        """Refuse values out of range, and a limit of what is not measured."""
        super().__post_init__()
        if not self.ratios:
            raise InvalidOption("--ratios names none; give at least one, such as 0.2")
        for ratio in self.ratios:
            _require_ratio(ratio, "ratios")
        _require_at_least("sequence-length", self.sequence_length, 2)
        if self.samples is not None:
            _require_at_least("samples", self.samples, 1)
        if self.restore is not None:
            _require_choice("restore", self.restore, SWEPT_RESTORATIONS)
        require_restoration(self.method, self.restore)
        if self.statistics == "released":
            self._have_released_windows()
        if self.max_perplexity_increase is not None and not self.evaluate:
            raise InvalidOption("--max-perplexity-increase needs --evaluate TEXT, on which perplexity is measured")
        if self.max_perplexity_increase is not None and not 0 < self.max_perplexity_increase < float("inf"):
            raise InvalidOption(
                f"--max-perplexity-increase is {self.max_perplexity_increase:.2%}; it must be above 0, such as 5%"
            )
        if not 0.0001 <= self.resolution < 1:
            raise InvalidOption(f"--resolution is {self.resolution}; it must lie between 0.0001 and 1, such as 0.005")


@dataclass(frozen=True, kw_only=True, repr=False)
class BenchInferenceConfig(_Options):
    """Two models timed side by side at every pair of a batch size and a prompt length, `generate` tokens after each.

    rounds: times that each is run. device, dtype, trust_remote_code: as of `EngineConfig`.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    prompt_lengths: tuple[int, ...] = (512,)
    generate: int = 64
    rounds: int = 5
    device: str = "auto"
    dtype: Dtype = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        EngineConfig(device=self.device, dtype=self.dtype)
        for name in ("batch_sizes", "prompt_lengths"):
            for value in getattr(self, name) or (0,):
                _require_at_least(name.replace("_", "-"), value, 1)
        _require_at_least("generate", self.generate, 1)
        _require_at_least("rounds", self.rounds, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportStockConfig(_Options):
    """A checkpoint that needs no code of its own.

    pad: fill layers up with zeros to the size of the widest; without it, layers of different sizes are refused.
    max_shard_bytes: as of pass 2.
    """

    pad: bool = False
    max_shard_bytes: Size = 5 * 10**9

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        _require_at_least("max-shard-size", self.max_shard_bytes, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportGgufConfig(_Options):
    """A GGUF file.

    type: of the matrices; None is the checkpoint's own.
    tokenizer_pre: llama.cpp's name for what splits text before the merges; None finds it.
    """

    type: GgufType | None = None
    tokenizer_pre: str | None = None

    def __post_init__(self) -> None:
        """Refuse unknown types."""
        super().__post_init__()
        if self.type is not None:
            _require_choice("type", self.type, GGUF_TYPES)


def part_of(config: Any, kind: type[_Part], **changes: Any) -> _Part:
    """The fields of `config` that dataclass `kind` has, as a `kind`, some of them changed."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return kind(**{**own, **changes})

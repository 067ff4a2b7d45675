"""The options of what measures and exports models: perplexity, sweeps of ratios, speed, other formats."""

import re
from dataclasses import dataclass

from flap_stream.config.options import (
    CHAT_TEMPLATE,
    GGUF_TYPES,
    SWEPT_RESTORATIONS,
    EngineConfig,
    Options,
    TextConfig,
    require_at_least,
    require_choice,
    require_ratio,
)
from flap_stream.config.pruning import CollectConfig, PlanConfig, RewriteConfig, require_restoration
from flap_stream.config.values import Dtype, Folder, GgufType, Ratios, Share, Size, Tokens
from flap_stream.errors import InvalidOption


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluateConfig(TextConfig, EngineConfig):
    """Perplexity: which text, in windows of how many tokens.

    text: as `CollectConfig.calibration`, without shares.
    samples: at most this many windows, from the beginning of the text; None is all.
    save: a pruned checkpoint to note the result in, of it or of its dense model, for `push`.
    """

    text: tuple[str, ...] = CollectConfig.calibration
    sequence_length: int = CollectConfig.sequence_length
    samples: int | None = None
    save: Folder | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        require_at_least("sequence-length", self.sequence_length, 2)
        if self.samples is not None:
            require_at_least("samples", self.samples, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdviseConfig(Options):
    """What a model is to be served on.

    gpu: bytes of the card; None is this machine's, or its free memory if it has none.
    form: dtype or type of GGUF that it is to be served in; None is the one for which least must be removed.
    context, batch: tokens of each text in the KV cache, and how many texts.
    """

    gpu: Size | None = None
    form: str | None = None
    context: Tokens = 8192
    batch: int = 1

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        for name, value in (("gpu", self.gpu), ("context", self.context), ("batch", self.batch)):
            if value is not None:
                require_at_least(name, value, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class TryConfig(EngineConfig):
    """Generation after a prompt, of at most `new_tokens` tokens.

    chat_template: whether the prompt is a message; `auto`: if the tokenizer has a template.
    """

    new_tokens: int = 48
    chat_template: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        require_at_least("new-tokens", self.new_tokens, 1)
        require_choice("chat-template", self.chat_template, CHAT_TEMPLATE)


@dataclass(frozen=True, kw_only=True, repr=False)
class SweepConfig(PlanConfig, TextConfig, EngineConfig):
    """Many ratios from one collection, and the perplexity of each; `ratio` itself is not used.

    evaluate: as `EvaluateConfig.text`; with none, ratios are only planned. predict: say how much the loss scores of the
    run (see `CollectConfig.loss_windows`) let the loss rise at each ratio. restore: as `RewriteConfig.restore`.
    max_perplexity_increase: also look for the largest ratio at which perplexity rises by at most this share of the
    dense model's. resolution: how closely.
    """

    ratios: Ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    evaluate: tuple[str, ...] = ()
    predict: bool = False
    sequence_length: int = EvaluateConfig.sequence_length
    samples: int | None = EvaluateConfig.samples
    restore: str | None = RewriteConfig.restore
    max_perplexity_increase: Share | None = None
    resolution: Share = 0.005

    def __post_init__(self) -> None:
        """Refuse values out of range, and a limit of what is not measured."""
        super().__post_init__()
        if not self.ratios:
            raise InvalidOption("--ratios names none; give at least one, such as 0.2")
        for ratio in self.ratios:
            require_ratio(ratio, "ratios")
        require_at_least("sequence-length", self.sequence_length, 2)
        if self.samples is not None:
            require_at_least("samples", self.samples, 1)
        if self.restore is not None:
            require_choice("restore", self.restore, SWEPT_RESTORATIONS)
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
class BenchInferenceConfig(Options):
    """Two models timed side by side at every pair of a batch size and a prompt length, `generate` tokens after each.

    rounds: how often each is run. device, dtype, trust_remote_code: as in `EngineConfig`.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    prompt_lengths: tuple[int, ...] = (512,)
    generate: int = 64
    rounds: int = 5
    device: str = EngineConfig.device
    dtype: Dtype = EngineConfig.dtype
    trust_remote_code: bool = EngineConfig.trust_remote_code

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        EngineConfig(device=self.device, dtype=self.dtype)
        for name in ("batch_sizes", "prompt_lengths"):
            for value in getattr(self, name) or (0,):
                require_at_least(name.replace("_", "-"), value, 1)
        require_at_least("generate", self.generate, 1)
        require_at_least("rounds", self.rounds, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportStockConfig(Options):
    """A checkpoint that loads without remote code.

    pad: pad layers with zeros to the size of the widest; without it, layers of different sizes are refused.
    max_shard_bytes: as in `RewriteConfig`.
    """

    pad: bool = False
    max_shard_bytes: Size = RewriteConfig.max_shard_bytes

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        require_at_least("max-shard-size", self.max_shard_bytes, 1)


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportGgufConfig(Options):
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
            require_choice("type", self.type, GGUF_TYPES)


@dataclass(frozen=True, kw_only=True, repr=False)
class PushConfig(Options):
    """A repository on the Hub: whether it is made private, and the Hub id of the dense model if no card has it."""

    private: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is not a Hub id."""
        super().__post_init__()
        if self.base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model):
            raise InvalidOption(f"--base-model {self.base_model!r} is not a Hub id; write it as NAMESPACE/NAME")

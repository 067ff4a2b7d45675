"""The options of pruning: the decision, the collection before it, the rewrite after it, and all three together."""

from dataclasses import dataclass

from flap_stream.config.options import (
    FAST_MULTIPLE,
    FP8_BLOCK,
    HEAD_SCORES,
    LOSS_WINDOWS,
    METHODS,
    METRICS,
    OUTPUT_DTYPES,
    REFITS,
    RESTORATIONS,
    STATISTICS,
    STRUCTURES,
    EngineConfig,
    TextConfig,
    require_at_least,
    require_choice,
    require_ratio,
)
from flap_stream.config.targets import NotGiven, TargetConfig
from flap_stream.config.values import Share, Size, option_name
from flap_stream.errors import InvalidOption

_RATIO = NotGiven(0.2)


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanConfig(TargetConfig):
    """The decision: which KV groups and neurons are kept.

    ratio: share of the decoder layers' prunable weights (q k v o gate up down) to remove, for `reap` of the experts'
    weights only; 0 with a target. `shortgpt` removes as many whole layers as do not exceed it.
    remove_heads: query heads to remove in all layers together, only for `al-mm` and `ul-mm`.
    min_heads, min_neurons: every layer keeps at least that many.
    whole_experts: experts are removed as a whole, too, with their rows of the router. min_experts: a mixture keeps at
    least that many; None, and the least, is what its router chooses for a token. round_experts_to: a mixture keeps a
    multiple of this many; exactly this many if it is more than half of them. None is 1.
    depth: layers are removed as a whole, too.
    round_heads_to, round_neurons_to: every layer keeps a multiple of this many query heads or neurons. None is
    `FAST_MULTIPLE` neurons, or 1 with `statistics="released"`. 1 keeps what the scores say, as published; above it, KV
    groups times head_dim is a multiple of `FAST_MULTIPLE`, too.
    tensor_parallel: KV groups and neurons of every layer can be divided among this many ranks.
    structure: None is the method's own (`al-am` for flap and shortgpt, `ul-um` for the other baselines).
    """

    method: str = "flap"
    ratio: Share = _RATIO
    metric: str = "wifv"
    structure: str | None = None
    head_score: str = "mean-z"
    statistics: str = "exact"
    remove_heads: int | None = None
    min_heads: int = 1
    min_neurons: int = 1
    whole_experts: bool = False
    min_experts: int | None = None
    round_experts_to: int | None = None
    depth: bool = False
    round_heads_to: int = 1
    round_neurons_to: int | None = None
    tensor_parallel: int = 1

    @property
    def rounds(self) -> bool:
        """Whether sizes are rounded."""
        return max(self.round_heads_to, self.neuron_multiple, self.expert_multiple, self.tensor_parallel) > 1

    @property
    def neuron_multiple(self) -> int:
        """What the number of neurons of a layer is a multiple of."""
        return self.round_neurons_to or FAST_MULTIPLE

    @property
    def expert_multiple(self) -> int:
        """What the number of experts of a mixture is a multiple of."""
        return self.round_experts_to or 1

    def __post_init__(self) -> None:
        """Refuse values out of range and combinations that mean nothing."""
        usual = "al-am" if self.method in ("flap", "shortgpt") else "ul-um"
        if self.structure is None:
            object.__setattr__(self, "structure", usual)
        if self.round_neurons_to is None:
            object.__setattr__(self, "round_neurons_to", 1 if self.statistics == "released" else FAST_MULTIPLE)
        is_given = not isinstance(self.ratio, NotGiven)
        if not is_given:
            object.__setattr__(self, "ratio", float(_RATIO))
        super().__post_init__()
        require_choice("method", self.method, METHODS)
        require_choice("metric", self.metric, METRICS)
        require_choice("structure", str(self.structure), STRUCTURES)
        require_choice("head-score", self.head_score, HEAD_SCORES)
        require_choice("statistics", self.statistics, STATISTICS)
        require_ratio(self.ratio)
        self._require_one_aim(is_given)
        if not is_given:
            object.__setattr__(self, "ratio", _RATIO if self.target is None else NotGiven(0))
        require_at_least("min-heads", self.min_heads, 0)
        require_at_least("min-neurons", self.min_neurons, 0)
        for name in ("min_experts", "round_experts_to"):
            if getattr(self, name) is not None:
                require_at_least(option_name(name), getattr(self, name), 1)
        for name in ("round_heads_to", "round_neurons_to", "tensor_parallel"):
            require_at_least(option_name(name), getattr(self, name), 1)
        if self.rounds and self.method == "flap" and self.statistics == "released":
            raise InvalidOption("--statistics released decides as the released code does, which does not round sizes")
        if self.method != "flap" and self.structure != usual:
            raise InvalidOption(
                f"--structure {self.structure} is not valid with --method {self.method}, which is {usual}"
            )
        needs_heads = str(self.structure).endswith("-mm")
        if needs_heads and self.remove_heads is None:
            raise InvalidOption(
                f"--structure {self.structure} needs --remove-heads N, the query heads to remove in all"
            )
        if not needs_heads and self.remove_heads is not None:
            raise InvalidOption(f"--remove-heads is only valid with al-mm and ul-mm, not with {self.structure}")
        if self.remove_heads is not None:
            require_at_least("remove-heads", self.remove_heads, 0)

    def _require_one_aim(self, has_ratio: bool) -> None:
        """Refuse a target next to a ratio, or for a method that needs the ratio before the scores."""
        if self.target is None:
            return
        option = f"--{option_name(self.target)}"
        if has_ratio:
            raise InvalidOption(
                f"--ratio {self.ratio} and {option} {getattr(self, self.target)} both say how much to remove; give one "
                "of them"
            )
        if self.method == "shortgpt" or self.depth:
            what = "--depth" if self.depth else "--method shortgpt"
            raise InvalidOption(f"{option} is not valid with {what}, which removes whole layers; give --ratio")
        if self.method == "wanda-sp":
            raise InvalidOption(
                f"{option} is not valid with --method wanda-sp, whose pruned layers feed the next while statistics are "
                "collected; give --ratio"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class CollectConfig(TextConfig, EngineConfig):
    """The collection: what the statistics are computed from.

    calibration: `wikitext2`, `c4` or `ptb`, or files (.txt, .jsonl, .json, .parquet, packed or not, a directory of
    them, or one .npy). With shares of the windows, as in `prose.txt:0.7`, they are mixed.
    sequence_length: tokens in a calibration window.
    loss_windows: windows of which a gradient is propagated back through the layers, for `metric="fisher"`.
    whole_experts, depth: the backward pass scores experts as a whole, or layers, too.
    ratio and the fields after it, up to tensor_parallel: only for `wanda-sp`, whose pruned layers feed the next.
    Their defaults are those of `PlanConfig`.
    snapshot_interval: layers between two snapshots of the hidden states; None chooses it by their cost.
    """

    calibration: tuple[str, ...] = ("wikitext2",)
    samples: int = 1024
    sequence_length: int = 128
    seed: int = 0
    loss_windows: int = 0
    whole_experts: bool = PlanConfig.whole_experts
    depth: bool = PlanConfig.depth
    method: str = PlanConfig.method
    ratio: Share = PlanConfig.ratio
    min_heads: int = PlanConfig.min_heads
    min_neurons: int = PlanConfig.min_neurons
    round_heads_to: int = PlanConfig.round_heads_to
    round_neurons_to: int | None = PlanConfig.round_neurons_to
    tensor_parallel: int = PlanConfig.tensor_parallel
    snapshot_interval: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.round_neurons_to is None:
            object.__setattr__(self, "round_neurons_to", FAST_MULTIPLE)
        require_choice("method", self.method, METHODS)
        require_at_least("samples", self.samples, 1)
        require_at_least("sequence-length", self.sequence_length, 2)
        require_at_least("loss-windows", self.loss_windows, 0)
        require_at_least("min-heads", self.min_heads, 0)
        require_at_least("min-neurons", self.min_neurons, 0)
        for name in ("round_heads_to", "round_neurons_to", "tensor_parallel", "snapshot_interval"):
            if getattr(self, name) is not None:
                require_at_least(option_name(name), getattr(self, name), 1)
        if self.loss_windows and self.method != "flap":
            raise InvalidOption(f"--loss-windows is only valid with --method flap, not with {self.method}")
        require_ratio(self.ratio)
        if not self.calibration:
            raise InvalidOption("--calibration names nothing; give wikitext2, c4, ptb or at least one file")


@dataclass(frozen=True, kw_only=True, repr=False)
class RewriteConfig(EngineConfig):
    """The rewrite: how the pruned checkpoint is written.

    restore: `bias` adds W[:, removed]·mean[removed]; `least-squares` refits what o_proj and down_proj keep, running
    the layers again (the engine's options are for that); `reconstruct` fits all that a layer keeps to the dense
    model's hidden states, by gradients; None is the method's own (`bias` for flap, else `none`).
    output_dtype: `fp8` writes the matrices of the decoder layers as codes with a scale for each block of `FP8_BLOCK`
    rows and columns, where both are multiples of that; `auto` writes all tensors in the dtypes that they have.
    max_shard_bytes: no shard is larger, except one that holds a single larger tensor.
    """

    restore: str | None = None
    output_dtype: str = "auto"
    max_shard_bytes: Size = 5 * 10**9

    @property
    def refit(self) -> str | None:
        """The restoration, if layers are run again for it: one of REFITS."""
        return self.restore if self.restore in REFITS else None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        super().__post_init__()
        if self.restore is not None:
            require_choice("restore", self.restore, RESTORATIONS)
        require_choice("output-dtype", self.output_dtype, OUTPUT_DTYPES)
        require_at_least("max-shard-size", self.max_shard_bytes, 1)


def require_restoration(method: str, restore: str | None) -> str:
    """The restoration in force: the one asked for, else the method's own.

    Raises InvalidOption for any with a baseline method, which is defined without one.
    """
    if method != "flap" and restore not in (None, "none"):
        what = "a bias" if restore == "bias" else "a refit"
        raise InvalidOption(f"--restore {restore} is only valid with --method flap; {method} is defined without {what}")
    return restore or ("bias" if method == "flap" else "none")


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneConfig(PlanConfig, CollectConfig, RewriteConfig):
    """The whole job: all options of the three stages.

    `statistics="released"` runs one window at a time unless a batch size is given, and adds no beginning-of-text
    token, as the released code does. `output_dtype="fp8"` rounds neurons to `FP8_BLOCK` unless told otherwise.
    """

    keep_run: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range, and a restoration that the method has no statistics for."""
        takes_rounding = self.statistics != "released" and self.method != "shortgpt"
        if self.output_dtype == "fp8" and self.round_neurons_to is None and takes_rounding:
            object.__setattr__(self, "round_neurons_to", FP8_BLOCK)
        super().__post_init__()
        require_restoration(self.method, self.restore)
        if self.metric == "fisher" and not self.loss_windows:
            object.__setattr__(self, "loss_windows", LOSS_WINDOWS)
        if self.statistics == "released":
            self._have_released_windows()
            if self.batch_size is None:
                object.__setattr__(self, "batch_size", 1)

"""What a user can choose: one frozen, self-checking dataclass per stage, and their union for the whole job.

Their defaults are the only ones: the command line takes its own from them.
"""

from flap_stream.config.measuring import (
    AdviseConfig,
    BenchInferenceConfig,
    EvaluateConfig,
    ExportGgufConfig,
    ExportStockConfig,
    PushConfig,
    SweepConfig,
    TryConfig,
)
from flap_stream.config.options import (
    BOS,
    CHAT_TEMPLATE,
    DTYPES,
    FAST_MULTIPLE,
    GGUF_TYPES,
    HEAD_SCORES,
    LOSS_WINDOWS,
    METHODS,
    METRICS,
    REFITS,
    RESTORATIONS,
    STATISTICS,
    STRUCTURES,
    SWEPT_RESTORATIONS,
    EngineConfig,
    TextConfig,
    changed_options,
    part_of,
)
from flap_stream.config.pruning import CollectConfig, PlanConfig, PruneConfig, RewriteConfig, require_restoration
from flap_stream.config.targets import TARGET_FIELDS, TARGETS, TargetConfig
from flap_stream.config.values import parse_ratios, parse_size

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "DTYPES",
    "FAST_MULTIPLE",
    "GGUF_TYPES",
    "HEAD_SCORES",
    "LOSS_WINDOWS",
    "METHODS",
    "METRICS",
    "REFITS",
    "RESTORATIONS",
    "STATISTICS",
    "STRUCTURES",
    "SWEPT_RESTORATIONS",
    "TARGETS",
    "TARGET_FIELDS",
    "AdviseConfig",
    "BenchInferenceConfig",
    "CollectConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportGgufConfig",
    "ExportStockConfig",
    "PlanConfig",
    "PruneConfig",
    "PushConfig",
    "RewriteConfig",
    "SweepConfig",
    "TargetConfig",
    "TextConfig",
    "TryConfig",
    "changed_options",
    "parse_ratios",
    "parse_size",
    "part_of",
    "require_restoration",
]

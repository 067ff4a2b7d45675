"""Structured pruning of large language models, streamed one decoder layer at a time from disk.

The stages as functions, each on stored values: `prune` (the whole job), `collect`, `plan`, `rewrite`, `evaluate`,
`sweep`, `generate`; `advise` before them; and on their results `write_report`, `export_gguf`, `export_stock`,
`bench_inference`, `push`.
Their options are the dataclasses of `flap_stream.config`, or keywords: `prune(model, out, ratio=0.2)`.
What they raise is in `flap_stream.errors`.
Importing this package loads none of its modules; each is imported on first use, torch and transformers with the first
stage.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flap_stream.config import (
        AdviseConfig,
        BenchInferenceConfig,
        CollectConfig,
        EvaluateConfig,
        ExportGgufConfig,
        ExportStockConfig,
        PlanConfig,
        PruneConfig,
        PushConfig,
        RewriteConfig,
        SweepConfig,
        TryConfig,
    )
    from flap_stream.errors import FlapStreamError
    from flap_stream.export.advice import Advice, advise
    from flap_stream.export.gguf import ExportGgufResult, export_gguf
    from flap_stream.export.hub_upload import PushResult, push
    from flap_stream.export.stock import ExportStockResult, export_stock
    from flap_stream.progress import Progress
    from flap_stream.report.page import ReportResult, write_report
    from flap_stream.stages.bench_inference import BenchResult, bench_inference
    from flap_stream.stages.collect import CollectResult, collect
    from flap_stream.stages.evaluate import EvaluateResult, evaluate
    from flap_stream.stages.generate import Generation, generate
    from flap_stream.stages.plan import PlanResult, plan
    from flap_stream.stages.prune import prune
    from flap_stream.stages.rewrite import PruneResult, rewrite
    from flap_stream.stages.sweep import SweepResult, sweep

_LAZY = {
    "Progress": "flap_stream.progress",
    "FlapStreamError": "flap_stream.errors",
    **dict.fromkeys(
        (
            "AdviseConfig",
            "BenchInferenceConfig",
            "CollectConfig",
            "EvaluateConfig",
            "ExportGgufConfig",
            "ExportStockConfig",
            "PlanConfig",
            "PruneConfig",
            "PushConfig",
            "RewriteConfig",
            "SweepConfig",
            "TryConfig",
        ),
        "flap_stream.config",
    ),
    **dict.fromkeys(("write_report", "ReportResult"), "flap_stream.report.page"),
    **dict.fromkeys(("advise", "Advice"), "flap_stream.export.advice"),
    **dict.fromkeys(("export_gguf", "ExportGgufResult"), "flap_stream.export.gguf"),
    **dict.fromkeys(("push", "PushResult"), "flap_stream.export.hub_upload"),
    **dict.fromkeys(("export_stock", "ExportStockResult"), "flap_stream.export.stock"),
    **dict.fromkeys(("bench_inference", "BenchResult"), "flap_stream.stages.bench_inference"),
    **dict.fromkeys(("evaluate", "EvaluateResult"), "flap_stream.stages.evaluate"),
    **dict.fromkeys(("sweep", "SweepResult"), "flap_stream.stages.sweep"),
    "prune": "flap_stream.stages.prune",
    **dict.fromkeys(("collect", "CollectResult"), "flap_stream.stages.collect"),
    **dict.fromkeys(("generate", "Generation"), "flap_stream.stages.generate"),
    **dict.fromkeys(("plan", "PlanResult"), "flap_stream.stages.plan"),
    **dict.fromkeys(("rewrite", "PruneResult"), "flap_stream.stages.rewrite"),
}

__all__ = [
    "Advice",
    "AdviseConfig",
    "BenchInferenceConfig",
    "BenchResult",
    "CollectConfig",
    "CollectResult",
    "EvaluateConfig",
    "EvaluateResult",
    "ExportGgufConfig",
    "ExportGgufResult",
    "ExportStockConfig",
    "ExportStockResult",
    "FlapStreamError",
    "Generation",
    "PlanConfig",
    "PlanResult",
    "Progress",
    "PruneConfig",
    "PruneResult",
    "PushConfig",
    "PushResult",
    "ReportResult",
    "RewriteConfig",
    "SweepConfig",
    "SweepResult",
    "TryConfig",
    "advise",
    "bench_inference",
    "collect",
    "evaluate",
    "export_gguf",
    "export_stock",
    "generate",
    "plan",
    "prune",
    "push",
    "rewrite",
    "sweep",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flap_stream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Structured pruning of large language models, streamed one decoder layer at a time from disk.

The stages as functions, each on stored values: `prune` (the whole job), `collect`, `plan`, `rewrite`, `evaluate`,
`sweep`.
Their options are the dataclasses of `flap_stream.config`; what they raise is in `flap_stream.errors`.
Importing this package loads none of its modules; what is used of it does, torch and transformers with the first stage.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flap_stream.config import CollectConfig, EvaluateConfig, PlanConfig, PruneConfig, RewriteConfig, SweepConfig
    from flap_stream.errors import FlapStreamError
    from flap_stream.evaluation import EvaluateResult, evaluate
    from flap_stream.pipeline import CollectResult, PlanResult, PruneResult, collect, plan, prune, rewrite
    from flap_stream.ratio_sweep import SweepResult, sweep

_LAZY = {
    "FlapStreamError": "flap_stream.errors",
    **dict.fromkeys(
        ("CollectConfig", "EvaluateConfig", "PlanConfig", "PruneConfig", "RewriteConfig", "SweepConfig"),
        "flap_stream.config",
    ),
    **dict.fromkeys(("evaluate", "EvaluateResult"), "flap_stream.evaluation"),
    **dict.fromkeys(("sweep", "SweepResult"), "flap_stream.ratio_sweep"),
    **dict.fromkeys(
        ("prune", "collect", "plan", "rewrite", "PruneResult", "CollectResult", "PlanResult"), "flap_stream.pipeline"
    ),
}

__all__ = [
    "CollectConfig",
    "CollectResult",
    "EvaluateConfig",
    "EvaluateResult",
    "FlapStreamError",
    "PlanConfig",
    "PlanResult",
    "PruneConfig",
    "PruneResult",
    "RewriteConfig",
    "SweepConfig",
    "SweepResult",
    "collect",
    "evaluate",
    "plan",
    "prune",
    "rewrite",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'flap_stream' has no attribute {name!r}")

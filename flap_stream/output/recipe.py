"""recipe.toml: the options that a checkpoint was made with, all of them, as `--recipe` reads them."""

import json
from typing import Any

from flap_stream.config import PlanConfig, PruneConfig, RewriteConfig, part_of, require_restoration
from flap_stream.config.rules import FED_ON, effective
from flap_stream.config.values import option_name
from flap_stream.model.hub import base_name
from flap_stream.storage.loss import LossStore
from flap_stream.storage.run_directory import RunDirectory

RECIPE_NAME = "recipe.toml"
_DECIDE_NOTHING = {"device", "device_memory", "host_memory", "prefetch", "keep_run", "snapshot_interval"}


def collected_for(run: RunDirectory) -> PlanConfig:
    """The plan that a run directory without one was collected for, as far as that is known."""
    collected = run.manifest["options"]
    known: dict[str, Any] = {name: collected[name] for name in ("method", *FED_ON) if name in collected}
    loss = LossStore.begun(run)
    if loss is not None and loss.complete() == len(run.layer_shapes):
        known["metric"] = "fisher"
    return PlanConfig(**known)


def resolved_options(run: RunDirectory, plan: PlanConfig, rewrite: RewriteConfig) -> PruneConfig:
    """The options with which `prune` repeats what was collected, planned and is now rewritten."""
    engine = {name: value for name, value in run.manifest["options"].items() if name in ("dtype", "batch_size")}
    asked = {name: value for name, value in run.manifest["calibration"].items() if name != "sources"}
    windows = {"loss_windows": LossStore.of(run).windows} if plan.metric == "fisher" else {}
    return part_of(
        plan,
        PruneConfig,
        **engine,
        **asked,
        **windows,
        calibration=tuple(run.manifest["calibration"].get("sources", PruneConfig.calibration)),
        restore=require_restoration(plan.method, rewrite.restore),
        output_dtype=rewrite.output_dtype,
        max_shard_bytes=rewrite.max_shard_bytes,
        trust_remote_code=rewrite.trust_remote_code,
    )


def recipe(run: RunDirectory, plan: PlanConfig, rewrite: RewriteConfig, source: str) -> bytes:
    """The contents of recipe.toml. source: directory or Hub id of the dense model."""
    options = resolved_options(run, plan, rewrite)
    idle = {
        "ratio": plan.target is not None,
        "loss_windows": plan.metric != "fisher",
        "trust_remote_code": not rewrite.trust_remote_code,
        "whole_experts": not plan.whole_experts,
        "depth": not plan.depth,
        "output_dtype": rewrite.output_dtype == "auto",
    }
    left_out = _DECIDE_NOTHING | {name for name in idle if idle[name]}
    versions = ", ".join(f"{name} {version}" for name, version in run.manifest["versions"].items())
    device = run.manifest["options"].get("card", run.manifest["options"].get("device", "cpu"))
    lines = [
        f"# How this checkpoint was made from {base_name(source)}. In the folder of the calibration text, make it",
        "# again by flap-stream prune MODEL OUT --recipe recipe.toml",
        f"# With {versions}, on {device}.",
        *(
            f"{option_name(name)} = {_toml(value)}"
            for name, value in effective(options).items()
            if name not in left_out
        ),
    ]
    return "\n".join([*lines, ""]).encode(errors="replace")


def _toml(value: Any) -> str:
    """A value as TOML has it; strings as in JSON, which escapes all that TOML does but one character."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return text.replace("\x7f", "\\u007f")

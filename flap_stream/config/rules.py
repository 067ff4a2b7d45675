"""The options that a stage is called with, as a config or as keywords; those without an effect are reported."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from flap_stream.config.measuring import EvaluateConfig, SweepConfig
from flap_stream.config.options import EngineConfig, changed_options, removes_experts
from flap_stream.config.pruning import CollectConfig, PlanConfig, PruneConfig, RewriteConfig
from flap_stream.config.targets import TARGET_FIELDS
from flap_stream.config.values import did_you_mean, option_name, shortened, written
from flap_stream.errors import InvalidOption

logger = logging.getLogger(__name__)

_Config = TypeVar("_Config")

_ENGINE = tuple(field.name for field in fields(EngineConfig))
FED_ON = (  # what decides the pruned layers whose outputs wanda-sp feeds to the next
    "ratio",
    "min_heads",
    "min_neurons",
    "round_heads_to",
    "round_neurons_to",
    "tensor_parallel",
)


REMOVED = {  # options of earlier versions, and what to do instead
    "refit_target": "was removed: least-squares always fits the layer's own dense output (own); in place of the other "
    "targets use --restore reconstruct",
}


@dataclass(frozen=True)
class Rule:
    """Options of some configs that have an effect only together with something else.

    needs: what that is, for a message. holds: whether it is present. is_refused: refused if it is not, since the result
    would not be what was asked for; otherwise a warning is enough.
    """

    kinds: tuple[type, ...]
    names: tuple[str, ...]
    needs: str
    holds: Callable[[Any], bool]
    is_refused: bool = True


def _has_ready_tokens(options: Any) -> bool:
    texts = {CollectConfig: "calibration", EvaluateConfig: "text", SweepConfig: "evaluate"}
    name = next(name for kind, name in texts.items() if isinstance(options, kind))
    return any(source.endswith(".npy") for source in getattr(options, name))


RULES = (
    Rule((PlanConfig,), ("metric", "head_score", "statistics"), "--method flap", lambda o: o.method == "flap"),
    Rule(
        (PlanConfig,),
        ("whole_experts",),
        "--method flap --metric fisher --structure al-am",
        lambda o: (o.method, o.metric, o.structure) == ("flap", "fisher", "al-am"),
    ),
    Rule(
        (PlanConfig,),
        ("min_heads", "min_neurons", "round_heads_to", "round_neurons_to", "tensor_parallel"),
        "a method that removes KV groups and neurons, which shortgpt does not",
        lambda o: o.method != "shortgpt",
    ),
    Rule((PlanConfig,), ("min_experts", "round_experts_to"), "--whole-experts or --method reap", removes_experts),
    Rule(
        (PlanConfig,),
        ("depth",),
        "--method flap --metric fisher --structure al-am, without --whole-experts",
        lambda o: (o.method, o.metric, o.structure, o.whole_experts) == ("flap", "fisher", "al-am", False),
    ),
    Rule((CollectConfig,), ("whole_experts", "depth"), "--loss-windows N", lambda o: o.loss_windows > 0),
    Rule((SweepConfig,), ("ratio", *TARGET_FIELDS), "plan and prune; a sweep has --ratios", lambda o: False),
    Rule((SweepConfig,), ("sequence_length", "samples"), "--evaluate TEXT", lambda o: bool(o.evaluate)),
    Rule(
        (SweepConfig,),
        ("resolution",),
        "--max-perplexity-increase SHARE",
        lambda o: o.max_perplexity_increase is not None,
    ),
    Rule(
        (CollectConfig,),
        (
            *("calibration", "samples", "sequence_length", "seed", "batch_size", "dtype"),
            *("bos", "text_column", "chat_template"),
        ),
        "a method that reads text, which is any but magnitude-sp",
        lambda o: o.method != "magnitude-sp",
        is_refused=False,
    ),
    Rule(
        (CollectConfig, EvaluateConfig, SweepConfig),
        ("sequence_length", "seed"),
        "a text; a .npy already holds windows",
        lambda o: not _has_ready_tokens(o),
        is_refused=False,
    ),
    Rule(
        (CollectConfig,),
        FED_ON,
        "--method wanda-sp when statistics are collected; give it to plan",
        lambda o: o.method == "wanda-sp" or isinstance(o, PruneConfig),
        is_refused=False,
    ),
    Rule((SweepConfig,), _ENGINE, "--evaluate TEXT", lambda o: bool(o.evaluate), is_refused=False),
    Rule(
        (RewriteConfig,),
        tuple(name for name in _ENGINE if name != "trust_remote_code"),  # by which a tokenizer's code is carried along
        "--restore least-squares or reconstruct; nothing else runs layers here",
        lambda o: o.refit is not None or isinstance(o, PruneConfig),
        is_refused=False,
    ),
)


def options_of(kind: type[_Config], stage: str, options: Any, keywords: Mapping[str, Any]) -> _Config:
    """The options of a stage, given as a config or as keywords; those without an effect are reported.

    kind: the config that the stage takes. stage: the function's name.
    Raises InvalidOption for anything else, and by `RULES`; TypeError for a keyword that is not an option.
    """
    if options is not None and keywords:
        raise InvalidOption(f"{stage} got a config and {', '.join(keywords)} as well; put all options into one of them")
    if options is not None and not isinstance(options, kind):
        raise InvalidOption(
            f"{stage} takes its options as a {kind.__name__} or by name, such as {_example(kind)}; "
            f"it got {shortened(options)}"
        )
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in keywords:
        if name not in names:
            if name in REMOVED:
                raise InvalidOption(f"--{option_name(name)} {REMOVED[name]}")
            hint = did_you_mean(name, names) or f"; {kind.__name__} lists them"
            raise TypeError(f"{stage}() has no option {name!r}{hint}")
    chosen: Any = kind(**keywords) if options is None else options
    require_effect(chosen)
    return chosen


def require_effect(options: Any) -> None:
    """Raise InvalidOption, or warn, if an option was changed that has no effect with the others."""
    for rule in RULES:
        if not isinstance(options, rule.kinds) or rule.holds(options):
            continue
        for name, value in changed_options(options).items():
            if name in rule.names:
                given = f"--{option_name(name)}" if value is True else f"--{option_name(name)} {written(value)}"
                if rule.is_refused:
                    raise InvalidOption(f"{given} would have no effect: it is only valid with {rule.needs}")
                logger.warning("%s has no effect: it is only valid with %s", given, rule.needs)


def effective(options: Any) -> dict[str, Any]:
    """Fields of a config that have a value and an effect with the others, and their values."""
    idle = {n for rule in RULES if isinstance(options, rule.kinds) and not rule.holds(options) for n in rule.names}
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None and name not in idle}


def warn_of_positions(config: Mapping[str, Any], length: int) -> None:
    """Warn of windows that are longer than the model was built for. config: of the language model."""
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and length > most:
        logger.warning(
            "windows of %d tokens are longer than the %d positions that the model was built for; what it computes "
            "beyond them may be meaningless, so lower --sequence-length",
            length,
            most,
        )


def _example(kind: type) -> str:
    name = next((name for name in ("ratio", "text", "restore") if name in kind.__dataclass_fields__), "")  # type: ignore[attr-defined]
    return {"ratio": "ratio=0.2", "text": 'text="test.txt"', "restore": 'restore="bias"'}.get(name, "device='cpu'")

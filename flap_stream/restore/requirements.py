"""Which models can be refitted, and what that takes: sizes for the placement, bytes in the run directory."""

from collections.abc import Sequence
from math import prod
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.least_squares import DAMPING, EXPERT_DAMPING, FOLLOW_SHARE, FOLLOW_TOKENS
from flap_stream.engine.placement.job import ProjectionSizes, Refit
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.architecture import Family
from flap_stream.model.units import ROWS

# Of a reconstruction: tokens of a step, the largest step of a weight as a share of the root mean square of its matrix,
# which share of the windows is held out; fewest and most passes over them, and how many tokens all passes are to see if
# that allows. README.md has what else was tried.
STEP_TOKENS, LEARNING_RATE, HELD_OUT = 1024, 0.015, 8
LEAST_EPOCHS, MOST_EPOCHS, SEEN_TOKENS = 3, 6, 3 << 17


def epochs(tokens: int) -> int:
    """Passes of a reconstruction over its windows, of so many tokens: more over fewer, for as many steps."""
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, -(-SEEN_TOKENS // max(1, tokens))))


def require_refittable(model: StreamedModel, restore: str) -> None:
    """Raise UnsupportedModel for models that a refit is not defined for. restore: one of config.REFITS."""
    if restore != "reconstruct" and model.family.is_parallel:
        raise UnsupportedModel(
            f"{model.checkpoint.source} runs attention and MLP side by side, where least squares, which refits one "
            "after the other, is not defined; use --restore reconstruct or bias"
        )


def follows_dense(restore: str, family: Family) -> bool:
    """Whether a refit needs the dense model's hidden states, which run through the layers beside the pruned model's.

    Least squares goes without them where what a projection outputs is normalised before it is added to the hidden
    states, and in mixtures, whose experts could not make up for what earlier layers have left.
    """
    return restore == "reconstruct" or not (family.norms_outputs or family.experts)


def refit_sizes(model: StreamedModel, restore: str, tokens: int, keeps: Sequence[LayerKeep] | None = None) -> Refit:
    """Upper bounds on the sizes of all refits, for the placement.

    tokens: of all windows. keeps: of each layer; without them every layer is assumed to keep all its units.
    """
    if restore == "reconstruct":
        fitted = tuple(_fitted(model, i) for i in range(len(model.shapes)))
        return Refit(follows_dense=True, fitted=fitted, epochs=epochs(tokens), step_tokens=STEP_TOKENS)
    projections, mixtures, arranged = list[ProjectionSizes](), list[tuple[ProjectionSizes, ...]](), 0
    for i, shape in enumerate(model.shapes):
        experts = list[ProjectionSizes]()
        for part in model.family.parts(shape):
            output = part.kind.output
            kept = part.units if keeps is None else len(part.own(keeps[i].of(part.kind.name)))
            sizes = output.size(part.units, shape), output.size(kept, shape)
            if shape.experts and part.kind.name is Sublayer.MLP:
                experts.append((model.layer_entries[i][f"{output.name}.weight"].shape[ROWS], *sizes))
                continue
            arranged = max(arranged, model.hidden_size * sum(p.size(part.units, shape) for p in part.kind.readers))
            projections.append((model.hidden_size, *sizes))
        mixtures += [tuple(experts)] if experts else []
    choices = round(model.expert_share * max(map(len, mixtures), default=0))
    return Refit(tuple(projections), arranged, tuple(mixtures), choices, follows_dense(restore, model.family))


def _fitted(model: StreamedModel, index: int) -> int:
    """Parameters of one layer that a reconstruction fits, in the dense sizes."""
    return sum(prod(entry.shape) for entry in model.layer_entries[index].values()) + 2 * model.hidden_size


def refit_stored_bytes(model: StreamedModel, restore: str) -> int:
    """Upper bound on the bytes of the refitted tensors in the run directory."""
    if restore == "reconstruct":
        stored = [entry for entries in model.layer_entries for entry in entries.values()]
    else:
        stored = [
            entries[name]
            for entries, shape in zip(model.layer_entries, model.shapes, strict=True)
            for part in model.family.parts(shape)
            for projection in part.kind.projections
            if projection.axis != ROWS and (name := f"{projection.name}.weight") in entries
        ]
    return sum(entry.nbytes + (entry.shape or (1,))[0] * entry.item_bytes for entry in stored)


def refit_record(restore: str, family: Family) -> dict[str, Any]:
    """What determines a refit besides the plan and how layers are run, as journal and pruning.json hold it."""
    if restore == "reconstruct":
        passes = {"epochs": [LEAST_EPOCHS, MOST_EPOCHS], "seen_tokens": SEEN_TOKENS}
        fit = {"step_tokens": STEP_TOKENS, "learning_rate": LEARNING_RATE, "held_out": HELD_OUT}
        return {**passes, **fit, "last_layer": "logits"}
    found: dict[str, Any] = {"target": "own", "damping": DAMPING}
    if follows_dense(restore, family):
        found |= {"target": "dense", "follow": [FOLLOW_SHARE, FOLLOW_TOKENS]}
    return {**found, **({"expert_damping": EXPERT_DAMPING} if family.experts else {})}

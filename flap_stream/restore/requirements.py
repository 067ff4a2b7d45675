"""Which models can be refitted, and what that takes: sizes for the placement, bytes in the run directory."""

from collections.abc import Sequence
from math import prod
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.gauss_newton import DIRECTIONS
from flap_stream.arithmetic.layer_shape import Sublayer
from flap_stream.arithmetic.least_squares import DAMPING
from flap_stream.config import ALIGNING_TARGETS
from flap_stream.engine.placement.job import Refit
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import InvalidOption, UnsupportedModel
from flap_stream.model.units import ROWS

# Of a reconstruction: passes over the windows, tokens of a step, the largest step of a weight as a share of the root
# mean square of its matrix, and which share of the windows is held out. README.md has what else was tried.
EPOCHS, STEP_TOKENS, LEARNING_RATE, HELD_OUT = 3, 1024, 0.015, 8


def require_refittable(model: StreamedModel, target: str) -> None:
    """Raise UnsupportedModel for models and targets that no refit is defined for."""
    where = model.checkpoint.source
    if target == "reconstruct":
        if model.ranks.world > 1:
            raise InvalidOption(
                f"--restore reconstruct runs in one process, not in {model.ranks.world}; rewrite without torchrun"
            )
        return
    if any(shape.experts for shape in model.shapes):
        raise UnsupportedModel(
            f"{where} has experts, whose projections are not refitted by least squares; use --restore reconstruct or "
            "bias"
        )
    if target != "own" and model.family.norms_outputs:
        raise UnsupportedModel(
            f"{where} normalises attention and MLP outputs before the residual addition, so the hidden states cannot "
            "be a least-squares target; use --refit-target own"
        )


def refits_head(model: StreamedModel, target: str) -> bool:
    """Whether the head is refitted; a head tied to the embedding never is."""
    return target in ALIGNING_TARGETS and not model.skeleton.tied


def refit_sizes(model: StreamedModel, target: str, keeps: Sequence[LayerKeep] | None = None) -> Refit:
    """Upper bounds on the sizes of all refits, for the placement.

    keeps: of each layer; without them every layer is assumed to keep all its units.
    """
    if target == "reconstruct":
        fitted = tuple(_fitted(model, i) for i in range(len(model.shapes)))
        return Refit((), True, fitted=fitted, epochs=EPOCHS, step_tokens=STEP_TOKENS)
    hidden, aligns = model.hidden_size, target in ALIGNING_TARGETS
    projections, steps, readers = list[tuple[int, int, int]](), list[tuple[int, int, int]](), 0
    for i, shape in enumerate(model.shapes):
        for part in model.family.parts(shape):
            kind = part.kind
            kept = part.units if keeps is None else len(part.own(keeps[i].of(kind.name)))
            projections.append((hidden, kind.output.size(part.units, shape), kind.output.size(kept, shape)))
            stays, whole = (sum(p.size(n, shape) for p in kind.readers) for n in (kept, part.units))
            readers = max(readers, hidden * (whole + aligns * stays))
            projections += [(hidden, hidden, hidden)] * aligns
            if target == "joint" and kind.name == Sublayer.MLP:
                steps.append((stays, kept, hidden))
    has_head = refits_head(model, target)
    projections += [(hidden, hidden, hidden)] * has_head
    return Refit(tuple(projections), target != "own", readers, has_head, tuple(steps))


def _fitted(model: StreamedModel, index: int) -> int:
    """Parameters of one layer that a reconstruction fits, in the dense sizes."""
    return sum(prod(entry.shape) for entry in model.layer_entries[index].values()) + 2 * model.hidden_size


def refit_stored_bytes(model: StreamedModel, target: str) -> int:
    """Upper bound on the bytes of the refitted tensors in the run directory."""
    if target == "reconstruct":
        return sum(
            entry.nbytes + entry.shape[0] * entry.item_bytes
            for entries in model.layer_entries
            for entry in entries.values()
        )
    weights = (
        entries.get(f"{projection.name}.weight")
        for entries, shape in zip(model.layer_entries, model.shapes, strict=True)
        for part in model.family.parts(shape)
        for projection in part.kind.projections
        if target in ALIGNING_TARGETS or projection.axis != ROWS
    )
    stored = sum(weight.nbytes + weight.shape[0] * weight.item_bytes for weight in weights if weight is not None)
    return stored + (model.head_entry.nbytes if refits_head(model, target) else 0)


def refit_record(target: str) -> dict[str, Any]:
    """What determines a refit besides the plan and how layers are run, as journal and pruning.json hold it."""
    if target == "reconstruct":
        return {"epochs": EPOCHS, "step_tokens": STEP_TOKENS, "learning_rate": LEARNING_RATE, "held_out": HELD_OUT}
    return {"target": target, "damping": DAMPING, **({"directions": DIRECTIONS} if target == "joint" else {})}

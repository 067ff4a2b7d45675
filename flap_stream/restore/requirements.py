"""Which models can be refitted, and what that takes: sizes for the placement, bytes in the run directory."""

from collections.abc import Sequence
from typing import Any

from flap_stream.arithmetic.allocation import LayerKeep
from flap_stream.arithmetic.gauss_newton import DIRECTIONS
from flap_stream.arithmetic.layer_shape import LayerShape, Sublayer
from flap_stream.arithmetic.least_squares import DAMPING
from flap_stream.config import ALIGNING_TARGETS
from flap_stream.engine.placement.job import Refit
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.architecture import Family
from flap_stream.model.units import ROWS


def require_refittable(family: Family, shapes: Sequence[LayerShape], target: str, where: str) -> None:
    """Raise UnsupportedModel for models and targets that no refit is defined for."""
    if any(shape.experts for shape in shapes):
        raise UnsupportedModel(f"{where} has experts, whose projections are not refitted; use --restore bias")
    if target != "own" and family.norms_outputs:
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


def refit_stored_bytes(model: StreamedModel, target: str) -> int:
    """Upper bound on the bytes of the refitted tensors in the run directory."""
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
    return {"target": target, "damping": DAMPING, **({"directions": DIRECTIONS} if target == "joint" else {})}

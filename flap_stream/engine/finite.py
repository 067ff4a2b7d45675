"""Refusing weights and hidden states that hold NaN or infinity."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from flap_stream.engine.ranks import Ranks
from flap_stream.errors import NonFinite


def require_finite(weights: Mapping[str, torch.Tensor], source: str, ranks: Ranks) -> None:
    """Raise NonFinite, naming the tensor, if any weight that a node's ranks share holds NaN or infinity.

    weights: by full name, the same on all ranks. Each rank of a node checks a part of them; all raise together.
    """
    own, count = ranks.local
    part = dict(list(weights.items())[own::count])
    bad = [name for name, is_finite in zip(part, all_finite(part.values()), strict=True) if not is_finite]
    refuse_non_finite([name for names in ranks.gathered(bad) for name in names], source)


def refuse_non_finite(names: Sequence[str], source: str) -> None:
    """Raise NonFinite about the first of these tensors, if there is any."""
    for name in names:
        raise NonFinite(
            f"tensor {name} of {source} holds NaN or infinity; the checkpoint is damaged, so download it again"
        )


def all_finite(tensors: Iterable[torch.Tensor]) -> list[bool]:
    """Whether each tensor is free of NaN and infinity, in one pass and without a copy: both survive min and max."""
    ends = [end for tensor in tensors for end in tensor.aminmax()]
    if not ends:
        return []  # a norm without weights
    finite = torch.isfinite(torch.stack(ends)).view(-1, 2)  # [tensor, (min, max)]
    return finite.all(dim=1).tolist()

"""The table behind figures of many values: the lowest, the median and the highest of each layer."""

from collections.abc import Sequence

import numpy as np

from flap_stream.report.drawing import Table

_HEADS = ("lowest", "median", "highest")


def quantile_table(kv_groups: Sequence[np.ndarray], neurons: Sequence[np.ndarray]) -> Table:
    """A row for each layer. kv_groups, neurons: float64 `[unit]` of each; what is not finite is left out."""
    heads = ("layer", *(f"{kind}: {head}" for kind in ("KV groups", "neurons") for head in _HEADS))
    pairs = enumerate(zip(kv_groups, neurons, strict=True))
    return Table(heads, [(i, *_quantiles(groups), *_quantiles(own)) for i, (groups, own) in pairs])


def _quantiles(values: np.ndarray) -> list[str]:
    finite = values[np.isfinite(values)]
    return [f"{value:.4g}" for value in np.quantile(finite, (0, 0.5, 1))] if len(finite) else ["", "", ""]

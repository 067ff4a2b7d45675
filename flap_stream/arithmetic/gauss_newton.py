"""A Gauss-Newton step for what an MLP's neurons read, beyond what any refit of their outputs can restore.

A neuron's output z is a function of what its rows r of gate and up give, and of nothing else, so that to first order
the MLP's output changes with those rows' weights by

    J dW = down ((dz/dr) * (x dW^T)), summed over a neuron's rows.

The step minimises |error - J dW|^2 over all tokens. It is found by conjugate gradients, which need only products with J
and its transpose, summed over tokens batch by batch. To be quick they search in coordinates in which the inputs x are
uncorrelated and each row matters as much as any other: dW = scale * V * U^-T, with U the Cholesky factor of the second
moments of x. Stopping early keeps out of directions that calibration says little about.
"""

import torch

from flap_stream.arithmetic.least_squares import DAMPING, cholesky_factor, workspace_bytes

DIRECTIONS = 6

_LEAST_EFFECT = 1e-3  # of the mean: rows with less barely move


class ConjugateGradients:
    """The step of least squares for rows `[row, hidden]`, damped, direction by direction.

    inputs: second moments of what rows read, summed over the tokens, float32 `[hidden, hidden]`, upper triangle; used
    up. gradient: J^T errors, summed likewise, float32 `[row, hidden]`. effects: roots of the mean squares by which the
    MLP's output changes with what each row gives, float32 `[row]`.
    """

    def __init__(
        self, inputs: torch.Tensor, gradient: torch.Tensor, effects: torch.Tensor, tokens: int, damping: float = DAMPING
    ) -> None:
        factor, _ = cholesky_factor(inputs.div_(tokens), damping)
        self._factor, self._damping = factor.triu_(), damping * tokens
        floor = _LEAST_EFFECT * float(effects.mean())
        self._scale = 1 / (effects.clamp(min=floor) if floor > 0 else torch.ones_like(effects))[:, None]
        self._left = self._pulled(gradient)
        self._found = torch.zeros_like(self._left)
        self._square = _dot(self._left, self._left)
        self._towards = self._left / (self._square**0.5 or 1.0)
        self._length = self._square**0.5

    def direction(self) -> torch.Tensor:
        """Where to search next, float32 `[row, hidden]`."""
        return self._weights(self._towards)

    def advance(self, product: torch.Tensor) -> None:
        """Go as far as is best. product: J^T J direction, float32 `[row, hidden]`."""
        if not self._square:
            return
        product = self._pulled(product).add_(self._towards, alpha=self._damping)
        distance = self._square / (self._length * _dot(self._towards, product))
        self._found.add_(self._towards, alpha=distance)
        self._left.sub_(product, alpha=distance)
        before, self._square = self._square, _dot(self._left, self._left)
        self._towards.mul_(self._length * self._square / before).add_(self._left)
        self._length = _dot(self._towards, self._towards) ** 0.5
        self._towards.div_(self._length or 1.0)

    def step(self) -> torch.Tensor:
        """The best found, float32 `[row, hidden]`."""
        return self._weights(self._found)

    def _pulled(self, sums: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self._factor, self._scale * sums, upper=True, left=False)

    def _weights(self, values: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self._factor.T, self._scale * values, upper=False, left=False)


def step_workspace_bytes(
    rows: int, neurons: int, hidden_size: int, tokens: int, item_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """Most bytes that a step of so many rows takes: while a batch of tokens is summed, and between such sums."""
    sums, _ = workspace_bytes(rows, hidden_size, hidden_size, item_bytes, True, on_cpu)
    search = 3 * 4 * rows * hidden_size  # what is left, found and searched
    weights = 2 * item_bytes * rows * hidden_size  # those in use, and a direction
    # What rows give, their slopes or what is pulled, half of it at once; the neurons' outputs and what is pulled back.
    batch = tokens * item_bytes * (5 * rows // 2 + 2 * neurons + 4 * hidden_size)
    return sums + search + weights + batch, sums + 2 * search + weights + 4 * hidden_size * hidden_size


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))

"""A Gauss-Newton step for what an MLP's neurons read, beyond what any refit of their outputs can restore.

A neuron's output z depends only on the outputs r of its rows of gate and up, so that to first order the MLP's output
changes with those rows' weights by

    J dW = down ((dz/dr) * (x dW^T)), summed over a neuron's rows.

The step minimises |error - J dW|^2 over all tokens. It is found by conjugate gradients, which need only products with J
and its transpose, summed over tokens batch by batch. To converge fast they search in coordinates in which the inputs x
are uncorrelated and all rows matter equally: dW = scale * V * U^-T, with U the Cholesky factor of the second moments of
x. Stopping early avoids directions that calibration says little about.
"""

import torch

from flap_stream.arithmetic.least_squares import DAMPING, cholesky_factor, workspace_bytes

# Per step. On the bundled model, the share of the bias's rise in perplexity that is left: three directions 0.318, six
# 0.294 at a ratio of 50 %; six 0.336, twelve 0.324 at 30 %.
DIRECTIONS = 6

# Of the mean effect: rows with less are scaled as if they had this much, so that they barely move. Not measured.
_LEAST_EFFECT = 1e-3


class ConjugateGradients:
    """The damped least-squares step for rows `[row, hidden]`, direction by direction.

    inputs: second moments of what rows read, summed over the tokens, float32 `[hidden, hidden]`, upper triangle; used
    up. gradient: J^T errors, summed likewise, float32 `[row, hidden]`. effects: root mean square change of the MLP's
    output with the output of each row, float32 `[row]`.
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
        """Move along the direction to its minimum. product: J^T J direction, float32 `[row, hidden]`."""
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
        """The step found so far, float32 `[row, hidden]`."""
        return self._weights(self._found)

    def _pulled(self, sums: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self._factor, self._scale * sums, upper=True, left=False)

    def _weights(self, values: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self._factor.T, self._scale * values, upper=False, left=False)


def step_workspace_bytes(
    rows: int, neurons: int, hidden_size: int, tokens: int, item_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """Upper bound on the bytes of a step for `rows` rows: while a batch of tokens is summed, and between such sums."""
    sums, _ = workspace_bytes(rows, hidden_size, hidden_size, item_bytes, True, on_cpu)
    search = 3 * 4 * rows * hidden_size  # residual, step and direction
    weights = 2 * item_bytes * rows * hidden_size  # those in use, and a direction
    # The rows' outputs, their slopes or what is pulled back, half of it at once; the neurons' outputs and gradients.
    batch = tokens * item_bytes * (5 * rows // 2 + 2 * neurons + 4 * hidden_size)
    return sums + search + weights + batch, sums + 2 * search + weights + 4 * hidden_size * hidden_size


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))

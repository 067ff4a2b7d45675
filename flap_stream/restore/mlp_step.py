"""A Gauss-Newton step of what an MLP's neurons read, over all windows of all ranks."""

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.nn import functional

from flap_stream.arithmetic.gauss_newton import DIRECTIONS, ConjugateGradients
from flap_stream.arithmetic.least_squares import KeptMoments, MomentSums
from flap_stream.engine.layer_pass import Batch
from flap_stream.errors import NonFinite
from flap_stream.restore.pruned_sublayer import PrunedSublayer
from flap_stream.restore.stand_ins import LinearisedMlp

logger = logging.getLogger(__name__)

# A step that does not reduce the error is halved this often before it is given up. Not measured.
HALVINGS = 4
# Runs of the layer over all windows that count as one step: the fit before it, the first batch, the gradient, a run per
# direction, and one for the whole step and for each halving.
STEP_RUNS = 4 + DIRECTIONS + HALVINGS

# How much more than the average direction one may change the output; sets how finely sums are rounded. Not measured.
_SPREAD = 16


class MlpStep:
    """The step from the present weights of gate and up, while the output projection is held fixed.

    sublayer: the MLP, with the rows of its kept neurons first. output: the fitted weight `[hidden, neuron]` and bias
    `[hidden]` of the output projection, by relative name.

    The conjugate gradients run on rank 0; the other ranks contribute sums over their windows.
    """

    def __init__(self, sublayer: PrunedSublayer, output: Mapping[str, torch.Tensor]) -> None:
        self._refit, self._sublayer, self._model = sublayer.refit, sublayer, sublayer.refit.model
        model, kind = self._model, sublayer.part.kind
        self._down, self._bias = (
            output[f"{kind.output.name}.{part}"].to(model.device, model.dtype) for part in ("weight", "bias")
        )
        self._mlp = LinearisedMlp(model.layers[sublayer.index].get_submodule(kind.module), kind, model.hidden_size)
        rows = {name.removesuffix("weight") + "bias": rows for name, rows in sublayer.kept_rows().items()}
        self._biases = {
            name: sublayer.weights[name][kept.to(model.device)]
            for name, kept in rows.items()
            if name in sublayer.weights
        }
        self._search: ConjugateGradients | None = None  # on rank 0, once the gradient is known

    def take(self, readers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of what reads hidden states after the step; unchanged if no step reduces the error.

        readers: by name, their rows of the kept neurons, in the dtype of the checkpoint.
        Raises NonFinite if the moments hold NaN or infinity.
        """
        self._use(readers)
        effects, square = self._first_batch()
        step, before = self._find_step(effects, square)
        for _ in range(1 + HALVINGS):
            parts = step.split([len(tensor) for tensor in readers.values()])
            moved = {
                name: (tensor.float() + part).to(tensor.dtype)
                for (name, tensor), part in zip(readers.items(), parts, strict=True)
            }
            self._use(moved)
            if self._total(_squares(errors) for errors in self._errors()) < before:
                return moved
            step = step / 2
        logger.warning("no step of %s reduces its error; its weights are kept as aligned", self._sublayer.where)
        return dict(readers)

    def _use(self, readers: Mapping[str, torch.Tensor]) -> None:
        model = self._model
        self._mlp.use({name: tensor.to(model.device, model.dtype) for name, tensor in readers.items()} | self._biases)

    # --- the search ---

    def _find_step(self, effects: torch.Tensor, square: float) -> tuple[torch.Tensor, float]:
        """The step, float32 `[row, hidden]` in host memory, and the sum of squared errors before it."""
        model, ranks = self._model, self._model.ranks
        before = self._begin(effects, square)
        squares = _SPREAD / model.hidden_size * effects.double().square()
        for _ in range(DIRECTIONS):
            direction = ranks.tensor_from_first(lambda: self._searched().direction().to(model.dtype), model.device)
            self._advance(direction, squares)
        return ranks.from_first(lambda: self._searched().step().cpu()), before

    def _begin(self, effects: torch.Tensor, square: float) -> float:
        """Start the search from the gradient; returns the sum of squared errors."""
        sums, total = self._pulled(self._errors(), square * effects.double().square())
        self._model.ranks.from_first(lambda: self._start(sums.finish(about_mean=False), effects))
        return total

    def _start(self, moments: KeptMoments, effects: torch.Tensor) -> None:
        if not torch.isfinite(moments.kept.diagonal()).all() or not torch.isfinite(moments.cross).all():
            raise NonFinite(
                f"the inputs or the errors of {self._sublayer.where} hold NaN or infinity; try --dtype float32"
            )
        self._search = ConjugateGradients(moments.kept, moments.cross.T, effects, self._refit.tokens)

    def _advance(self, direction: torch.Tensor, squares: torch.Tensor) -> None:
        """Move to the minimum along a direction `[row, hidden]`. squares: see `_pulled`."""
        sums, _ = self._pulled(self._changes(direction), squares)
        self._model.ranks.from_first(lambda: self._searched().advance(sums.finish(about_mean=False).cross.T))

    def _searched(self) -> ConjugateGradients:
        assert self._search is not None, "only rank 0 searches, after the gradient is known"
        return self._search

    # --- runs over windows ---

    def _first_batch(self) -> tuple[torch.Tensor, float]:
        """How the output depends on each row, and how far it is from its target, from the first batch of rank 0.

        Returns the root mean squares by which the output changes with each row, float32 `[row]`, and the mean squared
        error. One batch is the same however many ranks there are.
        """
        refit = self._refit
        windows = range(min(refit.sizes.first, refit.hidden.shape[0]))
        slopes, errors = list[torch.Tensor](), list[torch.Tensor]()
        for found in self._errors(windows):
            slopes.append(_squares(self._mlp.slopes, 0))
            errors.append(_squares(found))
        tokens = len(windows) * refit.hidden.shape[1]
        effects, square = self._model.ranks.from_first(lambda: self._effects(slopes, errors, tokens))
        return effects.to(self._model.device), square

    def _effects(
        self, slopes: list[torch.Tensor], errors: list[torch.Tensor], tokens: int
    ) -> tuple[torch.Tensor, float]:
        """The figures of `_first_batch` from sums of squares over its `tokens` tokens, one item per batch that ran."""
        slope, reach = sum(slopes[1:], slopes[0]), _squares(self._down, 0)
        effects = (slope * reach.repeat(len(slope) // len(reach)) / tokens).sqrt()
        return effects.cpu(), float(sum(errors)) / (tokens * self._model.hidden_size)

    def _pulled(self, errors: Iterator[torch.Tensor], squares: torch.Tensor) -> tuple[MomentSums, float]:
        """Sums of the inputs and of what J^T pulls back of the errors; and the sum of the errors' squares.

        errors: `[token, hidden]` of each batch in turn, or changes of the output in their place. squares: expected mean
        squares of what is pulled back, float64 `[row]`. The sums are complete on rank 0.
        """
        refit, width = self._refit, self._model.hidden_size
        # The inputs have passed a norm, so their squares are around 1.
        sums = refit.sums(width, refit.tokens * torch.cat([squares.new_ones(width), squares]))
        total = self._total(self._added(sums, errors))
        return refit.collected(sums), total

    def _added(self, sums: MomentSums, errors: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Add each batch to the sums; yields its sum of squared errors."""
        for found in errors:
            yield _squares(found)
            sums.add(torch.cat([self._mlp.inputs, self._mlp.pulled(found, self._down)], dim=-1))

    def _total(self, parts: Iterable[torch.Tensor]) -> float:
        """The sum of the parts of all batches of all ranks, accumulated in float64."""
        total = torch.zeros(1, dtype=torch.float64, device=self._model.device)
        for part in parts:
            total.add_(part)
        return sum(self._model.ranks.gathered(float(total)))

    def _errors(self, windows: range | None = None) -> Iterator[torch.Tensor]:
        """The target minus the MLP's output, `[token, hidden]`, for each batch of these windows in order."""
        targets = self._refit.targets(windows)
        for start, output in self._run(windows):
            wanted = self._sublayer.residual(targets, start, output).flatten(0, 1)
            yield wanted - functional.linear(self._mlp.outputs, self._down, self._bias)

    def _changes(self, direction: torch.Tensor) -> Iterator[torch.Tensor]:
        """The change of the output along a direction `[row, hidden]`: `[token, hidden]`, batch by batch."""
        for _ in self._run():
            yield self._mlp.pushed(direction, self._down)

    def _run(self, windows: range | None = None) -> Iterator[Batch]:
        """Run the layer with the linearised MLP, which outputs zeros, in place of its own."""
        stand_ins = {self._sublayer.part.kind.module: self._mlp}
        return self._sublayer.forward(self._refit.hidden, stand_ins, keep_output=False, windows=windows)


def _squares(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sums of squares in float32, of whatever dtype, without a copy."""
    return torch.linalg.vector_norm(values, dim=dim, dtype=torch.float32).square()

"""A Gauss-Newton step of what an MLP's neurons read, over all windows of all ranks."""

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional

from flap_stream.arithmetic.gauss_newton import DIRECTIONS, ConjugateGradients
from flap_stream.arithmetic.least_squares import KeptMoments
from flap_stream.engine.hidden_states import Feed
from flap_stream.engine.layer_pass import Batch
from flap_stream.errors import NonFinite
from flap_stream.model.units import UnitKind
from flap_stream.restore.second_pass import SecondPass
from flap_stream.restore.stand_ins import LinearisedMlp

logger = logging.getLogger(__name__)

HALVINGS = 4
STEP_RUNS = 4 + DIRECTIONS + HALVINGS  # runs over all windows, the refit that comes before included

_SPREAD = 16  # by how much more than the mean one a direction may change the output

Errors = Callable[[int, torch.Tensor], torch.Tensor]


class MlpStep:
    """The step from an output projection that is held as it is: `[hidden, neuron]` and its bias `[hidden]`.

    run: runs the layer over windows, a module in the place of its MLP, everything else silent. wanted: what the MLP
    should add to the hidden states, of targets, first window and output of that run. biases: of what reads hidden
    states, of the neurons that stay.
    """

    def __init__(
        self,
        on: SecondPass,
        index: int,
        kind: UnitKind,
        run: Callable[[nn.Module, range | None], Iterator[Batch]],
        wanted: Callable[[Feed, int, torch.Tensor], torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        down: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        device, dtype = on.model.device, on.model.dtype
        self._on, self._run, self._wanted, self._biases = on, run, wanted, biases
        self._down, self._bias = down.to(device, dtype), bias.to(device, dtype)
        self._where = f"{kind.module} in layer {index}"
        self._mlp = LinearisedMlp(on.model.layers[index].get_submodule(kind.module), kind, on.model.hidden_size)

    def take(self, readers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of what reads hidden states, after the step; as they were, if none makes the error less.

        readers: by name, their rows of the neurons that stay, in the dtype of the checkpoint.
        Raises NonFinite if the moments hold NaN or infinity.
        """
        self._use(readers)
        effects, square = self._first_batch()
        step, before = self._search(effects, square)
        for _ in range(1 + HALVINGS):
            parts = step.split([len(tensor) for tensor in readers.values()])
            moved = {
                name: (tensor.float() + part).to(tensor.dtype)
                for (name, tensor), part in zip(readers.items(), parts, strict=True)
            }
            self._use(moved)
            if self._squared_errors(self._errors()) < before:
                return moved
            step = step / 2
        logger.warning("no step of %s makes its error less; it stays as aligned", self._where)
        return dict(readers)

    def _search(self, effects: torch.Tensor, square: float) -> tuple[torch.Tensor, float]:
        """The step, float32 `[row, hidden]` in host memory, and the sum of squared errors without it."""
        on, search = self._on, list[ConjugateGradients]()  # on rank 0 alone

        def begin(found: KeptMoments) -> None:
            if not torch.isfinite(found.kept.diagonal()).all() or not torch.isfinite(found.cross).all():
                raise NonFinite(f"what {self._where} reads or makes holds NaN or infinity; try --dtype float32")
            search.append(ConjugateGradients(found.kept, found.cross.T, effects, on.tokens))

        before = self._pull(self._errors(), square * effects.double().square(), begin)
        squares = _SPREAD / on.model.hidden_size * effects.double().square()
        for _ in range(DIRECTIONS):
            direction = on.model.ranks.from_first(lambda: search[0].direction().to(on.model.dtype).cpu())
            pushes = self._pushes(direction.to(on.model.device))
            self._pull(pushes, squares, lambda found: search[0].advance(found.cross.T))
        return on.model.ranks.from_first(lambda: search[0].step().cpu()), before

    def _pull(self, errors: Errors, squares: torch.Tensor, use: Callable[[KeptMoments], None]) -> float:
        """Sum what is pulled back of errors, or what takes their place, and let rank 0 use the sums.

        squares: mean squares that are expected of it, float64 `[row]`. The sum of the errors' squares comes out.
        """
        on, width = self._on, self._on.model.hidden_size
        sums = on.sums(width, on.tokens * torch.cat([squares.new_ones(width), squares]))  # norms give around 1

        def add(found: torch.Tensor) -> None:
            sums.add(torch.cat([self._mlp.inputs, self._mlp.pulled(found, self._down)], dim=-1))

        total = self._squared_errors(errors, add)
        summed = on.collected(sums)
        on.model.ranks.from_first(lambda: use(summed.finish(about_mean=False)))
        return total

    def _squared_errors(self, errors: Errors, each: Callable[[torch.Tensor], None] = lambda _found: None) -> float:
        """Their sum over all windows of all ranks. each: called with the errors of every batch."""
        model = self._on.model
        total = torch.zeros(1, dtype=torch.float64, device=model.device)

        for start, output in self._run(self._mlp, None):
            found = errors(start, output)
            total.add_(_squares(found))
            each(found)
        return sum(model.ranks.gathered(float(total)))

    def _first_batch(self) -> tuple[torch.Tensor, float]:
        """Roots of the mean squares by which the output changes with each row, float32 `[row]`; mean square error.

        Of the first batch, which one rank has whatever their number.
        """
        on, taken = self._on, list[tuple[torch.Tensor, torch.Tensor]]()
        windows = range(min(on.sizes.first, on.hidden.shape[0]))
        errors_of = self._errors(windows)

        for start, output in self._run(self._mlp, windows):
            taken.append((_squares(self._mlp.slopes, 0), _squares(errors_of(start, output))))

        def found() -> tuple[torch.Tensor, float]:
            slopes, errors = (sum(values) for values in zip(*taken, strict=True))
            reach, tokens = _squares(self._down, 0), len(windows) * on.hidden.shape[1]
            effects = (slopes * reach.repeat(len(slopes) // len(reach)) / tokens).sqrt()
            return effects.cpu(), float(errors) / (tokens * on.model.hidden_size)

        effects, square = on.model.ranks.from_first(found)
        return effects.to(on.model.device), square

    def _errors(self, windows: range | None = None) -> Errors:
        """What the MLP leaves of what it should give, `[token, hidden]`, for each batch of these windows in order."""
        targets = self._on.targets(windows)

        def errors(start: int, output: torch.Tensor) -> torch.Tensor:
            wanted = self._wanted(targets, start, output).flatten(0, 1)
            return wanted - functional.linear(self._mlp.outputs, self._down, self._bias)

        return errors

    def _pushes(self, direction: torch.Tensor) -> Errors:
        return lambda _start, _output: self._mlp.pushed(direction, self._down)

    def _use(self, readers: Mapping[str, torch.Tensor]) -> None:
        device, dtype = self._on.model.device, self._on.model.dtype
        self._mlp.use({name: tensor.to(device, dtype) for name, tensor in readers.items()} | dict(self._biases))


def _squares(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sums of squares in float32, of whatever dtype, without a copy."""
    return torch.linalg.vector_norm(values, dim=dim, dtype=torch.float32).square()

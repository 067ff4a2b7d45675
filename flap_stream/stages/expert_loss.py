"""How much each whole expert affects the loss, from what the backward pass sees of a mixture of experts.

Without expert e the router chooses again among the others, for the tokens that were routed to e. With E_j(x_t) the
output of expert j for token t, w_tj its weight (0 where it is not chosen), w'_tj the weight without e, and g_t the
gradient of a window's loss with respect to the sum of w_tj E_j(x_t), the loss of window w changes by
s_wte = g_t . sum_j (w'_tj - w_tj) E_j(x_t), to first order; F_e = mean_w sum_t s_wte^2, as for the units of `loss.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.func import functional_call

from flap_stream.config import CollectConfig
from flap_stream.config.options import removes_experts
from flap_stream.engine.streamed_model import StreamedModel
from flap_stream.errors import UnsupportedModel
from flap_stream.model.mixture import Mixture


def require_removable_experts(model: StreamedModel, options: CollectConfig) -> None:
    """Raise UnsupportedModel if whole experts are to be removed of a model of which they cannot be."""
    if not removes_experts(options):
        return
    where = model.checkpoint.source
    mixtures = [model.skeleton.mixture(i) for i, shape in enumerate(model.shapes) if shape.experts]
    if not mixtures:
        raise UnsupportedModel(f"{where} has no experts, for --whole-experts or --method reap to remove; leave it out")
    if not model.family.mixture_path:
        raise UnsupportedModel(
            f"the experts of {where} are beside an MLP that all tokens go through, where single ones are not removed "
            "yet; leave out --whole-experts and --method reap, which prunes the neurons of all experts"
        )
    groups = max(mixture.groups for mixture in mixtures)
    if groups > 1:
        raise UnsupportedModel(
            f"the router of {where} chooses among {groups} groups of as many experts each, so single experts cannot be "
            "removed; leave out --whole-experts and --method reap, which prunes the neurons of all experts"
        )


@dataclass(frozen=True)
class _Routing:
    """Which experts tokens go to, and how much each counts.

    index, weight: `[token, choice]`; weight 0 stands for no expert. inputs: what each expert reads, `[expert, token,
    hidden]`, zeros where that depends on the router and it did not choose the expert.
    """

    index: torch.Tensor
    weight: torch.Tensor
    inputs: torch.Tensor

    @classmethod
    def of(cls, arguments: tuple[torch.Tensor, ...], experts: int) -> "_Routing":
        """The routing in the arguments of so many experts, see `SeparateExperts`."""
        if len(arguments) > 1:
            hidden, index, weight = arguments
            return cls(index, weight, hidden.expand(experts, *hidden.shape))
        inputs = arguments[0].unflatten(0, (experts, -1))
        chosen = inputs.ne(0).any(dim=-1).T
        weight, index = chosen.int().topk(max(1, int(chosen.sum(dim=1).max())))
        return cls(index, weight, inputs)

    def window(self, tokens: slice) -> "_Routing":
        """That of these tokens."""
        return _Routing(self.index[tokens], self.weight[tokens], self.inputs[:, tokens])

    @property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token and an expert that it goes to."""
        token, choice = self.weight.ne(0).nonzero(as_tuple=True)
        return token, self.index[token, choice]

    def summed(self, products: torch.Tensor) -> torch.Tensor:
        """Each token's products with its experts, `[token, expert]`, weighted and summed: float64 `[token]`."""
        return (products.gather(1, self.index) * self.weight).sum(dim=1)


@dataclass
class MixtureRead:
    """What a layer's mixture read and gave while the layer ran.

    hidden: its input, `[window, token, hidden]`. arguments: its experts'. output: what they gave, `[token, hidden]`, or
    one row for each expert and token.
    """

    mixture: Mixture
    hidden: torch.Tensor = field(init=False)
    arguments: tuple[torch.Tensor, ...] = field(init=False)
    output: torch.Tensor = field(init=False)

    def squares(self, weights: Mapping[str, torch.Tensor], gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over a window's tokens of s^2, float64 `[window, expert]`, and how many tokens go to each, int64.

        weights: of the layer. gradient: with respect to `output`.
        """
        mixture, experts = self.mixture, len(self.mixture.experts.each)
        hidden, arguments = self.hidden.detach(), tuple(argument.detach() for argument in self.arguments)
        routing, (windows, tokens, _) = _Routing.of(arguments, experts), hidden.shape
        own = [slice(start, start + tokens) for start in range(0, windows * tokens, tokens)]
        tensors = mixture.of_experts(weights)
        scored = [
            _Window(mixture, tensors, x, routing.window(tokens), gradient[tokens])
            for x, tokens in zip(hidden, own, strict=True)
        ]
        for number in range(experts if experts > mixture.needs else 0):
            with _rerouted(mixture, weights, experts, number) as run:
                for window in scored:  # one by one, so that the result does not depend on the batch size
                    window.remove(number, run)
        found = [window.squares() for window in scored]
        return torch.stack([squares for squares, _ in found]), torch.stack([counts for _, counts in found])


@dataclass
class _Window:
    """The mixture on the tokens of one window. tensors: of each expert. gradient: `[token, hidden]`."""

    mixture: Mixture
    tensors: Sequence[dict[str, torch.Tensor]]
    hidden: torch.Tensor
    routing: _Routing
    gradient: torch.Tensor
    _without: dict[int, tuple[torch.Tensor, _Routing]] = field(init=False, default_factory=dict)

    def remove(self, number: int, run: Callable[[torch.Tensor], _Routing]) -> None:
        """Note where the tokens of an expert go without it. run: the router without it."""
        tokens, experts = self.routing.pairs
        if len(tokens := tokens[experts == number]):
            routing = run(self.hidden[tokens])
            is_own = routing.inputs.stride(0) > 0  # otherwise they are the tokens' hidden states, whoever reads them
            self._without[number] = tokens, routing if is_own else replace(routing, inputs=self.hidden)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the tokens of s^2, float64 `[expert]`, and how many tokens go to each expert, int64."""
        products, count = self._products(), len(self.routing.inputs)
        total, counts = products.new_zeros(count), torch.zeros(count, dtype=torch.int64)
        before = self.routing.summed(products)
        for number, (tokens, routing) in self._without.items():
            total[number] = (routing.summed(products[tokens]) - before[tokens]).square_().sum()
            counts[number] = len(tokens)
        return total.cpu(), counts

    def _products(self) -> torch.Tensor:
        """g_t . E_j(x_t) for every token and expert that it goes to, with all experts or without one; float64."""
        experts, tokens, _ = self.routing.inputs.shape
        wanted = torch.zeros(tokens, experts, dtype=torch.bool, device=self.hidden.device)
        wanted[self.routing.pairs] = True
        inputs = self.routing.inputs
        for removed, (own, routing) in self._without.items():
            token, expert = routing.pairs
            wanted[own[token], expert] = True
            if inputs.stride(0):
                inputs = inputs.clone() if inputs is self.routing.inputs else inputs
                inputs[expert, own[token]] = routing.inputs[expert - (expert > removed).int(), token]
        products = torch.zeros(tokens, experts, dtype=torch.float64, device=self.hidden.device)
        for number in range(experts):
            own = wanted[:, number].nonzero()[:, 0]
            if len(own):
                output = self.mixture.run_expert(number, self.tensors[number], inputs[number, own]).float()
                products[own, number] = (output * self.gradient[own].float()).sum(dim=1, dtype=torch.float64)
        return products


@contextmanager
def captured_mixture(model: StreamedModel, index: int) -> Iterator[MixtureRead | None]:
    """What a layer's mixture reads and gives while the layer runs in the block; None if the layer has none."""
    if not model.shapes[index].experts:
        yield None
        return
    found = MixtureRead(mixture := model.skeleton.mixture(index))

    def see_hidden(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        found.hidden = inputs[0]

    def see_experts(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.arguments, found.output = inputs, output

    handles = [
        mixture.module.register_forward_pre_hook(see_hidden), mixture.experts.register_forward_hook(see_experts)
    ]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rerouted(
    mixture: Mixture, weights: Mapping[str, torch.Tensor], experts: int, removed: int
) -> Iterator[Callable[[torch.Tensor], _Routing]]:
    """A function from the mixture's inputs, `[token, hidden]`, to where they go without one of its experts.

    The indices of the routing are those of all experts.
    """
    kept = [number for number in range(experts) if number != removed]
    numbers = torch.tensor(kept)
    tensors = mixture.without_experts(mixture.cut(weights, kept))
    with mixture.only(kept):
        seen: list[tuple[torch.Tensor, ...]] = []

        def see(*arguments: torch.Tensor) -> torch.Tensor:
            seen.append(arguments)
            return torch.zeros_like(arguments[0])

        mixture.experts.forward = see

        def run(hidden: torch.Tensor) -> _Routing:
            functional_call(mixture.module, tensors, (hidden[None],))
            found = _Routing.of(seen.pop(), len(kept))
            return _Routing(numbers.to(found.index.device)[found.index], found.weight, found.inputs)

        yield run

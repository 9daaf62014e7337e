"""An optimizer of hyperparameters that needs no learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.core.validation import is_ascending, is_number

_Move: TypeAlias = tuple[Tensor, Tensor, Tensor]  # parameter, gradient, direction

_LOSS_MEMORY = 0.9  # of the running means of the loss and of its predicted decrease
_SQUARE_MEMORY = 0.99  # of the running mean of squared gradients
_FEWEST = 0.02  # smallest fraction of entries with a gradient that is taken into account


class PolyakRMSprop(Optimizer):
    """RMSprop whose step length follows from the loss, as in Polyak's rule, so that there is no learning rate.

    Weights answer to a change of a hyperparameter within a horizon of many training steps. So lengths are limited per
    horizon. Each step has the largest length that, kept up for one horizon of steps,

    - moves no hyperparameter by more than `travel` units, and
    - is predicted to lower the loss by no more than the fraction `decrease` of it.

    The first limit decides while hypergradients are small, the second where they are large. In the first horizon the
    first limit grows from zero, because gradients of weights that know nothing yet mean little. There is no momentum:
    weights lag behind the hyperparameters, and momentum would drive the hyperparameters on past the best values.

    The direction is g / √v, with v a running mean of g². A hyperparameter that seldom has a gradient, such as the
    weight of one training example, has as much travel as the others: its steps are longer.

    Args:
        params: Hyperparameters, or groups of them with a `unit`.
        horizon: Number of steps in which weights answer, at least 1.
        travel: Largest travel within a horizon, in units.
        decrease: Largest predicted decrease of the loss within a horizon, as a fraction of the loss.
        unit: What counts as a step of 1; None takes the root mean square of the group's values, at most 1
            and no less than at the start; 1 if they start at zero.

    The lower bound of the loss is taken to be zero. A loss that can be negative counts by its absolute value.

    Raises:
        ValueError: If an argument is out of range.

    >>> hyperparameter = torch.zeros(1, requires_grad=True)
    >>> optimizer = PolyakRMSprop([hyperparameter], horizon=4, travel=2.0)
    >>> hyperparameter.grad = torch.ones(1)
    >>> optimizer.step(lambda: 100.0)
    100.0
    >>> hyperparameter  # the first of four steps of a rising length of at most 2 / 4
    tensor([-0.1250], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        horizon: float = 20.0,
        travel: float = 4.0,
        decrease: float = 0.3,
        unit: float | None = None,
    ) -> None:
        if not is_number(horizon) or not 1.0 <= horizon < math.inf:
            raise ValueError(f"expected 1 <= horizon < inf, got {horizon!r}")
        for name, value in (("travel", travel), ("decrease", decrease), ("unit", unit)):
            if value is not None and not is_ascending(0.0, value, math.inf):
                raise ValueError(f"expected 0 < {name} < inf, got {value!r}")
        super().__init__(params, {"unit": unit})
        self.horizon, self.travel, self.decrease = horizon, travel, decrease

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one step along the gradients, and returns the loss.

        Args:
            closure: Returns the loss to which the gradients belong, and need not compute it anew. Without it nothing
                limits the predicted decrease.
        """
        loss = None if closure is None else float(closure())
        moves = [move for group in self.param_groups for move in _moves(group, self.state)]
        if moves:
            length = self._length(moves, loss)
            for parameter, _, direction in moves:
                parameter.sub_(direction, alpha=length)
        return loss

    @torch.no_grad()
    def units_from(self, before: Mapping[Tensor, Tensor]) -> float:
        """Returns the root mean square by which the hyperparameters differ from earlier values, in units."""
        square = entries = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                square += float(torch.sum((parameter - before[parameter]).square())) / group["unit"] ** 2
                entries += parameter.numel()
        return math.sqrt(square / entries)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and finds its unit if none is given."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["unit_grows"] = group["unit"] is None
        if group["unit"] is None:
            group["unit"] = _root_mean_square(group["params"]) or 1.0

    def _length(self, moves: list[_Move], loss: float | None) -> float:
        """Returns the length of a step, and updates the running means that it follows from."""
        means: dict[str, float] = self.state["means"]  # type: ignore[index]  # torch keeps keys that are no tensors
        if not means:
            means |= {"step": 0, "loss": 0.0, "decrease": 0.0, "touched": 0.0}
        means["step"] += 1
        entries = sum(gradient.numel() for _, gradient, _ in moves)
        touched = sum(float(torch.count_nonzero(gradient)) for _, gradient, _ in moves) / entries
        decrease = touched * sum(float(torch.sum(gradient * direction)) for _, gradient, direction in moves)
        for name, value in (("loss", abs(loss or 0.0)), ("decrease", decrease), ("touched", touched)):
            means[name] += (1.0 - _LOSS_MEMORY) * (value - means[name])
        often = max(means["touched"] / (1.0 - _LOSS_MEMORY ** means["step"]), _FEWEST)
        longest = self.travel / self.horizon / math.sqrt(often) * min(1.0, means["step"] / self.horizon)
        if loss is None or means["decrease"] == 0.0:
            return longest
        return min(longest, self.decrease / self.horizon * means["loss"] / means["decrease"])


def _moves(group: dict[str, Any], states: dict[Tensor, Any]) -> Iterator[_Move]:
    """Yields each parameter of a group that has a gradient, the gradient, and the direction in units."""
    unit = max(group["unit"], _root_mean_square(group["params"])) if group["unit_grows"] else group["unit"]
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = states[parameter]
        if not state:
            state |= {"step": 0, "square": torch.zeros_like(parameter)}
        state["step"] += 1
        square = state["square"].mul_(_SQUARE_MEMORY)
        square.addcmul_(gradient, gradient, value=1.0 - _SQUARE_MEMORY)
        scale = unit * math.sqrt(1.0 - _SQUARE_MEMORY ** state["step"])
        smallest = math.sqrt(torch.finfo(square.dtype).tiny)  # of a gradient whose square is not zero
        yield parameter, gradient, square.sqrt().clamp_min_(smallest).reciprocal_().mul_(gradient).mul_(scale)


def _root_mean_square(tensors: list[Tensor]) -> float:
    """Returns the root mean square of all entries, and at most 1."""
    square = sum(float(torch.sum(tensor.detach().square())) for tensor in tensors)
    return min(1.0, math.sqrt(square / sum(tensor.numel() for tensor in tensors)))

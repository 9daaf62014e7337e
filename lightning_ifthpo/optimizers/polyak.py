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

_MEMORY = 0.9  # of the running means of the loss and of its predicted decrease
_SQUARE_MEMORY = 0.99  # of the running mean of squared gradients
_FEWEST = 0.02  # smallest fraction of entries with a gradient that is taken into account


class PolyakRMSprop(Optimizer):
    """RMSprop whose step length follows from the loss, as in Polyak's rule, so that there is no learning rate.

    Weights answer to a change of a hyperparameter within a horizon of many training steps. So lengths are limited per
    horizon. Each step has the largest length that, kept up for one horizon of steps,

    - moves no hyperparameter by more than about `travel` units, and
    - is predicted to lower the loss by no more than the fraction `decrease` of it.

    The first limit decides while gradients are small, the second where they are large. The first limit grows from zero
    in the first horizon, because gradients at untrained weights mean little. There is no momentum:
    weights lag behind the hyperparameters, and momentum would drive the hyperparameters on past the best values.

    The direction is g / √v, with v a running mean of g², so that the first limit is that of a hyperparameter whose
    gradients are of their usual size. One that seldom has a gradient, such as the weight of one training example, has
    as much travel as the others: its steps are longer. The prediction counts a step only for the fraction of
    hyperparameters that have a gradient at a time: another batch has gradients for others.

    Args:
        params: Hyperparameters, or groups of them with a `unit`.
        horizon: Number of steps in which weights answer, at least 1.
        travel: Largest travel within a horizon, in units.
        decrease: Largest predicted decrease of the loss within a horizon, as a fraction of the loss.
        unit: What counts as a step of 1; None takes the root mean square of the group's values, as far as it
            is below 1 and above that at the start. A group that starts at zero has 1.

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
        for name, value in (("travel", travel), ("decrease", decrease)):
            if not is_ascending(0.0, value, math.inf):
                raise ValueError(f"expected 0 < {name} < inf, got {value!r}")
        super().__init__(params, {"unit": unit})
        self.horizon, self.travel, self.decrease = horizon, travel, decrease

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one step along the gradients, and returns the loss.

        Args:
            closure: Returns the loss at which the gradients were taken. It is called once, and may return a number that
                is known already. Without a closure, only `travel` limits the step.
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
        """Returns how far the group that has moved farthest is from earlier values: a root mean square, in units."""
        moved = []
        for group in self.param_groups:
            square = sum(float(torch.sum((tensor - before[tensor]).square())) for tensor in group["params"])
            moved.append(math.sqrt(square / sum(tensor.numel() for tensor in group["params"])) / _unit(group))
        return max(moved)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies need; torch leaves out attributes."""
        own = {"horizon": self.horizon, "travel": self.travel, "decrease": self.decrease}
        return {**super().__getstate__(), **own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, and finds its unit if none is given."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["unit"] is not None and not is_ascending(0.0, group["unit"], math.inf):
            raise ValueError(f"expected 0 < unit < inf, got {group['unit']!r}")
        group["unit_grows"] = group["unit"] is None
        if group["unit"] is None:
            group["unit"] = _root_mean_square(group["params"]) or 1.0

    def _length(self, moves: list[_Move], loss: float | None) -> float:
        """Returns the length of a step, and updates the running means that it follows from."""
        means: dict[str, float] = self.state["means"]  # type: ignore[index]  # torch keeps keys that are no tensors
        if not means:
            means |= {"step": 0, "losses": 0, "loss": 0.0, "decrease": 0.0, "touched": 0.0}
        entries = sum(gradient.numel() for _, gradient, _ in moves)
        touched = sum(float(torch.count_nonzero(gradient)) for _, gradient, _ in moves) / entries
        decrease = touched * sum(float(torch.sum(gradient * direction)) for _, gradient, direction in moves)
        means["step"] += 1
        means["decrease"] += (1.0 - _MEMORY) * (decrease - means["decrease"])
        means["touched"] += (1.0 - _MEMORY) * (touched - means["touched"])
        if loss is not None and math.isfinite(loss):
            means["losses"] += 1
            means["loss"] += (1.0 - _MEMORY) * (abs(loss) - means["loss"])
        weight = 1.0 - _MEMORY ** means["step"]
        often = max(means["touched"] / weight, _FEWEST)
        longest: float = self.travel / self.horizon / math.sqrt(often) * min(1.0, means["step"] / self.horizon)
        if not means["losses"] or means["decrease"] <= 0.0:
            return longest
        level: float = means["loss"] / (1.0 - _MEMORY ** means["losses"])
        predicted: float = means["decrease"] / weight
        return min(longest, self.decrease / self.horizon * level / predicted)


def _moves(group: dict[str, Any], states: dict[Tensor, Any]) -> Iterator[_Move]:
    """Yields each parameter of a group that has a gradient, the gradient, and the direction in units."""
    unit = _unit(group)
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        state = states[parameter]
        if not state:
            state |= {"step": 0, "square": torch.zeros_like(parameter)}
        state["step"] += 1
        square = state["square"].mul_(_SQUARE_MEMORY)
        square.addcmul_(gradient, gradient, value=1.0 - _SQUARE_MEMORY).clamp_max_(torch.finfo(square.dtype).max)
        scale = unit * math.sqrt(1.0 - _SQUARE_MEMORY ** state["step"])
        smallest = math.sqrt(torch.finfo(square.dtype).tiny)  # of a gradient whose square is not zero
        yield parameter, gradient, square.sqrt().clamp_min_(smallest).reciprocal_().mul_(gradient).mul_(scale)


def _unit(group: dict[str, Any]) -> float:
    """Returns what counts as a step of 1 for a group at present."""
    unit: float = group["unit"]
    return max(unit, _root_mean_square(group["params"])) if group["unit_grows"] else unit


def _root_mean_square(tensors: list[Tensor]) -> float:
    """Returns the root mean square of all entries, and at most 1."""
    square = sum(float(torch.sum(tensor.detach().square())) for tensor in tensors)
    return min(1.0, math.sqrt(square / sum(tensor.numel() for tensor in tensors)))

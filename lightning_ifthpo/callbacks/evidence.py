"""Whether hyper steps did what they predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.callbacks.reach import Reach
from lightning_ifthpo.core.vectors import flattened, wide

_FIRST = 4  # outer batches whose loss is compared with that at the end


class Evidence:
    """Compares what each hyper step predicts with what the next hypergradient says of it.

    A hyper step moves λ by d and predicts that the outer loss changes by g·d. The next hypergradient g' comes from
    another outer batch and from weights that are trained further, and g'·d is an estimate without the selection that
    made g·d negative. The sum of −g'·d over a run is the decrease of the outer loss that is confirmed. In wrong or too
    long steps it is small or negative.

    An entry that has a gradient now and then, such as the weight of one training example, is confirmed when it has one
    again, with all of its moves since. A gradient of few entries counts by their share, as it helps only so often.

    Cost: two copies of the hyperparameters, and some passes over them.

    Args:
        state: A result of `state_dict`; empty for a new start.

    Attributes:
        steps: Number of hyper steps that were made.
        predicted: Sum of −g·d, in the unit of the outer loss; for each tensor times the share of its entries that have
            a gradient.
        confirmed: Sum of −g'·d, likewise.
        travel: Sum of the root mean squares of d, in the units of the hyper-optimizer.
        reach: Which entries have had a hypergradient.
        last_gradient: For each tensor of hyperparameters the last hyper step with a hypergradient that is not zero.
        first_losses: The outer losses of the first hyper steps, by the number of the outer batch.
        last_loss: The outer loss of the last one; NaN before the first.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.steps: int = state.get("steps", 0)
        self.predicted: float = state.get("predicted", 0.0)
        self.confirmed: float = state.get("confirmed", 0.0)
        self._terms: int = state.get("terms", 0)
        self._squares: float = state.get("squares", 0.0)
        self.travel: float = state.get("travel", 0.0)
        self.first_losses: dict[int, float] = dict(state.get("first_losses", {}))
        self.last_loss: float = state.get("last_loss", math.nan)
        self.last_gradient: list[int] = state.get("last_gradient", [])
        self.reach = Reach(state.get("reach", {}))
        self._move: Tensor | None = state.get("move")

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {
            "steps": self.steps,
            "predicted": self.predicted,
            "confirmed": self.confirmed,
            "terms": self._terms,
            "squares": self._squares,
            "travel": self.travel,
            "first_losses": dict(self.first_losses),
            "last_loss": self.last_loss,
            "last_gradient": list(self.last_gradient),
            "reach": self.reach.state_dict(),
            "move": self._move,
        }

    @property
    def error(self) -> float:
        """The standard error of `confirmed`, from its terms."""
        return math.sqrt(max(0.0, self._squares - self.confirmed**2 / max(1, self._terms)))

    @torch.no_grad()
    def add(
        self,
        gradients: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
        units: Sequence[float],
        loss: float,
        batch: int,
    ) -> None:
        """Adds a hyper step.

        Args:
            gradients: Its hypergradient, for each hyperparameter.
            before: The hyperparameters before it.
            after: The hyperparameters after it.
            units: What counts as a step of 1, for each hyperparameter.
            loss: Its outer loss.
            batch: The number of its outer batch.
        """
        gradient, move = _wide(gradients), _wide(after) - _wide(before)
        sizes = [tensor.numel() for tensor in after]
        counts = torch.stack([torch.count_nonzero(part) for part in torch.split(gradient, sizes)]).tolist()
        shares = [count / max(1, size) for count, size in zip(counts, sizes, strict=True)]
        self.predicted -= _change(gradient, move, sizes, shares)
        in_units, earlier_move, self._move = move, self._move, move
        if earlier_move is not None:
            earlier_move = earlier_move.to(gradient)
            confirmed = -_change(gradient, earlier_move, sizes, shares)
            self.confirmed += confirmed
            self._terms += 1
            self._squares += confirmed**2
            if set(shares) != {1.0}:  # what has no gradient now waits for one
                self._move = move + earlier_move.masked_fill(gradient != 0.0, 0.0)
        if set(units) != {1.0}:
            in_units = torch.cat([part / unit for part, unit in zip(torch.split(move, sizes), units, strict=True)])
        self.travel += math.sqrt(float(in_units @ in_units) / len(in_units))
        self.steps += 1
        earlier = self.last_gradient or [0] * len(gradients)
        self.last_gradient = [self.steps if share else last for share, last in zip(shares, earlier, strict=True)]
        self.reach.add(gradients, counts)
        self.last_loss = loss
        if len(self.first_losses) < _FIRST:
            self.first_losses[batch] = loss


def _change(gradient: Tensor, move: Tensor, sizes: list[int], shares: list[float]) -> float:
    """Returns g·d to first order, each tensor's part times its share."""
    if set(shares) == {1.0}:
        return float(gradient @ move)  # one operation, however many tensors
    pairs = zip(torch.split(gradient, sizes), torch.split(move, sizes), strict=True)
    return float(torch.stack([own @ other for own, other in pairs]) @ gradient.new_tensor(shares))


def _wide(tensors: Sequence[Tensor]) -> Tensor:
    """Returns all entries as one vector, in float32 at least."""
    return flattened([tensor.detach().to(wide(tensor)) for tensor in tensors])

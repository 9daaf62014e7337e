"""The update of an optimizer, read off a step at learning rate one and applied again at another rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.core.step_length import step_along
from lightning_ifthpo.core.vectors import length


@dataclass(frozen=True)
class Update:
    """ω of one optimizer step: a step at learning rate η moves the weights from w to w − ηω.

    ω includes momentum, preconditioning, weight decay and clipping.

    Attributes:
        parameters: The tensors w.
        omega: ω, shaped like the parameters.

    >>> w = torch.tensor([3.0])
    >>> before = [w.clone()]
    >>> w -= 2.0  # a step at learning rate one
    >>> update = Update.undo_step([w], before)
    >>> w, update.omega
    (tensor([3.]), [tensor([2.])])
    >>> update.apply(0.5)
    >>> w
    tensor([2.])
    """

    parameters: list[Tensor]
    omega: list[Tensor]

    @classmethod
    @torch.no_grad()
    def undo_step(cls, parameters: Sequence[Tensor], before: list[Tensor]) -> Update:
        """Undoes a step at learning rate one bit for bit, and returns its update.

        `before`, copies of the weights before the step, is emptied on the way, which saves the memory of a copy.
        """
        omega = []
        for parameter in parameters:
            value = before.pop(0)
            omega.append(value - parameter)
            parameter.copy_(value)
        return cls(list(parameters), omega)

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """Moves the weights to w − rate · ω, in place."""
        for parameter, omega in zip(self.parameters, self.omega, strict=True):
            parameter.sub_(omega, alpha=rate)

    def rate_of_move(self, extent: float) -> float:
        """Returns the rate at which the update moves the weights by a fraction of their length; infinity for none."""
        squared = sum(length(omega) ** 2 for omega in self.omega)
        return extent * step_along(self.omega, self.parameters) if 0.0 < squared < math.inf else math.inf

    def restricted_to(self, parameters: Sequence[Tensor]) -> Update:
        """Returns the part of the update that moves the given parameters."""
        wanted = {id(parameter) for parameter in parameters}
        kept = [index for index, parameter in enumerate(self.parameters) if id(parameter) in wanted]
        return Update([self.parameters[index] for index in kept], [self.omega[index] for index in kept])


def trainable_weights(optimizer: Optimizer) -> list[Tensor]:
    """Returns the tensors that an optimizer moves, those that require a gradient."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.requires_grad]

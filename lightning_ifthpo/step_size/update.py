"""The update of an optimizer, read off a step at learning rate one and applied again at another rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """ω of one optimizer step: a step at learning rate η moves the weights from w to w − ηω.

    ω has all of the optimizer's momentum, preconditioning, weight decay and clipping in it. Reading it off needs a step
    that is linear in the learning rate, see `check_linear_in_lr`, and advances the state of the optimizer once.

    Attributes:
        parameters: The tensors w.
        omega: ω, shaped like them.

    >>> w = torch.tensor([3.0])
    >>> before = [w.clone()]
    >>> w -= 2.0  # a step at learning rate one
    >>> update = Update.taken_back([w], before)
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
    def taken_back(cls, parameters: Sequence[Tensor], before: list[Tensor]) -> Update:
        """Returns the update of a step at learning rate one, and undoes the step bit for bit.

        Args:
            parameters: The weights after the step.
            before: Copies of the weights before the step; they are overwritten and become ω, which saves a copy.
        """
        for parameter, value in zip(parameters, before, strict=True):
            moved = value - parameter
            parameter.copy_(value)
            value.copy_(moved)
        return cls(list(parameters), before)

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """Moves the weights to w − rate · ω, in place."""
        for parameter, omega in zip(self.parameters, self.omega, strict=True):
            parameter.sub_(omega, alpha=rate)

    def restricted_to(self, parameters: Sequence[Tensor]) -> Update:
        """Returns the part of the update that moves some of the parameters."""
        wanted = {id(parameter) for parameter in parameters}
        pairs = [(p, omega) for p, omega in zip(self.parameters, self.omega, strict=True) if id(p) in wanted]
        return Update([p for p, _ in pairs], [omega for _, omega in pairs])

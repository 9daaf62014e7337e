"""Positive numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.space import check_real
from lightning_ifthpo.core.validation import is_number


class Positive(nn.Module):
    """Positive numbers e^λ, such as a coefficient or a temperature. A step of λ changes them by a factor.

    A positive number that is registered as it is becomes negative by some step, and clamped it would stay at its bound
    for good, where its derivative is zero.

    Args:
        initial: The numbers at the start: one number, or a tensor of any shape.

    Raises:
        ValueError: If one of them is not positive and finite.
        TypeError: If it is neither a number nor a real floating-point tensor.

    >>> coefficient = Positive(0.1)
    >>> coefficient()
    tensor(0.1000)
    """

    unit = 1.0  # λ is a logarithm

    def __init__(self, initial: float | Tensor) -> None:
        super().__init__()
        if not isinstance(initial, Tensor):
            if not is_number(initial):
                raise TypeError(f"expected a positive number or a tensor of them, got {initial!r}")
            initial = torch.tensor(float(initial))
        check_real(initial, "initial")
        if not bool(((initial > 0.0) & initial.isfinite()).all()):
            raise ValueError(f"expected positive finite numbers, got {initial}")
        self.logarithms = nn.Parameter(initial.detach().log(), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the numbers, of the shape that was given."""
        return self.logarithms.exp()

    def forward(self) -> Tensor:
        """Returns the numbers, of the shape that was given."""
        return self.natural_values()

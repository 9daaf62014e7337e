"""Keeping gradients that pass through float16 from becoming zero."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from torch import Tensor

from lightning_ifthpo.curvature import AllReduce

LARGEST = 2.0**16
"""Where GradScaler begins, too."""


def passes_through_float16(trainer: L.Trainer, precision: str) -> bool:
    """Returns whether gradients are computed in float16, where small ones are zero."""
    kind = str(trainer.precision_plugin.precision)
    return kind == "16-true" or (kind == "16-mixed" and precision == "inherit")


class LossScale:
    """A power of two by which a loss is multiplied, and all that is linear in the loss is divided again.

    It has nothing to do with the Trainer's GradScaler, whose state belongs to training.

    Args:
        factor: The power of two; 1 changes nothing.

    >>> scale = LossScale(8.0)
    >>> scale.scaled(lambda: 3.0)()
    24.0
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scaled(self, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Returns the loss, multiplied."""
        return loss if self.factor == 1.0 else lambda: self.factor * loss()

    def divided(self, all_reduce: AllReduce | None) -> AllReduce | None:
        """Returns what sums over processes, and divides."""
        if self.factor == 1.0:
            return all_reduce
        return lambda part: (part.detach() if all_reduce is None else all_reduce(part)) / self.factor

    def smaller(self) -> list[LossScale]:
        """Returns this one, and smaller ones to try where products overflow."""
        factors = [self.factor]
        while factors[-1] > 1.0:
            factors.append(max(1.0, factors[-1] / 16.0))
        return list(map(LossScale, factors))

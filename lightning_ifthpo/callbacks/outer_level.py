"""Outer losses that are too large to be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

FACTOR = 32.0
"""A gradient 1/sqrt(1 − β₂) = 32 times the usual one doubles Adam's second moment, which forgets in 1,000 steps."""

MEMORY = 25
"""Odd and small: it follows a change of level within 13 hyper steps."""


class OuterLevel:
    """Recognizes outer losses that explode in eval mode because running statistics do not fit the weights yet.

    With batches of 8 and a learning rate of 0.1, efficientnet_b0 of torchvision has outer losses up to 6e17 in eval
    mode during its first 60 training batches, and resnet18 up to 3e7, while losses in train mode stay below 60.

    A loss up to `FACTOR` times the median of the last accepted ones is accepted at once. A larger one is compared with
    the same loss by the statistics of the batch: a loss that is large by both is a change of level, and is accepted. So
    no history can make it refuse a true loss.

    Args:
        accepted: The `accepted` of an earlier object.
    """

    def __init__(self, accepted: Iterable[float] = ()) -> None:
        self.accepted = list(accepted)

    def begin(self, level: float) -> None:
        """Takes a level of the loss, at most the true one, in place of accepted losses, if there are none."""
        self.accepted = self.accepted or [level]

    def doubt(self, value: float, by_batch_statistics: Callable[[], float]) -> str:
        """Returns why an outer loss should not be used; empty if it can be, and is remembered.

        Args:
            value: L_V in eval mode, finite.
            by_batch_statistics: Evaluates the same loss by the batch's own statistics; called for suspicious
                values only. NaN if it cannot be evaluated.
        """
        if abs(value) > FACTOR * abs(median(self.accepted)):
            other = by_batch_statistics()
            if abs(value) > FACTOR * abs(other):
                return (
                    f"the outer loss is {value:.3g} in eval mode, and {other:.3g} by the statistics of the same batch: "
                    "running statistics, such as those of BatchNorm, do not fit the weights yet. A lower learning rate "
                    "at the beginning or a larger start_after_batches helps"
                )
        self.accepted = [*self.accepted, value][-MEMORY:]
        return ""

"""Which entries of hyperparameters have a hypergradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SEVERAL = 3  # entries, of which two may be alike by chance
_ALIKE = 1e-4  # of the largest; entries that are alike differ by rounding, up to 1e-6 in float32


class Reach:
    """Counts for each tensor of hyperparameters the entries that have had a hypergradient, and compares them.

    Cost: a bit for each entry of tensors of which some entries have none, in a byte, and a pass over it.

    Args:
        state: A result of `state_dict`; empty for a new start.

    Attributes:
        alike: For each tensor, whether it has one dimension, and some of its entries, three at least, had a
            hypergradient at the first hyper step, which was the same. Then they were as if they were one number.
        most: For each tensor the largest number of entries that had one at a single hyper step.
        reached: For each tensor the number of entries that have had one at all.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.alike: list[bool] = list(state.get("alike", []))
        self.most: list[int] = list(state.get("most", []))
        self.reached: list[int] = list(state.get("reached", []))
        self._seen: list[Tensor | None] = list(state.get("seen", []))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {"alike": self.alike, "most": self.most, "reached": self.reached, "seen": list(self._seen)}

    def add(self, gradients: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Adds a hypergradient, for each tensor with the number of its entries that are not zero."""
        if not self.alike:
            self.alike = [_are_alike(gradient, count) for gradient, count in zip(gradients, counts, strict=True)]
            self.most, self.reached, self._seen = [0] * len(counts), [0] * len(counts), [None] * len(counts)
        self.most = [max(pair) for pair in zip(self.most, counts, strict=True)]
        for index, (gradient, count) in enumerate(zip(gradients, counts, strict=True)):
            if 0 < count < gradient.numel() > self.reached[index]:
                seen, now = self._seen[index], gradient != 0.0
                self._seen[index] = now = now if seen is None else now | seen.to(now.device)
                count = int(torch.count_nonzero(now))
            self.reached[index] = max(self.reached[index], count)


def _are_alike(gradient: Tensor, count: int) -> bool:
    if gradient.ndim != 1 or not _SEVERAL <= count < gradient.numel():  # all at once may be alike on purpose
        return False
    low, high = gradient[gradient != 0.0].aminmax()
    return float(high - low) <= _ALIKE * max(abs(float(low)), abs(float(high)))

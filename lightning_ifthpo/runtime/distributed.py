"""The processes among which a Trainer spreads its examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor

from lightning_ifthpo.curvature import AllReduce, CurvatureOperator
from lightning_ifthpo.curvature.distributed import SummedProducts


class Ranks:
    """What the processes of a run agree on; in a run of one process, nothing.

    All processes must call the same methods in the same order.

    Args:
        trainer: The Trainer, with its strategy set up.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.rank = trainer.global_rank
        self.count = trainer.world_size
        self._device = trainer.strategy.root_device
        self._guessed = False

    @property
    def all_reduce(self) -> AllReduce | None:
        """Sums over the processes; None where there is one."""
        return None if self.count == 1 else _all_reduce

    def agreed(self, decision: bool) -> bool:
        """Returns what the first process has decided."""
        return bool(self.agreed_number(int(decision))) if self.count > 1 else decision

    def agreed_number(self, number: int) -> int:
        """Returns the number that the first process has."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number, device=self._device)
        torch.distributed.broadcast(tensor, src=0)
        return int(tensor)

    def total(self, part: Tensor) -> Tensor:
        """Returns the sum over the processes, detached."""
        return part.detach() if self.count == 1 else _all_reduce(part)

    def unify(self, tensors: Iterable[Tensor]) -> None:
        """Gives tensors the values that they have in the first process."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def share(self, loss: Callable[[], Tensor], batch: Any) -> Callable[[], Tensor]:
        """Returns what a mean over this process's part of a batch adds to the mean over all parts.

        Args:
            loss: Evaluates the mean over the batch.
            batch: Whose examples count.
        """
        if self.count == 1:
            return loss
        size = batch_size(batch)
        known = self.total(torch.tensor([size or 0.0, size is None], device=self._device)).tolist()
        fraction = 1.0 / self.count if known[1] or not known[0] or size is None else size / known[0]
        if known[1] and not self._guessed:
            self._guessed = True
            rank_zero_warn(
                f"cannot tell the number of examples in a batch of type {type(batch).__name__}; all processes count "
                "alike, whether their batches are equally large or not"
            )
        return lambda: loss() * fraction

    def mean(self, operator: CurvatureOperator, weight: float) -> CurvatureOperator:
        """Returns the weighted mean of operators, of which each process has one."""
        if self.count == 1:
            return operator
        fraction = weight / float(self.total(torch.tensor(float(weight), device=self._device)))
        return SummedProducts(operator, lambda part: _all_reduce(fraction * part))


def batch_size(batch: Any) -> int | None:
    """Returns the number of examples, as Lightning counts them; None where it cannot."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None


def is_replicated(strategy: Any) -> bool:
    """Returns whether each process is known to hold the whole model; of `lightning` or of `pytorch_lightning`."""
    names = _names(strategy)
    return "DDPStrategy" in names and "DeepSpeedStrategy" not in names


def is_gathered(strategy: Any) -> bool:
    """Returns whether the model can be put together in each process: weights are spread, and layers are not."""
    return "ModelParallelStrategy" in _names(strategy) and strategy.device_mesh["tensor_parallel"].size() == 1


def _names(strategy: Any) -> set[str]:
    return {kind.__name__ for kind in type(strategy).__mro__}


def _all_reduce(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total

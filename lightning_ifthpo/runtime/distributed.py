"""Collectives among the processes of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_ifthpo.core.loss import AllReduce, sum_over_processes
from lightning_ifthpo.curvature import CurvatureOperator, DistributedOperator
from lightning_ifthpo.runtime.batches import batch_size
from lightning_ifthpo.runtime.telling import rank_zero_warn


class Ranks:
    """Collectives among the Trainer's processes; no-ops in a single process.

    All processes must call the same methods in the same order. Process `rank` is one of `count`.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.rank = trainer.global_rank
        self.count = trainer.world_size
        self._device = trainer.strategy.root_device
        self._warned = False

    @property
    def sum_over_ranks(self) -> AllReduce | None:
        """The all-reduce that a `Loss` takes; None in a single process."""
        return None if self.count == 1 else sum_over_processes

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns the sum of a tensor over the processes, detached."""
        return tensor.detach() if self.count == 1 else sum_over_processes(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Writes the first process's values into tensors, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)

    def broadcast_int(self, number: int) -> int:
        """Returns the first process's number."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number, device=self._device)
        self.broadcast([tensor])
        return int(tensor)

    def broadcast_bool(self, decision: bool) -> bool:
        """Returns the first process's decision."""
        return bool(self.broadcast_int(int(decision)))

    def share_of(self, batch: Any) -> float:
        """Returns the number of this batch's examples over the number in all processes' batches.

        The mean loss of each process times its share, summed over processes, is the mean over the global batch.
        Processes count equally where the number of examples is not known.
        """
        if self.count == 1:
            return 1.0
        size = batch_size(batch)
        total, unknown = self.all_reduce(torch.tensor([size or 0.0, size is None], device=self._device)).tolist()
        if unknown and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"cannot tell the number of examples in a batch of type {type(batch).__name__}; all processes get the "
                "same weight. If their batches differ in size, yield tensors, or tuples, lists or dicts of tensors"
            )
        return 1.0 / self.count if unknown or not total or size is None else size / total

    def weighted_mean(self, operator: CurvatureOperator, weight: float) -> CurvatureOperator:
        """Returns the weighted mean of the processes' operators."""
        return operator if self.count == 1 else DistributedOperator(operator, self.fraction(weight), self.all_reduce)

    def fraction(self, weight: float) -> float:
        """Returns a weight over the sum of the processes' weights."""
        total = self.all_reduce(torch.tensor(float(weight), device=self._device))
        return weight / float(total)


def is_replicated(strategy: Any) -> bool:
    """Returns whether each process is known to hold the whole model."""
    names = _names(strategy)
    return "DDPStrategy" in names and "DeepSpeedStrategy" not in names


def is_gathered(strategy: Any) -> bool:
    """Returns whether weights are sharded but layers are not, so that each process can gather the whole model."""
    return "ModelParallelStrategy" in _names(strategy) and strategy.device_mesh["tensor_parallel"].size() == 1


def _names(strategy: Any) -> set[str]:
    """Compares by name, because `lightning` and `pytorch_lightning` have classes of their own."""
    return {kind.__name__ for kind in type(strategy).__mro__}

"""A fixed set of examples that is kept in memory and split among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated
from lightning_ifthpo.curvature import AverageOperator, CurvatureOperator
from lightning_ifthpo.runtime.batches import batch_size
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.outer_data import check_batches


class FixedBatches:
    """This process's share of the batches of a loader.

    Args:
        source: A DataLoader, or a list of batches of any size; it is iterated once.
        device: The device whose random state must not change.
        ranks: The processes among which batches are split, unless a `DistributedSampler` splits them already.

    Raises:
        TypeError: If the source does not yield batches.
        ValueError: If the source is empty, or the number of examples in a batch is not known.
    """

    def __init__(self, source: Iterable[Any], device: torch.device, ranks: Ranks) -> None:
        check_batches(source)
        with isolated(device, derive_seed(Stream.OUTER_TRANSFORMS)):
            batches = [(batch, _size(batch)) for batch in source]
        if not batches or min(size for _, size in batches) < 1:
            raise ValueError(
                "the dataloader of SharpnessMonitor is empty or has an empty batch; check its data set, and drop_last "
                "with batch_size"
            )
        is_split = isinstance(getattr(source, "sampler", None), DistributedSampler)
        own = batches if is_split else batches[ranks.rank :: ranks.count]
        self._ranks = ranks
        self._weight = sum(size for _, size in own)
        # a process without examples still takes part in the collectives, with weight zero
        self._batches, self._sizes = zip(*(own or batches[:1]), strict=True)

    def mean(self, operator: Callable[[Any], CurvatureOperator]) -> CurvatureOperator:
        """Returns the mean of the operators of all batches in all processes, weighted by example."""
        own = AverageOperator([partial(operator, batch) for batch in self._batches], self._sizes)
        return self._ranks.weighted_mean(own, self._weight)

    def mean_loss(self, loss: Callable[[Any], Loss], parameters: Sequence[Tensor]) -> Loss:
        """Returns the mean loss over the examples of all batches in all processes, for its values alone.

        Args:
            loss: Returns the loss of this process on a batch. It is called at each evaluation, so that one batch at a
                time is in memory.
            parameters: The tensors w.
        """

        def own() -> Tensor:
            parts = zip(self._batches, self._sizes, strict=True)
            total: Any = sum(size * loss(batch).evaluate(graph=False)[0].detach() for batch, size in parts)
            mean: Tensor = total / sum(self._sizes)
            return mean

        return Loss(own, parameters, share=self._ranks.fraction(self._weight), all_reduce=self._ranks.sum_over_ranks)


def _size(batch: Any) -> int:
    size = batch_size(batch)
    if size is None:
        raise ValueError(
            f"cannot tell the number of examples in a batch of type {type(batch).__name__}; the dataloader of "
            "SharpnessMonitor should yield tensors, or tuples, lists or dicts of tensors"
        )
    return size

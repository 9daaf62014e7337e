"""An endless, shuffled, rank-aware, resumable stream of outer batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from operator import length_hint
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_ifthpo.core.random_state import Stream, derive_seed, generator_of, isolated
from lightning_ifthpo.runtime.telling import rank_zero_warn


@dataclass(frozen=True)
class EndlessBatchSampler(Sampler[list[int]]):
    """An endless stream of batches of indices: shuffled epochs one after the other, so that every batch is full.

    Batch k depends on (seed, k, rank) alone. Ranks draw disjoint parts of one stream.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and rank; more than `size` counts as `size`.
        first: Number k of the first batch.

    >>> batches = iter(EndlessBatchSampler(size=3, batch_size=2, seed=0))
    >>> sorted(next(batches) + next(batches) + next(batches))
    [0, 0, 1, 1, 2, 2]
    """

    size: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    first: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        batch_size = min(self.batch_size, self.size)
        epoch, order = -1, []
        for index in count(self.first):
            begin = (index * self.world_size + self.rank) * batch_size
            batch = []
            for place in range(begin, begin + batch_size):
                if place // self.size != epoch:
                    epoch = place // self.size
                    generator = generator_of(Stream.OUTER_ORDER, seed=self.seed, step=epoch)
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[place % self.size])
            yield batch


class OuterData:
    """An endless stream of outer batches.

    A map-style DataLoader with a standard sampler is rebuilt around an `EndlessBatchSampler`: it is shuffled, split
    among ranks and resumable. Anything else (iterable data sets, custom samplers, lists of batches) is iterated again
    and again, unchanged.

    Args:
        source: DataLoader, or any iterable of batches that can be iterated repeatedly.
        device: The device whose random state must not change.
        seed: Seed of the shuffling, and of random transforms in this process.
        consumed: Number of batches already used; the stream resumes after them.

    Raises:
        TypeError: If the source cannot be iterated repeatedly, or does not yield batches.
        ValueError: If the source has no batch.
    """

    def __init__(
        self,
        source: Iterable[Any],
        device: torch.device,
        *,
        seed: int,
        consumed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_batches(source)
        if length_hint(source, 1) == 0:
            raise ValueError("the outer data loader is empty: check its data set, and drop_last with batch_size")
        self.consumed = consumed
        self._device, self._seed, self._rank = device, seed, rank
        self._pending: list[Any] = []
        endless = _endless_loader(source, seed, rank, world_size, consumed)
        if endless is None:
            _warn_if_inexact(consumed, world_size)
        with isolated(device, derive_seed(Stream.OUTER_ORDER, seed=seed, rank=rank)):
            self._batches: Iterator[Any] = _cycle(source, skip=consumed) if endless is None else iter(endless)

    def close(self) -> None:
        """Ends the worker processes and the stream."""
        self._batches = iter(())

    def peek(self) -> Any:
        """Returns the next batch and keeps it for `next`."""
        if not self._pending:
            # random transforms that run in this process draw from one seed per batch
            own_seed = derive_seed(Stream.OUTER_TRANSFORMS, seed=self._seed, step=self.consumed, rank=self._rank)
            with isolated(self._device, own_seed):
                self._pending.append(next(self._batches))
        return self._pending[0]

    def next(self) -> Any:
        """Returns the next batch."""
        batch = self.peek()
        self._pending.clear()
        self.consumed += 1
        return batch


def find_outer_data(trainer: L.Trainer, module: Any, given: Iterable[Any] | None) -> Iterable[Any]:
    """Returns the loader of outer batches: the given one, the module's, the data module's, or the validation data's.

    `outer_dataloader` of a module is a method that returns a loader, or a loader.

    Raises:
        ValueError: If there is none, or several validation loaders to choose from.
    """
    if given is not None:
        return given
    for owner in (module, getattr(trainer, "datamodule", None)):
        loader: Any = getattr(owner, "outer_dataloader", None)
        if callable(loader) and not isinstance(loader, Iterable):  # a loader may be assigned in place of the method
            with isolated(module.device):  # a random split there must not change what training draws
                loader = loader()
        if loader is not None:
            return loader  # type: ignore[no-any-return]
    validation: Any = trainer.val_dataloaders
    if isinstance(validation, (list, tuple)) and len(validation) == 1:
        validation = validation[0]
    if validation is None or isinstance(validation, (list, tuple, dict)):
        several = "" if validation is None else " (there are several validation loaders to choose from)"
        raise ValueError(
            f"no outer data{several}: define outer_dataloader() on the LightningModule or the LightningDataModule, or "
            "pass IFTHypergradient(outer_dataloader=...). It should hold data that training does not see"
        )
    rank_zero_warn(
        "no outer_dataloader() is defined, so hyperparameters are tuned on the validation data, and validation results "
        "will look better than they are. Report results from other data"
    )
    return validation  # type: ignore[no-any-return]


def check_batches(source: object, prefix: str = "") -> None:
    """Raises TypeError, with a prefix, unless the source yields batches and can be iterated repeatedly."""
    if isinstance(source, Dataset):
        hint = "; wrap it in a DataLoader"
    elif isinstance(source, (list, tuple)) and any(isinstance(item, DataLoader) for item in source):
        hint = " of loaders"
    elif isinstance(source, tuple) and any(isinstance(item, Tensor) for item in source):
        hint = " of tensors; put a single batch into a list"
    elif isinstance(source, (Iterator, str, Tensor)) or not isinstance(source, Iterable):
        hint = ""
    else:
        return
    raise TypeError(f"{prefix}expected one DataLoader, or a list of batches, got {type(source).__name__}{hint}")


def _endless_loader(
    source: Iterable[Any], seed: int, rank: int, world_size: int, consumed: int
) -> DataLoader[Any] | None:
    """Returns the loader with an endless sampler; None if that would change the user's choice of examples."""
    if type(source) is not DataLoader or source.batch_size is None or not draws_all(source, world_size):
        return None
    size = len(source.dataset)  # type: ignore[arg-type]
    batches = EndlessBatchSampler(size, source.batch_size, seed, rank, world_size, consumed)
    generator = torch.Generator().manual_seed(derive_seed(Stream.OUTER_WORKERS, seed=seed, rank=rank))
    return DataLoader(
        source.dataset,
        batch_sampler=batches,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context,
        generator=generator,
        prefetch_factor=source.prefetch_factor,
        persistent_workers=source.persistent_workers,
    )


def draws_all(loader: DataLoader[Any], world_size: int) -> bool:
    """Returns whether a loader draws each example exactly once, in all processes together."""
    sampler: Any = loader.sampler
    dataset: Any = loader.dataset
    if isinstance(sampler, DistributedSampler):
        return sampler.dataset is dataset and sampler.num_replicas == world_size
    if not isinstance(sampler, (RandomSampler, SequentialSampler)) or getattr(sampler, "replacement", False):
        return False
    return sampler.data_source is dataset and len(sampler) == len(dataset)


def _cycle(source: Iterable[Any], skip: int) -> Iterator[Any]:
    while True:
        number = 0
        for number, batch in enumerate(source, start=1):
            if number > skip:
                yield batch
        if not number:
            raise ValueError("the outer data loader is empty: it yielded no batch when it was iterated")
        skip = max(0, skip - number)


def _warn_if_inexact(consumed: int, world_size: int) -> None:
    if world_size > 1:
        rank_zero_warn(
            "every rank iterates over the whole outer loader: only a map-style DataLoader with a sequential, random or "
            "distributed sampler is split among ranks"
        )
    elif consumed:
        rank_zero_warn(
            f"to resume, the first {consumed} outer batches are skipped: this is exact only if the loader yields them "
            "in the same order again"
        )

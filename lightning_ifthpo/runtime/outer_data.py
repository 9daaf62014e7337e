"""An endless, shuffled, rank-aware, resumable stream of outer batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from lightning_ifthpo.core.random_state import Stream, derive_seed, generator_of, isolated
from lightning_ifthpo.runtime.batches import data_module


class EndlessBatchSampler(Sampler[list[int]]):
    """An endless stream of batches of indices: shuffled epochs one after the other, so that every batch is full.

    Batch k depends on (seed, k, rank) alone. Ranks draw disjoint parts of one stream.

    Args:
        size: Number of examples.
        batch_size: Examples per batch and rank; more than `size` counts as `size`.
        seed: Seed of the shuffling.
        rank: Index of this process.
        world_size: Number of processes.
        first: Number of the first batch.

    >>> batches = iter(EndlessBatchSampler(size=3, batch_size=2, seed=0))
    >>> sorted(next(batches) + next(batches) + next(batches))
    [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, first: int = 0
    ) -> None:
        self._size = size
        self._batch_size = min(batch_size, size)
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._first = first

    def __iter__(self) -> Iterator[list[int]]:
        stride = self._batch_size * self._world_size
        position = self._first * stride + self._rank * self._batch_size
        epoch, order = -1, []
        while True:
            batch = []
            for place in range(position, position + self._batch_size):
                if place // self._size != epoch:
                    epoch = place // self._size
                    generator = generator_of(Stream.OUTER_ORDER, seed=self._seed, step=epoch)
                    order = torch.randperm(self._size, generator=generator).tolist()
                batch.append(order[place % self._size])
            yield batch
            position += stride


class OuterData:
    """The batches of the outer loss, one at a time, without end.

    A map-style DataLoader with a standard sampler is rebuilt around an `EndlessBatchSampler`: it is shuffled, split
    among ranks and resumable. Anything else (iterable data sets, custom samplers, lists of batches) is iterated as it
    is, again and again.

    Args:
        source: DataLoader, or any iterable of batches that can be iterated repeatedly.
        device: Device with a random state that fetching must not change.
        seed: Seed of the shuffling and of random transforms in this process.
        consumed: Number of batches already used; the stream resumes after them.
        rank: Index of this process.
        world_size: Number of processes.

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
        if _length(source) == 0:
            raise ValueError("the outer data loader is empty: check its data set, and drop_last with batch_size")
        self.consumed = consumed
        self._device = device
        self._pending: list[Any] = []
        endless = _endless_loader(source, seed, rank, world_size, consumed)
        if endless is None:
            _warn_if_inexact(consumed, world_size)
        self._seed, self._rank = seed, rank
        with isolated(device, derive_seed(Stream.OUTER_ORDER, seed=seed, rank=rank)):
            self._batches: Iterator[Any] = _cycle(source, skip=consumed) if endless is None else iter(endless)

    def close(self) -> None:
        """Ends the worker processes; after that there are no more batches."""
        self._batches = iter(())

    def peek(self) -> Any:
        """Returns the next batch and keeps it for `next`."""
        if not self._pending:
            # random transforms in this process: one seed per batch, and the global random state is restored
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

    Raises:
        ValueError: If there is none, or several validation loaders to choose from.
    """
    if given is not None:
        return given
    for owner in (module, data_module(trainer)):
        with isolated(module.device):  # a random split there must not change what training draws
            loader = _call(owner, "outer_dataloader")
        if loader is not None:
            return loader  # type: ignore[no-any-return]
    validation = trainer.val_dataloaders
    if isinstance(validation, (list, tuple)) and len(validation) == 1:
        validation = validation[0]
    if validation is None or isinstance(validation, (list, tuple, dict)):
        several = "" if validation is None else " (there are several validation loaders to choose from)"
        raise ValueError(
            f"no outer data{several}: define outer_dataloader() on the LightningModule or the LightningDataModule, or "
            "pass IFTHypergradient(outer_dataloader=...). It should hold data that training does not see"
        )
    rank_zero_warn(
        "no outer_dataloader() is defined: hyperparameters are tuned on the validation data, so validation results "
        "will look better than they are. Hold out other data to report from"
    )
    return validation  # type: ignore[no-any-return]


def check_batches(source: object) -> None:
    """Raises TypeError unless the source yields batches and can be iterated repeatedly."""
    hint = None
    if isinstance(source, Dataset):
        hint = "; wrap it in a DataLoader"
    elif isinstance(source, (list, tuple)) and any(isinstance(item, DataLoader) for item in source):
        hint = " of loaders"
    elif isinstance(source, tuple) and any(isinstance(item, Tensor) for item in source):
        hint = " of tensors; put a single batch into a list"
    elif isinstance(source, Iterator) or not isinstance(source, Iterable):
        hint = ""
    if hint is not None:
        raise TypeError(f"expected one DataLoader, or a list of batches, got {type(source).__name__}{hint}")


def _length(source: Iterable[Any]) -> int | None:
    """Returns the number of batches, None if unknown; `len` of a DataLoader over a stream raises TypeError."""
    try:
        return len(source) if isinstance(source, Sized) else None
    except TypeError:
        return None


def _endless_loader(
    source: Iterable[Any], seed: int, rank: int, world_size: int, consumed: int
) -> DataLoader[Any] | None:
    """Returns the loader with an endless sampler; None if that would change the user's choice of examples."""
    if type(source) is not DataLoader or source.batch_size is None:
        return None
    if not _draws_all(source.sampler, source.dataset, world_size):
        return None
    size = len(source.dataset)  # type: ignore[arg-type]
    batches = EndlessBatchSampler(size, source.batch_size, seed, rank, world_size, consumed)
    return DataLoader(
        source.dataset,
        batch_sampler=batches,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        pin_memory=source.pin_memory,
        timeout=source.timeout,
        worker_init_fn=source.worker_init_fn,
        multiprocessing_context=source.multiprocessing_context,
        generator=torch.Generator().manual_seed(derive_seed(Stream.OUTER_WORKERS, seed=seed, rank=rank)),
        prefetch_factor=source.prefetch_factor,
        persistent_workers=source.persistent_workers,
    )


def _draws_all(sampler: Any, dataset: Any, world_size: int) -> bool:
    """Returns whether a sampler draws each example exactly once, in all processes together."""
    if isinstance(sampler, DistributedSampler):
        return sampler.dataset is dataset and sampler.num_replicas == world_size
    if not isinstance(sampler, (RandomSampler, SequentialSampler)) or getattr(sampler, "replacement", False):
        return False
    return sampler.data_source is dataset and len(sampler) == len(dataset)


def _cycle(source: Iterable[Any], skip: int) -> Iterator[Any]:
    while True:
        empty = True
        for batch in source:
            empty = False
            if skip > 0:
                skip -= 1
                continue
            yield batch
        if empty:
            raise ValueError("the outer data loader is empty: it yielded no batch when it was iterated")


def _warn_if_inexact(consumed: int, world_size: int) -> None:
    if world_size > 1:
        rank_zero_warn(
            "the outer data are iterated as they are on every rank: only a map-style DataLoader with a sequential, "
            "random or distributed sampler is split among ranks"
        )
    elif consumed:
        rank_zero_warn(
            f"the outer data are iterated as they are: {consumed} batches are skipped to resume, which is exact only "
            "if the loader yields them in the same order again"
        )


def _call(owner: object, method: str) -> Any:
    function = getattr(owner, method, None)
    return function() if callable(function) else None

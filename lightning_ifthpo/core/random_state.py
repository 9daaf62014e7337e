"""Random numbers: a stream for each purpose, and drawing the same numbers again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """A purpose of random numbers. Streams of different purposes are independent."""

    OUTER_ORDER = 0
    """The order of the outer data."""
    OUTER_WORKERS = 1
    """Worker processes that load outer data."""
    OUTER_TRANSFORMS = 2
    """Random transforms of examples, in this process, when a batch is loaded."""
    BATCH_TRANSFORMS = 3
    """Random transforms of a whole batch, in Lightning's hooks."""
    LOSSES = 4
    """Dropout and noise in losses."""
    START_VECTORS = 5
    """First vectors of eigenvalue solvers."""
    TRACE = 6
    """Probe vectors of a trace."""
    DENSITY = 7
    """Probe vectors of a spectral density."""
    SKETCH = 8
    """Directions of a low-rank approximation."""


def derive_seed(stream: Stream, *, seed: int = 0, step: int = 0, rank: int = 0) -> int:
    """Returns a seed that depends on all arguments, by numpy's `SeedSequence`.

    Any two different combinations give independent random numbers, and a resumed run derives the same seeds again.

    Args:
        stream: What the numbers are for.
        seed: The user's seed, not negative.
        step: Batch, step or measurement, not negative.
        rank: The process, where processes draw different numbers.

    >>> derive_seed(Stream.LOSSES, step=1) != derive_seed(Stream.BATCH_TRANSFORMS, step=1)
    True
    """
    words = np.random.SeedSequence([stream, seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0]) >> 1  # torch takes seeds below 2⁶³


def generator_of(stream: Stream, *, seed: int = 0, step: int = 0) -> torch.Generator:
    """Returns a CPU generator with a derived seed, so that every device and process draws the same."""
    return torch.Generator().manual_seed(derive_seed(stream, seed=seed, step=step))


class RandomState:
    """The state of the generators of Python, NumPy and torch (the CPU's and one device's) at one moment.

    Args:
        device: The device whose generator matters beside the CPU's.

    >>> state = RandomState(torch.device("cpu"))
    >>> with state.replayed():
    ...     first = torch.rand(3)
    >>> with state.replayed():
    ...     second = torch.rand(3)
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else device
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the legacy state is the global one
        self._cpu = torch.get_rng_state()
        if self._device is not None:
            self._accelerator = torch.get_device_module(self._device).get_rng_state(self._device)

    def restore(self) -> None:
        """Sets all generators back to this moment."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside the block random numbers are those that followed this moment; after it, those that were due anyway."""
        with isolated(self._device or torch.device("cpu")):
            self.restore()
            yield


@contextmanager
def isolated(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Restores all random states after the block; inside it, seeds torch, NumPy and Python where a seed is given."""
    before = RandomState(device)
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # not torch.manual_seed, which takes a millisecond to tell devices that nobody uses
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
        yield
    finally:
        before.restore()

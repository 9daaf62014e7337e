"""Random numbers: a stream for each purpose, and drawing the same numbers again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """A purpose of random numbers. Streams of different purposes are independent.

    OUTER_TRANSFORMS is for transforms of single outer examples in this process, BATCH_TRANSFORMS for transforms of
    whole batches in Lightning's hooks, LOSSES for dropout and noise in losses, START_VECTORS for eigenvalue solvers,
    TRACE and DENSITY for probe vectors, SKETCH for the directions of a low-rank approximation, and VERIFICATION for the
    vectors that derivatives are tried on.
    """

    OUTER_ORDER = 0
    OUTER_WORKERS = 1
    OUTER_TRANSFORMS = 2
    BATCH_TRANSFORMS = 3
    LOSSES = 4
    START_VECTORS = 5
    TRACE = 6
    DENSITY = 7
    SKETCH = 8
    VERIFICATION = 9


def derive_seed(stream: Stream, *, seed: int = 0, step: int = 0, rank: int = 0) -> int:
    """Returns a seed that depends on all arguments, by NumPy's `SeedSequence`.

    Different arguments, integers >= 0, give independent random numbers. A resumed run derives the same seeds again.
    The rank matters only where processes must draw different numbers.

    >>> derive_seed(Stream.LOSSES, step=1) != derive_seed(Stream.BATCH_TRANSFORMS, step=1)
    True
    """
    words = np.random.SeedSequence([stream, seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0]) >> 1  # torch takes seeds below 2⁶³


def generator_of(stream: Stream, *, seed: int = 0, step: int = 0) -> torch.Generator:
    """Returns a CPU generator with a derived seed; it draws the same numbers on every device and in every process."""
    return torch.Generator().manual_seed(derive_seed(stream, seed=seed, step=step))


class RandomState:
    """The state of the generators of Python, NumPy and torch (the CPU's and one device's) when the object is made.

    >>> state = RandomState(torch.device("cpu"))
    >>> with state.replayed():
    ...     first = torch.rand(3)
    >>> with state.replayed():
    ...     second = torch.rand(3)
    >>> torch.equal(first, second)
    True
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - the legacy state is the global one
        self._cpu = torch.get_rng_state()
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Sets all generators to the state that this object holds."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.get_device_module(self._device).set_rng_state(self._accelerator, self._device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Sets all generators to this state in the block, and back to their own states after it."""
        with isolated(self._device):
            self.restore()
            yield


@contextmanager
def isolated(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Seeds torch, NumPy and Python in the block if a seed is given; restores all generators after it."""
    before = RandomState(device)
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            # torch.manual_seed also seeds every unused accelerator, which costs about 1 ms.
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
        yield
    finally:
        before.restore()

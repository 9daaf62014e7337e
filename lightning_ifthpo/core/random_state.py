"""Drawing the same random numbers again, without disturbing those that follow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

PROCESS_STRIDE = 1_000_003
"""Between the seeds of one process and the next, more than a run counts."""


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

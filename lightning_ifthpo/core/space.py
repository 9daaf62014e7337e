"""Several tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class ParameterSpace:
    """The flat vector space of a sequence of real tensors.

    The dtype of the vector is the widest of the tensors' floating dtypes. Entries are in the logical (row-major) order
    of each tensor, whatever its memory layout (channels-last, for example).

    Args:
        tensors: The tensors, each of any shape; together they have n entries.

    Raises:
        ValueError: If there is no tensor, one appears twice, or they are on several devices.
        TypeError: If one is not a real floating-point tensor.

    >>> space = ParameterSpace([torch.zeros(2, 3), torch.zeros(4)])
    >>> space.size
    10
    >>> [tuple(t.shape) for t in space.split(torch.arange(10.0))]
    [(2, 3), (4,)]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        _check(self.tensors)
        self.size = sum(tensor.numel() for tensor in self.tensors)
        self.device = self.tensors[0].device
        self.dtype = self.tensors[0].dtype
        for tensor in self.tensors:
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)

    def flatten(self, tensors: Iterable[Tensor | None]) -> Tensor:
        """Returns a detached vector [n]: tensors shaped like the space's, in order; `None` stands for zeros."""
        parts = [
            torch.zeros(like.numel(), dtype=self.dtype, device=self.device)
            if tensor is None
            else full_tensor(tensor.detach()).reshape(-1).to(self.dtype)
            for tensor, like in zip(tensors, self.tensors, strict=True)
        ]
        return torch.cat(parts)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Returns a vector [n] as a list of tensors with the shapes and dtypes of the space's."""
        self.check(vector)
        parts = torch.split(vector, [tensor.numel() for tensor in self.tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, self.tensors, strict=True)]

    @property
    def values(self) -> Tensor:
        """A copy of the tensors' current values, [n]."""
        return self.flatten(self.tensors)

    def assign(self, vector: Tensor) -> None:
        """Writes a vector [n] into the tensors, in place."""
        with torch.no_grad():
            for tensor, value in zip(self.tensors, self.split(vector), strict=True):
                tensor.copy_(value)

    @contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Gives copies of the tensors, and writes them back after the block, bit for bit."""
        originals = [tensor.detach().clone() for tensor in self.tensors]
        try:
            yield originals
        finally:
            with torch.no_grad():
                for tensor, original in zip(self.tensors, originals, strict=True):
                    tensor.copy_(original)

    def check(self, vector: Tensor) -> None:
        """Raises ValueError unless the vector has shape [n]."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")


def check_real(tensor: Tensor, name: str) -> None:
    """Raises TypeError unless this is a real floating-point tensor; complex ones are not supported."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {tensor.dtype}; convert it with .float()")


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor; if it is spread over processes, all of its parts as one tensor (a collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _check(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise ValueError("expected at least one tensor, got none")
    for index, tensor in enumerate(tensors):
        check_real(tensor, f"tensor {index}")
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        raise ValueError("a tensor appears twice; pass each (tied) tensor once, as module.parameters() does")
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")

"""Several tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class ParameterSpace:
    """The flat vector space of a sequence of real tensors.

    The vector has the widest of the tensors' dtypes. Entries are in the row-major order of each tensor's indices,
    whatever its memory layout.

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

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        if not self.tensors:
            raise ValueError("expected at least one tensor, got none")
        for index, tensor in enumerate(self.tensors):
            check_real(tensor, f"tensor {index}")
        if len({id(tensor) for tensor in self.tensors}) < len(self.tensors):
            raise ValueError("a tensor appears twice; pass each (tied) tensor once, as module.parameters() does")
        devices = {tensor.device for tensor in self.tensors}
        if len(devices) > 1:
            raise ValueError(f"expected all tensors on one device, got {sorted(map(str, devices))}")
        self.size = sum(tensor.numel() for tensor in self.tensors)
        self.device = self.tensors[0].device
        self.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors))

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """The dtype of a tensor that rounds the most."""
        return max((tensor.dtype for tensor in self.tensors), key=lambda dtype: torch.finfo(dtype).eps)

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
        """Returns the parts of a vector, with the tensors' shapes and dtypes; raises ValueError unless it is [n]."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        parts = torch.split(vector, [tensor.numel() for tensor in self.tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, self.tensors, strict=True)]

    @property
    def values(self) -> Tensor:
        """A copy of the tensors' current values, [n]."""
        return self.flatten(self.tensors)

    def assign(self, vector: Tensor) -> None:
        """Writes a vector [n] into the tensors, in place."""
        self._write(self.split(vector))

    @contextmanager
    def restored(self) -> Iterator[list[Tensor]]:
        """Gives copies of the tensors, and writes them back after the block, bit for bit."""
        originals = [tensor.detach().clone() for tensor in self.tensors]
        try:
            yield originals
        finally:
            self._write(originals)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)


def check_real(tensor: Tensor, name: str) -> None:
    """Raises TypeError unless the tensor is real and floating-point; complex tensors are not supported."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point tensor, got {tensor.dtype}; convert it with .float()")


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a strided tensor; gathers it, by a collective, if it is sharded over processes."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole if whole.layout is torch.strided else whole.to_dense()

"""A weight for each training example."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.hyperparameters.bounded import Bounded


class SampleWeights(Bounded):
    """One weight in (0, 2) for each training example: 2σ(λ_i), starting at one.

    Multiply the loss of each example by its weight; `IndexedDataset` adds the index of each example to the batch.

    Args:
        n: Number of training examples.

    Raises:
        ValueError: If n < 1.

    >>> SampleWeights(5)(torch.tensor([0, 3]))
    tensor([1., 1.])
    """

    def __init__(self, n: int) -> None:
        require_at_least("n", n, 1)
        super().__init__(initial=1.0, maximum=2.0)
        self.logits = nn.Parameter(torch.zeros(n), requires_grad=False)

    def forward(self, index: Tensor) -> Tensor:
        """Returns the weights [B] of the examples with these indices, integers [B]."""
        return self._value(self.logits[index])


class IndexedDataset(Dataset[tuple[Any, ...]]):
    """A map-style data set with the index appended to each example, which may be a tuple or a single value.

    Raises:
        TypeError: If the data set has no length or no items.

    >>> from torch.utils.data import TensorDataset
    >>> IndexedDataset(TensorDataset(torch.tensor([7, 8])))[1]
    (tensor(8), 1)
    """

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"expected a map-style data set with a length, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        example = self.dataset[index]
        return (*example, index) if isinstance(example, tuple) else (example, index)

"""A weight for each training example."""

from __future__ import annotations

from collections.abc import Mapping, Sized
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

    is_for_training_loss = True

    def __init__(self, n: int) -> None:
        require_at_least("n", n, 1)
        super().__init__(initial=1.0, maximum=2.0)
        self.logits = nn.Parameter(torch.zeros(n), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the weight of each training example, [n]."""
        return self._value(self.logits)

    def is_at_bound(self, value: float) -> bool:
        """Returns False: some examples have the largest weight, and are meant to."""
        return False

    def forward(self, index: Tensor) -> Tensor:
        """Returns the weights [B] of the examples with these indices, integers [B]."""
        return self._value(self.logits[index])


class IndexedDataset(Dataset[Any]):
    """A map-style data set with the index added to each example.

    A mapping gets it under the new key "index", as collators of text libraries need; a tuple or a named tuple gets it
    at its end, and becomes a tuple; any other value becomes the tuple (value, index).

    Raises:
        TypeError: If the data set has no length or no items.
        ValueError: If an example is a mapping that has a key "index" already.

    >>> from torch.utils.data import TensorDataset
    >>> IndexedDataset(TensorDataset(torch.tensor([7, 8])))[1]
    (tensor(8), 1)
    >>> IndexedDataset([{"label": 7}, {"label": 8}])[1]
    {'label': 8, 'index': 1}
    """

    def __init__(self, dataset: Any) -> None:
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"expected a map-style data set with a length, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        example = self.dataset[index]
        if isinstance(example, Mapping):
            if "index" in example:
                raise ValueError("examples have a key 'index' already, which IndexedDataset would replace; rename it")
            return {**example, "index": index}
        return (*example, index) if isinstance(example, tuple) else (example, index)

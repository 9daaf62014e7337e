"""A weight for each training example, from a table or from a small network."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import Self

from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.hyperparameters.bounded import Bounded, between
from lightning_ifthpo.hyperparameters.per_example import PerExample


class SampleWeights(PerExample, Bounded):
    """One weight in (0, 2) for each training example: 2σ(λ_i), starting at one.

    Multiply the loss of each example by its weight; `IndexedDataset` adds the index of each example to the batch.

    Args:
        n: Number of training examples, the length of the data set that `IndexedDataset` wraps.

    Raises:
        ValueError: If n < 1.
        IndexError: When called, if an index is n or larger.

    >>> SampleWeights(5)(torch.tensor([0, 3]))
    tensor([1., 1.])
    """

    is_for_training_loss = True

    def __init__(self, n: int) -> None:
        require_at_least("n", n, 1)
        super().__init__(initial=1.0, maximum=2.0)
        self.logits = nn.Parameter(torch.zeros(n), requires_grad=False)

    @classmethod
    def from_margins(cls, margins: Tensor) -> Self:
        """Returns weights 2σ(m_i / s) that start from margins m_i, with s their root mean square.

        The margin of an example is the logit of its given label minus the largest other one (`label_margins`), for
        example the mean over the epochs of an earlier run. So a weight that few hyper steps reach, because its example
        is seldom drawn, does not stay at one. Where labels are wrong in a pattern, take the margins of a network that
        was trained with `LabelTransition`: those of a plain one mislead.

        Args:
            margins: One margin for each training example, [n].

        Raises:
            ValueError: If margins are not finite numbers [n].

        >>> SampleWeights.from_margins(torch.tensor([3.0, -3.0])).natural_values()
        tensor([1.4621, 0.5379])
        """
        if not (isinstance(margins, Tensor) and margins.ndim == 1 and bool(margins.isfinite().all())):
            came = tuple(margins.shape) if isinstance(margins, Tensor) else type(margins).__name__
            raise ValueError(f"expected finite margins in a tensor [n], got {came}")
        margins = margins.detach().cpu().double()  # the square of a large margin overflows in half precision
        scale = margins.square().mean().sqrt()
        weights = cls(len(margins))
        weights.logits.copy_(margins / scale if scale > 0.0 else torch.zeros_like(margins))
        return weights

    def natural_values(self) -> Tensor:
        """Returns the weight of each training example, [n]."""
        return self._value(self.logits)

    def is_at_bound(self, value: float) -> bool:
        """Returns False: some examples have the largest weight, and are meant to."""
        return False

    def forward(self, index: Tensor) -> Tensor:
        """Returns the weights [B] of the examples with these indices, integers [B]."""
        return self._value(self.rows(index))


class WeightNetwork(nn.Module):
    """A weight in (0, 2) for each example of a batch, a learned function of its loss, its margin or other features.

    This is the Meta-Weight-Net of Shu et al. (2019), for data too large for a table, or for examples that are drawn
    only once. The weights start at one. Gradients do not flow back through the features.

    Args:
        features: Number of features of an example.
        hidden: Width of the hidden layer.

    Raises:
        ValueError: If an argument is out of range; when called, if there are not as many features of shape [B].

    >>> WeightNetwork(features=2)(torch.tensor([0.1, 3.0]), torch.tensor([2.0, -1.0]))
    tensor([1., 1.])
    """

    unit = 1.0  # they change the logarithm of an odds
    is_for_training_loss = True

    def __init__(self, features: int = 1, *, hidden: int = 32) -> None:
        require_at_least("features", features, 1)
        require_at_least("hidden", hidden, 1)
        super().__init__()
        self.features = features
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), last).requires_grad_(False)

    def forward(self, *features: Tensor) -> Tensor:
        """Returns the weights [B] of examples with these features, each [B]."""
        shapes = [tuple(feature.shape) for feature in features]
        if len(features) != self.features or len(set(shapes)) > 1 or len(shapes[0]) != 1:
            raise ValueError(f"expected {self.features} features [B], got shapes {shapes}")
        return between(self.net(torch.stack(features, 1).detach()).squeeze(1), 0.0, 2.0)


class IndexedDataset(Dataset[Any]):
    """A map-style data set with the index added to each example.

    A mapping gets it under the new key "index", as collators of text libraries need; a tuple or a named tuple gets it
    at its end, and becomes a tuple; any other value becomes the tuple (value, index). Wrap the training set alone,
    after it was split: outer and validation data need no index.

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

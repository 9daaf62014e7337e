"""Learned weights for the terms of a loss, and learned smoothing of its targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_number, require_at_least, require_flag
from lightning_ifthpo.hyperparameters.bounded import Bounded


class LossWeights(nn.Module):
    """A positive weight for each of K terms of a loss, by default all starting at one: K softmax(λ).

    The weights always sum to K, as in GradNorm (Chen et al. 2018): a common factor would not move the minimum, only
    rescale the learning rate. No weight exceeds K, which keeps training stable. Every ratio of weights can be reached,
    so that a useless term can fade. Pass all terms, the main one too; an L2 penalty may stay outside. Leave the weights
    out of the outer loss: it would favour easy terms.

    Args:
        terms: Number of terms K, or their names.
        initial: The weights to start from, K positive numbers in the order of the terms or by name, such as
            `natural_values()`. They are scaled to the sum K. None for ones.

    Raises:
        ValueError: If there are fewer than two terms, names are not distinct, or initial weights are not K positive
            numbers, or have other names; when called, if the losses are not K scalars, or have other names.
        TypeError: If `terms` is neither an integer nor a list of names.

    >>> weights = LossWeights(["digit", "style"])
    >>> weights({"style": torch.tensor(0.5), "digit": torch.tensor(2.0)})
    tensor(2.5000)
    """

    unit = 1.0  # λ is a logarithm
    is_for_training_loss = True

    def __init__(
        self, terms: int | Sequence[str], *, initial: Sequence[float] | Mapping[str, float] | Tensor | None = None
    ) -> None:
        super().__init__()
        counted = isinstance(terms, int) and not isinstance(terms, bool)
        named = isinstance(terms, (list, tuple)) and all(isinstance(name, str) for name in terms)
        if not (counted or named):
            raise TypeError(f"expected the number of terms or a list of names, got {terms!r}")
        self.names = () if isinstance(terms, int) else tuple(terms)
        count = terms if isinstance(terms, int) else len(self.names)
        if count < 2:
            raise ValueError(f"expected at least two terms, got {count}: the weight of a single one is a learning rate")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"expected distinct names, got {self.names}")
        weights = [1.0] * count if initial is None else self._in_order(initial)
        if len(weights) != count or not all(is_number(weight) and 0.0 < weight < math.inf for weight in weights):
            raise ValueError(f"expected initial to be {count} positive numbers, got {initial!r}")
        self.logits = nn.Parameter(torch.tensor(weights).log(), requires_grad=False)

    def _in_order(self, values: Any) -> list[Any]:
        """Returns values in the order of the terms; nothing of what are no values."""
        if isinstance(values, Mapping):
            if values.keys() != set(self.names):
                raise ValueError(f"expected initial weights named {self.names}, got {tuple(values)}")
            values = [values[name] for name in self.names]
        if isinstance(values, Tensor):
            values = values.reshape(-1).tolist()
        if not isinstance(values, (list, tuple)):
            return []
        return [value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values]

    def natural_values(self) -> Tensor | dict[str, Tensor]:
        """Returns the weight of each term: [K], or scalars by name."""
        weights = self._weights()
        return dict(zip(self.names, weights, strict=True)) if self.names else weights

    def _weights(self) -> Tensor:
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Returns Σ weight_k loss_k, a scalar; losses: [K], a sequence of K scalars, or a mapping by name."""
        if isinstance(losses, Mapping):
            if losses.keys() != set(self.names):
                raise ValueError(f"expected losses named {self.names}, got {tuple(losses)}")
            losses = [losses[name] for name in self.names]
        stacked = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        if stacked.shape != self.logits.shape:
            raise ValueError(f"expected {len(self.logits)} scalar losses, got shape {tuple(stacked.shape)}")
        return (self._weights() * stacked).sum()


class LabelSmoothing(Bounded):
    """Smoothed targets (1 − s) onehot(y) + s/C with learned s = maximum · σ(λ).

    `F.cross_entropy(..., label_smoothing=s)` uses the same targets, but its s is a number without a derivative. The
    right class keeps at least 1 − `maximum`. The outer loss should use the original targets.

    Args:
        classes: Number of classes C.
        per_class: Whether each class has its own s, for the examples with its label; otherwise all classes share one.
        initial: s at the start, in (0, maximum).
        maximum: Upper bound of s, at most 1; at s = 1 all targets are uniform.

    Raises:
        ValueError: If an argument is out of range; when called, if the targets are not [B].

    >>> LabelSmoothing(4, initial=0.2)(torch.tensor([0, 3]))
    tensor([[0.8500, 0.0500, 0.0500, 0.0500],
            [0.0500, 0.0500, 0.0500, 0.8500]])
    """

    is_for_training_loss = True

    def __init__(self, classes: int, *, per_class: bool = False, initial: float = 0.01, maximum: float = 0.5) -> None:
        require_at_least("classes", classes, 2)
        require_flag("per_class", per_class)
        super().__init__(initial, maximum, limit=1.0)
        self.classes = classes
        shape = (classes if per_class else 1,)
        self.logits = nn.Parameter(torch.full(shape, self._logit(initial)), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the smoothing s: [C] if each class has its own, else [1]."""
        return self._value(self.logits)

    def forward(self, targets: Tensor) -> Tensor:
        """Returns targets [B, C] for `F.cross_entropy`, from class indices [B]."""
        if targets.ndim != 1:
            raise ValueError(f"expected class indices of shape [B], got {tuple(targets.shape)}")
        smoothing = self.natural_values().expand(self.classes)[targets].unsqueeze(1)
        return (1.0 - smoothing) * F.one_hot(targets, self.classes) + smoothing / self.classes

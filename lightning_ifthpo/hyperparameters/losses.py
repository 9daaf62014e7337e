"""Weights for the terms of a loss, and smoothing of its targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_flag


class LossWeights(nn.Module):
    """A positive weight for each of K terms of a loss, all starting at one: K softmax(λ).

    The weights always sum to K, as those of GradNorm do (Chen et al. 2018). A common factor of all terms would be no
    hyperparameter: it acts as a learning rate does, on which the trained weights of the network do not depend. Fixing
    it also keeps training stable: no weight exceeds K, while any ratio of weights can be reached, so that a useless
    term can fade. Put every term in, the main one too; an L2 penalty may stay outside. The outer loss should not use
    the weights, which would tune their own yardstick.

    Args:
        terms: Number of terms K, or their names.

    Shape:
        - losses: [K], or K scalars: a sequence, or a mapping from each name to its loss.
        - output: scalar, Σ weight_k loss_k.

    Raises:
        ValueError: If there are less than two terms, or names are not distinct; and, when called, if the losses are not
            K scalars, or their names others.
        TypeError: If `terms` is a string.

    >>> weights = LossWeights(["digit", "style"])
    >>> weights({"style": torch.tensor(0.5), "digit": torch.tensor(2.0)})
    tensor(2.5000)
    >>> dict(zip(weights.names, weights.weights().tolist()))
    {'digit': 1.0, 'style': 1.0}
    """

    def __init__(self, terms: int | Sequence[str]) -> None:
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
        self.logits = nn.Parameter(torch.zeros(count), requires_grad=False)

    def weights(self) -> Tensor:
        """Returns the weight of each term, [K], in the order of `names`."""
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, losses: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Returns the weighted sum of the losses."""
        if isinstance(losses, Mapping):
            losses = self._in_order(losses)
        stacked = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        if stacked.shape != self.logits.shape:
            raise ValueError(f"expected {len(self.logits)} scalar losses, got shape {tuple(stacked.shape)}")
        return (self.weights() * stacked).sum()

    def _in_order(self, losses: Mapping[str, Tensor]) -> list[Tensor]:
        if losses.keys() != set(self.names):
            raise ValueError(f"expected losses named {self.names}, got {tuple(losses)}")
        return [losses[name] for name in self.names]


class LabelSmoothing(nn.Module):
    """Smoothed targets (1 − s) onehot(y) + s/C with learned s = maximum · σ(λ), for all classes or for each.

    They are the targets of `F.cross_entropy(..., label_smoothing=s)`, which takes no s to differentiate. The
    right class keeps at least 1 − `maximum`. The outer loss should use the targets as they are.

    Args:
        classes: Number of classes C.
        per_class: Whether each class has an s of its own, for the examples that are labelled with it.
        initial: s at the start, in (0, maximum).
        maximum: Upper bound of s, at most 1, where targets say nothing any more.

    Shape:
        - targets: [B], integers from 0 to C − 1.
        - output: [B, C], to be given to `F.cross_entropy` as target.

    Raises:
        ValueError: If an argument is out of range; and, when called, if the targets are not [B].

    >>> LabelSmoothing(4, initial=0.2)(torch.tensor([0, 3]))
    tensor([[0.8500, 0.0500, 0.0500, 0.0500],
            [0.0500, 0.0500, 0.0500, 0.8500]])
    """

    def __init__(self, classes: int, *, per_class: bool = False, initial: float = 0.01, maximum: float = 0.5) -> None:
        super().__init__()
        require_at_least("classes", classes, 2)
        require_flag("per_class", per_class)
        if not is_ascending(0.0, initial, maximum) or maximum > 1.0:
            raise ValueError(f"expected 0 < initial < maximum <= 1, got initial={initial!r} and maximum={maximum!r}")
        self.classes = classes
        self.maximum = maximum
        start = math.log(initial / (maximum - initial))
        self.logits = nn.Parameter(torch.full((classes if per_class else 1,), start), requires_grad=False)

    def smoothing(self) -> Tensor:
        """Returns s: [1], or [C] with one for each class."""
        return self.maximum * self.logits.sigmoid()

    def forward(self, targets: Tensor) -> Tensor:
        """Returns the smoothed distribution of each target."""
        if targets.ndim != 1:
            raise ValueError(f"expected class indices of shape [B], got {tuple(targets.shape)}")
        smoothing = self.smoothing().expand(self.classes)[targets].unsqueeze(1)
        return (1.0 - smoothing) * F.one_hot(targets, self.classes) + smoothing / self.classes

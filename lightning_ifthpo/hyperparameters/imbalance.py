"""Learned weights of classes, and learned offsets of their logits, for classes of different frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_number


class ClassWeights(nn.Module):
    """A positive weight for each class, of mean one over the training examples: e^{λ_c} / Σ_k π_k e^{λ_k}.

    π_c is the frequency of class c. A common factor of all weights would be a learning rate, so there is none. Multiply
    the loss of each example by the weight of its class. The outer loss says what you want: on balanced data, or with
    each class weighted alike, the balanced error. A network that fits all of its training examples hardly feels
    weights (Byrd and Lipton 2019); then use `LogitAdjustment`, alone or with weights.

    Args:
        counts: Number of training examples of each class, such as `torch.bincount(labels)`; at least two classes.
        initial: The weights to start from, C positive numbers, scaled to mean one; such as `1 / counts` for inverse
            frequency, or `natural_values()`. None for ones.

    Raises:
        ValueError: If counts or initial weights are not C positive numbers.

    >>> weights = ClassWeights([90, 10], initial=[1 / 90, 1 / 10])
    >>> weights(torch.tensor([0, 1, 0]))
    tensor([0.5556, 5.0000, 0.5556])
    """

    unit = 1.0  # λ is a logarithm
    is_for_training_loss = True
    log_frequencies: Tensor  # the frequency of a rare class may be zero in half precision

    def __init__(self, counts: Sequence[float] | Tensor, *, initial: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        frequencies = _frequencies(counts)
        self.register_buffer("log_frequencies", frequencies.log())
        weights = torch.ones_like(frequencies) if initial is None else _positive("initial", initial)
        if len(weights) != len(frequencies):
            raise ValueError(f"expected initial to be {len(frequencies)} positive numbers, got {initial!r}")
        self.logarithms = nn.Parameter(weights.log(), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the weight of each class, [C]."""
        shares = (self.logarithms + self.log_frequencies).log_softmax(0)  # logarithms, of each class in the loss
        return (shares - self.log_frequencies).exp()

    def forward(self, targets: Tensor) -> Tensor:
        """Returns the weights [B] of examples with these class indices, integers [B]."""
        return self.natural_values()[targets.long()]  # torch takes bytes for a mask


class LogitAdjustment(nn.Module):
    """Learned offsets of the logits in the training loss, starting at strength · log π_c (Menon et al. 2021).

    Use `cross_entropy(adjustment(logits), targets)` to train, and the logits themselves in the outer loss and to
    predict. A rare class has a negative offset: to be told from the others it needs a larger margin. Where weights fade
    as the network fits its examples, margins stay. Learned by a balanced outer loss, offsets answer to the difficulty
    of a class as well as to its frequency (Li et al. 2021, AutoBalance). A common offset changes nothing.

    Args:
        counts: Number of training examples of each class, such as `torch.bincount(labels)`; at least two classes.
        initial: The offsets to start from, C finite numbers, such as `natural_values()`. None for strength · log π_c.
        strength: τ, with which offsets start where `initial` is None; 1 for Menon's, 0 for none.

    Raises:
        ValueError: If counts are not positive, or initial offsets not C finite numbers; when called, if the last
            dimension of the logits is not C.

    >>> adjustment = LogitAdjustment([90, 10])
    >>> adjustment(torch.zeros(1, 2)).softmax(1)
    tensor([[0.9000, 0.1000]])
    """

    unit = 1.0  # offsets are logarithms of odds
    is_for_training_loss = True

    def __init__(
        self,
        counts: Sequence[float] | Tensor,
        *,
        initial: Sequence[float] | Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        if not (is_number(strength) and math.isfinite(strength)):
            raise ValueError(f"expected strength to be a finite number, got {strength!r}")
        frequencies = _frequencies(counts)
        offsets = strength * frequencies.log() if initial is None else torch.tensor(_numbers(initial))
        if len(offsets) != len(frequencies) or not bool(offsets.isfinite().all()):
            raise ValueError(f"expected initial to be {len(frequencies)} finite numbers, got {initial!r}")
        self.offsets = nn.Parameter(offsets, requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns the offset of each class, [C], less their mean."""
        return self.offsets - self.offsets.mean()

    def forward(self, logits: Tensor) -> Tensor:
        """Returns logits plus offsets, of the shape of the logits, [..., C]."""
        if logits.ndim == 0 or logits.shape[-1] != len(self.offsets):
            raise ValueError(f"expected logits of {len(self.offsets)} classes, got shape {tuple(logits.shape)}")
        return logits + self.natural_values().to(logits.dtype)


def _frequencies(counts: Any) -> Tensor:
    """Returns the fraction of examples of each class, [C]."""
    values = _positive("counts", counts)
    if len(values) < 2:
        raise ValueError(f"expected counts of at least two classes, got {counts!r}")
    return values / values.sum()


def _positive(name: str, values: Any) -> Tensor:
    numbers = _numbers(values)
    if not numbers or not all(0.0 < number < math.inf for number in numbers):
        raise ValueError(f"expected {name} to be positive numbers, one for each class, got {values!r}")
    return torch.tensor(numbers)


def _numbers(values: Any) -> list[float]:
    """Returns a sequence, an array or a tensor [C] of numbers as a list; an empty one for anything else."""
    if isinstance(values, (Tensor, np.ndarray)):
        values = values.tolist() if values.ndim == 1 else []
    if not isinstance(values, (list, tuple)) or not all(map(is_number, values)):
        return []
    return [float(value) for value in values]

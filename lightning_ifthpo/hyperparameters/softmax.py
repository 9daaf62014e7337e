"""Learned shapes of the cross-entropy: a temperature of the softmax, and the exponent of the focal loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_flag
from lightning_ifthpo.hyperparameters.bounded import Bounded, between


class Temperature(nn.Module):
    """Divides logits by a learned temperature T, between 1/maximum and maximum; one for all classes, or one for each.

    In the training loss, `cross_entropy(temperature(logits), y)` with T < 1 lets the weights fit the examples with
    smaller logits. The outer loss takes the logits as they are: its cross-entropy on held-out data then finds the T
    with which the trained network is calibrated, as Guo et al. (2017) find one after training. In distillation,
    `temperature(teacher(x)).softmax(1)` are targets of a learned softness; the outer loss takes the true labels.

    Args:
        classes: C for a temperature of the logits of each class, as in the loss of Ye et al. (2020) for rare classes;
            None for a single one.
        initial: Each T at the start, in (1/maximum, maximum).
        maximum: Upper bound of each T, above 1; 1/maximum is the lower one.

    Raises:
        ValueError: If an argument is out of range; when called, if the last dimension of the logits is not C.

    >>> Temperature(initial=2.0)(torch.tensor([[4.0, 0.0]]))
    tensor([[2.0000, 0.0000]])
    """

    unit = 1.0  # T is an exponential, or nearly so
    is_for_training_loss = True

    def __init__(self, classes: int | None = None, *, initial: float = 1.0, maximum: float = 10.0) -> None:
        super().__init__()
        if classes is not None:
            require_at_least("classes", classes, 2)
        if not is_ascending(1.0, maximum, math.inf) or not is_ascending(1.0 / maximum, initial, maximum):
            raise ValueError(
                f"expected 1/maximum < initial < maximum < inf and maximum > 1, got {initial=!r} and {maximum=!r}"
            )
        self.maximum = maximum
        fraction = (1.0 + math.log(initial) / math.log(maximum)) / 2.0
        start = math.log(fraction / (1.0 - fraction))
        self.logits = nn.Parameter(torch.full(() if classes is None else (classes,), start), requires_grad=False)

    def extra_repr(self) -> str:
        """Returns the upper bound, for the module's repr."""
        return f"maximum={self.maximum:g}"

    def natural_values(self) -> Tensor:
        """Returns the temperature: a scalar, or [C]."""
        largest = math.log(self.maximum)
        return between(self.logits, -largest, largest).exp()

    def forward(self, logits: Tensor) -> Tensor:
        """Returns logits / T, of the shape of the logits, [..., C]."""
        if self.logits.ndim == 1 and (logits.ndim == 0 or logits.shape[-1] != len(self.logits)):
            raise ValueError(f"expected logits of {len(self.logits)} classes, got shape {tuple(logits.shape)}")
        return logits / self.natural_values().to(logits.dtype)


class FocalGamma(Bounded):
    """The focal loss −(1 − p)^γ log p with learned γ = maximum · σ(λ), where p is the probability of the right class.

    With γ > 0 examples that are right with confidence count less (Lin et al. 2017), which also keeps a network from
    growing overconfident (Mukhoti et al. 2020). So a sensible outer loss is the plain cross-entropy of held-out data,
    which measures both error and calibration; a focal outer loss would favor whatever γ makes it small. The power is
    taken as e^{γ log(1 − p)}, with log(1 − p) from the logits of the other classes, so that it is exact for p near 1.

    Args:
        classes: Number of classes C.
        per_class: Whether each class has its own γ, for the examples with its label; otherwise all classes share one.
        initial: γ at the start, in (0, maximum).
        maximum: Upper bound of γ.

    Raises:
        ValueError: If an argument is out of range; when called, if logits and targets are not [B, C] and [B].

    >>> focal = FocalGamma(2, initial=2.0)
    >>> focal(torch.zeros(1, 2), torch.tensor([0])) / math.log(2)  # (1 − 1/2)²
    tensor([0.2500])
    """

    is_for_training_loss = True

    def __init__(self, classes: int, *, per_class: bool = False, initial: float = 0.5, maximum: float = 5.0) -> None:
        require_at_least("classes", classes, 2)
        require_flag("per_class", per_class)
        super().__init__(initial, maximum)
        self.classes = classes
        shape = (classes if per_class else 1,)
        self.logits = nn.Parameter(torch.full(shape, self._logit(initial)), requires_grad=False)

    def natural_values(self) -> Tensor:
        """Returns γ: [C] if each class has its own, else [1]."""
        return self._value(self.logits)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss of each example, [B], from logits [B, C] and class indices [B]."""
        if logits.ndim != 2 or logits.shape[1] != self.classes or targets.shape != logits.shape[:1]:
            raise ValueError(
                f"expected logits of shape [B, {self.classes}] and class indices [B], got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}"
            )
        column = targets.unsqueeze(1)
        log_right = logits.log_softmax(1).gather(1, column).squeeze(1)
        log_wrong = logits.scatter(1, column, -math.inf).logsumexp(1) - logits.logsumexp(1)
        gamma = self.natural_values().expand(self.classes)[targets]
        return -(gamma * log_wrong).exp() * log_right

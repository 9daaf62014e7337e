"""Dropout with a learned rate; in eval mode it returns its input."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, require_broadcastable, require_shape
from lightning_ifthpo.hyperparameters.bounded import Bounded

_LIMIT = 0.99  # what is kept is divided by 1 − p


class Dropout(Bounded):
    """Sets entries of its input nearly to zero at random, at the learned rate p = maximum · σ(λ): concrete dropout.

    A mask of zeros and ones has no derivative with respect to p. So an entry is multiplied by (1 − z) / (1 − p) with

        z = σ((logit p + logit u) / temperature),  u ~ U(0, 1),

    as in Gal, Hron, Kendall (2017), eq. 5: z exceeds ½ with probability p, and is close to 0 or 1 at a low temperature.
    They add an entropy to the training loss; here the outer loss chooses p, and needs none. In eval mode, and so in the
    outer loss, nothing is dropped. Register one for each layer that has a rate of its own.

    Args:
        shape: Shape of p: () for one rate, (C, 1, 1) for one per channel of images, (n,) for one per feature.
        initial: Each rate at the start, in (0, maximum).
        maximum: Upper bound of each rate, at most 0.99.
        temperature: Softness of the mask. A low one makes masks like those of `nn.Dropout`, and derivatives noisy.

    Raises:
        ValueError: If an argument is out of range; when called, if p does not broadcast to the shape of x.
        TypeError: When called, if x is not floating-point.

    >>> dropout = Dropout(initial=0.25)
    >>> dropout(torch.ones(2, 8)).shape
    torch.Size([2, 8])
    >>> dropout.natural_values(), dropout.eval()(torch.ones(2))
    (tensor(0.2500), tensor([1., 1.]))
    """

    def __init__(
        self, shape: tuple[int, ...] = (), *, initial: float = 0.1, maximum: float = 0.9, temperature: float = 0.1
    ) -> None:
        super().__init__(initial, maximum, limit=_LIMIT)
        require_shape("shape", shape)
        if not is_ascending(0.0, temperature, math.inf):
            raise ValueError(f"expected 0 < temperature < inf, got {temperature!r}")
        self.temperature = temperature
        self.logits = nn.Parameter(torch.full(shape, self._logit(initial)), requires_grad=False)

    def extra_repr(self) -> str:
        """Returns the upper bound and the temperature, for the module's repr."""
        return f"{super().extra_repr()}, temperature={self.temperature:g}"

    def natural_values(self) -> Tensor:
        """Returns the rate p, a fraction, of the shape that was given."""
        return self._value(self.logits)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of any shape to which p broadcasts, times a mask in training mode; x itself in eval mode."""
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, got {x.dtype}; convert it before entries are dropped")
        require_broadcastable("rates", self.logits.shape, x.shape)
        if not self.training:
            return x
        # bfloat16 has 256 numbers between ½ and 1, too few for a rate
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits, uniform = self.logits.to(dtype), torch.rand(x.shape, dtype=dtype, device=x.device)
        kept = 1.0 - self._value(logits)
        # log p by itself, because p rounds to zero for λ far below zero
        logit = math.log(self.maximum) + F.logsigmoid(logits) - kept.log()
        mask = torch.sigmoid(-(logit + uniform.logit()) / self.temperature) / kept
        return x * mask.to(x.dtype)

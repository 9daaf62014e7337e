"""Learned training examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, is_number, require_at_least, require_shape
from lightning_ifthpo.hyperparameters.bounded import between

# Least distance of a starting pixel from a bound, as a fraction of the range. There the slope of the sigmoid is 4 % of
# its largest; at a bound it is 0, and the pixel would never move.
_MARGIN = 0.01


class DistilledData(nn.Module):
    """Learned training examples, a few of each class: dataset distillation (Lorraine, Vicol, Duvenaud 2019, section 5).

    Train on the examples that a call returns. They are tuned so that a model trained on them alone does well on the
    outer data. Add a little weight decay to the inner loss: without it, a model that fits the examples has no minimum.

    Args:
        shape: Shape of an example, such as (1, 28, 28).
        classes: C, number of classes, at least 1.
        per_class: k, examples of each class, at least 1.
        initial: Standard deviation of normal noise to start from, or a tensor [C·k, *shape], sorted by class.
        bounds: (lowest, highest) value of a pixel, enforced by a sigmoid; None for no bounds. With bounds, the noise is
            the argument of the sigmoid, and values of a tensor are moved at least 1 % of the range away from a bound.
        generator: Draws the noise; None for torch's global one.

    Attributes:
        images: The hyperparameter, [C·k, *shape]: the examples, or with bounds their logits.
        labels: [C·k], integer, sorted.

    Raises:
        ValueError: If an argument is out of range, or `initial` has another shape or lies outside the bounds.
        TypeError: If `generator` is not a torch.Generator.

    >>> data = DistilledData((2,), classes=2, initial=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> images, labels = data()
    >>> images[labels == 1], labels
    (tensor([[1., 0.]]), tensor([0, 1]))
    """

    labels: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        per_class: int = 1,
        *,
        initial: float | Tensor = 1.0,
        bounds: tuple[float, float] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require_at_least("classes", classes, 1)
        require_at_least("per_class", per_class, 1)
        require_shape("shape", shape)
        pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
        if bounds is not None and not (pair and is_ascending(-math.inf, *bounds, math.inf)):
            raise ValueError(f"expected finite bounds (lowest, highest) with lowest < highest, got {bounds!r}")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"expected generator to be a torch.Generator or None, got {generator!r}")
        self.bounds = bounds
        full_shape = (classes * per_class, *shape)
        if isinstance(initial, Tensor):
            start = self._unbounded(initial.detach(), full_shape)
        else:
            if not (is_number(initial) and 0.0 <= initial < math.inf):
                raise ValueError(f"expected initial >= 0, a standard deviation, got {initial!r}")
            start = initial * torch.randn(full_shape, generator=generator)
        self.images = nn.Parameter(start, requires_grad=False)
        self.register_buffer("labels", torch.arange(classes, device=start.device).repeat_interleave(per_class))

    def natural_values(self) -> Tensor:
        """Returns the examples, [C·k, *shape]."""
        return self.images if self.bounds is None else between(self.images, *self.bounds)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns the examples [C·k, *shape] and their labels [C·k]."""
        return self.natural_values(), self.labels

    def _unbounded(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Returns the parameter for which a call returns these examples; a copy, because tuning changes it in place."""
        if not images.is_floating_point():
            raise ValueError(f"expected initial of a floating-point type, got {images.dtype}; divide bytes by 255")
        if tuple(images.shape) != shape:
            raise ValueError(f"expected initial of shape {shape}, classes·per_class images, got {tuple(images.shape)}")
        if not bool(images.isfinite().all()):
            raise ValueError("expected finite values in initial, got NaN or infinity")
        if self.bounds is None:
            return images.clone()
        lowest, highest = self.bounds
        low, high = images.aminmax()
        if low < lowest or high > highest:
            raise ValueError(f"expected initial between {lowest} and {highest}, got {float(low)} to {float(high)}")
        return torch.logit((images - lowest) / (highest - lowest), eps=_MARGIN)

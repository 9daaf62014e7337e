"""A small set of synthetic training examples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.validation import is_ascending, is_number, require_at_least, require_shape

# Of the range between two bounds: nearer to one a sigmoid has next to no slope, and a pixel would never leave it.
_MARGIN = 0.01


class DistilledData(nn.Module):
    """Learned training examples, a few of each class: dataset distillation (Lorraine, Vicol, Duvenaud 2019, section 5).

    Train on what a call returns, and the examples become such that training on them alone pays on the outer data. Give
    the inner loss a little weight decay: a model that fits a few examples perfectly has no minimum otherwise.

    Args:
        shape: Of an example, such as (1, 28, 28).
        classes: C, number of classes, at least 1.
        per_class: k, examples of each class, at least 1.
        initial: Where to start: standard deviation of normal noise, or a tensor [C·k, *shape], sorted by class.
        bounds: (lowest, highest) value of a pixel, kept by a sigmoid; noise is then that of its argument, so that it
            lies about the middle. Values of a tensor within 1 % of a bound are moved 1 % away from it. None for no
            bounds.
        generator: Of the noise; None for torch's own.

    Attributes:
        images: What is tuned, [C·k, *shape]: the examples, or with bounds their logits.
        labels: [C·k], integer, sorted.

    Shape:
        - output: (images [C·k, *shape], labels [C·k]).

    Raises:
        ValueError: If an argument is out of range, or `initial` has another shape or leaves the bounds.

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
        wanted = (classes * per_class, *shape)
        if isinstance(initial, Tensor):
            start = self._unbounded(_checked(initial, wanted))
        else:
            if not (is_number(initial) and 0.0 <= initial < math.inf):
                raise ValueError(f"expected initial >= 0, a standard deviation, got {initial!r}")
            start = initial * torch.randn(wanted, generator=generator)
        self.images = nn.Parameter(start, requires_grad=False)
        labels = torch.arange(classes, device=start.device).repeat_interleave(per_class)
        self.register_buffer("labels", labels)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns the examples and their labels."""
        if self.bounds is None:
            return self.images, self.labels
        lowest, highest = self.bounds
        return lowest + (highest - lowest) * torch.sigmoid(self.images), self.labels

    def _unbounded(self, images: Tensor) -> Tensor:
        """Returns the parameter that stands for these examples."""
        if self.bounds is None:
            return images
        lowest, highest = self.bounds
        low, high = images.aminmax()
        if low < lowest or high > highest:
            raise ValueError(f"expected initial between {lowest} and {highest}, got {float(low)} to {float(high)}")
        return torch.logit((images - lowest) / (highest - lowest), eps=_MARGIN)


def _checked(initial: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a copy, which tuning may change."""
    if not initial.is_floating_point():
        raise ValueError(f"expected initial of a floating-point type, got {initial.dtype}; images of bytes: / 255")
    if tuple(initial.shape) != shape:
        raise ValueError(f"expected initial of shape {shape}, classes · per_class examples, got {tuple(initial.shape)}")
    if not bool(initial.isfinite().all()):
        raise ValueError("expected finite values in initial, got NaN or infinity")
    return initial.detach().clone()

"""Checks of arguments that many constructors share. A value of a wrong type fails every check."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real

import torch
from torch import Tensor


def is_number(value: object) -> bool:
    """True for real numbers, NaN included; False for bools."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_ascending(*values: object) -> bool:
    """True if all values are numbers and each is larger than the one before; False with a NaN."""
    return all(map(is_number, values)) and all(left < right for left, right in pairwise(values))  # type: ignore[operator]


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raises ValueError unless the value is an integer >= minimum."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"expected {name} to be an integer >= {minimum}, got {value!r}")


def require_broadcastable(name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises ValueError unless values of a shape broadcast to an input of the wanted shape."""
    sizes = zip(reversed(shape), reversed(wanted), strict=False)
    if len(shape) > len(wanted) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(f"{name} of shape {tuple(shape)} do not broadcast to an input of shape {tuple(wanted)}")


def require_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"expected {name} to be one of {tuple(choices)}, got {value!r}")


def require_flag(name: str, value: object) -> None:
    """Raises ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} to be True or False, got {value!r}")


def require_fraction(name: str, value: float | None) -> None:
    """Raises ValueError unless the value is None or lies in [0, 1)."""
    if value is not None and not (is_number(value) and 0.0 <= value < 1.0):
        raise ValueError(f"expected 0 <= {name} < 1 or None, got {value!r}")


def require_shape(name: str, value: Iterable[int]) -> None:
    """Raises ValueError unless the value is a tuple or a list of positive integers; it may be empty."""
    if not isinstance(value, (tuple, list)) or not all(isinstance(size, int) and size >= 1 for size in value):
        raise ValueError(f"expected {name} to be a tuple of positive sizes, got {value!r}")


def require_classified(logits: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless logits are finite [n, C] with C >= 2, and labels integers [n] from 0 to C − 1."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < 2 or not bool(logits.isfinite().all()):
        came = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"expected finite logits [n, C] of at least two classes, got {came}")
    require_labels("labels", labels, logits.shape[1])
    if len(labels) != len(logits):
        raise ValueError(f"expected labels of shape {(len(logits),)}, as there are logits, got {tuple(labels.shape)}")


def require_labels(name: str, labels: Tensor, classes: int) -> None:
    """Raises ValueError unless labels are integers [n] from 0 to classes − 1, with n >= 1."""
    is_vector = isinstance(labels, Tensor) and labels.ndim == 1 and labels.numel() > 0
    if not is_vector or labels.is_floating_point() or labels.dtype == torch.bool:
        came = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"expected {name} to be an integer tensor [n], got {came}")
    low, high = labels.aminmax()
    if low < 0 or high >= classes:
        raise ValueError(f"expected {name} from 0 to {classes - 1}, got {int(low)} to {int(high)}")

"""Lengths of vectors, also of very long and very short ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHUNK = 2**18  # entries
_POWER_OF_TWO = 2.0**64  # its products are exact, and it lifts denormal numbers of float32 and float64 far above them


def length(vector: Tensor) -> float:
    """Returns the Euclidean norm of all entries, also where their squares under- or overflow."""
    flat = vector.flatten().to(wide(vector))
    squared, bounds = float(flat @ flat), torch.finfo(flat.dtype)
    # the square is exact to rounding unless many entries underflow
    if bounds.tiny / bounds.eps < squared < math.inf:
        return math.sqrt(squared)
    longest = largest(flat)
    if longest == 0.0 or not math.isfinite(longest):
        return longest
    return longest * float(torch.linalg.vector_norm(divided(flat, longest)))


def divided(vector: Tensor, number: float) -> Tensor:
    """Returns a vector over a number > 0, also one so small that its reciprocal overflows.

    CUDA divides by a number by a product with its reciprocal, which is infinite for most denormal numbers: 1 / 1e-39 is
    beyond the range of float32.
    """
    if number >= torch.finfo(wide(vector)).tiny:
        return vector / number
    return (vector * _POWER_OF_TWO) / (number * _POWER_OF_TWO)


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Returns all entries as one vector; a single tensor, which may be large, is not copied."""
    parts = [tensor.reshape(-1) for tensor in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def wide(tensor: Tensor) -> torch.dtype:
    """Returns a dtype in which to sum the entries of a tensor: float32 for half precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def largest(vector: Tensor) -> float:
    """Returns the largest absolute value of the entries; NaN if there is one.

    `torch.linalg.vector_norm(vector, math.inf)` is twenty times slower.
    """
    if not vector.numel():
        return 0.0
    least, most = torch.stack(torch.aminmax(vector)).tolist()
    return max(abs(least), abs(most)) if least == least else math.nan


def weighted_square(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x·Wx for a diagonal W ≥ 0, a number or [n]: a scalar."""
    if weight.ndim == 0:
        return weight * (x @ x)
    return _summed(lambda x, weight: (x * weight) @ x, x, weight)


def inverse_weighted_square(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x·W⁻¹x for a diagonal W ≥ 0, a number or [n], without entries where W is zero: a scalar."""
    if weight.ndim == 0:
        return torch.where(weight > 0.0, (x @ x) / weight, 0.0)
    if bool(weight.amin() > 0.0):
        return _summed(lambda x, weight: (x / weight) @ x, x, weight)
    return _summed(lambda x, weight: torch.where(weight > 0.0, x / weight, 0.0) @ x, x, weight)


def overlap(x: Tensor, y: Tensor) -> float:
    """Returns Σ|xᵢyᵢ| over all entries of two tensors of the same shape."""
    return float(_summed(lambda x, y: (x * y).abs_().sum(dtype=wide(x)), x.reshape(-1), y.reshape(-1)))


def _summed(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Returns the sum of a function; on a CPU over chunks in the cache, as a new vector takes longer than a product."""
    if x.device.type != "cpu" or len(x) <= _CHUNK:
        return function(x, y)
    pairs = zip(torch.split(x, _CHUNK), torch.split(y, _CHUNK), strict=True)
    return torch.stack([function(*pair) for pair in pairs]).sum()

"""Where the tests compute, and in which precision, as two environment variables ask for.

LIGHTNING_IFTHPO_TEST_DEVICE=cuda:0 runs tensors and Trainers there; the default is the CPU.
LIGHTNING_IFTHPO_TEST_DTYPE=float32 runs the numerical tests in that precision; the default is float64.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device(os.environ.get("LIGHTNING_IFTHPO_TEST_DEVICE", "cpu"))
DTYPE: torch.dtype = getattr(torch, os.environ.get("LIGHTNING_IFTHPO_TEST_DTYPE", "float64"))

# keyword arguments of torch's factories, of modules and of Tensor.to
WHERE: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
FLOAT64: dict[str, Any] = {"device": DEVICE, "dtype": torch.float64}  # for tests that compare with differences


def within(in_float64: float, *, power: float = 1.0) -> float:
    """Returns the tolerance for the dtype in use: rounding grows with eps, the error of differences with a power of it.

    Args:
        in_float64: The tolerance in float64.
        power: 2/3 for central differences at the step that balances truncation and rounding.
    """
    return in_float64 * (torch.finfo(DTYPE).eps / torch.finfo(torch.float64).eps) ** power


def randn(*shape: int, seed: int, dtype: torch.dtype = DTYPE) -> Tensor:
    """Returns standard normal numbers that are the same on every device."""
    numbers = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return numbers.to(DEVICE, dtype)

"""Where the tests compute, and in which precision, as two environment variables ask for.

LIGHTNING_IFTHPO_TEST_DEVICE=cuda:0 runs tensors and Trainers there; the default is the CPU.
LIGHTNING_IFTHPO_TEST_DTYPE=float32 runs the numerical tests in that precision; the default is float64.
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("LIGHTNING_IFTHPO_TEST_DEVICE", "cpu"))
ON_CUDA = DEVICE.type == "cuda"
DTYPE: torch.dtype = getattr(torch, os.environ.get("LIGHTNING_IFTHPO_TEST_DTYPE", "float64"))

# keyword arguments of torch's factories, of modules and of Tensor.to
WHERE: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE}
FLOAT64: dict[str, Any] = {"device": DEVICE, "dtype": torch.float64}  # for tests that compare with differences

RandomState: TypeAlias = tuple[Tensor, ...]


def deterministic() -> None:
    """Asks CUDA for kernels that do the same each time, where there are any, and for float32 without shortcuts.

    It has to be called before CUDA starts.
    """
    if ON_CUDA:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which costs time, and hides mistakes
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False


class ByReciprocals(TorchFunctionMode):
    """Divides by a number as CUDA does, on any device: by a product with its reciprocal, rounded to the dtype."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.div, Tensor.__truediv__, torch.div) and isinstance(args[1], (int, float)):
            reciprocal = torch.tensor(1.0 / args[1], dtype=torch.float64)
            # half precision is computed in float32
            return args[0] * reciprocal.to(torch.promote_types(args[0].dtype, torch.float32)).item()
        return function(*args, **(kwargs or {}))


def random_state() -> RandomState:
    """Returns the states of torch's generators: the CPU's, and that of DEVICE if it has its own."""
    return (torch.get_rng_state(), torch.cuda.get_rng_state(DEVICE)) if ON_CUDA else (torch.get_rng_state(),)


def set_random_state(state: RandomState) -> None:
    """Sets what `random_state` has returned."""
    torch.set_rng_state(state[0])
    if ON_CUDA:
        torch.cuda.set_rng_state(state[1], DEVICE)


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

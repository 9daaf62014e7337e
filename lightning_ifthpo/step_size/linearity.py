"""A check that the update of an optimizer is proportional to its learning rate."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor
from torch.optim import Optimizer, SparseAdam


def check_linear_in_lr(optimizer: Optimizer) -> None:
    """Raises ValueError unless an optimizer's update is proportional to its learning rate.

    The third step of an optimizer of the same class and options, on a 2 × 2 matrix, is compared at the learning rates
    0.01 and 1. ExactGeN reads updates at 1.

    >>> import torch
    >>> weights = [torch.zeros(3, requires_grad=True)]
    >>> check_linear_in_lr(torch.optim.AdamW(weights, lr=1e-3))
    >>> check_linear_in_lr(torch.optim.Rprop(weights))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: ...
    """
    name = type(optimizer).__name__
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(f"ExactGeN lowers a loss, and this {name} maximizes; minimize the negative instead")
    sparse = isinstance(optimizer, SparseAdam)  # which takes no other gradients
    try:
        small, full = (_third_update(optimizer, rate, sparse) for rate in (0.01, 1.0))
    except Exception as error:
        raise ValueError(
            f"ExactGeN repeats optimizer steps at another learning rate, and {name} cannot do that: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not torch.allclose(100 * small, full, rtol=1e-6, atol=1e-12) or not bool(small.any()):
        raise ValueError(
            f"the update of {name} is not linear in its learning rate, and ExactGeN needs that: use SGD, Adam, AdamW "
            "or a similar one"
        )


def _third_update(optimizer: Optimizer, rate: float, sparse: bool) -> Tensor:
    """Returns the third update, at the given rate, of a new optimizer of the same class and options."""
    weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).view(2, 2).requires_grad_()
    accepted = inspect.signature(type(optimizer).__init__).parameters
    rejected = ("lr", "params", "fused", "foreach", "capturable", "differentiable")
    group = optimizer.param_groups[0]
    options = {key: copy.copy(group[key]) for key in group if key in accepted and key not in rejected}
    twin = type(optimizer)([weight], **({"lr": 0.01} | options))
    for gradient, lr in ((0.3, 0.01), (-0.7, 0.01), (0.4, rate)):
        slope = gradient * torch.linspace(1.0, 2.0, 4, dtype=torch.float64).view(2, 2)
        weight.grad = slope.to_sparse() if sparse else slope
        twin.param_groups[0]["lr"] = lr
        before = weight.detach().clone()
        twin.step()
    return before - weight.detach()

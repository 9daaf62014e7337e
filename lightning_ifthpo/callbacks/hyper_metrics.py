"""Metrics of a hyper step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.core.vectors import length
from lightning_ifthpo.hypergradients import Hypergradient


def result_metrics(result: Hypergradient) -> dict[str, float]:
    """Returns the metrics of a hypergradient and its linear solve, without a residual that nothing has measured."""
    residual = result.relative_residual
    measured = {} if residual is None else {"hypergrad/residual": residual}
    return {
        "hypergrad/norm": _norm(result.gradients),
        "hypergrad/direct_norm": _norm(result.direct),
        "hypergrad/indirect_norm": _norm(result.indirect),
        "hypergrad/outer_loss": float(result.outer_loss),
        **measured,
        "hypergrad/products": float(result.products + result.solution.extra_products),
    }


def summaries(module: Any) -> dict[str, float]:
    """Returns mean, minimum and maximum of each registered tensor, or of all tensors of a registered module."""
    found: dict[str, float] = {}
    for name, members in groupby(module.named_hyperparameters(), lambda member: member[0].split(".")[0]):
        parts = [parameter.detach().reshape(-1) for _, parameter in members]
        flat = parts[0] if len(parts) == 1 else torch.cat(parts)
        statistics = torch.stack([flat.mean(), *torch.aminmax(flat)]).tolist()
        names = [f"hyperparameter/{name}/{statistic}" for statistic in ("mean", "min", "max")]
        found |= dict(zip(names, statistics, strict=True))
    return found


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*map(length, tensors))

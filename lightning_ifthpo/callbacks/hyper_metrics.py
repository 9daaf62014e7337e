"""Metrics of a hyper step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

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
        flat = torch.cat([parameter.detach().reshape(-1) for _, parameter in members])
        statistics = torch.stack([flat.mean(), flat.min(), flat.max()]).tolist()
        names = [f"hyperparameter/{name}/{statistic}" for statistic in ("mean", "min", "max")]
        found |= dict(zip(names, statistics, strict=True))
    return found


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.reshape(-1) for tensor in tensors])))

"""Metrics of a hyper step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.core.vectors import flattened, length
from lightning_ifthpo.hypergradients import Hypergradient

_FEW = 24  # entries that are logged one by one
_NAMED = 5  # numbers that have room in a line of the summary


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
    """Returns mean, minimum and maximum of each hyperparameter in natural units, and the parts of one with few parts.

    A part is an entry of a vector, or a scalar with a name of its own.
    """
    found: dict[str, float] = {}
    for name, parts, flat in _natural_values(module):
        has_few = 1 < len(flat) <= _FEW and all(part.ndim <= 1 for part in parts.values())
        numbers = dict(zip(_part_names(parts), flat, strict=True)) if has_few else {}
        numbers |= dict(zip(("mean", "min", "max"), _extent(flat), strict=True))
        plain = torch.stack(list(numbers.values())).tolist()
        found |= {f"hyperparameter/{name}/{key}": value for key, value in zip(numbers, plain, strict=True)}
    return found


def extents(module: Any) -> dict[str, tuple[float, float, float]]:
    """Returns mean, minimum and maximum of each hyperparameter of a module, in natural units."""
    found = {}
    for name, _, flat in _natural_values(module):
        mean, least, most = torch.stack(_extent(flat)).tolist()
        found[name] = (mean, least, most)
    return found


def named_numbers(module: Any) -> dict[str, dict[str, float]]:
    """Returns the numbers of each hyperparameter that has a few with names of their own, in natural units."""
    found = {}
    for name, parts, flat in _natural_values(module):
        if 1 < len(parts) == len(flat) <= _NAMED:
            found[name] = dict(zip(parts, flat.tolist(), strict=True))
    return found


def many(module: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and all values, in natural units, of each hyperparameter that is not logged one by one."""
    for name, _, flat in _natural_values(module):
        if len(flat) > _FEW:
            yield name, flat


def _natural_values(module: Any) -> Iterator[tuple[str, Mapping[str, Tensor], Tensor]]:
    """Yields each hyperparameter's name, its parts in natural units, and all of their entries as one vector."""
    for name, values in module.named_natural_values():
        parts = values if isinstance(values, dict) else {"": values}
        yield name, parts, flattened(list(parts.values()))


def _extent(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return flat.mean(), flat.amin(), flat.amax()


def _part_names(parts: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields a name for each entry of each part."""
    for name, part in parts.items():
        if part.ndim == 0:
            yield name
        else:
            yield from (f"{name}/{index}" if name else str(index) for index in range(len(part)))


def _norm(tensors: Sequence[Tensor]) -> float:
    return length(flattened(tensors))

"""Norms of gradients, how far each layer moves, and the gradient noise scale; nothing is changed."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ifthpo.core.vectors import wide

_SAMPLE = 4096  # entries of a tensor whose movement is measured
_MOST = 500  # tensors
_UNITS = 64  # rows of a tensor of which it is known in which measurements they had no gradient
_WINDOW = 8  # of these measurements; a unit of a ReLU layer gets none from half of all examples


@dataclass
class LayerRecord:
    """What was seen of one tensor of weights, over all measurements.

    Attributes:
        measurements: Number of measurements.
        without_gradient: In how many of the last ones, in a row, it had no gradient at all.
        zero_gradient: The same for a gradient that was exactly zero.
        unmoved: The same for an optimizer step that left it exactly as it was.
        rows: Number of rows that are looked at one by one, at equal distances; 0 if rows are no units.
        zero_rows: For the last measurements, these rows with a gradient of exactly zero, as the bits of a number.
        gradient: Length of the last gradient.
        ratio: Length of the last update over the length of the weights, from a sample of entries.
        norm: Length of the weights now; first_norm at the first measurement, least_norm the smallest.
    """

    measurements: int = 0
    without_gradient: int = 0
    zero_gradient: int = 0
    unmoved: int = 0
    rows: int = 0
    zero_rows: list[int] = field(default_factory=list)
    gradient: float = math.nan
    ratio: float = math.nan
    norm: float = math.nan
    first_norm: float = math.nan
    least_norm: float = math.inf

    @property
    def dead_units(self) -> float:
        """Share of the rows without a gradient in each of the last measurements; NaN if these are too few."""
        if not self.rows or len(self.zero_rows) < _WINDOW:
            return math.nan
        return functools.reduce(operator.and_, self.zero_rows).bit_count() / self.rows


class LayerWatch:
    """Measures each tensor of weights around an optimizer step.

    Cost of a measurement: a pass over weights and gradients, copies of at most 4,096 entries of each tensor, and two
    device synchronizations.

    Attributes:
        layers: What was seen, by name.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecord] = {}
        self._before: list[tuple[LayerRecord, nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def before_step(self, named: Iterable[tuple[str, nn.Parameter]], units: frozenset[int]) -> None:
        """Looks at gradients, and keeps a sample of the weights.

        Args:
            named: The trainable weights, of which the first 500 are measured.
            units: Ids of weights with a row for each unit; not those of which a batch uses some rows, as an embedding.
        """
        self._before, facts = [], []
        for name, weight in list(named)[:_MOST]:
            layer = self.layers.setdefault(name, LayerRecord())
            layer.measurements += 1
            self._before.append((layer, weight, _sample(weight).clone()))
            layer.rows = min(_UNITS, len(weight)) if id(weight) in units else 0
            facts.append(torch.cat([_norm(weight.detach()).reshape(1), _gradient_facts(weight, layer.rows)]))
        for (layer, weight, _), (norm, gradient, *zero) in zip(self._before, _read(facts), strict=True):
            layer.norm, layer.gradient = norm, gradient
            layer.least_norm = min(norm, layer.least_norm)
            layer.first_norm = norm if math.isnan(layer.first_norm) else layer.first_norm
            has_gradient = weight.grad is not None
            layer.without_gradient = 0 if has_gradient else layer.without_gradient + 1
            layer.zero_gradient = layer.zero_gradient + 1 if has_gradient and gradient == 0.0 else 0
            layer.zero_rows = [*layer.zero_rows, sum(int(bit) << row for row, bit in enumerate(zero))][-_WINDOW:]

    @torch.no_grad()
    def after_step(self) -> None:
        """Compares the weights with the sample."""
        facts = []
        for _, weight, before in self._before:
            facts.append(torch.stack([_norm(_sample(weight) - before), _norm(before)]))
        for (layer, _, _), (moved, norm) in zip(self._before, _read(facts), strict=True):
            layer.unmoved = layer.unmoved + 1 if moved == 0.0 else 0
            layer.ratio = moved / norm if norm else math.nan
        self._before = []

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers."""
        return {name: asdict(layer) for name, layer in self.layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.layers = {name: LayerRecord(**values) for name, values in state.items()}


class NoiseScale:
    """The gradient noise scale from norms of the gradients of one micro-batch and of all of them.

    With |g_b|² the squared norm of the gradient of b micro-batches, |G|² = (B |g_B|² − |g_1|²) / (B − 1) and
    S = (|g_1|² − |g_B|²) / (1 − 1/B) are unbiased. The ratio of their means, S / |G|², is the batch size from which on
    a larger one hardly helps (McCandlish et al. 2018, appendix A), here in micro-batches.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self._signal = self._noise = 0.0

    def add(self, small: float, big: float, micro_batches: int) -> None:
        """Adds a pair of norms, not squared; one that is not finite is left out.

        Args:
            small: Norm of the gradient of one micro-batch.
            big: Norm of the mean gradient of all of them.
            micro_batches: Their number B, at least 2.
        """
        if not (math.isfinite(small) and math.isfinite(big)):
            return
        self.pairs += 1
        self._signal += (micro_batches * big**2 - small**2) / (micro_batches - 1)
        self._noise += (small**2 - big**2) / (1.0 - 1.0 / micro_batches)

    @property
    def micro_batches(self) -> float:
        """The noise scale in micro-batches; infinite if no gradient rises above the noise, NaN without data."""
        if not self.pairs or self._noise <= 0.0:
            return math.nan
        return self._noise / self._signal if self._signal > 0.0 else math.inf

    def state_dict(self) -> list[float]:
        """Returns everything that resuming needs, as plain numbers."""
        return [self.pairs, self._signal, self._noise]

    def load_state_dict(self, state: Sequence[float]) -> None:
        """Restores a result of `state_dict`."""
        self.pairs, self._signal, self._noise = int(state[0]), state[1], state[2]


@torch.no_grad()
def gradient_norm(weights: Iterable[Tensor]) -> float:
    """Returns the norm of all gradients together; NaN without one. Cost: one pass, and one synchronization."""
    norms = [_norm(weight.grad) for weight in weights if weight.grad is not None]
    if not norms:
        return math.nan
    device = norms[0].device
    return float(torch.linalg.vector_norm(torch.stack([norm.to(device) for norm in norms])))


def _gradient_facts(weight: Tensor, rows: int) -> Tensor:
    """Returns the norm of a gradient, and for some rows whether they are zero: [1 + 64], zeros behind the last row."""
    facts = torch.zeros(1 + _UNITS, device=weight.device)
    gradient = weight.grad
    if gradient is not None:
        facts[0] = _norm(gradient)
        if rows and gradient.layout is torch.strided:
            some = gradient[:: len(gradient) // rows][:rows]
            facts[1 : 1 + rows] = ~some.flatten(1).any(dim=1)
    return facts


def _norm(tensor: Tensor) -> Tensor:
    """Returns the length of all entries, as a real float32 scalar."""
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values()
    dtype = None if tensor.is_complex() else wide(tensor)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.float()


def _sample(weight: Tensor) -> Tensor:
    """Returns at most 4,096 entries at equal distances; a view if the weight is contiguous."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, math.ceil(len(flat) / _SAMPLE))]


def _read(rows: Sequence[Tensor]) -> list[list[float]]:
    """Returns rows of numbers by one synchronization for each device."""
    if not rows:
        return []
    if len({row.device for row in rows}) > 1:
        rows = [row.cpu() for row in rows]
    return torch.stack(list(rows)).tolist()

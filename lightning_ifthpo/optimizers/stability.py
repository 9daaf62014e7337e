"""The curvature at which an optimizer stops being stable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.optimizers.update_rule import (
    concatenate_or_scalar,
    is_decoupled,
    is_known,
    iter_parameters,
    learning_rate,
    preconditioner,
)


@dataclass(frozen=True)
class StabilityEdge:
    """Beyond this curvature an optimizer, on the quadratic model of the loss, oscillates with growing amplitude.

    At the edge the weights repeat with period two, and the gradient alternates: +g, −g, … An update rule answers an
    alternating gradient with a step of length a for each unit of g, in the opposite direction to the last, so that the
    edge lies where a·λ = 2: for gradient descent a = η and the edge is 2/η; for heavy ball a = η/(1 + β); for torch's
    Nesterov form a = η(1 + 2β)/(1 + β); for Adam-like optimizers a = η(1 − β₁)/(1 + β₁) times the preconditioner. With
    a different a for each weight the edge is where the largest eigenvalue of A^½ H A^½ is 2, A = diag(a); this is
    exact on a quadratic, with several groups too (Cohen et al. 2021, 2022 for one).

    Attributes:
        sharpness: The edge for curvature measured in the metric below, loss / parameter²; infinite at a learning rate
            of zero.
        metric: P = diag(p), [n]: the preconditioner, times the rate of each group over the highest rate; None where it
            is one for all weights. λ_max of P^½ H P^½ is what the edge bounds.
        decay: p times the weight decay that the optimizer adds to the gradient, a number or [n].

    >>> weight = torch.zeros(3, requires_grad=True)
    >>> StabilityEdge.of(torch.optim.SGD([weight], lr=0.1, momentum=0.5), [weight]).sharpness
    30.0
    """

    sharpness: float
    metric: Tensor | None = field(default=None, repr=False)
    decay: float | Tensor = field(default=0.0, repr=False)

    def ratio(self, lambda_max: float, vector: Tensor) -> float:
        """Returns 1 at the edge, less where training is stable.

        The optimizer's own weight decay is curvature too, which shifts λ_max by vᵀ(decay ∘ v): exactly if it is the
        same for all weights, to first order otherwise.

        Args:
            lambda_max: The largest eigenvalue of the loss's curvature in the metric.
            vector: Its unit eigenvector v, [n].
        """
        return (lambda_max + float((self.decay * vector) @ vector)) / self.sharpness

    @classmethod
    def of(cls, optimizers: Optimizer | Iterable[Optimizer], parameters: Iterable[Tensor]) -> StabilityEdge | None:
        """Returns the edge at this moment, None where an optimizer has none that is known; see `has_edge`.

        Args:
            optimizers: The one that trains the parameters, or several.
            parameters: The tensors w, together [n]; those that no optimizer holds do not move, and have p = 0.
        """
        rates: dict[int, float] = {}
        metrics: dict[int, float | Tensor] = {}
        decays: dict[int, float] = {}
        parameters = list(parameters)
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        if not all(map(has_edge, optimizers)):
            return None
        for optimizer, group, state, parameter in iter_parameters(optimizers):
            rates[id(parameter)] = _alternating_rate(optimizer, group, state)
            metrics[id(parameter)] = preconditioner(optimizer, group, state)
            decays[id(parameter)] = 0.0 if is_decoupled(optimizer, group) else float(group["weight_decay"])
        highest = max((rates.get(id(p), 0.0) for p in parameters), default=0.0)
        if highest == 0.0:  # in the metric of the preconditioner alone, nothing is unstable
            rates = dict.fromkeys(rates, 1.0)
        space = ParameterSpace(parameters)
        metric = concatenate_or_scalar(
            space, [metrics.get(id(p), 0.0) * (rates.get(id(p), 0.0) / (highest or 1.0)) for p in parameters]
        )
        decay = concatenate_or_scalar(space, [decays.get(id(p), 0.0) for p in parameters])
        plain = not isinstance(metric, Tensor) and metric == 1.0
        vector = torch.as_tensor(metric, dtype=space.dtype, device=space.device).expand(space.size)
        return cls(2.0 / highest if highest else math.inf, None if plain else vector, metric * decay)


def has_edge(optimizer: Optimizer) -> bool:
    """Returns whether the stability edge of an optimizer is known: if its update is, and it minimizes."""
    return is_known(optimizer) and not any(group.get("maximize") for group in optimizer.param_groups)


def _alternating_rate(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Returns a without the preconditioner: the step that answers each unit of an alternating gradient."""
    rate = learning_rate(optimizer, group, state)
    if isinstance(optimizer, (SGD, RMSprop)):
        beta = float(group["momentum"])
        velocity = (1.0 - float(group.get("dampening", 0.0))) / (1.0 + beta) if beta else 1.0
        answer = 1.0 + beta * velocity if group.get("nesterov") else velocity
    elif isinstance(optimizer, (Adam, AdamW, NAdam)):
        beta = float(group["betas"][0])
        mean = (1.0 - beta) / (1.0 + beta)
        if isinstance(optimizer, NAdam):
            step = float(state.get("step", 0.0))
            momentum = beta * (1.0 - 0.5 * 0.96 ** ((step + 1.0) * float(group["momentum_decay"])))
            answer = 1.0 - momentum + momentum * mean
        else:
            answer = mean / (1.0 - beta ** float(state.get("step", math.inf)))
    else:
        answer = 1.0
    if is_decoupled(optimizer, group):  # w ← (1 − ηd)w − …, and −2w is a little less far from (1 − ηd)w
        # from ηd = 2 on the decay alone diverges, which a very small divisor stands for
        answer /= max(1.0 - rate * float(group["weight_decay"]) / 2.0, 1e-9)
    return rate * answer

"""The curvature at which an optimizer becomes unstable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.optimizers.known import Response, is_known, responses
from lightning_ifthpo.optimizers.update_rule import concatenate_or_scalar


@dataclass(frozen=True)
class StabilityEdge:
    """The curvature beyond which an optimizer, on the quadratic model of the loss, oscillates with growing amplitude.

    At the edge the gradient alternates: +g, −g, … A step of length a per unit of g changes it by 2g, so that a·λ = 2.
    Gradient descent has a = η and the edge 2/η; heavy ball a = η/(1 + β); torch's Nesterov form a = η(1 + 2β)/(1 + β);
    Adam-like optimizers a = η(1 − β₁)/(1 + β₁) times the preconditioner. If a differs between weights, the edge is
    where the largest eigenvalue of A^½ H A^½ is 2, with A = diag(a). This is exact on a quadratic, with several groups
    too (Cohen et al. 2021, 2022 for one group).

    Attributes:
        sharpness: The edge, in loss / parameter²: a bound of λ_max of P^½ H P^½; infinite at a learning rate of zero.
        metric: P = diag(p), [n]: the preconditioner times the group's rate over the highest rate; None if p is 1.
        decay: p times the weight decay that the optimizer adds to the gradient, a number or [n].

    >>> weight = torch.zeros(3, requires_grad=True)
    >>> StabilityEdge.of(torch.optim.SGD([weight], lr=0.1, momentum=0.5), [weight]).sharpness
    30.0
    """

    sharpness: float
    metric: Tensor | None = field(default=None, repr=False)
    decay: float | Tensor = field(default=0.0, repr=False)

    def ratio(self, lambda_max: float, vector: Tensor) -> float:
        """Returns λ_max over the edge: 1 at the edge, less where training is stable.

        The optimizer's weight decay shifts λ_max by vᵀ(decay ∘ v): exactly if it is the same for all weights, to first
        order otherwise.

        Args:
            lambda_max: The largest eigenvalue of the loss's curvature in the metric.
            vector: Its unit eigenvector v, [n].
        """
        return (lambda_max + float((self.decay * vector) @ vector)) / self.sharpness

    @classmethod
    def of(cls, optimizers: Optimizer | Iterable[Optimizer], parameters: Iterable[Tensor]) -> StabilityEdge | None:
        """Returns the edge for the optimizers' present state; None if one of them has no known edge (`has_edge`).

        Args:
            optimizers: The optimizer that trains the parameters, or several.
            parameters: The tensors w, together [n]; those in no optimizer do not move, and have p = 0.
        """
        parameters = list(parameters)
        optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        if not all(map(has_edge, optimizers)):
            return None
        answers = responses(optimizers, parameters)
        rates = [_alternating_step(answer) for answer in answers]
        highest = max(rates, default=0.0)
        space = ParameterSpace(parameters)
        pairs = zip(answers, rates, strict=True)
        scales = [answer.preconditioner * (rate / highest if highest else 1.0) for answer, rate in pairs]
        metric = concatenate_or_scalar(space, scales)
        decay = concatenate_or_scalar(space, [0.0 if answer.decoupled else answer.weight_decay for answer in answers])
        plain = not isinstance(metric, Tensor) and metric == 1.0
        vector = torch.as_tensor(metric, dtype=space.dtype, device=space.device).expand(space.size)
        return cls(2.0 / highest if highest else math.inf, None if plain else vector, metric * decay)


def has_edge(optimizer: Optimizer) -> bool:
    """Returns whether the stability edge of an optimizer is known: it must be known (`is_known`) and must minimize.

    >>> import torch
    >>> weights = [torch.zeros(3, requires_grad=True)]
    >>> has_edge(torch.optim.AdamW(weights)), has_edge(torch.optim.LBFGS(weights))
    (True, False)
    """
    return is_known(optimizer) and not any(group.get("maximize") for group in optimizer.param_groups)


def _alternating_step(answer: Response) -> float:
    """Returns a without the preconditioner: the step per unit of an alternating gradient."""
    rate, gain = answer.learning_rate, answer.alternating_gain
    if answer.decoupled:
        # w ← (1 − ηd)w − ηu has period two where ηu = (2 − ηd)w: the gain grows by 1 / (1 − ηd/2). For ηd ≥ 2 the decay
        # alone diverges; then 1e-9 sets the edge to a billionth, without a division by zero.
        gain /= max(1.0 - rate * answer.weight_decay / 2.0, 1e-9)
    return rate * gain

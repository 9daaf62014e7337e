"""The inner optimizer as a linear rule: step and weight decay for each weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.core.vectors import wide
from lightning_ifthpo.optimizers.known import responses


@dataclass(frozen=True)
class UpdateRule:
    """The linear rule w ← (1 − c)∘w − s∘(g + d∘w) that stands for an optimizer: what a gradient g does in the long run.

    Attributes:
        step_size: s = lr · preconditioner / (1 − β) for momentum β, a number or [n]; in parameter² / loss.
        decay: d, the weight decay that is added to the gradient: a number or [n]; in loss / parameter².
        shrinkage: c, the decoupled weight decay, by which a step shrinks the weights: a number or [n], without a unit.

    >>> round(UpdateRule(step_size=1.0).damping(horizon=100), 6)
    0.01
    """

    step_size: float | Tensor
    decay: float | Tensor = 0.0
    shrinkage: float | Tensor = 0.0

    def damping(self, horizon: float = math.inf) -> float | Tensor:
        """Returns d + c/s + 1/(s · horizon), a number or [n]: with it H⁻¹ looks `horizon` training steps ahead.

        After T steps a direction of curvature h has gone a fraction 1 − (1 − sh)ᵀ of its way to the minimum, and
        h / (h + 1/(sT)) is close to that. The decay of the optimizer acts like curvature. A weight that no optimizer
        moves gets the damping of the smallest step.
        """
        pull = self.shrinkage + 1.0 / horizon
        if not isinstance(self.step_size, Tensor):
            return pull / (self.step_size or 1.0) + self.decay
        if not isinstance(pull, Tensor) and pull == 0.0:
            return self.decay
        slowest = self.step_size.amin()
        if not slowest > 0.0:
            slowest = torch.where(self.step_size > 0.0, self.step_size, math.inf).amin().nan_to_num(posinf=1.0)
        # a tensor, because torch divides a number by a tensor as number · 1/s, and in float16 1/s overflows first
        damping = torch.as_tensor(pull, dtype=wide(slowest), device=slowest.device) / self.step_size.clamp(min=slowest)
        return damping if not isinstance(self.decay, Tensor) and self.decay == 0.0 else damping.add_(self.decay)

    @classmethod
    def of(cls, optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> UpdateRule:
        """Returns the rule that stands for optimizers in their present state.

        Learning rates, momentum, weight decay and diagonal preconditioners are read from the groups and the state of
        SGD, Adam, AdamW, NAdam, RMSprop and Adagrad; see `is_known`. Others count as plain gradient descent.

        Args:
            optimizers: The optimizers that train the parameters.
            parameters: The tensors w, together [n]; those in no optimizer do not move.
        """
        space = ParameterSpace(parameters)
        answers = responses(optimizers, space.tensors)
        steps = [answer.learning_rate * answer.total_gain * answer.preconditioner for answer in answers]
        decays = [0.0 if answer.decoupled else answer.weight_decay for answer in answers]
        shrinkages = [answer.learning_rate * answer.weight_decay if answer.decoupled else 0.0 for answer in answers]
        return cls(*(concatenate_or_scalar(space, values) for values in (steps, decays, shrinkages)))


def concatenate_or_scalar(space: ParameterSpace, values: Sequence[float | Tensor]) -> float | Tensor:
    """Returns one value per tensor: as a number if all are the same number, else as a vector [n] of the space."""
    first = values[0]
    if not isinstance(first, Tensor) and all(not isinstance(value, Tensor) and value == first for value in values):
        return first
    pairs = zip(values, space.tensors, strict=True)
    return space.flatten([value if isinstance(value, Tensor) else torch.full_like(p, value) for value, p in pairs])

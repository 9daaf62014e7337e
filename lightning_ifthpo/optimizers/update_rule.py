"""What the inner optimizer does to a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from lightning_ifthpo.core.space import ParameterSpace

_KNOWN = (SGD, Adam, AdamW, NAdam, RMSprop, Adagrad)


@dataclass(frozen=True)
class UpdateRule:
    """How a gradient g moves the weights in the long run, w ← w − s∘(g + d∘w).

    Attributes:
        step: s, the learning rate times the preconditioner, over 1 − β for momentum β: a number, or [n]; in
            parameter² / loss.
        decay: d, the weight decay of the optimizer itself, which is curvature that no loss knows: a number, or [n]; in
            loss / parameter².

    >>> round(UpdateRule(step=1.0).damping(horizon=100), 6)
    0.01
    """

    step: float | Tensor
    decay: float | Tensor = 0.0

    def damping(self, horizon: int) -> float | Tensor:
        """Returns 1 / (s · horizon), a number or [n]: with it H⁻¹ looks `horizon` training steps ahead.

        After T steps a direction of curvature h has gone a fraction 1 − (1 − sh)ᵀ of its way to the minimum, which
        h / (h + 1/(sT)) follows closely. A weight that no optimizer moves is damped like the slowest one that moves.
        """
        if not isinstance(self.step, Tensor):
            return 1.0 / (horizon * (self.step or 1.0))
        slowest = torch.where(self.step > 0.0, self.step, math.inf).amin().nan_to_num(posinf=1.0)
        return 1.0 / (horizon * torch.maximum(self.step, slowest))

    @classmethod
    def of(cls, optimizers: Iterable[Optimizer], parameters: Sequence[Tensor]) -> UpdateRule:
        """Returns the rule that optimizers apply to parameters at this moment.

        Learning rates, momentum, weight decay and diagonal preconditioners are read from the groups and the state of
        SGD, Adam, AdamW, NAdam, RMSprop and Adagrad; see `is_known`. Others count as gradient descent.

        Args:
            optimizers: Those that train the parameters.
            parameters: The tensors w, together [n]; those that no optimizer holds do not move.
        """
        steps: dict[int, float | Tensor] = {}
        decays: dict[int, float | Tensor] = {}
        for optimizer, group, state, parameter in iter_parameters(optimizers):
            step = _lasting_rate(optimizer, group, state) * preconditioner(optimizer, group, state)
            steps[id(parameter)] = step
            decays[id(parameter)] = _decay(optimizer, group, step)
        space = ParameterSpace(parameters)
        return cls(
            *(concatenate_or_scalar(space, [found.get(id(p), 0.0) for p in parameters]) for found in (steps, decays))
        )


def concatenate_or_scalar(space: ParameterSpace, values: Sequence[float | Tensor]) -> float | Tensor:
    """Returns what is given for each tensor of a space as one number where it is the same for all, else as [n]."""
    first = values[0]
    if not isinstance(first, Tensor) and all(not isinstance(value, Tensor) and value == first for value in values):
        return first
    pairs = zip(values, space.tensors, strict=True)
    return space.flatten([value if isinstance(value, Tensor) else torch.full_like(p, value) for value, p in pairs])


def iter_parameters(
    optimizers: Iterable[Optimizer],
) -> Iterator[tuple[Optimizer, Mapping[str, Any], Mapping[str, Any], Tensor]]:
    """Yields each parameter that optimizers hold, as (optimizer, its group, its state, the parameter)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield optimizer, group, optimizer.state.get(parameter, {}), parameter


def is_known(optimizer: Optimizer) -> bool:
    """Returns whether `UpdateRule.of` can read the optimizer's preconditioner and decay."""
    return isinstance(optimizer, _KNOWN)


def is_decoupled(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Returns whether the weight decay shrinks the weights, w ← (1 − lr·d)w, instead of entering the gradient."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))


def learning_rate(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Returns the learning rate of a parameter's next update, as a number."""
    rate = float(group["lr"])
    if isinstance(optimizer, Adagrad):
        rate /= 1.0 + float(state.get("step", 0.0)) * float(group["lr_decay"])
    return rate


def preconditioner(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> float | Tensor:
    """Returns the factor between velocity and update, shaped like the parameter; 1 where there is none."""
    if not state or isinstance(optimizer, SGD) or not is_known(optimizer):
        return 1.0
    second: Tensor
    if isinstance(optimizer, RMSprop):
        mean = state.get("grad_avg")
        second = state["square_avg"] if mean is None else (state["square_avg"] - mean.square()).clamp_min(0.0)
    elif isinstance(optimizer, Adagrad):
        second = state["sum"]
    else:
        bias_correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
        second = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / bias_correction
    return 1.0 / (second.sqrt() + float(group["eps"]))


def _lasting_rate(optimizer: Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Returns the learning rate over 1 − β, with the weight at which a new gradient enters the velocity."""
    rate = learning_rate(optimizer, group, state)
    if isinstance(optimizer, (SGD, RMSprop)) and group["momentum"]:
        rate *= (1.0 - float(group.get("dampening", 0.0))) / (1.0 - float(group["momentum"]))
    return rate


def _decay(optimizer: Optimizer, group: Mapping[str, Any], step: float | Tensor) -> float | Tensor:
    """Returns d: of a decoupled decay w ← w(1 − lr·d₀), what would act as much through the step."""
    decay = float(group.get("weight_decay", 0.0)) if is_known(optimizer) else 0.0
    if decay == 0.0 or not is_decoupled(optimizer, group):
        return decay
    return float(group["lr"]) * decay / (step.clamp_min(1e-30) if isinstance(step, Tensor) else max(step, 1e-30))

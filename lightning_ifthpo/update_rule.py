"""What one step of the inner optimizer does to a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_ifthpo.space import ParameterSpace


@dataclass(frozen=True)
class UpdateRule:
    """u ← βu + g, w ← w − s∘u for a gradient g.

    Attributes:
        step: s, the learning rate times the preconditioner: a number, or [n]; in parameter² / loss.
        momentum: β of the heavy ball, in [0, 1).

    >>> round(UpdateRule(step=0.1, momentum=0.9).damping(horizon=100), 6)
    0.01
    """

    step: float | Tensor
    momentum: float = 0.0

    @property
    def lasting_step(self) -> float | Tensor:
        """How far a gradient moves the weights in the long run, a number or [n]."""
        return self.step / (1.0 - self.momentum)

    def damping(self, horizon: int) -> float | Tensor:
        """Returns 1 / (lasting_step · horizon), a number or [n]: with it H⁻¹ looks `horizon` training steps ahead.

        After T steps a direction of curvature h has gone a fraction 1 − (1 − sh)ᵀ of its way to the minimum, which
        h / (h + 1/(sT)) follows closely. A weight that no optimizer moves is damped like the slowest one that moves.
        """
        step = self.lasting_step
        if isinstance(step, Tensor):
            step = step.clamp_min(step[step > 0].min() if bool((step > 0).any()) else 1.0)
        return 1.0 / (horizon * step)

    @classmethod
    def of(cls, optimizers: Iterable[torch.optim.Optimizer], parameters: Sequence[Tensor]) -> UpdateRule:
        """Returns the rule that optimizers apply to parameters at this moment.

        Learning rates of groups, momentum and the diagonal preconditioners of Adam, RMSprop, Adagrad and their kin are
        read from `param_groups` and `state`. An optimizer that keeps no such state counts as gradient descent.

        Args:
            optimizers: Those that train the parameters.
            parameters: The tensors w, together [n]; those that no optimizer holds do not move.
        """
        space = ParameterSpace(parameters)
        steps: dict[int, Tensor] = {}
        momenta: list[float] = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                momentum, fresh = _momentum(group)
                momenta.append(momentum)
                for parameter in group["params"]:
                    scale = float(group["lr"]) * fresh
                    steps[id(parameter)] = scale * _preconditioner(group, optimizer.state.get(parameter, {}), parameter)
        flat = space.flatten([steps.get(id(parameter)) for parameter in parameters])
        return cls(flat, max(momenta, default=0.0))


def _momentum(group: Mapping[str, Any]) -> tuple[float, float]:
    """Returns β and the weight with which a new gradient enters the velocity."""
    if "betas" in group:
        beta = float(group["betas"][0])
        return beta, 1.0 - beta
    momentum = float(group.get("momentum", 0.0))
    return momentum, 1.0 - float(group.get("dampening", 0.0)) if momentum else 1.0


def _preconditioner(group: Mapping[str, Any], state: Mapping[str, Any], parameter: Tensor) -> Tensor:
    """Returns the factor between velocity and update, shaped like the parameter."""
    eps = float(group.get("eps", 0.0))
    if "exp_avg_sq" in state:
        bias_correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
        second: Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"]) / bias_correction
    elif "square_avg" in state:
        mean = state.get("grad_avg")
        second = state["square_avg"] if mean is None else state["square_avg"] - mean.square()
    elif "sum" in state:
        second = state["sum"]
    else:
        return torch.ones_like(parameter)
    return 1.0 / (second.sqrt() + eps)

"""The table of known optimizers. To add an optimizer, write a function that returns its response, and enter it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop


@dataclass(frozen=True)
class Response:
    """The response of an optimizer to gradients g of one parameter: w ← w − ηPu, with u a running sum or average of g.

    Attributes:
        learning_rate: η of the next update.
        weight_decay: d; in loss / parameter² if it is added to the gradient, without a unit if it is decoupled.
        decoupled: Whether d shrinks the weights instead: w ← (1 − ηd)w.
        preconditioner: The diagonal of P, shaped like the parameter; 1 where there is none.
        total_gain: The sum of u over all later steps, for a single gradient of 1.
        alternating_gain: |u| in the long run, for the gradients +1, −1, …
    """

    learning_rate: float
    weight_decay: float = 0.0
    decoupled: bool = False
    preconditioner: float | Tensor = 1.0
    total_gain: float = 1.0
    alternating_gain: float = 1.0


_Dict: TypeAlias = Mapping[str, Any]


def _sgd(plain: Response, group: _Dict, state: _Dict) -> Response:
    """Heavy ball: u ← βu + (1 − dampening) g. Nesterov: the update takes g + βu."""
    momentum, new = float(group["momentum"]), 1.0 - float(group.get("dampening", 0.0))
    if not momentum:
        return plain
    alternating = new / (1.0 + momentum)
    if group.get("nesterov"):
        alternating = 1.0 + momentum * alternating
    return replace(plain, total_gain=new / (1.0 - momentum), alternating_gain=alternating)


def _rmsprop(plain: Response, group: _Dict, state: _Dict) -> Response:
    plain = _sgd(plain, group, state)
    if not state:
        return plain
    second, mean = state["square_avg"], state.get("grad_avg")
    return _scaled(plain, group, second if mean is None else (second - mean.square()).clamp_min(0.0))


def _adam(plain: Response, group: _Dict, state: _Dict) -> Response:
    """Exponential average: u ← β₁u + (1 − β₁) g, over 1 − β₁ᵗ at step t."""
    first, second = map(float, group["betas"])
    step = float(state.get("step", math.inf))
    plain = replace(plain, alternating_gain=(1.0 - first) / (1.0 + first) / (1.0 - first**step))
    if not state:
        return plain
    return _scaled(plain, group, state.get("max_exp_avg_sq", state["exp_avg_sq"]) / (1.0 - second**step))


def _nadam(plain: Response, group: _Dict, state: _Dict) -> Response:
    """Adam with (1 − μ) g + μu for u, where μ is the momentum of the next step (Dozat 2016)."""
    first, step = float(group["betas"][0]), float(state.get("step", 0.0))
    momentum = first * (1.0 - 0.5 * 0.96 ** ((step + 1.0) * float(group["momentum_decay"])))
    alternating = 1.0 - momentum + momentum * ((1.0 - first) / (1.0 + first))
    return replace(_adam(plain, group, state), alternating_gain=alternating)


def _adagrad(plain: Response, group: _Dict, state: _Dict) -> Response:
    rate = plain.learning_rate / (1.0 + float(state.get("step", 0.0)) * float(group["lr_decay"]))
    plain = replace(plain, learning_rate=rate)
    return _scaled(plain, group, state["sum"]) if state else plain


def _scaled(plain: Response, group: _Dict, second_moment: Tensor) -> Response:
    return replace(plain, preconditioner=1.0 / (second_moment.sqrt() + float(group["eps"])))


_TABLE: dict[type[Optimizer], Callable[[Response, _Dict, _Dict], Response]] = {
    SGD: _sgd,
    RMSprop: _rmsprop,
    Adam: _adam,
    AdamW: _adam,
    NAdam: _nadam,
    Adagrad: _adagrad,
}


def is_known(optimizer: Optimizer) -> bool:
    """Returns whether the class of an optimizer, or a base class of it, is in the table of known optimizers.

    >>> import torch
    >>> weights = [torch.zeros(3, requires_grad=True)]
    >>> is_known(torch.optim.SGD(weights, lr=0.1)), is_known(torch.optim.LBFGS(weights))
    (True, False)
    """
    return isinstance(optimizer, tuple(_TABLE))


def responses(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> list[Response]:
    """Returns each parameter's response: gradient descent for an unknown optimizer, zero without an optimizer."""
    found = {
        id(parameter): _response(optimizer, group, parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return [found.get(id(parameter), Response(0.0, preconditioner=0.0)) for parameter in parameters]


def moving(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor], *, at_any_rate: bool = False) -> list[bool]:
    """Returns whether each parameter moves in training: it requires a gradient, at a learning rate above zero.

    If all rates are zero, as at the start of a warm-up, or with `at_any_rate`, the parameters that an optimizer holds
    count as moving; without an optimizer that holds one, all that require a gradient.

    >>> import torch
    >>> trained, left_out = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    >>> moving([torch.optim.SGD([trained], lr=0.1)], [trained, left_out])
    [True, False]
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    pairs = [(float(group["lr"]), group["params"]) for group in groups]
    rates = {id(parameter): rate for rate, parameters_of_group in pairs for parameter in parameters_of_group}
    trained = [(parameter.requires_grad, rates.get(id(parameter))) for parameter in parameters]
    moved = [required and bool(rate) and not at_any_rate for required, rate in trained]
    held = [required and rate is not None for required, rate in trained]
    return next((choice for choice in (moved, held) if any(choice)), [required for required, _ in trained])


def _response(optimizer: Optimizer, group: _Dict, parameter: Tensor) -> Response:
    rate = float(group["lr"])
    for kind in type(optimizer).__mro__:
        if kind in _TABLE:
            # in torch 2.6 the groups of AdamW do not say that it is decoupled
            decoupled = kind is AdamW or bool(group.get("decoupled_weight_decay", False))
            plain = Response(rate, float(group.get("weight_decay", 0.0)), decoupled)
            return _TABLE[kind](plain, group, optimizer.state.get(parameter, {}))
    return Response(rate)

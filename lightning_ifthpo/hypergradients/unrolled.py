"""Hypergradients through a few steps of training, each differentiated exactly."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_ifthpo.core.autodiff import add, differentiable, gradients_on, vjp
from lightning_ifthpo.core.loss import Loss, LossFunction
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.hypergradients.result import Hypergradient, OuterGradient, check_used, combine
from lightning_ifthpo.solvers import SolveResult, Status


def unrolled_hypergradient(
    inner_loss: LossFunction,
    outer_loss: LossFunction,
    parameters: Sequence[Tensor],
    hyperparameters: Sequence[Tensor],
    *,
    steps: int,
    lr: float | None = None,
    optimizer: Optimizer | None = None,
) -> Hypergradient:
    """Returns dL_V(w_K)/dλ through K steps of an optimizer, w ← opt(λ, w), from the present weights.

    Reverse mode with recomputation (Domke 2012; Maclaurin, Duvenaud, Adams 2015): the steps are taken and remembered,
    then retraced from the last to the first, one at a time. Momentum and adaptive steps are differentiated too, through
    whatever the optimizer keeps. Random numbers of each step are drawn again when it is retraced. From a stationary
    point K + 1 steps of gradient descent equal the Neumann series of K terms with its rate as step size. Weights and
    the optimizer's state are left as they were.

    The result's `relative_residual` is ‖dL_V/dw₀‖ / ‖dL_V/dw_K‖: how much of the outer loss still depends on where the
    unroll began, which at a stationary point is the residual of that Neumann series.

    Args:
        inner_loss: L_T, a callable without arguments that returns a scalar tensor.
        outer_loss: L_V, likewise; taken at the last weights.
        parameters: w, together [n].
        hyperparameters: λ, real leaf tensors of any shape.
        steps: K, at least 1.
        lr: Learning rate of gradient descent, in parameter² / loss.
        optimizer: Instead of a rate: the optimizer of these parameters, with its state. One of torch that takes
            `differentiable=True`.

    Raises:
        ValueError: If steps < 1, there is not exactly one of a positive rate and an optimizer of these parameters that
            can be differentiated, a loss is not scalar or is detached, or a hyperparameter enters neither loss.

    Cost: K gradients, K products and mixed products, and memory for K copies of the weights and the state.

    >>> w, target = torch.tensor([0.0], requires_grad=True), torch.tensor(1.0)
    >>> loss = lambda: ((w - target) ** 2 / 2).sum()
    >>> unrolled_hypergradient(loss, lambda: w.sum(), [w], [target], steps=1, lr=0.5).gradients
    [tensor(0.5000)]
    """
    require_at_least("steps", steps, 1)
    if (lr is None) == (optimizer is None):
        raise ValueError("expected either lr, for gradient descent, or the optimizer whose steps are to be unrolled")
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"expected a finite lr > 0, got {lr!r}")
    space = ParameterSpace(parameters)
    update = _Update(optimizer or SGD(list(parameters), lr=lr or 0.0), space)
    visited: list[tuple[Loss, Tensor, _State]] = []
    losses: list[Tensor] = []
    with differentiable(hyperparameters), space.restored():
        state = update.initial_state
        for _ in range(steps):
            loss, weights = Loss(inner_loss, parameters, name="the inner loss"), space.values
            visited.append((loss, weights, state))
            graph = loss.graph()
            losses.append(graph.value.detach())
            weights, state = update.step(weights, graph.gradient, state)
            space.assign(weights)
        outer = OuterGradient.of(Loss(outer_loss, parameters, name="the outer loss"), hyperparameters)
        adjoint, q = outer.v, torch.zeros_like(outer.v)
        state_adjoints: dict[tuple[int, str], Tensor] = {}
        mixed: list[Tensor | None] = [None] * len(hyperparameters)
        for loss, weights, state in reversed(visited):
            space.assign(weights)
            graph = loss.graph()
            kept, moved, state_adjoints = update.vjp_step(weights, graph.gradient, state, adjoint, state_adjoints)
            mixed = add(mixed, graph.mixed_product(-moved, hyperparameters))
            adjoint, q = kept + graph.hessian_product(moved), q - moved
    residual = _relative_norm(adjoint, outer.v)
    solution = SolveResult(q, residual, steps - 1, Status.COMPLETE, extra_products=1, step_size=lr)
    result = combine(outer, hyperparameters, mixed, losses, solution)
    check_used(result, hyperparameters)
    return result


def _relative_norm(vector: Tensor, reference: Tensor) -> float:
    """Returns ‖vector‖ / ‖reference‖; zero where both are zero, as with an outer loss that does not use the weights."""
    norm, scale = (float(torch.linalg.vector_norm(each)) for each in (vector, reference))
    return norm / scale if scale else norm


@dataclass(frozen=True)
class _State:
    """What an optimizer keeps: tensors shaped like weights, by parameter and name, and everything else."""

    tensors: dict[tuple[int, str], Tensor]
    others: dict[tuple[int, str], Any]


class _Update:
    """One step of an optimizer as a function of weights, gradient and state."""

    def __init__(self, optimizer: Optimizer, space: ParameterSpace) -> None:
        self._optimizer, self._space = optimizer, space
        groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        missing = sum(id(tensor) not in groups for tensor in space.tensors)
        if missing:
            raise ValueError(f"{missing} of {len(space.tensors)} parameters do not belong to the optimizer")
        if "differentiable" not in inspect.signature(type(optimizer).__init__).parameters:
            raise ValueError(
                f"{type(optimizer).__name__} does not take differentiable=True, and its step cannot be differentiated; "
                "pass lr, for gradient descent"
            )
        self._groups = [groups[id(tensor)] for tensor in space.tensors]
        self.initial_state = self._copied(
            [
                ((index, name), value)
                for index, tensor in enumerate(space.tensors)
                for name, value in optimizer.state.get(tensor, {}).items()
            ]
        )

    def step(self, weights: Tensor, gradient: Tensor, state: _State) -> tuple[Tensor, _State]:
        """Returns weights and state after a step."""
        _, after, entries = self._traced(weights, gradient, state)
        return self._space.flatten(after), self._copied(entries)

    def vjp_step(
        self,
        weights: Tensor,
        gradient: Tensor,
        state: _State,
        adjoint: Tensor,
        state_adjoints: dict[tuple[int, str], Tensor],
    ) -> tuple[Tensor, Tensor, dict[tuple[int, str], Tensor]]:
        """Returns the adjoints of weights, gradient and state before a step from those after it."""
        inputs, after, entries = self._traced(weights, gradient, state)
        outputs = [*after, *(value for key, value in entries if key in state_adjoints)]
        cotangents = [
            *self._space.split(adjoint),
            *(state_adjoints[key] for key, _ in entries if key in state_adjoints),
        ]
        gradients = vjp(outputs, inputs, cotangents)
        count = len(self._space.tensors)
        before = {
            key: part for key, part in zip(state.tensors, gradients[2 * count :], strict=True) if part is not None
        }
        return self._space.flatten(gradients[:count]), self._space.flatten(gradients[count : 2 * count]), before

    def _traced(
        self, weights: Tensor, gradient: Tensor, state: _State
    ) -> tuple[list[Tensor], list[Tensor], list[tuple[tuple[int, str], Any]]]:
        """Makes a step with a graph; returns its inputs, the weights and the entries of the state after it."""
        with gradients_on():
            inputs = [
                tensor.detach().clone().requires_grad_()
                for tensor in (*self._space.split(weights), *self._space.split(gradient), *state.tensors.values())
            ]
            count = len(self._space.tensors)
            after = [tensor.clone() for tensor in inputs[:count]]
            for tensor, slope in zip(after, inputs[count : 2 * count], strict=True):
                tensor.retain_grad()
                tensor.grad = slope
            twin = type(self._optimizer)(
                [
                    {**group, "params": [tensor], "differentiable": True, "foreach": False, "fused": None}
                    for group, tensor in zip(self._groups, after, strict=True)
                ],
                **({"differentiable": True} | self._required()),
            )
            kept = dict(zip(state.tensors, inputs[2 * count :], strict=True))
            for (index, name), value in (kept | state.others).items():
                twin.state[after[index]][name] = value.clone() if isinstance(value, Tensor) else value
            twin.step()
        entries = [
            ((index, name), value) for index, tensor in enumerate(after) for name, value in twin.state[tensor].items()
        ]
        return inputs, after, entries

    def _required(self) -> dict[str, Any]:
        """Returns the learning rate where the constructor insists on one; the groups have their own."""
        return {"lr": 1e-3} if "lr" in inspect.signature(type(self._optimizer).__init__).parameters else {}

    def _copied(self, entries: list[tuple[tuple[int, str], Any]]) -> _State:
        """Returns copies of the entries of a state, sorted by whether they are shaped like weights."""
        tensors, others = {}, {}
        for (index, name), value in entries:
            if not isinstance(value, Tensor):
                others[index, name] = value
            elif value.shape == self._space.tensors[index].shape and name != "step":
                tensors[index, name] = value.detach().clone()
            else:  # torch counts steps in float32, and 1 − β^step would lose half its digits
                others[index, name] = value.detach().double() if value.is_floating_point() else value.detach().clone()
        return _State(tensors, others)

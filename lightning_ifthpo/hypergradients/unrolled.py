"""Hypergradients by exact differentiation through a few steps of training."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_ifthpo.core.autodiff import add, differentiable, gradients_on, vjp
from lightning_ifthpo.core.loss import Loss, LossFunction
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.hypergradients.result import Hypergradient, OuterGradient, combine
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

    This is reverse mode with recomputation (Domke 2012; Maclaurin, Duvenaud, Adams 2015): the steps are made, then
    repeated with a graph from the last to the first, one at a time and with the same random numbers. The derivative
    includes momentum and adaptive steps, through the optimizer's state. Weights and state are left unchanged.

    The result's `relative_residual` is ‖dL_V/dw₀‖ / ‖dL_V/dw_K‖: how much the outer loss still depends on the first
    weights. From a stationary point, K steps of gradient descent give the hypergradient and the residual of
    `Neumann(terms=K − 1, step_size=lr)`.

    Args:
        inner_loss: L_T, a callable without arguments that returns a scalar tensor.
        outer_loss: L_V, likewise; evaluated at the last weights.
        parameters: w, together [n].
        hyperparameters: λ, real leaf tensors of any shape.
        steps: K, at least 1.
        lr: Learning rate of gradient descent, in parameter² / loss; or pass an optimizer.
        optimizer: The optimizer of these parameters, with its state; one of torch that takes `differentiable=True`.

    Raises:
        ValueError: If steps < 1, not exactly one of lr > 0 and an optimizer of these parameters that can be
            differentiated is given, a loss is not scalar or is detached, or a hyperparameter influences neither loss.

    Cost: K gradients, K products and mixed products, and memory for K copies of the weights and the state.

    >>> w, target = torch.tensor([0.0], requires_grad=True), torch.tensor(1.0)
    >>> loss = lambda: ((w - target) ** 2 / 2).sum()
    >>> unrolled_hypergradient(loss, lambda: w.sum(), [w], [target], steps=1, lr=0.5).gradients
    [tensor(0.5000)]
    """
    require_at_least("steps", steps, 1)
    if (lr is None) == (optimizer is None):
        raise ValueError("expected either lr, for gradient descent, or an optimizer to unroll, not both")
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"expected a finite lr > 0, got {lr!r}")
    parameters, hyperparameters = list(parameters), list(hyperparameters)  # also from generators
    space = ParameterSpace(parameters)
    update = _Update(optimizer or SGD(parameters, lr=lr or 0.0), space)
    update.check()
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
        state_adjoints: dict[_Key, Tensor] = {}
        mixed: list[Tensor | None] = [None] * len(hyperparameters)
        for loss, weights, state in reversed(visited):
            space.assign(weights)
            graph = loss.graph()
            adjoint, u, state_adjoints = update.vjp_step(weights, graph.gradient, state, adjoint, state_adjoints)
            mixed = add(mixed, graph.mixed_product(-u, hyperparameters))
            adjoint, q = adjoint + graph.hessian_product(u), q - u  # u is the adjoint of the gradient
    first, last = (float(torch.linalg.vector_norm(vector)) for vector in (adjoint, outer.v))
    residual = first / last if last else first  # last is zero if the outer loss does not use the weights
    solution = SolveResult(q, residual, steps - 1, Status.COMPLETE, extra_products=1, step_size=lr)
    return combine(outer, hyperparameters, mixed, losses, solution)


_Key: TypeAlias = tuple[int, str]
"""Index of a parameter, and name of an entry of its optimizer state."""


class _State(NamedTuple):
    """An optimizer's state: tensors shaped like weights, which are differentiated, and all other entries."""

    tensors: dict[_Key, Tensor]
    others: dict[_Key, Any]


class _Update:
    """One step of an optimizer as a function of weights, gradient and state."""

    def __init__(self, optimizer: Optimizer, space: ParameterSpace) -> None:
        self._class, self._space = type(optimizer), space
        groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
        missing = sum(id(tensor) not in groups for tensor in space.tensors)
        if missing:
            raise ValueError(f"{missing} of {len(space.tensors)} parameters do not belong to the optimizer")
        arguments = inspect.signature(self._class.__init__).parameters
        if "differentiable" not in arguments:
            raise ValueError(
                f"{self._class.__name__} does not take differentiable=True, and its step cannot be differentiated; "
                "pass lr, for gradient descent"
            )
        self._groups = [groups[id(tensor)] for tensor in space.tensors]
        # Some constructors insist on a learning rate; the groups have their own.
        self._options: dict[str, Any] = {"differentiable": True} | ({"lr": 1e-3} if "lr" in arguments else {})
        self.initial_state = self._copy(_entries(optimizer, space.tensors))

    def check(self) -> None:
        """Raises ValueError if a derivative of the optimizer's step differs from a difference of steps.

        Two steps of each kind of group are tried on a 2 × 2 matrix in float64, from a fresh state.
        """
        for group in {id(group): group for group in self._groups}.values():
            weight = torch.linspace(0.5, 1.5, 4, dtype=torch.float64, device=self._space.device).view(2, 2)
            space = ParameterSpace([weight])
            _Update(self._class([self._group(group, weight)], **self._options), space)._check(space.values)

    def _check(self, weights: Tensor) -> None:
        state, cotangent = self.initial_state, torch.linspace(1.0, 2.0, 4).to(weights)
        for scale in (0.3, -0.7):
            gradient = scale * cotangent
            width = 1e-5 * gradient.abs()  # cbrt(eps), where truncation and rounding are equal
            (ahead, next_ahead), (behind, next_behind) = (
                self.step(weights, gradient + sign * width, state) for sign in (1.0, -1.0)
            )
            after, state_after = self.step(weights, gradient, state)
            adjoints = {key: torch.ones_like(tensor) for key, tensor in state_after.tensors.items()}
            _, slope, _ = self.vjp_step(weights, gradient, state, cotangent, adjoints)
            moved = cotangent @ (ahead - behind) + sum(
                (next_ahead.tensors[key] - next_behind.tensors[key]).sum() for key in adjoints
            )
            # a derivative that is left out is off by the size of the update, or of the state
            size = (after - weights).abs().sum() + sum(tensor.abs().sum() for tensor in state_after.tensors.values())
            if abs(slope @ (2 * width) - moved) > 0.1 * 1e-5 * size:
                raise ValueError(
                    f"the step of {self._class.__name__} leaves out a part of its derivative, although it takes "
                    "differentiable=True; pass lr, for gradient descent, or another optimizer"
                )
            weights, state = after, state_after

    def _group(self, group: dict[str, Any], tensor: Tensor) -> dict[str, Any]:
        return group | {"differentiable": True, "foreach": False, "fused": None, "params": [tensor]}

    def step(self, weights: Tensor, gradient: Tensor, state: _State) -> tuple[Tensor, _State]:
        """Returns weights and state after a step."""
        _, after, entries = self._trace(weights, gradient, state)
        return self._space.flatten(after), self._copy(entries)

    def vjp_step(
        self, weights: Tensor, gradient: Tensor, state: _State, adjoint: Tensor, state_adjoints: dict[_Key, Tensor]
    ) -> tuple[Tensor, Tensor, dict[_Key, Tensor]]:
        """Returns the adjoints of a step's inputs (weights, gradient, state) from the adjoints of its results."""
        inputs, after, entries = self._trace(weights, gradient, state)
        keys = [key for key in entries if key in state_adjoints]
        outputs = [*after, *(entries[key] for key in keys)]
        gradients = vjp(outputs, inputs, [*self._space.split(adjoint), *(state_adjoints[key] for key in keys)])
        count = len(after)
        pairs = zip(state.tensors, gradients[2 * count :], strict=True)
        before = {key: part for key, part in pairs if part is not None}
        return self._space.flatten(gradients[:count]), self._space.flatten(gradients[count : 2 * count]), before

    def _trace(
        self, weights: Tensor, gradient: Tensor, state: _State
    ) -> tuple[list[Tensor], list[Tensor], dict[_Key, Any]]:
        """Makes a step with a graph; returns its inputs, and the weights and the entries of the state after it."""
        with gradients_on():
            tensors = [*self._space.split(weights), *self._space.split(gradient), *state.tensors.values()]
            inputs = [tensor.detach().clone().requires_grad_() for tensor in tensors]
            count = len(self._groups)
            after = [tensor.clone() for tensor in inputs[:count]]
            for tensor, slope in zip(after, inputs[count : 2 * count], strict=True):
                tensor.retain_grad()
                tensor.grad = slope
            entries = dict(zip(state.tensors, inputs[2 * count :], strict=True)) | state.others
            groups = [self._group(group, tensor) for group, tensor in zip(self._groups, after, strict=True)]
            for index in range(count) if issubclass(self._class, SGD) else ():
                # torch detaches the first momentum buffer. One of zeros, without dampening, makes the same first step.
                if groups[index]["momentum"] and entries.get((index, "momentum_buffer")) is None:
                    groups[index]["dampening"] = 0.0
                    entries[index, "momentum_buffer"] = torch.zeros_like(after[index])
            twin = self._class(groups, **self._options)
            for (index, name), value in entries.items():
                twin.state[after[index]][name] = value.clone() if isinstance(value, Tensor) else value
            twin.step()
        return inputs, after, _entries(twin, after)

    def _copy(self, entries: dict[_Key, Any]) -> _State:
        state = _State({}, {})
        for (index, name), value in entries.items():
            if not isinstance(value, Tensor):
                state.others[index, name] = value
            elif value.shape == self._space.tensors[index].shape and name != "step":
                state.tensors[index, name] = value.detach().clone()
            else:  # torch counts steps in float32, and 1 − β^step would lose half its digits
                dtype = torch.float64 if value.is_floating_point() else value.dtype
                state.others[index, name] = value.detach().to(dtype, copy=True)
        return state


def _entries(optimizer: Optimizer, tensors: Sequence[Tensor]) -> dict[_Key, Any]:
    states = [optimizer.state.get(tensor, {}) for tensor in tensors]
    return {(index, name): value for index, state in enumerate(states) for name, value in state.items()}

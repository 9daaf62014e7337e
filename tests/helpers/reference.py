"""Dense curvature and mixed derivatives in float64, computed without this package, on a plain copy of a problem."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers.device import RandomState, set_random_state
from tests.helpers.random_networks import Dropout, Problem

WeightsOf: TypeAlias = Callable[[Problem], list[nn.Parameter]]

STEP = 1e-5  # near the cube root of eps, which balances truncation and rounding for weights of order one


def plain_copy(problem: Problem) -> Problem:
    """Returns a copy in float64, without checkpoints and without hooks that change gradients."""
    twin = copy.deepcopy(problem).double()  # hooks of parameters stay behind
    for module in twin.modules():
        module._backward_hooks.clear()
        module.plain = True
        if isinstance(module, Dropout):
            module.dtype = problem.description.dtype
    return twin


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Leaves out fused attention and cuDNN's recurrence, which have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        yield


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    options = {"create_graph": create_graph, "retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return flat(torch.autograd.grad(value, inputs, **options))


def jacobian(values: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Returns ∂values/∂inputs, [m, n], row by row."""
    size = sum(tensor.numel() for tensor in inputs)
    if not values.requires_grad:
        return values.new_zeros(len(values), size)
    return torch.stack([gradient(value, inputs) for value in values])


@dataclass
class Dense:
    """The matrices of one inner and one outer batch, float64.

    Attributes:
        matrix: The curvature A, [n, n].
        mixed: ∂²L_T/∂w∂λᵀ, [n, p].
        v: ∂L_V/∂w, [n].
        direct: ∂L_V/∂λ, [p].
    """

    matrix: Tensor
    mixed: Tensor
    v: Tensor
    direct: Tensor


@dataclass
class State:
    """A problem as it stood, with its hyperparameters, batches, and the random states of both evaluations."""

    problem: Problem
    hyperparameters: dict[str, Tensor]
    batch: Any
    outer_batch: Any
    random_state: RandomState
    outer_random_state: RandomState | None = None

    def dense(self, curvature: str, weights: WeightsOf = Problem.moved) -> Dense:
        """Returns the matrices, by loops over first-order products of torch."""
        hypers = {name: value.detach().double().requires_grad_() for name, value in self.hyperparameters.items()}
        twin = plain_copy(self.problem)
        value = self._evaluated(twin, hypers)
        slope = gradient(value, weights(twin), create_graph=True)
        hessian = jacobian(slope, weights(twin))
        mixed = jacobian(slope, list(hypers.values()))
        if curvature == "gauss_newton":
            hessian = self._gauss_newton(hypers, weights)
        if curvature == "gradient_outer_product":
            hessian = torch.outer(slope, slope).detach()
        v, direct = self._outer(hypers, weights)
        return Dense(hessian, mixed, v, direct)

    def product_by_differences(self, v: Tensor, step: float = STEP, weights: WeightsOf = Problem.moved) -> Tensor:
        """Returns Hv for v: [n], as a central difference of the gradients at w + step · v and w − step · v."""
        hypers = {name: value.detach().double() for name, value in self.hyperparameters.items()}
        first, second = (self._slope_at(sign * v, hypers, weights)[: len(v)] for sign in (step, -step))
        return (first - second) / (2 * step)

    def differences(self, weights: WeightsOf = Problem.moved) -> Dense:
        """Returns the Hessian and the mixed derivative as central differences of gradients, and the rest exactly."""
        hypers = {name: value.detach().double().requires_grad_() for name, value in self.hyperparameters.items()}
        moved, columns = weights(self.problem), []
        size = sum(weight.numel() for weight in moved)
        for unit in torch.eye(size, dtype=torch.float64, device=moved[0].device):
            first, second = (self._slope_at(sign * unit, hypers, weights) for sign in (STEP, -STEP))
            columns.append((first - second) / (2 * STEP))
        both = torch.stack(columns, 1)
        return Dense(both[:size], both[size:].T, *self._outer(hypers, weights))

    def _slope_at(self, delta: Tensor, hypers: dict[str, Tensor], weights: WeightsOf) -> Tensor:
        """Returns ∂L/∂w and then ∂L/∂λ, where they are asked for, at w + delta."""
        twin = plain_copy(self.problem)
        moved = weights(twin)
        with torch.no_grad():
            for weight, part in zip(moved, delta.split([w.numel() for w in moved]), strict=True):
                weight += part.view_as(weight)
        inputs = [*moved, *(value for value in hypers.values() if value.requires_grad)]
        return gradient(self._evaluated(twin, hypers), inputs)

    def _evaluated(self, twin: Problem, hypers: dict[str, Tensor], **options: Any) -> Tensor:
        set_random_state(self.random_state)
        with twice_differentiable():
            return twin.inner(copy.deepcopy(self.batch), hypers["scale"], hypers.get("log_decay"), **options)

    def _outer(self, hypers: dict[str, Tensor], weights: WeightsOf) -> tuple[Tensor, Tensor]:
        if self.outer_random_state is None:
            return torch.empty(0), torch.empty(0)
        twin = plain_copy(self.problem).eval()
        set_random_state(self.outer_random_state)
        with twice_differentiable():
            value = twin.outer(copy.deepcopy(self.outer_batch), hypers["scale"])
        return gradient(value, weights(twin)), gradient(value, list(hypers.values()))

    def _gauss_newton(self, hypers: dict[str, Tensor], weights: WeightsOf) -> Tensor:
        """Returns Jᵀ (∂²L/∂z∂zᵀ) J, and the Hessian of what does not pass through the outputs z."""
        outputs: list[Tensor] = []

        def cut(logits: Tensor) -> Tensor:
            outputs.extend([logits, logits.detach().requires_grad_()])
            return outputs[1]

        twin = plain_copy(self.problem)
        value = self._evaluated(twin, hypers, mark=cut)
        through = jacobian(outputs[0].reshape(-1), weights(twin))
        curved = jacobian(gradient(value, outputs[1:], create_graph=True), outputs[1:])
        rest = jacobian(gradient(value, weights(twin), create_graph=True), weights(twin))
        return through.T @ curved @ through + rest

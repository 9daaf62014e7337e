"""Comparing a hypergradient with an independent reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.core.step_length import relative_step
from lightning_ifthpo.core.validation import require_choice
from lightning_ifthpo.curvature.hessian import HessianOperator
from lightning_ifthpo.curvature.kinds import Curvature
from lightning_ifthpo.hypergradients.implicit import implicit_hypergradient
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Solver


def check_hypergradient(
    inner_loss: LossFunction,
    outer_loss: LossFunction,
    parameters: Sequence[Tensor],
    hyperparameters: Sequence[Tensor],
    *,
    curvature: Curvature = "hessian",
    solver: Solver = ConjugateGradient(max_iterations=100, rtol=1e-6),  # noqa: B008 - frozen
    reference: Literal["direct", "finite_difference"] = "direct",
    rtol: float = 1e-3,
) -> bool:
    """Returns True if a hypergradient is right, and raises with both values if not, like `torch.autograd.gradcheck`.

    Args:
        inner_loss: L_T, a callable without arguments; deterministic.
        outer_loss: L_V, likewise.
        parameters: w, together [n]; at the inner minimum, for reference="finite_difference".
        hyperparameters: λ, real leaf tensors of any shape.
        curvature: As in `implicit_hypergradient`.
        solver: As in `implicit_hypergradient`.
        reference: "direct" solves with the dense exact Hessian, undamped. "finite_difference" moves each hyperparameter
            entry by ± cbrt(eps) · |λ|, or farther if the difference drowns in rounding, solves the inner problem again
            by Newton's method and takes the difference of the outer losses, without implicit differentiation; use
            float64.
        rtol: Largest ‖difference‖ / ‖reference‖ that passes.

    Raises:
        HypergradientMismatchError: If they differ by more than rtol.
        RuntimeError: If Newton's method does not find the inner minimum.

    Cost: n Hessian products for "direct"; some ten times that for each hyperparameter entry for "finite_difference".

    >>> w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    >>> log_decay = torch.tensor(0.0, dtype=torch.float64)
    >>> inner = lambda: ((w - 2) ** 2 / 2 + log_decay.exp() * w**2 / 2).sum()
    >>> check_hypergradient(inner, lambda: (w**2).sum(), [w], [log_decay], reference="finite_difference")
    True
    """
    require_choice("reference", reference, ("direct", "finite_difference"))
    parameters, hyperparameters = list(parameters), list(hyperparameters)  # also from generators
    losses = (inner_loss, outer_loss, parameters, hyperparameters)
    result = implicit_hypergradient(*losses, curvature=curvature, solver=solver)
    if reference == "direct":
        expected = implicit_hypergradient(*losses, solver=Direct()).gradients
    else:
        outer = as_loss(outer_loss, parameters, "the outer loss")
        expected = _resolved_differences(inner_loss, outer, hyperparameters)
    space = ParameterSpace(hyperparameters)
    got, wanted = space.flatten(result.gradients), space.flatten(expected)
    scale = torch.linalg.vector_norm(wanted)
    error = float(torch.linalg.vector_norm(got - wanted) / torch.where(scale > 0.0, scale, 1.0))
    if not error <= rtol:
        residual = "not measured" if result.relative_residual is None else f"{result.relative_residual:.3g}"
        raise HypergradientMismatchError(
            f"hypergradient differs from the {reference} reference by {error:.3g} (relative), more than "
            f"rtol = {rtol:g}; status {result.status.value}, relative residual {residual}\n"
            f"got:      {got}\nexpected: {wanted}" + (f"\n{result.diagnosis}" if result.diagnosis else "")
        )
    return True


class HypergradientMismatchError(RuntimeError):
    """A hypergradient differs from its reference."""


def _resolved_differences(inner_loss: LossFunction, outer: Loss, hyperparameters: Sequence[Tensor]) -> list[Tensor]:
    """Returns central differences of the outer loss at the inner minimum, shaped like the hyperparameters."""
    result = []
    for h in hyperparameters:
        hyper_space = ParameterSpace([h])
        origin = hyper_space.values
        with outer.space.restored(), hyper_space.restored():
            resolved = partial(_resolved, inner_loss, outer, hyper_space, origin)
            slopes = [_slope(partial(resolved, index), float(origin[index]), h.dtype) for index in range(h.numel())]
        result.append(torch.tensor(slopes, dtype=h.dtype, device=h.device).reshape(h.shape))
    return result


def _resolved(
    inner_loss: LossFunction, outer: Loss, space: ParameterSpace, origin: Tensor, index: int, value: float
) -> float:
    """Returns the outer loss at the inner minimum for another value of one hyperparameter entry."""
    moved = origin.clone()
    moved[index] = value
    space.assign(moved)
    _minimize(inner_loss, outer.space)
    return float(outer.value())


def _slope(value_at: Callable[[float], float], x: float, dtype: torch.dtype) -> float:
    """Returns a central difference at x, over the shortest relative step that is not lost in rounding.

    Steps are tried from cbrt(eps) · |x| on, each ten times as long, up to cbrt(eps). The first step is in the unit of
    x, but a small x may not be small beside the scale on which the value changes.
    """
    eps, relative = torch.finfo(dtype).eps, relative_step(dtype)
    step = relative * (abs(x) or 1.0)
    while True:
        ahead, behind = value_at(x + step), value_at(x - step)
        if step >= relative or abs(ahead - behind) >= eps**0.5 * abs(ahead):  # half of the digits are left
            return (ahead - behind) / (2 * step)
        step = min(10.0 * step, relative)


def _minimize(loss: LossFunction, space: ParameterSpace) -> None:
    """Moves the parameters to a nearby minimum by Newton's method."""
    eps, best = torch.finfo(space.dtype).eps, math.inf
    for _ in range(50):
        operator = HessianOperator(loss, space.tensors)
        gradient = operator.gradient
        step = Direct().solve(operator, gradient).x
        norm = float(torch.linalg.vector_norm(gradient))
        # Newton's method converges quadratically; a gradient that stops shrinking is rounding if the step is small
        # beside the weights, or if it would not change the loss.
        shift, extent = (float(torch.linalg.vector_norm(vector)) for vector in (step, space.values))
        negligible = shift <= eps**0.5 * extent or abs(float(gradient @ step)) <= eps * abs(float(operator.loss))
        if norm >= best / 2 and negligible:
            return
        best = min(best, norm)
        space.assign(space.values - step)
    raise RuntimeError(f"Newton's method did not solve the inner problem: gradient norm {best:.3g} after 50 steps")

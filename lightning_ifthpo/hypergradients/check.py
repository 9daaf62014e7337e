"""Comparing a hypergradient with an independent reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.space import ParameterSpace
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
            entry by ± cbrt(eps) · max(1, |λ|), solves the inner problem again by Newton's method and takes the
            difference of the outer losses, without implicit differentiation; use float64.
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
        raise HypergradientMismatchError(
            f"hypergradient differs from the {reference} reference by {error:.3g} (relative), more than "
            f"rtol = {rtol:g}; status {result.status.value}, relative residual {result.relative_residual:.3g}\n"
            f"got:      {got}\nexpected: {wanted}" + (f"\n{result.diagnosis}" if result.diagnosis else "")
        )
    return True


class HypergradientMismatchError(RuntimeError):
    """A hypergradient differs from its reference."""


def _resolved_differences(inner_loss: LossFunction, outer: Loss, hyperparameters: Sequence[Tensor]) -> list[Tensor]:
    """Returns central differences of the outer loss at the inner minimum, shaped like the hyperparameters."""
    result = []
    for h in hyperparameters:
        hyper_space, slopes = ParameterSpace([h]), []
        origin = hyper_space.values
        for index in range(h.numel()):
            # cbrt(eps) balances truncation and rounding of a central difference
            width = torch.finfo(h.dtype).eps ** (1 / 3) * max(1.0, abs(float(origin[index])))
            shift = torch.zeros_like(origin)
            shift[index] = width
            values = []
            with outer.space.restored(), hyper_space.restored():
                for moved in (origin + shift, origin - shift):
                    hyper_space.assign(moved)
                    _minimize(inner_loss, outer.space)
                    values.append(float(outer.value()))
            slopes.append((values[0] - values[1]) / (2 * width))
        result.append(torch.tensor(slopes, dtype=h.dtype, device=h.device).reshape(h.shape))
    return result


def _minimize(loss: LossFunction, space: ParameterSpace) -> None:
    """Moves the parameters to a nearby minimum by Newton's method."""
    best = math.inf
    for _ in range(50):
        operator = HessianOperator(loss, space.tensors)
        gradient = operator.gradient
        norm = float(torch.linalg.vector_norm(gradient))
        if norm >= best / 2 and norm <= math.sqrt(torch.finfo(space.dtype).eps):
            return  # Newton's method converges quadratically; a gradient that stops shrinking is rounding.
        best = min(best, norm)
        space.assign(space.values - Direct().solve(operator, gradient).x)
    raise RuntimeError(f"Newton's method did not solve the inner problem: gradient norm {best:.3g} after 50 steps")

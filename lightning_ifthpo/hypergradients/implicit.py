"""Gradients of an outer loss with respect to hyperparameters, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import differentiable
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.space import check_real
from lightning_ifthpo.core.vectors import length
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.kinds import Curvature, curvature_operator
from lightning_ifthpo.curvature.verification import Structure, verified_operator
from lightning_ifthpo.hypergradients.diagnosis import Computation
from lightning_ifthpo.hypergradients.result import Hypergradient, OuterGradient, combine
from lightning_ifthpo.solvers import ConjugateGradient, Solver, SolveResult


def implicit_hypergradient(
    inner_loss: LossFunction | Loss,
    outer_loss: LossFunction | Loss,
    parameters: Sequence[Tensor],
    hyperparameters: Sequence[Tensor],
    *,
    curvature: Curvature = "hessian",
    solver: Solver = ConjugateGradient(max_iterations=100, rtol=1e-6),  # noqa: B008 - frozen
    x0: Tensor | None = None,
    allow_unused: bool = False,
    diagnosed: bool = True,
) -> Hypergradient:
    """Returns dL_V/dλ = ∂L_V/∂λ − (∂²L_T/∂w∂λᵀ)ᵀ H⁻¹ ∂L_V/∂w at the present weights and hyperparameters.

    This is the implicit function theorem for losses that are minimized (Lorraine, Vicol, Duvenaud 2019). It holds where
    ∂L_T/∂w = 0 and H = ∂²L_T/∂w∂wᵀ is positive definite. Elsewhere the result estimates the effect of further training.
    Status and residual say how well the linear system was solved, not how far the weights are from a minimum.

    Parameters that are frozen or unused have zero blocks. Weights, hyperparameters and `.grad` are left unchanged.

    Args:
        inner_loss: L_T, a callable without arguments that returns a scalar tensor, or (loss, outputs). Pass a `Loss` if
            the examples are spread over processes: each process computes its share, and all get the same result.
        outer_loss: L_V, likewise.
        parameters: w, together [n].
        hyperparameters: λ, real leaf tensors of any shape, with or without `requires_grad`.
        curvature: The matrix H: "hessian"; "gauss_newton" or "kfac", which need the model's outputs (`mark_outputs`);
            "gradient_outer_product"; "finite_difference", for losses without a second derivative, which also
            replaces the mixed derivative.
        solver: Solves the linear system.
        x0: First iterate of the solve, [n], such as the `solution.x` of a similar problem.
        allow_unused: Return zeros for hyperparameters that influence neither loss, instead of raising.
        diagnosed: Say why a failed solve failed, by at most 62 products and a gradient, or why a result means nothing.

    Raises:
        ValueError: If a loss is not scalar or is detached, or a hyperparameter influences neither loss.
        TypeError: If a hyperparameter is not a real floating-point tensor.
        SecondDerivativeError: If a second derivative of the inner loss is missing or wrong, and torch does not say so.

    Cost: one gradient of each loss, one differentiable gradient, the solver's products and one mixed product. Over
    several processes, one collective for each product and three more.

    >>> import torch
    >>> w, log_decay = torch.tensor([1.0], requires_grad=True), torch.tensor(0.0)
    >>> inner = lambda: ((w - 2) ** 2 / 2 + log_decay.exp() * w**2 / 2).sum()  # w*(λ) = 2 / (1 + exp λ)
    >>> outer = lambda: (w**2 / 2).sum()
    >>> implicit_hypergradient(inner, outer, [w], [log_decay]).gradients  # w · dw/dλ = 1 · (−2 · 1/4)
    [tensor(-0.5000)]
    """
    parameters, hyperparameters = list(parameters), list(hyperparameters)  # also from generators
    inner = as_loss(inner_loss, parameters, "the inner loss")
    outer = as_loss(outer_loss, parameters, "the outer loss")
    for index, tensor in enumerate(hyperparameters):
        check_real(tensor, f"hyperparameter {index}")
    with differentiable(hyperparameters):
        outer_gradient = OuterGradient.of(outer, hyperparameters)
        operator = curvature_operator(curvature, inner, parameters)
        if not inner.is_verified and (custom := operator.custom_functions):
            operator, _ = verified_operator(
                curvature, inner, Structure(operator.loss, operator.gradient, custom=custom)
            )
        solution = solver.solve(operator, outer_gradient.v, x0)
        mixed = _mixed_product(operator, solution, hyperparameters)
        computation = Computation(inner, outer_gradient, hyperparameters, operator, solver, curvature)
        nothing = all(part is None for part in [*mixed, *outer_gradient.direct])
        if nothing and not allow_unused and (unknown := computation.unknown_weights()):
            raise ValueError(unknown)  # it is not the hyperparameters' fault
        result = combine(outer_gradient, hyperparameters, mixed, [operator.loss], solution, allow_unused)
        if diagnosed:
            result = replace(result, diagnosis=computation.diagnosis(result))
    return result


def _mixed_product(
    operator: LossOperator, solution: SolveResult, hyperparameters: Sequence[Tensor]
) -> list[Tensor | None]:
    """Returns (∂²L/∂w∂λᵀ)ᵀ x, with `None` for what is zero by structure and not because x is."""
    if length(solution.x) > 0.0:
        return operator.mixed_product(solution.x, hyperparameters, solution.parts)
    shown = operator.mixed_product(torch.ones_like(solution.x), hyperparameters)
    return [None if part is None else torch.zeros_like(part) for part in shown]

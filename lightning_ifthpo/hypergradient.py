"""Gradients of an outer loss at the optimum of an inner one, with respect to hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.autodiff import differentiable, vjp
from lightning_ifthpo.curvature import AllReduce, Curvature, HessianOperator, curvature_operator
from lightning_ifthpo.curvature.summed import summed
from lightning_ifthpo.loss_graph import LossValue, check_loss, loss_and_outputs
from lightning_ifthpo.solvers import ConjugateGradient, Direct, Solver, SolveResult, Status
from lightning_ifthpo.solvers.diagnosis import diagnose
from lightning_ifthpo.space import ParameterSpace, check_real

Loss: TypeAlias = Callable[[], LossValue]


@dataclass(frozen=True)
class Hypergradient:
    """dL_V/dλ and what is known of its quality.

    Attributes:
        direct: ∂L_V/∂λ, shaped like the hyperparameters.
        indirect: −(∂²L_T/∂w∂λᵀ)ᵀ q with q ≈ H⁻¹ ∂L_V/∂w, shaped like the hyperparameters.
        outer_loss: L_V, a scalar.
        solution: How q was found; `solution.x` is q, [n].
        diagnosis: Why the solve failed and what to do; empty where it did not.
        unused: Indices of hyperparameters that enter neither loss; their gradients are zero.
    """

    direct: list[Tensor]
    indirect: list[Tensor]
    outer_loss: Tensor
    solution: SolveResult
    diagnosis: str = ""
    unused: tuple[int, ...] = ()

    @property
    def gradients(self) -> list[Tensor]:
        """Direct plus indirect term, shaped like the hyperparameters."""
        return [direct + indirect for direct, indirect in zip(self.direct, self.indirect, strict=True)]

    @property
    def relative_residual(self) -> float:
        """‖Hq − v‖ / ‖v‖ of the linear solve."""
        return self.solution.relative_residual

    @property
    def products(self) -> int:
        """Curvature products that the solution is made of."""
        return self.solution.products

    @property
    def status(self) -> Status:
        """How the linear solve ended; NONFINITE if anything else came out as NaN or infinity."""
        return self.solution.status


def implicit_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    parameters: Sequence[Tensor],
    hyperparameters: Sequence[Tensor],
    *,
    curvature: Curvature = "hessian",
    solver: Solver = ConjugateGradient(max_iterations=100, rtol=1e-6),  # noqa: B008 - frozen
    x0: Tensor | None = None,
    allow_unused: bool = False,
    diagnosed: bool = True,
    all_reduce: AllReduce | None = None,
) -> Hypergradient:
    """Returns dL_V/dλ = ∂L_V/∂λ − (∂²L_T/∂w∂λᵀ)ᵀ H⁻¹ ∂L_V/∂w at the present weights and hyperparameters.

    The implicit function theorem (Lorraine, Vicol, Duvenaud 2019, with losses that are minimized) holds where ∂L_T/∂w =
    0 and H = ∂²L_T/∂w∂wᵀ is positive definite. Elsewhere the result estimates what further training would do; its
    status and residual say how well the linear system was solved, not how far the weights are from a minimum.

    Parameters that are frozen or unused have zero blocks. Neither weights nor hyperparameters nor `.grad` are changed.

    Args:
        inner_loss: L_T, a callable without arguments that returns a scalar tensor, or (loss, outputs).
        outer_loss: L_V, likewise.
        parameters: w, together [n].
        hyperparameters: λ, real leaf tensors of any shape, with or without `requires_grad`.
        curvature: What stands for H: "hessian"; "gauss_newton", which needs the model's outputs (`mark_outputs`);
            "gradient_outer_product"; "kfac", which needs them too; "finite_difference", for losses without a second
            derivative, which also replaces the mixed derivative.
        solver: How the linear system is solved.
        x0: Where the solve starts from, [n]: usually the `solution.x` of a similar problem.
        allow_unused: Return zeros for hyperparameters that enter neither loss, instead of raising.
        diagnosed: Measure why a failed solve failed, by at most 60 products.
        all_reduce: Where examples are spread over processes: sums a tensor over them. Each process then gives its share
            of both losses, which together make the whole (a mean over its own examples times their part of all), and
            all of them get the same result. One collective for each product, and three more.

    Raises:
        ValueError: If a loss is not scalar or is detached, or a hyperparameter enters neither loss.
        TypeError: If a hyperparameter is not a real floating-point tensor.

    Cost: one gradient of each loss, one differentiable gradient, the solver's products, and one mixed product.

    >>> w, log_decay = torch.tensor([1.0], requires_grad=True), torch.tensor(0.0)
    >>> inner = lambda: ((w - 2) ** 2 / 2 + log_decay.exp() * w**2 / 2).sum()  # w*(λ) = 2 / (1 + exp λ)
    >>> outer = lambda: (w**2 / 2).sum()
    >>> implicit_hypergradient(inner, outer, [w], [log_decay]).gradients  # w · dw/dλ = 1 · (−2 · 1/4)
    [tensor(-0.5000)]
    """
    space = ParameterSpace(parameters)
    for index, tensor in enumerate(hyperparameters):
        check_real(tensor, f"hyperparameter {index}")
    with differentiable(hyperparameters):
        outer = OuterGradient.of(outer_loss, space, hyperparameters)
        if all_reduce is not None:
            outer = outer.summed(hyperparameters, all_reduce)
        operator = curvature_operator(curvature, inner_loss, parameters, all_reduce)
        solution = solver.solve(operator, outer.v, x0)
        mixed = operator.mixed_product(solution.x, hyperparameters)
        result = assembled(outer, hyperparameters, mixed, [operator.loss], solution)
        check_used(result, hyperparameters, allow_unused)
        if diagnosed and not result.status.trustworthy:
            damped = operator if isinstance(solver.damping, str) else solver.damped(operator)
            result = replace(result, diagnosis=diagnose(damped, result.solution))
    return result


def check_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    parameters: Sequence[Tensor],
    hyperparameters: Sequence[Tensor],
    *,
    curvature: Curvature = "hessian",
    solver: Solver = ConjugateGradient(max_iterations=100, rtol=1e-6),  # noqa: B008 - frozen
    reference: Literal["direct", "finite_difference"] = "direct",
    rtol: float = 1e-3,
) -> bool:
    """Returns True if a hypergradient is right, and raises with both values if not, in the spirit of `gradcheck`.

    Args:
        inner_loss: L_T, a callable without arguments; deterministic.
        outer_loss: L_V, likewise.
        parameters: w, together [n]; at the inner minimum, for reference="finite_difference".
        hyperparameters: λ, real leaf tensors of any shape.
        curvature: As in `implicit_hypergradient`.
        solver: As in `implicit_hypergradient`.
        reference: What to compare with: "direct" solves with the dense exact Hessian, undamped; "finite_difference"
            moves each hyperparameter entry by ± cbrt(eps) · max(1, |λ|), solves the inner problem anew by Newton's
            method and takes the difference of the outer losses, independent of any implicit differentiation. Use
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
    if reference not in ("direct", "finite_difference"):
        raise ValueError(f"expected reference to be 'direct' or 'finite_difference', got {reference!r}")
    losses = (inner_loss, outer_loss, parameters, hyperparameters)
    result = implicit_hypergradient(*losses, curvature=curvature, solver=solver)
    if reference == "direct":
        expected = implicit_hypergradient(*losses, solver=Direct()).gradients
    else:
        expected = _resolved_differences(*losses)
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


@dataclass(frozen=True)
class OuterGradient:
    """L_V, v = ∂L_V/∂w as a flat vector and ∂L_V/∂λ, detached."""

    value: Tensor
    v: Tensor
    direct: list[Tensor | None]

    @classmethod
    def of(cls, loss: Loss, space: ParameterSpace, hyperparameters: Sequence[Tensor]) -> OuterGradient:
        """Returns those of a loss, by one gradient."""
        value, _ = loss_and_outputs(loss())
        check_loss(value, "the outer loss")
        gradients = vjp([value], [*space.tensors, *hyperparameters])
        count = len(space.tensors)
        return cls(value.detach(), space.flatten(gradients[:count]), gradients[count:])

    def summed(self, hyperparameters: Sequence[Tensor], all_reduce: AllReduce) -> OuterGradient:
        """Returns those of the sum of all processes' losses, by one collective."""
        parts = [self.value, self.v, *self.direct]
        value, v, *direct = summed(parts, [self.value, self.v, *hyperparameters], all_reduce)
        assert value is not None
        assert v is not None
        return OuterGradient(value, v, direct)


def assembled(
    outer: OuterGradient,
    hyperparameters: Sequence[Tensor],
    mixed: Sequence[Tensor | None],
    inner_losses: Sequence[Tensor],
    solution: SolveResult,
) -> Hypergradient:
    """Puts both terms together; NaN or infinity anywhere shows in the status."""
    direct = [torch.zeros_like(h) if d is None else d for h, d in zip(hyperparameters, outer.direct, strict=True)]
    indirect = [torch.zeros_like(h) if m is None else -m for h, m in zip(hyperparameters, mixed, strict=True)]
    if not all(bool(torch.isfinite(t).all()) for t in [outer.value, *inner_losses, *direct, *indirect]):
        solution = replace(solution, status=Status.NONFINITE)
    pairs = zip(outer.direct, mixed, strict=True)
    unused = tuple(index for index, (d, m) in enumerate(pairs) if d is None and m is None)
    return Hypergradient(direct, indirect, outer.value, solution, unused=unused)


def check_used(result: Hypergradient, hyperparameters: Sequence[Tensor], allow_unused: bool) -> None:
    """Raises ValueError if a hyperparameter enters neither loss, unless that is allowed."""
    if result.unused and not allow_unused:
        index = result.unused[0]
        raise ValueError(
            f"hyperparameter {index}, of shape {tuple(hyperparameters[index].shape)}, does not influence the gradient "
            "of the inner loss, nor the outer loss, so that implicit differentiation cannot tune it; for a learning "
            "rate, ExactGeN or a sweep is the tool. Pass allow_unused=True to get zeros"
        )


def _resolved_differences(
    inner_loss: Loss, outer_loss: Loss, parameters: Sequence[Tensor], hyperparameters: Sequence[Tensor]
) -> list[Tensor]:
    space, result = ParameterSpace(parameters), []
    for h in hyperparameters:
        slopes = []
        for index in range(h.numel()):
            hyper_space = ParameterSpace([h])
            origin, unit = hyper_space.values, torch.zeros(h.numel(), dtype=h.dtype, device=h.device)
            width = torch.finfo(h.dtype).eps ** (1 / 3) * max(1.0, abs(float(origin[index])))
            unit[index] = width
            ends = []
            with space.restored(), hyper_space.restored():
                for moved in (origin + unit, origin - unit):
                    hyper_space.assign(moved)
                    _minimize(inner_loss, space)
                    ends.append(float(loss_and_outputs(outer_loss())[0].detach()))
            slopes.append((ends[0] - ends[1]) / (2 * width))
        result.append(torch.tensor(slopes, dtype=h.dtype, device=h.device).reshape(h.shape))
    return result


def _minimize(loss: Loss, space: ParameterSpace) -> None:
    """Moves the parameters to the minimum near them by Newton's method."""
    best = math.inf
    for _ in range(50):
        operator = HessianOperator(loss, space.tensors)
        gradient = operator.gradient
        norm = float(torch.linalg.vector_norm(gradient))
        if norm >= best / 2 and norm <= math.sqrt(torch.finfo(space.dtype).eps):
            return  # quadratic convergence has ended at rounding
        best = min(best, norm)
        space.assign(space.values - Direct().solve(operator, gradient).x)
    raise RuntimeError(f"Newton's method did not solve the inner problem: gradient norm {best:.3g} after 50 steps")

"""One estimate that is moved a little at every solve, while weights and batches change."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers.base import Damping, Solver, SolveResult, Status
from lightning_ifthpo.solvers.series import measured_step_size


@dataclass(frozen=True)
class Amortized(Solver):
    """A few steps x ← x + κS(b − Ax) from the last estimate, at the pace at which training itself would respond.

    In minibatch training every solve has another A and another b, so that solving one of them well fits its noise. This
    moves a persistent estimate by Richardson's iteration, preconditioned by S, the inner optimizer's own lasting step
    (learning rate over 1 − β, times its preconditioner), and so averages over many batches. A is damped by S⁻¹/horizon:
    the effect of a hyperparameter is followed over that many training steps, beyond which it cannot be predicted.

    κ = min(1, 1/L) with L the largest curvature seen along the estimate and its moves, in units of S⁻¹, since an
    optimizer that lives at the edge of its stability would make a plain iteration diverge; and ‖x‖ is kept below
    horizon · ‖b‖ (in the norms of S⁻¹ and S), which A⁻¹b never exceeds. Use it with a positive semi-definite curvature,
    Gauss–Newton; along negative curvature beyond the damping the status is NEGATIVE_CURVATURE.

    The residual is that of the estimate before its last move, on the present batches. It says little about the quality
    of the hypergradient, because the operator changes with every batch.

    Cost: `products` products.

    Attributes:
        products: Products per solve, at least 2: a single one does not know the curvature along the move it leads to.
        rule: The inner optimizer's update, filled in by `bound_to`; without it S is 1/λ_max, measured at each solve.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> operator, b, x = MatrixOperator(torch.diag(torch.tensor([1.0, 4.0]))), torch.tensor([1.0, 1.0]), None
    >>> solver = Amortized(products=2, horizon=10_000)
    >>> for _ in range(20):
    ...     x = solver.solve(operator, b, x).x
    >>> x
    tensor([0.9996, 0.2500])
    """

    products: int = 2
    damping: Damping = "horizon"
    rule: UpdateRule | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("products", self.products, 2)

    def bound_to(self, rule: UpdateRule) -> Self:
        """Returns this solver with the inner optimizer's update filled in."""
        return replace(super().bound_to(rule), rule=rule)

    def solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None = None) -> SolveResult:
        """Returns the estimate x0 of (A + δI)⁻¹ b, moved `products` times; see `Solver.solve`."""
        if self.rule is not None:
            return super().solve(operator, b, x0)
        step_size, _, checks = measured_step_size(operator)
        result = self.bound_to(UpdateRule(step_size)).solve(operator, b, x0)
        return replace(result, checks=result.checks + checks, step_size=step_size)

    def _solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None) -> SolveResult:
        assert self.rule is not None
        step = torch.as_tensor(self.rule.step, dtype=b.dtype, device=b.device)
        left = self.products
        x, residual = torch.zeros_like(b), b
        curvatures = [0.0]
        if x0 is not None and bool(x0.any()):
            image = operator.matvec(x0)
            x, residual, left = x0, b - image, left - 1
            curvatures.append(_ratio(x0 @ image, _squared_length(x0, step)))
        while left:
            move = step * residual
            image = operator.matvec(move)
            curvatures.append(_ratio(move @ image, move @ residual))  # S⁻¹ · move is the residual
            pace = 1.0 / max(1.0, *curvatures)
            x, residual, left = x.add(move, alpha=pace), residual.sub(image, alpha=pace), left - 1
        error = float(torch.linalg.vector_norm(residual)) if math.isfinite(sum(curvatures)) else math.nan
        x = x.add(step * residual, alpha=1.0 / max(1.0, *curvatures))
        length, longest = float(_squared_length(x, step)), self.horizon**2 * float((step * b) @ b)
        if length > longest:
            x = x * math.sqrt(longest / length)
        status = Status.NEGATIVE_CURVATURE if min(curvatures) < 0.0 else Status.COMPLETE
        return SolveResult(x, error, self.products, status)


def _squared_length(x: Tensor, step: Tensor) -> Tensor:
    """Returns x·S⁻¹x: lengths in units of the distance that one lasting step covers.

    Where S is zero x cannot move, and does not count.
    """
    return (torch.where(step > 0.0, 1.0 / step, 0.0) * x) @ x


def _ratio(curvature: Tensor, squared_length: Tensor) -> float:
    """Returns x·Ax / x·S⁻¹x, zero for x = 0; dimensionless: a plain iteration is stable below 2."""
    return float(curvature / squared_length) if squared_length > 0.0 else 0.0

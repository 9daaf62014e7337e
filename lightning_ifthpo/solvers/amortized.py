"""One persistent estimate that every solve moves a little, while weights and batches change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_ifthpo.core.vectors import inverse_weighted_square, length, weighted_square
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers.base import Damping, Solver, SolveResult, Status, at_least, is_negative
from lightning_ifthpo.solvers.series import measured_step_size
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class Amortized(Solver):
    """A few steps x ← x + κS(b − Ax) from the last estimate, at the pace at which training itself would respond.

    In minibatch training every solve has another A and another b, and an accurate solution of one of them fits its
    noise. This solver moves one persistent estimate by Richardson's iteration, and so averages over many batches, as
    AmIGO (Arbel and Mairal 2022) and SOBA (Dagréou et al. 2022) do. Ours differs in step and damping: S is the long-run
    step of the inner optimizer (learning rate over 1 − β, times the preconditioner), and A is damped by S⁻¹/horizon, so
    that the effect of a hyperparameter is followed over that many training steps.

    κ = min(1, 1/L) with L the largest curvature seen along the estimate and its moves, in units of S⁻¹: an optimizer
    at its edge of stability would make a plain iteration diverge. ‖x‖ is kept below horizon · ‖b‖ (in the norms of S⁻¹
    and S), which A⁻¹b never exceeds, also at the start. Use it with a positive semi-definite curvature, such as
    Gauss–Newton; along negative curvature beyond the damping the status is NEGATIVE_CURVATURE. The residual says little
    about the quality of the hypergradient, because the operator changes with every batch.

    The result is the estimate after the last measured move. `next_start` has made one move more, whose product nobody
    needs until the next solve.

    Cost: `products` products. Without an optimizer (`with_optimizer`) S is 1/λ_max, measured at each solve.

    Attributes:
        products: Products per solve, at least 2, because the first does not show the curvature along the move.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> operator, b, x = MatrixOperator(torch.diag(torch.tensor([1.0, 4.0]))), torch.tensor([1.0, 1.0]), None
    >>> solver = Amortized(products=2, horizon=10_000)
    >>> for _ in range(20):
    ...     x = solver.solve(operator, b, x).next_start
    >>> x
    tensor([0.9996, 0.2500])
    """

    products: int = at_least(2, default=2)
    damping: Damping = field(default="horizon", kw_only=True)

    def solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None = None) -> SolveResult:
        """Returns the estimate x0 of (A + δI)⁻¹ b after its moves; see `Solver.solve`."""
        if self.rule is not None:
            return super().solve(operator, b, x0)
        step_size, _, extra = measured_step_size(operator)
        result = self.with_optimizer(UpdateRule(step_size)).solve(operator, b, x0)
        return replace(result, extra_products=result.extra_products + extra, step_size=step_size)

    _scales_by_itself = True

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        """In place where it can be: with ten million weights a new vector costs as much as half a gradient."""
        assert self.rule is not None, "solve() fills it in"
        step = torch.as_tensor(self.rule.step_size, dtype=b.dtype, device=b.device)
        longest = self.horizon**2 * float(weighted_square(b, step))
        x, residual, left = x0, b, self.products
        curvatures, parts = [0.0], []
        if x is not None:
            x = _shortened(x, step, longest)
            image = system.matvec(x)
            curvatures.append(_ratio(x @ image, inverse_weighted_square(x, step)))
            residual, left = image.neg_().add_(b), left - 1
            parts.append((1.0, x))
        while left:
            move = step * residual
            image = system.matvec(move)
            curvatures.append(_ratio(move @ image, move @ residual))  # S⁻¹ · move is the residual
            pace = 1.0 / max(1.0, *curvatures)
            x = pace * move if x is None else x.add(move, alpha=pace)
            residual = residual.sub(image, alpha=pace) if residual is b else residual.sub_(image, alpha=pace)
            parts, left = [*parts, (pace, move)], left - 1
        assert x is not None
        error = length(residual) / length(b) if math.isfinite(sum(curvatures)) else math.nan
        moved = residual.mul_(step).mul_(1.0 / max(1.0, *curvatures)).add_(x)
        negative = is_negative(min(curvatures), max(map(abs, curvatures)), b.dtype)
        status = Status.NEGATIVE_CURVATURE if negative else Status.COMPLETE
        moved = _shortened(moved, step, longest)
        return SolveResult(x, error, self.products, status, parts=tuple(parts), moved=moved)


def _shortened(x: Tensor, step: Tensor, longest: float) -> Tensor:
    """Returns x, or one in its direction that is as long as A⁻¹b can be at most; squares of lengths in S⁻¹."""
    squared = float(inverse_weighted_square(x, step))
    return x * math.sqrt(longest / squared) if squared > longest else x


def _ratio(curvature: Tensor, squared_length: Tensor) -> float:
    """Returns x·Ax / x·S⁻¹x, zero for x = 0. A plain iteration is stable below 2."""
    return float(curvature / squared_length) if squared_length > 0.0 else 0.0

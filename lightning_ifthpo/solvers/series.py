"""First-order series: the identity and the truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_flag
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status
from lightning_ifthpo.solvers.system import LinearSystem
from lightning_ifthpo.spectrum import lanczos


@dataclass(frozen=True)
class Identity(Solver):
    """A⁻¹ ≈ η I: one step of training seen ahead (T1–T2, Luketina et al. 2016).

    Cost: no product; one extra product measures the residual.

    Attributes:
        step_size: η, in parameter² / loss; the inner learning rate makes it one step of gradient descent.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> Identity(step_size=0.5).solve(MatrixOperator(torch.eye(2)), torch.tensor([1.0, 2.0])).x
    tensor([0.5000, 1.0000])
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_ascending(0.0, self.step_size, math.inf):
            raise ValueError(f"expected a finite step_size > 0, got {self.step_size!r}")

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        x = self.step_size * b
        residual = system.relative_residual(x, b)
        return SolveResult(x, residual, products=0, status=Status.COMPLETE, extra_products=1, step_size=self.step_size)


@dataclass(frozen=True)
class Neumann(Solver):
    """A⁻¹ ≈ η Σ_{j=0..K} (I − ηA)ʲ, the truncated Neumann series.

    After Lorraine, Vicol and Duvenaud (2019), with the sign of a descent step: K products and K + 1 summands. At a
    minimum it equals K + 1 unrolled steps of gradient descent with learning rate η.

    It converges where all eigenvalues lie in (0, 2/η); otherwise its terms grow, by |1 − ηλ| each. Since A is symmetric
    the terms can grow for no other reason, so the solve stops at the first that does and returns the sum before it,
    with status NEGATIVE_CURVATURE if an eigenvalue is negative, else DIVERGED.

    With step_size="optimizer" η is the inner optimizer's own lasting step for each weight, learning rate over 1 − β
    times its preconditioner: the series of Adam, RMSprop or heavy ball, as training would go on from here.

    Cost: K products, and one extra product for the residual; step_size="auto", and growing terms, cost at most 10 extra
    products more, on λ_max and λ_min.

    Attributes:
        terms: K.
        step_size: η, in parameter² / loss, one number or one for each weight, [n]; "auto" measures λ_max and takes
            1/λ_max; "optimizer" takes that of `with_optimizer`.
        safeguard: Stop when the terms grow. Without it the series may reach any size.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> result = Neumann(terms=1, step_size=0.5).solve(MatrixOperator(torch.eye(1)), torch.tensor([1.0]))
    >>> result.x, result.relative_residual, result.status.value
    (tensor([0.7500]), 0.25, 'complete')
    """

    terms: int = 10
    step_size: float | Tensor | Literal["auto", "optimizer"] = "auto"
    safeguard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("terms", self.terms, 0)
        require_flag("safeguard", self.safeguard)
        if isinstance(self.step_size, Tensor):
            valid = bool((torch.isfinite(self.step_size) & (self.step_size >= 0.0)).all())
        elif isinstance(self.step_size, str):
            valid = self.step_size in ("auto", "optimizer")
        else:
            valid = is_ascending(0.0, self.step_size, math.inf)
        if not valid:
            raise ValueError(f"expected a finite step_size > 0, 'auto' or 'optimizer', got {self.step_size!r}")

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        step_size, negative, extra = self._resolved_step_size(system)
        total, products, grew = self._sum(system, b, step_size)
        if grew and not extra:
            _, negative, extra = measured_step_size(system.matrix)
        x = step_size * total
        residual = system.relative_residual(x, b)
        status = Status.NEGATIVE_CURVATURE if negative else Status.DIVERGED if grew else Status.COMPLETE
        reported = step_size if isinstance(step_size, float) else None
        return SolveResult(x, residual, products, status, extra_products=extra + 1, step_size=reported)

    def _resolved_step_size(self, system: LinearSystem) -> tuple[float | Tensor, bool, int]:
        """Returns η, whether measuring it showed negative curvature, and the products that were spent on it."""
        if not isinstance(self.step_size, str):
            return self.step_size, False, 0
        if self.step_size == "auto":
            return measured_step_size(system.matrix)
        if self.rule is None:
            raise ValueError(
                "step_size='optimizer' needs the inner optimizer: use the solver inside IFTHypergradient, or call "
                "solver.with_optimizer(UpdateRule.of(optimizers, parameters))"
            )
        # as a tensor, because it may be zero: a learning rate is at the beginning of a warm-up
        step = self.rule.step_size
        return step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64), False, 0

    def _sum(self, system: LinearSystem, b: Tensor, step_size: float | Tensor) -> tuple[Tensor, int, bool]:
        """Returns Σ (I − Aη)ʲ b up to the term before the first that grows, the products, and whether one did."""
        term = total = b
        for products in range(1, self.terms + 1):
            new = term - system.matvec(step_size * term)
            if self.safeguard and _grows(term, new, step_size):
                return total, products, True
            term = new
            total = total + term
        return total, self.terms, False


def measured_step_size(operator: CurvatureOperator) -> tuple[float, bool, int]:
    """Returns 1/λ_max, whether there is negative curvature, and the products spent (at most 10).

    A cold estimate from a single product can be far too small, and then the series diverges; ten Lanczos steps settle
    λ_max to a few percent on spectra seen in training, and the step may be wrong by a factor of two.
    """
    ends = lanczos(operator, max_iterations=10, rtol=0.05)
    largest, smallest = float(ends.largest[0] + ends.largest_bounds[0]), float(ends.smallest[0])
    scale = max(largest, abs(smallest))
    # sqrt(eps): the Ritz value of a zero eigenvalue is a few eps of the largest, of either sign
    negative = smallest < -(torch.finfo(operator.dtype).eps ** 0.5) * scale
    return (1.0 / scale if scale > 0.0 else 1.0), negative, ends.products


def _grows(term: Tensor, new: Tensor, step_size: float | Tensor) -> bool:
    """Returns whether √(tᵀηt) has grown, in which Aη is symmetric."""
    before, after = torch.stack([term @ (step_size * term), new @ (step_size * new)]).tolist()
    # 100 eps: the rounding of a term whose curvature is zero, which keeps its length
    return not after <= before * (1.0 + 100.0 * torch.finfo(term.dtype).eps)

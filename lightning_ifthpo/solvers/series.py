"""First-order series: the identity and the truncated Neumann series."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_ifthpo.core.validation import is_ascending, is_number, require_flag
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status, at_least, is_finite_or_word, is_negative
from lightning_ifthpo.solvers.system import LinearSystem
from lightning_ifthpo.spectrum import lanczos


@dataclass(frozen=True)
class Identity(Solver):
    """A⁻¹ ≈ η I: the effect of one training step (T1–T2, Luketina et al. 2016).

    Cost: no product, so that the residual is unknown.

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
        return SolveResult(self.step_size * b, None, products=0, status=Status.COMPLETE, step_size=self.step_size)


@dataclass(frozen=True)
class Neumann(Solver):
    """A⁻¹ ≈ η Σ_{j=0..K} (I − ηA)ʲ, the truncated Neumann series.

    After Lorraine, Vicol and Duvenaud (2019), with the sign of a descent step: K products and K + 1 summands. At a
    minimum it equals K + 1 unrolled steps of gradient descent with learning rate η.

    It converges if all eigenvalues lie in (0, 2/η). Otherwise, and only then because A is symmetric, its terms grow, by
    |1 − ηλ| each. The solve then returns the sum before the first term that grows, with the status NEGATIVE_CURVATURE
    if an eigenvalue is negative, else DIVERGED.

    Cost: K products, and one extra product for the residual; at most 10 more for λ_max and λ_min if step_size="auto" or
    the terms grow.

    Attributes:
        terms: K.
        step_size: η, in parameter² / loss, one number or one for each weight, [n]; "auto" takes 1/λ_max, measured;
            "optimizer" takes the long-run step of the inner optimizer, learning rate over 1 − β times preconditioner:
            the series of Adam, RMSprop or heavy ball, if training continued from here.
        safeguard: Stop when the terms grow. Without it the series may reach any size.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> result = Neumann(terms=1, step_size=0.5).solve(MatrixOperator(torch.eye(1)), torch.tensor([1.0]))
    >>> result.x, result.relative_residual, result.status.value
    (tensor([0.7500]), 0.25, 'complete')
    """

    terms: int = at_least(0, default=10)
    step_size: float | Tensor | Literal["auto", "optimizer"] = "auto"
    safeguard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("safeguard", self.safeguard)
        is_zero = is_number(self.step_size) and self.step_size == 0.0
        if is_zero or not is_finite_or_word(self.step_size, "auto", "optimizer"):
            raise ValueError(f"expected a finite step_size > 0, 'auto' or 'optimizer', got {self.step_size!r}")

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        step_size, negative, extra = self.step_size, False, 0
        if isinstance(step_size, str) and step_size == "auto":
            step_size, negative, extra = measured_step_size(system.matrix)
        elif isinstance(step_size, str):
            if self.rule is None:
                raise ValueError(
                    "step_size='optimizer' needs the inner optimizer: use the solver inside IFTHypergradient, or call "
                    "solver.with_optimizer(UpdateRule.of(optimizers, parameters))"
                )
            step = self.rule.step_size
            # as a tensor, because only positive numbers are reported, and a warm-up begins at zero
            step_size = step if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64)
        total, products, grew = self._sum(system, b, step_size)
        if grew and not extra:
            _, negative, extra = measured_step_size(system.matrix)
        x = step_size * total
        residual = system.relative_residual(x, b)
        status = Status.NEGATIVE_CURVATURE if negative else Status.DIVERGED if grew else Status.COMPLETE
        reported = step_size if isinstance(step_size, float) else None
        return SolveResult(x, residual, products, status, extra_products=extra + 1, step_size=reported)

    def _sum(self, system: LinearSystem, b: Tensor, step_size: float | Tensor) -> tuple[Tensor, int, bool]:
        """Returns Σ (I − Aη)ʲ b before the first term that grows, the products, and whether a term grew."""
        term = total = b
        for products in range(1, self.terms + 1):
            new = term - system.matvec(step_size * term)
            if self.safeguard and _grows(term, new, step_size):
                return total, products, True
            term = new
            total = total + term
        return total, self.terms, False


def measured_step_size(operator: CurvatureOperator) -> tuple[float, bool, int]:
    """Returns 1/λ_max, whether there is negative curvature, and the products used (at most 10)."""
    # Ten Lanczos steps find λ_max to a few percent on spectra seen in training, and a factor of two would do. A single
    # product can give far too small a value, and then the series diverges.
    ends = lanczos(operator, max_iterations=10, rtol=0.05)
    largest, smallest = float(ends.largest[0] + ends.largest_bounds[0]), float(ends.smallest[0])
    scale = max(largest, abs(smallest))
    return (1.0 / scale if scale > 0.0 else 1.0), is_negative(smallest, scale, operator.dtype), ends.products


def _grows(term: Tensor, new: Tensor, step_size: float | Tensor) -> bool:
    """Returns whether √(tᵀηt), the norm in which Aη is symmetric, has grown."""
    before, after = torch.stack([term @ (step_size * term), new @ (step_size * new)]).tolist()
    # 100 eps: rounding, where the curvature is zero and the term keeps its length
    return not after <= before * (1.0 + 100.0 * torch.finfo(term.dtype).eps)

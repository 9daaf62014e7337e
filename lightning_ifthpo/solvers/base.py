"""What every solver of A x = b shares: options, checks, damping, and a result with its residual and status."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ifthpo.core.validation import is_number, require_at_least
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers.system import LinearSystem

Damping: TypeAlias = float | Tensor | Literal["horizon"]


class Status(str, Enum):
    """How a solve ended."""

    CONVERGED = "converged"
    """The residual is below the tolerance."""
    COMPLETE = "complete"
    """All requested products are done, and no tolerance was asked for."""
    MAX_ITERATIONS = "max_iterations"
    """All allowed products are done, and the residual is above the tolerance."""
    NEGATIVE_CURVATURE = "negative_curvature"
    """The operator is not positive definite: the weights are not at a minimum of the inner loss."""
    DIVERGED = "diverged"
    """The iteration grows: its step is too long for the largest eigenvalue."""
    NONFINITE = "nonfinite"
    """A NaN or infinity was in the input or arose during the solve; the solution is zero."""

    @property
    def succeeded(self) -> bool:
        """Whether the solver did what it was asked for; the residual says how accurate that is."""
        return self in (Status.CONVERGED, Status.COMPLETE)


@dataclass(frozen=True)
class SolveResult:
    """An approximate solution of A x = b, with its residual and status.

    Attributes:
        x: [n]; always finite.
        relative_residual: ‖Ax − b‖ / ‖b‖, with A damped as the solver was asked to.
        products: Products with A that led to x.
        status: How the solve ended.
        extra_products: Further products, which measured a step size or the residual.
        step_size: The step size that was used, by solvers that have one.
    """

    x: Tensor
    relative_residual: float
    products: int
    status: Status
    extra_products: int = 0
    step_size: float | None = None


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Options of a method for A x = b. It holds no state, so that one instance can serve many solves.

    Attributes:
        damping: δ in (A + δI) x = b, in loss / parameter²; or "horizon" for 1/(η·horizon), which needs an optimizer.
        horizon: Training steps over which the effect of a hyperparameter is followed, with damping="horizon".
        rule: The inner optimizer's update, which `with_optimizer` fills in. Its weight decay is added to the damping.
    """

    damping: Damping = 0.0
    horizon: int = 100
    rule: UpdateRule | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.damping, Tensor):
            valid = bool((torch.isfinite(self.damping) & (self.damping >= 0.0)).all())
        elif isinstance(self.damping, str):
            valid = self.damping == "horizon"
        else:
            valid = is_number(self.damping) and 0.0 <= self.damping < math.inf
        if not valid:
            raise ValueError(f"expected a finite damping >= 0 or 'horizon', got {self.damping!r}")
        require_at_least("horizon", self.horizon, 1)

    def with_optimizer(self, rule: UpdateRule) -> Self:
        """Returns this solver for weights that an optimizer with this update rule trains."""
        return replace(self, rule=rule)

    @property
    def needs_optimizer(self) -> bool:
        """Whether the damping depends on an optimizer that is not known yet."""
        return isinstance(self.damping, str) and self.rule is None

    def system(self, operator: CurvatureOperator) -> LinearSystem:
        """Returns A + δI, the matrix that is solved with.

        Raises:
            ValueError: If damping="horizon" and no optimizer is known.
        """
        if self.needs_optimizer:
            raise ValueError(
                "damping='horizon' stands for 1/(η·horizon) and needs the inner optimizer: use the solver inside "
                "IFTHypergradient, call solver.with_optimizer(UpdateRule(step_size=lr)), or pass a number"
            )
        if self.rule is None:
            return LinearSystem(operator, self.damping)  # type: ignore[arg-type]
        damping = self.rule.damping(self.horizon) if isinstance(self.damping, str) else self.damping
        decays = bool(torch.as_tensor(self.rule.decay).any())
        return LinearSystem(operator, damping + self.rule.decay if decays else damping)

    def solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None = None) -> SolveResult:
        """Returns an approximate solution of (A + δI) x = b; a failed solve is a status, never a NaN.

        Args:
            operator: A, symmetric, on vectors [n].
            b: [n], of any scale.
            x0: [n], the first iterate; zero where not given. Methods that cannot use one ignore it.

        Raises:
            ValueError: If b or x0 does not have shape [n], or damping="horizon" and no optimizer is known.
        """
        for name, vector in (("b", b), ("x0", x0)):
            if vector is not None and vector.shape != (operator.size,):
                raise ValueError(f"expected {name} of shape ({operator.size},), got {tuple(vector.shape)}")
        # Norms of very small or large vectors under- or overflow when squared: solve for b of length one.
        largest = float(torch.linalg.vector_norm(b, math.inf))
        if not math.isfinite(largest):
            return SolveResult(torch.zeros_like(b), math.nan, 0, Status.NONFINITE)
        if largest == 0.0:
            return SolveResult(torch.zeros_like(b), 0.0, 0, Status.CONVERGED)
        norm = largest * torch.linalg.vector_norm(b / largest)
        x0 = None if x0 is None else x0 / norm
        if x0 is not None and not bool(torch.linalg.vector_norm(x0, math.inf) < torch.finfo(b.dtype).max ** (1 / 3)):
            x0 = None  # x0 is so much longer than b that its squared norm would overflow: start from zero
        result = self._solve(self.system(operator), b / norm, x0)
        extent = float(torch.linalg.vector_norm(result.x, math.inf))
        if math.isnan(result.relative_residual) or not math.isfinite(extent):
            return replace(result, x=torch.zeros_like(b), relative_residual=math.nan, status=Status.NONFINITE)
        return replace(result, x=result.x * norm)

    @abstractmethod
    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        """Solves (A + δI) x = b for b of length one."""


def status_without_tolerance(residual: float, dtype: torch.dtype) -> Status:
    """Returns CONVERGED for a residual that is only rounding, else COMPLETE."""
    # sqrt(eps): a consistent system leaves κ·eps, an inconsistent one the part of b in the null space
    return Status.CONVERGED if residual <= torch.finfo(dtype).eps ** 0.5 else Status.COMPLETE

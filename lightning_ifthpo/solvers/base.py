"""The base class of solvers of A x = b, and their result with its residual and status."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_ifthpo.core.validation import is_number, require_at_least
from lightning_ifthpo.core.vectors import divided, length
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers.system import LinearSystem

Damping: TypeAlias = float | Tensor | Literal["horizon"]


class Status(str, Enum):
    """How a solve ended."""

    CONVERGED = "converged"
    """The true residual, measured by a product, is below the tolerance; below √eps where none was asked for."""
    COMPLETE = "complete"
    """All requested products are done, and no tolerance was asked for."""
    MAX_ITERATIONS = "max_iterations"
    """The residual is above the tolerance, and no product is left, or none would lower it."""
    NEGATIVE_CURVATURE = "negative_curvature"
    """The operator is negative along a direction by more than rounding: the weights are not at a minimum."""
    DIVERGED = "diverged"
    """The iteration grows: its step is too long for the largest eigenvalue."""
    NONFINITE = "nonfinite"
    """A NaN or infinity was in the input or arose during the solve; the solution is zero."""

    @property
    def succeeded(self) -> bool:
        """Whether the solve converged, or completed its products; the residual says how accurate x is."""
        return self in (Status.CONVERGED, Status.COMPLETE)


@dataclass(frozen=True)
class SolveResult:
    """An approximate solution of A x = b, with its residual and status.

    Attributes:
        x: [n]; always finite.
        relative_residual: ‖Ax − b‖ / ‖b‖, with the damping in A; None if no product has measured it.
        products: Products with A that led to x.
        status: How the solve ended.
        extra_products: Further products, which measured a step size or the residual.
        step_size: The step size that was used; None for solvers without one.
        parts: x as a sum of numbers times vectors whose products the operator has computed; empty if it is none.
        moved: x after one more step, whose residual no product has measured; None for solvers that stop at x.
    """

    x: Tensor
    relative_residual: float | None
    products: int
    status: Status
    extra_products: int = 0
    step_size: float | None = None
    parts: tuple[tuple[float, Tensor], ...] = ()
    moved: Tensor | None = None

    @property
    def next_start(self) -> Tensor:
        """First iterate for the next solve of a similar system, [n]."""
        return self.x if self.moved is None else self.moved

    def scaled(self, factor: float) -> SolveResult:
        """Returns the result for a right-hand side that is a factor longer."""
        return replace(
            self,
            x=self.x * factor,
            parts=tuple((share * factor, vector) for share, vector in self.parts),
            moved=None if self.moved is None else self.moved * factor,
        )

    def failed(self) -> SolveResult:
        """Returns a solution of zero with the status NONFINITE."""
        return replace(
            self,
            x=torch.zeros_like(self.x),
            relative_residual=math.nan,
            status=Status.NONFINITE,
            parts=(),
            moved=None,
        )


def at_least(minimum: int, *, default: int) -> Any:
    """Returns a field for an integer option of a `Solver`, which checks its minimum."""
    return field(default=default, metadata={"minimum": minimum})


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Options of a method for A x = b. It has no state, so that one instance can serve many solves.

    Attributes:
        damping: δ in (A + δI) x = b, in loss / parameter²; or "horizon" for 1/(η·horizon), which needs an optimizer.
        horizon: Training steps over which the effect of a hyperparameter is followed, with damping="horizon".
        rule: The inner optimizer's update, set by `with_optimizer`. Its weight decay is added to the damping.
    """

    damping: Damping = 0.0
    horizon: int = at_least(1, default=100)
    rule: UpdateRule | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_finite_or_word(self.damping, "horizon"):
            raise ValueError(f"expected a finite damping >= 0 or 'horizon', got {self.damping!r}")
        for option in fields(self):
            if "minimum" in option.metadata:
                require_at_least(option.name, getattr(self, option.name), option.metadata["minimum"])

    def with_optimizer(self, rule: UpdateRule) -> Self:
        """Returns this solver for weights that an optimizer with this update rule trains."""
        return replace(self, rule=rule)

    @property
    def needs_optimizer(self) -> bool:
        """Whether the damping depends on an optimizer that is not known yet."""
        return isinstance(self.damping, str) and self.rule is None

    def system(self, operator: CurvatureOperator) -> LinearSystem:
        """Returns the system with A + δI; raises ValueError if damping="horizon" and no optimizer is known."""
        if self.needs_optimizer:
            raise ValueError(
                "damping='horizon' stands for 1/(η·horizon) and needs the inner optimizer: use the solver inside "
                "IFTHypergradient, call solver.with_optimizer(UpdateRule(step_size=lr)), or pass a number"
            )
        if self.rule is None:
            return LinearSystem(operator, self.damping)  # type: ignore[arg-type]
        if isinstance(self.damping, str):
            return LinearSystem(operator, self.rule.damping(self.horizon))
        return LinearSystem(operator, self.damping + self.rule.damping())

    def solve(self, operator: CurvatureOperator, b: Tensor, x0: Tensor | None = None) -> SolveResult:
        """Returns an approximate solution of (A + δI) x = b; a failed solve is a status, never a NaN.

        Args:
            operator: A, symmetric, on vectors [n].
            b: [n], of any scale.
            x0: [n], the first iterate, by default zero. Methods that cannot use one ignore it.

        Raises:
            ValueError: If b or x0 does not have shape [n], or damping="horizon" and no optimizer is known.
        """
        for name, vector in (("b", b), ("x0", x0)):
            if vector is not None and vector.shape != (operator.size,):
                raise ValueError(f"expected {name} of shape ({operator.size},), got {tuple(vector.shape)}")
        norm = length(b)
        if not norm <= torch.finfo(b.dtype).max:  # nor can b be divided by a norm beyond the largest number
            return SolveResult(b, math.nan, 0, Status.NONFINITE).failed()
        if norm == 0.0:
            return SolveResult(torch.zeros_like(b), 0.0, 0, Status.CONVERGED)
        # for b of length one, because the squares of very small or large entries under- or overflow
        wide = torch.finfo(b.dtype).max > 1e30  # in float16, products with a b of length 1,000 overflow
        scale = 1.0 if self._scales_by_itself and wide and 1e-6 < norm < 1e6 else norm
        if x0 is not None:
            start = length(x0) / norm
            # below max^(1/3), the sum of max^(1/3) squares does not overflow; a longer x0 is replaced by zero
            x0 = _over(x0, scale) if 0.0 < start < torch.finfo(b.dtype).max ** (1 / 3) else None
        result = self._solve(self.system(operator), _over(b, scale), x0)
        residual = 0.0 if result.relative_residual is None else result.relative_residual
        if result.status is Status.NONFINITE or not math.isfinite(residual):
            return result.failed()
        result = result if scale == 1.0 else result.scaled(scale)
        return result if math.isfinite(length(result.x)) else result.failed()

    _scales_by_itself: ClassVar[bool] = False
    """Whether `_solve` takes a b of another length than one, which saves copies of vectors."""

    @abstractmethod
    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        """Solves (A + δI) x = b for b of length one; x0 is not zero, and neither is changed."""


def _over(vector: Tensor, scale: float) -> Tensor:
    return vector if scale == 1.0 else divided(vector, scale)


def is_finite_or_word(value: Any, *words: str) -> bool:
    """Whether a value is a finite number >= 0, a tensor of such numbers, or one of the words."""
    if isinstance(value, str):
        return value in words
    if isinstance(value, Tensor):
        return bool((torch.isfinite(value) & (value >= 0.0)).all())
    return is_number(value) and 0.0 <= value < math.inf


def rounding_residual(dtype: torch.dtype) -> float:
    """Returns the relative residual below which a solve without a tolerance counts as converged: √eps."""
    # a consistent system leaves (condition number) · eps, an inconsistent one b's part in the null space
    return math.sqrt(torch.finfo(dtype).eps)


def status_without_tolerance(residual: float, dtype: torch.dtype) -> Status:
    """Returns CONVERGED for a residual that is only rounding, else COMPLETE."""
    return Status.CONVERGED if residual <= rounding_residual(dtype) else Status.COMPLETE


def is_negative(curvature: float, largest: float, dtype: torch.dtype) -> bool:
    """Whether a curvature is negative by more than rounding, with the largest curvature that was seen."""
    # √eps: along a null vector a product leaves a few eps of the largest curvature, of either sign, and differences of
    # gradients leave eps^⅔ (see FiniteDifferenceOperator)
    return curvature < -math.sqrt(torch.finfo(dtype).eps) * largest

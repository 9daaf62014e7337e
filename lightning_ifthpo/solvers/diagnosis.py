"""Why a solve failed, in words, numbers and remedies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status
from lightning_ifthpo.solvers.causes import Cause
from lightning_ifthpo.solvers.krylov import ConjugateGradient, MinimumResidual
from lightning_ifthpo.solvers.series import Identity, Neumann
from lightning_ifthpo.solvers.system import LinearSystem
from lightning_ifthpo.spectrum.basis import KrylovBasis, random_vector

# Enough to choose a damping or a step size. Measured on 64 Hessians and Gauss–Newton matrices of four networks (n up
# to 8,970, after 0 to 400 steps on scikit-learn's digits) with a bound of 1e-2: at most 26 products were used, λ_max
# was off by at most 0.03 %, and λ_min by at most 4.1 % of λ_max.
_PRODUCTS = 58


def diagnose(
    system: LinearSystem | CurvatureOperator,
    result: SolveResult,
    b: Tensor | None = None,
    *,
    solver: Solver | None = None,
    curvature: str | None = None,
) -> str:
    """Returns why the solve of a system failed, the numbers that show it and what to do; "" if it succeeded.

    A solve that succeeded in form, but is known to be worse than x = 0, gets a diagnosis too, without a product.

    Args:
        system: The system with its damping, or its matrix.
        result: The solve.
        b: The right-hand side, [n]; without it a singular system cannot be told from an ill-conditioned one for sure.
        solver: The solver, so that the remedies fit.
        curvature: The name of the curvature, likewise.

    Cost: at most 62 products, for a failed solve.
    """
    system = system if isinstance(system, LinearSystem) else LinearSystem(system)
    settings = settings_of(system, solver, curvature)
    if result.status.succeeded:
        return _worse_than_zero(result, solver, settings)
    return _fault_of_the_map(system, b, settings) or _Diagnosis(system, result, b, solver, settings).cause()


def settings_of(system: LinearSystem, solver: Solver | None, curvature: str | None) -> set[str]:
    """Returns the settings that decide which remedies apply; see `Cause`."""
    settings = {str(system.matrix.dtype).removeprefix("torch."), curvature or "", type(solver).__name__}
    if isinstance(solver, Neumann) and isinstance(solver.step_size, str):
        settings.add(solver.step_size)
    if not bool((torch.as_tensor(system.damping) > 0.0).any()):
        settings.add("undamped")
    return settings


def _worse_than_zero(result: SolveResult, solver: Solver | None, settings: set[str]) -> str:
    """Returns a diagnosis for a residual that is longer than b; "" otherwise, and where that is no fault."""
    residual = result.relative_residual
    if residual is None:
        return ""
    if isinstance(solver, ConjugateGradient | None) and result.step_size is None and residual > 1.0:
        numbers = {"residual": f"{residual:.2g}", "products": result.products}
        return Cause.ILL_CONDITIONED.describe(settings, **numbers, spectrum="", iterations="")
    # |1 − ηλ| > 2 for an eigenvalue of b, so that |ηλ| > 1
    if isinstance(solver, Identity | Neumann) and result.step_size is not None and residual > 2.0:
        step = f"step_size η = {result.step_size:.4g} leaves a relative residual of {residual:.2g}"
        return Cause.STEP_TOO_LONG.describe(settings, step=step, best="1/λ_max")
    return ""


def _fault_of_the_map(system: LinearSystem, b: Tensor | None, settings: set[str]) -> str:
    """Returns what is wrong with A as a map: not finite, not the same twice, or not symmetric. Three products."""
    generator = generator_of(Stream.START_VECTORS)
    u, v = (random_vector(system.matrix, generator) for _ in range(2))
    image, again, other = (system.matvec(vector) for vector in (u, u, v))
    if b is not None and not bool(torch.isfinite(b).all()):
        advice = "look at the outer batch and the weights"
        return Cause.NOT_FINITE.describe(where="the right-hand side, the gradient of the outer loss", advice=advice)
    if not bool(torch.isfinite(image).all()):
        return Cause.NOT_FINITE.describe(
            where="the second derivative of the inner loss",
            advice="look for operations whose derivative is infinite there, such as a norm or a square root at zero",
        )
    length = float(torch.linalg.vector_norm(image))
    difference = float(torch.linalg.vector_norm(image - again))
    # √eps: sums in another order, as on a GPU, differ by some eps
    if difference > torch.finfo(image.dtype).eps ** 0.5 * length:
        return Cause.NOT_THE_SAME_MAP.describe(settings, difference=f"{difference / length:.2g}")
    left, right = float(u @ other), float(v @ image)
    # For random vectors both are about as long as Au. A hundredth of that: differences of gradients in float32 are off
    # by some eps^⅔ = 2e-5 of the length, and an antisymmetric part that matters is of the size of A.
    scale = max(length, float(torch.linalg.vector_norm(other)))
    if abs(left - right) > 1e-2 * scale:
        return Cause.NOT_SYMMETRIC.describe(settings, difference=f"{abs(left - right) / scale:.2g}")
    return ""


@dataclass(frozen=True)
class _Diagnosis:
    """Looks at the spectrum and at the residual of a failed solve."""

    system: LinearSystem
    result: SolveResult
    b: Tensor | None
    solver: Solver | None
    settings: set[str]

    def cause(self) -> str:
        """Returns the cause in words, by at most 59 products."""
        status, dtype = self.result.status, self.system.matrix.dtype
        slow = status is Status.MAX_ITERATIONS
        residual = self.b - self.system.matvec(self.result.x) if slow and self.b is not None else None
        step = self._vector_step()
        operator = self.system.matrix if step is None else self.system.matrix.preconditioned(step)
        spectrum = _Spectrum.of(operator, residual, 1e-2 if not slow else 1e-6)
        too_long = self._too_long(spectrum, scaled=step is not None)
        flat = torch.finfo(dtype).eps ** (2 / 3) * spectrum.scale  # as in MinimumResidual
        negative = spectrum.smallest < -flat and not isinstance(self.solver, MinimumResidual)
        if negative or (status is Status.NEGATIVE_CURVATURE and spectrum.smallest > flat and not too_long):
            return self._negative(spectrum) + (f". In addition, {too_long}" if too_long else "")
        if too_long:
            return too_long
        if status is Status.NONFINITE:
            return Cause.OVERFLOW.describe(self.settings, dtype=str(dtype).removeprefix("torch."))
        return self._unsolved(spectrum, residual, flat)

    def _vector_step(self) -> Tensor | None:
        """Returns the step of a series that takes the optimizer's, [n]."""
        if "optimizer" not in self.settings or self.solver is None or self.solver.rule is None:
            return None
        matrix = self.system.matrix
        return torch.as_tensor(self.solver.rule.step_size, dtype=matrix.dtype, device=matrix.device).expand(matrix.size)

    def _too_long(self, spectrum: _Spectrum, *, scaled: bool) -> str:
        """Returns the diagnosis of a step that is too long for the largest eigenvalue; "" if it is not."""
        step, largest = 1.0 if scaled else self.result.step_size, spectrum.largest
        if step is None or not step * largest > 2.0:
            return ""
        if scaled:
            words, best = f"the long-run step of the optimizer times λ_max is {largest:.4g}", f"1/{largest:.4g} of it"
        else:
            words = f"step_size η = {step:.4g} with λ_max = {largest:.4g}, where 2/η = {2.0 / step:.4g}"
            best = f"{1.0 / largest:.4g}"
        return Cause.STEP_TOO_LONG.describe(self.settings, step=words, best=best)

    def _negative(self, spectrum: _Spectrum) -> str:
        damping = torch.as_tensor(self.system.damping)
        damped, needed = "", f"{-spectrum.smallest:.4g}"
        if spectrum.smallest > 0.0:  # too small a part of the spectrum for these products
            damped, needed = ", seen along one direction", "the present one"
        elif "undamped" not in self.settings:
            damped, needed = " beyond the damping", f"the present one plus {needed}"
            if damping.ndim == 0:
                damped = f"{damped} of {float(damping):.4g}"
                needed = f"{float(damping) - spectrum.smallest:.4g}"
        return Cause.NEGATIVE_CURVATURE.describe(self.settings, spectrum=spectrum, damped=damped, damping=needed)

    def _unsolved(self, spectrum: _Spectrum, residual: Tensor | None, flat: float) -> str:
        """Returns why a residual is left: rounding, a null space, or too few iterations."""
        left, dtype = self.result.relative_residual or 0.0, self.system.matrix.dtype
        relative = max(left, 1e-300)
        eps = torch.finfo(dtype).eps
        eps = eps ** (2 / 3) if "finite_difference" in self.settings else eps  # see FiniteDifferenceOperator
        floor = eps * spectrum.scale * self._extent()
        rounding = Cause.ROUNDING.describe(
            self.settings, dtype=str(dtype).removeprefix("torch."), residual=f"{left:.2g}", floor=f"{floor:.1g}"
        )
        if relative <= 10.0 * floor:
            return rounding
        share = spectrum.share_below(flat) if residual is not None else float(abs(spectrum.smallest) <= flat)
        if share > 0.5:
            in_null_space = f"{100.0 * math.sqrt(share) * min(left, 1.0):.2g} % of the length"
            numbers = {"spectrum": spectrum, "damping": f"{1e-3 * spectrum.scale:.1g}", "share": in_null_space}
            return Cause.SINGULAR.describe(self.settings, **numbers)
        # a Krylov method ends before its limit where another run from the true residual does not help
        if self.result.products < getattr(self.solver, "max_iterations", 0):
            return rounding
        return self._slow(spectrum, left)

    def _slow(self, spectrum: _Spectrum, left: float) -> str:
        rtol, iterations, smallest = getattr(self.solver, "rtol", None), "", spectrum.smallest
        if rtol and smallest > 0.0:  # the bound of conjugate gradients
            needed = math.ceil(math.sqrt(spectrum.largest / smallest) * math.log(2.0 / rtol) / 2.0)
            iterations = f" (some {needed})" if needed > self.result.products else ""
        numbers = {"residual": f"{left:.2g}", "products": self.result.products, "iterations": iterations}
        return Cause.ILL_CONDITIONED.describe(self.settings, spectrum=f", {spectrum}", **numbers)

    def _extent(self) -> float:
        """Returns ‖x‖ / ‖b‖; 0 if b is not known."""
        if self.b is None:
            return 0.0
        largest = torch.linalg.vector_norm(self.b, math.inf)
        return float(torch.linalg.vector_norm(self.result.x / largest) / torch.linalg.vector_norm(self.b / largest))


@dataclass(frozen=True)
class _Spectrum:
    """Ritz values of a matrix, [k], ascending, and the squared cosines of their vectors with the start."""

    values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, operator: CurvatureOperator, start: Tensor | None, rtol: float) -> _Spectrum:
        """Returns the spectrum as seen from a start, [n], with both ends known to rtol · scale if products suffice."""
        basis = KrylovBasis(operator, start, generator_of(Stream.START_VECTORS))
        for _ in range(min(_PRODUCTS, operator.size)):
            basis.extend()
            ritz = basis.ritz()
            ends, scale = ritz.bounds[[0, -1]].amax(), ritz.values.abs().amax()
            # a start that lies in an invariant space shows nothing of the rest
            if not basis.finite or (ends <= rtol * scale and not (basis.exhausted and basis.fresh == basis.products)):
                break
        return cls(ritz.values, ritz.weights)

    @property
    def smallest(self) -> float:
        return float(self.values[0])

    @property
    def largest(self) -> float:
        return float(self.values[-1])

    @property
    def scale(self) -> float:
        return max(abs(self.smallest), abs(self.largest))

    def share_below(self, curvature: float) -> float:
        """Returns the share of the start's squared length along eigenvectors of at most this curvature."""
        return float(self.weights[self.values.abs() <= curvature].sum())

    def __format__(self, spec: str) -> str:
        return f"λ_min = {self.smallest:.4g}, λ_max = {self.largest:.4g}"

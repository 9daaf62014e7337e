"""Both ends of a spectrum that changes slowly."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.core.validation import is_ascending, require_at_least, require_choice
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.spectrum.basis import length_of, random_vector
from lightning_ifthpo.spectrum.lanczos import ExtremeEigenvalues, lanczos
from lightning_ifthpo.spectrum.power_iteration import Eigenpair, power_iteration

Method: TypeAlias = Literal["lanczos", "power_iteration"]

# Measured along 2,000 steps of full-batch gradient descent with λ_min about −λ_max/500: five products and 3 % noise
# find the sign of λ_min in 95 % of the measurements; five products and ten times the noise in 32 %; two products and
# 3 % noise, enough for λ_max to 1e-3, in 18 %.
_LEAST_PRODUCTS = 5
_NOISE = 0.03


class SpectrumTracker:
    """Measures both ends of the spectrum of an operator that changes slowly, each time from the last eigenvectors.

    Lanczos starts from their sum, power iteration from each, plus 3 % noise. Without noise, an eigenvalue that becomes
    the largest is missed while its vector is orthogonal to the last ones. With noise it may be found late, by power
    iteration later than by Lanczos: a residual bound shows that an eigenvalue is near, not that none lies beyond. At
    least five products are taken, to resolve a λ_min that is small compared with λ_max.

    Args:
        method: "lanczos", which keeps a basis of up to max_iterations vectors; or "power_iteration", which keeps four
            and needs more products.
        k: Number of eigenvalues at each end, at most n; 1 for power iteration.
        max_iterations: Products at most; for power iteration, at each end.
        rtol: Residual bound at which to stop, relative to max(|λ_max|, |λ_min|).

    Raises:
        ValueError: If an argument is out of range.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> matrix = torch.diag(torch.linspace(-1, 1, 100) ** 3)
    >>> tracker = SpectrumTracker()
    >>> tracker.measure(MatrixOperator(matrix)).products > tracker.measure(MatrixOperator(1.01 * matrix)).products
    True
    """

    def __init__(self, method: Method = "lanczos", *, k: int = 1, max_iterations: int = 30, rtol: float = 1e-2) -> None:
        require_choice("method", method, get_args(Method))
        require_at_least("k", k, 1)
        require_at_least("max_iterations", max_iterations, k + 1)
        if k > 1 and method == "power_iteration":
            raise ValueError(f"power iteration finds one eigenvalue at each end, got k={k}; use method='lanczos'")
        if not is_ascending(0.0, rtol, math.inf):
            raise ValueError(f"expected 0 < rtol < infinity, got {rtol!r}")
        self.method = method
        self.k = k
        self.max_iterations = max_iterations
        self.rtol = rtol
        self.measurements = 0
        self._last: Tensor | None = None

    def measure(self, operator: CurvatureOperator) -> ExtremeEigenvalues:
        """Returns both ends, with eigenvectors, and adds one to `measurements`; after NaN the next start is random."""
        generator = generator_of(Stream.START_VECTORS, step=self.measurements)
        self.measurements += 1
        starts: list[Tensor] = []
        if self._last is not None and self._last.shape[1] == operator.size:
            for vector in self._last.to(operator.device, operator.dtype):
                noise = random_vector(operator, generator)
                starts.append(vector / length_of(vector) + _NOISE * noise / length_of(noise))
        limits: dict[str, Any] = {"max_iterations": self.max_iterations, "rtol": self.rtol}
        limits["min_iterations"] = min(_LEAST_PRODUCTS, self.max_iterations)
        if self.method == "power_iteration":
            first, second = starts or [random_vector(operator, generator) for _ in range(2)]
            largest = power_iteration(operator, which="largest", start=first, **limits)
            smallest = power_iteration(operator, which="smallest", start=second, **limits)
            result, last = _combine(largest, smallest), torch.stack([largest.vector, smallest.vector])
        else:
            k, start = min(self.k, operator.size), starts[0] if starts else None
            result = lanczos(operator, k=k, start=start, vectors=True, generator=generator, **limits)
            assert result.largest_vectors is not None
            assert result.smallest_vectors is not None
            last = (result.largest_vectors + result.smallest_vectors).sum(0, keepdim=True)
        self._last = last if bool(result.largest.isfinite().all()) else None
        return result

    def state_dict(self) -> dict[str, Any]:
        """Returns the start of the next measurement, vectors [1 or 2, n], and the number of measurements."""
        return {"measurements": self.measurements, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.measurements, self._last = state["measurements"], state["last"]


def _combine(largest: Eigenpair, smallest: Eigenpair) -> ExtremeEigenvalues:
    numbers = torch.tensor([largest.value, smallest.value, largest.bound, smallest.bound], dtype=torch.float64)[:, None]
    return ExtremeEigenvalues(
        largest=numbers[0],
        smallest=numbers[1],
        largest_bounds=numbers[2],
        smallest_bounds=numbers[3],
        products=largest.products + smallest.products,
        converged=largest.converged and smallest.converged,
        largest_vectors=largest.vector[None],
        smallest_vectors=smallest.vector[None],
    )

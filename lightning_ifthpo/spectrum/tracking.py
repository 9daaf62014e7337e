"""The ends of a spectrum that changes slowly."""

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
from lightning_ifthpo.spectrum.power_iteration import power_iteration

Method: TypeAlias = Literal["lanczos", "power_iteration"]

# Measured along 2,000 steps of full-batch gradient descent with λ_min about −λ_max/500: five products from such a start
# give λ_min the right sign in 95 % of the measurements; two, enough for λ_max to 1e-3, in 18 %; five from a start with
# ten times the noise, in 32 %.
_LEAST_PRODUCTS = 5
_NOISE = 0.03


class SpectrumTracker:
    """Measures both ends of the spectrum of an operator that changes slowly, each time from the last eigenvectors.

    The start is their sum plus 3 % noise. Without noise, an eigenvalue that overtakes would be missed as long as its
    vector is orthogonal to the old ones; with it, it may still be found late, by power iteration later than by Lanczos.
    A residual bound says that an eigenvalue is near, not that none lies beyond. At least five products are taken, to
    resolve a λ_min that is small compared with λ_max.

    Args:
        method: "lanczos", which keeps a basis of up to max_iterations vectors; or "power_iteration", which keeps four
            and needs more products.
        k: Number of eigenvalues at each end, at most n; 1 for power iteration.
        max_iterations: Products at most; for power iteration, at each end.
        rtol: Residual bound at which to stop, relative to max(|λ_max|, |λ_min|).

    Attributes:
        measurements: Number of measurements so far.

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
        """Returns both ends of the spectrum, with eigenvectors; after NaN the next start is random."""
        generator = generator_of(Stream.START_VECTORS, step=self.measurements)
        self.measurements += 1
        if self._last is not None and self._last.shape[1] != operator.size:
            self._last = None
        last = None if self._last is None else self._last.to(operator.device, operator.dtype)
        starts: list[Tensor | None] = [None, None]
        if last is not None:
            starts = [_perturb(vector, operator, generator) for vector in last]
        if self.method == "lanczos":
            result = self._lanczos(operator, starts[0], generator)
        else:
            result = self._power_iteration(operator, starts, generator)
        if not bool(result.largest.isfinite().all()):
            self._last = None
        return result

    def state_dict(self) -> dict[str, Any]:
        """Returns the start of the next measurement, vectors [1 or 2, n], and the number of measurements."""
        return {"measurements": self.measurements, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.measurements, self._last = state["measurements"], state["last"]

    def _lanczos(
        self, operator: CurvatureOperator, start: Tensor | None, generator: torch.Generator
    ) -> ExtremeEigenvalues:
        result = lanczos(
            operator,
            k=min(self.k, operator.size),
            min_iterations=min(_LEAST_PRODUCTS, self.max_iterations),
            max_iterations=self.max_iterations,
            rtol=self.rtol,
            start=start,
            vectors=True,
            generator=generator,
        )
        assert result.largest_vectors is not None
        assert result.smallest_vectors is not None
        self._last = (result.largest_vectors + result.smallest_vectors).sum(0, keepdim=True)
        return result

    def _power_iteration(
        self, operator: CurvatureOperator, starts: list[Tensor | None], generator: torch.Generator
    ) -> ExtremeEigenvalues:
        options: dict[str, Any] = {
            "min_iterations": min(_LEAST_PRODUCTS, self.max_iterations),
            "max_iterations": self.max_iterations,
            "rtol": self.rtol,
        }
        first, second = (random_vector(operator, generator) if start is None else start for start in starts)
        largest = power_iteration(operator, which="largest", start=first, **options)
        smallest = power_iteration(operator, which="smallest", start=second, **options)
        self._last = torch.stack([largest.vector, smallest.vector])

        def single(number: float) -> Tensor:
            return torch.tensor([number], dtype=torch.float64)

        return ExtremeEigenvalues(
            largest=single(largest.value),
            smallest=single(smallest.value),
            largest_bounds=single(largest.bound),
            smallest_bounds=single(smallest.bound),
            products=largest.products + smallest.products,
            converged=largest.converged and smallest.converged,
            largest_vectors=largest.vector[None],
            smallest_vectors=smallest.vector[None],
        )


def _perturb(vector: Tensor, operator: CurvatureOperator, generator: torch.Generator) -> Tensor:
    noise = random_vector(operator, generator)
    start: Tensor = vector / length_of(vector) + _NOISE * noise / length_of(noise)
    return start

"""One eigenvalue, with four vectors in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, generator_of
from lightning_ifthpo.core.validation import require_choice
from lightning_ifthpo.core.vectors import divided
from lightning_ifthpo.curvature.base import CurvatureOperator
from lightning_ifthpo.spectrum.basis import length_of, random_vector

Which: TypeAlias = Literal["magnitude", "largest", "smallest"]


@dataclass(frozen=True)
class Eigenpair:
    """One eigenvalue and its eigenvector.

    Attributes:
        value: The eigenvalue θ, a Rayleigh quotient; NaN for a non-finite operator.
        vector: y, [n], of unit length.
        bound: ‖Ay − θy‖; some eigenvalue lies within this distance of θ.
        products: Products with the operator.
        converged: Whether the bound is at most rtol times the largest ‖Av‖ / ‖v‖ so far.
    """

    value: float
    vector: Tensor = field(repr=False)
    bound: float
    products: int
    converged: bool


def power_iteration(
    operator: CurvatureOperator,
    *,
    which: Which = "magnitude",
    min_iterations: int = 1,
    max_iterations: int = 100,
    rtol: float = 1e-6,
    start: Tensor | None = None,
) -> Eigenpair:
    """Returns the eigenvalue of largest magnitude, or the algebraically largest or smallest, by power iteration.

    For "largest" each step v ← (A − μI) v takes the shift μ that makes the next Rayleigh quotient largest, by a 2 × 2
    eigenvalue problem; a fixed μ may lead to the other end, or to neither. "smallest" does the same for −A. For
    "magnitude" a pair ±λ never converges. `lanczos` needs fewer products, but keeps all vectors.

    Args:
        operator: A, symmetric, on vectors [n].
        which: "magnitude" for the eigenvalue of largest |λ|, "largest" for λ_max, "smallest" for λ_min.
        min_iterations: Products at least.
        max_iterations: Products at most; 1 or more.
        rtol: Stop when the residual is below rtol times the largest ‖Av‖ so far.
        start: First vector, [n]; a random one, always the same, if it is None or zero. In exact arithmetic the
            iteration never leaves an invariant subspace that contains the start.

    Raises:
        ValueError: If `which` is not one of the three, or max_iterations is less than 1 or min_iterations.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, -2.0, 0.5])))
    >>> [round(power_iteration(operator, which=which).value, 4) for which in ("magnitude", "largest", "smallest")]
    [-2.0, 1.0, -2.0]
    """
    require_choice("which", which, get_args(Which))
    if max_iterations < max(1, min_iterations):
        raise ValueError(f"expected max_iterations >= 1 and >= {min_iterations = }, got {max_iterations}")
    sign = -1.0 if which == "smallest" else 1.0
    if start is None or not bool(start.any()):
        start = random_vector(operator, generator_of(Stream.START_VECTORS))
    vector = start.to(operator.device, operator.dtype)
    vector = vector / length_of(vector)
    product = sign * operator.matvec(vector)
    products, scale, direct = 1, 0.0, True
    while True:
        quotient = vector @ product
        residual = product - quotient * vector
        value, bound, length = torch.stack([quotient, length_of(residual), length_of(product)]).tolist()
        scale = max(scale, length)
        converged = bound <= rtol * scale
        if not math.isfinite(length):
            return Eigenpair(math.nan, vector, math.nan, products, converged=False)
        finished = bound == 0.0 or (converged and products >= min_iterations)
        if products >= max_iterations or (finished and direct):
            return Eigenpair(sign * value, vector, bound, products, converged)
        if finished:  # the product is a sum of earlier ones, with their rounding errors; a direct one confirms it
            product, direct = sign * operator.matvec(vector), True
        elif which == "magnitude":
            vector = divided(product, length)
            product = operator.matvec(vector)
        else:
            other = residual - (vector @ residual) * vector  # removes the rounding error along the vector
            other = other / length_of(other)
            other_product = sign * operator.matvec(other)
            # (c, s): unit eigenvector of the larger eigenvalue of [[value, bound], [bound, other @ other_product]]
            angle = math.atan2(2.0 * bound, value - float(other @ other_product)) / 2.0
            c, s = math.cos(angle), math.sin(angle)
            vector, product, direct = c * vector + s * other, c * product + s * other_product, False
            norm = length_of(vector)
            vector, product = vector / norm, product / norm
        products += 1

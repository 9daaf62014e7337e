"""One eigenvalue with the memory of two vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_ifthpo.curvature.operator import CurvatureOperator
from lightning_ifthpo.spectrum.krylov import random_vector, seeded

Which: TypeAlias = Literal["magnitude", "largest", "smallest"]


@dataclass(frozen=True)
class Eigenpair:
    """One eigenvalue and its vector.

    Attributes:
        value: The eigenvalue θ, a Rayleigh quotient; NaN for a non-finite operator.
        vector: y, [n], of unit length.
        bound: ‖Ay − θy‖; some eigenvalue lies within this distance of θ.
        products: Products with the operator that were spent.
        converged: Whether the bound is at most rtol times the largest ‖Av‖ / ‖v‖ seen.
    """

    value: float
    vector: Tensor
    bound: float
    products: int
    converged: bool


def power_iteration(
    operator: CurvatureOperator,
    *,
    which: Which = "magnitude",
    max_iterations: int = 100,
    rtol: float = 1e-6,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpair:
    """Returns the eigenvalue of largest magnitude, or the algebraically largest or smallest, by power iteration.

    The largest is found by v ← (A + σI) v, with a shift σ that is the largest ‖Av‖ seen: as soon as it exceeds
    (|λ_min| − λ_max) / 2, and at the latest when v comes near λ_min, the top of A + σI is the top of A. Slower than
    `lanczos`, which keeps all vectors; by magnitude, eigenvalues ±λ never settle, and `converged` says so.

    Args:
        operator: A, symmetric, on vectors [n].
        which: "magnitude" for the eigenvalue of largest |λ|, "largest" for λ_max, "smallest" for λ_min.
        max_iterations: Products to spend at most, at least 1.
        rtol: Stop when the residual is below rtol times the largest ‖Av‖ seen.
        start: First vector, [n]; a random one where not given, or zero. In exact arithmetic the iteration never leaves
            an invariant subspace it starts in.
        generator: CPU generator that draws the random vector; a fixed seed where not given.

    Raises:
        ValueError: If `which` is none of the three, or max_iterations < 1.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> operator = MatrixOperator(torch.diag(torch.tensor([1.0, -2.0, 0.5])))
    >>> [round(power_iteration(operator, which=which).value, 4) for which in ("magnitude", "largest", "smallest")]
    [-2.0, 1.0, -2.0]
    """
    if which not in get_args(Which):
        raise ValueError(f"expected which to be one of {get_args(Which)}, got {which!r}")
    if max_iterations < 1:
        raise ValueError(f"expected max_iterations >= 1, got {max_iterations}")
    sign = -1.0 if which == "smallest" else 1.0
    given = start is not None and bool(start.any())
    following = start.to(operator.device, operator.dtype) if given else random_vector(operator, seeded(generator))
    scale = 0.0
    for products in range(1, max_iterations + 1):
        vector = following / torch.linalg.vector_norm(following)
        product = sign * operator.matvec(vector)
        quotient = vector @ product
        value, bound, length = torch.stack(
            [quotient, torch.linalg.vector_norm(product - quotient * vector), torch.linalg.vector_norm(product)]
        ).tolist()
        scale = max(scale, length)
        converged = bound <= rtol * scale
        if converged or not math.isfinite(length):
            break
        following = product if which == "magnitude" else product + scale * vector
    return Eigenpair(sign * value, vector, bound, products, converged)

"""Why a solve failed, in words, numbers and remedies."""

from __future__ import annotations

from lightning_ifthpo.solvers.base import SolveResult, Status
from lightning_ifthpo.solvers.system import LinearSystem
from lightning_ifthpo.spectrum import lanczos


def diagnose(system: LinearSystem, result: SolveResult) -> str:
    """Returns why the solve of a system failed, the numbers that show it and what to do; "" if it succeeded.

    Cost: at most 60 products, for a failed solve.
    """
    if result.status.succeeded:
        return ""
    if result.status is Status.NONFINITE:
        return "NaN or infinity in the loss, its derivatives or the right-hand side: look at the batch and the weights"
    if result.status is Status.MAX_ITERATIONS:
        return (
            f"the relative residual is {result.relative_residual:.2g} after {result.products} products: allow more "
            "iterations, or raise the damping, which bounds the condition number"
        )
    # Enough to choose a damping or a step size. Measured on 64 Hessians and Gauss–Newton matrices of four networks
    # (n up to 8,970, after 0 to 400 steps on scikit-learn's digits): at most 26 products were used, λ_max was off by
    # at most 0.03 %, and λ_min by at most 4.1 % of λ_max.
    ends = lanczos(system.matrix, max_iterations=60, rtol=1e-2)
    smallest, largest = float(ends.smallest[0]), float(ends.largest[0])
    spectrum = f"λ_min = {smallest:.4g}, λ_max = {largest:.4g}"
    too_long, step_size = "", result.step_size
    if step_size is not None and step_size * largest > 2.0:
        too_long = (
            f"step is too long: step_size η = {step_size:.4g} sums a series only up to curvature 2/η = "
            f"{2 / step_size:.4g}, and λ_max = {largest:.4g}. Use step_size='auto', or at most {1 / largest:.4g}"
        )
    if smallest < 0.0:
        return (
            f"negative curvature ({spectrum}): the weights are not at a minimum of the inner loss. Conjugate gradients "
            "break down here, and no step size makes a series converge. Use Gauss–Newton curvature (mark the outputs), "
            f"a damping above {-smallest:.4g}, few Neumann terms with the inner learning rate as step size, or train "
            "further" + (f". In addition, the {too_long}" if too_long else "")
        )
    return f"{too_long or 'operator is singular, and b does not lie in its range: use damping'} ({spectrum})"

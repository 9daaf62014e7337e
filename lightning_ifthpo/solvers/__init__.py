"""Methods for A x = b with a symmetric operator A: frozen dataclasses of options with one method, `solve`."""

from lightning_ifthpo.solvers.amortized import Amortized
from lightning_ifthpo.solvers.base import Solver, SolveResult, Status
from lightning_ifthpo.solvers.direct import Direct
from lightning_ifthpo.solvers.krylov import ConjugateGradient, MinimumResidual
from lightning_ifthpo.solvers.nystrom import Nystrom
from lightning_ifthpo.solvers.sama import SAMA
from lightning_ifthpo.solvers.series import Identity, Neumann
from lightning_ifthpo.solvers.system import LinearSystem

__all__ = [
    "SAMA",
    "Amortized",
    "ConjugateGradient",
    "Direct",
    "Identity",
    "LinearSystem",
    "MinimumResidual",
    "Neumann",
    "Nystrom",
    "SolveResult",
    "Solver",
    "Status",
]

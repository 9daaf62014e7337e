"""Linear systems, and all solvers that there are for them."""

import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
)


class Counted(MatrixOperator):
    """Counts its products."""

    count = 0

    def _product(self, v):
        self.count += 1
        return super()._product(v)


ALL = [
    Identity(),
    Neumann(terms=5),
    Neumann(terms=5, step_size=0.01),
    ConjugateGradient(),
    ConjugateGradient(rtol=1e-3),
    MinimumResidual(),
    ConjugateGradient(preconditioner=Nystrom(rank=3)),
    Direct(),
    Nystrom(rank=60),
    Amortized(),
]


SOLVING = [
    ConjugateGradient(max_iterations=60),
    ConjugateGradient(max_iterations=60, preconditioner=Nystrom(rank=5)),
    MinimumResidual(max_iterations=60),
    Direct(),
    Nystrom(rank=60),
]


def named(solver):
    return repr(solver)


def right_hand_side(size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(2))

"""All implementations of each interface, by readable names: what the checks of tests/checks.py run over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo import Loss
from lightning_ifthpo.curvature import (
    AverageOperator,
    CurvatureOperator,
    DistributedOperator,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    GradientOuterProductOperator,
    HessianOperator,
    KFACOperator,
    LossOperator,
    MatrixOperator,
    mark_outputs,
)
from lightning_ifthpo.solvers import (
    Amortized,
    ConjugateGradient,
    Direct,
    Identity,
    MinimumResidual,
    Neumann,
    Nystrom,
    Solver,
)
from tests.helpers.device import WHERE, randn, within
from tests.helpers.networks import batch, functional
from tests.helpers.problems import spd_matrix

LossFunction = Callable[[], Tensor]


class Implementation(NamedTuple):
    """An operator with the matrix that it should be.

    Attributes:
        operator: On vectors [n].
        matrix: [n, n], by independent means.
        error: Relative error of its products.
    """

    operator: CurvatureOperator
    matrix: Tensor
    error: float


# central differences leave cbrt(eps)² ≈ 4e-11 times third derivatives, everything else is exact to rounding
EXACT, DIFFERENCES = within(1e-12), within(1e-7, power=2 / 3)


def both_halves(part: Tensor) -> Tensor:
    """Sums over two processes, of which the other one is played and has the same share."""
    return 2.0 * part


def of_softmax(make: Callable[[LossFunction, list[Tensor]], CurvatureOperator], error: float = EXACT) -> Implementation:
    """Softmax regression, where the model is linear, so that Gauss–Newton is the Hessian."""
    x, y = batch()
    net = nn.Linear(4, 3).to(**WHERE)
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    operator = make(lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    return Implementation(operator, torch.func.hessian(function)(flat), error)


def outer_product() -> Implementation:
    x, y = batch()
    net = nn.Linear(4, 3).to(**WHERE)
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    gradient = torch.func.grad(function)(flat)
    operator = GradientOuterProductOperator(lambda: F.cross_entropy(net(x), y), list(net.parameters()))
    return Implementation(operator, torch.outer(gradient, gradient), EXACT)


def kfac() -> Implementation:
    """Exact for one linear layer with squared error."""
    x, _ = batch()
    net, target = nn.Linear(4, 2).to(**WHERE), randn(8, 2, seed=5)
    function, flat = functional(net, lambda model, _: F.mse_loss(model(x), target))
    operator = KFACOperator(lambda: F.mse_loss(mark_outputs(net(x)), target), list(net.parameters()))
    return Implementation(operator, torch.func.hessian(function)(flat), EXACT)


def average() -> Implementation:
    """Of two parts of a batch, by their numbers of examples."""
    x, y = batch()
    net = nn.Linear(4, 3).to(**WHERE)
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))

    def part(examples: slice) -> CurvatureOperator:
        return HessianOperator(lambda: F.cross_entropy(net(x[examples]), y[examples]), list(net.parameters()))

    operator = AverageOperator([partial(part, slice(0, 3)), partial(part, slice(3, 8))], weights=[3, 5])
    return Implementation(operator, torch.func.hessian(function)(flat), EXACT)


def distributed(loss: LossFunction, parameters: list[Tensor]) -> CurvatureOperator:
    return HessianOperator(Loss(loss, parameters, share=0.5, all_reduce=both_halves), parameters)


def summed_products() -> Implementation:
    matrix = spd_matrix(6, 50.0, signs=True)
    return Implementation(DistributedOperator(MatrixOperator(matrix), 0.5, both_halves), matrix, EXACT)


def matrix() -> Implementation:
    wanted = spd_matrix(6, 50.0, signs=True)
    return Implementation(MatrixOperator(wanted), wanted, EXACT)


def damped(delta: float | Tensor) -> Implementation:
    plain = spd_matrix(6, 50.0, signs=True)
    wanted = plain + torch.diag(torch.as_tensor(delta, **WHERE).expand(6))
    return Implementation(MatrixOperator(plain).damped(delta), wanted, EXACT)


def preconditioned() -> Implementation:
    plain, p = spd_matrix(6, 50.0, signs=True), torch.linspace(0.0, 2.0, 6, **WHERE)
    return Implementation(MatrixOperator(plain).preconditioned(p), p.sqrt()[:, None] * plain * p.sqrt(), EXACT)


OPERATORS: dict[str, Callable[[], Implementation]] = {
    "Hessian": lambda: of_softmax(HessianOperator),
    "Gauss–Newton": lambda: of_softmax(GaussNewtonOperator),
    "finite differences": lambda: of_softmax(FiniteDifferenceOperator, DIFFERENCES),
    "outer product": outer_product,
    "KFAC": kfac,
    "average": average,
    "distributed loss": lambda: of_softmax(distributed),
    "distributed products": summed_products,
    "matrix": matrix,
    "damped by a number": lambda: damped(0.5),
    "damped by a vector": lambda: damped(torch.linspace(0.1, 2.0, 6, **WHERE)),
    "preconditioned": preconditioned,
}

# curvatures of one and the same loss, which know how weights and hyperparameters interact
LOSS_OPERATORS: dict[str, Callable[[LossFunction, list[Tensor]], LossOperator]] = {
    "Hessian": HessianOperator,
    "Gauss–Newton": GaussNewtonOperator,
    "finite differences": FiniteDifferenceOperator,
    "outer product": GradientOuterProductOperator,
    "KFAC": KFACOperator,
    "distributed loss": distributed,
}

SOLVERS: list[Solver] = [
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
# those that end at the solution
SOLVING: list[Solver] = [
    ConjugateGradient(max_iterations=60),
    ConjugateGradient(max_iterations=60, preconditioner=Nystrom(rank=5)),
    MinimumResidual(max_iterations=60),
    Direct(),
    Nystrom(rank=60),
]

"""Conjugate gradients and minimum residual."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import (
    ConjugateGradient,
    MinimumResidual,
    Nystrom,
    Status,
)
from tests.helpers.device import FLOAT64, randn
from tests.helpers.problems import relative_error, spd_matrix
from tests.helpers.systems import right_hand_side


@pytest.mark.parametrize("solver", [ConjugateGradient(max_iterations=1), MinimumResidual(max_iterations=1)], ids=repr)
def test_a_warm_start_is_used(solver):
    matrix, b = spd_matrix(12, 50.0), right_hand_side(12)
    near = torch.linalg.solve(matrix, b) + 1e-3 * right_hand_side(12)
    cold = solver.solve(MatrixOperator(matrix), b)
    warm = solver.solve(MatrixOperator(matrix), b, near)
    assert warm.relative_residual < 0.05 * cold.relative_residual
    assert warm.products == cold.products + 1


@pytest.mark.parametrize("family", [ConjugateGradient, MinimumResidual])
@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_the_residual_is_the_true_one_after_a_long_recursion_in_float32(family, condition):
    matrix, b = spd_matrix(200, condition, dtype=torch.float32), right_hand_side(200, torch.float32)
    result = family(max_iterations=3000, rtol=1e-5).solve(MatrixOperator(matrix), b)
    true = float((matrix @ result.x - b).norm() / b.norm())
    # a product in float32 is itself known to some eps · ‖A‖‖x‖, a few percent of these residuals
    assert result.relative_residual == pytest.approx(true, rel=0.1)
    assert (result.status is Status.CONVERGED) == (result.relative_residual <= 1e-5)


def test_tolerance_ends_the_iteration_and_is_kept():
    operator, b = MatrixOperator(spd_matrix(30, 1e3, dtype=torch.float64)), right_hand_side(30, torch.float64)
    for family in (ConjugateGradient, MinimumResidual):
        loose, tight = (family(max_iterations=500, rtol=rtol).solve(operator, b) for rtol in (1e-2, 1e-8))
        assert loose.relative_residual <= 1e-2
        assert tight.relative_residual <= 1e-8
        assert loose.products < tight.products
        few = family(max_iterations=3, rtol=1e-8).solve(operator, b)
        assert (few.status, few.products) == (Status.MAX_ITERATIONS, 3)
        assert family(max_iterations=3).solve(operator, b).status is Status.COMPLETE


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_a_preconditioner_pays_where_few_eigenvalues_stand_out(damping):
    """Sixty large ones, geometrically spaced, and 240 at one."""
    values = torch.cat([torch.logspace(2, 6, 60, **FLOAT64), torch.ones(240, **FLOAT64)])
    basis = torch.linalg.qr(randn(300, 300, seed=5, dtype=torch.float64)).Q
    matrix, b = basis @ torch.diag(values) @ basis.T, right_hand_side(300, torch.float64)
    operator = MatrixOperator((matrix + matrix.T) / 2)
    options = {"max_iterations": 500, "rtol": 1e-8, "damping": damping}
    plain = ConjugateGradient(**options).solve(operator, b)
    conditioned = ConjugateGradient(preconditioner=Nystrom(rank=80), **options).solve(operator, b)
    assert plain.status is conditioned.status is Status.CONVERGED
    assert conditioned.products < 100 < plain.products
    assert relative_error(conditioned.x, plain.x) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(preconditioner=Nystrom(damping=1.0)), "takes the damping of the solver"),
        (lambda: ConjugateGradient(max_iterations=0), "max_iterations to be an integer >= 1"),
        (lambda: ConjugateGradient(rtol=1.5), "0 <= rtol < 1"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("family", [ConjugateGradient, MinimumResidual])
def test_the_residual_is_measured_by_one_product(family):
    operator, b = MatrixOperator(spd_matrix(40, 1e3, dtype=torch.float64)), right_hand_side(40, torch.float64)
    results = [family(max_iterations=iterations).solve(operator, b) for iterations in (1, 20, 21)]
    assert [(result.products, result.extra_products) for result in results] == [(1, 1), (20, 1), (21, 1)]


def test_the_products_of_a_preconditioner_count():
    operator, b = MatrixOperator(spd_matrix(40, 1e3, dtype=torch.float64)), right_hand_side(40, torch.float64)
    assert ConjugateGradient(max_iterations=2, preconditioner=Nystrom(rank=5)).solve(operator, b).products == 7


@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 3.0, 4.0]], ids=str)
def test_minimum_residual_on_a_singular_system_ends_where_only_rounding_is_left(values):
    matrix = torch.diag(torch.tensor(values, **FLOAT64))
    b = torch.ones(len(values), **FLOAT64)
    result = MinimumResidual(max_iterations=20).solve(MatrixOperator(matrix), b)
    assert result.status is Status.COMPLETE
    assert result.products <= len(values)
    assert result.relative_residual == pytest.approx((values.count(0.0) / len(values)) ** 0.5, rel=1e-9)
    assert float(result.x.norm()) < 3.0


def test_minimum_residual_of_a_nan_is_not_finite():
    operator = MatrixOperator(torch.eye(3, **FLOAT64))
    operator.matrix = torch.full((3, 3), torch.nan, **FLOAT64)
    result = MinimumResidual().solve(operator, torch.ones(3, **FLOAT64))
    assert (result.status, result.products) == (Status.NONFINITE, 1)

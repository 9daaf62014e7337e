"""The identity and the Neumann series against partial sums."""

import math

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    Identity,
    LinearSystem,
    Neumann,
    Status,
)
from lightning_ifthpo.solvers.diagnosis import diagnose
from lightning_ifthpo.solvers.series import measured_step_size
from tests.helpers.device import DEVICE, WHERE, randn, within
from tests.helpers.problems import relative_error, spd_matrix
from tests.helpers.systems import right_hand_side


@pytest.mark.parametrize("terms", [0, 1, 2, 7])
def test_neumann_is_the_partial_sum(terms):
    matrix, b = spd_matrix(9, 30.0), right_hand_side(9)
    step = 0.9 / 30
    contraction = torch.eye(9, **WHERE) - step * matrix
    wanted = step * sum(torch.linalg.matrix_power(contraction, j) @ b for j in range(terms + 1))
    result = Neumann(terms=terms, step_size=step).solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, wanted) < within(1e-13)
    assert (result.products, result.status) == (terms, Status.COMPLETE)


def test_neumann_measures_its_step_and_reports_it():
    matrix, b = spd_matrix(40, 1e3), right_hand_side(40)
    result = Neumann(terms=50).solve(MatrixOperator(matrix), b)
    assert result.step_size == pytest.approx(1e-3, rel=0.05)
    assert result.status is Status.COMPLETE
    assert 0 < result.extra_products <= 11


def test_neumann_with_too_long_a_step_stops_and_names_the_cause():
    matrix, b = spd_matrix(9, 30.0, dtype=torch.float64), right_hand_side(9, torch.float64)
    operator = MatrixOperator(matrix)
    result = Neumann(terms=500, step_size=1.0).solve(operator, b)
    assert result.status is Status.DIVERGED
    assert result.x.norm() < 1e3 * b.norm()
    message = diagnose(LinearSystem(operator), result)
    assert "step is too long" in message
    assert "λ_max = 30" in message
    assert "2/η = 2" in message
    reckless = Neumann(terms=50, step_size=1.0, safeguard=False).solve(operator, b)
    assert reckless.x.norm() > 1e60


def test_neumann_without_safeguard_that_overflows_is_not_returned():
    result = Neumann(terms=5000, step_size=1.0, safeguard=False).solve(
        MatrixOperator(spd_matrix(9, 30.0)), right_hand_side(9)
    )
    assert result.status is Status.NONFINITE
    assert result.x.abs().max() == 0.0


def test_a_learning_rate_of_zero_moves_no_series():
    solver = Neumann(terms=2, step_size="optimizer").with_optimizer(UpdateRule(0.0))
    result = solver.solve(MatrixOperator(torch.eye(2, **WHERE)), torch.ones(2, **WHERE))
    assert result.status is Status.COMPLETE
    assert not bool(result.x.any())


def test_the_series_of_an_adaptive_optimizer_is_preconditioned():
    matrix, b, terms = spd_matrix(6, 10.0), right_hand_side(6), 9
    step = torch.linspace(0.01, 0.1, 6, **WHERE)
    result = (
        Neumann(terms=terms, step_size="optimizer").with_optimizer(UpdateRule(step)).solve(MatrixOperator(matrix), b)
    )
    contraction = torch.eye(6, **WHERE) - torch.diag(step) @ matrix
    wanted = sum(torch.linalg.matrix_power(contraction, j) for j in range(terms + 1)) @ (step * b)
    assert relative_error(result.x, wanted) < within(1e-13)
    assert result.step_size is None
    with pytest.raises(ValueError, match="'optimizer' needs the inner optimizer"):
        Neumann(step_size="optimizer").solve(MatrixOperator(matrix), b)


def test_identity_is_the_scaled_right_hand_side():
    b = right_hand_side(4)
    assert torch.allclose(Identity(step_size=0.25).solve(MatrixOperator(spd_matrix(4, 2.0)), b).x, 0.25 * b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neumann(terms=-1), "terms to be an integer >= 0, got -1"),
        (lambda: Neumann(terms=1.5), "terms to be an integer"),
        (lambda: Neumann(step_size=0.0), "step_size > 0, 'auto' or 'optimizer'"),
        (lambda: Neumann(step_size="newton"), "'auto' or 'optimizer', got 'newton'"),
        (lambda: Neumann(step_size=torch.tensor([1.0, -1.0], device=DEVICE)), "step_size > 0"),
        (lambda: Neumann(step_size=math.inf), "finite step_size"),
        (lambda: Identity(step_size=-1.0), "step_size > 0"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_given_step_costs_no_product_but_that_of_the_residual():
    """And few terms along negative curvature need not grow: the sum is then what was asked for."""
    matrix, b = torch.diag(torch.tensor([1.0, 0.5, -0.01], **WHERE)), torch.tensor([1.0, 1.0, 1e-3], **WHERE)
    result = Neumann(terms=3, step_size=0.5).solve(MatrixOperator(matrix), b)
    assert result.status is Status.COMPLETE
    assert (result.products, result.extra_products) == (3, 1)
    identity = Identity(step_size=0.5).solve(MatrixOperator(matrix), b)
    assert (identity.products, identity.extra_products, identity.step_size) == (0, 0, 0.5)
    assert identity.relative_residual is None


def test_a_zero_operator_has_no_negative_curvature_and_a_step_of_one():
    b = right_hand_side(4)
    result = Neumann(terms=2).solve(MatrixOperator(torch.zeros(4, 4, **WHERE)), b)
    assert result.status is Status.COMPLETE
    assert relative_error(result.x, 3.0 * b) < within(1e-14)


@pytest.mark.parametrize("make", [Identity, Neumann])
def test_the_damping_is_checked_here_too(make):
    with pytest.raises(ValueError, match="expected a finite damping >= 0"):
        make(damping=-1.0)


@pytest.mark.parametrize("step", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [1, 2, 6])
def test_terms_that_keep_their_length_up_to_rounding_do_not_grow(seed, step):
    """Along the null space of a matrix in a random basis each term equals the one before."""
    values = torch.cat([torch.zeros(30, **WHERE), torch.linspace(1.0, 2.0, 30, **WHERE)])
    basis = torch.linalg.qr(randn(60, 60, seed=seed)).Q
    matrix = basis @ torch.diag(values) @ basis.T
    b = basis[:, :30].sum(1)
    result = Neumann(terms=60, step_size=step).solve(MatrixOperator((matrix + matrix.T) / 2), b)
    assert (result.status, result.products) == (Status.COMPLETE, 60)
    assert relative_error(result.x, step * 61 * b) < within(1e-12)


def test_a_measured_step_counts_the_bound_of_the_largest_eigenvalue():
    """Ten products see less than λ_max of a spectrum without a gap, and a little more with the bound."""
    values = torch.linspace(0.0, 1.0, 400, **WHERE)
    step, negative, products = measured_step_size(MatrixOperator(torch.diag(values)))
    assert 0.9 < step < 1.0
    assert not negative
    assert products <= 10

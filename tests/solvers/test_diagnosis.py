"""What is said of a solve that failed."""

from dataclasses import replace

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import ConjugateGradient, LinearSystem, Neumann, SolveResult, Status
from lightning_ifthpo.solvers.diagnosis import diagnose
from tests.helpers.device import DEVICE
from tests.helpers.problems import spd_matrix
from tests.helpers.systems import Counted, right_hand_side


def test_diagnosis_of_good_results_is_empty_and_costs_nothing():
    operator = Counted(spd_matrix(4, 2.0))
    result = ConjugateGradient().solve(operator, right_hand_side(4))
    spent = operator.count
    assert diagnose(LinearSystem(operator), result) == ""
    assert operator.count == spent


def failed(status, **options):
    return SolveResult(torch.zeros(3, device=DEVICE), 0.5, 7, status, **options)


def test_too_few_iterations_are_said_with_the_residual_that_is_left():
    message = diagnose(MatrixOperator(torch.eye(3, device=DEVICE)), failed(Status.MAX_ITERATIONS))
    assert message.startswith("ill conditioned, not yet converged (relative residual 0.5 after 7 products")
    assert "raise the damping" in message


def test_negative_curvature_is_said_with_the_damping_that_would_lift_it():
    operator = MatrixOperator(torch.diag(torch.tensor([3.0, 1.0, -0.25], device=DEVICE)))
    message = diagnose(LinearSystem(operator), failed(Status.NEGATIVE_CURVATURE))
    assert "negative curvature (λ_min = -0.25, λ_max = 3):" in message
    assert "a damping above 0.25" in message
    assert "step is too long" not in message
    assert "In addition, the step is too long (step_size η = 1 " in diagnose(
        LinearSystem(operator), failed(Status.NEGATIVE_CURVATURE, step_size=1.0)
    )
    message = diagnose(LinearSystem(operator, 0.05), failed(Status.NEGATIVE_CURVATURE))
    assert "negative curvature (λ_min = -0.2, λ_max = 3.05) beyond the damping of 0.05" in message
    assert "a damping above 0.25" in message
    message = diagnose(LinearSystem(operator, torch.full((3,), 0.05)), failed(Status.NEGATIVE_CURVATURE))
    assert "a damping above the present one plus 0.2" in message


def test_negative_curvature_that_few_products_do_not_find_again_is_believed():
    operator = MatrixOperator(torch.eye(3, device=DEVICE))
    message = diagnose(operator, failed(Status.NEGATIVE_CURVATURE))
    assert "seen along one direction" in message


@pytest.mark.parametrize("status", [status for status in Status if not status.succeeded])
def test_a_diagnosis_takes_sixty_two_products_at_most(status):
    operator = Counted(spd_matrix(200, 1e6))
    result = replace(failed(status), x=torch.zeros(200, device=DEVICE, dtype=operator.dtype))
    assert diagnose(LinearSystem(operator), result, right_hand_side(200))
    assert operator.count <= 62


def test_numbers_that_overflow_in_the_solve_are_told_from_a_nan_in_the_matrix_or_in_b():
    operator, b = MatrixOperator(torch.eye(3, device=DEVICE)), torch.ones(3, device=DEVICE)
    result = failed(Status.NONFINITE)
    assert diagnose(operator, result, b).startswith("NaN or infinity arose in the solve")
    assert "keep the safeguard" in diagnose(operator, result, b, solver=Neumann(safeguard=False)).lower()
    assert diagnose(operator, result, b * torch.nan).startswith("NaN or infinity in the right-hand side")
    operator.matrix = operator.matrix * torch.nan
    assert diagnose(operator, result, b).startswith("NaN or infinity in the second derivative")


def test_a_matrix_is_a_system_without_damping():
    operator = MatrixOperator(torch.diag(torch.tensor([3.0, -0.25], device=DEVICE)))
    result = failed(Status.NEGATIVE_CURVATURE)
    assert diagnose(operator, result) == diagnose(LinearSystem(operator), result)

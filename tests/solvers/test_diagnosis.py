"""What is said of a solve that failed."""

import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import ConjugateGradient, LinearSystem, SolveResult, Status
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


def test_a_nan_is_looked_for_in_the_batch():
    assert "look at the batch and the weights" in diagnose(
        MatrixOperator(torch.eye(3, device=DEVICE)), failed(Status.NONFINITE)
    )


def test_too_few_iterations_are_said_with_the_residual_that_is_left():
    message = diagnose(MatrixOperator(torch.eye(3, device=DEVICE)), failed(Status.MAX_ITERATIONS))
    assert "relative residual is 0.5 after 7 products" in message
    assert "raise the damping" in message


def test_negative_curvature_is_said_with_the_damping_that_would_lift_it():
    operator = MatrixOperator(torch.diag(torch.tensor([3.0, 1.0, -0.25], device=DEVICE)))
    message = diagnose(LinearSystem(operator), failed(Status.NEGATIVE_CURVATURE))
    assert "negative curvature (λ_min = -0.25, λ_max = 3)" in message
    assert "a damping above 0.25" in message
    assert "step is too long" not in message
    assert "In addition, the step is too long: step_size η = 1 " in diagnose(
        LinearSystem(operator), failed(Status.NEGATIVE_CURVATURE, step_size=1.0)
    )


def test_a_singular_operator_needs_damping():
    operator = MatrixOperator(torch.diag(torch.tensor([3.0, 1.0, 1e-6], dtype=torch.float64, device=DEVICE)))
    message = diagnose(LinearSystem(operator), failed(Status.NEGATIVE_CURVATURE))
    assert "operator is singular, and b does not lie in its range: use damping (λ_min = 1e-06, λ_max = 3)" in message


def test_a_diagnosis_takes_sixty_products_at_most():
    operator = Counted(spd_matrix(200, 1e6))
    diagnose(LinearSystem(operator), failed(Status.DIVERGED))
    assert operator.count <= 60

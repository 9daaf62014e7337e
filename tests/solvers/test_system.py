"""A curvature with its damping."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.solvers import LinearSystem
from tests.helpers.device import WHERE, randn, within
from tests.helpers.problems import spd_matrix

DAMPINGS = {
    "none": 0.0,
    "a number": 0.5,
    "a scalar tensor": torch.tensor(0.5),
    "one for each weight": torch.linspace(0.0, 1.0, 4),
}


@pytest.mark.parametrize("name", DAMPINGS)
def test_a_product_and_a_residual_are_those_of_the_damped_matrix(name):
    damping, matrix = DAMPINGS[name], spd_matrix(4, 10.0)
    system = LinearSystem(MatrixOperator(matrix), damping)
    dense = matrix + torch.diag(torch.as_tensor(damping, **WHERE).expand(4))
    x, b = randn(4, seed=1), randn(4, seed=2)
    assert torch.allclose(system.matvec(x), dense @ x, rtol=within(1e-12))
    assert torch.allclose(system.matrix.to_dense(), dense, rtol=within(1e-12))
    assert system.relative_residual(x, b) == pytest.approx(float((dense @ x - b).norm() / b.norm()), rel=within(1e-10))


def test_the_operator_itself_stays_undamped():
    operator = MatrixOperator(spd_matrix(4, 10.0))
    system = LinearSystem(operator, 0.5)
    assert system.operator is operator
    assert system.damping == 0.5
    assert LinearSystem(operator).matrix is operator


def test_the_damping_of_a_damped_operator_is_added():
    operator = MatrixOperator(spd_matrix(4, 10.0))
    system = LinearSystem(operator.damped(0.25), 0.5)
    assert system.operator is operator
    assert system.damping == 0.75


def test_a_damping_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected damping of shape \(4,\), got \(3,\)"):
        LinearSystem(MatrixOperator(spd_matrix(4, 10.0)), torch.ones(3))


def test_a_damping_comes_to_the_operator_s_dtype_and_device():
    operator = MatrixOperator(spd_matrix(4, 10.0))
    damping = LinearSystem(operator, torch.ones(4, dtype=torch.float32)).damping
    assert (damping.dtype, damping.device) == (operator.dtype, operator.device)

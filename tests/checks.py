"""Named checks that every implementation of an interface has to pass; tests run them over all of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_ifthpo.curvature import CurvatureOperator, LossOperator, MatrixOperator
from lightning_ifthpo.solvers import Amortized, Identity, Solver, Status
from tests.helpers.device import randn, within
from tests.helpers.problems import relative_error
from tests.helpers.systems import Counted, right_hand_side
from tests.helpers.trainers import Recorder, same

# Operators


def check_symmetric(operator: CurvatureOperator, tolerance: float) -> None:
    """One fixed, symmetric, linear map."""
    u, v = randn(2, operator.size, seed=1)
    image = operator.matvec(u)
    assert torch.allclose(operator.matvec(u), image, rtol=0, atol=within(1e-14))
    assert abs(v @ image - u @ operator.matvec(v)) <= tolerance * image.norm() * v.norm()
    assert relative_error(operator.matvec(2 * u - 3 * v), 2 * image - 3 * operator.matvec(v)) <= tolerance
    assert abs(operator.quadratic(u) - u @ image) <= tolerance * u.norm() * image.norm()


def check_matches_dense(operator: CurvatureOperator, matrix: Tensor, tolerance: float) -> None:
    assert relative_error(operator.to_dense(), matrix) < tolerance
    v = randn(operator.size, seed=4)
    assert relative_error(operator.matvec(v), matrix @ v) < tolerance


def check_documented_shapes(operator: CurvatureOperator, matrix: Tensor) -> None:
    size = len(matrix)
    v = randn(size, seed=4)
    assert (operator.size, operator.dtype, operator.device) == (size, matrix.dtype, matrix.device)
    assert operator.matvec(v).shape == (size,)
    assert operator.quadratic(v).shape == ()
    assert operator.to_dense().shape == (size, size)
    with pytest.raises(ValueError, match=rf"expected v of shape \({size},\), got \({size + 1},\)"):
        operator.matvec(torch.cat([v, v[:1]]))


def check_knows_its_loss(
    operator: LossOperator, loss: Tensor, parameters: Sequence[Tensor], hyperparameter: Tensor, tolerance: float
) -> None:
    """Value, gradient and mixed product, [n] and shaped like the hyperparameter, against autograd."""
    v = randn(operator.size, seed=6)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    wanted = torch.stack([torch.autograd.grad(entry, hyperparameter, retain_graph=True)[0] for entry in flat]).T @ v
    (got,) = operator.mixed_product(v, [hyperparameter])
    assert relative_error(got, wanted) < tolerance
    assert relative_error(operator.gradient, flat) < within(1e-12)
    assert relative_error(operator.loss, loss) < within(1e-12)
    assert not operator.gradient.requires_grad
    assert not operator.loss.requires_grad


def check_leaves_weights_untouched(make: Callable[[], CurvatureOperator], parameters: Sequence[Tensor]) -> None:
    """Bit for bit, without gradients, and without drawing random numbers that others would get."""
    before = [parameter.detach().clone() for parameter in parameters]
    operator = make()
    random_state = torch.get_rng_state()
    for seed in range(3):
        operator.matvec(randn(operator.size, seed=seed))
    assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.get_rng_state(), random_state)


# Solvers


def check_solves(solver: Solver, matrix: Tensor, b: Tensor, tolerance: float) -> None:
    result = solver.solve(MatrixOperator(matrix), b)
    assert relative_error(result.x, torch.linalg.solve(matrix, b)) < tolerance
    assert result.status is Status.CONVERGED


def check_result_is_honest(solver: Solver, matrix: Tensor, b: Tensor) -> None:
    """Products are those that were spent, and the residual is the true one."""
    operator = Counted(matrix)
    result = solver.solve(operator, b)
    assert result.products + result.extra_products == operator.count
    if isinstance(solver, Identity):
        assert result.relative_residual is None
    else:
        damping = 1.0 / (result.step_size * solver.horizon) if isinstance(solver, Amortized) else 0.0
        true = float((matrix @ result.x + damping * result.x - b).norm() / b.norm())
        assert result.relative_residual == pytest.approx(true, rel=within(1e-6, power=0.5), abs=within(1e-12))
    assert result.x.shape == b.shape
    assert (result.x.dtype, result.x.device) == (b.dtype, b.device)


def check_reports_a_status_never_nan(solver: Solver, matrix: Tensor, b: Tensor) -> None:
    """For an operator or a right-hand side that is not finite."""
    operator = MatrixOperator(torch.eye(len(b)).to(matrix))
    operator.matrix = matrix
    result = solver.solve(operator, b)
    assert result.status is Status.NONFINITE
    assert torch.equal(result.x, torch.zeros_like(b))


def check_takes_zero_to_zero(solver: Solver, matrix: Tensor) -> None:
    result = solver.solve(MatrixOperator(matrix), torch.zeros_like(matrix[0]))
    assert (result.x.abs().max(), result.relative_residual, result.products) == (0.0, 0.0, 0)
    assert result.status is Status.CONVERGED


def check_refuses_other_shapes(solver: Solver, matrix: Tensor) -> None:
    size = len(matrix)
    good, bad = right_hand_side(size).to(matrix), right_hand_side(size + 1).to(matrix)
    with pytest.raises(ValueError, match=rf"expected b of shape \({size},\), got \({size + 1},\)"):
        solver.solve(MatrixOperator(matrix), bad)
    with pytest.raises(ValueError, match=rf"expected x0 of shape \({size},\), got \({size + 1},\)"):
        solver.solve(MatrixOperator(matrix), good, bad)


# Callbacks


def check_leaves_training_untouched(watched: Recorder, plain: Recorder) -> None:
    """Weights, buffers, gradients, modes, random state, metrics and logged values, after each batch and each epoch."""
    assert same(watched.batches, plain.batches)
    assert same(watched.logged, plain.logged)


def check_state_is_plain(state: dict[str, Any]) -> None:
    """Tensors and plain numbers only, so that a checkpoint loads with weights_only=True, and all of it is there."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=True), state)

"""What all operators promise, and the operators that are made of others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    HessianOperator,
    MatrixOperator,
    mark_outputs,
)
from tests.helpers.networks import OPERATORS, TOLERANCE, batch
from tests.helpers.problems import Net, relative_error, spd_matrix


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_one_symmetric_linear_map_under_dropout_and_batchnorm(operator_type):
    x, y = batch()
    net = Net()
    operator = operator_type(lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    u, v = torch.randn(2, operator.size, dtype=torch.float64)
    tolerance = max(TOLERANCE[operator_type], 1e-6 if operator_type is FiniteDifferenceOperator else 0)
    image = operator.matvec(u)
    assert torch.allclose(operator.matvec(u), image, rtol=0, atol=1e-14)
    assert abs(v @ image - u @ operator.matvec(v)) <= tolerance * image.norm() * v.norm()
    assert relative_error(operator.matvec(2 * u - 3 * v), 2 * image - 3 * operator.matvec(v)) <= tolerance
    assert abs(operator.quadratic(u) - u @ image) <= tolerance * u.norm() * image.norm()


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_odd_parameters_have_zero_blocks(operator_type):
    """Frozen, unused, linearly entering and (once) tied parameters; a channels-last convolution."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    convolution = nn.Conv2d(3, 2, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    frozen = torch.randn(2, dtype=torch.float64)
    unused = torch.randn(2, dtype=torch.float64, requires_grad=True)
    linear = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def loss():
        z = convolution(x)
        z = mark_outputs(z + torch.nn.functional.conv2d(x.flip(0), convolution.weight))  # tied: used twice
        return z.square().mean() + linear.sum() + frozen.sum()

    parameters = [frozen, convolution.weight, unused, convolution.bias, linear]
    dense = operator_type(loss, parameters).to_dense()
    alive = slice(2, 2 + convolution.weight.numel())
    rest = [0, 1, alive.stop, alive.stop + 1, -2, -1]
    assert dense.shape == (62, 62)
    assert dense[rest].abs().max() == 0.0
    assert dense[:, rest].abs().max() == 0.0

    def of_weight(weight):
        z = F.conv2d(x, weight, convolution.bias) + F.conv2d(x.flip(0), weight)
        return z.square().mean()

    wanted = torch.func.hessian(of_weight)(convolution.weight.detach()).reshape(54, 54)
    assert relative_error(dense[alive, alive], wanted) < max(TOLERANCE[operator_type], 1e-8)


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_mixed_product_equals_the_dense_mixed_derivative(operator_type):
    x, y = batch()
    net, hyper = nn.Linear(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64, requires_grad=True)

    def loss():
        z = mark_outputs(net(x) * hyper.exp())
        return F.cross_entropy(z, y) + hyper.sigmoid().sum() * net.weight.square().sum()

    operator = operator_type(loss, list(net.parameters()))
    v = torch.randn(operator.size, dtype=torch.float64)
    gradient = torch.autograd.grad(loss(), list(net.parameters()), create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    wanted = torch.stack([torch.autograd.grad(entry, hyper, retain_graph=True)[0] for entry in flat]).T @ v
    (got,) = operator.mixed_product(v, [hyper])
    assert relative_error(got, wanted) < max(TOLERANCE[operator_type], 1e-8)


@pytest.mark.parametrize("delta", [0.5, torch.tensor([1.0, 2.0])], ids=["number", "vector"])
def test_damped_adds_a_diagonal(delta):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    wanted = matrix + torch.diag(torch.as_tensor(delta).expand(2))
    assert torch.equal(MatrixOperator(matrix).damped(delta).to_dense(), wanted)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: HessianOperator(lambda: w * 2, [w]), ValueError, r"expected a scalar, got shape \(2,\)"),
        (lambda w: HessianOperator(lambda: w.detach().sum(), [w]), ValueError, "is detached"),
        (lambda w: HessianOperator(lambda: 1.0, [w]), TypeError, "expected a scalar tensor, got float"),
        (lambda w: HessianOperator(lambda: w.sum(), [w]).matvec(torch.ones(3)), ValueError, r"\(2,\), got \(3,\)"),
        (lambda w: MatrixOperator(torch.ones(2, 3)), ValueError, "square matrix"),
        (lambda w: MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), ValueError, "symmetric matrix"),
        (lambda w: MatrixOperator(torch.eye(2)).damped(torch.ones(3)), ValueError, r"shape \(2,\), got \(3,\)"),
    ],
    ids=["vector loss", "detached", "float loss", "shape of v", "not square", "not symmetric", "damping"],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.ones(2, requires_grad=True))


def test_preconditioning_from_both_sides_keeps_symmetry():
    matrix, p = spd_matrix(6, 10.0, signs=True), torch.linspace(0, 2, 6, dtype=torch.float64)
    dense = MatrixOperator(matrix).preconditioned(p).to_dense()
    assert torch.allclose(dense, p.sqrt()[:, None] * matrix * p.sqrt())
    wanted = torch.linalg.eigvals(p[:, None] * matrix).real.sort().values
    assert torch.allclose(torch.linalg.eigvalsh(dense), wanted, atol=1e-12)
    with pytest.raises(ValueError, match=r"preconditioner of shape \(6,\), got \(5,\)"):
        MatrixOperator(matrix).preconditioned(p[:5])

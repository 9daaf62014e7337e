"""What all operators promise, and the operators that are made of others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    AverageOperator,
    CurvatureOperator,
    FiniteDifferenceOperator,
    GaussNewtonOperator,
    HessianOperator,
    MatrixOperator,
    mark_outputs,
)
from lightning_ifthpo.optimizers import UpdateRule
from lightning_ifthpo.solvers import Amortized, ConjugateGradient
from tests.checks import (
    check_documented_shapes,
    check_knows_its_loss,
    check_leaves_weights_untouched,
    check_matches_dense,
    check_symmetric,
)
from tests.helpers.device import DEVICE, FLOAT64, WHERE, randn, within
from tests.helpers.implementations import DIFFERENCES, EXACT, LOSS_OPERATORS, OPERATORS
from tests.helpers.networks import Net, batch, two_layers
from tests.helpers.problems import relative_error, spd_matrix

# BatchNorm has large third derivatives, which differences of gradients see
UNDER_BATCHNORM = {"finite differences": within(1e-6, power=2 / 3)}
WITH_AN_AVERAGE = LOSS_OPERATORS | {"average": lambda loss, w: AverageOperator([lambda: HessianOperator(loss, w)], [1])}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_symmetric_linear_map(name):
    operator, _, error = OPERATORS[name]()
    check_symmetric(operator, error)


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_dense_matrix(name):
    check_matches_dense(*OPERATORS[name]())


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_are_those_that_are_documented(name):
    operator, matrix, _ = OPERATORS[name]()
    check_documented_shapes(operator, matrix)


@pytest.mark.parametrize("name", WITH_AN_AVERAGE)
def test_one_symmetric_linear_map_under_dropout_and_batchnorm(name):
    x, y = batch()
    net = Net()
    net.layers[1].requires_grad_(name != "KFAC")  # which does not know BatchNorm
    operator = WITH_AN_AVERAGE[name](lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    check_symmetric(operator, UNDER_BATCHNORM.get(name, EXACT))


@pytest.mark.parametrize("name", LOSS_OPERATORS)
def test_products_leave_the_weights_bit_for_bit_and_no_gradient(name):
    x, y = batch()
    net = nn.Sequential(two_layers(), nn.Dropout(0.5))

    def loss():
        return F.cross_entropy(mark_outputs(net(x)), y % 2)

    parameters = list(net.parameters())
    check_leaves_weights_untouched(lambda: LOSS_OPERATORS[name](loss, parameters), parameters)


@pytest.mark.parametrize("name", LOSS_OPERATORS)
def test_mixed_product_equals_the_dense_mixed_derivative(name):
    x, y = batch()
    net, hyper = nn.Linear(4, 3).to(**WHERE), randn(3, seed=7).requires_grad_()

    def loss():
        z = mark_outputs(net(x) * hyper.exp())
        return F.cross_entropy(z, y) + hyper.sigmoid().sum() * net.weight.square().sum()

    parameters = list(net.parameters())
    tolerance = DIFFERENCES if name == "finite differences" else EXACT
    check_knows_its_loss(LOSS_OPERATORS[name](loss, parameters), loss(), parameters, hyper, tolerance)


@pytest.mark.parametrize(
    "operator_type", [HessianOperator, GaussNewtonOperator, FiniteDifferenceOperator], ids=lambda t: t.__name__
)
def test_odd_parameters_have_zero_blocks(operator_type):
    """Frozen, unused, linearly entering and (once) tied parameters; a channels-last convolution."""
    x = randn(2, 3, 6, 6, seed=8)
    convolution = nn.Conv2d(3, 2, 3).to(**WHERE, memory_format=torch.channels_last)
    frozen = randn(2, seed=9)
    unused = randn(2, seed=10).requires_grad_()
    linear = randn(2, seed=11).requires_grad_()

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
    tolerance = DIFFERENCES if operator_type is FiniteDifferenceOperator else within(1e-8)
    assert relative_error(dense[alive, alive], wanted) < tolerance


@pytest.mark.parametrize("delta", [0.5, torch.tensor([1.0, 2.0], device=DEVICE)], ids=["number", "vector"])
def test_damped_adds_a_diagonal(delta):
    matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], device=DEVICE)
    wanted = matrix + torch.diag(torch.as_tensor(delta, device=DEVICE).expand(2))
    assert torch.equal(MatrixOperator(matrix).damped(delta).to_dense(), wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MatrixOperator(torch.ones(2, 3, device=DEVICE)), "square matrix"),
        (lambda: MatrixOperator(torch.tensor([[1.0, 2.0], [0.0, 1.0]], device=DEVICE)), "symmetric matrix"),
        (
            lambda: MatrixOperator(torch.eye(2, device=DEVICE)).damped(torch.ones(3, device=DEVICE)),
            r"shape \(2,\), got \(3,\)",
        ),
    ],
    ids=["not square", "not symmetric", "damping"],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_preconditioning_from_both_sides_keeps_symmetry():
    matrix, p = spd_matrix(6, 10.0, signs=True), torch.linspace(0, 2, 6, **WHERE)
    dense = MatrixOperator(matrix).preconditioned(p).to_dense()
    assert torch.allclose(dense, p.sqrt()[:, None] * matrix * p.sqrt())
    wanted = torch.linalg.eigvals(p[:, None] * matrix).real.sort().values
    assert torch.allclose(torch.linalg.eigvalsh(dense), wanted, atol=within(1e-12))
    with pytest.raises(ValueError, match=r"preconditioner of shape \(6,\), got \(5,\)"):
        MatrixOperator(matrix).preconditioned(p[:5])


def test_a_matrix_is_symmetric_up_to_rounding_of_its_largest_entry():
    rounding = torch.finfo(torch.float64).eps ** 0.5
    skew = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    diagonal = torch.diag(torch.tensor([0.0, 1.0, 8.0], dtype=torch.float64, device=DEVICE))
    MatrixOperator(diagonal + 3.0 * rounding * skew)
    with pytest.raises(ValueError, match="symmetric matrix"):
        MatrixOperator(diagonal + 5.0 * rounding * skew)
    MatrixOperator(torch.zeros(2, 2, device=DEVICE))


def test_damping_may_be_a_tensor_without_dimensions():
    dense = MatrixOperator(torch.eye(2, device=DEVICE)).damped(torch.tensor(0.5, device=DEVICE)).to_dense()
    assert torch.equal(dense, 1.5 * torch.eye(2, device=DEVICE))


def test_vectors_of_another_dtype_come_to_that_of_the_operator():
    product = MatrixOperator(torch.diag(torch.tensor([1.0, 2.0], **FLOAT64))).matvec(torch.ones(2, device=DEVICE))
    assert product.dtype == torch.float64
    assert product.tolist() == [1.0, 2.0]


class Itself(CurvatureOperator):
    """The identity, which returns the vector that it gets."""

    size, dtype, device = 3, WHERE["dtype"], WHERE["device"]

    def _product(self, v):
        return v


def test_a_product_never_shares_memory_with_its_vector():
    """Solvers and damping write to products."""
    v = torch.tensor([1.0, 2.0, 3.0], **WHERE)
    before = v.clone()
    assert torch.equal(Itself().damped(0.5).matvec(v), 1.5 * before)
    assert torch.equal(v, before)
    solvers = {1.0: ConjugateGradient(), 2.0: Amortized(horizon=10).with_optimizer(UpdateRule(0.1))}
    for scale, solver in solvers.items():  # of the damped matrix
        result = solver.solve(Itself(), v, before.clone())
        true = float((v - scale * result.x).norm() / v.norm())
        assert result.relative_residual == pytest.approx(true, abs=within(1e-12))
    assert torch.equal(v, before)

"""Finite differences of gradients: their error, and that they leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import FiniteDifferenceOperator, HessianOperator
from tests.helpers.device import DEVICE, WHERE, randn
from tests.helpers.networks import Net, batch
from tests.helpers.problems import relative_error


def test_finite_differences_leave_the_weights_bit_for_bit_and_no_gradient():
    x, y = batch()
    net = Net(dtype=torch.float32, dropout=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    operator = FiniteDifferenceOperator(lambda: F.cross_entropy(net(x.float()), y), list(net.parameters()))
    random_state = torch.get_rng_state()
    for _ in range(10):
        operator.matvec(randn(operator.size, seed=0, dtype=torch.float32))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_finite_differences_restore_the_weights_after_an_exception():
    weight = randn(3, seed=1).requires_grad_()
    before, calls = weight.detach().clone(), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a product")
        return weight.pow(3).sum()

    operator = FiniteDifferenceOperator(loss, [weight])
    with pytest.raises(RuntimeError, match="in the middle"):
        operator.matvec(torch.ones(3, **WHERE))
    assert torch.equal(weight.detach(), before)


def test_finite_differences_in_float32_are_accurate_to_1e_minus_3():
    x, y = batch()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DEVICE)
    parameters = list(net.parameters())

    def loss():
        return F.cross_entropy(net(x.float()), y)

    v = randn(sum(p.numel() for p in parameters), seed=2, dtype=torch.float32)
    exact = HessianOperator(loss, parameters).matvec(v)
    for scale in (1e-10, 1.0, 1e10):
        got = FiniteDifferenceOperator(loss, parameters).matvec(scale * v)
        assert relative_error(got, scale * exact) < 1e-3  # eps^(2/3) = 2.4e-5, times the third derivatives


def test_slope_and_curvature_along_a_direction_come_from_three_gradients():
    """Of w³ at 1 and 2 along (1, 1): ∇L·v = 3 + 12, vᵀHv = 6 + 12."""
    weight, calls = torch.tensor([1.0, 2.0], device=DEVICE, dtype=torch.float64, requires_grad=True), []

    def loss():
        calls.append(1)
        return weight.pow(3).sum()

    slope, curvature = FiniteDifferenceOperator(loss, [weight]).slope_and_curvature(torch.ones_like(weight))
    assert (slope.item(), curvature.item()) == pytest.approx((15.0, 18.0), rel=1e-8)
    assert len(calls) == 3


def test_along_a_zero_vector_nothing_is_evaluated():
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    operator = FiniteDifferenceOperator(lambda: pytest.fail("evaluated"), [weight])
    assert torch.equal(operator.matvec(torch.zeros(2, device=DEVICE)), torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_hyperparameter_that_enters_on_one_side_only_has_a_derivative_of_zero_on_the_other(sign):
    """∂L/∂h is 2 ahead and zero behind, and their difference is taken over 2ε = 2 cbrt(eps)."""
    weight, h = torch.ones(1, **WHERE, requires_grad=True), torch.ones(1, **WHERE, requires_grad=True)
    operator = FiniteDifferenceOperator(lambda: ((weight * h if weight > 1.0 else weight) ** 2).sum(), [weight])
    unused = torch.ones(1, **WHERE, requires_grad=True)
    product, nothing = operator.mixed_product(torch.full((1,), sign, **WHERE), [h, unused])
    width = 2 * torch.finfo(torch.float64).eps ** (1 / 3)
    assert product.item() == pytest.approx(sign * 2 / width, rel=1e-4)  # 2(1 + ε)² with ε = 6e-6
    assert nothing is None


def test_random_numbers_are_those_that_come_next_when_the_operator_is_made():
    """Whatever is asked first, and whatever is drawn in between; none of it advances the generators."""
    weight = torch.ones(20, **WHERE, requires_grad=True)
    loss = lambda: (F.dropout(weight, 0.5) ** 3).sum()  # noqa: E731
    torch.manual_seed(3)
    wanted = loss().item()
    torch.manual_seed(3)
    operator = FiniteDifferenceOperator(loss, [weight])
    state = torch.get_rng_state()
    assert operator.gradient.count_nonzero() < 20
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert operator.loss.item() == wanted


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_differences_are_as_wide_as_the_weights_ask_for(size):
    """At weights of 1e8 cbrt(eps) is only 400 units in the last place; at 1e-8 the width is cbrt(eps) itself."""
    weight = torch.full((4,), size, device=DEVICE, dtype=torch.float64, requires_grad=True)
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64, device=DEVICE))
    operator = FiniteDifferenceOperator(lambda: weight @ matrix @ weight / 2 + weight.sum(), [weight])
    assert relative_error(operator.to_dense(), matrix) < 1e-8

"""Finite differences of gradients: their error, and that they leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    HessianOperator,
)
from tests.helpers.networks import batch
from tests.helpers.problems import Net, relative_error


def test_finite_differences_leave_the_weights_bit_for_bit_and_no_gradient():
    x, y = batch()
    net = Net(dtype=torch.float32, dropout=0.5)
    before = [p.detach().clone() for p in net.parameters()]
    operator = FiniteDifferenceOperator(lambda: F.cross_entropy(net(x.float()), y), list(net.parameters()))
    random_state = torch.get_rng_state()
    for _ in range(10):
        operator.matvec(torch.randn(operator.size, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_finite_differences_restore_the_weights_after_an_exception():
    weight = torch.randn(3, dtype=torch.float64, requires_grad=True)
    before, calls = weight.detach().clone(), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle of a product")
        return weight.pow(3).sum()

    operator = FiniteDifferenceOperator(loss, [weight])
    with pytest.raises(RuntimeError, match="in the middle"):
        operator.matvec(torch.ones(3, dtype=torch.float64))
    assert torch.equal(weight.detach(), before)


def test_finite_differences_in_float32_are_accurate_to_1e_minus_3():
    x, y = batch()
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    parameters = list(net.parameters())

    def loss():
        return F.cross_entropy(net(x.float()), y)

    v = torch.randn(sum(p.numel() for p in parameters))
    exact = HessianOperator(loss, parameters).matvec(v)
    for scale in (1e-10, 1.0, 1e10):
        got = FiniteDifferenceOperator(loss, parameters).matvec(scale * v)
        assert relative_error(got, scale * exact) < 1e-3  # eps^(2/3) = 2.4e-5, times the third derivatives

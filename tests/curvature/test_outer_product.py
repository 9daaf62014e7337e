"""The outer product of the gradient against dense references."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    GradientOuterProductOperator,
)
from lightning_ifthpo.solvers import Direct
from tests.helpers.device import DEVICE, WHERE, within
from tests.helpers.networks import batch
from tests.helpers.problems import relative_error


@pytest.mark.parametrize("delta", [0.0, 0.3, torch.linspace(0.1, 1.0, 15, **WHERE)], ids=["0", "0.3", "vector"])
def test_the_outer_product_of_the_gradient_and_its_inverse_equal_the_dense_ones(delta):
    x, y = batch()
    net = nn.Linear(4, 3).to(**WHERE)
    parameters = list(net.parameters())
    operator = GradientOuterProductOperator(lambda: F.cross_entropy(net(x), y), parameters)
    g = torch.cat([g.reshape(-1) for g in torch.autograd.grad(F.cross_entropy(net(x), y), parameters)])
    assert relative_error(operator.to_dense(), torch.outer(g, g)) < within(1e-14)
    b = torch.linspace(-1, 1, 15, **WHERE)
    result = Direct(damping=delta, max_size=1).solve(operator, b)
    dense = torch.outer(g, g) + torch.diag(torch.as_tensor(delta, **WHERE).expand(15))
    assert relative_error(result.x, torch.linalg.pinv(dense, hermitian=True) @ b) < within(1e-9)
    assert (result.products, result.extra_products) == (0, 1)


def test_the_outer_product_of_a_vanishing_gradient_has_no_inverse():
    w = torch.zeros(3, device=DEVICE, requires_grad=True)
    operator = GradientOuterProductOperator(lambda: w.square().sum(), [w])
    assert torch.equal(Direct().solve(operator, torch.ones(3, device=DEVICE)).x, torch.zeros(3, device=DEVICE))


def some_zeros(*where):
    delta = torch.linspace(0.1, 1.0, 6, **WHERE)
    delta[list(where)] = 0.0
    return delta


@pytest.mark.parametrize("delta", [some_zeros(0), some_zeros(1, 4), some_zeros(0, 1, 2, 3, 4), some_zeros(*range(6))])
@pytest.mark.parametrize("still", [(), (1,), (1, 4), (0, 2)], ids=str)
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4])
def test_its_inverse_is_the_pseudo_inverse_where_some_weights_are_undamped(delta, still, size):
    """Also where the gradient along undamped weights is zero, and in any unit of the loss."""
    slope = torch.linspace(-1.0, 2.0, 6, **WHERE)
    slope[list(still)] = 0.0
    w = torch.zeros(6, **WHERE, requires_grad=True)
    operator = GradientOuterProductOperator(lambda: size * slope @ w, [w])
    b = torch.linspace(1.0, -2.0, 6, **WHERE)
    dense = torch.outer(slope, slope) + torch.diag(delta)
    x = size**2 * operator.solve(b, size**2 * delta)
    assert relative_error(x, torch.linalg.pinv(dense, hermitian=True) @ b) < within(1e-12)

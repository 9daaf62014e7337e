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

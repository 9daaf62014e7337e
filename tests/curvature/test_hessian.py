"""The Hessian against dense references."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import (
    FiniteDifferenceOperator,
    HessianOperator,
    mark_outputs,
)
from tests.helpers.networks import OPERATORS, TOLERANCE, batch, functional
from tests.helpers.problems import Net, relative_error


@pytest.mark.parametrize("operator_type", OPERATORS, ids=lambda t: t.__name__)
def test_linear_softmax_equals_the_dense_hessian(operator_type):
    """Where the model is linear, Gauss–Newton is the Hessian."""
    x, y = batch()
    net = nn.Linear(4, 3, dtype=torch.float64)
    operator = operator_type(lambda: F.cross_entropy(mark_outputs(net(x)), y), list(net.parameters()))
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    assert relative_error(operator.to_dense(), torch.func.hessian(function)(flat)) < TOLERANCE[operator_type]


@pytest.mark.parametrize("operator_type", [HessianOperator, FiniteDifferenceOperator], ids=lambda t: t.__name__)
def test_network_with_batchnorm_equals_the_dense_hessian(operator_type):
    x, y = batch()
    net = Net(dropout=0.0)
    operator = operator_type(lambda: F.cross_entropy(net(x), y), list(net.parameters()))
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    dense = torch.autograd.functional.hessian(function, flat)
    # the difference quotient sees BatchNorm's large third derivatives
    assert relative_error(operator.to_dense(), dense) < (1e-12 if operator_type is HessianOperator else 1e-6)

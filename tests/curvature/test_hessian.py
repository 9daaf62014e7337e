"""The Hessian against dense references."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.curvature import FiniteDifferenceOperator, HessianOperator
from tests.helpers.device import DEVICE, within
from tests.helpers.networks import Net, batch, functional
from tests.helpers.problems import relative_error


@pytest.mark.parametrize("operator_type", [HessianOperator, FiniteDifferenceOperator], ids=lambda t: t.__name__)
def test_network_with_batchnorm_equals_the_dense_hessian(operator_type):
    x, y = batch()
    net = Net(dropout=0.0)
    operator = operator_type(lambda: F.cross_entropy(net(x), y), list(net.parameters()))
    function, flat = functional(net, lambda model, _: F.cross_entropy(model(x), y))
    dense = torch.autograd.functional.hessian(function, flat)
    # the difference quotient sees BatchNorm's large third derivatives
    tolerance = within(1e-12) if operator_type is HessianOperator else within(1e-6, power=2 / 3)
    assert relative_error(operator.to_dense(), dense) < tolerance


def test_outputs_beside_the_loss_are_ignored():
    w = torch.tensor([1.0, 2.0], requires_grad=True, device=DEVICE)
    operator = HessianOperator(lambda: (w.prod() ** 2, [w, w]), [w])
    assert torch.equal(operator.to_dense(), torch.tensor([[8.0, 8.0], [8.0, 2.0]], device=DEVICE))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: HessianOperator(lambda: w * 2, [w]), ValueError, r"expected a scalar, got shape \(2,\)"),
        (lambda w: HessianOperator(lambda: w.detach().sum(), [w]), ValueError, "is detached"),
        (lambda w: HessianOperator(lambda: 1.0, [w]), TypeError, "expected a scalar tensor, got float"),
        (
            lambda w: HessianOperator(lambda: w.sum(), [w]).matvec(torch.ones(3, device=DEVICE)),
            ValueError,
            r"\(2,\), got \(3,\)",
        ),
    ],
    ids=["vector loss", "detached", "float loss", "shape of v"],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make(torch.ones(2, requires_grad=True, device=DEVICE))

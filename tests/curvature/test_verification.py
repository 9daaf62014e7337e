"""Derivatives that cannot be trusted are found on one batch, and healthy ones are not suspected."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_ifthpo.core.graph import SecondDerivativeError
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import mark_outputs
from lightning_ifthpo.curvature.verification import (
    AsymmetricCurvatureError,
    check_complete,
    check_symmetric,
    verified_operator,
)
from tests.helpers.brought import InNumpy, InTorch, Once, OwnCheckpoint, Reversed
from tests.helpers.device import WHERE, randn


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def hooked(hook):
    def function(x):
        x = x.tanh()
        x.register_hook(hook)
        return x

    return function


def network(*middle, dtype=WHERE["dtype"]):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).to(WHERE["device"], dtype)


def loss_of(net, forward=None):
    x, y = randn(16, 6, seed=1).to(next(net.parameters()).dtype), torch.arange(16, device=WHERE["device"]) % 3
    return Loss(
        lambda: F.cross_entropy(mark_outputs((forward or net)(x)), y), [p for p in net.parameters() if p.requires_grad]
    )


def verify(curvature, loss):
    operator, follows = verified_operator(curvature, loss, check_complete(loss))
    assert follows
    return operator


CURVATURES = ["hessian", "gauss_newton", "gradient_outer_product", "finite_difference"]

HEALTHY = {
    "tanh": [nn.Tanh()],
    "ReLU": [nn.ReLU()],
    "hard kinks": [nn.Hardtanh(), nn.LeakyReLU()],
    "BatchNorm": [nn.BatchNorm1d(8), nn.ReLU()],
    "dropout": [nn.Dropout(0.5), nn.Tanh()],
    "frozen layer": [nn.Linear(8, 8).requires_grad_(False), nn.Tanh()],
    "weight norm": [weight_norm(nn.Linear(8, 8)), nn.Tanh()],
    "custom function": [Apply(InTorch.apply)],
    "hook that looks on": [Apply(hooked(lambda gradient: None))],
    "hook that clips": [Apply(hooked(lambda gradient: gradient.clamp(-1e-3, 1e-3)))],
    "hook that scales": [nn.Tanh(), Apply(hooked(lambda gradient: 0.1 * gradient)), nn.Tanh()],
    "nothing": [],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_are_not_suspected(name, curvature, dtype):
    operator = verify(curvature, loss_of(network(*HEALTHY[name], dtype=dtype)))
    assert bool(operator.matvec(torch.ones(operator.size, dtype=dtype, device=operator.device)).isfinite().all())


PARTLY_CONSTANT = {
    "detached norm": [Apply(lambda x: x / x.detach().norm(dim=1, keepdim=True))],
    "straight-through estimator": [Apply(lambda x: x + (x.sign() - x).detach())],
    "stopped branch": [nn.Tanh(), Apply(lambda x: x * x.detach())],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PARTLY_CONSTANT)
def test_losses_that_do_not_follow_their_gradient_are_told_apart(name, dtype):
    loss = loss_of(network(*PARTLY_CONSTANT[name], dtype=dtype))
    operator, follows = verified_operator("hessian", loss, check_complete(loss))
    assert not follows
    assert bool(operator.matvec(torch.ones(operator.size, dtype=dtype, device=operator.device)).isfinite().all())


FAULTS = {
    "NumPy in a backward pass": ([Apply(InNumpy.apply)], "differ from differences|are not symmetric"),
    "once differentiable": ([Apply(Once.apply)], "can be differentiated only once"),
    "gradient reversal": ([Apply(Reversed.apply)], "differ from differences|are not symmetric"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, dtype):
    layers, message = FAULTS[name]
    with pytest.raises(SecondDerivativeError, match=message):
        verify("hessian", loss_of(network(*layers, dtype=dtype)))


@pytest.mark.parametrize("curvature", ["hessian", "finite_difference"])
def test_weights_that_only_backward_finds_are_missed_by_nobody(curvature):
    net = network(nn.Tanh())
    loss = loss_of(net, lambda x: OwnCheckpoint.apply(net, x.clone().requires_grad_()))
    with pytest.raises(SecondDerivativeError, match=r"does not find them \(OwnCheckpoint\)"):
        verify(curvature, loss)


def test_gradients_that_were_there_before_stay():
    net = network(nn.Tanh())
    weights, x = list(net.parameters()), randn(3, 6, seed=0).requires_grad_()
    weights[0].grad = kept = torch.ones_like(weights[0])
    check_complete(Loss(lambda: net(x).square().mean(), weights))
    assert weights[0].grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert weights[1].grad is None
    assert x.grad is None


def test_symmetry_is_judged_by_the_size_of_the_products():
    class Operator:
        size, dtype, device = 50, torch.float64, torch.device("cpu")

        def __init__(self, skew):
            matrix = torch.randn(50, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            self.matrix = matrix + matrix.T + skew * (matrix - matrix.T)

        def matvec(self, v):
            return self.matrix @ v

    check_symmetric(Operator(0.0), "the loss")
    check_symmetric(Operator(1e-3), "the loss", tolerance=0.05)
    with pytest.raises(AsymmetricCurvatureError, match=r"of the loss are not symmetric: v·Au = .* and u·Av = "):
        check_symmetric(Operator(1e-3), "the loss")
    with pytest.raises(AsymmetricCurvatureError):
        check_symmetric(Operator(0.5), "the loss", tolerance=0.05)

"""Losses that follow their gradient, and losses that do not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.core.consistency import follows_its_gradient
from lightning_ifthpo.core.loss import Loss
from tests.helpers.device import DEVICE, randn

X, Y = randn(64, 20, seed=0, dtype=torch.float32), torch.arange(64, device=DEVICE) % 5


def network(activation=nn.ReLU, layers=1):
    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(32, 32), activation())]
    return nn.Sequential(nn.Linear(20, 32), activation(), *hidden, nn.Linear(32, 5)).to(DEVICE)


class Reversed(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def policy_gradient(net):
    log_policy = net(X).log_softmax(1)[torch.arange(64), Y]
    return -(log_policy.exp().detach() * log_policy).mean()


def temporal_difference(net):
    values = net(X)[:, 0]
    return (values - Y - 0.9 * values.roll(1).detach()).square().mean()


def straight_through(net):
    """As of weights with one bit."""
    one_bit = [layer.weight + (0.2 * layer.weight.sign() - layer.weight).detach() for layer in (net[0], net[2])]
    return F.cross_entropy(F.linear(F.linear(X, one_bit[0]).relu(), one_bit[1]), Y)


def reversal(net):
    hidden = net[:2](X)
    return F.cross_entropy(net[2](hidden), Y) + F.cross_entropy(net[2](Reversed.apply(hidden)), Y % 2)


def stopped_branch(net):
    """As of a network that predicts its own output on other views."""
    one, other = net(X), net(X.flip(1)).detach()
    return -F.cosine_similarity(one, other).mean()


DETACHED = [policy_gradient, temporal_difference, straight_through, reversal, stopped_branch]


@pytest.mark.parametrize("loss", DETACHED, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_with_detached_parts_do_not_follow_their_gradient(loss, dtype, monkeypatch):
    net = network().to(dtype)
    monkeypatch.setitem(globals(), "X", X.to(dtype))
    assert not follows_its_gradient(Loss(lambda: loss(net), list(net.parameters())))


HEALTHY = {
    "kinks": lambda: network(),
    "ten layers": lambda: network(layers=10),
    "smooth": lambda: network(nn.Tanh),
    "steps of zero slope": lambda: network(nn.ReLU6),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), network()),
    "batch statistics": lambda: nn.Sequential(network(), nn.BatchNorm1d(5)).to(DEVICE),
}


@pytest.mark.parametrize("std", [0.003, 0.001])
@pytest.mark.parametrize("layers", [6, 12, 20])
@pytest.mark.parametrize("seed", range(3))
def test_batch_norm_behind_tiny_weights_is_healthy(std, layers, seed):
    """Where no step is short enough in float32, because BatchNorm makes a small change of small weights large."""
    torch.manual_seed(seed)
    hidden = [module for _ in range(layers) for module in (nn.Linear(20, 20), nn.BatchNorm1d(20), nn.ReLU())]
    net = nn.Sequential(*hidden, nn.Linear(20, 5)).to(DEVICE)
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
    assert follows_its_gradient(Loss(lambda: F.cross_entropy(net(X), Y), list(net.parameters())))


@pytest.mark.parametrize("steps", [0, 100])
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_losses_follow_their_gradient(name, steps):
    """Before training and near a minimum, in float32."""
    net = HEALTHY[name]()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    for scale in (1e-6, 1.0, 1e6):
        loss = Loss(lambda scale=scale: scale * F.cross_entropy(net(X), Y), list(net.parameters()))
        assert follows_its_gradient(loss)


def test_a_loss_without_slope_or_without_a_value_says_nothing():
    w = torch.zeros(3, requires_grad=True, device=DEVICE)
    assert follows_its_gradient(Loss(lambda: (w**2).sum(), [w]))
    assert follows_its_gradient(Loss(lambda: (w / 0.0).sum(), [w]))


def test_it_costs_one_gradient_and_two_forward_passes():
    w, calls = torch.ones(3, requires_grad=True, device=DEVICE), []

    def loss():
        calls.append("forward")
        square = w**2
        square.grad_fn.register_hook(lambda *_: calls.append("gradient"))
        return square.sum()

    follows_its_gradient(Loss(loss, [w]))
    assert calls.count("forward") == 1 + 2
    assert calls.count("gradient") == 1
    assert torch.equal(w.detach(), torch.ones(3, device=DEVICE))


def test_a_gradient_that_is_known_is_used():
    w, calls = torch.ones(3, requires_grad=True, device=DEVICE), []
    loss = Loss(lambda: calls.append("forward") or (w**2).sum(), [w])
    assert follows_its_gradient(loss, 2.0 * torch.ones(3, device=DEVICE))
    assert not follows_its_gradient(loss, torch.ones(3, device=DEVICE))
    assert len(calls) == 2 + 9
    assert follows_its_gradient(loss, 2.0 * torch.ones(3, device=DEVICE), torch.tensor(3.0))
    assert len(calls) == 2 + 9 + 1

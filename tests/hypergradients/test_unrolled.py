"""Unrolled hypergradients against backpropagation and repeated runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import (
    implicit_hypergradient,
    unrolled_hypergradient,
)
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.solvers import (
    Neumann,
)
from tests.helpers.device import DEVICE, FLOAT64, randn
from tests.helpers.problems import relative_error, ridge


@pytest.mark.parametrize("terms", [0, 1, 5, 20])
def test_unrolled_steps_from_the_optimum_equal_neumann_terms(digits, terms):
    before = digits.weight.detach().clone()
    losses = (digits.inner_loss, digits.outer_loss, digits.parameters, [digits.log_decay])
    unrolled = unrolled_hypergradient(*losses, steps=terms + 1, lr=0.5)
    series = implicit_hypergradient(*losses, solver=Neumann(terms=terms, step_size=0.5))
    assert relative_error(unrolled.gradients[0], series.gradients[0]) < 1e-12
    assert unrolled.relative_residual == pytest.approx(series.relative_residual, rel=1e-9)
    assert unrolled.products == series.products
    assert torch.equal(digits.weight, before)


def test_unrolled_equals_backpropagation_through_the_loop():
    """Away from a stationary point, with a direct term, against autograd through the same steps."""
    torch.manual_seed(1)
    x, y = torch.randn(9, 3, **FLOAT64), torch.randn(9, **FLOAT64)
    w = torch.randn(3, **FLOAT64, requires_grad=True)
    h = torch.randn(3, **FLOAT64)

    def inner(weights, hyper):
        return (x @ weights - y).tanh().square().mean() + (hyper.exp() * weights.square()).sum()

    def outer(weights, hyper):
        return (x[:4] @ weights).square().mean() + hyper.sin().sum()

    result = unrolled_hypergradient(lambda: inner(w, h), lambda: outer(w, h), [w], [h], steps=7, lr=0.1)
    weights, hyper = w, h.clone().requires_grad_()
    for _ in range(7):
        (gradient,) = torch.autograd.grad(inner(weights, hyper), weights, create_graph=True)
        weights = weights - 0.1 * gradient
    (wanted,) = torch.autograd.grad(outer(weights, hyper), hyper)
    assert relative_error(result.gradients[0], wanted) < 1e-12
    assert not h.requires_grad


def test_unrolled_draws_each_step_its_own_dropout_and_retraces_it():
    x, y = torch.randn(8, 4, **FLOAT64), torch.arange(8, device=DEVICE) % 3
    net, h = nn.Sequential(nn.Linear(4, 3).to(**FLOAT64), nn.Dropout(0.5)), torch.zeros((), **FLOAT64)

    def inner():
        return h.exp() * F.cross_entropy(net(x), y)

    def outer():
        return net[0](x).square().mean()

    parameters = list(net.parameters())
    torch.manual_seed(4)
    result = unrolled_hypergradient(inner, outer, parameters, [h], steps=3, lr=0.3)
    torch.manual_seed(4)
    hyper, weights = h.clone().requires_grad_(), list(parameters)
    for _ in range(3):
        loss = hyper.exp() * F.cross_entropy(F.dropout(F.linear(x, *weights), 0.5), y)
        weights = [
            w - 0.3 * g for w, g in zip(weights, torch.autograd.grad(loss, weights, create_graph=True), strict=True)
        ]
    (wanted,) = torch.autograd.grad(F.linear(x, *weights).square().mean(), hyper)
    assert relative_error(result.gradients[0], wanted) < 1e-12


@pytest.mark.parametrize(
    ("steps", "lr", "message"), [(0, 0.1, "steps"), (1, 0.0, "lr > 0"), (1, float("nan"), "lr > 0")]
)
def test_unrolled_refuses(steps, lr, message):
    w = torch.ones(1, requires_grad=True, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        unrolled_hypergradient(
            lambda: w.sum(), lambda: w.sum(), [w], [torch.tensor(1.0, device=DEVICE)], steps=steps, lr=lr
        )


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.9)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unrolling_an_optimizer_equals_the_differences_of_runs_made_anew(name):
    """With whatever it keeps, from the middle of a run, which is left as it was."""
    inner, outer, w, log_decay, _ = ridge()
    with torch.no_grad():
        w.add_(torch.linspace(-1, 1, w.numel(), dtype=w.dtype, device=DEVICE).view_as(w))
    optimizer = OPTIMIZERS[name]([w])

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            inner().backward()
            optimizer.step()

    train(3)
    start, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())
    result = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=4, optimizer=optimizer)
    assert torch.equal(w.detach(), start)
    for before, after in zip(state["state"][0].values(), optimizer.state_dict()["state"][0].values(), strict=True):
        assert torch.equal(torch.as_tensor(before), torch.as_tensor(after))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            w.copy_(start)
            log_decay.add_(sign * 1e-5)
        optimizer.load_state_dict(copy.deepcopy(state))
        train(4)
        ends.append(outer().item())
        with torch.no_grad():
            log_decay.sub_(sign * 1e-5)
    assert result.gradients[0].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_the_series_of_adam_equals_unrolled_adam_at_a_stationary_point():
    """Where the gradient is zero, its square moves the second moment by nothing; β₂ close to one keeps it as it is."""
    inner, outer, w, log_decay, _ = ridge()
    optimizer = torch.optim.Adam([w], lr=0.03, betas=(0.0, 1 - 1e-13))
    moment = torch.linspace(0.5, 2.0, w.numel(), dtype=w.dtype, device=DEVICE).view_as(w)
    optimizer.state[w] = {
        "step": torch.tensor(1e15), "exp_avg": torch.zeros_like(w), "exp_avg_sq": moment
    }  # fmt: skip
    unrolled = unrolled_hypergradient(inner, outer, [w], [log_decay], steps=8, optimizer=optimizer)
    solver = Neumann(terms=7, step_size="optimizer").with_optimizer(UpdateRule.of([optimizer], [w]))
    series = implicit_hypergradient(inner, outer, [w], [log_decay], solver=solver)
    assert series.gradients[0].item() == pytest.approx(unrolled.gradients[0].item(), rel=1e-9)
    identity = implicit_hypergradient(inner, outer, [w], [log_decay], solver=Neumann(terms=7, step_size=0.03))
    assert series.gradients[0].item() != pytest.approx(identity.gradients[0].item(), rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either lr, for gradient descent, or an optimizer"),
        ({"lr": 0.1, "optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True, device=DEVICE)])}, "either lr"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True, device=DEVICE)])},
            "1 of 1 parameters do not belong",
        ),
        ({"optimizer": "LBFGS"}, "LBFGS does not take differentiable=True"),
    ],
)
def test_unrolled_refuses_optimizers(options, message):
    w = torch.ones(1, requires_grad=True, device=DEVICE)
    if options.get("optimizer") == "LBFGS":
        options = {"optimizer": torch.optim.LBFGS([w])}
    with pytest.raises(ValueError, match=message):
        unrolled_hypergradient(
            lambda: w.sum(), lambda: w.sum(), [w], [torch.tensor(1.0, device=DEVICE)], steps=1, **options
        )


def test_an_optimizer_may_insist_on_a_learning_rate():
    class Own(torch.optim.SGD):
        def __init__(self, params, lr, *, differentiable=False, **options):
            super().__init__(params, lr=lr, differentiable=differentiable)

    inner, outer, w, log_decay, _ = ridge()
    with torch.no_grad():
        w.add_(1.0)
    losses = (inner, outer, [w], [log_decay])
    own = unrolled_hypergradient(*losses, steps=3, optimizer=Own([{"params": [w], "lr": 0.1}], lr=0.5))
    assert own.gradients[0].item() == unrolled_hypergradient(*losses, steps=3, lr=0.1).gradients[0].item()


EVERY = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.3),
    "maximize": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=0.1),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=0.1, eps=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, eps=0.1, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, eps=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1, eps=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, eps=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.2, eps=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.1, eps=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


@pytest.mark.parametrize("used", [0, 3], ids=["fresh", "used"])
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_is_unrolled_from_a_fresh_and_from_a_used_state(name, used):
    """Against differences of real runs; eps = 0.1, because derivatives of an Adam with eps = 1e-8 are that small."""
    matrix, target = randn(8, 3, seed=0, dtype=torch.float64), randn(8, seed=1, dtype=torch.float64)
    h = torch.tensor(-1.0, **FLOAT64)

    def started():
        w = torch.tensor([2.0, -1.0, 0.7], **FLOAT64, requires_grad=True)
        inner = lambda: ((torch.tanh(matrix @ w) - target) ** 2).mean() + h.exp() * (w**2).sum() / 2  # noqa: E731
        optimizer = EVERY[name]([w])

        def train(steps):
            for _ in range(steps):
                optimizer.zero_grad()
                inner().backward()
                optimizer.step()

        train(used)
        return w, inner, optimizer, train

    def end(steps, shift):
        w, _, _, train = started()
        h.add_(shift)
        train(steps)
        h.sub_(shift)
        return float((w.detach() ** 2).sum())

    for steps in (1, 2, 5, 20):
        w, inner, optimizer, _ = started()
        wanted = (end(steps, 1e-5) - end(steps, -1e-5)) / 2e-5
        result = unrolled_hypergradient(inner, lambda w=w: (w**2).sum(), [w], [h], steps=steps, optimizer=optimizer)
        # a fresh Adam counts its first step in float32, where 1 − β₂ has five digits
        assert result.gradients[0].item() == pytest.approx(wanted, rel=2e-5, abs=1e-9)


def test_a_step_that_leaves_out_a_part_of_its_derivative_is_refused():
    class Detached(torch.optim.SGD):
        """Keeps an average of gradients, and detaches it as some published code does."""

        def __init__(self, params, lr=0.1, *, differentiable=False):
            super().__init__(params, lr=lr, differentiable=differentiable)

        def step(self, closure=None):
            for group in self.param_groups:
                for weight in group["params"]:
                    average = self.state[weight].get("average", torch.zeros_like(weight))
                    self.state[weight]["average"] = (0.9 * average + weight.grad).detach()
                    weight.sub_(group["lr"] * self.state[weight]["average"])

    w, h = torch.ones(2, **FLOAT64, requires_grad=True), torch.tensor(0.5, **FLOAT64)
    with pytest.raises(ValueError, match="the step of Detached leaves out a part of its derivative"):
        unrolled_hypergradient(lambda: (h * w**2).sum(), lambda: w.sum(), [w], [h], steps=2, optimizer=Detached([w]))

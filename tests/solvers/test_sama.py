"""The first-order hyper step against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import IFTHypergradient, Loss, implicit_hypergradient
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.optimizers import UpdateRule
from lightning_ifthpo.solvers import SAMA
from tests.helpers.device import FLOAT64, randn
from tests.helpers.problems import relative_error
from tests.helpers.trainers import Classifier, trained


def problem(*, steps=5):
    """A network after some steps of Adam, with weights of its examples as hyperparameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(**FLOAT64)
    x, xv = randn(2, 12, 4, seed=1, dtype=torch.float64)
    y, factors = torch.arange(12, device=x.device) % 3, torch.linspace(0.5, 1.5, 12, **FLOAT64)
    parameters, evaluations = list(net.parameters()), []

    def inner():
        evaluations.append(1)
        return (factors * F.cross_entropy(net(x), y, reduction="none")).mean()

    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        inner().backward()
        optimizer.step()
    optimizer.zero_grad()
    evaluations.clear()
    return inner, lambda: F.cross_entropy(net(xv), y), parameters, factors, optimizer, evaluations


def test_it_is_the_difference_of_gradients_along_the_step_of_the_optimizer():
    """−[∇_λ L(w + εSv) − ∇_λ L(w − εSv)] / 2ε (Choe et al. 2023), with S of Adam read from its state."""
    inner, outer, parameters, factors, optimizer, _ = problem()
    outer_gradient = torch.autograd.grad(outer(), parameters)
    # Adam's average of gradients has a gain of one in the long run
    state = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**5) for p in parameters]
    moves = [0.01 * v / (second.sqrt() + 1e-8) for v, second in zip(outer_gradient, state, strict=True)]
    epsilon, ends = 1e-4, []
    factors.requires_grad_()
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.add_(move, alpha=sign * epsilon)
        ends.append(torch.autograd.grad(inner(), factors)[0])
        with torch.no_grad():
            for parameter, move in zip(parameters, moves, strict=True):
                parameter.sub_(move, alpha=sign * epsilon)
    wanted = -(ends[0] - ends[1]) / (2 * epsilon)
    solver = SAMA().with_optimizer(UpdateRule.of([optimizer], parameters))
    for verified in (False, True):
        loss = Loss(inner, parameters, is_verified=verified)
        result = implicit_hypergradient(
            loss, outer, parameters, [factors], solver=solver, curvature="finite_difference"
        )
        assert relative_error(result.gradients[0], wanted) < 1e-5
        assert result.relative_residual is None


def test_a_hyper_step_takes_two_gradients_of_the_inner_loss():
    inner, outer, parameters, factors, optimizer, evaluations = problem()
    solver = SAMA().with_optimizer(UpdateRule.of([optimizer], parameters))
    loss = Loss(inner, parameters, is_verified=True)
    implicit_hypergradient(
        loss, outer, parameters, [factors], solver=solver, curvature="finite_difference", diagnosed=False
    )
    assert len(evaluations) == 2


def test_it_needs_an_optimizer():
    with pytest.raises(ValueError, match=r"SAMA\(\) needs the inner optimizer: use it inside IFTHypergradient"):
        SAMA().solve(MatrixOperator(torch.eye(2)), torch.ones(2))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_the_callback_takes_no_second_derivative_for_it(optimizer):
    _, trainer, _ = trained([IFTHypergradient(2, solver=SAMA())], lambda: Classifier(optimizer=optimizer))
    metrics = trainer.callback_metrics
    assert float(metrics["hypergrad/products"]) == 0.0
    assert float(metrics["hypergrad/skipped"]) == 0.0
    assert float(metrics["hypergrad/indirect_norm"]) > 0.0
    assert "hypergrad/residual" not in metrics
    assert trainer.callbacks[0].state_dict()["stepper"]["curvature"] == "finite_difference"

"""The rule read from an optimizer, against what the optimizer really does."""

import pytest
import torch

from lightning_ifthpo.update_rule import UpdateRule
from tests.problems import relative_error


def trained(optimizer_type, steps=30, **options):
    weights = [torch.randn(3, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    weights = [w.requires_grad_() for w in weights]
    optimizer = optimizer_type(
        [{"params": weights[:1], "lr": 0.02}, {"params": weights[1:], "lr": 0.005}], lr=0.01, **options
    )
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, dtype=weight.dtype) + 1.0
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize(
    ("optimizer_type", "options", "momentum"),
    [
        (torch.optim.SGD, {}, 0.0),
        (torch.optim.SGD, {"momentum": 0.9}, 0.9),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}, 0.9),
        (torch.optim.SGD, {"dampening": 0.5}, 0.0),
        (torch.optim.Adam, {}, 0.9),
        (torch.optim.Adam, {"amsgrad": True}, 0.9),
        (torch.optim.AdamW, {"betas": (0.5, 0.99), "weight_decay": 0.0}, 0.5),
        (torch.optim.RMSprop, {}, 0.0),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.3}, 0.3),
        (torch.optim.Adagrad, {}, 0.0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_small_change_of_the_gradient_moves_the_weights_by_the_step(optimizer_type, options, momentum):
    """s is the derivative of the update with respect to the gradient, at a preconditioner that is held fixed."""
    weights, optimizer = trained(optimizer_type, **options)
    rule = UpdateRule.of([optimizer], weights)
    assert rule.momentum == momentum
    before = torch.cat([w.detach().reshape(-1) for w in weights])
    for weight in weights:
        for name in ("exp_avg", "momentum_buffer"):
            buffer = optimizer.state[weight].get(name)
            if buffer is not None:
                buffer.zero_()  # so that the update is that of the new gradient alone
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    moved = before - torch.cat([w.detach().reshape(-1) for w in weights])
    # SGD: the difference of two weights of size one. Others: a step decays their second moments by β₂ (0.99 or 0.999),
    # or the mean that centers them, and corrects the bias anew
    assert relative_error(moved, rule.step * 1e-3) < (1e-9 if optimizer_type is torch.optim.SGD else 0.12)


def test_weights_without_an_optimizer_do_not_move():
    held, free = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    rule = UpdateRule.of([torch.optim.SGD([held], lr=0.5)], [held, free])
    assert rule.step.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert bool(torch.isfinite(rule.damping(10)).all())


def test_an_unknown_optimizer_counts_as_gradient_descent():
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Rprop([weight], lr=0.25)
    assert UpdateRule.of([optimizer], [weight]).step.tolist() == [0.25, 0.25]


def test_damping_by_horizon():
    rule = UpdateRule(step=0.1, momentum=0.9)
    assert rule.lasting_step == pytest.approx(1.0)
    assert rule.damping(100) == pytest.approx(0.01)

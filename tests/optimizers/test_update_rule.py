"""The rule read from an optimizer, against what the optimizer really does."""

import pytest
import torch

from lightning_ifthpo.optimizers import UpdateRule, is_known
from tests.helpers.device import DEVICE, FLOAT64
from tests.helpers.problems import relative_error


def trained(optimizer_type, steps=30, **options):
    weights = [torch.randn(3, 2, **FLOAT64), torch.randn(4, **FLOAT64)]
    weights = [w.requires_grad_() for w in weights]
    optimizer = optimizer_type(
        [{"params": weights[:1], "lr": 0.02}, {"params": weights[1:], "lr": 0.005}], lr=0.01, **options
    )
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, dtype=weight.dtype, device=DEVICE) + 1.0
        optimizer.step()
    return weights, optimizer


def flat(weights):
    return torch.cat([weight.detach().reshape(-1) for weight in weights])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.5},
        {"dampening": 0.5},
    ],
    ids=str,
)
def test_one_push_of_gradient_descent_moves_the_weights_by_the_step_in_the_long_run(options):
    """Two copies of a run, one of which feels a little more gradient once; then both go on alike."""
    ends = []
    for push in (0.0, 1e-3):
        torch.manual_seed(0)
        weights, optimizer = trained(torch.optim.SGD, **options)
        for step in range(200):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, dtype=weight.dtype, device=DEVICE) + (
                    push if step == 0 else 0.0
                )
            optimizer.step()
        ends.append(flat(weights))
    step = UpdateRule.of([optimizer], weights).step_size
    # what momentum keeps after 200 steps: 0.9^200 = 7e-10; and the rounding of weights of size one against 1e-5
    assert relative_error(ends[0] - ends[1], step * 1e-3) < 1e-8


@pytest.mark.parametrize(
    ("optimizer_type", "options", "momentum"),
    [
        (torch.optim.Adam, {}, 0.9),
        (torch.optim.Adam, {"amsgrad": True}, 0.9),
        (torch.optim.AdamW, {"betas": (0.5, 0.99), "weight_decay": 0.0}, 0.5),
        (torch.optim.RMSprop, {}, 0.0),
        (torch.optim.RMSprop, {"centered": True}, 0.0),
        (torch.optim.Adagrad, {}, 0.0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_adaptive_steps_are_those_at_the_present_preconditioner(optimizer_type, options, momentum):
    weights, optimizer = trained(optimizer_type, **options)
    rule, before = UpdateRule.of([optimizer], weights), flat(weights)
    for weight in weights:
        if "exp_avg" in optimizer.state[weight]:
            optimizer.state[weight]["exp_avg"].zero_()  # so that the update is that of the new gradient alone
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer.step()
    # Adam's first use of a gradient is 1 − β₁ of it; one more step changes second moments by β₂ (0.99–0.999), the mean
    # that centers them, and the bias correction
    assert relative_error(before - flat(weights), (1 - momentum) * rule.step_size * 1e-3) < 0.12


@pytest.mark.parametrize(
    ("optimizer_type", "wanted"),
    [
        (torch.optim.SGD, lambda lr, step: torch.tensor(0.3, **FLOAT64)),
        (torch.optim.Adam, lambda lr, step: torch.tensor(0.3, **FLOAT64)),
        (torch.optim.AdamW, lambda lr, step: lr * 0.3 / step),
    ],
    ids=["coupled", "coupled and preconditioned", "decoupled"],
)
def test_weight_decay_of_the_optimizer_is_curvature(optimizer_type, wanted):
    weights, optimizer = trained(optimizer_type, weight_decay=0.3)
    rule = UpdateRule.of([optimizer], weights)
    lr = torch.tensor([0.02] * 6 + [0.005] * 4, **FLOAT64)
    assert relative_error(torch.as_tensor(rule.damping(), **FLOAT64), wanted(lr, rule.step_size)) < 1e-12


def test_each_group_has_its_own_momentum():
    first, second = torch.ones(2, requires_grad=True, device=DEVICE), torch.ones(1, requires_grad=True, device=DEVICE)
    optimizers = [torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.SGD([second], lr=0.1)]
    assert UpdateRule.of(optimizers, [first, second]).step_size.tolist() == pytest.approx([1.0, 1.0, 0.1])


def test_what_is_the_same_for_all_weights_is_a_number():
    """So that nothing of the size of the model is stored or multiplied for it."""
    first, second = torch.ones(2, requires_grad=True, device=DEVICE), torch.ones(1, requires_grad=True, device=DEVICE)
    rule = UpdateRule.of([torch.optim.SGD([first, second], lr=0.5, weight_decay=0.1)], [first, second])
    assert (rule.step_size, rule.decay) == (0.5, 0.1)
    assert rule.damping(10) == pytest.approx(0.3)


def test_weights_without_an_optimizer_do_not_move():
    held, free = torch.ones(2, requires_grad=True, device=DEVICE), torch.ones(3, requires_grad=True, device=DEVICE)
    rule = UpdateRule.of([torch.optim.SGD([held], lr=0.5)], [held, free])
    assert rule.step_size.tolist() == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert torch.equal(rule.damping(10), torch.full((5,), 0.2, device=DEVICE))


@pytest.mark.parametrize("step", [0.0, torch.zeros(2, device=DEVICE)], ids=["number", "vector"])
def test_a_damping_exists_where_nothing_moves(step):
    assert torch.equal(torch.as_tensor(UpdateRule(step).damping(10)).expand(2).cpu(), torch.full((2,), 0.1))


def test_an_unknown_optimizer_counts_as_gradient_descent():
    weight = torch.ones(2, requires_grad=True, device=DEVICE)
    optimizer = torch.optim.Rprop([weight], lr=0.25)
    assert UpdateRule.of([optimizer], [weight]).step_size == 0.25


def test_damping_by_horizon():
    assert UpdateRule(step_size=1.0).damping(100) == pytest.approx(0.01)


@pytest.mark.parametrize(
    "optimizer_type", [torch.optim.Adadelta, torch.optim.Adamax, torch.optim.RAdam, torch.optim.Adafactor]
)
def test_what_is_not_known_is_not_guessed(optimizer_type):
    weight = torch.ones(2, 2, requires_grad=True, device=DEVICE)
    optimizer = optimizer_type([weight], lr=0.25)
    weight.grad = torch.ones(2, 2, device=DEVICE)
    optimizer.step()
    assert not is_known(optimizer)
    assert UpdateRule.of([optimizer], [weight]).step_size == 0.25


def test_weights_at_rest_have_no_decoupled_decay():
    moving, resting = (torch.ones(2, **FLOAT64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [moving]}, {"params": [resting], "lr": 0.0}], lr=0.1, weight_decay=0.2)
    rule = UpdateRule.of([optimizer], [moving, resting])
    assert rule.damping().tolist() == pytest.approx([0.2, 0.2, 0.0, 0.0])
    for weight in (moving, resting):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    rule = UpdateRule.of([optimizer], [moving, resting])
    assert rule.damping().tolist() == pytest.approx([0.2, 0.2, 0.0, 0.0])

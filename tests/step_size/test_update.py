"""Reading the update off an optimizer step, and applying it."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo.step_size import ExactGeNLR
from lightning_ifthpo.step_size.update import Update
from tests.helpers.device import DEVICE
from tests.helpers.problems import quadratic, relative_error

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Adadelta": (torch.optim.Adadelta, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_that_the_optimizer_makes_at_the_same_rates(name):
    """The rates that the scheduler chose, replayed in a plain loop: the optimizer's state advances once a step."""
    optimizer_type, options = OPTIMIZERS[name]
    weight, loss = quadratic()
    optimizer = optimizer_type([weight], lr=1.0, **options)
    scheduler = ExactGeNLR(optimizer, total_steps=60)
    rates, ends = [], []
    for _ in range(60):
        before = scheduler.shortened
        scheduler.probe(loss)
        if scheduler.shortened > before:
            rates[-1], ends[-1] = scheduler.applied[0], weight.detach().clone()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
        ends.append(weight.detach().clone())
    assert len(set(rates)) > 20

    weight, loss = quadratic()
    optimizer = optimizer_type([weight], lr=1.0, **options)
    for rate, end in zip(rates, ends, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        # an update at rate one is rounded at the size of the update: eps times its length over the rate's
        assert relative_error(weight, end) < 1e-9


def test_a_step_that_failed_leaves_nothing_behind():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = ExactGeNLR(optimizer, every_n_steps=4)
    scheduler.rules[0].lr, scheduler.rules[0].settled = 0.1, True
    scheduler.probe(loss)

    def fails():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    scheduler.step()
    loss().backward()
    before, gradient = weight.detach().clone(), weight.grad.clone()
    optimizer.step()
    assert torch.allclose(weight.detach(), before - 0.1 * gradient)


def test_an_update_is_loaded_to_where_its_weights_are():
    scheduler, twin = (
        ExactGeNLR(torch.optim.SGD([nn.Parameter(torch.ones(2, device=device))], lr=1.0)) for device in ("cpu", "meta")
    )
    twin.load_state_dict(scheduler.state_dict() | {"update": [torch.ones(2, device=DEVICE)]})
    assert twin.is_pending
    assert twin.state_dict()["update"][0].device.type == "meta"


def test_the_optimizer_is_left_alone_after_detaching():
    weight, loss = quadratic()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = ExactGeNLR(optimizer)
    scheduler.detach()
    optimizer.param_groups[0]["lr"] = 0.5
    loss().backward()
    gradient, before = weight.grad.clone(), weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight.detach(), before - 0.5 * gradient)


def test_a_step_at_rate_one_is_read_off_and_undo_step_bit_for_bit():
    weights = [torch.randn(3, device=DEVICE), torch.randn(2, 2, device=DEVICE)]
    before = [weight.clone() for weight in weights]
    steps = [torch.randn_like(weight) for weight in weights]
    for weight, step in zip(weights, steps, strict=True):
        weight.sub_(step)
    after = [weight.clone() for weight in weights]
    update = Update.undo_step(weights, [weight.clone() for weight in before])
    assert all(torch.equal(weight, value) for weight, value in zip(weights, before, strict=True))
    assert all(torch.equal(o, b - a) for o, b, a in zip(update.omega, before, after, strict=True))
    update.apply(0.25)
    assert all(torch.equal(w, b - 0.25 * o) for w, b, o in zip(weights, before, update.omega, strict=True))


def test_an_update_restricted_to_some_weights_moves_only_those():
    first, second = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    update = Update([first, second], [torch.ones_like(first), torch.ones_like(second)])
    update.restricted_to([second]).apply(0.5)
    assert (first.tolist(), second.tolist()) == ([0.0, 0.0], [-0.5, -0.5])
    assert update.restricted_to([]).parameters == []


def test_the_rate_of_a_move_is_in_units_of_the_weights_that_move():
    weights = [torch.tensor([3.0, 100.0], device=DEVICE), torch.tensor([4.0], device=DEVICE)]
    update = Update(weights, [torch.tensor([3.0, 0.0], device=DEVICE), torch.tensor([4.0], device=DEVICE)])
    assert update.rate_of_move(0.1) == pytest.approx(0.1)  # ω is as long as the weights that it moves
    faster = Update(weights, [10 * omega for omega in update.omega])
    assert faster.rate_of_move(0.1) == pytest.approx(0.01)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_an_update_without_a_length_moves_nothing_at_any_rate(value):
    update = Update([torch.ones(2, device=DEVICE)], [torch.full((2,), value, device=DEVICE)])
    assert update.rate_of_move(0.1) == math.inf

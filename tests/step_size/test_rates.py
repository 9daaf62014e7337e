"""Rates of parameter groups, with a rule that does what the test says."""

import pytest
import torch
from torch import nn

from lightning_ifthpo.step_size.rates import GroupRates
from lightning_ifthpo.step_size.update import Update


class Fixed:
    """A rule that has one rate."""

    settled = True
    refused = 0

    def __init__(self, lr=None):
        self.lr = lr

    def observe(self, parabola):
        return True

    def state_dict(self):
        return {"lr": self.lr}

    def load_state_dict(self, state):
        self.lr = state["lr"]


def optimizer(*rates):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], lr=1.0)


def test_one_rule_keeps_the_ratios_of_the_groups():
    rates = GroupRates(optimizer(0.1, 0.4), lambda: Fixed(2.0), per_group=False)
    assert rates.multipliers == [0.25, 1.0]
    assert rates.of_rules(1.0) == [2.0]
    assert rates.of_groups(0.5) == [0.25, 1.0]


def test_with_a_rule_for_each_group_the_initial_rates_do_not_count():
    rules = iter([Fixed(2.0), Fixed(3.0)])
    rates = GroupRates(optimizer(0.1, 0.4), lambda: next(rules), per_group=True)
    assert rates.multipliers == [1.0, 1.0]
    assert rates.of_groups(1.0) == [2.0, 3.0]


def test_rates_of_zero_have_ratios_of_one_and_a_warm_up_counts_by_its_initial_rates():
    assert GroupRates(optimizer(0.0, 0.0), Fixed, per_group=False).multipliers == [1.0, 1.0]
    warming = optimizer(0.0, 0.0)
    for group, rate in zip(warming.param_groups, (0.2, 0.1), strict=True):
        group["initial_lr"] = rate
    assert GroupRates(warming, Fixed, per_group=False).multipliers == [1.0, 0.5]


def test_before_a_rule_has_a_rate_nothing_moves():
    rates = GroupRates(optimizer(0.1), Fixed, per_group=False)
    assert not rates.started
    assert rates.of_groups(1.0) == [0.0]


@pytest.mark.parametrize("per_group", [False, True])
def test_parameters_belong_to_the_rule_of_their_group(per_group):
    sgd = optimizer(0.1, 0.4)
    first, second = (group["params"][0] for group in sgd.param_groups)
    parts = GroupRates(sgd, Fixed, per_group).parts(Update([first, second], [torch.ones(1), torch.zeros(1)]))
    assert [[id(p) for p in part.parameters] for part in parts] == (
        [[id(first)], [id(second)]] if per_group else [[id(first), id(second)]]
    )
    assert [part.omega for part in parts] == ([[1.0], [0.0]] if per_group else [[1.0, 0.0]])


def test_each_part_of_an_update_is_applied_at_the_rate_of_its_rule():
    sgd, rules = optimizer(0.1, 0.4), iter([Fixed(2.0), Fixed(3.0)])
    weights = [group["params"][0] for group in sgd.param_groups]
    rates = GroupRates(sgd, lambda: next(rules), per_group=True)
    rates.apply(Update(weights, [torch.ones(1), torch.ones(1)]), 0.5)
    assert [weight.item() for weight in weights] == [-1.0, -1.5]
    assert rates.applied == [1.0, 1.5]


def test_rates_are_written_into_numbers_and_tensors():
    sgd = optimizer(0.1, torch.tensor(0.4))
    tensor = sgd.param_groups[1]["lr"]
    GroupRates(sgd, Fixed, per_group=False).write([1.5, 2.5])
    assert sgd.param_groups[0]["lr"] == 1.5
    assert sgd.param_groups[1]["lr"] is tensor
    assert tensor.item() == 2.5


@pytest.mark.parametrize(("per_group", "rules"), [(False, 1), (True, 2)])
def test_new_groups_are_included_by_their_ratio_to_the_highest_rate(per_group, rules):
    sgd = optimizer(0.1)
    rates = GroupRates(sgd, lambda: Fixed(0.5), per_group)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.25})
    rates.include_new_groups(1.0)
    assert rates.multipliers == [1.0, 1.0 if per_group else 0.5]
    assert len(rates.rules) == rules


def test_a_state_is_restored_and_that_of_other_rules_is_refused():
    rates, twin = (GroupRates(optimizer(0.1, 0.4), lambda lr=lr: Fixed(lr), per_group=False) for lr in (2.0, None))
    twin.load_state_dict(rates.state_dict())
    assert twin.of_groups(1.0) == rates.of_groups(1.0)
    with pytest.raises(ValueError, match="the checkpoint holds the state of another scheduler"):
        twin.load_state_dict({})


def test_a_new_group_is_compared_with_the_highest_of_several_rates():
    sgd = optimizer(0.1, 0.4)
    rates = GroupRates(sgd, lambda: Fixed(2.0), per_group=False)
    sgd.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.25})
    rates.include_new_groups(0.5)
    assert rates.multipliers == [0.25, 1.0, 0.25]

"""What WeightDecay itself checks before training starts."""

import pytest
import torch
from torch import nn

from lightning_ifthpo.hyperparameters import WeightDecay


def test_training_is_accepted_up_to_the_stability_limit():
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, initial=0.1, maximum=4.0)
    decay.check_training(net.parameters(), 0.499)
    decay.check_training(net.parameters(), torch.tensor(0.0))


@pytest.mark.parametrize("lr", [0.5, 1.0, torch.tensor(0.5)], ids=str)
def test_a_learning_rate_at_which_the_largest_decay_diverges_is_refused(lr):
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, initial=0.1, maximum=4.0)
    limit, largest = 2 / float(lr), 1 / float(lr)
    message = f"may reach 4, .* learning rate {float(lr):g} .* 2/lr = {limit:g} .*; pass maximum={largest:g}$"
    with pytest.raises(ValueError, match=message):
        decay.check_training(net.parameters(), lr)


def test_the_suggested_maximum_is_accepted():
    net = nn.Linear(3, 2)
    WeightDecay(net, initial=0.1, maximum=1 / 0.5).check_training(net.parameters(), 0.5)


@pytest.mark.parametrize("granularity", ["global", "tensor", "weight"])
def test_weights_that_were_replaced_are_refused(granularity):
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, granularity)
    net.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="decays tensors that are no parameters of the module any more; create it"):
        decay.check_training(net.parameters(), 0.1)


def test_weights_of_a_part_of_the_module_are_enough():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    WeightDecay(net[1]).check_training(net.parameters(), 0.1)

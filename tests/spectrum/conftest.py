"""Networks whose spectrum is known."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo.curvature import HessianOperator
from tests.helpers.problems import digits_data


@pytest.fixture(scope="module")
def perceptrons():
    """A perceptron with 2,410 weights on digits, at its start and after training: (operator, dense eigenvalues)."""
    images, labels = digits_data()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    found = []
    for steps in (0, 1000):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        # of a copy, because the operator keeps the graph of these very weights
        copied = copy.deepcopy(net)
        operator = HessianOperator(partial(loss_on, copied, images, labels), list(copied.parameters()))
        assert operator.size == 2410
        dense = operator.to_dense()
        found.append((operator, torch.linalg.eigvalsh((dense + dense.T) / 2)))
    return found


def loss_on(net, images, labels):
    return F.cross_entropy(net(images), labels)

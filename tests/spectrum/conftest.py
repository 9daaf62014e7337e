"""Networks whose spectrum is known."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_ifthpo.curvature import HessianOperator
from tests.helpers.device import FLOAT64
from tests.helpers.problems import digits_data


class Perceptron(NamedTuple):
    """The Hessian of a network's loss.

    Attributes:
        operator: Its products.
        matrix: [n, n], dense.
        eigenvalues: [n], ascending.
    """

    operator: HessianOperator
    matrix: Tensor
    eigenvalues: Tensor


@pytest.fixture(scope="session")
def perceptrons() -> list[Perceptron]:
    """A perceptron with 2,410 weights on digits, at its start and after training."""
    images, labels = digits_data()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(**FLOAT64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    found = []
    for steps in (0, 1000):
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        found.append(measured(copy.deepcopy(net), images, labels))  # a copy, whose weights training leaves alone
    return found


def measured(net: nn.Module, images: Tensor, labels: Tensor) -> Perceptron:
    operator = HessianOperator(lambda: F.cross_entropy(net(images), labels), list(net.parameters()))
    assert operator.size == 2410
    dense = operator.to_dense()
    matrix = (dense + dense.T) / 2
    return Perceptron(operator, matrix, torch.linalg.eigvalsh(matrix))

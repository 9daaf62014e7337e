"""The curvature of a mean over several batches."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_ifthpo.curvature import (
    AverageOperator,
    HessianOperator,
    MatrixOperator,
)
from tests.helpers.device import DEVICE, WHERE, randn, within
from tests.helpers.problems import spd_matrix


def test_average_is_weighted_and_makes_operators_anew():
    matrices = [spd_matrix(6, 10.0) * scale for scale in (1.0, 3.0)]
    made = []

    def make(index):
        made.append(index)
        return MatrixOperator(matrices[index])

    average = AverageOperator([partial(make, 0), partial(make, 1)], weights=[30, 10])
    assert torch.allclose(average.to_dense(), 0.75 * matrices[0] + 0.25 * matrices[1])
    assert made.count(1) == 6
    made.clear()
    alone = AverageOperator([partial(make, 1)], weights=[7])
    assert torch.allclose(alone.to_dense(), matrices[1])
    assert made == [1]  # the graph of a single batch is kept


def test_average_draws_the_same_dropout_masks_at_each_product():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1)).to(**WHERE)
    x = randn(5, 4, seed=1)
    make = partial(HessianOperator, lambda: net(x).square().mean(), list(net.parameters()))
    average = AverageOperator([make, make], weights=[1, 2])
    before = torch.get_rng_state()
    dense = average.to_dense()
    assert torch.allclose(dense, dense.T, atol=within(1e-14))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0]], ids=str)
def test_average_refuses_weights_that_are_none(weights):
    make = partial(MatrixOperator, torch.eye(2, device=DEVICE))
    with pytest.raises(ValueError, match="expected a positive weight for each of 2 operators"):
        AverageOperator([make, make], weights)

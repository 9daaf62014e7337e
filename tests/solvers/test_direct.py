"""The dense solution."""

import pytest
import torch

from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.curvature.base import InvertibleOperator
from lightning_ifthpo.solvers import (
    Direct,
    Status,
)
from tests.helpers.device import DEVICE, WHERE, within
from tests.helpers.problems import relative_error, spd_matrix
from tests.helpers.systems import Counted, right_hand_side


def test_direct_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="use ConjugateGradient"):
        Direct(max_size=3).solve(MatrixOperator(torch.eye(4, device=DEVICE)), torch.ones(4, device=DEVICE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Direct(max_size=0), "max_size"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [3, 7])
def test_the_dense_matrix_takes_as_many_products_as_there_are_weights(size):
    operator, b = Counted(spd_matrix(size, 10.0, signs=True)), right_hand_side(size)
    result = Direct(max_size=size).solve(operator, b)
    assert relative_error(result.x, torch.linalg.solve(operator.matrix, b)) < within(1e-13)
    assert (result.products, result.extra_products, operator.count) == (size, 0, size)


class Closed(MatrixOperator, InvertibleOperator):
    """Twice the identity, with its inverse in closed form."""

    def __init__(self):
        super().__init__(2.0 * torch.eye(3, **WHERE))
        self.loss = torch.zeros((), device=DEVICE)

    @property
    def gradient(self):
        return torch.zeros(3, **WHERE)

    def solve(self, b, delta):
        return b / (2.0 + delta)

    def mixed_product(self, v, hyperparameters):
        return [None for _ in hyperparameters]


def test_a_closed_form_is_used_whatever_the_size():
    b = right_hand_side(3)
    result = Direct(max_size=1, damping=0.5).solve(Closed(), b)
    assert torch.allclose(result.x, b / 2.5)
    assert (result.products, result.extra_products, result.status) == (0, 1, Status.CONVERGED)

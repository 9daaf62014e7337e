"""Lengths of vectors against their definitions."""

import math

import pytest
import torch

from lightning_ifthpo.core.vectors import inverse_weighted_square, largest, length, weighted_square
from tests.helpers.device import WHERE, randn, within

SCALES = {torch.float32: [1e-30, 1e-20, 1.0, 1e20, 1e30], torch.float64: [1e-300, 1e-160, 1.0, 1e160, 1e300]}


@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype in SCALES for scale in SCALES[dtype]])
def test_a_length_is_right_beyond_the_range_of_squares(dtype, scale):
    vector = randn(1000, seed=0, dtype=torch.float64) * scale
    rounded = vector.to(dtype)
    wanted = float((rounded.double() / scale).norm()) * scale
    assert length(rounded) == pytest.approx(wanted, rel=100 * torch.finfo(dtype).eps)
    assert largest(rounded) == float(rounded.abs().max())


@pytest.mark.parametrize("function", [length, largest])
def test_what_is_not_finite_shows(function):
    assert math.isnan(function(torch.tensor([1.0, math.nan, 2.0], **WHERE)))
    assert function(torch.tensor([1.0, -math.inf], **WHERE)) == math.inf
    assert function(torch.zeros(3, **WHERE)) == 0.0
    assert function(torch.empty(0, **WHERE)) == 0.0


@pytest.mark.parametrize("size", [1, 1000, 2**18 + 3])
def test_weighted_squares_are_those_of_a_diagonal_matrix(size):
    x, weight = randn(size, seed=0), randn(size, seed=1).abs()
    weight[0] = 0.0
    used = weight > 0.0
    assert float(weighted_square(x, weight)) == pytest.approx(float((weight * x * x).sum()), rel=within(1e-12))
    wanted = float((x[used].square() / weight[used]).sum())
    assert float(inverse_weighted_square(x, weight)) == pytest.approx(wanted, rel=within(1e-12))


def test_a_number_is_a_weight_of_all_entries():
    x = torch.tensor([3.0, 4.0], **WHERE)
    assert float(weighted_square(x, torch.tensor(2.0, **WHERE))) == 50.0
    assert float(inverse_weighted_square(x, torch.tensor(2.0, **WHERE))) == 12.5
    assert float(inverse_weighted_square(x, torch.tensor(0.0, **WHERE))) == 0.0

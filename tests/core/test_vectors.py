"""Lengths of vectors against their definitions."""

import math
from contextlib import nullcontext

import pytest
import torch

from lightning_ifthpo.core.vectors import divided, inverse_weighted_square, largest, length, weighted_square
from tests.helpers.device import WHERE, ByReciprocals, randn, within

# the first scale of each makes denormal numbers, whose reciprocals overflow
SCALES = {
    torch.float32: [1e-40, 1e-30, 1e-20, 1.0, 1e20, 1e30],
    torch.float64: [1e-310, 1e-300, 1e-160, 1.0, 1e160, 1e300],
}
DIVISIONS = pytest.mark.parametrize("division", [nullcontext, ByReciprocals], ids=["plain", "as on CUDA"])
LEAST = math.ulp(0.0)  # lengths near it are rounded to multiples of it


@DIVISIONS
@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype in SCALES for scale in SCALES[dtype]])
def test_a_length_is_right_beyond_the_range_of_squares(dtype, scale, division):
    vector = randn(1000, seed=0, dtype=torch.float64) * scale
    rounded = vector.to(dtype)
    wanted = float((rounded.cpu().double() / scale).norm()) * scale  # CUDA would multiply by the reciprocal
    with division():
        assert length(rounded) == pytest.approx(wanted, rel=100 * torch.finfo(dtype).eps, abs=LEAST)
    assert largest(rounded) == float(rounded.abs().max())


@DIVISIONS
@pytest.mark.parametrize(
    ("dtype", "number"),
    [(dtype, scale) for dtype in SCALES for scale in SCALES[dtype]]
    + [(torch.float16, 1e-7), (torch.float16, 1e3), (torch.bfloat16, 1e-40), (torch.bfloat16, 1e30)],
)
def test_a_vector_over_a_number_is_right_for_all_numbers(dtype, number, division):
    vector = (randn(100, seed=0, dtype=torch.float64) * number).to(dtype)
    with division():
        got = divided(vector, number)
    assert got.dtype is dtype
    # a product with a rounded reciprocal is off by one unit in the last place
    assert torch.allclose(got.cpu().double(), vector.cpu().double() / number, rtol=2 * torch.finfo(dtype).eps, atol=0.0)


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

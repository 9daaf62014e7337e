"""Step lengths of difference quotients, in the unit of the weights."""

import pytest
import torch

from lightning_ifthpo.core.step_length import natural_step, relative_step, step_along
from tests.helpers.device import DEVICE, WHERE, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_relative_step_makes_truncation_and_rounding_equal(dtype):
    eps = torch.finfo(dtype).eps
    assert relative_step(dtype) ** 2 == pytest.approx(eps / relative_step(dtype))
    assert relative_step(dtype, second=True) ** 2 == pytest.approx(eps / relative_step(dtype, second=True) ** 2)


def test_a_natural_step_is_as_long_as_the_used_weights():
    w = torch.tensor([3.0, 4.0, 1e6], **WHERE)
    gradient = torch.tensor([1.0, 1.0, 0.0], **WHERE)
    v = torch.tensor([0.6, 0.8, 5.0], **WHERE)
    assert natural_step(v, w, gradient, 1.0) == pytest.approx(5.0)
    assert natural_step(10 * v, w, gradient, 1.0) == pytest.approx(0.5)
    # outside of the used weights all weights count
    outside = torch.tensor([0.0, 0.0, 1.0], **WHERE)
    assert natural_step(outside, w, gradient, 1.0) == pytest.approx(1e6)
    # and they count where they are shorter per length of v
    assert natural_step(v, torch.tensor([3.0, 4.0, 0.0], **WHERE), gradient, 1.0) == pytest.approx(5 / float(v.norm()))


def test_a_natural_step_from_zero_comes_from_loss_and_slope():
    zero, gradient, v = torch.zeros(2, **WHERE), torch.tensor([3.0, 4.0], **WHERE), torch.tensor([0.0, 2.0], **WHERE)
    assert natural_step(v, zero, gradient, 10.0) == pytest.approx(10.0 / 5.0 / 2.0)
    assert natural_step(v, zero, gradient, 0.0) == pytest.approx(0.5)
    assert natural_step(v, zero, torch.zeros(2, **WHERE), 10.0) == pytest.approx(0.5)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lengths_neither_overflow_nor_vanish_in_float32(size):
    w = torch.full((4,), size, device=DEVICE)
    # weights whose squares are zero have no length; the loss gives one
    expected = 1.0 if size > 1.0 else 2.0 / (2.0 * size) ** 2
    assert natural_step(w, w, w, 2.0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_step_along_a_direction_is_in_the_unit_of_the_weights_that_it_moves(unit):
    direction, weights = [randn(5, seed=0), None, randn(3, seed=1)], [randn(n, seed=n) for n in (5, 7, 3)]
    one = step_along(direction, weights)
    other = step_along([v if v is None else v / unit for v in direction], [w / unit for w in weights])
    assert other == pytest.approx(one, rel=1e-5)
    padded = step_along([*direction, torch.zeros(1000, **WHERE)], [*weights, torch.full((1000,), 1e6, **WHERE)])
    assert padded == pytest.approx(one)
    assert step_along(weights[:1], weights[:1]) == pytest.approx(1.0)
    assert step_along([torch.full((4,), 3.0, **WHERE)], [torch.zeros(4, **WHERE)]) == pytest.approx(1 / 6)

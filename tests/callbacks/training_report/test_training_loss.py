"""The training loss of all batches."""

import math
import random

import pytest
import torch

from lightning_ifthpo.callbacks.training_report.training_loss import (
    TrainingLoss,
    correlation,
    detrended,
    noise,
    rises,
    smoothness,
)
from tests.checks import check_state_is_plain
from tests.helpers.trainers import same


def collected(values, epoch=None):
    loss = TrainingLoss()
    for batch, value in enumerate(values, start=1):
        loss.add(batch, torch.tensor(value))
        if epoch and batch % epoch == 0:
            loss.end_epoch()
    loss.flush()
    return loss


def test_losses_are_read_in_their_order_and_times_their_factor():
    loss = TrainingLoss()
    for batch in (1, 2, 5):
        loss.add(batch, torch.tensor([0.5 * batch]), factor=2.0)
    assert loss.curve.count == 0  # nothing was read from the device
    loss.flush()
    loss.flush()
    assert loss.curve.steps == [1, 2, 5]
    assert loss.curve.values == [1.0, 2.0, 5.0]


def test_the_first_loss_that_is_not_finite_is_kept_with_those_before():
    loss = collected([1.0, 2.0, 3.0, 1.0, 0.5, math.nan, 9.0, math.inf])
    assert (loss.first_nonfinite, loss.before_nonfinite) == (6, 3.0)
    assert loss.curve.nonfinite == 2
    assert math.isnan(collected([math.nan]).before_nonfinite)


def gauss(n, seed):
    source = random.Random(seed)
    return [source.gauss(0.0, 1.0) for _ in range(n)]


def test_epochs_in_the_same_order_are_alike_and_shuffled_ones_are_not():
    order = gauss(100, 0)
    same_order = collected([3.0 + value - 0.001 * k for k, value in enumerate(order * 5)], epoch=100)
    assert len(same_order.likeness) == 4
    assert min(same_order.likeness.values) > 0.99
    assert abs(same_order.smoothness.last) < 3.0
    shuffled = collected([3.0 + value for seed in range(5) for value in gauss(100, seed)], epoch=100)
    assert max(map(abs, shuffled.likeness.values)) < 0.5


def test_sorted_classes_make_a_smooth_curve_and_a_falling_loss_has_no_rises():
    waves = collected([2.0 + math.sin(2 * math.pi * k / 100) for k in range(300)], epoch=100)
    assert waves.smoothness.last > 3.0
    assert waves.rises.last == pytest.approx(0.5, abs=0.1)
    assert waves.unevenness.last > 0.1
    falling = collected([math.exp(-k / 50) for k in range(300)], epoch=100)
    assert falling.rises.last == 0.0


def test_short_epochs_have_no_shape():
    assert len(collected([1.0, 2.0] * 20, epoch=8).likeness) == 0


def test_statistics_of_a_curve():
    assert detrended([1.0, 2.0, 3.0]) == pytest.approx([0.0, 0.0, 0.0])
    assert detrended([0.0, 1.0, 0.0]) == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
    assert detrended([1.0, math.nan]) == [0.0, 0.0]
    assert correlation([1.0, -1.0], [2.0, -2.0]) == pytest.approx(1.0)
    assert correlation([0.0], [1.0]) == 0.0
    assert smoothness([0.0] * 4) == 0.0
    assert abs(smoothness(gauss(10_000, 1))) < 3.0
    assert rises([0.0, 2.0, 1.0]) == pytest.approx(2 / 3)
    assert rises([1.0]) == 0.0
    assert noise(gauss(10_000, 2)) == pytest.approx(1.0, rel=0.03)
    assert noise([0.01 * k for k in range(100)]) == pytest.approx(0.01 / math.sqrt(2.0))
    assert noise([1.0]) == 0.0


def test_a_restored_loss_goes_on_as_if_nothing_had_happened():
    values = [1.0 + value**2 for value in gauss(130, 3)]
    first = collected(values[:70], epoch=40)
    check_state_is_plain(first.state_dict())
    second = TrainingLoss()
    second.load_state_dict(first.state_dict())
    for batch, value in enumerate(values[70:], start=71):
        second.add(batch, torch.tensor(value))
        if batch % 40 == 0:
            second.end_epoch()
    second.flush()
    assert same(second.state_dict(), collected(values, epoch=40).state_dict())

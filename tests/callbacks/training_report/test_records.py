"""Curves in bounded memory."""

import math

import pytest

from lightning_ifthpo.callbacks.training_report.records import CAPACITY, Records, Series, mean
from tests.checks import check_state_is_plain
from tests.helpers.trainers import same


def filled(values, capacity=CAPACITY):
    series = Series(capacity)
    for step, value in enumerate(values):
        series.add(step, value)
    return series


@pytest.mark.parametrize("count", [0, 1, 7, 499, 500, 501, 1000, 1001, 12_345])
def test_a_curve_keeps_few_points_whose_mean_is_that_of_all_values(count):
    values = [math.sin(step) for step in range(count)]
    series = filled(values)
    assert len(series) == len(series.steps) <= CAPACITY
    assert series.count == count
    assert series.steps == sorted(set(series.steps))
    if count:
        stride = series.steps[0] + 1
        read = len(series) * stride
        assert mean(series.values) == pytest.approx(mean(values[:read]), abs=1e-9)
        assert count - read < stride
        assert (series.first, series.last) == (values[0], values[-1])
        assert (series.least, series.most) == (min(values), max(values))


def test_short_curves_are_kept_as_they_are():
    values = [3.0, 1.0, 2.0]
    assert filled(values).values == values
    assert filled(values).steps == [0, 1, 2]


def test_nan_is_counted_and_left_out():
    series = filled([1.0, math.nan, 3.0, math.inf] * 3, capacity=4)
    assert series.nonfinite == 6
    assert all(map(math.isfinite, series.values))
    assert mean(series.values) == 2.0
    assert math.isnan(filled([math.nan]).last)


def test_a_part_has_a_point_if_there_is_any():
    series = filled(map(float, range(100)))
    assert series.part(0.75) == [float(value) for value in range(75, 100)]
    assert series.part(0.0, 0.1) == [float(value) for value in range(10)]
    assert filled([1.0]).part(0.9) == [1.0]
    assert Series().part(0.5) == []


@pytest.mark.parametrize("stop", [3, 500, 777])
def test_a_restored_curve_goes_on_as_if_nothing_had_happened(stop):
    values = [float(step % 13) for step in range(2000)]
    first = filled(values[:stop])
    check_state_is_plain(first.state_dict())
    second = Series()
    second.load_state_dict(first.state_dict())
    for step, value in enumerate(values[stop:], start=stop):
        second.add(step, value)
    assert same(second.state_dict(), filled(values).state_dict())


def test_further_names_are_ignored():
    records = Records(most=2)
    for name in ("a", "b", "c"):
        records.open(name).add(0, 1.0)
    assert records.names() == ["a", "b"]
    assert records["c"].count == 0
    assert records.names("b") == ["b"]


def test_an_empty_curve_is_refused():
    with pytest.raises(ValueError, match="expected capacity to be an integer >= 2, got 1"):
        Series(1)

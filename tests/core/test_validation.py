"""Checks of arguments: what passes, and the words for what does not."""

import math

import numpy as np
import pytest

from lightning_ifthpo.core.validation import (
    is_ascending,
    is_number,
    require_at_least,
    require_broadcastable,
    require_choice,
    require_flag,
    require_fraction,
    require_shape,
)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(1, True), (0.5, True), (math.nan, True), (np.float32(1.0), True), (True, False), (1j, False), ("1", False)],
    ids=repr,
)
def test_numbers_are_real_and_no_truth_values(value, wanted):
    assert is_number(value) is wanted


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0.0, 1, 2.0), True),
        ((0.0, 0.0), False),
        ((1.0, 0.0), False),
        ((0.0, math.nan, 1.0), False),
        ((0.0, True, 2.0), False),
        ((0.0, None), False),
        ((5.0,), True),
    ],
    ids=repr,
)
def test_ascending_numbers(values, wanted):
    assert is_ascending(*values) is wanted


@pytest.mark.parametrize("value", [2, 3, np.int64(2)], ids=repr)
def test_integers_that_are_large_enough_pass(value):
    require_at_least("k", value, 2)


@pytest.mark.parametrize("value", [1, 2.0, True, "2", None], ids=repr)
def test_others_are_named(value):
    with pytest.raises(ValueError, match=rf"expected k to be an integer >= 2, got {value!r}"):
        require_at_least("k", value, 2)


def test_choices():
    require_choice("rule", "one", ("one", "two"))
    for value in ("three", None, ["one"]):
        with pytest.raises(ValueError, match=r"expected rule to be one of \('one', 'two'\), got "):
            require_choice("rule", value, ["one", "two"])


def test_flags():
    for value in (True, False):
        require_flag("trace", value)
    for value in (0, 1, None, "yes"):
        with pytest.raises(ValueError, match=f"expected trace to be True or False, got {value!r}"):
            require_flag("trace", value)


def test_fractions():
    for value in (None, 0, 0.0, 0.999):
        require_fraction("rtol", value)
    for value in (1.0, -0.1, math.nan, True, "0.5"):
        with pytest.raises(ValueError, match=f"expected 0 <= rtol < 1 or None, got {value!r}"):
            require_fraction("rtol", value)


def test_shapes():
    for value in ((), (3,), [3, 1, 1]):
        require_shape("shape", value)
    for value in ((0,), (1.5,), "33", {3}, 3):
        with pytest.raises(ValueError, match="expected shape to be a tuple of positive sizes, got "):
            require_shape("shape", value)


@pytest.mark.parametrize(
    ("shape", "wanted", "passes"),
    [
        ((), (), True),
        ((), (2, 3), True),
        ((3,), (2, 3), True),
        ((2, 1), (2, 3), True),
        ((2,), (2, 3), False),
        ((3,), (1,), False),
        ((1, 3), (3,), False),
    ],
    ids=repr,
)
def test_values_broadcast_to_an_input(shape, wanted, passes):
    if passes:
        require_broadcastable("rates", shape, wanted)
    else:
        with pytest.raises(ValueError, match=r"rates of shape .* do not broadcast to an input of shape"):
            require_broadcastable("rates", shape, wanted)

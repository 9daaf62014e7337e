"""Positive numbers."""

import pytest
import torch

from lightning_ifthpo.hyperparameters import Positive


@pytest.mark.parametrize("initial", [0.25, 3, torch.tensor([[1e-6, 1e6]])], ids=str)
def test_the_numbers_are_those_that_were_given_and_a_step_changes_them_by_a_factor(initial):
    positive = Positive(initial)
    wanted = torch.as_tensor(initial, dtype=torch.float32)
    assert torch.allclose(positive(), wanted)
    with torch.no_grad():
        positive.logarithms -= 1.0
    assert torch.allclose(positive.natural_values(), wanted / torch.e)


def test_a_tensor_that_was_given_does_not_move():
    given = torch.ones(2)
    with torch.no_grad():
        Positive(given).logarithms += 1.0
    assert given.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("initial", "error", "match"),
    [
        (0.0, ValueError, "positive finite"),
        (-1.0, ValueError, "positive finite"),
        (float("nan"), ValueError, "positive finite"),
        (torch.tensor([1.0, float("inf")]), ValueError, "positive finite"),
        ("1", TypeError, "positive number"),
        (True, TypeError, "positive number"),
        (torch.tensor([1]), TypeError, "floating-point"),
    ],
    ids=str,
)
def test_what_is_not_positive_is_refused(initial, error, match):
    with pytest.raises(error, match=match):
        Positive(initial)

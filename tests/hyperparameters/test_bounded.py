"""Values in an interval."""

import math

import pytest
import torch
from torch import nn

from lightning_ifthpo.hyperparameters import InputNoise, LabelSmoothing, SampleWeights, WeightDecay
from lightning_ifthpo.hyperparameters.bounded import Bounded, between


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 1.0), (-2.0, 5.0), (0.1, 0.3)])
def test_a_logit_moves_the_value_from_one_bound_to_the_other(lowest, highest):
    logits = torch.tensor([-math.inf, -800.0, 0.0, 800.0, math.inf], dtype=torch.float64, requires_grad=True)
    values = between(logits, lowest, highest)
    assert values.tolist() == pytest.approx([lowest, lowest, (lowest + highest) / 2, highest, highest], abs=1e-12)
    (slope,) = torch.autograd.grad(values.sum(), logits)
    assert slope.tolist() == pytest.approx([0.0, 0.0, (highest - lowest) / 4, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    ("initial", "maximum", "limit", "bound"),
    [
        (0.0, 1.0, math.inf, "< inf"),
        (1.0, 1.0, math.inf, "< inf"),
        (0.1, math.inf, math.inf, "< inf"),
        (math.nan, 1.0, math.inf, "< inf"),
        (True, 2.0, math.inf, "< inf"),
        (0.1, 1.5, 1.0, "<= 1"),
    ],
)
def test_values_outside_the_interval_are_refused(initial, maximum, limit, bound):
    with pytest.raises(ValueError, match=f"expected 0 < initial < maximum {bound}, got initial={initial}"):
        Bounded(initial, maximum, limit)


def test_the_maximum_may_be_the_limit():
    assert Bounded(0.5, 1.0, 1.0).maximum == 1.0


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (InputNoise(maximum=0.5), "InputNoise(maximum=0.5)"),
        (LabelSmoothing(3), "LabelSmoothing(maximum=0.5)"),
        (SampleWeights(3), "SampleWeights(maximum=2)"),
    ],
    ids=["noise", "smoothing", "weights"],
)
def test_the_bound_is_in_the_repr(module, text):
    assert repr(module) == text
    assert list(module.state_dict()) == ["logits"]


def test_the_bound_of_a_decay_is_in_the_repr():
    decay = WeightDecay(nn.Linear(2, 1), "tensor", maximum=3.0)
    assert repr(decay).splitlines()[1].strip() == "maximum=3"
    assert list(decay.state_dict()) == ["log_decay.0", "log_decay.1"]


def test_a_value_is_at_its_bound_where_steps_hardly_move_it():
    """At .99 of the maximum, a step of λ moves the value by 4 % of what it does in the middle."""
    noise = InputNoise(initial=0.1, maximum=0.5)
    assert noise.is_at_bound(0.499)
    assert not noise.is_at_bound(0.49)


def test_weights_of_examples_may_be_at_their_bound():
    assert not SampleWeights(3).is_at_bound(2.0)

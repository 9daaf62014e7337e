"""Loss weights and label smoothing."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.hyperparameters import LabelSmoothing, LossWeights
from tests.helpers.hyperparameters import EXTREMES, disturb, fill


@pytest.mark.parametrize("make", [lambda: LossWeights(3), lambda: LabelSmoothing(3)], ids=["weights", "smoothing"])
def test_what_belongs_to_the_loss_does_not_depend_on_the_mode(make):
    module, value = make(), torch.tensor([0, 1, 2])
    assert torch.equal(module.train()(value), module.eval()(value))


# LossWeights


def test_weights_start_where_they_are_told():
    tuned = disturb(LossWeights(["a", "b", "c"]))
    for initial in (tuned.natural_values(), {name: float(w) for name, w in tuned.natural_values().items()}):
        again = LossWeights(["c", "a", "b"], initial=initial).natural_values()
        assert {name: float(w) for name, w in again.items()} == pytest.approx(
            {name: float(w) for name, w in tuned.natural_values().items()}
        )
    assert LossWeights(2, initial=[3.0, 1.0]).natural_values().tolist() == pytest.approx([1.5, 0.5])
    assert LossWeights(2, initial=torch.tensor([3.0, 1.0])).natural_values().tolist() == pytest.approx([1.5, 0.5])


def test_loss_weights_start_at_one():
    assert LossWeights(3).natural_values().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert float(LossWeights(3)(torch.tensor([1.0, 2.0, 4.0]))) == pytest.approx(7.0)


def test_loss_weights_are_a_softmax_that_sums_to_their_number():
    weights = LossWeights(3)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([1.0, 2.0, 4.0]).log())
    assert weights.natural_values().tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    assert float(weights(torch.tensor([1.0, 10.0, 100.0]))) == pytest.approx((3 + 60 + 1200) / 7)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_loss_weights_stay_between_zero_and_their_number(extreme):
    weights = LossWeights(3)
    with torch.no_grad():
        weights.logits[1] = extreme
    values = weights.natural_values()
    assert bool((values >= 0).all())
    assert values.sum().item() == pytest.approx(3.0)


def test_a_common_factor_of_all_terms_is_no_hyperparameter():
    weights, losses = LossWeights(3).requires_grad_(True), torch.tensor([1.0, 2.0, 6.0])
    (gradient,) = torch.autograd.grad(weights(losses), weights.logits)
    assert gradient.tolist() == pytest.approx([-2.0, -1.0, 3.0])  # each loss less their mean
    with torch.no_grad():
        weights.logits.add_(5.0)
    assert weights.natural_values().tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_losses_may_be_a_vector_a_sequence_or_named():
    weights = disturb(LossWeights(["a", "b"]))
    a, b = torch.tensor(2.0), torch.tensor(5.0)
    wanted = weights(torch.stack([a, b]))
    assert torch.equal(weights([a, b]), wanted)
    assert torch.equal(weights((a, b)), wanted)
    assert torch.equal(weights({"b": b, "a": a}), wanted)
    assert weights.names == ("a", "b")
    assert wanted.shape == ()


# LabelSmoothing


def test_label_smoothing_is_that_of_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1])
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.2)
    assert torch.allclose(F.cross_entropy(logits, LabelSmoothing(4, initial=0.2)(targets)), wanted)


def test_label_smoothing_of_each_class():
    smoothing = LabelSmoothing(3, per_class=True, initial=0.1, maximum=0.4)
    with torch.no_grad():
        smoothing.logits[2] = 0.0  # half of the maximum
    wanted = [[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3]]
    assert torch.allclose(smoothing(torch.tensor([0, 2])), torch.tensor(wanted))
    assert smoothing.natural_values().tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert LabelSmoothing(3).natural_values().tolist() == pytest.approx([0.01])


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("maximum", [0.3, 1.0])
def test_smoothed_targets_stay_distributions(extreme, maximum):
    smoothing = LabelSmoothing(3, maximum=maximum)
    fill(smoothing, extreme)
    targets = smoothing(torch.tensor([0, 1, 2]))
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert bool((targets >= 0).all())
    assert bool((targets.diagonal() >= 1 - maximum + maximum / 3 - 1e-6).all())
    if extreme == 1e4:
        assert float(smoothing.natural_values()) == pytest.approx(maximum)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LossWeights(1), ValueError, "at least two terms, got 1"),
        (lambda: LossWeights(["a"]), ValueError, "at least two terms, got 1"),
        (lambda: LossWeights(["a", "a"]), ValueError, "distinct names"),
        (lambda: LossWeights(2, initial=[1.0]), ValueError, r"initial to be 2 positive numbers, got \[1.0\]"),
        (lambda: LossWeights(2, initial=[1.0, 0.0]), ValueError, "initial to be 2 positive numbers"),
        (lambda: LossWeights(2, initial=[1.0, float("inf")]), ValueError, "initial to be 2 positive numbers"),
        (lambda: LossWeights(2, initial=[1.0, "b"]), ValueError, "initial to be 2 positive numbers"),
        (lambda: LossWeights(2, initial=True), ValueError, "initial to be 2 positive numbers, got True"),
        (lambda: LossWeights(2, initial=[torch.ones(2), 1.0]), ValueError, "initial to be 2 positive numbers"),
        (lambda: LossWeights(["a", "b"], initial={"a": 1.0}), ValueError, r"named \('a', 'b'\), got \('a',\)"),
        (lambda: LossWeights("ab"), TypeError, "a list of names, got 'ab'"),
        (lambda: LossWeights(2)(torch.ones(3)), ValueError, r"expected 2 scalar losses, got shape \(3,\)"),
        (lambda: LossWeights(2)(torch.tensor(1.0)), ValueError, r"expected 2 scalar losses, got shape \(\)"),
        (lambda: LossWeights(2)([torch.ones(3)] * 2), ValueError, r"expected 2 scalar losses, got shape \(2, 3\)"),
        (lambda: LossWeights(["a", "b"])({"a": torch.tensor(1.0)}), ValueError, r"named \('a', 'b'\), got \('a',\)"),
        (lambda: LossWeights(2)({"a": torch.tensor(1.0)}), ValueError, r"named \(\), got \('a',\)"),
        (lambda: LabelSmoothing(1), ValueError, "classes to be an integer >= 2, got 1"),
        (lambda: LabelSmoothing(3, initial=0.0), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3, initial=0.5), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3, maximum=1.5), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3)(torch.zeros(2, 2).long()), ValueError, r"shape \[B\], got \(2, 2\)"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()

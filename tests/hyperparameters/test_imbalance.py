"""Class weights and logit adjustment."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import ClassWeights, LogitAdjustment
from tests.helpers.hyperparameters import EXTREMES, disturb
from tests.helpers.trainers import Classifier, quiet_trainer

COUNTS = [60, 30, 10]
FREQUENCIES = torch.tensor([0.6, 0.3, 0.1])


@pytest.mark.parametrize("counts", [COUNTS, tuple(COUNTS), torch.tensor(COUNTS), FREQUENCIES], ids=str)
def test_weights_are_ones_and_offsets_logarithms_of_frequencies_at_the_start(counts):
    assert ClassWeights(counts).natural_values().tolist() == pytest.approx([1.0] * 3)
    wanted = FREQUENCIES.log() - FREQUENCIES.log().mean()
    assert torch.allclose(LogitAdjustment(counts).natural_values(), wanted)


def test_the_strength_multiplies_the_offsets():
    one = LogitAdjustment(COUNTS).natural_values()
    assert torch.allclose(LogitAdjustment(COUNTS, strength=2.5).natural_values(), 2.5 * one)
    assert not LogitAdjustment(COUNTS, strength=0.0).natural_values().any()


@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_mean_weight_of_a_training_example_is_one(extreme):
    weights = ClassWeights(COUNTS)
    with torch.no_grad():
        weights.logarithms[1] = extreme
    values = weights.natural_values()
    assert bool((values >= 0).all())
    assert float(values @ FREQUENCIES) == pytest.approx(1.0)


def test_inverse_frequencies_make_each_class_count_alike():
    weights = ClassWeights(COUNTS, initial=1 / torch.tensor(COUNTS))
    shares = weights.natural_values() * FREQUENCIES
    assert shares.tolist() == pytest.approx([1 / 3] * 3)


def test_a_common_factor_or_offset_is_no_hyperparameter():
    weights, adjustment = ClassWeights(COUNTS, initial=[5.0, 10.0, 15.0]), LogitAdjustment(COUNTS)
    before = weights.natural_values(), adjustment.natural_values()
    with torch.no_grad():
        weights.logarithms.add_(3.0)
        adjustment.offsets.add_(3.0)
    after = weights.natural_values(), adjustment.natural_values()
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(before, after, strict=True))
    assert torch.allclose(before[0], ClassWeights(COUNTS, initial=[1.0, 2.0, 3.0]).natural_values())


@pytest.mark.parametrize("kind", [ClassWeights, LogitAdjustment])
def test_natural_values_are_a_start(kind):
    tuned = disturb(kind(COUNTS))
    for initial in (tuned.natural_values(), tuned.natural_values().tolist()):
        assert torch.allclose(kind(COUNTS, initial=initial).natural_values(), tuned.natural_values(), atol=1e-6)


def test_each_example_has_the_weight_of_its_class():
    weights = ClassWeights(COUNTS, initial=[1.0, 2.0, 3.0])
    assert torch.equal(weights(torch.tensor([2, 0, 2])), weights.natural_values()[[2, 0, 2]])


def test_adjusted_logits_that_fit_the_frequencies_are_balanced_without_the_offsets():
    """The minimum of the adjusted loss has softmax(logits) proportional to the posterior over the prior (Menon)."""
    logits, labels = torch.zeros(3, requires_grad=True), torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    loss = F.cross_entropy(LogitAdjustment(COUNTS)(logits.expand(len(labels), 3)), labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(gradient, torch.zeros(3), atol=1e-6)


def test_logits_may_have_any_leading_dimensions():
    adjustment, logits = LogitAdjustment(COUNTS), torch.randn(2, 5, 3)
    assert torch.allclose(adjustment(logits), logits + adjustment.natural_values())


@pytest.mark.parametrize("kind", [ClassWeights, LogitAdjustment])
def test_what_belongs_to_the_loss_does_not_depend_on_the_mode(kind):
    module = kind(COUNTS)
    value = torch.tensor([0, 1, 2]) if kind is ClassWeights else torch.randn(4, 3)
    assert torch.equal(module.train()(value), module.eval()(value))


class Misled(Classifier):
    """Trains on labels of which the last class is never meant: its examples are wrong."""

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("weights", ClassWeights([1, 1, 1]))

    def inner_loss(self, batch):
        x, y = batch
        wrong = torch.where(torch.arange(len(y), device=y.device) % 2 == 0, y, torch.full_like(y, 2))
        losses = F.cross_entropy(self.mark_outputs(self.net(x)), wrong, reduction="none")
        return (self.weights(wrong) * losses).mean() + self.decay()


def test_the_weight_of_a_class_with_wrong_examples_falls():
    module = Misled()
    quiet_trainer(max_epochs=5, callbacks=[IFTHypergradient(1)]).fit(module)
    values = module.hyperparameter_values()["weights"]
    assert values[2] < 0.5
    assert int(values.argmin()) == 2


@pytest.mark.parametrize("kind", [ClassWeights, LogitAdjustment])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1], r"counts of at least two classes, got \[1\]"),
        (10, "counts to be positive numbers, one for each class, got 10"),
        ([1, 0], "counts to be positive numbers"),
        ([1, -1], "counts to be positive numbers"),
        ([1, float("nan")], "counts to be positive numbers"),
        ([1, float("inf")], "counts to be positive numbers"),
        ([1, True], "counts to be positive numbers"),
        (["a", "b"], "counts to be positive numbers"),
        (torch.ones(2, 2), "counts to be positive numbers"),
    ],
    ids=str,
)
def test_refuses_counts(kind, counts, message):
    with pytest.raises(ValueError, match=message):
        kind(counts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassWeights(COUNTS, initial=[1.0, 2.0]), r"initial to be 3 positive numbers, got \[1.0, 2.0\]"),
        (lambda: ClassWeights(COUNTS, initial=[1.0, 2.0, 0.0]), "initial to be positive numbers"),
        (lambda: LogitAdjustment(COUNTS, initial=[1.0]), r"initial to be 3 finite numbers, got \[1.0\]"),
        (lambda: LogitAdjustment(COUNTS, initial=[1.0, float("nan"), 1.0]), "initial to be 3 finite numbers"),
        (lambda: LogitAdjustment(COUNTS, initial="abc"), "initial to be 3 finite numbers, got 'abc'"),
        (lambda: LogitAdjustment(COUNTS, strength=float("inf")), "strength to be a finite number, got inf"),
        (lambda: LogitAdjustment(COUNTS)(torch.zeros(2, 4)), r"logits of 3 classes, got shape \(2, 4\)"),
        (lambda: LogitAdjustment(COUNTS)(torch.tensor(0.0)), r"logits of 3 classes, got shape \(\)"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_may_be_an_array_and_targets_small_integers():
    weights = ClassWeights(np.bincount([0, 0, 0, 1]), initial=np.array([1.0, 3.0]))
    assert weights(torch.tensor([1, 0], dtype=torch.uint8)).tolist() == pytest.approx([2.0, 2.0 / 3.0])


def test_weights_of_very_rare_classes_are_finite_in_half_precision():
    assert bool(ClassWeights([10**8, 1]).half().natural_values().isfinite().all())

"""How labels are confused, and what a single label should have been."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.curvature import GaussNewtonOperator
from lightning_ifthpo.hyperparameters import LabelTransition, SoftLabels
from tests.helpers.hyperparameters import EXTREMES, disturb, float64

LABELS = torch.tensor([2, 0, 1, 1])


@pytest.mark.parametrize(
    "make", [lambda: LabelTransition(3), lambda: SoftLabels(LABELS, 3)], ids=["transition", "soft labels"]
)
def test_what_belongs_to_the_loss_does_not_depend_on_the_mode(make):
    module = make()
    value = torch.randn(4, 3) if isinstance(module, LabelTransition) else torch.tensor([0, 3])
    assert torch.equal(module.train()(value), module.eval()(value))


# LabelTransition


def test_a_transition_mixes_the_probabilities_of_the_true_classes():
    transition, logits = disturb(LabelTransition(4, initial=0.7)).double(), float64(5, 4)
    assert torch.allclose(transition(logits).exp(), logits.softmax(1) @ transition.natural_values())


def test_rows_sum_to_one_and_start_at_the_probability_of_a_right_label():
    matrix = LabelTransition(5, initial=0.6).natural_values()
    assert torch.allclose(matrix, 0.1 * torch.ones(5, 5) + 0.5 * torch.eye(5))
    assert torch.allclose(disturb(LabelTransition(5)).natural_values().sum(1), torch.ones(5))


def test_a_transition_starts_from_counts_and_from_another_one():
    counts = torch.tensor([[8, 2], [0, 5]])
    expected = torch.tensor([[0.8, 0.2], [1e-3 / 1.001, 1 / 1.001]])  # no entry is below 0.1 % of its row
    assert torch.allclose(LabelTransition(2, initial=counts).natural_values(), expected)
    tuned = disturb(LabelTransition(3))
    assert torch.allclose(LabelTransition(3, initial=tuned.natural_values()).natural_values(), tuned.natural_values())


def test_a_transition_starts_from_the_mean_prediction_for_each_class():
    logits, labels = float64(40, 3), torch.arange(40) % 3
    matrix = LabelTransition.from_predictions(logits, labels).natural_values().double()
    expected = torch.stack([logits.softmax(1)[labels == label].mean(0) for label in range(3)])
    assert torch.allclose(matrix, expected, atol=1e-6)  # which is kept in float32
    small = LabelTransition.from_predictions(logits, labels.to(torch.uint8)).natural_values()
    assert torch.equal(small.double(), matrix)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_the_loss_is_finite_whatever_the_transition_and_the_network_say(extreme):
    transition = LabelTransition(3)
    with torch.no_grad():
        transition.logits[0, 1] = extreme
    logits = torch.tensor([[extreme, 0.0, 0.0]], requires_grad=True)
    loss = F.cross_entropy(transition(logits), torch.tensor([1]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_the_loss_is_convex_in_what_should_be_marked():
    torch.manual_seed(0)
    net, transition, inputs = torch.nn.Linear(4, 3).double(), disturb(LabelTransition(3)).double(), float64(6, 4)

    def loss():
        outputs = transition(net(inputs))
        return F.cross_entropy(outputs, torch.tensor([0, 1, 2, 2, 1, 0])), outputs

    values = torch.linalg.eigvalsh(GaussNewtonOperator(loss, list(net.parameters())).to_dense())
    assert float(values[0]) > -1e-12 * float(values[-1])  # rounding of float64, with a margin


# SoftLabels


def test_soft_labels_start_close_to_the_given_ones():
    labels = SoftLabels(LABELS, 3, initial=0.8)
    assert torch.allclose(labels.natural_values(), 0.1 * torch.ones(4, 3) + 0.7 * F.one_hot(LABELS, 3))
    assert torch.equal(labels(torch.tensor([3, 0])), labels.natural_values()[[3, 0]])


def test_soft_labels_take_small_integers():
    assert torch.equal(SoftLabels(LABELS.to(torch.uint8), 3).natural_values(), SoftLabels(LABELS, 3).natural_values())


def test_soft_labels_are_a_distribution_for_each_example():
    labels = disturb(SoftLabels(LABELS, 3))
    assert torch.allclose(labels.natural_values().sum(1), torch.ones(4))
    assert not torch.allclose(labels.natural_values()[2], labels.natural_values()[3])  # which have the same given label


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LabelTransition(1), "classes to be an integer >= 2, got 1"),
        (lambda: LabelTransition(3, initial=1.0), "0 < initial < 1"),
        (lambda: LabelTransition(3, initial=torch.eye(2)), r"initial of shape \(3, 3\), got \(2, 2\)"),
        (lambda: LabelTransition(2, initial=torch.tensor([[1.0, -1.0], [0.5, 0.5]])), "without negative"),
        (lambda: LabelTransition(2, initial=torch.tensor([[0.0, 0.0], [0.5, 0.5]])), "no row of zeros"),
        (lambda: LabelTransition(3)(torch.zeros(5, 2)), r"logits \[..., 3\], got shape \(5, 2\)"),
        (lambda: LabelTransition.from_predictions(torch.zeros(4, 4), LABELS), "none of class 3"),
        (lambda: LabelTransition.from_predictions(torch.zeros(3, 3), LABELS), r"labels of shape \(3,\)"),
        (lambda: LabelTransition(3)(torch.tensor(1.0)), r"got shape \(\)"),
        (lambda: SoftLabels(LABELS, 1), "classes to be an integer >= 2, got 1"),
        (lambda: SoftLabels(LABELS, 3, initial=0.0), "0 < initial < 1"),
        (lambda: SoftLabels(LABELS, 2), "labels from 0 to 1, got 0 to 2"),
        (lambda: SoftLabels(torch.rand(3), 2), r"integer tensor \[n\], got torch.float32 \(3,\)"),
        (lambda: SoftLabels([0, 1], 2), r"integer tensor \[n\], got list"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()

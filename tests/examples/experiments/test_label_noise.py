"""Noise, sentences and the training loop of the methods against wrong labels."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from examples.experiments import label_noise as experiment
from examples.experiments.problems import label_methods, sentences
from examples.experiments.problems.label_comparison import Recipe, relabel, train_forward
from examples.experiments.problems.label_methods import (
    Method,
    Outcome,
    _agreement,
    meta_weight_net,
    one_hot,
    posterior,
    train,
)
from examples.experiments.problems.label_noise import CLASSES, NOISES, Data, load_data, make_net


def tiny():
    """A problem of vectors that takes milliseconds."""
    torch.manual_seed(0)
    centers = torch.randn(CLASSES, 5) * 3
    parts = []
    for count in (200, 60, 40, 60):
        labels = torch.arange(count) % CLASSES
        parts.append((centers[labels] + torch.randn(count, 5), labels))
    noisy, checked, held_out, test = parts
    return Data((noisy[0], (noisy[1] + (torch.arange(200) % 3 == 0)) % CLASSES), checked, held_out, test, noisy[1])


@pytest.mark.parametrize("noise", NOISES)
def test_the_share_of_wrong_labels_is_as_asked(noise):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(4000, 7, generator=generator), torch.arange(4000) % CLASSES
    given = NOISES[noise](inputs, labels, 0.4, generator)
    wrong = given != labels
    assert float(wrong.float().mean()) == pytest.approx(0.4, abs=0.03)  # four standard deviations of 4,000 draws
    counts = torch.zeros(CLASSES, CLASSES).index_put_((labels[wrong], given[wrong]), torch.ones(int(wrong.sum())), True)
    used = int((counts > 0).sum())
    assert used == CLASSES if noise == "pair" else used == CLASSES * (CLASSES - 1)


def test_a_split_is_the_same_for_a_seed_and_another_one_for_another():
    first, again, other = (load_data("MNIST", "pair", 0.45, seed) for seed in (0, 0, 1))
    assert torch.equal(first.noisy[1], again.noisy[1])
    assert not torch.equal(first.noisy[1], other.noisy[1])
    assert [len(part[1]) for part in first[:4]] == [3000, 400, 100, 1500]
    assert torch.allclose(first.true_transition().sum(1), torch.ones(CLASSES))
    assert float(first.true_transition().diag().mean()) == pytest.approx(0.55, abs=0.03)


@pytest.mark.parametrize(
    ("method", "checked"),
    [
        ({}, 4.0),
        ({}, 0.0),
        ({"weights": torch.rand(200)}, 4.0),
        ({"transition": torch.full((CLASSES, CLASSES), 0.02) + 0.8 * torch.eye(CLASSES)}, 4.0),
        ({"confusion": torch.full((CLASSES, CLASSES), 0.1)}, 4.0),
        ({"one_step": 0.5}, 4.0),
        ({"network": meta_weight_net()}, 4.0),
    ],
    ids=["plain", "noisy alone", "weights", "transition", "confusion", "one step", "network"],
)
def test_every_option_of_a_method_changes_training(method, checked):
    data, targets = tiny(), one_hot(tiny().noisy[1])
    outcome = train(data, Method(targets, **method), 0, 140, checked=checked)
    assert outcome.probabilities.shape == (200, CLASSES)
    assert torch.allclose(outcome.confusion.sum(1), torch.ones(CLASSES))
    assert len(outcome.curve) == 140 // label_methods.LOOK_EVERY
    assert outcome.accuracy == outcome.curve[outcome.step // label_methods.LOOK_EVERY - 1]
    plain = train(data, Method(targets), 0, 140, checked=4.0)
    assert torch.equal(plain.margins, outcome.margins) == (not method and checked == 4.0)


def test_examples_without_weight_are_not_trained_on():
    data, keep = tiny(), (torch.arange(200) % 3 != 0).float()
    targets = one_hot(data.noisy[1])
    spoiled = torch.where(keep.unsqueeze(1) > 0, targets, targets.roll(5, 1))
    runs = [train(data, Method(some, keep), 0, 40).probabilities for some in (targets, spoiled)]
    assert torch.equal(*runs)


def test_agreement_is_the_inner_product_of_gradients():
    torch.manual_seed(0)
    net, inputs, targets = make_net(torch.randn(4, 5)), torch.randn(4, 5), one_hot(torch.arange(4))
    sure, sure_targets = torch.randn(6, 5), one_hot(torch.arange(6))
    agreement, losses = _agreement(net, inputs, targets, sure, sure_targets)
    weights = dict(net.named_parameters())

    def gradient(x, y):
        return torch.autograd.grad(F.cross_entropy(functional_call(net, weights, (x,)), y), list(weights.values()))

    outer = gradient(sure, sure_targets)
    for index in range(4):
        own = gradient(inputs[index : index + 1], targets[index : index + 1])
        expected = sum(float((a * b).sum()) for a, b in zip(own, outer, strict=True))
        assert float(agreement[index]) == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(losses, F.cross_entropy(net(inputs), targets, reduction="none"))


def test_a_posterior_is_that_of_bayes_rule():
    transition = torch.tensor([[0.8, 0.2], [0.1, 0.9]])
    found = posterior(torch.tensor([[0.5, 0.5]]), transition, torch.tensor([1]))
    assert found.tolist()[0] == pytest.approx([0.2 / 1.1, 0.9 / 1.1])


@pytest.mark.parametrize(("loss", "is_kept"), [(0.8, True), (0.95, False), (1.1, False)])
def test_the_second_network_of_the_recipe_is_kept_where_its_held_out_loss_is_clearly_lower(loss, is_kept):
    unused = torch.zeros(0)
    first, second = (Outcome(held_out, 20, 0.5, [0.5], unused, unused, unused) for held_out in (1.0, loss))
    assert Recipe(first, second, unused).kept is (second if is_kept else first)


def test_the_recipe_trains_through_a_transition_and_then_on_what_that_network_says():
    data = tiny()
    given, transition = data.noisy[1], data.true_transition() * 0.99 + 0.001
    forward = train_forward(data, transition, 0, 140)
    through = train(data, Method(one_hot(given), transition=transition), 0, 140)
    assert torch.equal(through.probabilities, forward.probabilities)
    recipe = relabel(data, transition, forward, 0, 140)
    assert not torch.equal(recipe.relabelled.probabilities, forward.probabilities)
    assert float(recipe.label_score[data.wrong].mean()) < 0.2
    assert float(recipe.label_score[~data.wrong].mean()) > 0.8
    other = relabel(data, transition, forward, 0, 140, one_step=0.0)
    assert not torch.equal(other.relabelled.probabilities, recipe.relabelled.probabilities)


@pytest.mark.parametrize("subject", sentences.SUBJECTS)
def test_sentences_come_from_installed_packages(subject):
    found = sentences.sentences(subject)
    assert len(set(found)) == sentences.PER_SUBJECT
    assert all(len(text) in sentences.LENGTHS and "\n" not in text for text in found)
    assert found == sentences.sentences(subject)


def test_the_best_rival_and_the_distance_to_it_are_read_from_the_results():
    scores = {"equal": {"3": 0.5, "4": 0.5}, "gold": {"3": 0.8, "4": 0.9}, "ours": {"3": 0.9, "4": 0.9}}
    results = {"accuracy": {"MNIST, pair, 0.3": scores | {"checked": {"3": 0.1, "4": 0.1}}}}
    assert experiment.best_rival(results, "MNIST, pair, 0.3") == "gold"
    assert experiment.distance(results, "MNIST, pair, 0.3", "gold") == pytest.approx((0.05, 0.05))
    assert experiment.summary(results)["best or level within a standard error"] == 1.0

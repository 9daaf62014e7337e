import pytest
import torch

from examples.experiments import mixed_search as example
from examples.experiments.common import digits_8x8


@pytest.fixture(autouse=True)
def _silent():
    example.silence()


def enqueued(method, steps, *choices):
    """A search whose only trial was of given choices."""
    search = example.Search(method, example.load_data(100), seed=0, steps=steps)
    wanted = example.Choices(*(choices or (64, 1, "relu", 50, "sgd", 0.1)))
    search.study.enqueue_trial({**wanted._asdict(), f"{wanted.optimizer}_learning_rate": wanted.learning_rate})
    search.run_trial()
    assert search.best.choices == wanted
    return search


def test_sets_are_disjoint_and_only_training_labels_are_wrong():
    pixels, digits = digits_8x8()
    known = {tuple(image): digit for image, digit in zip((16 * pixels).tolist(), digits.tolist(), strict=True)}
    sets = example.load_data(0)
    assert [len(labels) for _, labels in sets] == example.PARTS
    assert len(torch.cat([images for images, _ in sets]).unique(dim=0)) == 1797  # no two are the same
    for (images, labels), wrong in zip(sets, (example.WRONG, 0, 0), strict=True):
        right = torch.tensor([known[tuple(image)] for image in (16 * images).tolist()])
        assert set(((labels - right) % 10).tolist()) <= {0, 1}
        assert ((labels - right) % 10).sum() == wrong


@pytest.mark.parametrize("method", ["clean", "alone", "every", "inside"])
def test_each_method_moves_what_it_should(method):
    search = enqueued(method, 60)
    values = dict(search.best.named_hyperparameters())
    start = dict(example.Classifier(search.best.choices, len(search.training[1])).named_hyperparameters())
    moved = {name.split(".")[0] for name in values if not torch.equal(values[name], start[name])}
    assert moved == (example.SEARCHED[method] or set(example.RANGES))  # `inside` tunes all
    suggested = search.study.trials[0].params
    for name, value in values.items():
        found = [suggested[f"{name} {i}"] for i in range(value.numel()) if f"{name} {i}" in suggested]
        assert len(found) == (value.numel() if name.split(".")[0] in example.SEARCHED[method] else 0)
        if found:
            assert value.view(-1).tolist() == pytest.approx(found)


def test_clean_images_are_split_for_the_search_that_uses_no_others():
    sets = example.load_data(100)
    search = example.Search("clean", sets, seed=0, steps=20)
    assert [len(search.training[1]), len(search.validation[1])] == [70, 30]
    assert torch.equal(torch.cat([search.training[0], search.validation[0]]), sets[1][0])


def test_training_ends_where_the_validation_loss_was_lowest():
    search = enqueued("alone", 300, 128, 2, "relu", 100, "adam", 1e-2)
    assert 0 < search.best_step < 300  # of later steps, which learn wrong labels by heart, nothing is left
    loss = search.best.outer_loss(search.validation).item()
    assert search.study.best_value == pytest.approx(loss)


def test_a_network_retrained_has_the_hyperparameters_found_and_weights_of_one(monkeypatch):
    search = enqueued("inside", 60)
    calls = []
    monkeypatch.setattr(example, "train", lambda *arguments: calls.append(arguments))
    search.retrain()
    ((module, (_, digits), steps, _, callbacks),) = calls
    assert steps == search.best_step
    assert callbacks == []
    assert torch.equal(digits, torch.cat([search.training[1], search.validation[1]]))
    weights = module.weights(torch.arange(1100))
    assert torch.equal(weights[:1000], search.best.weights(torch.arange(1000)))
    assert torch.equal(weights[1000:], torch.ones(100))
    assert torch.equal(module.decay.log_decay[0], search.best.decay.log_decay[0])


def test_searches_get_the_same_time():
    searches = example.search_all(example.load_data(100), seed=0, trials=2, steps=20)
    assert len(searches["inside"].progress) == 2
    for search in searches.values():
        spent = [0.0] + [seconds for seconds, _ in search.progress]
        assert spent == sorted(spent)
        assert spent[-2] <= searches["inside"].spent <= search.spent  # no trial after that


def test_hypergradients_find_weights_that_pay():
    """For the same choices, against weights of one, and against weights that Optuna drew."""
    searches = {method: enqueued(method, 300) for method in ("alone", "every", "inside")}
    for search in searches.values():
        search.retrain()
    assert searches["inside"].retrained > max(searches["alone"].retrained, searches["every"].retrained) + 0.03
    weights = searches["inside"].best.weights(torch.arange(1000))
    assert weights[: example.WRONG].mean() < weights[example.WRONG :].mean() - 0.5  # wrong labels come first
    assert searches["inside"].study.best_value < 0.5 * searches["alone"].study.best_value

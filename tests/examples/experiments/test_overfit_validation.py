import json

import numpy as np
import pytest
import torch

from examples.experiments import overfit_validation as example
from examples.experiments.common import start
from examples.experiments.problems import overfitting
from tests.examples.experiments.data_files import accept_cifar, write_cifar


@pytest.fixture(autouse=True)
def _two_counts_of_terms(monkeypatch):
    monkeypatch.setattr(example, "TERMS", (3, 30))


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(20, 1, 8, 8, generator=generator), torch.arange(20) % 10
    return example.Split(examples, examples, examples, classes=10)


def test_one_decay_for_each_weight_fits_the_validation_images(tmp_path, capsys):
    result = example.main(["--models", "linear", "--steps", "150", "--output", str(tmp_path)])
    measured = {name.removeprefix("linear, "): entry["measured"] for name, entry in result.items()}
    assert measured["tuned, training"] == measured["not tuned, training"] == 1.0
    assert measured["tuned, validation"] == 1.0  # measured: from step 80 on
    assert measured["not tuned, validation"] < 0.8  # measured: 0.64
    assert measured["tuned, test"] < 0.8
    assert "7,850 decays" in capsys.readouterr().out


def test_decays_are_tuned_after_the_first_steps_and_only_if_there_is_a_solver(noise):
    start()
    spans, steps = {}, example.START_AFTER + 2
    for solver in (None, *example.SOLVERS):
        module = example.train(example.MODELS["linear"], noise, 0, steps, solver)
        assert [scores.step for scores in module.history] == [5, 10, steps]
        lowest, highest = torch.cat([decay.flatten() for decay in module.decay.natural_values().values()]).aminmax()
        spans[solver] = (highest / lowest).item()
    assert spans.pop(None) == 1.0
    # Adam's first two steps are as long as its learning rate, up or down, on the logarithm of each decay.
    assert list(spans.values()) == pytest.approx([np.exp(4 * overfitting.HYPER_LEARNING_RATE)] * 2, rel=0.05)


@pytest.mark.parametrize(("name", "least"), [("alexnet", 2_000_000), ("resnet18", 11_000_000)])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)], ids=str)
def test_every_weight_of_a_deep_network_has_its_decay(name, least, shape):
    examples = images, _ = torch.zeros(2, *shape), torch.tensor([0, 99])
    module = example.Overfitter(example.MODELS[name], example.Split(examples, examples, examples, classes=100))
    weights, decays = list(module.inner_parameters()), list(module.decay.natural_values().values())
    assert [decay.shape for decay in decays] == [weight.shape for weight in weights]
    assert sum(weight.numel() for weight in weights) > least
    assert module.net(images).shape == (2, 100)


def test_peak_memory_counts_what_is_alive():
    values = torch.zeros(1000)
    with example.PeakMemory() as memory:
        kept = values + 1  # 4,000 bytes
        kept[:500].mul_(2)  # a view, changed in place
        for _ in range(5):
            values * 3  # freed at once
    assert memory.peak == 8000
    assert memory.live == 4000


def test_only_unrolling_needs_memory_for_each_term(noise):
    memory = example.measure_memory(noise, 0)
    assert memory["Neumann series"][0] == memory["Neumann series"][1]
    first, last = memory["unrolled"]
    assert (last - first) / 27 == pytest.approx(1.0, abs=0.1)


def test_color_images_are_read_from_their_files(tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, np.random.default_rng(0), "cifar10")
    accept_cifar(monkeypatch)
    arguments = ["--dataset", "cifar10", "--root", str(tmp_path), "--steps", "11", "--output", str(tmp_path)]
    result = example.main([*arguments, "--models", "linear", "mlp", "--solver", "amortized", "--seeds", "0", "1"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert all(entry["expected"] is None for name, entry in result.items() if "copies" not in name)
    assert 10_000 < (tmp_path / "overfit_validation.png").stat().st_size < 300_000

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10

from tests.examples.test_all import load
from tests.examples.test_distilled import write_cifar


@pytest.fixture
def example():
    load("distill_dataset")  # which it borrows from
    return load("learned_augmentation")


@pytest.fixture
def images():
    """Three images of one channel, zero near the border."""
    return F.pad(torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), (6, 6, 6, 6))


def distortion(example, name, strength):
    """One kind of distortion alone."""
    return example.RandomDistortion(strength if name == other else 0.0 for other in example.STRENGTHS)


@pytest.mark.parametrize("name", ["distortions", "displacements", "U-Net"])
def test_images_change_in_training_mode_only(name, example, images):
    augment = example.AUGMENTATIONS[name](1)
    if name == "U-Net":
        torch.nn.init.normal_(augment.last.weight)  # it starts as the identity
    first, second = augment(images), augment(images)
    assert first.shape == images.shape
    assert not torch.equal(first, second)
    assert torch.equal(augment.eval()(images), images)


def test_strengths_start_where_they_should(example):
    strengths = example.RandomDistortion(example.START).strengths()
    assert torch.allclose(strengths, torch.tensor(example.START))


def test_the_overall_strength_moves_all_of_them(example):
    augment = example.RandomDistortion(example.START)
    augment.overall.fill_(0.4)
    start, moved = (torch.logit(s / augment.bounds) for s in (torch.tensor(example.START), augment.strengths()))
    assert torch.allclose(moved - start, torch.full((6,), 0.4 * example.SHARED), atol=1e-4)


def test_without_strength_images_stay_as_they_are(example, images):
    distorted = example.RandomDistortion([0.0] * 6)(images)
    # a strength of zero is 1e-4 of its bound, which moves nothing by more than a hundredth of a pixel
    assert torch.allclose(distorted, images, atol=0.02)


def test_noise_has_its_strength(example):
    noise = distortion(example, "noise", 0.2)(torch.zeros(20, 1, 28, 28))
    # of 15,680 draws; standard error 0.2 / √31,360 = 0.0011
    assert noise.std().item() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("name", "deviations"),
    [("rotation", (0.0, 0.05)), ("scale", (0.05, 0.0)), ("shear", (0.0, 0.0)), ("translation", (0.1, 0.1))],
)
def test_a_strength_of_a_tenth_moves_a_point_as_it_should(name, deviations, example):
    """Deviations of the center of mass of a spot at (x, y) = (0.5, 0), in halves of the image."""
    torch.manual_seed(0)
    side, count = 64, 2000
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    spot = torch.exp(-((x - 0.5) ** 2 + y**2) / 0.005).expand(count, 1, side, side)
    moved = distortion(example, name, 0.1)(spot)
    mass = moved.sum((1, 2, 3))
    measured = [((moved * place).sum((1, 2, 3)) / mass).std().item() for place in (x, y)]
    # standard error 1.6 % of 2,000 draws, and second order in the strength
    assert measured == pytest.approx(deviations, rel=0.1, abs=0.005)


def test_displacements_stay_within_their_bound(example):
    network = example.DisplacementNetwork(1)
    network.net[-1].weight.data.mul_(1e6)  # tanh is ±1 everywhere
    ramp = torch.linspace(-1, 1, 28).expand(4, 1, 28, 28)
    # bicubic interpolation overshoots by at most a quarter in each direction; beyond the border all is zero
    assert (network(ramp) - ramp)[..., 10:18, 10:18].abs().max() <= 1.25 * 1.25 * example.LARGEST_DISPLACEMENT


def test_the_learned_distribution_beats_its_start_and_all_labels(example, tmp_path, monkeypatch, capsys):
    row = example.ROWS["distribution"]._replace(hyper_rate=0.1)  # in so short a run
    monkeypatch.setitem(example.ROWS, "distribution", row)
    rows = ["none_700", "distribution_start", "distribution"]
    result = example.main(["--rows", *rows, "--steps", "200", "--output", str(tmp_path)])
    all_labels, start, learned = (result[name]["measured"] for name in rows)
    # of 4,000 test images; 0.02 is five standard errors
    assert learned > start + 0.02
    assert learned > all_labels + 0.02


def test_only_learned_augmentations_are_tuned_and_only_in_the_first_part(example, tmp_path, monkeypatch, capsys):
    steps, configure = [], example.Classifier.configure_hyper_optimizer

    def recording(module):
        optimizer = configure(module)
        optimizer.register_step_post_hook(lambda *_: steps.append(module.global_step))
        return optimizer

    monkeypatch.setattr(example.Classifier, "configure_hyper_optimizer", recording)
    monkeypatch.setattr(example, "WARM_UP", 10)
    monkeypatch.setitem(example.ROWS, "distribution", example.ROWS["distribution"]._replace(hyper_every=5))
    monkeypatch.setattr(example, "TUNED", 0.6)
    rows = ["distribution_start", "distribution"]
    result = example.main(["--validation", "--rows", *rows, "--steps", "50", "--output", str(tmp_path)])
    assert steps == [15, 20, 25, 30]
    hits = [example.VALIDATION * result[name]["measured"] for name in rows]
    assert hits == pytest.approx([round(hit) for hit in hits], abs=0.02)  # parts of 3,300 test images would not be


def test_what_uses_a_learned_augmentation_comes_after_it(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["--rows", "distribution_700", "distribution"])
    assert "distribution_700 uses what distribution has learned" in capsys.readouterr().err


def test_cifar_is_read_from_its_files(example, tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, np.random.default_rng(0), "cifar10")
    # random images do not have the checksums of the real ones
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    split = example.load_data("cifar10", 0, tmp_path, download=False)
    assert [len(labels) for _, labels in split] == [160, 20, 20, 10]
    assert all(images.shape[1:] == (3, 32, 32) and images.max() <= 1.0 for images, _ in split)
    assert math.isclose(split.train[0].mean(), 0.5, abs_tol=0.01)

    monkeypatch.setattr(example, "WARM_UP", 0)
    arguments = ["--dataset", "cifar10", "--root", str(tmp_path), "--steps", "10", "--output", str(tmp_path)]
    result = example.main(arguments)
    assert all(entry["expected"] is None for entry in result.values())
    assert 10_000 < (tmp_path / "learned_augmentation.png").stat().st_size < 300_000


@pytest.fixture
def cost(example):
    return load("augmentation_cost")


def test_plain_and_augmented_stretches_take_turns_and_hyper_steps_end_the_augmented(cost, example, monkeypatch):
    """A clock that stands still but for augmentations and hyper steps."""
    clock = SimpleNamespace(now=0)

    def tick(seconds):
        clock.now += seconds

    class Ticking(example.RandomDistortion):
        def forward(self, images):
            tick(self.training)
            return super().forward(images)

    class Classifier(example.Classifier):
        def configure_hyper_optimizer(self):
            optimizer = super().configure_hyper_optimizer()
            optimizer.register_step_post_hook(lambda *_: tick(100))
            return optimizer

    cost.silence_lightning()
    monkeypatch.setattr(cost, "time", SimpleNamespace(process_time=lambda: clock.now))
    monkeypatch.setattr(cost, "Classifier", Classifier)
    monkeypatch.setattr(cost, "resnet18", lambda: example.network(3, 10))
    plain, augmented, *others = cost.seconds(Ticking(example.START), rounds=2, batch_size=2)
    assert plain == [0, 0]
    assert augmented[0] == 1
    assert 100 < augmented[1] < 120  # an iteration, and the evaluations of a hyper step
    assert others == [plain, augmented]


def test_costs_add_up(cost, monkeypatch, capsys):
    plain, augmented = [2.0, 2.0], [2.2, 32.2]
    monkeypatch.setattr(cost, "seconds", lambda *_: [plain, augmented, plain, augmented])
    result = cost.main(["--augmentations", "U-Net"])
    measured = {name: entry["measured"] for name, entry in result.items()}
    # in plain iterations: 1.1 for an augmented one, 15 for a hyper step; six tenths of a run make hyper steps
    assert measured == {
        "U-Net, iteration, every 5": 4.1,
        "U-Net, run, every 5": 2.9,
        "U-Net, iteration, every 10": 2.6,
        "U-Net, run, every 10": 2.0,
        "U-Net, iteration, every 15": 2.1,
        "U-Net, run, every 15": 1.7,
    }

import math
import pickle
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10

from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.hyperparameters import DistilledData
from tests.examples.test_all import load


def test_there_are_examples_of_each_class_in_order():
    images, labels = DistilledData((3, 4, 5), classes=3, per_class=2)()
    assert images.shape == (6, 3, 4, 5)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_only_the_images_are_tuned_and_the_labels_are_saved():
    data = DistilledData((2,), classes=3)
    assert [(name, p.requires_grad) for name, p in data.named_parameters()] == [("images", False)]
    assert set(data.state_dict()) == {"images", "labels"}


def test_noise_has_the_deviation_asked_for_and_comes_from_the_generator():
    first, again, other = (
        DistilledData((1000,), classes=10, initial=0.3, generator=torch.Generator().manual_seed(seed)).images
        for seed in (0, 0, 1)
    )
    # of 10,000 draws; standard error 0.3 / √20,000 = 0.002
    assert first.std().item() == pytest.approx(0.3, abs=0.01)
    assert first.mean().item() == pytest.approx(0.0, abs=0.015)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_within_bounds_lies_about_the_middle():
    images, _ = DistilledData((50,), classes=2, initial=0.0, bounds=(-1.0, 3.0))()
    assert torch.equal(images, torch.ones(2, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_from_a_copy_of_a_tensor(dtype):
    initial = torch.rand(2, 7, dtype=dtype)
    data = DistilledData((7,), classes=2, initial=initial)
    with torch.no_grad():
        data.images.add_(1.0)
    assert torch.equal(data()[0], initial + 1.0)
    assert data()[0].dtype == dtype


def test_a_tensor_within_bounds_is_kept_but_for_the_margin():
    initial = torch.tensor([[0.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
    images, _ = DistilledData((2,), classes=2, initial=initial, bounds=(0.0, 2.0))()
    assert torch.allclose(images, initial.clamp(0.02, 1.98))


def test_bounds_hold_whatever_the_parameter_is():
    data = DistilledData((3,), classes=1, bounds=(-0.5, 2.0))
    with torch.no_grad():
        data.images.copy_(torch.tensor([[-1e4, 0.0, 1e4]]))
    assert data()[0].tolist() == [[-0.5, 0.75, 2.0]]


@pytest.mark.parametrize("bounds", [None, (-2.0, 2.0)])
def test_hypergradient_of_the_images_is_exact_for_ridge_regression(bounds):
    """Against autograd through the closed form w = (XᵀX + I)⁻¹ Xᵀy."""
    generator = torch.Generator().manual_seed(0)
    initial = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    data = DistilledData((3,), classes=4, initial=initial, bounds=bounds)
    real, targets = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 3), (9,)))

    def solution():
        x, y = data()
        return torch.linalg.solve(x.T @ x + torch.eye(3, dtype=x.dtype), x.T @ y.double())

    def inner():
        x, y = data()
        return ((x @ w - y).square().sum() + w.square().sum()) / 2

    w = solution().requires_grad_()
    result = implicit_hypergradient(inner, lambda: (real @ w - targets).square().sum(), [w], [data.images])
    data.images.requires_grad_(True)
    (wanted,) = torch.autograd.grad((real @ solution() - targets).square().sum(), [data.images])
    assert torch.allclose(result.gradients[0], wanted, rtol=1e-5)  # the solver stops at 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DistilledData((2,), 0), "classes to be an integer >= 1, got 0"),
        (lambda: DistilledData((2,), 3, 0), "per_class to be an integer >= 1, got 0"),
        (lambda: DistilledData((2, 0), 3), r"positive sizes, got \(2, 0\)"),
        (lambda: DistilledData((2,), 3, initial=-1.0), "initial >= 0"),
        (lambda: DistilledData((2,), 3, initial=math.nan), "initial >= 0"),
        (lambda: DistilledData((2,), 3, bounds=(1.0, 1.0)), "lowest < highest"),
        (lambda: DistilledData((2,), 3, bounds=(0.0, math.inf)), "finite bounds"),
        (lambda: DistilledData((2,), 3, initial=torch.zeros(3, 1)), r"shape \(3, 2\), .* got \(3, 1\)"),
        (lambda: DistilledData((2,), 1, initial=torch.zeros(1, 2).long()), "floating-point"),
        (lambda: DistilledData((2,), 1, initial=torch.tensor([[0.0, math.nan]])), "finite values"),
        (lambda: DistilledData((1,), 1, initial=torch.tensor([[2.0]]), bounds=(0.0, 1.0)), "between 0.0 and 1.0"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ten_learned_images_are_worth_far_more_than_class_means(tmp_path, capsys):
    result = load("distill_dataset").main(["--seeds", "0", "--steps", "1000", "--output", str(tmp_path)])
    measured = {name: entry["measured"] for name, entry in result.items()}
    assert measured["distilled"] >= 0.86  # measured: 0.877; one test image of 1,000 is 0.001
    assert measured["distilled"] > measured["means"] + 0.04
    assert measured["means"] > measured["real"] + 0.2
    assert measured["all"] > measured["means"]


def test_fresh_regressions_do_not_depend_on_their_random_start():
    example = load("distill_dataset")
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(10, 1, 6, 6, generator=generator), torch.arange(10)
    real = torch.randn(50, 1, 6, 6, generator=generator)
    with torch.no_grad():
        first, second = (F.softmax(example.train((images, labels), 10, 1e-3, seed)(real), 1) for seed in (0, 1))
    # strictly convex; a gradient of 1e-6 over a decay of 1e-3 bounds the distance to the minimum by 1e-3
    assert torch.allclose(first, second, atol=2e-3)


def write_mnist(root, generator):
    """Idx files: magic number, sizes, bytes."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


def write_cifar(root, generator, name):
    """Pickled batches, as the python version of CIFAR has them."""
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    classes, key = (10, "labels") if ten else (100, "fine_labels")
    train = [f"data_batch_{number}" for number in range(1, 6)] if ten else ["train"]
    for file, count in [(file, 4 * classes) for file in train] + [("test_batch" if ten else "test", classes)]:
        pixels = generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        batch = {"data": pixels, key: [index % classes for index in range(count)]}
        (folder / file).write_bytes(pickle.dumps(batch))
    meta = {"label_names" if ten else "fine_label_names": [str(label) for label in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist", (1, 28, 28), (54, 6, 20)),
        ("cifar10", (3, 32, 32), (180, 20, 10)),
        ("cifar100", (3, 32, 32), (360, 40, 100)),
    ],
)
def test_other_data_sets_are_read_from_their_files(name, shape, sizes, tmp_path, monkeypatch, capsys):
    example = load("distill_dataset")
    generator = np.random.default_rng(0)
    if name == "mnist":
        write_mnist(tmp_path, generator)
    else:
        write_cifar(tmp_path, generator, name)
        # random images do not have the checksums of the real ones
        monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    split = example.load_data(name, 0, tmp_path, download=False)
    assert tuple(len(labels) for _, labels in split) == sizes
    assert all(images.shape[1:] == shape for images, _ in split)
    deviation, center = torch.std_mean(split.outer[0])
    assert (deviation.item(), center.item()) == pytest.approx((1.0, 0.0), abs=1e-4)

    arguments = ["--dataset", name, "--root", str(tmp_path), "--seeds", "0", "--steps", "5", "--output", str(tmp_path)]
    monkeypatch.setattr(example, "GRID", (1e-3,))
    result = example.main(arguments)
    assert all(entry["expected"] is None for entry in result.values())
    assert 10_000 < (tmp_path / "distill_dataset.png").stat().st_size < 300_000


def test_pixels_and_channels_of_color_images_stay_in_place():
    example = load("distill_dataset")
    data = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    images, labels = example.channels_first(data, [1, 0])
    assert images.shape == (2, 3, 4, 5)
    assert images[1, 2, 3, 4] == data[1, 3, 4, 2]
    assert labels.tolist() == [1, 0]

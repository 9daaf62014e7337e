import math

import pytest
import torch

from lightning_ifthpo import implicit_hypergradient
from lightning_ifthpo.hyperparameters import DistilledData


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

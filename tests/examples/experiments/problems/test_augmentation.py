import pytest
import torch
import torch.nn.functional as F

from examples.experiments.problems import augmentation


@pytest.fixture
def images():
    """Three images of one channel, zero near the border."""
    return F.pad(torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), (6, 6, 6, 6))


def distortion(name, strength):
    """One kind of distortion alone."""
    return augmentation.RandomDistortion(strength if name == other else 0.0 for other in augmentation.STRENGTHS)


@pytest.mark.parametrize("name", ["distortions", "displacements", "U-Net"])
def test_images_change_in_training_mode_only(name, images):
    augment = augmentation.AUGMENTATIONS[name](1)
    if name == "U-Net":
        torch.nn.init.normal_(augment.last.weight)  # it starts as the identity
    first, second = augment(images), augment(images)
    assert first.shape == images.shape
    assert not torch.equal(first, second)
    assert torch.equal(augment.eval()(images), images)


def test_strengths_start_where_they_should():
    strengths = augmentation.RandomDistortion(augmentation.START).strengths()
    assert torch.allclose(strengths, torch.tensor(augmentation.START))


def test_the_overall_strength_moves_all_of_them():
    augment = augmentation.RandomDistortion(augmentation.START)
    augment.overall.fill_(0.4)
    start, moved = (torch.logit(s / augment.bounds) for s in (torch.tensor(augmentation.START), augment.strengths()))
    assert torch.allclose(moved - start, torch.full((6,), 0.4 * augmentation.SHARED), atol=1e-4)


def test_without_strength_images_stay_as_they_are(images):
    distorted = augmentation.RandomDistortion([0.0] * 6)(images)
    # a strength of zero is 1e-4 of its bound, which moves nothing by more than a hundredth of a pixel
    assert torch.allclose(distorted, images, atol=0.02)


def test_noise_has_its_strength():
    noise = distortion("noise", 0.2)(torch.zeros(20, 1, 28, 28))
    # of 15,680 draws; standard error 0.2 / √31,360 = 0.0011
    assert noise.std().item() == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("name", "deviations"),
    [("rotation", (0.0, 0.05)), ("scale", (0.05, 0.0)), ("shear", (0.0, 0.0)), ("translation", (0.1, 0.1))],
)
def test_a_strength_of_a_tenth_moves_a_point_as_it_should(name, deviations):
    """Deviations of the center of mass of a spot at (x, y) = (0.5, 0), in halves of the image."""
    torch.manual_seed(0)
    side, count = 64, 2000
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side * 2 - 1] * 2, indexing="ij")
    spot = torch.exp(-((x - 0.5) ** 2 + y**2) / 0.005).expand(count, 1, side, side)
    moved = distortion(name, 0.1)(spot)
    mass = moved.sum((1, 2, 3))
    measured = [((moved * place).sum((1, 2, 3)) / mass).std().item() for place in (x, y)]
    # standard error 1.6 % of 2,000 draws, and second order in the strength
    assert measured == pytest.approx(deviations, rel=0.1, abs=0.005)


def test_displacements_stay_within_their_bound():
    network = augmentation.DisplacementNetwork(1)
    network.net[-1].weight.data.mul_(1e6)  # tanh is ±1 everywhere
    ramp = torch.linspace(-1, 1, 28).expand(4, 1, 28, 28)
    # bicubic interpolation overshoots by at most a quarter in each direction; beyond the border all is zero
    assert (network(ramp) - ramp)[..., 10:18, 10:18].abs().max() <= 1.25 * 1.25 * augmentation.LARGEST_DISPLACEMENT

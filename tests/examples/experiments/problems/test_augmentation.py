import pytest
import torch
import torch.nn.functional as F

from examples.experiments.problems import augmentation


@pytest.fixture
def images():
    """Three images of one channel, zero near the border."""
    return F.pad(torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), (6, 6, 6, 6))


@pytest.mark.parametrize("name", ["distortions", "displacements", "U-Net"])
def test_images_change_in_training_mode_only(name, images):
    augment = augmentation.AUGMENTATIONS[name](1)
    if name == "U-Net":
        torch.nn.init.normal_(augment.last.weight)  # it starts as the identity
    first, second = augment(images), augment(images)
    assert first.shape == images.shape
    assert not torch.equal(first, second)
    assert torch.equal(augment.eval()(images), images)


def test_displacements_stay_within_their_bound():
    network = augmentation.DisplacementNetwork(1)
    network.net[-1].weight.data.mul_(1e6)  # tanh is ±1 everywhere
    ramp = torch.linspace(-1, 1, 28).expand(4, 1, 28, 28)
    # bicubic interpolation overshoots by at most a quarter in each direction; beyond the border all is zero
    assert (network(ramp) - ramp)[..., 10:18, 10:18].abs().max() <= 1.25 * 1.25 * augmentation.LARGEST_DISPLACEMENT

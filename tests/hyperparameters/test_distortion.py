"""Random distortions of images."""

import pytest
import torch
import torch.nn.functional as F

from lightning_ifthpo.hyperparameters import RandomDistortion
from tests.helpers.device import DEVICE
from tests.helpers.hyperparameters import EXTREMES, fill

DEFAULT = ["rotation", "scale", "shear", "translation", "elastic", "noise"]
ALL = list(RandomDistortion.initial_widths)


def spot(count, height=64, width=64):
    """A spot at (x, y) = (0.5, 0) in halves of the image's width, and the coordinates of its pixels."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    y, x = (y - height / 2) / (width / 2), (x - width / 2) / (width / 2)
    image = torch.exp(-((x - 0.5) ** 2 + y**2) / 0.005)
    return image.expand(count, 1, height, width), x, y


def centers(images, x, y):
    """Centers of mass, two tensors [B]."""
    mass = images.sum((1, 2, 3))
    return [(images * place).sum((1, 2, 3)) / mass for place in (x, y)]


@pytest.mark.parametrize(
    ("kind", "width", "deviations"),
    [
        ("rotation", 5.73, (0.0, 0.05)),  # 0.1 radians
        ("scale", 0.1, (0.05, 0.0)),
        ("shear", 0.1, (0.0, 0.0)),
        ("translation", 0.05, (0.1, 0.1)),
    ],
)
def test_a_width_moves_a_point_as_it_should(kind, width, deviations):
    images, x, y = spot(2000)
    moved = centers(RandomDistortion({kind: width})(images), x, y)
    # standard error 1.6 % of 2,000 draws, and second order in the width
    assert [places.std().item() for places in moved] == pytest.approx(deviations, rel=0.1, abs=0.005)


def test_shear_displaces_by_a_fraction_of_the_height():
    images, x, y = spot(2000)
    x, y = y.mT, x.mT  # the spot is now at (0, 0.5)
    moved = centers(RandomDistortion({"shear": 0.1})(images.mT.contiguous()), x.contiguous(), y.contiguous())
    assert [places.std().item() for places in moved] == pytest.approx((0.05, 0.0), rel=0.1, abs=0.005)


def test_elastic_displacements_have_their_width_and_differ_within_an_image():
    ramp = torch.linspace(-1, 1, 64).expand(1000, 1, 64, 64)
    moved = RandomDistortion({"elastic": 0.05})(ramp) - ramp
    at_node, other = moved[:, 0, 24, 24], moved[:, 0, 40, 40]  # nodes of the grid lie at odd multiples of 8
    # a fraction of 0.05 of the side is 0.1 on the ramp; the standard error is 2.2 %, of pixels beside the node less
    assert at_node.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([at_node, other]))[0, 1].item()) < 5 / 1000**0.5


def test_rotations_are_rotations_of_images_that_are_not_square():
    images, x, y = spot(200, 96, 64)
    x_new, y_new = centers(RandomDistortion({"rotation": 20.0})(images), x, y)
    kept = (y_new.abs() < 1.2) & (x_new > -0.6)  # away from the border
    # the distance from the center stays; the spot has a deviation of 0.05, and pixels a size of 0.03
    assert (x_new**2 + y_new**2)[kept].sqrt().tolist() == pytest.approx([0.5] * int(kept.sum()), abs=0.01)
    assert y_new.std() > 0.1


def test_contrast_and_brightness_change_deviation_and_mean_of_pixels():
    images = torch.rand(1, 3, 8, 8).expand(4000, -1, -1, -1)
    contrast = RandomDistortion({"contrast": 0.2})(images)
    factor = contrast.std((1, 2, 3)) / images.std((1, 2, 3))
    assert factor.log().std().item() == pytest.approx(0.2, rel=0.06)  # five standard errors, 1.1 % of 4,000 draws
    assert torch.allclose(contrast.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-5)
    added = RandomDistortion({"brightness": 0.2})(images) - images
    assert added[:, 0, 0, 0].std().item() == pytest.approx(0.2, rel=0.06)
    assert added.std((1, 2, 3)).max() < 1e-6


def test_noise_has_its_width():
    noise = RandomDistortion({"noise": 0.2})(torch.zeros(20, 1, 28, 28))
    # of 15,680 draws; standard error 0.2 / √31,360 = 0.0011
    assert noise.std().item() == pytest.approx(0.2, abs=0.005)


def test_padding_says_what_lies_beyond_the_border():
    distort, images = RandomDistortion({"translation": 0.1}), torch.ones(50, 1, 8, 8)
    assert distort(images).min() < 0.9
    for padding in ("border", "reflection"):
        distort = RandomDistortion({"translation": 0.1}, padding=padding)
        assert torch.allclose(distort(images), images)
    ramp = torch.arange(8.0).expand(50, 1, 8, 8)
    torch.manual_seed(0)
    reflected = distort(ramp)
    torch.manual_seed(0)
    assert not torch.allclose(reflected, RandomDistortion({"translation": 0.1}, padding="border")(ramp))


def test_widths_start_where_they_should_and_start_again_from_tuned_ones():
    distort = RandomDistortion()
    assert list(distort.natural_values()) == DEFAULT
    for kind, width in distort.natural_values().items():
        assert float(width) == pytest.approx(RandomDistortion.initial_widths[kind])
    assert list(RandomDistortion(["noise", "rotation"]).natural_values()) == ["noise", "rotation"]
    fill(distort, 0.1)
    again = RandomDistortion(distort.natural_values())
    assert torch.allclose(again.logits, torch.full((6,), 0.35), atol=1e-5)  # 0.1 + 2.5 · 0.1


def test_what_all_widths_share_moves_all_of_them_2_5_times_as_far():
    distort = RandomDistortion(ALL)
    with torch.no_grad():
        distort.shared.fill_(0.4)
    for kind, width in distort.natural_values().items():
        start, top = RandomDistortion.initial_widths[kind], distort.maximum[kind]
        moved = torch.logit(width / top) - torch.logit(torch.tensor(start / top))
        assert float(moved) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_widths_stay_below_their_maximum(extreme):
    distort = RandomDistortion(ALL, maximum={"rotation": 10.0, "noise": 0.1})
    assert distort.maximum["rotation"] == 10.0
    assert distort.maximum["shear"] == RandomDistortion.maximum_widths["shear"]
    fill(distort, extreme)
    widths = distort.natural_values()
    eps = torch.finfo(torch.float32).eps  # a bound such as 0.1 is rounded
    assert all(0.0 <= float(width) <= distort.maximum[kind] * (1.0 + eps) for kind, width in widths.items())
    if extreme == 1e4:
        assert float(widths["rotation"]) == 10.0
        assert float(widths["noise"]) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_has_a_gradient_and_changes_images_in_training_mode_only(kind):
    distort = RandomDistortion([kind]).requires_grad_(True)
    images = torch.rand(3, 2, 9, 6)
    changed = distort(images)
    assert changed.shape == images.shape
    gradients = torch.autograd.grad((changed * torch.randn_like(images)).sum(), [distort.logits, distort.shared])
    assert all(bool(gradient.any()) for gradient in gradients)
    assert not torch.equal(distort(images), changed)
    assert distort.eval()(images) is images


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (28, 27)], ids=str)
def test_images_of_any_size_and_number_of_channels(size):
    images = torch.rand(2, 5, *size)
    changed = RandomDistortion(ALL)(images)
    assert changed.shape == images.shape
    assert bool(changed.isfinite().all())


def test_random_numbers_are_those_of_torch():
    distort, images = RandomDistortion(ALL), torch.rand(2, 1, 8, 8)
    torch.manual_seed(3)
    first = distort(images)
    torch.manual_seed(3)
    assert torch.equal(distort(images), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_places_are_those_of_single_precision(dtype):
    distort, images = RandomDistortion(["rotation", "translation"]), torch.rand(2, 1, 64, 64)
    torch.manual_seed(3)
    single = distort(images.to(dtype).float())
    torch.manual_seed(3)
    half = distort(images.to(dtype))
    assert half.dtype == dtype
    # images between 0 and 1 are rounded by half an epsilon
    assert torch.allclose(half.float(), single, atol=torch.finfo(dtype).eps)


def test_autocast_does_not_move_places():
    distort, images = RandomDistortion(DEFAULT[:5]).to(DEVICE), torch.rand(2, 1, 64, 64, device=DEVICE)
    torch.manual_seed(3)
    single = distort(images)
    torch.manual_seed(3)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        mixed = distort(images)
    assert torch.allclose(mixed, single)


def test_small_widths_hardly_change_images():
    # zero near the border, so that nothing leaves the image
    images = F.pad(torch.rand(3, 1, 16, 16), (6, 6, 6, 6))
    distort = RandomDistortion(ALL)
    fill(distort, -30.0)
    assert torch.allclose(distort(images), images, atol=1e-5)


def test_repr_shows_kinds_and_bounds():
    assert repr(RandomDistortion(["rotation", "noise"])) == "RandomDistortion(rotation < 45, noise < 0.5)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RandomDistortion(["rotate"]), ValueError, r"among rotation, .*brightness, got \['rotate'\]"),
        (lambda: RandomDistortion("noise"), ValueError, "kinds of distortions among .* got 'noise'"),
        (lambda: RandomDistortion([]), ValueError, r"kinds of distortions among .* got \[\]"),
        (lambda: RandomDistortion(maximum={"blur": 1.0}), ValueError, "got .* and maximum={'blur': 1.0}"),
        (lambda: RandomDistortion({"noise": 0.0}), ValueError, "0 < initial < maximum < inf, got initial=0.0"),
        (lambda: RandomDistortion({"noise": 0.5}), ValueError, "0 < initial < maximum < inf, got initial=0.5"),
        (lambda: RandomDistortion(padding="wrap"), ValueError, "padding to be one of"),
        (lambda: RandomDistortion()(torch.rand(3, 8, 8)), ValueError, r"\[B, C, H, W\], got \(3, 8, 8\)"),
        (lambda: RandomDistortion()(torch.ones(1, 3, 8, 8).byte()), TypeError, "got torch.uint8; divide bytes by 255"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()

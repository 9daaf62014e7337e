"""Input noise and the augmentation network."""

import math

import pytest
import torch

from lightning_ifthpo.hyperparameters import AugmentationNetwork, InputNoise
from tests.helpers.hyperparameters import EXTREMES, disturb, fill, float64, small_augmentation

# InputNoise


def test_noise_has_the_scales_asked_for():
    noise = InputNoise((2, 1), initial=0.1)
    with torch.no_grad():
        noise.logits[1] = 0.0
    x = torch.randn(100, 2, 1000)
    difference = noise(x) - x
    # 100,000 draws know their standard deviation to 1/√200,000 = 0.22 %; five of these
    assert difference.std(dim=(0, 2)).tolist() == pytest.approx([0.1, 0.5], rel=0.011)
    assert difference.mean().abs() < 5 * 0.5 / math.sqrt(200_000)


def test_noise_is_drawn_anew_and_from_the_random_state_of_torch():
    noise, x = InputNoise(), torch.zeros(8)
    torch.manual_seed(3)
    first, second = noise(x), noise(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(noise(x), first)
    torch.manual_seed(3)
    assert torch.allclose(first, 0.1 * torch.randn(8))


def test_squared_error_with_noise_is_ridge_regression():
    # Bishop 1995: E[((x + s ε)ᵀw − y)²] = (xᵀw − y)² + s² ‖w‖², so that its derivative by s is 2 s ‖w‖²
    noise, w = InputNoise(initial=0.5).requires_grad_(True), torch.tensor([1.0, -2.0])
    loss = (noise(torch.zeros(400_000, 2)) @ w).square().mean()
    (gradient,) = torch.autograd.grad(loss, noise.logits)
    # the variance of χ²₁ is two: a relative error of √(2 / 400,000) = 0.22 %; five of these
    assert loss.item() == pytest.approx(0.25 * 5, rel=0.011)
    assert gradient.item() == pytest.approx(2 * 0.5 * 5 * 0.25, rel=0.011)  # ds/dλ = s (1 − s) = 0.25


@pytest.mark.parametrize("extreme", EXTREMES)
def test_noise_scales_stay_in_their_range(extreme):
    noise = InputNoise((3,), maximum=2.0)
    assert noise.natural_values().tolist() == pytest.approx([0.1] * 3)
    fill(noise, extreme)
    assert all(0.0 <= scale <= 2.0 for scale in noise.natural_values().tolist())
    if extreme == 1e4:
        assert noise.natural_values().tolist() == [2.0] * 3


def test_noise_keeps_the_dtype_of_its_input():
    assert InputNoise((3, 1))(torch.zeros(2, 3, 4, dtype=torch.float16)).dtype == torch.float16


# AugmentationNetwork


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 7), (8, 8), (28, 27)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_augmentation_starts_as_the_identity_at_any_size(size, batch):
    x = torch.randn(batch, 3, *size)
    augment = AugmentationNetwork(3, width=2)
    assert torch.equal(augment(x), x)
    changed = disturb(augment)(x)
    assert changed.shape == x.shape
    assert bool((changed != x).any())


def test_at_the_identity_the_last_convolution_has_a_gradient():
    augment = small_augmentation().requires_grad_(True)
    loss = (augment(torch.randn(2, 1, 4, 4)) * torch.randn(2, 1, 4, 4)).sum()
    gradients = torch.autograd.grad(loss, [augment.last.weight, augment.last.bias])
    assert all(bool(gradient.all()) for gradient in gradients)


@pytest.mark.parametrize("extreme", [1e4, -1e4, "random"])
@pytest.mark.parametrize("maximum", [1.0, 0.25])
def test_no_pixel_moves_by_more_than_the_maximum(extreme, maximum):
    augment, x = AugmentationNetwork(2, maximum=maximum), torch.randn(2, 2, 9, 6)
    if extreme == "random":
        disturb(augment, scale=1e4)
    else:
        fill(augment, extreme)
    change = (augment(x) - x).abs().max().item()
    assert change == pytest.approx(maximum, abs=1e-6)


@pytest.mark.parametrize(("depth", "size"), [(1, (5, 4)), (2, (3, 2)), (3, (2, 1))])
def test_each_level_halves_the_resolution_and_doubles_the_channels(depth, size):
    augment, seen = AugmentationNetwork(1, width=4, depth=depth), []
    augment.down[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    augment(torch.randn(2, 1, 9, 7))
    assert seen == [(2, 4 * 2**depth, *size)]
    assert len(augment.up) == depth


def test_fine_features_pass_by_the_coarse_ones():
    augment, x = disturb(small_augmentation(noise_channels=0)), torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        augment.down[0][1].weight.zero_()  # what comes from below says nothing of the image
        first = augment(x) - x
        second = augment(2 * x.flip(-1)) - 2 * x.flip(-1)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("noise_channels", [0, 1, 3])
def test_noise_channels_make_versions_of_one_image(noise_channels):
    augment = disturb(small_augmentation(noise_channels=noise_channels))
    assert augment.first[0].in_channels == 1 + noise_channels
    one, other = augment(torch.ones(2, 1, 6, 6))
    assert torch.allclose(one, other) == (noise_channels == 0)


def test_noise_channels_are_standard_normal_beside_the_image():
    augment, seen, x = small_augmentation(noise_channels=2), [], torch.randn(10, 1, 100, 100)
    augment.first.register_forward_hook(lambda module, inputs, output: seen.append(*inputs))
    augment(x)
    assert torch.equal(seen[0][:, :1], x)
    # 200,000 draws know mean and standard deviation to 0.22 % and 0.16 %; five of these
    assert seen[0][:, 1:].mean().item() == pytest.approx(0.0, abs=0.011)
    assert seen[0][:, 1:].std().item() == pytest.approx(1.0, abs=0.008)


def test_activations_have_a_second_derivative():
    block = small_augmentation().first
    shift = block[1].bias.requires_grad_()  # enters the activation linearly
    (first,) = torch.autograd.grad(block(torch.randn(1, 2, 3, 3)).sum(), shift, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), shift)
    assert bool(second.all())


def test_no_image_sees_another():
    augment = disturb(small_augmentation(noise_channels=0).double())
    x = float64(3, 1, 5, 5)
    assert torch.allclose(augment(x)[:1], augment(x[:1]))


@pytest.mark.parametrize("make", [lambda: InputNoise(initial=0.5), small_augmentation], ids=["noise", "network"])
def test_inputs_change_in_training_mode_only(make):
    module, x = disturb(make()), torch.randn(2, 1, 4, 4)
    assert not torch.equal(module(x), x)
    state = torch.get_rng_state()
    assert module.eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(module.train()(x), x)


def test_gray_images_are_the_default():
    assert AugmentationNetwork()(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: InputNoise(initial=0.0), ValueError, "0 < initial < maximum < inf"),
        (lambda: InputNoise(initial=1.0), ValueError, "0 < initial < maximum < inf"),
        (lambda: InputNoise(maximum=math.inf), ValueError, "0 < initial < maximum < inf"),
        (lambda: InputNoise((3, 0)), ValueError, "positive sizes"),
        (lambda: InputNoise((3,))(torch.ones(2, 1)), ValueError, r"\(3,\) do not broadcast .* \(2, 1\)"),
        (lambda: InputNoise((1, 3))(torch.ones(3)), ValueError, r"\(1, 3\) do not broadcast .* \(3,\)"),
        (lambda: InputNoise()(torch.ones(3).byte()), TypeError, "floating-point input, got torch.uint8"),
        (lambda: AugmentationNetwork(0), ValueError, "channels to be an integer >= 1, got 0"),
        (lambda: AugmentationNetwork(1, width=1), ValueError, "width to be an integer >= 2, got 1"),
        (lambda: AugmentationNetwork(1, depth=0), ValueError, "depth to be an integer >= 1, got 0"),
        (lambda: AugmentationNetwork(1, noise_channels=-1), ValueError, "noise_channels to be an integer >= 0, got -1"),
        (lambda: AugmentationNetwork(1, maximum=0.0), ValueError, "0 < maximum < inf, got 0.0"),
        (lambda: AugmentationNetwork(1)(torch.ones(2, 3, 4, 4)), ValueError, r"\[B, 1, H, W\], got \(2, 3, 4, 4\)"),
        (lambda: AugmentationNetwork(1)(torch.ones(1, 4, 4)), ValueError, r"\[B, 1, H, W\], got \(1, 4, 4\)"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()

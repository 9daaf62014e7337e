"""Loss weights, label smoothing, input noise and the augmentation network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import AugmentationNetwork, InputNoise, LabelSmoothing, LossWeights
from tests.trainers import Classifier, quiet_trainer

EXTREMES = (-1e4, -30.0, 0.0, 30.0, 1e4)


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def disturb(module, scale=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def small_augmentation(**options):
    return AugmentationNetwork(1, **({"width": 2, "depth": 1} | options))


CASES = {
    "LossWeights": (lambda: LossWeights(3), lambda: float64(3)),
    "LabelSmoothing": (lambda: LabelSmoothing(3, initial=0.1), lambda: torch.tensor([0, 2, 2, 1])),
    "LabelSmoothing per class": (lambda: LabelSmoothing(3, per_class=True), lambda: torch.tensor([0, 2, 2, 1])),
    "InputNoise": (lambda: InputNoise(initial=0.3), lambda: float64(5, 4)),
    "InputNoise per feature": (lambda: InputNoise((4,)), lambda: float64(5, 4)),
    "AugmentationNetwork": (small_augmentation, lambda: float64(2, 1, 3, 5)),
}


def loss_of(module, value, w):
    """A loss that depends on the weights w: [4, 3] and on the hyperparameters, and on both at once."""
    if isinstance(module, LossWeights):
        return module(value * w.sin().sum(0))
    if isinstance(module, LabelSmoothing):
        return F.cross_entropy(w, module(value))
    features = module(value)
    if features.ndim == 4:
        features = features.flatten(1)[:, :4]
    return (features @ w).tanh().square().mean()


@pytest.fixture(params=CASES)
def case(request):
    make, value = CASES[request.param]
    return make, value()


# What all of them promise


def test_parameters_start_frozen_and_all_receive_a_gradient(case):
    make, value = case
    module = disturb(make().double())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    module.requires_grad_(True)
    gradients = torch.autograd.grad(loss_of(module, value, float64(4, 3)), list(module.parameters()))
    assert all(bool(gradient.any()) for gradient in gradients)


def test_gradients_and_mixed_derivatives(case):
    make, value = case
    module = disturb(make().double())
    names = [name for name, _ in module.named_parameters()]
    inputs = [p.detach().clone().requires_grad_() for p in (*module.parameters(), float64(4, 3))]

    def loss(*tensors):
        torch.manual_seed(1)
        wrapped = Wrapped(module)
        parameters = {f"module.{name}": tensor for name, tensor in zip(names, tensors[:-1], strict=True)}
        return functional_call(wrapped, parameters, (value, tensors[-1]))

    # fast mode compares along random directions: one network has hundreds of parameters
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=len(inputs) > 2)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=len(inputs) > 2)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, value, w):
        return loss_of(self.module, value, w)


def test_the_mixed_derivative_is_not_zero(case):
    make, value = case
    module = disturb(make().double()).requires_grad_(True)
    w = float64(4, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(module, value, w), w, create_graph=True)
    mixed = torch.autograd.grad((gradient * float64(4, 3)).sum(), list(module.parameters()))
    assert all(bool(block.any()) for block in mixed)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_loss_and_derivatives_are_finite_whatever_the_hyperparameters_are(case, extreme):
    make, value = case
    module = make().requires_grad_(True)
    value = value.float() if value.is_floating_point() else value
    fill(module, extreme)
    w = torch.randn(4, 3, requires_grad=True)
    loss = loss_of(module, value, w)
    by_weights, *direct = torch.autograd.grad(loss, [w, *module.parameters()], create_graph=True)
    mixed = torch.autograd.grad((by_weights * torch.randn(4, 3)).sum(), list(module.parameters()))
    assert all(bool(tensor.isfinite().all()) for tensor in (loss, by_weights, *direct, *mixed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_has_the_dtype_of_the_module(case, dtype):
    make, value = case
    value = value.to(dtype) if value.is_floating_point() else value
    assert make().to(dtype)(value).dtype == dtype


@pytest.mark.parametrize(
    "device",
    [
        "meta",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
        ),
    ],
)
def test_output_is_on_the_device_of_the_module(case, device):
    make, value = case
    assert make().double().to(device)(value.to(device)).device.type == device


def test_state_dict_round_trip(case):
    make, value = case
    saved, loaded = disturb(make().double()), make().double()
    loaded.load_state_dict(saved.state_dict())
    outputs = []
    for module in (saved, loaded):
        torch.manual_seed(2)
        outputs.append(module(value))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("make", [lambda: LossWeights(3), lambda: LabelSmoothing(3)], ids=["weights", "smoothing"])
def test_what_belongs_to_the_loss_does_not_depend_on_the_mode(make):
    module, value = make(), torch.tensor([0, 1, 2])
    assert torch.equal(module.train()(value), module.eval()(value))


# LossWeights


def test_loss_weights_start_at_one():
    assert LossWeights(3).weights().tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert float(LossWeights(3)(torch.tensor([1.0, 2.0, 4.0]))) == pytest.approx(7.0)


def test_loss_weights_are_a_softmax_that_sums_to_their_number():
    weights = LossWeights(3)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([1.0, 2.0, 4.0]).log())
    assert weights.weights().tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7])
    assert float(weights(torch.tensor([1.0, 10.0, 100.0]))) == pytest.approx((3 + 60 + 1200) / 7)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_loss_weights_stay_between_zero_and_their_number(extreme):
    weights = LossWeights(3)
    with torch.no_grad():
        weights.logits[1] = extreme
    values = weights.weights()
    assert bool((values >= 0).all())
    assert values.sum().item() == pytest.approx(3.0)


def test_a_common_factor_of_all_terms_is_no_hyperparameter():
    weights, losses = LossWeights(3).requires_grad_(True), torch.tensor([1.0, 2.0, 6.0])
    (gradient,) = torch.autograd.grad(weights(losses), weights.logits)
    assert gradient.tolist() == pytest.approx([-2.0, -1.0, 3.0])  # each loss less their mean
    with torch.no_grad():
        weights.logits.add_(5.0)
    assert weights.weights().tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_losses_may_be_a_vector_a_sequence_or_named():
    weights = disturb(LossWeights(["a", "b"]))
    a, b = torch.tensor(2.0), torch.tensor(5.0)
    wanted = weights(torch.stack([a, b]))
    assert torch.equal(weights([a, b]), wanted)
    assert torch.equal(weights((a, b)), wanted)
    assert torch.equal(weights({"b": b, "a": a}), wanted)
    assert weights.names == ("a", "b")
    assert wanted.shape == ()


# LabelSmoothing


def test_label_smoothing_is_that_of_cross_entropy():
    logits, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 3, 1])
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.2)
    assert torch.allclose(F.cross_entropy(logits, LabelSmoothing(4, initial=0.2)(targets)), wanted)


def test_label_smoothing_of_each_class():
    smoothing = LabelSmoothing(3, per_class=True, initial=0.1, maximum=0.4)
    with torch.no_grad():
        smoothing.logits[2] = 0.0  # half of the maximum
    wanted = [[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3], [0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3]]
    assert torch.allclose(smoothing(torch.tensor([0, 2])), torch.tensor(wanted))
    assert smoothing.smoothing().tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert LabelSmoothing(3).smoothing().tolist() == pytest.approx([0.01])


@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("maximum", [0.3, 1.0])
def test_smoothed_targets_stay_distributions(extreme, maximum):
    smoothing = LabelSmoothing(3, maximum=maximum)
    fill(smoothing, extreme)
    targets = smoothing(torch.tensor([0, 1, 2]))
    assert targets.sum(1).tolist() == pytest.approx([1.0] * 3)
    assert bool((targets >= 0).all())
    assert bool((targets.diagonal() >= 1 - maximum + maximum / 3 - 1e-6).all())
    if extreme == 1e4:
        assert float(smoothing.smoothing()) == pytest.approx(maximum)


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
    assert noise.scales().tolist() == pytest.approx([0.1] * 3)
    fill(noise, extreme)
    assert all(0.0 <= scale <= 2.0 for scale in noise.scales().tolist())
    if extreme == 1e4:
        assert noise.scales().tolist() == [2.0] * 3


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


# Bad arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LossWeights(1), ValueError, "at least two terms, got 1"),
        (lambda: LossWeights(["a"]), ValueError, "at least two terms, got 1"),
        (lambda: LossWeights(["a", "a"]), ValueError, "distinct names"),
        (lambda: LossWeights("ab"), TypeError, "a list of names, got 'ab'"),
        (lambda: LossWeights(2)(torch.ones(3)), ValueError, r"expected 2 scalar losses, got shape \(3,\)"),
        (lambda: LossWeights(2)(torch.tensor(1.0)), ValueError, r"expected 2 scalar losses, got shape \(\)"),
        (lambda: LossWeights(2)([torch.ones(3)] * 2), ValueError, r"expected 2 scalar losses, got shape \(2, 3\)"),
        (lambda: LossWeights(["a", "b"])({"a": torch.tensor(1.0)}), ValueError, r"named \('a', 'b'\), got \('a',\)"),
        (lambda: LossWeights(2)({"a": torch.tensor(1.0)}), ValueError, r"named \(\), got \('a',\)"),
        (lambda: LabelSmoothing(1), ValueError, "classes to be an integer >= 2, got 1"),
        (lambda: LabelSmoothing(3, initial=0.0), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3, initial=0.5), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3, maximum=1.5), ValueError, "0 < initial < maximum <= 1"),
        (lambda: LabelSmoothing(3)(torch.zeros(2, 2).long()), ValueError, r"shape \[B\], got \(2, 2\)"),
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


# In a Trainer


class WithLossWeights(Classifier):
    def __init__(self):
        super().__init__()
        self.register_hyperparameter("own", self.tuned())

    def inner_loss(self, batch):
        return self.loss(*batch) + self.decay()

    def configure_hyper_optimizer(self):
        return torch.optim.Adam(self.own.parameters(), lr=self.hyper_lr)

    def tuned(self):
        return LossWeights(["right", "wrong"])

    def loss(self, x, y):
        logits = self.mark_outputs(self.net(x))
        return self.own({"right": F.cross_entropy(logits, y), "wrong": F.cross_entropy(logits, (y + 1) % 3)})


class WithLabelSmoothing(WithLossWeights):
    def tuned(self):
        return LabelSmoothing(3, per_class=True)

    def loss(self, x, y):
        return F.cross_entropy(self.mark_outputs(self.net(x)), self.own(y))


class WithInputNoise(WithLossWeights):
    def tuned(self):
        return InputNoise((4,))

    def loss(self, x, y):
        return F.cross_entropy(self.mark_outputs(self.net(self.own(x))), y)


class WithAugmentationNetwork(WithLossWeights):
    def tuned(self):
        return small_augmentation()

    def loss(self, x, y):
        images = self.own(x.view(-1, 1, 2, 2))
        return F.cross_entropy(self.mark_outputs(self.net(images.flatten(1))), y)


MODULES = [WithLossWeights, WithLabelSmoothing, WithInputNoise, WithAugmentationNetwork]


@pytest.mark.parametrize("make", MODULES)
def test_a_module_trains_and_every_hyperparameter_moves(make):
    module = make()
    before = {name: parameter.clone() for name, parameter in module.own.named_parameters()}
    trainer = quiet_trainer(max_epochs=2, callbacks=[IFTHypergradient(1, on_failure="raise")])
    trainer.fit(module)
    assert trainer.callback_metrics["hypergrad/skipped"] == 0
    for name, parameter in module.own.named_parameters():
        assert bool((parameter != before[name]).any()), name
        assert not parameter.requires_grad
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_the_weight_of_a_wrong_term_falls():
    module = WithLossWeights()
    quiet_trainer(max_epochs=5, callbacks=[IFTHypergradient(1)]).fit(module)
    right, wrong = module.own.weights().tolist()
    assert wrong < 0.8 < 1.2 < right


@pytest.mark.parametrize("make", MODULES)
def test_training_stays_finite_whatever_the_hyper_optimizer_does(make):
    module = make()
    module.hyper_lr = 1e3
    quiet_trainer(max_epochs=5, callbacks=[IFTHypergradient(1, on_failure="use")]).fit(module)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def test_gray_images_are_the_default():
    assert AugmentationNetwork()(torch.zeros(1, 1, 4, 4)).shape == (1, 1, 4, 4)

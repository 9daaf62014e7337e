"""What all ready-made hyperparameters promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import (
    Anchor,
    ClassWeights,
    Dropout,
    FocalGamma,
    InputNoise,
    LabelSmoothing,
    LabelTransition,
    LogitAdjustment,
    LoRAGates,
    LossWeights,
    Mixup,
    RandomDistortion,
    SoftLabels,
    Temperature,
    WeightNetwork,
)
from tests.helpers.device import DEVICE
from tests.helpers.hyperparameters import EXTREMES, disturb, fill, float64, small_augmentation
from tests.helpers.trainers import Classifier, quiet_trainer

TARGETS = torch.tensor([0, 2, 2, 1])
CASES = {
    "LossWeights": (lambda: LossWeights(3), lambda: float64(3)),
    "LabelSmoothing": (lambda: LabelSmoothing(3, initial=0.1), lambda: torch.tensor([0, 2, 2, 1])),
    "LabelSmoothing per class": (lambda: LabelSmoothing(3, per_class=True), lambda: torch.tensor([0, 2, 2, 1])),
    "LabelTransition": (lambda: LabelTransition(3), lambda: float64(4, 3)),
    "SoftLabels": (lambda: SoftLabels(TARGETS, 3), lambda: torch.tensor([0, 3, 2, 1])),
    "WeightNetwork": (lambda: WeightNetwork(hidden=3), lambda: float64(4)),
    "ClassWeights": (lambda: ClassWeights([5, 3, 1]), lambda: TARGETS),
    "LogitAdjustment": (lambda: LogitAdjustment([5, 3, 1]), lambda: float64(4, 3)),
    "FocalGamma": (lambda: FocalGamma(3), lambda: float64(4, 3)),
    "FocalGamma per class": (lambda: FocalGamma(3, per_class=True), lambda: float64(4, 3)),
    "Temperature": (Temperature, lambda: float64(4, 3)),
    "Temperature per class": (lambda: Temperature(3), lambda: float64(4, 3)),
    "InputNoise": (lambda: InputNoise(initial=0.3), lambda: float64(5, 4)),
    "InputNoise per feature": (lambda: InputNoise((4,)), lambda: float64(5, 4)),
    "AugmentationNetwork": (small_augmentation, lambda: float64(2, 1, 3, 5)),
    "RandomDistortion": (lambda: RandomDistortion(RandomDistortion.initial_widths), lambda: float64(2, 2, 5, 6)),
    "Dropout": (lambda: Dropout(initial=0.3), lambda: float64(5, 4)),
    "Dropout per feature": (lambda: Dropout((4,)), lambda: float64(5, 4)),
    "Mixup": (lambda: Mixup(4, initial=1.0), lambda: float64(6, 4)),
    "Mixup of batches": (lambda: Mixup(4, per_example=False), lambda: float64(6, 4)),
}


def loss_of(module, value, w):
    """A loss that depends on the weights w: [4, 3] and on the hyperparameters, and on both at once."""
    if isinstance(module, LossWeights):
        return module(value * w.sin().sum(0))
    if isinstance(module, (LabelSmoothing, SoftLabels)):
        return F.cross_entropy(w, module(value))
    if isinstance(module, WeightNetwork):
        return (module(value) * w.sin().sum(1)).mean()
    if isinstance(module, ClassWeights):
        return (module(value) * F.cross_entropy(w, value, reduction="none")).mean()
    if isinstance(module, (LabelTransition, LogitAdjustment, Temperature)):
        return F.cross_entropy(module(value * w), TARGETS.to(w.device))
    if isinstance(module, FocalGamma):
        return module(value * w, TARGETS.to(w.device)).mean()
    if isinstance(module, Mixup):
        value, targets = outputs_of(module, value)
        return ((value + targets) @ w).tanh().square().mean()
    features = module(value)
    if features.ndim == 4:
        features = features.flatten(1)[:, :4]
    return (features @ w).tanh().square().mean()


def outputs_of(module, value):
    """What the module makes of a value, as a tuple."""
    if isinstance(module, Mixup):
        return module(value, torch.arange(len(value), device=value.device) % 4)
    if isinstance(module, FocalGamma):
        return (module(value, TARGETS.to(value.device)),)
    return (module(value),)


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
    if isinstance(module, RandomDistortion):  # torch has no second derivative of `grid_sample` with respect to places
        # the gradient by the weights, as a function of all: what a hypergradient differentiates
        def gradient(*tensors):
            return torch.autograd.grad(loss(*tensors), tensors[-1], create_graph=True)[0]

        assert torch.autograd.gradcheck(gradient, inputs, fast_mode=True)
    else:
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
    assert all(output.dtype == dtype for output in outputs_of(make().to(dtype), value))


@pytest.mark.parametrize("device", ["meta", DEVICE.type])
def test_output_is_on_the_device_of_the_module(case, device):
    make, value = case
    outputs = outputs_of(make().double().to(device), value.to(device))
    assert all(output.device.type == device for output in outputs)


def test_state_dict_round_trip(case):
    make, value = case
    saved, loaded = disturb(make().double()), make().double()
    loaded.load_state_dict(saved.state_dict())
    outputs = []
    for module in (saved, loaded):
        torch.manual_seed(2)
        outputs.append(outputs_of(module, value))
    assert all(map(torch.equal, *outputs))


# Bad arguments


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


class WithClassWeights(WithLossWeights):
    def tuned(self):
        return ClassWeights([20, 10, 5])

    def loss(self, x, y):
        return (self.own(y) * F.cross_entropy(self.mark_outputs(self.net(x)), y, reduction="none")).mean()


class WithLogitAdjustment(WithLossWeights):
    def tuned(self):
        return LogitAdjustment([20, 10, 5])

    def loss(self, x, y):
        return F.cross_entropy(self.own(self.mark_outputs(self.net(x))), y)


class WithLabelTransition(WithLossWeights):
    def tuned(self):
        return LabelTransition(3)

    def loss(self, x, y):
        return F.cross_entropy(self.mark_outputs(self.own(self.net(x))), y)


class WithTemperature(WithLogitAdjustment):
    def tuned(self):
        return Temperature(3)


class WithFocalGamma(WithLossWeights):
    def tuned(self):
        return FocalGamma(3, per_class=True)

    def loss(self, x, y):
        return self.own(self.mark_outputs(self.net(x)), y).mean()


class WithAnchor(WithLossWeights):
    def tuned(self):
        return Anchor(self.net, "tensor")

    def loss(self, x, y):
        return F.cross_entropy(self.mark_outputs(self.net(x)), y) + self.own()


class WithLoRAGates(WithLossWeights):
    def tuned(self):
        return LoRAGates({"hidden": self.net[0], "last": self.net[-1]})

    def loss(self, x, y):
        return F.cross_entropy(self.mark_outputs(self.net(x)), y)


class WithRandomDistortion(WithAugmentationNetwork):
    def tuned(self):
        return RandomDistortion()


class WithDropout(WithInputNoise):
    def tuned(self):
        return Dropout((4,))


class WithMixup(WithLossWeights):
    def tuned(self):
        return Mixup(3)

    def loss(self, x, y):
        x, targets = self.own(x, y)
        return F.cross_entropy(self.mark_outputs(self.net(x)), targets)


MODULES = [
    *(WithLossWeights, WithLabelSmoothing, WithInputNoise, WithAugmentationNetwork, WithClassWeights),
    *(WithLogitAdjustment, WithTemperature, WithFocalGamma, WithAnchor, WithLoRAGates, WithLabelTransition),
    *(WithRandomDistortion, WithDropout, WithMixup),
]


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
    values = module.hyperparameter_values()["own"]
    assert values["wrong"] < 0.8 < 1.2 < values["right"]


@pytest.mark.filterwarnings("ignore:hyper step 1. the hyper-optimizer would have moved")
@pytest.mark.parametrize("make", MODULES)
def test_training_stays_finite_whatever_the_hyper_optimizer_does(make):
    module = make()
    module.hyper_lr = 1e3
    quiet_trainer(max_epochs=5, callbacks=[IFTHypergradient(1, on_failure="use")]).fit(module)
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())

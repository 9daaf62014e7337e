"""Weight decay."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.hyperparameters import Anchor, WeightDecay
from tests.helpers.trainers import Classifier, quiet_trainer


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


@pytest.mark.parametrize(("granularity", "count"), [("global", 1), ("tensor", 4), ("weight", 11)])
def test_granularity(granularity, count):
    module = net()
    decay = WeightDecay(module, granularity, initial=0.02)
    assert sum(p.numel() for p in decay.parameters()) == count
    wanted = 0.01 * sum(p.square().sum() for p in module.parameters())
    assert torch.allclose(decay(), wanted)
    wanted = [w.shape if granularity == "weight" else () for w in module.parameters()]
    values = decay.natural_values()
    if granularity == "global":
        assert values.shape == ()
    else:
        assert list(values) == [name for name, _ in module.named_parameters()]
        assert [value.shape for value in values.values()] == wanted


def test_each_decay_acts_on_its_own_weight():
    module = net()
    decay = WeightDecay(module, "weight", initial=0.02)
    decay.requires_grad_(True)
    gradients = torch.autograd.grad(decay(), list(decay.parameters()))
    for gradient, weight in zip(gradients, module.parameters(), strict=True):
        # d(d)/dλ = d (1 − d/maximum)
        assert torch.allclose(gradient, 0.02 * (1 - 0.02) * weight.square() / 2)


def test_frozen_weights_are_not_decayed():
    module = net()
    module[0].requires_grad_(False)
    assert torch.allclose(
        WeightDecay(module, initial=0.5)(), 0.25 * sum(p.square().sum() for p in module[1].parameters())
    )


def test_decay_is_bounded_whatever_lambda_is():
    decay = WeightDecay(net(), initial=0.1, maximum=0.7)
    for value in (-100.0, 0.0, 5.0, 1e4):
        with torch.no_grad():
            decay.log_decay[0].fill_(value)
        assert 0.0 <= decay.natural_values().item() <= 0.7 * (1 + 1e-6)
        assert math.isfinite(float(decay().detach()))


@pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
def test_the_gradient_of_decay_is_finite_whatever_lambda_is(value):
    decay = WeightDecay(net(), initial=0.1, maximum=0.7).requires_grad_(True)
    with torch.no_grad():
        decay.log_decay[0].fill_(value)
    (gradient,) = torch.autograd.grad(decay(), list(decay.parameters()))
    assert torch.isfinite(gradient)


def test_weights_follow_the_module_and_are_not_parameters_of_the_decay():
    module = net()
    decay = WeightDecay(module, initial=0.1)
    before = float(decay().detach())
    module.double()
    assert decay().dtype == torch.float64
    with torch.no_grad():
        module[0].weight.mul_(2.0)
    assert float(decay().detach()) > before
    assert {id(p) for p in decay.parameters()}.isdisjoint({id(p) for p in module.parameters()})


@pytest.mark.slow
def test_training_stays_finite_when_decay_is_driven_to_its_bound():
    class Driven(Classifier):
        def outer_loss(self, batch):
            return super().outer_loss(batch) + 10 * sum(p.square().sum() for p in self.net.parameters())

    module = Driven(lr=0.5, hyper_lr=0.5)
    quiet_trainer(max_epochs=60, callbacks=[IFTHypergradient(1, on_failure="use")]).fit(module)
    assert max(module.hyperparameter_values()["decay"].values()) > 0.5
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WeightDecay(net(), "layer"), ValueError, "granularity to be one of"),
        (lambda: WeightDecay(net(), initial=0.0), ValueError, "0 < initial < maximum"),
        (lambda: WeightDecay(net(), initial=2.0), ValueError, "0 < initial < maximum"),
        (lambda: WeightDecay(nn.ReLU()), ValueError, "ReLU has no parameters"),
        (
            lambda: WeightDecay(net(), "tensor", initial={"0.weight": 0.1}),
            ValueError,
            "0.weight, 0.bias, 1.weight, 1.bias",
        ),
        (lambda: WeightDecay(net(), initial={"0.weight": 0.1}), ValueError, "pass a number as initial"),
        (
            lambda: WeightDecay(nn.Linear(1, 1, bias=False), "tensor", initial={"weight": 2.0}),
            ValueError,
            "initial=2.0",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_training_is_accepted_up_to_the_stability_limit():
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, initial=0.1, maximum=4.0)
    decay.check_training(net.parameters(), 0.499)
    decay.check_training(net.parameters(), torch.tensor(0.0))


@pytest.mark.parametrize("lr", [0.5, 1.0, torch.tensor(0.5)], ids=str)
def test_a_learning_rate_at_which_the_largest_decay_diverges_is_refused(lr):
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, initial=0.1, maximum=4.0)
    limit, largest = 2 / float(lr), 1 / float(lr)
    message = f"may reach 4, .* {float(lr):g} .* 2/lr = {limit:g} .*, lower it; else pass maximum={largest:g}$"
    with pytest.raises(ValueError, match=message):
        decay.check_training(net.parameters(), lr)


def test_the_suggested_maximum_is_accepted():
    net = nn.Linear(3, 2)
    WeightDecay(net, initial=0.1, maximum=1 / 0.5).check_training(net.parameters(), 0.5)


@pytest.mark.parametrize("granularity", ["global", "tensor", "weight"])
def test_weights_that_were_replaced_are_refused(granularity):
    net = nn.Linear(3, 2)
    decay = WeightDecay(net, granularity)
    net.bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="decays tensors that are no longer parameters of the module; create it"):
        decay.check_training(net.parameters(), 0.1)


def test_weights_of_a_part_of_the_module_are_enough():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    WeightDecay(net[1]).check_training(net.parameters(), 0.1)


def test_the_decay_has_the_dtype_of_the_weights():
    decay = WeightDecay(net().double(), "tensor", initial=0.02)
    assert [part.dtype for part in decay.parameters()] == [torch.float64] * 4
    assert decay.natural_values()["0.weight"].item() == pytest.approx(0.02, rel=1e-14)


@pytest.mark.parametrize("maximum", [0.7, 5.0])
def test_the_decay_is_that_of_its_formula(maximum):
    decay = WeightDecay(net().double(), initial=0.1, maximum=maximum)
    assert decay.natural_values().item() == pytest.approx(0.1, rel=1e-12)
    for value in (-3.0, 0.5, 2.0):
        with torch.no_grad():
            decay.log_decay[0].fill_(value)
        assert decay.natural_values().item() == pytest.approx(1 / (math.exp(-value) + 1 / maximum), rel=1e-12)


def test_natural_values_are_a_start():
    decay = WeightDecay(net(), "tensor", initial=0.02)
    with torch.no_grad():
        decay.log_decay[1] += 1.0
    again = WeightDecay(net(), "tensor", initial=decay.natural_values())
    for name, value in decay.natural_values().items():
        assert again.natural_values()[name].item() == pytest.approx(value.item())


# Anchor


def moved(net, generator=None):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(("granularity", "count"), [("global", 1), ("tensor", 4), ("weight", 11)])
def test_an_anchor_pulls_towards_the_weights_at_its_creation(granularity, count):
    module = net()
    start = [parameter.detach().clone() for parameter in module.parameters()]
    anchor = Anchor(module, granularity, initial=0.02)
    assert sum(p.numel() for p in anchor.parameters()) == count
    assert anchor().item() == 0.0
    moved(module)
    wanted = 0.01 * sum((w - w0).square().sum() for w, w0 in zip(module.parameters(), start, strict=True))
    assert torch.allclose(anchor(), wanted)
    gradients = torch.autograd.grad(anchor(), list(module.parameters()))
    for gradient, w, w0 in zip(gradients, module.parameters(), start, strict=True):
        assert torch.allclose(gradient, 0.02 * (w - w0), atol=1e-6)


def test_pretrained_weights_are_buffers_that_follow_the_module_and_are_saved():
    module = net()
    start = module[0].weight.detach().clone()
    anchor = Anchor(module, "tensor")
    assert [name for name, _ in anchor.named_buffers()] == [f"pretrained_{place}" for place in range(4)]
    assert not any(buffer.requires_grad for buffer in anchor.buffers())
    moved(module)
    assert torch.equal(anchor.pretrained_0, start)
    other = Anchor(moved(net()), "tensor")
    other.load_state_dict(anchor.state_dict())
    assert torch.equal(other.pretrained_0, start)
    before = anchor().item()
    module.double()
    anchor.double()
    assert anchor().dtype == torch.float64
    assert anchor().item() == pytest.approx(before, rel=1e-5)


def test_frozen_weights_are_not_anchored():
    module = net()
    module[0].requires_grad_(False)
    assert list(Anchor(module, "tensor").natural_values()) == ["1.weight", "1.bias"]


def test_an_anchor_checks_training_like_a_decay():
    module = net()
    anchor = Anchor(module, maximum=4.0)
    anchor.check_training(module.parameters(), 0.499)
    with pytest.raises(ValueError, match=r"Anchor may reach 4, .* pass maximum=2$"):
        anchor.check_training(module.parameters(), 0.5)
    module[0].bias = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="Anchor decays tensors that are no longer parameters"):
        anchor.check_training(module.parameters(), 0.1)


class FineTuned(BilevelLightningModule, L.LightningModule):
    """Training pulls all weights to one more than they were; the outer loss wants them at a goal between the two."""

    def __init__(self, goal):
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.start = [weight.detach().clone() for weight in self.net.parameters()]
        self.goal = goal
        self.register_hyperparameter("anchor", Anchor(self.net, initial=0.1))

    def distance(self, shift):
        return sum(
            (weight - start.to(weight.device) - shift).square().sum()  # a Trainer does not move what is in a list
            for weight, start in zip(self.net.parameters(), self.start, strict=True)
        )

    def inner_loss(self, batch):
        return self.distance(1.0) / 20 + self.anchor()

    def outer_loss(self, batch):
        return self.distance(self.goal)

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=0.5)

    def configure_hyper_optimizer(self):
        return torch.optim.Adam(self.hyperparameters(), lr=0.03)

    def train_dataloader(self):
        return DataLoader(torch.zeros(400, 1))

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

    outer_dataloader = val_dataloader


@pytest.mark.parametrize("goal", [0.25, 0.75])
def test_an_anchor_finds_the_strength_that_the_outer_loss_wants(goal):
    """The minimum of (w − 1)² / 20 + d w² / 2 is w = 1 / (1 + 10 d)."""
    module = FineTuned(goal)
    quiet_trainer(callbacks=[IFTHypergradient(2)]).fit(module)
    assert module.hyperparameter_values()["anchor"] == pytest.approx((1 / goal - 1) / 10, rel=0.1)

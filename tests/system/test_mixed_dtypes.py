"""Modules that mix half and full precision, and run only under autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.hyperparameters import WeightDecay
from lightning_ifthpo.runtime.losses import ModuleLosses
from tests.helpers.trainers import Classifier, during_training, quiet_trainer, trained


class Mixed(Classifier):
    """Layers of one dtype, inputs of another; smooth, and nothing is random."""

    frozen, inputs = torch.float32, torch.float32

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.net[0].to(self.frozen).requires_grad_(False)
        self.decay = WeightDecay(self.net[2], initial=0.01)

    def inner_loss(self, batch):
        penalty = self.decay.natural_values() * self.net[2].weight.norm()
        return F.cross_entropy(self.net(batch[0].to(self.inputs)), batch[1]) + penalty

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0].to(self.inputs)), batch[1])


class HalfBackbone(Mixed):
    frozen = torch.bfloat16


class Float16Backbone(Mixed):
    frozen = torch.float16


class HalfInputs(Mixed):
    inputs = torch.bfloat16


KINDS = [HalfBackbone, Float16Backbone, HalfInputs]
METRIC = {
    IFTHypergradient: "hypergrad/norm",
    SharpnessMonitor: "sharpness/lambda_max",
    ExactGeN: "gen/directional_sharpness",
}


def callback(kind):
    options = {"max_overhead": None} if kind is SharpnessMonitor else {}
    return kind(1, **options)


def metric(make, kind, **options):
    made = callback(kind)
    _, trainer, _ = trained([made], make, max_epochs=1, **options)
    assert getattr(made, "failures", 0) == getattr(made, "skipped", 0) == 0
    return float(trainer.callback_metrics[METRIC[kind]])


@pytest.mark.filterwarnings("ignore:.*finite differences in torch.float32 are not reliable")
@pytest.mark.parametrize("kind", METRIC)
@pytest.mark.parametrize("make", KINDS)
def test_they_work_and_the_precision_is_said_once(make, kind):
    with pytest.warns(UserWarning, match="differentiated under autocast, in the precision of training") as caught:
        value = metric(make, kind, precision="bf16-mixed")
    assert len([warning for warning in caught if "under autocast" in str(warning.message)]) == 1
    if kind is not ExactGeN:  # whose rates and weights drift apart
        assert value == pytest.approx(metric(Mixed, kind), rel=0.1)


@pytest.mark.parametrize("kind", METRIC)
def test_modules_of_one_dtype_are_differentiated_in_float32(kind):
    metric(Mixed, kind, precision="bf16-mixed")


def test_errors_that_are_not_about_types_pass():
    class Fails(Classifier):
        def outer_loss(self, batch):
            raise RuntimeError("something else")

    def action(trainer, module):
        losses = ModuleLosses(trainer, module, None)
        with losses.session("hessian"), pytest.raises(RuntimeError, match="something else"):
            losses.outer(None).evaluate()
        assert not losses.has_low_precision

    during_training(action, Fails, precision="bf16-mixed")


def test_a_module_that_fails_under_autocast_too_says_so():
    class Fails(Classifier):
        def inner_loss(self, batch):
            return (torch.ones(1, 2) @ torch.ones(2, 1, dtype=torch.float64)).sum() + self.net(batch[0]).sum()

    with pytest.raises(RuntimeError, match="dtype"):
        quiet_trainer(callbacks=[IFTHypergradient(1)], precision="bf16-mixed").fit(Fails())

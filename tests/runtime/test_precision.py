"""Small gradients in float16."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from lightning_ifthpo import BilevelLightningModule, IFTHypergradient
from lightning_ifthpo.runtime.precision import first_loss_scale, has_half_weights, is_autocast, loss_scales
from lightning_ifthpo.solvers import ConjugateGradient, Direct
from tests.helpers.device import DEVICE
from tests.helpers.trainers import loader, quiet_trainer


class Tiny(BilevelLightningModule, L.LightningModule):
    """Gradients too small for float16; a temperature is tuned."""

    def __init__(self, size=1e-6):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.register_hyperparameter("temperature", torch.tensor(0.3))
        self.size = size

    def inner_loss(self, batch):
        logits = self.mark_outputs(self.net(batch[0])) * self.temperature.exp()
        return self.size * F.cross_entropy(logits, batch[1])

    def outer_loss(self, batch):
        return self.size * F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.inner_parameters(), lr=0.1 / self.size)

    def configure_hyper_optimizer(self):
        return torch.optim.SGD(self.hyperparameters(), lr=0.0)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(20, batch_size=20, seed=1)

    outer_dataloader = val_dataloader


def in_float16(callback, size=1e-6):
    """Trains for one step, and returns the hypergradient and the scale of the Trainer's own scaler."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
    trainer = quiet_trainer(
        callbacks=[callback],
        plugins=[MixedPrecision("16-mixed", DEVICE.type, scaler)],
        limit_val_batches=0,
        max_steps=1,
    )
    trainer.fit(Tiny(size))
    return float(trainer.callback_metrics["hypergrad/norm"]), scaler.get_scale()


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_small_gradients_survive_float16_by_a_loss_scale_of_our_own(curvature, monkeypatch):
    solver = ConjugateGradient(5, damping="horizon", horizon=2)
    exact, _ = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver))
    scaled, trainers = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver, precision="inherit"))
    assert scaled == pytest.approx(exact, rel=0.02)
    assert trainers == 2.0**12  # whose scaler is not touched
    monkeypatch.setattr("lightning_ifthpo.runtime.precision.FIRST_LOSS_SCALE", 1.0)
    unscaled, _ = in_float16(IFTHypergradient(1, curvature=curvature, solver=solver, precision="inherit"))
    assert unscaled != pytest.approx(exact, rel=0.1)


def test_a_loss_scale_that_overflows_is_lowered_and_kept():
    callback = IFTHypergradient(1, precision="inherit")
    exact, _ = in_float16(IFTHypergradient(1), size=10.0)
    scaled, _ = in_float16(callback, size=10.0)
    assert scaled == pytest.approx(exact, rel=0.02)
    assert callback.skipped == 0
    assert callback.state_dict()["stepper"]["loss_scale"] < 2.0**16


def test_the_outer_product_has_a_loss_scale():
    options = {"curvature": "gradient_outer_product", "solver": Direct(damping=1.0)}
    exact, _ = in_float16(IFTHypergradient(1, **options))
    scaled, _ = in_float16(IFTHypergradient(1, precision="inherit", **options))
    assert scaled == pytest.approx(exact, rel=0.02)


def test_kfac_is_refused():
    with pytest.raises(ValueError, match="needs float32"):
        in_float16(IFTHypergradient(1, curvature="kfac", solver=Direct(damping=1.0), precision="inherit"))


def test_loss_scales_fall_to_one():
    assert loss_scales(2.0**16) == [2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0]
    assert loss_scales(32.0) == [32.0, 2.0, 1.0]
    assert loss_scales(1.0) == [1.0]


@pytest.mark.parametrize(
    ("kind", "half", "autocast", "float16"),
    [
        ("32-true", False, False, False),
        ("64-true", False, False, False),
        ("bf16-true", True, False, False),
        ("16-true", True, False, True),
        ("bf16-mixed", False, True, False),
        ("16-mixed", False, True, True),
    ],
)
def test_what_a_precision_means(kind, half, autocast, float16):
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(precision=kind))
    assert has_half_weights(trainer) == half
    assert is_autocast(trainer, "inherit") == autocast
    assert not is_autocast(trainer, "32")
    assert first_loss_scale(trainer, "inherit") == (2.0**16 if float16 else 1.0)
    assert first_loss_scale(trainer, "32") == (2.0**16 if float16 and half else 1.0)

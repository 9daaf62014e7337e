"""What the weights of a LightningModule minimize, however it says so."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.training_loss import has_inner_loss, has_training_step, is_stub, training_loss

BATCH = torch.tensor(3.0)


class WithStep(L.LightningModule):
    def training_step(self, batch, batch_idx):
        return {"loss": batch * 2, "index": batch_idx}


class WithLoss(L.LightningModule):
    def inner_loss(self, batch):
        return batch * 5


class Both(BilevelLightningModule, WithStep):
    def inner_loss(self, batch):
        return batch * 5


class Bilevel(BilevelLightningModule, WithStep):
    pass


class OnlyLoss(BilevelLightningModule, L.LightningModule):
    def inner_loss(self, batch):
        return batch * 5


@pytest.mark.parametrize(
    ("make", "inner", "step"),
    [
        (WithStep, False, True),
        (Both, True, True),
        (Bilevel, False, True),
        (OnlyLoss, True, False),
        (type("Neither", (BilevelLightningModule, L.LightningModule), {}), False, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_a_module_defines_and_what_follows_from_it(make, inner, step):
    module = make()
    assert (has_inner_loss(module), has_training_step(module)) == (inner, step)


def test_a_submodule_of_that_name_is_no_inner_loss():
    module = WithStep()
    module.inner_loss = nn.Linear(1, 1)
    assert not has_inner_loss(module)


def attached(module):
    """A module whose Trainer is at batch 7."""
    module._fabric = None
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    module.trainer.fit_loop.epoch_loop.batch_progress.current.ready = 8
    return module


@pytest.mark.parametrize(("make", "wanted"), [(WithStep, 6.0), (WithLoss, 15.0), (Both, 15.0), (Bilevel, 6.0)])
def test_the_inner_loss_comes_first_and_else_the_loss_of_the_step(make, wanted):
    assert training_loss(attached(make()), BATCH).item() == wanted


@pytest.mark.parametrize("value", [None, 1.0, {"other": torch.ones(())}], ids=str)
def test_a_step_without_a_loss_is_an_error_that_says_what_to_do(value):
    class Without(L.LightningModule):
        def training_step(self, batch):
            return value

    with pytest.raises(TypeError, match=r"expected training_step to return a loss.*define inner_loss\(batch\)"):
        training_loss(attached(Without()), BATCH)


def test_lightning_s_own_step_is_a_stub():
    assert is_stub(L.LightningModule.training_step)
    assert is_stub(None)
    assert not is_stub(WithStep.training_step)

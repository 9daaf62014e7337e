"""What must hold before the first batch."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.runtime import requirements
from lightning_ifthpo.runtime.requirements import check_strategy
from tests.helpers.scaled import Scaled
from tests.helpers.trainers import Classifier, loader, quiet_trainer, trained


@pytest.mark.parametrize("callback", [IFTHypergradient, SharpnessMonitor, ExactGeN])
def test_a_model_whose_layers_are_spread_over_devices_is_refused(callback, monkeypatch):
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", mesh)
    trainer = quiet_trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy())
    message = (
        f"{callback.__name__} needs the whole model on each device, and ModelParallelStrategy is not known to keep it"
    )
    with pytest.raises(ValueError, match=message):
        callback().on_fit_start(trainer, Classifier())


def test_weights_that_are_spread_over_devices_are_put_together_or_refused(monkeypatch):
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", {"tensor_parallel": SimpleNamespace(size=lambda: 1)})
    trainer = quiet_trainer(accelerator="cpu", devices=2, strategy=ModelParallelStrategy())
    check_strategy(trainer, "IFTHypergradient", gathers=True)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy is not known to keep it there; use strategy='ddp'$"):
        ExactGeN().on_fit_start(trainer, Classifier())


def test_a_hyperparameter_that_is_spread_over_devices_is_refused(monkeypatch):
    monkeypatch.setattr(requirements, "DTensor", torch.Tensor)
    with pytest.raises(ValueError, match=r"'decay.log_decay.0' is spread over processes; apply fully_shard to"):
        IFTHypergradient().on_fit_start(quiet_trainer(), Classifier())


@pytest.mark.parametrize(("trainer", "callback"), [("bf16-mixed", "inherit"), ("bf16-true", "32")])
def test_finite_differences_need_float32(trainer, callback):
    callback = IFTHypergradient(1, curvature="finite_difference", precision=callback)
    with pytest.raises(ValueError, match="curvature='finite_difference' needs float32"):
        quiet_trainer(callbacks=[callback], precision=trainer).fit(Classifier())


def test_an_optimizer_that_is_not_understood_is_named():
    module = Classifier(optimizer="Adadelta")
    with pytest.warns(UserWarning, match="the update rule of Adadelta is not known"):
        quiet_trainer(callbacks=[IFTHypergradient(2)]).fit(module)


class Deferred(Scaled):
    """Defines no outer data itself."""


def test_outer_data_come_from_argument_module_data_module_or_validation():
    size = []

    class Sized(Deferred):
        def outer_loss(self, batch):
            if torch.is_grad_enabled():
                size.append(len(batch[0]))
            return super().outer_loss(batch)

    class WithOuter(Sized):
        def outer_dataloader(self):
            return loader(batch_size=5)

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(batch_size=3)

        def outer_dataloader(self):
            return loader(batch_size=6)

    def used(module, argument=None, **data):
        size.clear()
        callback = IFTHypergradient(2, outer_dataloader=argument, on_failure="use")
        quiet_trainer(callbacks=[callback]).fit(module, **data)
        return set(size)

    assert used(WithOuter(), loader(batch_size=4), datamodule=Data()) == {4}
    assert used(WithOuter(), datamodule=Data()) == {5}
    assert used(Sized(), datamodule=Data()) == {6}
    with pytest.warns(UserWarning, match="tuned on the validation data"):
        assert used(Sized(), train_dataloaders=loader(), val_dataloaders=loader(batch_size=3)) == {3}


def test_a_loader_may_be_assigned_in_place_of_the_method():
    sizes = set()

    class Sized(Deferred):
        def outer_loss(self, batch):
            if torch.is_grad_enabled():
                sizes.add(len(batch[0]))
            return super().outer_loss(batch)

    def used(module, **data):
        sizes.clear()
        callback = IFTHypergradient(2, on_failure="use")
        quiet_trainer(callbacks=[callback]).fit(module, **data)
        return sizes

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(batch_size=3)

    data, module = Data(), Sized()
    data.outer_dataloader = loader(batch_size=6)
    assert used(module, datamodule=data) == {6}
    module.outer_dataloader = list(loader(batch_size=4))
    assert used(module, datamodule=data) == {4}
    module.outer_dataloader = loader(batch_size=5)
    assert used(module, datamodule=data) == {5}
    module.outer_dataloader = iter([])
    with pytest.raises(TypeError, match="expected one DataLoader, or a list of batches, got list_iterator"):
        used(module, datamodule=data)


class OwnNames(Classifier):
    """Has methods of its own with the names that hyperparameter modules and the mixin use."""

    def check_training(self):
        raise AssertionError("not a hyperparameter")


def test_only_registered_modules_are_asked_for_their_checks():
    trained([IFTHypergradient(4)], OwnNames)


@pytest.mark.parametrize("callback", [SharpnessMonitor(2), ExactGeN()], ids=["sharpness", "gen"])
def test_a_plain_module_may_have_inner_parameters_of_another_kind(callback):
    class MetaLearner(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

        def inner_parameters(self, task):
            raise AssertionError("not ours")

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = quiet_trainer(callbacks=[callback], limit_val_batches=0)
    trainer.fit(MetaLearner(), loader())
    assert {"sharpness/lambda_max", "gen/lr"} & trainer.callback_metrics.keys()

"""What SharpnessMonitor refuses, and measurements that fail."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_ifthpo import BilevelLightningModule, SharpnessMonitor
from tests.helpers.monitored import Plain, fit, monitor
from tests.helpers.trainers import loader, quiet_trainer


def test_a_density_that_nobody_can_show_is_said_and_not_computed():
    with pytest.warns(UserWarning, match="no logger takes figures"):
        metrics, _ = fit(Plain(), monitor(spectral_density=True))
    assert metrics["sharpness/failures"] == 0
    assert metrics["sharpness/products"] <= 43  # what Lanczos takes at most of so few weights


class Failing(Plain):
    """Fails in its second evaluation within a batch, which is the measurement."""

    def training_step(self, batch, batch_idx):
        if not self.trainer.loggers or type(self.trainer.loggers[0]) is CSVLogger:
            return super().training_step(batch, batch_idx)
        self.net[0].eval()
        self.scratch = 1
        raise RuntimeError("cannot be evaluated twice")


def test_a_measurement_that_fails_is_told_once_counted_and_survived(tmp_path):
    module, callback = Failing(), monitor()
    with pytest.warns(UserWarning, match="training goes on: RuntimeError: cannot be evaluated twice") as caught:
        metrics, trainer = fit(module, callback, logger=CSVLogger(tmp_path))
    assert len([w for w in caught if "SharpnessMonitor" in str(w.message)]) == 1
    assert metrics == {"sharpness/failures": 3}
    assert trainer.global_step == 3
    assert module.net[0].training
    assert not hasattr(module, "scratch")
    assert isinstance(trainer.logger, CSVLogger)
    assert "log" not in vars(module)


def test_gauss_newton_without_outputs_says_what_to_do():
    class Unmarked(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="call mark_outputs"):
        fit(Unmarked(), monitor(curvature="gauss_newton"))


def test_nan_weights_are_counted_and_never_logged(caplog):
    class Exploding(Plain):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.current_epoch == 0:
                with torch.no_grad():
                    self.net[0].weight.fill_(torch.nan)

    values = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            values.append({k: float(v) for k, v in trainer.callback_metrics.items() if "sharpness" in k})

    trainer = quiet_trainer(callbacks=[monitor(), Watch()], max_epochs=3)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="NaN or infinity"):
        trainer.fit(Exploding())
    assert [value["sharpness/failures"] for value in values] == [0, 1, 2]
    assert all(math.isfinite(number) for value in values for number in value.values())
    assert "number of failed measurements: 2" in caplog.text
    assert "measurements ended above" not in caplog.text  # more iterations would not help


def test_a_loss_that_no_weight_influences_is_reported():
    class Detached(BilevelLightningModule, Plain):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("unused", torch.zeros(()))

        def inner_loss(self, batch):
            return batch[0].mean()

        def val_dataloader(self):
            return loader(8)

        def validation_step(self, batch, batch_idx):
            pass

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="inner_loss is detached"):
        fit(Detached(), monitor())


def test_measurements_that_do_not_converge_are_counted_at_the_end(caplog):
    with caplog.at_level("INFO"):
        metrics, _ = fit(Plain(), monitor(max_iterations=2, rtol=1e-6))
    assert metrics["sharpness/residual"] > 1e-6
    assert "3 of 3 measurements ended above rtol=1e-06" in caplog.text


class Frozen(Plain):
    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)
        self.configure_optimizers = lambda: None


class Empty(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (Frozen, {}, ValueError, "Frozen has no trainable parameters"),
        (
            Plain,
            {"top_k": 44, "max_iterations": 60},
            ValueError,
            "top_k=44 eigenvalues are asked for, and Plain has 43",
        ),
        (Plain, {"dataloader": []}, ValueError, "dataloader of SharpnessMonitor is empty"),
        (Plain, {"dataloader": DataLoader(Empty())}, ValueError, "dataloader of SharpnessMonitor is empty"),
        (Plain, {"dataloader": [torch.zeros(0, 4)]}, ValueError, "empty batch"),
        (Plain, {"dataloader": Empty()}, TypeError, "got Empty; wrap it in a DataLoader"),
        (Plain, {"dataloader": (torch.zeros(3, 4), torch.zeros(3))}, TypeError, "put a single batch into a list"),
        (Plain, {"dataloader": 3}, TypeError, "expected one DataLoader, or a list of batches, got int"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_bad_input_is_refused_before_the_first_batch(make, options, error, message):
    with pytest.raises(error, match=message):
        fit(make(), monitor(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "every_n_batches"),
        ({"method": "qr"}, "expected method to be one of"),
        ({"top_k": 0}, "k to be an integer >= 1"),
        ({"top_k": 2.0}, "k to be an integer"),
        ({"top_k": 2, "method": "power_iteration"}, "power iteration finds one eigenvalue at each end"),
        ({"curvature": "fisher"}, "expected curvature to be one of"),
        ({"max_iterations": 1}, "max_iterations to be an integer >= 2"),
        ({"rtol": -1.0}, "0 < rtol"),
        ({"rtol": math.inf}, "rtol < infinity"),
        ({"max_overhead": 0.0}, "max_overhead > 0"),
    ],
    ids=str,
)
def test_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**options)


def test_a_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setattr("lightning_ifthpo.callbacks.sharpness.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        SharpnessMonitor(spectral_density=True)


def test_a_picture_that_fails_costs_nothing_else(monkeypatch, tmp_path):
    def fails(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_figure", fails)
    callback = monitor(spectral_density=True)
    with pytest.warns(UserWarning, match="OSError: no space left"):
        metrics, _ = fit(Plain(), callback, logger=TensorBoardLogger(tmp_path))
    assert metrics["sharpness/lambda_max"] > 0
    assert callback.failures == 3  # and it was tried again


def test_complex_weights_are_refused():
    class Complex(Plain):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))

    with pytest.raises(ValueError, match="Complex has complex weights"):
        fit(Complex(), monitor())


def test_finite_differences_below_float32_are_refused():
    with pytest.raises(ValueError, match="curvature='finite_difference' needs float32"):
        fit(Plain(), monitor(curvature="finite_difference"), precision="bf16-true")


def test_examples_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="cannot tell the number of examples in a batch of type object"):
        fit(Plain(), monitor(dataloader=[object()]))

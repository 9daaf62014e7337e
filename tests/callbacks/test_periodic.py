"""When callbacks fire."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_ifthpo import BilevelLightningModule, ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.callbacks.frozen import FrozenHyperparameters
from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.callbacks.periodic import check_single_process
from lightning_ifthpo.runtime.fixed_batches import FixedBatches
from lightning_ifthpo.runtime.losses import ModuleLosses
from tests.checks import check_leaves_training_untouched
from tests.helpers.monitored import Plain
from tests.helpers.trainers import Classifier, Recorder, loader, quiet_trainer, same, trained


def fired_batches(every, batches=12, **options):
    trainer_options = options.pop("trainer", {})
    fired = []

    class Spy(IFTHypergradient):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = self.state_dict()["stepper"]["steps"]
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.state_dict()["stepper"]["steps"] > before:
                fired.append(trainer.fit_loop.total_batch_idx + 1)

    trained([Spy(every, **options)], max_epochs=batches // 4, **trainer_options)
    return fired


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 1}, list(range(1, 13))),
        ({"every": 5}, [5, 10]),
        ({"every": 5, "start_after_batches": 3}, [8]),
        ({"every": 1, "trainer": {"accumulate_grad_batches": 2}}, [2, 4, 6, 8, 10, 12]),
        ({"every": 3, "trainer": {"accumulate_grad_batches": 2}}, [4, 8, 12]),
        ({"every": 5, "trainer": {"fast_dev_run": True}}, [1]),
        ({"every": 1, "max_overhead": 1e-9}, [1]),
    ],
    ids=str,
)
def test_hyper_steps_are_made_when_due(arguments, expected):
    assert fired_batches(**arguments) == expected


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({"every_n_batches": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_batches": 5}, {}, [4, 9]),  # after the first epoch at the latest
        ({"every_n_batches": 1}, {"accumulate_grad_batches": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_n_batches": 5}, {"fast_dev_run": True}, [1]),
        ({"every_n_batches": 1, "max_overhead": 1e-9}, {}, [1]),
    ],
    ids=str,
)
def test_measurements_are_made_when_due(options, trainer_options, expected):
    fired = []

    class Spy(SharpnessMonitor):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = self.state_dict()["tracker"]["measurements"]
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.state_dict()["tracker"]["measurements"] > before:
                fired.append(trainer.fit_loop.total_batch_idx + 1)

    trained([Spy(**({"max_overhead": None, "rtol": 0.1} | options))], **trainer_options)
    assert fired == expected


class Skipping(Plain):
    """Skips batches as users do: training_step returns None."""

    def __init__(self, skips):
        super().__init__()
        self.skips = skips

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        return None if self.skips(batch_idx, loss) else loss


class BilevelSkipping(BilevelLightningModule, Skipping):
    def __init__(self, skips):
        super().__init__(skips)
        self.register_hyperparameter("log_decay", torch.tensor(-4.0))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if loss is None else loss + self.log_decay.exp() * self.net[0].weight.square().sum() / 2

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def outer_dataloader(self):
        return loader(20, batch_size=6, seed=1)


class OwnInnerLoss(BilevelSkipping):
    """The default training step skips a batch on which inner_loss returns None."""

    def inner_loss(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        penalty = self.log_decay.exp() * self.net[0].weight.square().sum() / 2
        return None if self.skips(max(self.trainer.fit_loop.batch_idx, 0), loss) else loss + penalty

    def training_step(self, batch, batch_idx):
        return self.inner_loss(batch)


SKIPS = {
    "first": lambda index, loss: index == 0,
    "every third": lambda index, loss: index % 3 == 1,
    "those that are due": lambda index, loss: index % 2 == 1,
    "large losses": lambda index, loss: bool(loss > 1.1),
    "all": lambda index, loss: True,
}


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("make", [BilevelSkipping, OwnInnerLoss])
@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["plain", "accumulated"])
@pytest.mark.filterwarnings("ignore:IFTHypergradient made no hyper step")
def test_batches_without_a_loss_are_left_out(skips, make, options):
    """All callbacks wait for a batch with a loss, and training is what it is without them."""

    def fit(callbacks):
        torch.manual_seed(0)
        module = make(SKIPS[skips])
        module.configure_hyper_optimizer = lambda: torch.optim.SGD(module.hyperparameters(), lr=0.0)
        quiet_trainer(callbacks=callbacks, max_epochs=3, limit_val_batches=0, **options).fit(module, loader())
        return module.state_dict()

    stepper = IFTHypergradient(2, on_failure="use")
    sharpness = SharpnessMonitor(2, max_overhead=None, rtol=0.1)
    assert same(fit([stepper, sharpness]), fit([]))
    fit([ExactGeN()])
    assert sharpness.failures == 0
    assert (stepper.skipped, stepper.state_dict()["stepper"]["consumed"]) == (
        0,
        stepper.state_dict()["stepper"]["steps"],
    )
    made = stepper.state_dict()["stepper"]["steps"]
    assert made == 0 if skips == "all" else made >= 2


def test_with_several_processes_a_batch_without_a_loss_is_an_error():
    with pytest.raises(RuntimeError, match="the training loss is None on a batch, and other processes"):
        check_single_process(SimpleNamespace(world_size=2))
    check_single_process(SimpleNamespace(world_size=1))


class Validated(BilevelSkipping):
    def __init__(self):
        super().__init__(SKIPS["first"])
        self.skips = lambda index, loss: False

    def validation_step(self, batch, batch_idx):
        self.log("val", self.outer_loss(batch))


NEVER = {
    "starts late": IFTHypergradient(2, start_after_batches=100),
    "rare": IFTHypergradient(100),
    "sharpness": SharpnessMonitor(100, max_overhead=None, rtol=0.1),
    "sharpness over budget": SharpnessMonitor(1, max_overhead=1e-9, rtol=0.1),
}
METRICS = {"sharpness": "sharpness/lambda_max"} | dict.fromkeys(["starts late", "rare"], "hypergrad/outer_loss")

SCHEDULES = {
    "epoch": {},
    "inside an epoch": {"val_check_interval": 2},
    "across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "inside a window": {"val_check_interval": 2, "accumulate_grad_batches": 4},
    "every batch": {"val_check_interval": 0.25},
    "every second epoch": {"check_val_every_n_epoch": 2},
}


@pytest.mark.parametrize("at_epoch_end", [False, True], ids=["validation", "epoch"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NEVER)
@pytest.mark.filterwarnings("ignore:IFTHypergradient made no hyper step")
def test_other_callbacks_find_the_metrics_they_monitor(name, schedule, at_epoch_end, tmp_path):
    """At the first validation, and after the first epoch, although no firing is due before."""
    metric = METRICS.get(name, "sharpness/lambda_max")
    early = EarlyStopping(metric, patience=100, check_on_train_epoch_end=at_epoch_end)
    readers = [early, ModelCheckpoint(tmp_path, monitor=metric, save_on_train_epoch_end=at_epoch_end)]
    trainer = quiet_trainer(
        callbacks=[NEVER[name], *readers], max_epochs=4, enable_checkpointing=True, **SCHEDULES[schedule]
    )
    trainer.fit(Validated(), loader(), loader(16, seed=2))
    assert math.isfinite(float(trainer.callback_metrics[metric]))
    assert trainer.current_epoch == 4


@pytest.mark.parametrize("every", [3, 7])
def test_a_preview_has_no_effect(every, tmp_path):
    """Training, hyperparameters, outer data, warm starts and logged rows are the same with and without a reader."""

    def fit(readers, folder):
        torch.manual_seed(7)
        module, callback, recorder = Classifier(), IFTHypergradient(every, start_after_batches=4), Recorder()
        logger = CSVLogger(tmp_path / folder)
        trainer = quiet_trainer(max_epochs=4, callbacks=[callback, *readers, recorder], logger=logger)
        trainer.fit(module)
        rows = (tmp_path / folder / "lightning_logs" / "version_0" / "metrics.csv").read_text()
        return recorder, callback.state_dict(), rows

    reader = EarlyStopping("hypergrad/norm", patience=100, check_on_train_epoch_end=True)
    read, plain = fit([reader], "read"), fit([], "plain")
    check_leaves_training_untouched(read[0], plain[0])
    assert same(read[1], plain[1])
    assert read[2] == plain[2]


def test_metrics_survive_a_checkpoint(tmp_path):
    """A run that goes on in the middle of an epoch can stop early before the next firing."""
    for callback, metric in ((IFTHypergradient(9), "hypergrad/norm"), (SharpnessMonitor(13), "sharpness/lambda_max")):
        reader = EarlyStopping(metric, patience=100, check_on_train_epoch_end=True)
        trainer = quiet_trainer(max_epochs=3, callbacks=[callback, reader])
        trainer.fit(Classifier())
        before = trainer.callback_metrics[metric]
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        trainer = quiet_trainer(max_epochs=4, callbacks=[callback, reader])
        trainer.fit(Classifier(), ckpt_path=tmp_path / "last.ckpt")
        assert float(trainer.callback_metrics[metric]) == float(before)


@pytest.mark.parametrize("make", [IFTHypergradient, SharpnessMonitor, ExactGeN])
@pytest.mark.parametrize("fails", [False, True], ids=["end", "exception"])
def test_no_callback_keeps_the_model(make, fails):
    """After the fit and after an exception alike; the state remains."""

    class Interrupt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if fails and trainer.global_step == 3:
                raise KeyError("interrupted")

    module, callback = Classifier(), make(2)
    with pytest.raises(KeyError) if fails else nullcontext():
        quiet_trainer(callbacks=[callback, Interrupt()]).fit(module)
    held = (ModuleLosses, HyperStepper, FrozenHyperparameters, FixedBatches)
    assert not any(isinstance(value, held) for value in vars(callback).values())
    assert make is ExactGeN or callback.state_dict()

"""A race of learning rates that leaves no trace."""

import copy
import logging
import math
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_ifthpo import ExactGeN
from tests.helpers.learning_rates import Plain
from tests.helpers.processes import python
from tests.helpers.trainers import (
    Classifier,
    L,
    Recorder,
    ResumableLoader,
    Ridge,
    classification_data,
    loader,
    quiet_trainer,
    same,
)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Data(L.LightningDataModule):
    """Shuffles by a generator of its own, which goes on from epoch to epoch."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)
        self.examples = classification_data(40)

    def train_dataloader(self):
        return DataLoader(self.examples, batch_size=8, shuffle=True, generator=self.generator, drop_last=True)

    def val_dataloader(self):
        return loader(16, seed=2)


def shuffled():
    return DataLoader(classification_data(32), batch_size=8, shuffle=True)


def own_generator():
    generator = torch.Generator().manual_seed(5)
    return DataLoader(classification_data(32), batch_size=8, shuffle=True, generator=generator)


DATA = {
    "of the module": dict,
    "a loader": lambda: {"train_dataloaders": shuffled()},
    "a generator of its own": lambda: {"train_dataloaders": own_generator()},
    "a loader with a position": lambda: {"train_dataloaders": ResumableLoader(classification_data(32), 8)},
    "a data module": lambda: {"datamodule": Data()},
}


def trained(tmp_path, data, suggests, **options):
    """Trains a module with dropout, BatchNorm, a metric and a log; returns what each batch left behind."""
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    module, recorder, data = Classifier(), Recorder(), data()
    tmp_path.mkdir()
    callbacks = [recorder, ModelCheckpoint(tmp_path / "checkpoints", save_last=True)]
    trainer = quiet_trainer(
        callbacks=callbacks,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        default_root_dir=tmp_path,
        **({"max_epochs": 2} | options),
    )
    if suggests:
        before = picture(trainer, module)
        ExactGeN.suggest(trainer, module, **data)
        assert same(picture(trainer, module), before)
        assert trainer.callbacks[0] is recorder
        assert not list(tmp_path.iterdir())
    trainer.fit(module, **data)
    numbers = [torch.rand(1), random.random(), float(np.random.rand())]  # noqa: NPY002
    return [module.state_dict(), recorder.batches, recorder.logged, numbers, module.evaluations]


def picture(trainer, module):
    """What can be seen of a Trainer and a module from outside."""
    loops = [trainer.fit_loop.state_dict(), trainer.max_steps, trainer.max_epochs, trainer.min_epochs]
    limits = [trainer.limit_val_batches, trainer.num_sanity_val_steps, trainer.should_stop, trainer.global_step]
    parts = [list(trainer.callbacks), list(trainer.loggers), trainer.profiler, trainer.datamodule, trainer.optimizers]
    status = [str(trainer.state.fn), str(trainer.state.status), trainer.callback_metrics, trainer.lr_scheduler_configs]
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    grads = [weight.grad for weight in module.parameters()]
    return copy.copy([loops, limits, parts, status, weights, grads, [m.training for m in module.modules()]])


@pytest.mark.parametrize("data", DATA.values(), ids=DATA)
def test_the_fit_after_it_is_bit_for_bit_what_it_is_without(data, tmp_path):
    with_race = trained(tmp_path / "with", data, suggests=True)
    assert same(with_race, trained(tmp_path / "without", data, suggests=False))


class Failing(Classifier):
    """Its training step fails in the middle of the race."""

    fails = True

    def training_step(self, batch, batch_idx):
        if self.fails and self.trainer.global_step == 6:
            raise RuntimeError("the cable is out")
        return super().training_step(batch, batch_idx)


def test_after_an_error_everything_is_as_before():
    def run(suggests):
        torch.manual_seed(7)
        module, recorder = Failing(), Recorder()
        trainer = quiet_trainer(callbacks=[recorder], max_epochs=3)
        if suggests:
            before = picture(trainer, module)
            with pytest.raises(RuntimeError, match="the cable is out"):
                ExactGeN.suggest(trainer, module)
            # torch and Lightning say so themselves
            assert same(picture(trainer, module), before)
        module.fails = False
        trainer.fit(module)
        return recorder.batches

    assert same(run(suggests=True), run(suggests=False))


class Grouped(Plain):
    """Two groups, the second one slower."""

    def __init__(self, lr, scheduler=None, optimizer=torch.optim.AdamW):
        super().__init__(optimizer, scheduler)
        self.lr = lr

    def configure_optimizers(self):
        first, last = ({"params": self.net[place].parameters()} for place in (0, 2))
        optimizer = self.make_optimizer([first | {"lr": self.lr}, last | {"lr": self.lr / 4}])
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)


def suggestion(module, data=None, *, steps=None, seed=0, **options):
    torch.manual_seed(seed)
    return ExactGeN.suggest(quiet_trainer(**({"max_epochs": 8} | options)), module, data, steps=steps)


def made(*args, **options):
    torch.manual_seed(1)
    return Grouped(*args, **options)


def test_only_the_ratios_of_the_rates_count():
    """Not the rate that the optimizer was made with, nor that of a warm-up, which begins at zero."""
    found = [suggestion(made(*args)) for args in ((0.1,), (1e-6,), (0.1, warm_up))]
    assert found[0] == found[1] == found[2]
    assert found[0].lrs == (found[0].lr, found[0].lr / 4)


class Applied(Plain):
    """Notes the rate of each step, as it is made."""

    applied: ClassVar[list[float]] = []

    def on_before_zero_grad(self, optimizer):
        self.applied.append(optimizer.param_groups[0]["lr"])


def decay(optimizer):
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return {"scheduler": scheduler, "interval": "step"}


def test_trials_are_as_long_as_asked_and_no_scheduler_acts():
    Applied.applied.clear()
    found = suggestion(Applied(scheduler=decay), steps=3)
    looks, rest = Applied.applied[:4], Applied.applied[4:]
    assert looks == [1.0] * 4  # where the updates are read
    trials = [rest[start : start + 3] for start in range(0, len(rest), 3)]
    assert all(len(set(rates)) == 1 for rates in trials)
    assert sorted(rates[0] for rates in trials) == [trial.lr for trial in found.trials]
    assert found.trial_steps == 3
    assert found.steps == len(Applied.applied) == 4 + 3 * len(found.trials)


def test_a_trial_takes_a_tenth_of_the_run():
    """Five epochs of four batches, and 16 epochs with two batches for each step."""
    assert suggestion(Plain(), max_epochs=5).trial_steps == 2
    assert suggestion(Plain(), max_epochs=16, accumulate_grad_batches=2).trial_steps == 4  # of 32


class FullBatch(Ridge):
    """The same data in every batch, for gradient descent."""

    def __init__(self):
        super().__init__(lr=1.0)
        self.x = self.x * torch.tensor([3.0, 1.0, 1.0, 0.3], dtype=torch.float64)

    def configure_optimizers(self):
        return torch.optim.SGD([self.w], lr=self.lr)


def closed_form(module):
    """Gradient and Hessian at the start, at w = 0."""
    hessian = module.x.T @ module.x / 20 + module.log_decay.exp().detach() * torch.eye(4, dtype=torch.float64)
    return -module.x.T @ module.y / 20, hessian


def losses_of_descent(module, lr, steps):
    g, hessian = closed_form(module)
    weights = torch.zeros(4, dtype=torch.float64)
    for _ in range(steps):
        weights = weights - lr * (g + hessian @ weights)
    return float(weights @ hessian @ weights / 2 + g @ weights + module.y.square().mean() / 2)


def test_edge_trials_and_winner_of_a_quadratic_are_those_of_the_closed_form():
    """The critical step of gradient descent is 2 gᵀg / gᵀHg; the search for it ends within 10 %."""
    module = FullBatch()
    found = suggestion(module, steps=6, precision="64-true", limit_val_batches=0)
    g, hessian = closed_form(module)
    assert found.edge == pytest.approx(float(2 * g @ g / (g @ hessian @ g)), rel=0.1)
    for lr, loss in found.trials:
        assert loss == pytest.approx(losses_of_descent(module, lr, 6), rel=1e-9)
    assert found.lr == min(found.trials, key=lambda trial: trial.loss).lr
    assert found.edge / 4 < found.trials[-1].lr <= found.edge  # no trial above the edge


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"precision": "64-true"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"max_epochs": -1, "max_steps": 40},
        {"limit_train_batches": 1, "max_epochs": 30},
        {"min_steps": 200, "min_epochs": 20, "max_epochs": 20},
        {"overfit_batches": 2},
        {"fast_dev_run": True},
        {"profiler": "simple"},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_it_runs_with_the_options_of_the_trainer(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = suggestion(Plain(torch.optim.AdamW), **options)
    assert 0.0 < found.lr < math.inf
    assert all(math.isfinite(trial.loss) for trial in found.trials if trial.lr <= found.lr)
    assert not list(tmp_path.iterdir())


def test_the_update_that_is_read_is_the_clipped_one():
    """A gradient of length 1e-3 has an edge that is longer by the ratio of the lengths; within 10 %."""
    module = FullBatch()
    found = suggestion(module, steps=1, precision="64-true", limit_val_batches=0, gradient_clip_val=1e-3)
    g, hessian = closed_form(module)
    assert found.edge == pytest.approx(float(2 * g @ g / (g @ hessian @ g) * g.norm() / 1e-3), rel=0.1)


class Bare(Plain):
    train_dataloader = L.LightningModule.train_dataloader  # which there is none of


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize(
    ("given", "named"),
    [((shuffled,), {}), ((Data,), {}), ((), {"datamodule": Data}), ((), {"train_dataloaders": shuffled})],
    ids=["a loader", "a data module", "a data module by name", "a loader by name"],
)
def test_data_is_given_as_to_fit(given, named):
    given, named = [make() for make in given], {name: make() for name, make in named.items()}
    found = ExactGeN.suggest(quiet_trainer(), Bare(), *given, **named, steps=1)
    assert found.trial_steps == 1


class Watching(Plain):
    """Fails if it is asked for other data than training data."""

    def validation_step(self, batch, batch_idx):
        raise AssertionError("validation")

    def val_dataloader(self):
        raise AssertionError("validation data")

    def test_dataloader(self):
        raise AssertionError("test data")


def test_it_sees_training_data_alone():
    suggestion(Watching())


class Exploding(Plain):
    """Its loss is NaN once its weights are far from where they began."""

    def __init__(self, most=math.inf, **options):
        super().__init__(**options)
        self.most = most
        self.register_buffer("start", torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        moved = (torch.cat([p.detach().reshape(-1) for p in self.net.parameters()]) - self.start).norm()
        return loss * torch.nan if moved > self.most else loss


def test_a_trial_that_diverges_is_lost_and_nothing_else():
    found = suggestion(Exploding(most=2.0))
    lost = [trial.lr for trial in found.trials if math.isinf(trial.loss)]
    assert lost
    assert found.lr < min(lost)
    assert f"; {len(lost)} diverged" in str(found)


class Hopeless(Plain):
    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        return super().training_step(batch, batch_idx) * (1.0 if step < 4 else torch.nan)


def test_where_all_trials_diverge_it_says_so():
    with pytest.raises(ValueError, match=r"training diverged at all of \d learning rates, from .* check the data"):
        suggestion(Hopeless())


class Straight(L.LightningModule):
    """A loss that falls without a bound: the highest rate is always the best."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def training_step(self, batch, batch_idx):
        return self.w.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return loader()


def test_where_the_highest_rate_is_the_best_it_goes_on_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        found = suggestion(Straight())
    assert found.is_open
    assert found.edge == math.inf
    assert len(found.trials) == 11
    assert found.lr == found.trials[-1].lr
    (line,) = [record.message for record in caplog.records if "ExactGeN" in record.message]
    assert line == f"ExactGeN.suggest: {found}"
    assert line.endswith("the highest rate that was tried is the best, and a higher one may be better")


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Two(Plain):
    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch, batch_idx):
        raise AssertionError("a batch")


class Locked(Plain):
    def __init__(self):
        super().__init__()
        self.source = (number for number in range(3))  # a generator cannot be copied


class Stopping(Plain):
    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.should_stop = True


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (Manual, {}, ValueError, "optimizes manually"),
        (Two, {}, RuntimeError, "only supported with manual optimization"),  # by Lightning
        (lambda: Plain(torch.optim.Rprop), {}, ValueError, "Rprop is not linear in its learning rate"),
        (Locked, {}, TypeError, "Locked cannot be copied by copy.deepcopy: cannot pickle"),
        (Plain, {"max_epochs": -1}, ValueError, "length of the run is unknown; set max_steps in the Trainer, or pass"),
        (Plain, {"steps": 0}, ValueError, "steps"),
        (Stopping, {}, RuntimeError, "ended before the race of learning rates was over; call ExactGeN.suggest before"),
        (Plain, {"limit_train_batches": 0}, RuntimeError, "with training data"),
        (
            Plain,
            {"strategy": "ddp_spawn", "devices": 2, "accelerator": "cpu"},
            ValueError,
            "processes that DDPStrategy spawns; use strategy='ddp' in a script",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(module, options, error, message):
    with pytest.raises(error, match=message):
        suggestion(module(), **options)


class WithCallbacks(Plain):
    def configure_callbacks(self):
        return [Forbidden()]


class Forbidden(Callback):
    def on_train_start(self, trainer, pl_module):
        raise AssertionError("a callback")


def test_callbacks_do_not_take_part():
    suggestion(WithCallbacks(), callbacks=[Forbidden()])


@pytest.mark.slow
def test_two_processes_choose_the_same_and_train_as_without_it(tmp_path):
    told = python("-m", "tests.helpers.suggested", tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one["suggestion"] == other["suggestion"]
    assert same(one["weights, True"], one["weights, False"])
    assert same(one["weights, True"], other["weights, True"])
    assert told.count("ExactGeN.suggest: ") == 1


class Holding(Plain):
    """Holds its optimizer, made outside, which belongs to its weights before and after."""

    def __init__(self):
        super().__init__()
        self.held = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def configure_optimizers(self):
        return self.held


def test_an_optimizer_that_the_module_holds_is_copied_with_it():
    module = Holding()
    suggestion(module)
    assert not module.held.state
    assert module.held.param_groups[0]["lr"] == 0.3


def test_an_optimizer_of_other_weights_than_those_of_the_copy_is_refused():
    module = Plain()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    module.configure_optimizers = lambda: optimizer  # which a copy of the module calls too
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"not those of the copy of Plain .* make it in configure_optimizers"):
        suggestion(module)
    assert same(module.state_dict(), before)


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.net = nn.LazyLinear(3)


def test_layers_without_weights_are_refused():
    with pytest.raises(ValueError, match=r"Lazy has layers without weights .* pass a batch through it before"):
        ExactGeN.suggest(quiet_trainer(max_epochs=4), Lazy(), loader())


def test_data_that_end_end_the_race_and_it_says_so():
    """An iterator gives its batches once, and Lightning would begin one empty epoch after the other."""
    batches = iter(list(loader(40, batch_size=4)))
    with pytest.raises(RuntimeError, match="training data that can be read again"):
        ExactGeN.suggest(quiet_trainer(max_steps=100), Plain(), batches)


SEEN: list[float] = []


class Counting(Plain):
    """Counts its steps in a buffer, which is another tensor after each, and again in a hook after the step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def on_train_start(self):
        self.losses = []

    def training_step(self, batch, batch_idx):
        SEEN.append(float(self.count))
        self.count = self.count + 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.count.add_(100.0)
        self.losses.append(outputs["loss"])

    def on_train_epoch_end(self):
        assert torch.stack(self.losses).isfinite().all()
        self.losses.clear()


@pytest.mark.parametrize("steps", [1, 3])  # with one, a trial ends at the end of each epoch, too
def test_each_trial_begins_with_the_same_buffers(steps):
    SEEN.clear()
    suggestion = ExactGeN.suggest(quiet_trainer(max_epochs=4), Counting(), loader(40, batch_size=4), steps=steps)
    begun = [value for value in SEEN if value == 0.0]
    assert len(begun) >= 4 + len(suggestion.trials)
    within = 101.0 * (steps - 1)
    assert max(SEEN) <= within + 1.0  # of the batches that trials are judged on


@pytest.mark.skipif(torch.cuda.is_available(), reason="the scaler is one of the CPU")
def test_a_loss_scale_that_is_too_high_at_first_is_found():

    class Large(Plain):
        def training_step(self, batch, batch_idx):
            return 1e3 * super().training_step(batch, batch_idx)

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16))
    suggestion = ExactGeN.suggest(
        quiet_trainer(max_epochs=4, plugins=[plugin]), Large(), loader(40, batch_size=4), steps=3
    )
    assert suggestion.lr > 0.0
    assert plugin.scaler.get_scale() == 2.0**16

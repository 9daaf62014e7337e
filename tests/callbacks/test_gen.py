"""ExactGeN in a real Trainer."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import ExactGeN
from tests.helpers.learning_rates import Plain, Rates, fit
from tests.helpers.trainers import Classifier, ResumableLoader, classification_data, quiet_trainer, trained


def digits(seed):
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(123))
    images, labels = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    generator = torch.Generator().manual_seed(seed)
    data = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=100, shuffle=True, generator=generator)
    return data, images[1400:], labels[1400:]


class Digits(Plain):
    def __init__(self, optimizer, **options):
        super().__init__(optimizer, **options)
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})],
    ids=["SGD", "momentum", "AdamW"],
)
def test_no_rate_has_to_be_given(optimizer, options):
    """20 epochs of digits from any rate, bit for bit the same; one test image of 397 is 0.25 points."""
    accuracies = []
    for lr in (1e-6, 1.0):
        torch.manual_seed(0)
        module = Digits(optimizer, lr=lr, **options)
        data, images, labels = digits(seed=0)
        quiet_trainer(max_epochs=20, callbacks=[ExactGeN()]).fit(module, data)
        accuracies.append((module.net(images).argmax(1) == labels).float().mean().item())
    assert accuracies[0] == accuracies[1] >= 0.95


class Steps(Callback):
    """The rate of each step, as it was applied in the end; it comes behind `ExactGeN`."""

    def __init__(self):
        self.rates, self.shortened = [], 0

    def on_train_start(self, trainer, pl_module):
        self.scheduler = trainer.lr_scheduler_configs[0].scheduler
        note = lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
        trainer.optimizers[0].register_step_post_hook(note)

    def on_train_batch_start(self, *_):
        if self.scheduler.shortened > self.shortened:
            self.shortened, self.rates[-1] = self.scheduler.shortened, self.scheduler.applied[0]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (lambda: Plain(momentum=0.9, nesterov=True), {}),
        (lambda: Plain(torch.optim.AdamW, weight_decay=0.1), {"gradient_clip_val": 0.05}),
        (lambda: Plain(torch.optim.RMSprop), {"accumulate_grad_batches": 2}),
    ],
    ids=["Nesterov", "AdamW, clipped", "RMSprop, accumulated"],
)
def test_only_the_length_of_the_step_is_changed(module, options):
    """The rates it chose, replayed without it, give the same weights."""

    class Replay(Callback):
        def __init__(self, rates):
            self.rates = list(rates)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            optimizer.param_groups[0]["lr"] = self.rates.pop(0)

    torch.manual_seed(1)
    first, steps = module(), Steps()
    quiet_trainer(max_epochs=5, callbacks=[ExactGeN(), steps], precision="64-true", **options).fit(first)
    assert len(set(steps.rates)) > 5
    torch.manual_seed(1)
    second = module()
    quiet_trainer(max_epochs=5, callbacks=[Replay(steps.rates)], precision="64-true", **options).fit(second)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_nothing_else_is_disturbed():
    """Dropout, BatchNorm, metrics and random state are those of the replay."""
    with_callback, _, observed = trained([ExactGeN()])
    noted = Steps()

    class Replay(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            optimizer.param_groups[0]["lr"] = noted.rates.pop(0)

    trained([ExactGeN(), noted])
    without, _, plain = trained([Replay()])
    for (_, _, modes, state, _), (_, _, other_modes, other_state, _) in zip(
        observed.batches, plain.batches, strict=True
    ):
        assert modes == other_modes
        assert torch.equal(state, other_state)
    assert with_callback.evaluations == without.evaluations
    for name, value in with_callback.state_dict().items():
        # rounding of an update at rate one, where the rate is a thousandth: 1e-7 · 1e3 of the update
        assert torch.allclose(value.double(), without.state_dict()[name].double(), rtol=1e-3, atol=1e-5), name


def test_a_configured_scheduler_is_replaced_with_one_notice():
    step = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)  # noqa: E731
    with pytest.warns(UserWarning, match="ExactGeN replaces StepLR") as caught:
        trainer, rates = fit(Plain(scheduler=step), ExactGeN(final_decay=0.0))
    assert len([w for w in caught if "ExactGeN" in str(w.message)]) == 1
    assert rates.rates[-1] > rates.rates[0]
    assert type(trainer.lr_scheduler_configs[0].scheduler).__name__ == "ExactGeNLR"


def test_metrics_and_the_rate_monitor_see_the_rate(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [ExactGeN(), LearningRateMonitor("step"), Rates()]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=5, logger=logger)
    trainer.fit(Plain())
    metrics = trainer.callback_metrics
    assert {
        "gen/lr",
        "gen/accepted",
        "gen/refused",
        "gen/directional_sharpness",
        "gen/settled",
        "gen/center",
        "gen/shortened",
    } <= metrics.keys()
    assert "gen/lr" in trainer.progress_bar_metrics
    assert "ExactGeN" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]


def test_looks_are_rare_and_rarer_once_the_rate_has_settled():
    looks = []

    class Spy(ExactGeN):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.lr_scheduler_configs[0].scheduler.looks > len(looks):
                looks.append(trainer.fit_loop.total_batch_idx)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    fit(Plain(), Spy(every_n_batches=50), max_epochs=300)  # 1,200 steps
    climb, later = looks[3:40], [look for look in looks if look > 700]
    assert looks[:3] == [0, 1, 2]
    assert 6 in {after - before for before, after in pairwise(climb)}  # 64 looks in three tenths of the run
    assert {after - before for before, after in pairwise(later)} == {50}
    assert len(looks) < 100


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_is_exact_and_the_checkpoint_holds_no_module(tmp_path):
    class Deterministic(Plain):
        def train_dataloader(self):
            return ResumableLoader(classification_data(32), batch_size=8)

    def run(stop, resume=None):
        torch.manual_seed(3)
        module = Deterministic(momentum=0.9)
        checkpoint = ModelCheckpoint(tmp_path / str(stop), filename="{step}", every_n_train_steps=1, save_top_k=-1)

        class Stop(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.global_step == stop:
                    raise InterruptedError

        callbacks = [ExactGeN(), Stop(), *([checkpoint] if stop > 0 else [])]
        trainer = quiet_trainer(max_epochs=5, callbacks=callbacks, enable_checkpointing=stop > 0)
        trainer.fit(module, ckpt_path=resume)
        return list(module.parameters())

    whole = run(stop=-1)
    for stop in (1, 2, 5, 11):
        with pytest.raises(InterruptedError):
            run(stop)
        path = tmp_path / str(stop) / f"step={stop}.ckpt"
        state = torch.load(path, weights_only=True)["lr_schedulers"][0]
        own = {"last_epoch", "last_look", "watch", "follows_gradient", "parabolas", "update"}
        assert set(state) == own | {"multipliers", "rules", "applied", "shortened"}
        rest = run(stop=-2, resume=path)
        assert all(torch.equal(one, other) for one, other in zip(whole, rest, strict=True)), stop


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "published", "probe": "same_batch"},
        {"rule": "published", "curvature": "hessian"},
        {"curvature": "finite_difference"},
        {"curvature": "hessian", "per_group": True},
    ],
    ids=str,
)
def test_other_rules_probes_and_curvatures_train_too(options):
    trainer, rates = fit(Plain(), ExactGeN(**options))
    assert max(rates.rates) > 1e-4
    assert float(trainer.callback_metrics["gen/accepted"]) == 1.0
    assert float(trainer.callback_metrics["gen/refused"]) == 0.0


def test_each_parameter_group_gets_its_rate_and_its_metrics():
    class Grouped(Plain):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": self.net[i].parameters()} for i in (0, 2)], lr=1.0, momentum=0.9)

    trainer, _ = fit(Grouped(), ExactGeN(per_group=True, final_decay=0.0))
    metrics = trainer.callback_metrics
    assert metrics["gen/lr/0"] != metrics["gen/lr/1"]
    assert metrics["gen/lr"] == max(metrics["gen/lr/0"], metrics["gen/lr/1"]) > 1e-4
    assert {"gen/directional_sharpness/0", "gen/directional_sharpness/1"} <= metrics.keys()


def test_looks_are_made_and_logged_with_the_same_batch_too():
    """Once at each look, not between them."""
    logged = []

    class Notes(DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.extend([step] if "gen/lr" in metrics else [])

    callback = ExactGeN(4, probe="same_batch", rule="published", final_decay=0.0)
    fit(Plain(), callback, max_epochs=4, logger=Notes())
    assert [i in logged for i in range(16)] == [i % 4 == 0 for i in range(16)]
    assert len(logged) == 4


def test_gauss_newton_serves_losses_that_mark_their_outputs():
    _, rates = fit(Classifier(), ExactGeN(curvature="gauss_newton"))
    assert max(rates.rates) > 1e-4


@pytest.mark.parametrize("frozen_from_the_start", [True, False])
def test_weights_may_be_frozen_and_thawed_during_training(frozen_from_the_start):
    class Freeze(Callback):
        batches = 0

        def on_fit_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(not frozen_from_the_start)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                pl_module.net[0].requires_grad_(frozen_from_the_start)

        def on_train_batch_end(self, *arguments):
            self.batches += 1

    watch = Freeze()
    quiet_trainer(callbacks=[ExactGeN(), watch], max_epochs=5).fit(Plain())
    assert watch.batches == 20


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_groups_added_by_finetuning_are_taken_over():
    class Backbone(Plain):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Backbone()
    before = module.backbone.weight.detach().clone()
    quiet_trainer(callbacks=[ExactGeN(), BackboneFinetuning(2, verbose=False)], max_epochs=5).fit(module)
    assert not torch.equal(module.backbone.weight.detach(), before)


def test_bounds_reach_the_rule():
    _, rates = fit(Plain(), ExactGeN(lr_max=1e-3, final_decay=0.0), max_epochs=20)
    assert max(rates.rates) == pytest.approx(1e-3)
    _, rates = fit(Plain(), ExactGeN(lr_min=0.5, final_decay=0.0))
    assert min(rates.rates) >= 0.5


def test_each_look_draws_its_own_random_numbers_and_sees_the_batch_as_it_came():
    seeds, sums = set(), []

    class InPlace(Plain):
        def training_step(self, batch, batch_idx):
            seeds.add(torch.initial_seed())
            sums.append(batch[0].sum().item())
            loss = super().training_step(batch, batch_idx)
            batch.clear()
            return loss

    fit(InPlace(), ExactGeN(final_decay=0.0), max_epochs=2)
    assert len(seeds) >= 7  # one for each of seven steps, and that of training
    assert 0.0 not in sums


def test_the_rate_that_is_logged_is_the_one_in_use_under_accumulation():
    pairs = []

    class Compare(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if "gen/lr" in trainer.callback_metrics and trainer.lr_scheduler_configs[0].scheduler.looks > len(pairs):
                rate = trainer.optimizers[0].param_groups[0]["lr"]
                pairs.append((float(trainer.callback_metrics["gen/lr"]), rate))

    quiet_trainer(callbacks=[ExactGeN(), Compare()], max_epochs=5, accumulate_grad_batches=2).fit(Plain())
    assert all(logged == pytest.approx(rate, rel=1e-6) for logged, rate in pairs)
    assert len(pairs) > 4


def test_a_callback_that_has_been_used_holds_no_data():
    seen = []

    class Noting(Plain):
        def training_step(self, batch, batch_idx):
            seen.append(weakref.ref(batch[0]))
            return super().training_step(batch, batch_idx)

    callback = ExactGeN()
    trainer, _ = fit(Noting(), callback)
    assert not trainer.lr_scheduler_configs[0].scheduler.is_pending
    gc.collect()
    assert all(batch() is None for batch in seen)


def test_the_bilevel_mixin_and_its_losses_are_served():
    trainer, rates = fit(Classifier(), ExactGeN())
    assert max(rates.rates) > 1e-4
    assert float(trainer.callback_metrics["gen/refused"]) == 0


@pytest.mark.parametrize("scheduled", [False, True], ids=["fixed", "scheduled"])
def test_every_n_batches_counts_batches_also_with_accumulation(scheduled):
    """Eight batches are two steps: as many looks as with every second batch and no accumulation."""

    def looks(every, batches, **options):
        callbacks = [ExactGeN(every, rule="published", final_decay=0.0), *options.pop("callbacks", [])]
        trainer = quiet_trainer(callbacks=callbacks, limit_train_batches=batches, limit_val_batches=0, **options)
        trainer.fit(Classifier(), DataLoader(classification_data(batches * 4), batch_size=4))
        return trainer.lr_scheduler_configs[0].scheduler.looks

    options = {"callbacks": [GradientAccumulationScheduler({0: 4})]} if scheduled else {"accumulate_grad_batches": 4}
    assert looks(8, 32, **options) == looks(2, 8)
    assert looks(8, 32, **options) > looks(32, 32, **options)


def test_a_loss_unlike_its_gradient_is_learned_by_differences_of_gradients():
    """The expected reward of a policy: looks at losses kept the rate at its lower bound, and the accuracy at chance."""

    class Policy(Digits):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            log_policy = self.net(images).log_softmax(1)[torch.arange(len(labels)), labels]
            return -(log_policy.exp().detach() * log_policy).mean()

    torch.manual_seed(0)
    data, images, labels = digits(0)
    module = Policy(torch.optim.AdamW, lr=0.1)
    with pytest.warns(UserWarning, match="does not change along its gradient") as caught:
        quiet_trainer(max_epochs=30, callbacks=[ExactGeN()]).fit(module, data)
    assert sum("along its gradient" in str(warning.message) for warning in caught) == 1
    assert float((module.net(images).argmax(1) == labels).float().mean()) > 0.7


def told(caplog):
    (line,) = (record.getMessage() for record in caplog.records if "the learning rate went" in record.getMessage())
    return line


def test_a_line_at_the_end_says_where_the_rate_went(caplog):
    with caplog.at_level("INFO"):
        trainer, rates = fit(Plain(), ExactGeN(), max_epochs=30)
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    expected = f"from {rates.rates[0]:.3g} to {scheduler.rules[0].lr:.3g} by {scheduler.looks} looks"
    assert told(caplog).startswith(f"ExactGeN: the learning rate went {expected}")
    assert "; the final decay took it to 0" in told(caplog)


def test_the_line_says_that_a_rate_has_not_settled(caplog):
    with caplog.at_level("INFO"):
        fit(Plain(), ExactGeN(final_decay=0.0), max_steps=5)
    assert told(caplog).endswith("by 5 looks; it has not settled yet")


def test_the_line_lists_the_rates_of_groups(caplog):
    class TwoGroups(Plain):
        def configure_optimizers(self):
            groups = [{"params": list(layer.parameters())} for layer in (self.net[0], self.net[-1])]
            return torch.optim.SGD(groups, lr=0.1)

    with caplog.at_level("INFO"):
        trainer, _ = fit(TwoGroups(), ExactGeN(final_decay=0.0, per_group=True), max_steps=5)
    first, second = (rule.lr for rule in trainer.lr_scheduler_configs[0].scheduler.rules)
    assert f" to {first:.3g}, {second:.3g} by 5 looks" in told(caplog)


def test_the_line_comes_after_an_error_too(caplog):
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 4:
                raise RuntimeError("a mistake of the user")
            return super().training_step(batch, batch_idx)

    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="a mistake of the user"):
        fit(Failing(), ExactGeN(final_decay=0.0), max_epochs=5)
    assert "by 4 looks" in told(caplog)


def test_the_line_of_a_resumed_run_counts_from_the_beginning(caplog, tmp_path):
    def line(steps, **options):
        caplog.clear()
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[ExactGeN(final_decay=0.0)], max_steps=steps)
        with caplog.at_level("INFO"):
            trainer.fit(Plain(), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return told(caplog)

    whole = line(8)
    line(4)
    assert line(8, ckpt_path=tmp_path / "last.ckpt") == whole

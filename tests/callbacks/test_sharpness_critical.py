"""SharpnessMonitor with method="critical": along the step of the optimizer, by forward passes alone."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_ifthpo import SharpnessMonitor
from lightning_ifthpo.step_size.critical import critical_step
from tests.helpers.monitored import OwnOptimizer, Plain, fit
from tests.helpers.trainers import Classifier, loader, quiet_trainer, same, trained


def critical(**options):
    return SharpnessMonitor(**({"every_n_batches": 1, "method": "critical", "max_overhead": None} | options))


class Steps(Callback):
    """Notes the critical step of each batch as it is computed by hand, from copies of the network."""

    def __init__(self, loss=None):
        self.loss, self.ratios, self.logged = loss, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [weight.detach().clone() for weight in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weights = list(pl_module.parameters())
        after = [weight.detach().clone() for weight in weights]

        @torch.no_grad()
        def loss_at(step):
            for weight, old, new in zip(weights, self.before, after, strict=True):
                weight.copy_(old + step * (new - old))
            x, y = batch
            value = self.loss(pl_module) if self.loss else F.cross_entropy(pl_module.net(x), y)
            for weight, new in zip(weights, after, strict=True):
                weight.copy_(new)
            return float(value)

        self.ratios.append(1.0 / critical_step(loss_at, max_evaluations=30, rtol=1e-9, dtype=torch.float64).step)
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("sharpness/")})


@pytest.mark.parametrize(
    "module",
    [
        lambda: Plain(momentum=0.9),
        lambda: Plain(torch.optim.AdamW, lr=0.03, weight_decay=0.1),
        lambda: Plain(torch.optim.Adagrad, lr=0.3),
        lambda: Plain(torch.optim.Rprop, lr=0.01),
    ],
    ids=["momentum", "AdamW", "Adagrad", "Rprop"],
)
def test_it_is_the_critical_step_along_the_update_that_was_made(module):
    """For any optimizer, known or not, and without a warning."""
    steps = Steps()
    trainer = quiet_trainer(
        callbacks=[critical(rtol=1e-6, max_iterations=30), steps], max_epochs=6, precision="64-true"
    )
    trainer.fit(module())
    assert [row["sharpness/edge_ratio"] for row in steps.logged] == pytest.approx(steps.ratios, rel=1e-4)
    assert steps.logged[-1]["sharpness/failures"] == steps.logged[-1]["sharpness/alarms"] == 0.0
    assert "sharpness/lambda_max" not in steps.logged[-1]


def test_the_sharpness_is_two_over_the_rate_of_the_critical_step():
    """The rate is the one that the step was made with, although a scheduler has changed it since."""

    class Scheduled(Plain):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(
                [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], 0.1
            )
            optimizer.param_groups[0]["lr"] = 0.01
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    metrics, trainer = fit(Scheduled(), critical(), max_epochs=3)
    assert metrics["sharpness/critical"] == pytest.approx(2.0 * metrics["sharpness/edge_ratio"] / (0.1 / 4))
    assert trainer.progress_bar_metrics["sharpness/max"] == pytest.approx(metrics["sharpness/critical"])


def test_a_ratio_that_is_only_a_bound_is_said_to_be_one():
    """Along an update uphill all steps raise the loss, and along one without an end none does."""

    class Straight(Plain):
        def training_step(self, batch, batch_idx):
            sign = -1.0 if batch_idx == 2 else 1.0  # of a batch that the momentum has not seen yet
            return sign * sum(weight.sum() for weight in self.parameters())

    steps = Steps()
    trainer = quiet_trainer(callbacks=[critical(), steps], max_epochs=1, limit_train_batches=4, precision="64-true")
    trainer.fit(Straight(momentum=0.9, lr=1e-3), loader(32, batch_size=8))
    assert [row["sharpness/bound"] for row in steps.logged] == [1.0] * 4
    assert [row["sharpness/edge_ratio"] > 1.0 for row in steps.logged] == [False, False, True, False]
    metrics, _ = fit(Plain(lr=3.0), critical())
    assert metrics["sharpness/bound"] == 0.0


def test_at_most_six_forward_passes():
    counts = []

    class Counting(Plain):
        def training_step(self, batch, batch_idx):
            counts[-1] += 1
            return super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            counts.append(0)

    steps = Steps()
    trainer = quiet_trainer(callbacks=[critical(), steps], max_epochs=10)
    trainer.fit(Counting())
    passes = [row["sharpness/evaluations"] for row in steps.logged]
    assert [count - 1 for count in counts] == passes
    assert max(passes) <= 6


def test_tolerance_and_budget_reach_the_search():
    rough, _ = fit(Plain(), critical(rtol=10.0), max_epochs=3)
    assert rough["sharpness/evaluations"] == 2.0
    few, _ = fit(Plain(), critical(max_iterations=3, rtol=1e-12), max_epochs=3)
    assert few["sharpness/evaluations"] == 3.0


@pytest.mark.parametrize("sizes", [[32], [7, 20, 5]], ids=["one batch", "uneven"])
def test_fixed_examples_are_weighted_one_by_one(sizes):
    x, y = next(iter(loader(32, batch_size=32, seed=5)))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    steps = Steps(lambda module: F.cross_entropy(module.net(x.double()), y))
    options = {"dataloader": batches, "rtol": 1e-6, "max_iterations": 30}
    trainer = quiet_trainer(callbacks=[critical(**options), steps], max_epochs=3, precision="64-true")
    trainer.fit(Plain(torch.optim.Adam, lr=0.03))
    assert [row["sharpness/edge_ratio"] for row in steps.logged] == pytest.approx(steps.ratios, rel=1e-4)


class WithOuterLoss(Classifier):
    """The outer loss is the training loss of other examples, in eval mode."""

    def __init__(self):
        super().__init__(hyper_lr=0.0)
        self.seen = []

    def outer_loss(self, batch):
        self.seen.append(self.training)
        return super().outer_loss(batch)


def test_the_outer_loss_along_the_steps_of_training():
    examples = loader(20, batch_size=8, seed=3)
    module = WithOuterLoss()
    metrics, _ = fit(module, critical(loss="outer", dataloader=examples))
    assert metrics["sharpness/edge_ratio"] > 0.0
    assert metrics["sharpness/failures"] == 0.0
    assert "sharpness/alarms" not in metrics  # a long step for the outer loss is no divergence
    assert not any(module.seen)
    inner, _ = fit(Classifier(), critical(dataloader=examples))
    assert inner["sharpness/edge_ratio"] != metrics["sharpness/edge_ratio"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2}, "leave out top_k and preconditioned"),
        ({"preconditioned": False}, "leave out top_k and preconditioned"),
        ({"loss": "outer"}, "needs method='critical' and dataloader="),
        ({"loss": "outer", "method": "lanczos", "dataloader": []}, "needs method='critical' and dataloader="),
        ({"loss": "validation"}, "loss"),
        ({"method": "hutchinson"}, "method"),
        ({"max_iterations": 2}, "max_evaluations"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        critical(**options)


def test_an_outer_loss_needs_the_mixin():
    with pytest.raises(TypeError, match=r"SharpnessMonitor\(loss='outer'\) needs a BilevelLightningModule, got Plain"):
        fit(Plain(), critical(loss="outer", dataloader=loader()))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "16-true"])
def test_half_precision(precision):
    """Weights with eight bits resolve a long step well enough to tell it from a short one."""
    for lr, is_long in ((0.3, False), (300.0, True)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*about to diverge")
            metrics, _ = fit(Plain(lr=lr), critical(), precision=precision, max_epochs=1)
        assert metrics["sharpness/failures"] == 0.0
        assert (metrics["sharpness/edge_ratio"] > 1.0) == is_long


def test_a_compiled_network_is_measured_as_it_is():
    class Compiled(Plain):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    metrics, _ = fit(Compiled(), critical())
    plain, _ = fit(Plain(), critical())
    assert metrics["sharpness/failures"] == 0.0
    assert metrics["sharpness/edge_ratio"] > 0.0
    assert plain["sharpness/edge_ratio"] > 0.0


def test_an_operation_without_any_second_derivative_is_no_obstacle():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].exp()

    class Module(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(Once.apply(self.net(batch[0])), batch[1])

    metrics, _ = fit(Module(), critical())
    assert metrics["sharpness/failures"] == 0.0
    assert metrics["sharpness/edge_ratio"] > 0.0


def test_a_step_of_length_zero_is_far_from_the_edge():
    metrics, _ = fit(Plain(lr=0.0), critical(), max_epochs=1)
    assert metrics["sharpness/edge_ratio"] == metrics["sharpness/evaluations"] == 0.0
    assert "sharpness/critical" not in metrics


def test_accumulated_gradients_make_one_step():
    steps = Steps()

    class Batches(Plain):
        def train_dataloader(self):
            return loader(32, batch_size=8)

    options = {"accumulate_grad_batches": 2, "precision": "64-true"}
    trainer = quiet_trainer(callbacks=[critical(rtol=1e-6, max_iterations=30), steps], max_epochs=1, **options)
    trainer.fit(Batches())
    assert "sharpness/edge_ratio" not in steps.logged[0]
    assert steps.logged[1]["sharpness/edge_ratio"] == pytest.approx(steps.ratios[1], rel=1e-4)
    assert steps.logged[2] == steps.logged[1]
    assert steps.logged[3]["sharpness/edge_ratio"] == pytest.approx(steps.ratios[3], rel=1e-4)


def test_manual_optimization_is_measured_without_an_alarm():
    metrics, _ = fit(OwnOptimizer(), critical())
    assert metrics["sharpness/edge_ratio"] > 0.0


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]
)
def test_an_observer_leaves_no_trace(options):
    observers = [critical(), critical(name="fixed", dataloader=loader(20, batch_size=8, seed=3), every_n_batches=2)]
    module, _, observed = trained(observers, **options)
    plain_module, _, plain = trained([], **options)
    assert same(observed.batches, plain.batches)
    assert module.evaluations == plain_module.evaluations
    assert [callback.failures for callback in observers] == [0, 0]


def test_it_resumes_where_it_was(tmp_path):
    def run(epochs, resume=None):
        torch.manual_seed(1)
        steps = Steps()
        trainer = quiet_trainer(callbacks=[critical(every_n_batches=2), steps], max_epochs=epochs)
        trainer.fit(Plain(momentum=0.9), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        for row in steps.logged:
            row.pop("sharpness/max", None)
        return steps.logged

    whole = run(8)
    run(5)
    assert run(8, resume=tmp_path / "5.ckpt") == whole[5:]
    assert len({row["sharpness/edge_ratio"] for row in whole}) == 4  # the first step, then every second


# The alarm


class Jumping(Plain):
    """Least squares with one batch an epoch; the learning rate is raised at some step."""

    def __init__(self, rates, **options):
        super().__init__(**options)
        self.net, self.rates = nn.Linear(4, 1), rates

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.net(x).squeeze(1) - y.to(x)).square().mean()
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.optimizers().param_groups[0]["lr"] = self.rates[min(self.global_step, len(self.rates) - 1)]


def alarms(module, monitor, epochs):
    """The epochs that ended with an alarm, the warnings, and the losses."""
    counts, losses = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            counts.append(float(trainer.callback_metrics.get("sharpness/alarms", 0.0)))
            losses.append(float(outputs["loss"]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(callbacks=[monitor, Watch()], max_epochs=epochs).fit(module)
    told = [str(warning.message) for warning in caught if "diverge" in str(warning.message)]
    return counts, told, losses


class Micro(Plain):
    """Four batches of eight in an epoch, and a validation."""

    def validation_step(self, batch, batch_idx):
        pass

    def train_dataloader(self):
        return loader(32, batch_size=8)


def test_the_first_step_is_measured_under_accumulation_and_early_stopping_finds_its_metric():

    steps = Steps()
    stop = EarlyStopping("sharpness/alarms", mode="max", stopping_threshold=0.5, patience=10**9)
    monitor = SharpnessMonitor(method="critical", rtol=1e-6, max_iterations=30)
    options = {"accumulate_grad_batches": 4, "precision": "64-true", "val_check_interval": 2}
    trainer = quiet_trainer(callbacks=[monitor, steps, stop], max_epochs=2, **options)
    trainer.fit(Micro(), val_dataloaders=loader(8))
    assert steps.logged[3]["sharpness/edge_ratio"] == pytest.approx(steps.ratios[3], rel=1e-4)
    assert trainer.global_step == 2


def test_a_warm_up_from_zero_has_the_metric_too():
    class WarmUp(Plain):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    metrics, _ = fit(WarmUp(), critical(every_n_batches=100), max_epochs=1)
    assert metrics["sharpness/alarms"] == metrics["sharpness/edge_ratio"] == 0.0


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_loss_is_watched_in_its_own_unit(accumulate):
    """Not as Lightning divides it by the number of batches in a step."""
    monitor = critical()
    trainer = quiet_trainer(callbacks=[monitor], max_epochs=1, accumulate_grad_batches=accumulate)
    module = Micro(lr=0.0)
    trainer.fit(module, val_dataloaders=loader(8))
    (losses,) = [monitor.state_dict()["divergence"]["losses"]]
    batches = [F.cross_entropy(module.net(x), y).item() for x, y in module.train_dataloader()]
    assert len(losses) == 4 // accumulate
    assert sum(losses) / len(losses) == pytest.approx(sum(batches) / 4, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_noise_of_small_batches_is_no_alarm(batch_size):
    """Momentum raises the loss of outliers, and a healthy run has many of them."""

    class Noisy(Plain):
        def __init__(self):
            super().__init__(torch.optim.AdamW, lr=1e-3)
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]).squeeze(1) - batch[1]).square().mean()

        def train_dataloader(self):
            x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
            noise = torch.randn(512, generator=torch.Generator().manual_seed(1))
            return DataLoader(TensorDataset(x, x[:, 0] + noise), batch_size)

    torch.manual_seed(0)
    metrics, _ = fit(Noisy(), critical(every_n_batches=1000), max_epochs=2)
    assert metrics["sharpness/alarms"] == 0.0


def test_a_lazy_layer_is_measured_once_it_has_weights():
    class Lazy(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))

    metrics, _ = fit(Lazy(), critical())
    assert metrics["sharpness/edge_ratio"] > 0.0


def test_the_first_step_is_measured_and_one_that_is_too_long_alarms():
    counts, told, losses = alarms(Jumping([10.0]), critical(every_n_batches=1000), 1)
    assert counts == [1.0]
    assert len(losses) == 1
    assert len(told) == 1
    assert "SharpnessMonitor, step 1: training is about to diverge: the last step is " in told[0]
    assert "and it is the first step. Lower the learning rate" in told[0]


def test_a_loss_that_grows_threefold_alarms_long_before_the_run_ends():
    """At a rate that makes the loss two to three times as large each step; regular measurements are far away."""
    counts, told, losses = alarms(Jumping([0.01] * 20 + [1.5]), critical(every_n_batches=1000), 40)
    first = next(index for index, count in enumerate(counts) if count)
    assert 20 < first < 25
    assert losses[first] < 30.0 * losses[20]
    assert losses[-1] > 1e3 * losses[20]
    assert len(told) == 1
    assert "the loss has grown from" in told[0]
    assert counts[-1] > 1.0  # later ones are counted


def test_a_grown_loss_alone_is_no_alarm():
    """One batch is much harder than the others, and steps are short."""
    x, y = next(iter(loader(40, batch_size=40)))
    batches = DataLoader(TensorDataset(torch.cat([x, 10.0 * x[:4]]), torch.cat([y, 5 * y[:4]])), batch_size=4)
    module = Jumping([1e-4])
    module.train_dataloader = lambda: batches
    counts, told, losses = alarms(module, critical(), 2)
    assert max(losses) > 3.0 * min(losses)
    assert not any(counts)
    assert not told


def test_a_step_at_the_edge_alone_is_no_alarm():
    """Gradient descent on one direction goes back and forth at its edge, and the loss stays."""

    class Bouncing(Jumping):
        def __init__(self):
            super().__init__([0.01, 1.0])
            self.net = nn.Linear(1, 1, bias=False)

        def training_step(self, batch, batch_idx):
            return self.net.weight.square().sum()

    steps = Steps(lambda module: module.net.weight.square().sum())
    trainer = quiet_trainer(callbacks=[critical(), steps], max_epochs=5)
    trainer.fit(Bouncing())
    assert [row["sharpness/edge_ratio"] for row in steps.logged[1:]] == pytest.approx([1.0] * 4, rel=0.01)
    assert steps.logged[-1]["sharpness/alarms"] == 0.0


def test_suspicions_are_followed_up_within_the_budget_after_the_first_few():
    """Losses jump at every second batch: eight measurements come at once, later ones as the budget allows."""
    x, y = next(iter(loader(32, batch_size=32)))
    batches = [
        (scale * x[i : i + 4], y[i : i + 4]) for _ in range(10) for i in range(0, 32, 4) for scale in (0.01, 3.0)
    ]

    class Hard(Plain):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean() * batch[0].square().mean()

    counts = []
    for budget in (1e-9, None):
        module = Hard(lr=1e-3)
        module.train_dataloader = lambda: DataLoader(batches, batch_size=None)
        monitor = critical(every_n_batches=10**6, max_overhead=budget)
        fit(module, monitor, max_epochs=1)
        counts.append(monitor.state_dict()["tracker"]["measurements"])
    assert counts[0] == 8
    assert counts[1] > 50


def test_a_loss_of_nan_is_a_failure_and_training_goes_on():
    class Broken(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"] * math.nan

    with pytest.warns(UserWarning, match="the loss before the update is nan"):
        metrics, trainer = fit(Broken(), critical(), max_epochs=2)
    assert metrics["sharpness/failures"] >= 1.0
    assert trainer.current_epoch == 2

"""What losses of existing modules do besides computing a value leaves no trace when a callback evaluates them."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from tests.helpers.device import DEVICE
from tests.helpers.trainers import Classifier, Recorder, classification_data, loader, quiet_trainer, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:hyper step .* ended with status"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:finite differences in .* are not reliable"),
]


class Adversarial(Classifier):
    """Attacks its input by a backward pass inside the loss, which leaves gradients on the weights."""

    def inner_loss(self, batch):
        x, y = batch
        attacked = x.clone().requires_grad_()
        F.cross_entropy(self.net(attacked), y).backward()
        return super().inner_loss(((x + 0.1 * attacked.grad.sign()).detach(), y))


class OptimizerInBackward(Classifier):
    """Weights with a hook that acts whenever a gradient has been accumulated, as optimizers inside backward do."""

    def __init__(self, **options):
        super().__init__(**options)
        self.acted = 0
        self.net[0].weight.register_post_accumulate_grad_hook(self.act)

    def act(self, weight):
        self.acted += 1
        weight.grad.mul_(0.5)

    def inner_loss(self, batch):
        F.cross_entropy(self.net(batch[0]), batch[1]).backward()
        return super().inner_loss(batch) + 0.001 * self.acted * self.net[0].weight.square().sum()


class Hooked(Classifier):
    """Clips gradients by hooks on weights and layers, and notes their norms."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norms = []
        for weight in self.net.parameters():
            weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        self.net[0].weight.register_hook(lambda gradient: self.norms.append(float(gradient.norm())))
        self.net[2].register_full_backward_hook(lambda layer, before, after: (0.5 * before[0],))
        self.net[4].register_full_backward_pre_hook(lambda layer, gradients: (0.5 * gradients[0],))

    def inner_loss(self, batch):
        return super().inner_loss(batch) + 0.001 * len(self.norms) * self.net[0].weight.square().sum()


class Streaming(Classifier):
    """Takes noise from an iterator."""

    def __init__(self, **options):
        super().__init__(**options)
        self.noise = iter(DataLoader(torch.randn(200, 4, generator=torch.Generator().manual_seed(5)), batch_size=8))

    def inner_loss(self, batch):
        return super().inner_loss((batch[0] + 0.1 * next(self.noise).to(batch[0]), batch[1]))


class Wrapped(Classifier):
    """Logs by methods of its own."""

    def note(self, name, value):
        super().log(name, value, on_epoch=True)
        super().log_dict({f"{name}/twice": 2 * value}, on_epoch=True)

    def inner_loss(self, batch):
        loss = super().inner_loss(batch)
        self.note("noted", loss)
        return loss


class Graph:
    """A batch of a class of its own."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device, **options):
        return Graph(self.x.to(device), self.y.to(device))


class OwnBatches(Classifier):
    """Rewrites its batch."""

    def training_step(self, batch, batch_idx):
        return self.inner_loss(batch)

    def validation_step(self, batch, batch_idx):
        return self.outer_loss(batch)

    def inner_loss(self, batch):
        batch.x = 2.0 * batch.x
        batch.y.add_(1).remainder_(3)
        self.accuracy.update(torch.zeros(len(batch.x), 3, device=self.device), batch.y)
        return F.cross_entropy(self.net(batch.x), batch.y) + self.decay()

    def outer_loss(self, batch):
        return F.cross_entropy(self.net(batch.x), batch.y)

    def data(self, n, seed):
        collate = lambda pairs: Graph(*map(torch.stack, zip(*pairs, strict=True)))  # noqa: E731
        return DataLoader(classification_data(n, seed), batch_size=8, collate_fn=collate)

    def train_dataloader(self):
        return self.data(32, 0)

    def val_dataloader(self):
        return self.data(16, 2)

    def outer_dataloader(self):
        return self.data(24, 1)


class Hidden(Classifier):
    """Keeps a teacher where `modules()` does not find it, and an object that averages."""

    def __init__(self, **options):
        super().__init__(**options)
        self.hidden = [nn.Linear(4, 3).requires_grad_(False).to(DEVICE)]
        self.average = Average()

    def inner_loss(self, batch):
        with torch.no_grad():
            self.hidden[0].weight.mul_(0.9)
            self.average.update(batch[0].mean(0))
        target = self.hidden[0](batch[0]) + self.average.values[-1].sum()
        return super().inner_loss(batch) + F.mse_loss(self.net(batch[0]), target)


class Average:
    def __init__(self):
        self.mean, self.values = torch.zeros(4, device=DEVICE), []

    def update(self, x):
        self.mean.mul_(0.9).add_(x, alpha=0.1)
        self.values.append(self.mean.clone())


class Mapped(Classifier):
    """A buffer that is an expanded view, and a tensor that cannot be written to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.net[0].register_buffer("shift", torch.full((1, 4), 0.1).expand(8, 4))
        self.prior = torch.tensor(0.1).expand(3)

    def inner_loss(self, batch):
        return super().inner_loss((batch[0] + self.net[0].shift, batch[1])) + self.prior.sum()


MODULES = [Adversarial, OptimizerInBackward, Hooked, Streaming, Wrapped, OwnBatches, Hidden, Mapped]
OBSERVERS = {
    "hypergradient": lambda: IFTHypergradient(1, curvature="hessian", on_failure="use"),
    "differences": lambda: IFTHypergradient(2, curvature="finite_difference", on_failure="use"),
    "monitor": lambda: SharpnessMonitor(1, max_overhead=None, max_iterations=5),
    "critical": lambda: SharpnessMonitor(1, method="critical", max_overhead=None),
}


def run(kind, *callbacks, **options):
    torch.manual_seed(0)
    module, recorder = kind(hyper_lr=0.0), Recorder()
    trainer = quiet_trainer(callbacks=[*callbacks, recorder], **({"max_epochs": 2} | options))
    trainer.fit(module)
    others = {key: float(value) for key, value in trainer.callback_metrics.items() if "/" not in key or "noted" in key}
    return module, recorder, others


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("kind", MODULES)
def test_training_is_bit_identical(kind, observer, accumulate):
    callback = OBSERVERS[observer]()
    watched, recorder, logged = run(kind, callback, accumulate_grad_batches=accumulate)
    plain, expected, wanted = run(kind, accumulate_grad_batches=accumulate)
    assert same(recorder.batches, expected.batches)
    assert same(recorder.logged, expected.logged)
    assert logged == wanted
    assert getattr(callback, "failures", 0) == 0
    for name in ("acted", "norms"):
        assert getattr(watched, name, None) == getattr(plain, name, None)
    if kind is Streaming:
        assert torch.equal(next(watched.noise), next(plain.noise))
    if kind is Hidden:
        assert same(watched.hidden[0].state_dict(), plain.hidden[0].state_dict())
        assert same(watched.average.values, plain.average.values)


@pytest.mark.parametrize("kind", MODULES[1:])  # an attack follows the weights, which only differences see
def test_learning_rates_do_not_depend_on_how_often_a_loss_was_evaluated(kind):
    """A look by the Hessian evaluates once, one by three points three times, and both see the same losses."""
    rates = []
    for curvature in ("three_point", "hessian"):
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[ExactGeN(1, curvature=curvature)], max_epochs=2)
        trainer.fit(kind())
        rates.append(float(trainer.callback_metrics["gen/lr"]))
    assert rates[0] == pytest.approx(rates[1], rel=0.3)


@pytest.mark.parametrize("curvature", ["hessian", "finite_difference"])
def test_hooks_on_gradients_do_not_change_the_curvature(curvature):
    class Clipped(Classifier):
        clip = None

        def __init__(self):
            super().__init__(lr=1e-9)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
            if self.clip:
                for weight in self.net.parameters():
                    weight.register_hook(lambda gradient: gradient.clamp(-self.clip, self.clip))

        def inner_loss(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    values = []
    for clip in (None, 1.0, 0.1, 0.01):
        Clipped.clip = clip
        torch.manual_seed(0)
        callback = SharpnessMonitor(4, max_overhead=None, max_iterations=60, rtol=1e-4, curvature=curvature)
        trainer = quiet_trainer(callbacks=[callback])
        trainer.fit(Clipped())
        values.append(float(trainer.callback_metrics["sharpness/lambda_max"]))
    assert values == pytest.approx([values[0]] * 4, rel=1e-4)


LOGGING = {
    "log_dir": lambda module: (Path(module.logger.log_dir) / "pictures").mkdir(parents=True, exist_ok=True),
    "save_dir": lambda module: list(Path(module.logger.save_dir).iterdir()),
    "trainer.log_dir": lambda module: Path(module.trainer.log_dir) / "x",
    "second logger": lambda module: module.loggers[1].log_metrics({"x": 1.0}, step=module.global_step),
    "unpacked": lambda module: [logger.experiment for logger in module.loggers][0].add_scalar("x", 1.0),  # noqa: RUF015
    "by type": lambda module: next(
        logger for logger in module.loggers if isinstance(logger, TensorBoardLogger)
    ).experiment.add_scalar("x", 1.0),
    "version": lambda module: f"{module.logger.version:>10}{module.logger.name.upper()}",
}


@pytest.mark.parametrize("callback", ["hypergradient", "monitor", "gen"])
@pytest.mark.parametrize("name", LOGGING)
def test_loggers_can_be_used_as_in_training(name, callback, tmp_path):
    class Logging(Classifier):
        def inner_loss(self, batch):
            LOGGING[name](self)
            return super().inner_loss(batch)

    made = ExactGeN(1) if callback == "gen" else OBSERVERS[callback]()
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = quiet_trainer(callbacks=[made], logger=loggers)
    trainer.fit(Logging(), loader())
    assert getattr(made, "failures", 0) == 0
    assert loggers[0].version == 0

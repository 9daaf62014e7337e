"""Small bilevel modules, and a Trainer that says nothing."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.hyperparameters import WeightDecay
from tests.helpers.device import DEVICE

ACCELERATOR: dict[str, Any] = (
    {"accelerator": "gpu", "devices": [DEVICE.index or 0]} if DEVICE.type == "cuda" else {"accelerator": DEVICE.type}
)


def quiet_trainer(**options: Any) -> L.Trainer:
    defaults = {
        **ACCELERATOR,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "max_epochs": 1,
    }
    return L.Trainer(**(defaults | options))


def classification_data(n: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, (x @ torch.tensor([1.0, -1.0, 0.5, 0.0]) > 0).long() + (x[:, 3] > 1).long())


def loader(n: int = 32, batch_size: int = 8, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(classification_data(n, seed), batch_size=batch_size)


class Classifier(BilevelLightningModule, L.LightningModule):
    """Dropout, BatchNorm, a metric, logging and a Python counter in the losses: all that must not be disturbed."""

    def __init__(self, *, lr: float = 0.1, hyper_lr: float = 0.1, optimizer: str = "SGD") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.register_hyperparameter("decay", WeightDecay(self.net, "tensor", initial=0.01))
        self.lr, self.hyper_lr, self.optimizer = lr, hyper_lr, optimizer
        self.evaluations = 0

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        self.evaluations += 1
        logits = self.mark_outputs(self.net(x))
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        loss = F.cross_entropy(logits, y)
        self.log("data_loss", loss)
        return loss + self.decay()

    def outer_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return getattr(torch.optim, self.optimizer)(self.inner_parameters(), lr=self.lr)

    def configure_hyper_optimizer(self) -> Any:
        return torch.optim.Adam(self.hyperparameters(), lr=self.hyper_lr)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16, seed=2)

    def outer_dataloader(self) -> Any:
        return loader(20, batch_size=6, seed=1)


class Ridge(BilevelLightningModule, L.LightningModule):
    """Full-batch ridge regression, whose hypergradient is known in closed form."""

    def __init__(self, *, lr: float = 0.3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x, self.xv = torch.randn(2, 20, 4, dtype=torch.float64, generator=generator)
        self.y, self.yv = torch.randn(2, 20, dtype=torch.float64, generator=generator)
        slope = torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)
        self.y, self.yv = self.y + self.x @ slope, self.yv + self.xv @ slope
        self.w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        self.register_hyperparameter("log_decay", torch.tensor(-1.0, dtype=torch.float64))
        self.lr = lr

    def inner_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self.mark_outputs(x @ self.w) - y).square().mean() / 2 + self.log_decay.exp() * self.w @ self.w / 2

    def outer_loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (x @ self.w - y).square().mean() / 2

    def closed_form(self, log_decay: Tensor) -> Tensor:
        """Returns dL_V(w*(λ))/dλ at the minimum w*."""
        decay = log_decay.exp()
        gram = self.x.T @ self.x / 20 + decay * torch.eye(4, dtype=torch.float64)
        optimum = torch.linalg.solve(gram, self.x.T @ self.y / 20)
        return -(self.xv.T @ (self.xv @ optimum - self.yv) / 20) @ torch.linalg.solve(gram, decay * optimum)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def configure_hyper_optimizer(self) -> Any:
        return torch.optim.SGD(self.hyperparameters(), lr=1.0)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=20)

    def val_dataloader(self) -> Any:
        return self.outer_dataloader()

    def outer_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.xv, self.yv), batch_size=20)


class ResumableLoader:
    """Batches that go on inside an epoch where they stopped, as a stateful loader does; each epoch has one order."""

    def __init__(self, dataset: Dataset[Any], batch_size: int) -> None:
        self.batches = [dataset[start : start + batch_size] for start in range(0, len(dataset), batch_size)]  # type: ignore[arg-type]
        self.next = self.first = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.next, self.first = self.first, 0
        while self.next < len(self):
            self.next += 1
            yield self.batches[self.next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["next"] % len(self)  # an epoch at its end is over


class Deterministic(Classifier):
    """Resumes exactly: without dropout, whose random state Lightning does not restore."""

    def __init__(self) -> None:
        super().__init__(optimizer="AdamW", lr=0.02)
        self.net[3].p = 0.0

    def train_dataloader(self) -> Any:
        return ResumableLoader(classification_data(32), batch_size=8)


OWN_METRICS = ("hypergrad/", "hyperparameter/", "sharpness/", "gen/")


class Recorder(Callback):
    """Notes what each batch leaves behind."""

    def __init__(self) -> None:
        self.batches, self.logged, self.own = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = [p.grad.clone() for p in pl_module.parameters() if p.grad is not None]
        state = {k: v.clone() for k, v in pl_module.state_dict().items()}
        modes = [m.training for m in pl_module.modules()]
        self.batches.append((state, gradients, modes, torch.get_rng_state(), outputs["loss"].clone()))
        self.own |= {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(OWN_METRICS)}
        metric = getattr(pl_module, "accuracy", None)
        if metric is not None:
            self.logged.append({k: v.clone() for k, v in metric.metric_state.items()} | {"count": metric.update_count})

    def on_train_epoch_end(self, trainer, pl_module):
        others = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(OWN_METRICS)}
        self.logged.append(others)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right.to(left.device))  # after a fit, modules are on the CPU
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def trained(callbacks, make=Classifier, **options):
    """Makes a module, and trains it for three epochs of four batches."""
    torch.manual_seed(7)
    module = make()
    recorder = Recorder()
    trainer = quiet_trainer(callbacks=[*callbacks, recorder], **({"max_epochs": 3} | options))
    trainer.fit(module)
    return module, trainer, recorder


class Acting(Callback):
    """Does something at the start of each batch, as a callback would."""

    def __init__(self, action):
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.action(trainer, pl_module)


def during_training(action, make=Classifier, datamodule=None, **options):
    """Calls action(trainer, module) before the only batch of a run."""
    limits = {"limit_train_batches": 1, "limit_val_batches": 0}
    trainer = quiet_trainer(callbacks=[Acting(action)], **(limits | options))
    trainer.fit(make(), datamodule=datamodule)
    return trainer

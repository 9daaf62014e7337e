"""Features of the Trainer, each as a fit in which our callbacks have to work or be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import callbacks
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.hyperparameters import WeightDecay
from tests.helpers.device import DEVICE
from tests.helpers.trainers import Classifier, classification_data, loader


class Manual(Classifier):
    """Makes its steps itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizers = self.optimizers()
        loss = self.inner_loss(batch)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()
        return loss


class SeveralOptimizers(Manual):
    """An optimizer for each half of the network."""

    def configure_optimizers(self) -> Any:
        halves = self.net[:2], self.net[2:]
        return [torch.optim.SGD(half.parameters(), lr=self.lr) for half in halves]


class LBFGS(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.inner_parameters(), lr=self.lr, max_iter=2)


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class OwnClipping(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="value")


class Simple(Classifier):
    """Only what every module has."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = self.network()
        self.decay = WeightDecay(self.net, initial=0.01)

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def inner_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.mark_outputs(self.logits(batch[0])), batch[1]) + self.decay()

    def outer_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.logits(batch[0]), batch[1])


class CompiledAttribute(Simple):
    def network(self) -> nn.Module:
        return torch.compile(super().network(), backend="aot_eager")


class CompiledInPlace(Simple):
    def network(self) -> nn.Module:
        net = super().network()
        net.compile(backend="aot_eager")
        return net


class CompiledFunction(Simple):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.logits = torch.compile(self.net.forward, backend="aot_eager")


class Attention(Simple):
    """Fused attention has no second derivative."""

    def network(self) -> nn.Module:
        return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.1)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x.view(len(x) // 2, 2, 4)).flatten(0, 1)[:, :3]


class LSTM(Simple):
    """cuDNN's recurrent kernels have no second derivative."""

    def network(self) -> nn.Module:
        return nn.LSTM(1, 3, batch_first=True)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(2))[0][:, -1]


class GRU(LSTM):
    def network(self) -> nn.Module:
        return nn.GRU(1, 3, batch_first=True)


class Checkpointed(Simple):
    """Repeats its forward pass during the backward pass."""

    def logits(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class Point(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Example:
    x: Tensor
    y: Tensor


def structured(wrap: Callable[[Tensor, Tensor], Any], unwrap: Callable[[Any], tuple[Tensor, Tensor]]) -> type:
    """Returns a classifier whose batches have a structure of their own."""

    class Structured(Classifier):
        def inner_loss(self, batch: Any) -> Tensor:
            return super().inner_loss(unwrap(batch))

        def outer_loss(self, batch: Any) -> Tensor:
            return super().outer_loss(unwrap(batch))

        def train_dataloader(self) -> Any:
            return DataLoader([wrap(x, y) for x, y in super().train_dataloader()], batch_size=None)

        def val_dataloader(self) -> Any:
            return DataLoader([wrap(x, y) for x, y in super().val_dataloader()], batch_size=None)

        def outer_dataloader(self) -> Any:
            return DataLoader([wrap(x, y) for x, y in super().outer_dataloader()], batch_size=None)

    return Structured


class TwoLoaders(Classifier):
    """Batches come from two loaders at once."""

    combine: Any = staticmethod(lambda loaders: loaders)

    def inner_loss(self, batch: Any) -> Tensor:
        return super().inner_loss(batch["left"]) + super().inner_loss(batch["right"])

    def train_dataloader(self) -> Any:
        return self.combine({"left": loader(), "right": loader(seed=3)})


class Combined(TwoLoaders):
    combine = staticmethod(lambda loaders: CombinedLoader(loaders, "max_size_cycle"))


class Stream(IterableDataset[Any]):
    """Examples of unknown number."""

    def __iter__(self) -> Any:
        return iter(classification_data(32))


class Streaming(Classifier):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=8)

    def outer_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=6)


class Data(L.LightningDataModule):
    """Brings all data, and puts them on the device its own way."""

    def train_dataloader(self) -> Any:
        return loader(seed=4)

    def val_dataloader(self) -> Any:
        return loader(16, seed=5)

    def outer_dataloader(self) -> Any:
        return loader(20, batch_size=6, seed=6)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 2.0, batch[1]]


class WithoutOuterData(Classifier):
    outer_dataloader = None


def fit(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.fit(module)


def fit_compiled(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.fit(torch.compile(module, backend="aot_eager"))


def fit_with_data(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.fit(module, datamodule=Data())


def fit_twice(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.fit(module)
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(module)


def fit_between_evaluations(trainer: L.Trainer, module: L.LightningModule) -> None:
    trainer.validate(module, verbose=False)
    trainer.fit(module)
    trainer.test(module, loader(), verbose=False)


class Tested(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.outer_loss(batch))


def _ema() -> L.Callback:
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip(f"lightning {L.__version__} has no WeightAveraging")
    return callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))


MANUAL = {"ExactGeN": "optimizes manually"}


@dataclass(frozen=True)
class Feature:
    """A fit.

    Args:
        make: Makes the module, given learning rates.
        options: Of the Trainer.
        callbacks: Functions that make further callbacks.
        fit: Trains.
        refused: What the message of a refusal says, for each callback that is refused.
        warned: What a warning says, for each callback that works with a warning.
    """

    make: Callable[..., L.LightningModule] = Classifier
    options: Callable[[], dict[str, Any]] = dict
    callbacks: tuple[Callable[[], L.Callback], ...] = ()
    fit: Callable[[L.Trainer, L.LightningModule], None] = fit
    refused: dict[str, str] = field(default_factory=dict)
    warned: dict[str, str] = field(default_factory=dict)


def trainer(make: Callable[..., L.LightningModule] = Classifier, **options: Any) -> Feature:
    """Returns a feature that is an option of the Trainer."""
    return Feature(make, options=lambda: options)


FEATURES = {
    "32-true": Feature(),
    "64-true": trainer(precision="64-true"),
    "bf16-mixed": trainer(precision="bf16-mixed"),
    "16-mixed": Feature(
        options=lambda: {
            "plugins": [MixedPrecision("16-mixed", DEVICE.type, torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10))]
        }
    ),
    "bf16-true": trainer(precision="bf16-true"),
    "accumulate_grad_batches": trainer(accumulate_grad_batches=3),
    "gradient_clip_val": trainer(gradient_clip_val=0.1),
    "configure_gradient_clipping": Feature(OwnClipping),
    "learning rate scheduler": Feature(Scheduled, warned={"ExactGeN": "ExactGeN replaces CosineAnnealingLR"}),
    "manual optimization": Feature(Manual, refused=MANUAL),
    "several optimizers": Feature(SeveralOptimizers, refused=MANUAL),
    "LBFGS": Feature(
        LBFGS,
        refused={"ExactGeN": "LBFGS"},
        warned={
            "IFTHypergradient": "the update rule of LBFGS is not known",
            "SharpnessMonitor": "the stability edge of LBFGS is not known",
        },
    ),
    "torch.compile(module)": Feature(Simple, fit=fit_compiled),
    "self.net = torch.compile(self.net)": Feature(CompiledAttribute),
    "self.net.compile()": Feature(CompiledInPlace),
    "torch.compile(function)": Feature(CompiledFunction),
    "fused attention": Feature(Attention),
    "LSTM": Feature(LSTM),
    "GRU": Feature(GRU),
    "activation checkpointing": Feature(Checkpointed),
    "EMA (WeightAveraging)": Feature(callbacks=(_ema,)),
    "StochasticWeightAveraging": Feature(
        callbacks=(lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),),
        refused={"ExactGeN": "sets its own learning rates"},
    ),
    "overfit_batches": trainer(overfit_batches=2),
    "limit_train_batches": trainer(limit_train_batches=3),
    "limit_val_batches=0": trainer(limit_val_batches=0),
    "val_check_interval": trainer(val_check_interval=2),
    "check_val_every_n_epoch": trainer(check_val_every_n_epoch=2),
    "reload_dataloaders_every_n_epochs": trainer(reload_dataloaders_every_n_epochs=1),
    "fast_dev_run": trainer(fast_dev_run=2),
    "detect_anomaly": trainer(detect_anomaly=True),
    "deterministic": trainer(deterministic=True),
    "profiler": trainer(profiler="simple"),
    "iterable dataset": trainer(Streaming),
    "dict batches": Feature(structured(lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"]))),
    "list batches": Feature(structured(lambda x, y: [[x], y], lambda batch: (batch[0][0], batch[1]))),
    "dataclass batches": Feature(structured(Example, lambda batch: (batch.x, batch.y))),
    "named tuple batches": Feature(structured(Point, lambda batch: (batch.x, batch.y))),
    "dict of loaders": Feature(TwoLoaders),
    "CombinedLoader": Feature(Combined),
    "LightningDataModule": Feature(WithoutOuterData, fit=fit_with_data),
    "validate and test between fits": Feature(Tested, fit=fit_between_evaluations),
    "two fits in a row": Feature(fit=fit_twice),
    "another IFTHypergradient": Feature(callbacks=(lambda: IFTHypergradient(3, curvature="hessian"),)),
}

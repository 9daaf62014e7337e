"""What callbacks share that do something after every n-th training batch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch

from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.cadence import Cadence, synchronization
from lightning_ifthpo.runtime.loggers import log_metrics


class PeriodicCallback(L.Callback):
    """Fires when its cadence says so, on a copy of the training batch as it was before training used it."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """The metric for the progress bar."""

    def _begin(self, cadence: Cadence) -> None:
        """Starts anew."""
        self._cadence = cadence
        self._batch: Any = None
        self._fired = False

    @abstractmethod
    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Does what is to be done and returns metrics to log."""

    def _illustrate(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Does what was asked for beside that, whatever it costs."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch where it may be needed, before the training step changes it or takes it apart."""
        self._batch = copied(batch) if self._cadence.may_fire(last_chance=self._hurries(trainer)) else None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes that the weights move."""
        self._cadence.optimizer_stepped()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fires when it is time to."""
        if not pl_module.automatic_optimization:
            self._cadence.optimizer_stepped()  # the hook is called for Lightning's own optimizers only
        kept, self._batch = self._batch, None
        if not self._cadence.is_due(last_chance=self._hurries(trainer)) or kept is None:
            return
        self._fired = True
        synchronize = synchronization(pl_module.device)
        with self._cadence.firing(synchronize):
            log_metrics(trainer, pl_module, self._fire(trainer, pl_module, kept), headline=self.headline)
        with self._cadence.off_budget(synchronize):
            self._illustrate(trainer, pl_module, kept)

    def _hurries(self, trainer: L.Trainer) -> bool:
        """Whether there may be no second chance."""
        return bool(getattr(trainer, "fast_dev_run", False)) and not self._fired

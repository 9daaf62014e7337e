"""The base class of callbacks that act after every n-th training batch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.cadence import Cadence
from lightning_ifthpo.runtime.loggers import log_metrics


class PeriodicCallback(L.Callback):
    """Fires when its `Cadence` says so, on a copy of the training batch from before the training step.

    A subclass calls `_restart` at the end of its constructor, and sets `headline`, the metric for the progress bar.
    """

    headline: str

    def __init__(
        self, every_n_batches: int, *, start_after_batches: int = 0, max_overhead: float | None = None
    ) -> None:
        super().__init__()
        self.every_n_batches = every_n_batches
        self.start_after_batches = start_after_batches
        self.max_overhead = max_overhead

    @abstractmethod
    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Does the work of the callback and returns metrics to log."""

    def _illustrate(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Does further work; its time does not count against the budget."""

    def _restart(self) -> None:
        """Sets the state before training."""
        self._cadence = Cadence(self.every_n_batches, self.start_after_batches, self.max_overhead)
        self._batch: Any = None
        self._has_fired = False
        self._has_warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the callback; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps a copy of the batch if it may be needed; the training step may change the batch."""
        self._batch = copied(batch) if self._cadence.may_fire(last_chance=self._is_last_chance(trainer)) else None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Records an optimizer step."""
        self._cadence.optimizer_stepped()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fires if the cadence says so."""
        if not pl_module.automatic_optimization:
            self._cadence.optimizer_stepped()  # torch's own optimizers do not call on_before_optimizer_step
        kept, self._batch = self._batch, None
        if not self._cadence.is_due(last_chance=self._is_last_chance(trainer)) or kept is None:
            return
        self._has_fired = True
        synchronize = torch.accelerator.synchronize if pl_module.device.type != "cpu" else lambda: None
        with self._cadence.firing(synchronize):
            log_metrics(trainer, pl_module, self._fire(trainer, pl_module, kept), headline=self.headline)
        with self._cadence.off_budget(synchronize):
            self._illustrate(trainer, pl_module, kept)

    def _is_last_chance(self, trainer: L.Trainer) -> bool:
        """Returns whether this is the last batch on which the callback can fire (fast_dev_run)."""
        return bool(getattr(trainer, "fast_dev_run", False)) and not self._has_fired

    def _warn_once(self, message: str) -> None:
        """Warns the first time in a fit."""
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(message)

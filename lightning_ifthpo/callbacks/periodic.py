"""The base class of callbacks that act after every n-th training batch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning as L
import torch

from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.cadence import Cadence
from lightning_ifthpo.runtime.loggers import log_metrics, publish
from lightning_ifthpo.runtime.progress import Progress
from lightning_ifthpo.runtime.telling import rank_zero_warn


class PeriodicCallback(L.Callback):
    """Fires when its `Cadence` says so, on a copy of the training batch from before the training step.

    A subclass calls `_restart` at the end of its constructor, and sets `headlines`, see `log_metrics`, and `work`, what
    it does in two words.
    """

    headlines: Mapping[str, str]
    work: ClassVar[str]

    def __init__(
        self, every_n_batches: int, *, start_after_batches: int = 0, max_overhead: float | None = None
    ) -> None:
        super().__init__()
        self.every_n_batches = every_n_batches
        self.start_after_batches = start_after_batches
        self.max_overhead = max_overhead

    @property
    def share_of_time(self) -> float:
        """Time of its work over the training time with it, in the last fit."""
        return self._cadence.share_of_time

    @abstractmethod
    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Does the work of the callback and returns metrics to log.

        Raises:
            NoLossError: If there is no training loss on this batch; it is called again after the next batch.
        """

    def _illustrate(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Does further work; its time does not count against the budget."""

    def _restart(self) -> None:
        """Sets the state before training."""
        self._cadence = Cadence(self.every_n_batches, self.start_after_batches, self.max_overhead)
        self._progress = Progress()
        self._batch: Any = None
        self._metrics: dict[str, float] = {}
        self._has_fired = False
        self._has_warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the callback; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            self._restart()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives other callbacks the metrics that a checkpoint has brought."""
        publish(trainer, self._metrics)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps a copy of the batch if it may be needed; the training step may change the batch."""
        may_fire = self._cadence.may_fire(last_chance=self._is_last_chance(trainer))
        self._batch = copied(batch) if may_fire or self._lacks_metrics(trainer) else None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Records an optimizer step."""
        self._cadence.optimizer_stepped()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fires if the cadence says so, or else provides metrics that other callbacks will read."""
        if not pl_module.automatic_optimization:
            self._cadence.optimizer_stepped()  # torch's own optimizers do not call on_before_optimizer_step
        kept, self._batch = self._batch, None
        due = self._cadence.is_due(last_chance=self._is_last_chance(trainer))
        if kept is None:
            return
        try:
            self._act(trainer, pl_module, kept, due=due)
        except NoLossError:
            check_single_process(trainer)
            self._cadence.postpone()

    def _act(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, *, due: bool) -> None:
        synchronize = torch.accelerator.synchronize if module.device.type != "cpu" else lambda: None
        if due:
            with self._cadence.firing(synchronize):
                with self._progress.showing(trainer, self.work):
                    self._metrics = self._fire(trainer, module, batch)
                log_metrics(trainer, module, self._metrics, headlines=self.headlines)
            self._has_fired = True
            with self._cadence.off_budget(synchronize):
                self._illustrate(trainer, module, batch)
        elif self._lacks_metrics(trainer):
            with self._cadence.off_budget(synchronize):
                with self._progress.showing(trainer, self.work):
                    self._metrics = self._preview(trainer, module, batch)
                publish(trainer, self._metrics)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets the data and the model, because a callback outlives the fit."""
        self._batch = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Does the same; the Trainer does not call `teardown` after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def _preview(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Returns metrics for other callbacks before the first firing, without an effect on later ones."""
        return {}

    def _lacks_metrics(self, trainer: L.Trainer) -> bool:
        """Returns whether other callbacks may read metrics after this batch, and there are none yet."""
        return not self._metrics and readers_follow(trainer)

    def _is_last_chance(self, trainer: L.Trainer) -> bool:
        """Returns whether this is the last batch on which the callback can fire (fast_dev_run)."""
        return bool(getattr(trainer, "fast_dev_run", False)) and not self._has_fired

    def _warn_once(self, message: str) -> None:
        """Warns the first time in a fit."""
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(message)


def readers_follow(trainer: L.Trainer) -> bool:
    """Returns whether validation or the end of an epoch follows this batch, where other callbacks read metrics."""
    every = trainer.val_check_batch
    if every is None:  # validation depends on the clock, and may follow any batch
        return True
    loop = trainer.fit_loop
    index = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx
    return trainer.is_last_batch or (math.isfinite(every) and (index + 1) % every == 0)


def is_monitored(trainer: Any, prefixes: tuple[str, ...]) -> bool:
    """Returns whether a callback or a scheduler monitors a metric with such a name."""
    monitors = [getattr(callback, "monitor", None) for callback in trainer.callbacks]
    monitors += [config.monitor for config in trainer.lr_scheduler_configs]
    return any(isinstance(monitor, str) and monitor.startswith(prefixes) for monitor in monitors)


def check_single_process(trainer: L.Trainer) -> None:
    """Raises RuntimeError with several processes, of which one has no loss on its batch."""
    if trainer.world_size > 1:
        raise RuntimeError(
            "the training loss is None on a batch, and other processes that have a loss would wait forever; with "
            "several processes return a loss on every batch, such as one multiplied by zero"
        )

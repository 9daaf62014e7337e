"""Writing a callback's metrics where a person looks for them."""

from __future__ import annotations

from collections.abc import Mapping

import lightning as L
import torch


def log_metrics(trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float], *, headline: str) -> None:
    """Sends metrics to all loggers, to `trainer.callback_metrics` and, the headline one, to the progress bar.

    `self.log` would write a value that is measured now and then again at every step that logs, and at the step of that
    moment; loggers get it once, at the step of the batch it belongs to.
    """
    loop = trainer.fit_loop.epoch_loop
    # The x axis on which Lightning puts what the same batch logs; LearningRateMonitor reads it too. Optimizer steps
    # differ from it where a batch makes several.
    step = getattr(loop, "_batches_that_stepped", trainer.global_step - 1)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    for name, value in metrics.items():
        trainer.callback_metrics[name] = torch.as_tensor(value, dtype=torch.float32)
    module.log(headline, metrics[headline], prog_bar=True, logger=False, on_step=True, on_epoch=False)

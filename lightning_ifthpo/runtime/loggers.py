"""Writing a callback's metrics and figures where a person looks for them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_metrics(trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float], *, headline: str) -> None:
    """Sends metrics to all loggers, to `trainer.callback_metrics` and, the headline one, to the progress bar.

    `self.log` would write a value that is measured now and then again at every step that logs, and at the step of that
    moment; loggers get it once, at the step of the batch it belongs to.
    """
    step = _step(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    for name, value in metrics.items():
        trainer.callback_metrics[name] = torch.as_tensor(value, dtype=torch.float32)
    if headline in metrics:
        module.log(headline, metrics[headline], prog_bar=True, logger=False, on_step=True, on_epoch=False)


def takes_figures(logger: Any) -> bool:
    """Returns whether `log_figure` can write to a logger."""
    return hasattr(logger, "log_image") or any(
        hasattr(logger.experiment, method) for method in ("add_figure", "log_figure")
    )


def log_figure(trainer: L.Trainer, name: str, figure: Figure) -> None:
    """Sends a figure to all loggers that take figures: TensorBoard, Weights & Biases, MLflow and their likes."""
    step = _step(trainer)
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        experiment = logger.experiment
        if hasattr(experiment, "add_figure"):
            experiment.add_figure(name, figure, global_step=step)
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[_image(figure)], step=step)
        elif hasattr(experiment, "log_figure"):
            experiment.log_figure(logger.version, figure, f"{name}/{step:06d}.png")


def _step(trainer: L.Trainer) -> int:
    """Returns the x axis on which Lightning puts what the same batch logs; LearningRateMonitor reads it too.

    Optimizer steps differ from it where a batch makes several.
    """
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step - 1)


def _image(figure: Figure) -> Any:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)

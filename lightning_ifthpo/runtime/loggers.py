"""Metrics and figures of a callback in the loggers, `callback_metrics` and the progress bar."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_ifthpo.runtime.telling import rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_metrics(
    trainer: L.Trainer, module: L.LightningModule, metrics: Mapping[str, float], *, headlines: Mapping[str, str]
) -> None:
    """Writes metrics to all loggers and `trainer.callback_metrics`, and the headlines to the progress bar.

    `self.log` would repeat the last value at every logging step. Here loggers get it once, at the step of its batch.

    Args:
        trainer: The Trainer.
        module: Its module.
        metrics: Values by name.
        headlines: Names of metrics, and short names for them on the progress bar, which cuts long ones off.
    """
    step = _step(trainer)
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
    publish(trainer, metrics)
    shown = {short: metrics[name] for name, short in headlines.items() if name in metrics}
    module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)


def publish(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Puts metrics into `trainer.callback_metrics`, where other callbacks read them."""
    kept = trainer.callback_metrics  # read once, because the Trainer computes all metrics at each access
    kept.update({name: torch.as_tensor(value, dtype=torch.float32) for name, value in metrics.items()})


def takes_figures(logger: Any) -> bool:
    """Returns whether `log_figure` can write to a logger."""
    methods = ("add_figure", "log_figure")
    return hasattr(logger, "log_image") or any(hasattr(logger.experiment, method) for method in methods)


def log_figure(trainer: L.Trainer, name: str, figure: Figure) -> None:
    """Writes a figure to all loggers that accept figures, such as TensorBoard, Weights & Biases and MLflow."""
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


def log_histograms(trainer: L.Trainer, named_values: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a histogram of each vector to all loggers that accept histograms, such as TensorBoard.

    Of many entries, about 100,000 at equal distances are taken. Without such a logger nothing is evaluated.
    """
    loggers: list[Any] = list(trainer.loggers)
    takers = [logger.experiment for logger in loggers if hasattr(logger.experiment, "add_histogram")]
    for name, values in named_values if takers else ():
        some = values[:: math.ceil(len(values) / 100_000)]
        some = some[some.isfinite()].float().cpu()
        for experiment in takers if len(some) else ():
            experiment.add_histogram(name, some, global_step=_step(trainer))


def log_result(trainer: L.Trainer, hyperparameters: dict[str, float], metric: dict[str, float]) -> None:
    """Writes tuned values to all loggers as hyperparameters of the run, and a metric with them to TensorBoard.

    A logger that refuses does not end the fit: MLflow accepts each hyperparameter once.
    """
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        try:
            if isinstance(logger, TensorBoardLogger):
                earlier = dict(logger.hparams)  # it shows a run by the last ones it got
                logger.log_hyperparams({**earlier, **hyperparameters}, metric, step=_step(trainer))
                logger.hparams.clear()
                logger.hparams.update(earlier)
            else:
                logger.log_hyperparams(hyperparameters)
        except Exception as error:
            rank_zero_warn(f"{type(logger).__name__} did not take the tuned values: {str(error).splitlines()[0]}")


def _step(trainer: L.Trainer) -> int:
    """Returns the step under which `self.log` writes the values of the same batch."""
    # Private: Lightning has no public name for the number of batches that stepped, and its LearningRateMonitor reads
    # this one too. `global_step` counts optimizer steps, and a batch may make several.
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step - 1)


def _image(figure: Figure) -> Any:
    from PIL import Image

    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)

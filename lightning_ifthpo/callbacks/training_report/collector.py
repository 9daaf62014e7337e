"""Collects what a report shows, batch by batch, without changing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_ifthpo.callbacks.training_report import observations as seen
from lightning_ifthpo.callbacks.training_report.facts import Facts
from lightning_ifthpo.callbacks.training_report.gradients import LayerWatch, NoiseScale, gradient_norm
from lightning_ifthpo.callbacks.training_report.records import Records, Series
from lightning_ifthpo.callbacks.training_report.sections import Extras
from lightning_ifthpo.callbacks.training_report.training_loss import TrainingLoss
from lightning_ifthpo.runtime.distributed import is_replicated

_LAYERS_FIRST = 5  # collections that measure each layer
_LAYERS_EVERY = 10  # and then one of so many
_MARKS = 500  # hyper steps that are kept to be marked


class Collector:
    """What was seen of one fit by the first process.

    Attributes:
        batches: Number of training batches.
        is_watching: Whether the optimizer step to come is measured.
    """

    def __init__(self) -> None:
        self.batches = self._last = self._collections = 0
        self._records, self._loss = Records(), TrainingLoss()
        self._layers, self._noise = LayerWatch(), NoiseScale()
        self._marks = Series(_MARKS)
        self._modes: dict[str, list[str]] = {"evaluating": [], "training": []}
        self._start_anew()

    def _start_anew(self) -> None:
        self.is_watching = self._has_stepped = self._measures_layers = False
        self._backwards = 0
        self._small_norm = self._norm = math.nan

    # Around a training batch

    def begin_batch(self, every_n_batches: int, affords: Callable[[], bool]) -> None:
        """Decides at the start of an accumulation window whether to watch it; the first one always.

        Args:
            every_n_batches: Training batches between two looks.
            affords: Returns whether there is time for a look.
        """
        if self._backwards or self.is_watching:
            return
        is_due = not self._collections or self.batches + 1 - self._last >= every_n_batches
        self.is_watching = is_due and affords()
        few = self._collections < _LAYERS_FIRST
        self._measures_layers = self.is_watching and (few or self._collections % _LAYERS_EVERY == 0)

    def backward_is_watched(self) -> bool:
        """Counts a backward pass; returns whether `backward` is to measure it."""
        self._backwards += 1
        return self.is_watching and self._backwards == 1

    def backward(self, trainer: L.Trainer, module: Any) -> None:
        """Measures the gradient of the first micro-batch of a window."""
        if not self._why_no_noise(trainer, module):
            self._small_norm = trainer.accumulate_grad_batches * gradient_norm(module.parameters())

    def step_is_watched(self) -> bool:
        """Records an optimizer step; returns whether `before_step` is to measure it, the first one of a batch."""
        is_first, self._has_stepped = not self._has_stepped, True
        return is_first and self.is_watching

    def before_step(self, trainer: L.Trainer, module: Any) -> None:
        """Measures gradients, of all weights that have one."""
        if not _is_whole(trainer, module):
            return
        weights = seen.weights_of(module)
        self._norm = gradient_norm(weights.values())
        if self._backwards == trainer.accumulate_grad_batches > 1 and not math.isnan(self._small_norm):
            self._noise.add(self._small_norm, self._norm, self._backwards * trainer.world_size)
        had_loss = self._backwards > 0  # otherwise the training step has returned None
        if self._measures_layers and len(trainer.optimizers) == 1 and module.automatic_optimization and had_loss:
            self._layers.before_step(seen.watched_weights(trainer, module), seen.ids_of_units(module))

    def end_batch(self, trainer: L.Trainer, module: Any, outputs: Any, every_n_batches: int) -> bool:
        """Keeps the loss of a batch; returns whether its step was watched, so that `collect` is to follow."""
        self.batches += 1
        is_automatic = module.automatic_optimization
        if (loss := loss_in(outputs)) is not None:
            self._loss.add(self.batches, loss, trainer.accumulate_grad_batches if is_automatic else 1)
        stepped = self._has_stepped or (not is_automatic and self._backwards > 0)
        if stepped and self.is_watching:
            return True
        if self.batches % every_n_batches == 0:
            self._loss.flush()
        if stepped:
            self._start_anew()
        return False

    def collect(self, trainer: L.Trainer, module: Any) -> None:
        """Reads losses, metrics and how far the step went."""
        try:
            self._collect(trainer, module)
        finally:
            self._start_anew()

    def _collect(self, trainer: L.Trainer, module: Any) -> None:
        self._last, self._collections = self.batches, self._collections + 1
        self._loss.flush()
        self._collect_metrics(dict(seen.own_metrics(trainer)))
        for name, value in seen.learning_rates(trainer):
            self._records.open(name).add(self.batches, value)
        if not math.isnan(self._norm):
            self._records.open("gradient_norm").add(self.batches, self._norm)
        self._layers.after_step()
        self._collect_ratios()
        self._collect_hyper_steps(trainer)
        self._modes["evaluating"] = list(seen.layers_in_evaluation_mode(trainer, module))

    def _collect_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of each callback that has fired since the last look, which changes one of them at least."""
        fired = {_prefix(name) for name, value in metrics.items() if value != self._records[name].last}
        for name, value in metrics.items():
            if _prefix(name) in fired:
                self._records.open(name).add(self.batches, value)

    def _collect_ratios(self) -> None:
        ratios = [layer.ratio for layer in self._layers.layers.values() if math.isfinite(layer.ratio)]
        if self._measures_layers and ratios:
            for name, value in (("low", min(ratios)), ("median", median(ratios)), ("high", max(ratios))):
                self._records.open(f"update_ratio/{name}").add(self.batches, value)

    def _collect_hyper_steps(self, trainer: L.Trainer) -> None:
        progress = seen.hyper_steps(seen.tuner(trainer))
        if progress is None or progress[0] == self._marks.last:
            return
        self._marks.add(self.batches, progress[0])
        for name, value in zip(("predicted", "confirmed"), progress[1:], strict=True):
            self._records.open(f"tuning/{name}").add(self.batches, value)

    # Elsewhere in a run

    def end_epoch(self) -> None:
        """Compares the epoch with the one before."""
        self._loss.end_epoch()

    def validate(self, module: Any) -> None:
        """Looks at the modes of layers during validation."""
        self._modes["training"] = list(seen.layers_in_training_mode(module))

    def end_validation(self, trainer: L.Trainer) -> None:
        """Reads the losses that validation has logged."""
        for name, value in seen.validation_losses(trainer):
            self._records.open(f"validation/{name}").add(self.batches, value)

    # Results

    def facts(self, trainer: L.Trainer, module: Any, *, is_over: bool, error: str = "") -> Facts:
        """Returns what was seen so far, and the error that has ended the fit, if one has."""
        self._loss.flush()
        weights = list(seen.weights_of(module).values())
        frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
        return Facts(
            batches=self.batches,
            is_over=is_over,
            error=error,
            records=self._records,
            loss=self._loss,
            layers=self._layers.layers,
            frozen=seen.frozen_layers(trainer, module),
            frozen_share=frozen / max(1, sum(weight.numel() for weight in weights)),
            evaluating=tuple(self._modes["evaluating"]),
            training=tuple(self._modes["training"]),
            is_shuffled=seen.is_shuffled(trainer),
            is_automatic=module.automatic_optimization,
            untuned=seen.untuned_hyperparameters(module),
            tuning=seen.tuning_of(trainer, module, self._records, seen.shared_examples(trainer)),
        )

    def extras(self, trainer: L.Trainer, module: Any, shares: Mapping[str, float]) -> Extras:
        """Returns what a report shows beside the facts."""
        noise = self._why_no_noise(trainer, module) or self._noise_in_words(trainer)
        return Extras(tuple(self._marks.steps), {**seen.shares_of_time(trainer), **shares}, noise=noise)

    def _noise_in_words(self, trainer: Any) -> str:
        scale, size = self._noise.micro_batches, getattr(trainer.train_dataloader, "batch_size", None)
        if math.isnan(scale):
            return "The gradient noise scale is not known yet."
        unit = f"micro-batches of {size} examples" if size else "micro-batches"
        batch = trainer.accumulate_grad_batches * trainer.world_size
        if math.isinf(scale):
            return f"Gradient noise scale: far above {batch} {unit}, which do not rise above the noise."
        examples = f", or about {scale * size:.3g} examples" if size else ""
        return (
            f"Gradient noise scale (McCandlish et al. 2018): about {scale:.2g} {unit}{examples}; a step uses {batch}. "
            "Much larger batches than the noise scale hardly help; up to it, training goes faster with them."
        )

    def _why_no_noise(self, trainer: Any, module: Any) -> str:
        """Returns why the gradient noise scale is not measured; "" if it is."""
        if trainer.accumulate_grad_batches == 1 or not module.automatic_optimization:
            return "The gradient noise scale needs gradients of micro-batches: use accumulate_grad_batches > 1."
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return "The gradient noise scale is not measured with a gradient scaler."
        return "" if _is_whole(trainer, module) else "The gradient noise scale is not measured with sharded weights."

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers, strings and lists; nothing before training."""
        if not self.batches:
            return {}
        self._loss.flush()
        return {
            "counts": [self.batches, self._last, self._collections],
            "records": self._records.state_dict(),
            "loss": self._loss.state_dict(),
            "layers": self._layers.state_dict(),
            "noise": self._noise.state_dict(),
            "marks": self._marks.state_dict(),
            "modes": {name: list(layers) for name, layers in self._modes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        if not state:
            return
        self.batches, self._last, self._collections = state["counts"]
        self._records.load_state_dict(state["records"])
        self._loss.load_state_dict(state["loss"])
        self._layers.load_state_dict(state["layers"])
        self._noise.load_state_dict(state["noise"])
        self._marks.load_state_dict(state["marks"])
        self._modes = {name: list(layers) for name, layers in state["modes"].items()}


def loss_in(outputs: Any) -> Tensor | None:
    """Returns the loss among the outputs of a training step; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _prefix(name: str) -> str:
    return name.split("/")[0]


def _is_whole(trainer: Any, module: Any) -> bool:
    """Returns whether this process holds all weights, so that it can measure them without the others."""
    if trainer.world_size > 1 and not is_replicated(trainer.strategy):
        return False
    return not any(is_lazy(weight) or isinstance(weight, DTensor) for weight in module.parameters())

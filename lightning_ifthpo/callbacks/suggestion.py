"""A race of learning rates before training, in a fit that leaves no trace."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from statistics import fmean, median
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.core.validation import require_at_least
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import ModuleLosses
from lightning_ifthpo.runtime.requirements import check_brings_back, check_rate_is_free
from lightning_ifthpo.runtime.rewinding import rewound
from lightning_ifthpo.step_size import AveragedRule, RateSuggestion, check_linear_in_lr, three_point_parabola
from lightning_ifthpo.step_size.critical import critical_step
from lightning_ifthpo.step_size.race import RateRace
from lightning_ifthpo.step_size.rates import GroupRates
from lightning_ifthpo.step_size.update import Update, trainable_weights

_LOOKS = 4  # first updates whose critical step is measured, each on another batch
_PART = 10  # a trial takes this part of the run
_FIRST_MOVE = 0.1  # of the length of the weights, by the step that a search for an edge begins with at a concave loss
_SKIPS = 20  # first steps at most that a loss scaler may skip until it has found its scale
_EDGE_RTOL = 0.1  # of an edge; several batches differ by more


def suggest_rate(
    trainer: L.Trainer,
    module: L.LightningModule,
    train_dataloaders: Any,
    datamodule: L.LightningDataModule | None,
    steps: int | None,
) -> RateSuggestion:
    """Returns the learning rate that wins a race; see `ExactGeN.suggest`."""
    if steps is not None:
        require_at_least("steps", steps, 1)
    check_brings_back(trainer, "ExactGeN.suggest")
    race = _Race(steps)
    with rewound(trainer, train_dataloaders, datamodule):
        twin = _copied(module)
        changed: Any = trainer  # whose annotations leave these out
        changed.callbacks, changed.loggers = [race], [DummyLogger()] if trainer.loggers else []
        changed.limit_val_batches = changed.num_sanity_val_steps = 0
        changed.profiler = PassThroughProfiler()  # others write files
        trainer.fit(twin, train_dataloaders, datamodule=datamodule)
    if race.suggestion is None:
        raise RuntimeError(
            "the fit ended before the race of learning rates was over; call ExactGeN.suggest before trainer.fit, with "
            "training data that can be read again, and let no hook of the module stop the training"
        )
    rank_zero_info(f"ExactGeN.suggest: {race.suggestion}")
    return race.suggestion


def _copied(module: L.LightningModule) -> L.LightningModule:
    """Returns a copy of a module, without its Trainer and without callbacks of its own."""
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    try:
        twin: Any = copy.deepcopy(module)
    except Exception as error:  # a class may raise anything here
        raise TypeError(
            f"ExactGeN.suggest trains a copy of the module, and {type(module).__name__} cannot be copied by "
            f"copy.deepcopy: {error}"
        ) from error
    twin.configure_callbacks = list
    return twin  # type: ignore[no-any-return]


class _Race(L.Callback):
    """Measures the critical step of first updates, and then trains at one rate after another from the same start.

    Args:
        steps: Optimizer steps of a trial; None for a tenth of the run.
    """

    def __init__(self, steps: int | None) -> None:
        self.suggestion: RateSuggestion | None = None
        self._steps = steps
        self._updates = 0  # that were read
        self._edges: list[float] = []  # critical steps of those whose loss was finite
        self._anchors: list[float] = []  # and their lowest points
        self._reserved: list[Any] = []  # batches that trials are judged on
        self._race: RateRace | None = None
        self._left = 0  # steps of the present trial
        self._skipped = 0  # first updates that changed nothing
        self._update: Update | None = None  # to look along
        self._is_moved = False  # the start has to be put back before the next step
        self._batches = 0  # of the present epoch
        self._made = 0  # optimizer steps

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the optimizer, and takes its scheduler away."""
        check_rate_is_free(trainer, pl_module)
        check_linear_in_lr(trainer.optimizers[0])
        own = set(map(id, pl_module.parameters()))
        if any(map(is_lazy, pl_module.parameters())):
            raise ValueError(
                f"{type(pl_module).__name__} has layers without weights before the first forward pass; pass a batch "
                "through it before ExactGeN.suggest"
            )
        if any(id(weight) not in own for weight in trainable_weights(trainer.optimizers[0])):
            raise ValueError(
                f"the optimizer holds weights that are not those of the copy of {type(pl_module).__name__} that "
                "ExactGeN.suggest trains; make it in configure_optimizers from self.parameters()"
            )
        trainer.strategy.lr_scheduler_configs = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the length of the run, takes away its end, and keeps its beginning."""
        length = float(trainer.estimated_stepping_batches)
        if self._steps is None and not (math.isfinite(length) and length > 0):
            raise ValueError("the length of the run is unknown; set max_steps in the Trainer, or pass steps")
        self._trial_steps = self._steps or math.ceil(length / _PART)
        loop = trainer.fit_loop
        loop.min_epochs, loop.max_epochs = 0, -1
        loop.epoch_loop.min_steps, loop.epoch_loop.max_steps = None, -1
        self._losses = ModuleLosses(trainer, pl_module, Ranks(trainer))
        self._start = _Start(trainer, pl_module)
        self._rates = GroupRates(trainer.optimizers[0], AveragedRule, per_group=False)
        self._made = trainer.global_step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the fit where the data have ended, which would begin one epoch without a batch after the other."""
        trainer.should_stop |= not self._batches
        self._batches = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begins a trial, and sets the rates of the next step: one, times the ratios of the groups, for an update."""
        if self._is_moved:  # here, because the module's own hooks may move it after a step
            self._start.restore()
            self._is_moved = False
        if self._update is not None:
            update, self._update = self._update, None
            self._look(update)
        if self._updates < _LOOKS:
            self._batch = copied(batch)  # because the training step may change it
            self._rates.write(self._rates.multipliers)
        elif self._race is None:
            self._race = RateRace(self._anchor(), highest=median(self._edges))
            self._start.keep_scale()
            self._left = self._trial_steps
        if self._race is not None:
            rate = self._race.next_rate
            assert rate is not None
            self._rates.write([rate * multiplier for multiplier in self._rates.multipliers])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads an update off a first step, and ends a trial after its last step."""
        self._batches += 1
        if trainer.global_step == self._made:
            return  # gradients are accumulated
        self._made = trainer.global_step
        if self._race is None:
            weights = trainable_weights(trainer.optimizers[0])
            update = Update.undo_step(weights, self._start.copies_of(weights))
            self._is_moved = True
            if self._skipped < _SKIPS and not any(bool(omega.any()) for omega in update.omega):
                self._skipped += 1
                return
            self._updates += 1
            self._reserved.append(self._batch)
            self._update = update
            return
        self._left -= 1
        if not self._left:
            self._race.observe(self._judged())
            self._is_moved = True
            self._left = self._trial_steps
            trainer.should_stop = self._race.next_rate is None
            if trainer.should_stop:
                self.suggestion = self._result(self._race)

    def _look(self, update: Update) -> None:
        """Looks along an update, on the batch that made it: on another one, noise may be larger than the slope."""
        first = update.rate_of_move(_FIRST_MOVE)
        if not 0.0 < first < math.inf:
            return
        loss = self._losses.inner(self._reserved[-1]).over(update.parameters)
        with suppress(NoLossError, FloatingPointError), self._losses.session("three_point"):
            parabola = three_point_parabola(loss, update.parameters, update.omega)
            lowest = parabola.optimal_step if parabola.slope > 0.0 else None
            guess = first if lowest is None else 2.0 * lowest
            with loss.along(update.omega, graph=False) as at:
                edge = critical_step(
                    lambda step: loss.combine(at(-step)).item(),
                    guess=guess,
                    rtol=_EDGE_RTOL,
                    dtype=loss.space.coarsest_dtype,
                )
            # half the edge of a quadratic is slope over curvature
            self._anchors.append(edge.step / 2.0 if lowest is None else min(edge.step / 2.0, lowest))
            # a loss that is bounded may have no edge
            self._edges.append(math.inf if edge.is_bound and edge.step > guess else edge.step)

    def _anchor(self) -> float:
        """Returns the median of the learning rates that the looks found lowest."""
        if not self._anchors:
            raise ValueError(
                "the first updates change nothing, or the loss of the first batches is not finite; check the data and "
                "the loss"
            )
        return median(self._anchors)

    def _judged(self) -> float:
        """Returns the mean training loss on the batches that are reserved for it."""
        losses = []
        for number, batch in enumerate(self._reserved):
            loss = self._losses.inner(batch)
            with suppress(NoLossError), self._losses.session("three_point", step=number):
                losses.append(loss.value().item())
        return fmean(losses) if losses else math.nan

    def _result(self, race: RateRace) -> RateSuggestion:
        if math.isinf(race.winner.loss):
            raise ValueError(
                f"training diverged at all of {len(race.trials)} learning rates, from {race.trials[0].lr:.3g} to "
                f"{race.trials[-1].lr:.3g}; check the data and the loss"
            )
        lr = race.winner.lr
        return RateSuggestion(
            lr=lr,
            lrs=tuple(lr * multiplier for multiplier in self._rates.multipliers),
            edge=median(self._edges),
            trials=race.trials,
            trial_steps=self._trial_steps,
            steps=self._updates + len(race.trials) * self._trial_steps,
            is_open=race.is_open,
        )


class _Start:
    """Weights, buffers and the state of the optimizer at the beginning of each trial, and the loss scale once known."""

    def __init__(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._optimizer, self._precision = trainer.optimizers[0], trainer.precision_plugin
        self._tensors = [*module.parameters(), *module.buffers()]
        self._buffers = [
            (submodule, name, buffer)
            for submodule in module.modules()
            for name, buffer in submodule.named_buffers(recurse=False)
        ]
        self._copies = {id(tensor): tensor.detach().clone() for tensor in self._tensors}
        self._state = copy.deepcopy(self._optimizer.state_dict())
        self._scaler: dict[str, Any] | None = None

    def keep_scale(self) -> None:
        self._scaler = copy.deepcopy(self._precision.state_dict())

    def copies_of(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._copies[id(tensor)].clone() for tensor in tensors]

    @torch.no_grad()
    def restore(self) -> None:
        for submodule, name, buffer in self._buffers:
            setattr(submodule, name, buffer)  # it may have been replaced by another tensor
        for tensor in self._tensors:
            tensor.copy_(self._copies[id(tensor)])
        self._optimizer.load_state_dict(copy.deepcopy(self._state))
        if self._scaler is not None:
            self._precision.load_state_dict(copy.deepcopy(self._scaler))

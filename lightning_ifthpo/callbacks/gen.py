"""The callback that chooses the learning rate."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_ifthpo.callbacks.suggestion import suggest_rate
from lightning_ifthpo.core.loss import Loss, NoLossError
from lightning_ifthpo.core.validation import require_at_least, require_choice
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.loggers import log_metrics
from lightning_ifthpo.runtime.losses import ModuleLosses
from lightning_ifthpo.runtime.precision import has_half_weights
from lightning_ifthpo.runtime.progress import Progress
from lightning_ifthpo.runtime.requirements import check_precision, check_rate_is_free
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.runtime.verification import trusted_operator
from lightning_ifthpo.step_size import ExactGeNLR, RateSuggestion
from lightning_ifthpo.step_size.options import DIRECTIONAL_CURVATURES, DirectionalCurvature, RateOptions


class ExactGeN(L.Callback):
    """Chooses the learning rate during training by the generalized Newton's method (GeN).

    Some 64 times while the rate climbs, then on every n-th batch, it looks along the update that the optimizer has just
    made, including momentum, preconditioning, weight decay and clipping: slope and curvature of the training loss on
    the next batch show whether a longer or a shorter step would have been better. A step that has raised the loss by
    much is taken back in part. See `AveragedRule`.
    It works on any LightningModule with one optimizer whose update is linear in its learning rate. The learning rates
    in `configure_optimizers` count only in relation to each other, and a configured scheduler is replaced.

    Args:
        every_n_batches: Training batches between two looks once the rate has settled, at least 1. With gradient
            accumulation the look follows the next optimizer step. Where gradients grow step after step, and where the
            rate has been lowered, looks come at every step. rule="published" needs frequent looks, such as 8.
        rule: "averaged", the safe rule; "published", the formula of the paper with its smoothing.
        probe: "next_batch" looks on a batch that did not produce the update; "same_batch" is for gradient descent only.
        curvature: "three_point" uses the losses at both ends of the step and one step beyond, by forward passes alone.
            The first look compares them with one gradient; a loss that does not follow its gradient, because a part of
            it is detached, is then looked at by "finite_difference", with a warning.
            "hessian" is exact; "gauss_newton" needs losses that call `mark_outputs`, and one forward pass;
            "finite_difference" uses three gradients. "auto" takes three points, or the Hessian if weights are in half
            precision, because rounding of their losses exceeds the differences.
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        final_decay: Fraction of max_steps or max_epochs, at their end, over which the rate goes to zero linearly.
            Looks can only lower it there.
        per_group: Choose a rate for each parameter group, by one look for each group.

    Logs at each look `gen/lr`, the highest of all groups; `gen/alpha`, the optimal step along the last update, if there
    is one, and `gen/center`, that by the last eight looks together; `gen/directional_sharpness`; `gen/accepted`, 0 if
    the look was not used; `gen/refused`, the number of looks that were not used; `gen/shortened`, the number of steps
    that were taken back in part; and `gen/settled`, 1 once the climb has ended. With `per_group` also `gen/lr/0` and so
    on, for each group. At the end it says in a line from where to where the rate went, and by how many looks.

    Raises:
        ValueError: If an argument is out of range.

    >>> callback = ExactGeN(every_n_batches=16)
    """

    def __init__(
        self,
        every_n_batches: int = 64,
        *,
        rule: Literal["averaged", "published"] = "averaged",
        probe: Literal["next_batch", "same_batch"] = "next_batch",
        curvature: Literal["auto"] | DirectionalCurvature = "auto",
        lr_min: float = 1e-8,
        lr_max: float = 1e3,
        final_decay: float = 0.6,
        per_group: bool = False,
    ) -> None:
        super().__init__()
        require_at_least("every_n_batches", every_n_batches, 1)
        require_choice("curvature", curvature, ("auto", *DIRECTIONAL_CURVATURES))
        self.every_n_batches = every_n_batches
        self.curvature = curvature
        self.options = RateOptions(rule, probe, lr_min, lr_max, final_decay, per_group)
        self._restart()

    @staticmethod
    def suggest(
        trainer: L.Trainer,
        module: L.LightningModule,
        train_dataloaders: Any = None,
        *,
        datamodule: L.LightningDataModule | None = None,
        steps: int | None = None,
    ) -> RateSuggestion:
        """Returns a learning rate for a decaying schedule, such as a cosine, that wins a race; call it before `fit`.

        Four first updates are read off the optimizer. The slope and the curvature of the loss along them give the scale
        of the rates. Then some seven rates, from four times slope / curvature to 1/64 of it and at most the edge of
        `RateSuggestion`, are each held for a tenth of the run, from the same initial weights. The one with the lowest
        training loss on the batches of the four updates wins. Where the lowest or the highest rate is the best, up to
        four others are tried beyond it. A line at the end says what was found.

        The fit after it is bit for bit what it is without. The module is copied, and the Trainer, its data and the
        random state are put back, also after an error. Nothing is logged, no file is written, and no validation or test
        data is read. The rates that the optimizer was made with count only in relation to each other, and a scheduler
        does not act. Callbacks do not take part, so that weights that one freezes are trained. An iterator that cannot
        start again loses the batches that the race reads.

        Args:
            trainer: A Trainer as for `fit`: with its precision, accumulation, clipping and devices.
            module: The module, with one optimizer whose update is linear in its learning rate.
            train_dataloaders: As for `fit`; also a data module.
            datamodule: As for `fit`.
            steps: Optimizer steps of each trial, at least 1; by default a tenth of those of the run.

        Cost: seven tenths of a run, without validation; copies of the module, its optimizer's state and four batches.

        Raises:
            ValueError: If the rate cannot be chosen: for manual optimization, spawned processes, an optimizer whose
                update is not linear in its rate, a run of unknown length without `steps`; all before the first batch.
                Also if training diverges at every rate.
            TypeError: If the module cannot be copied.
            RuntimeError: If the fit ends before the race is over.
        """
        return suggest_rate(trainer, module, train_dataloaders, datamodule, steps)

    def _restart(self) -> None:
        self._scheduler: ExactGeNLR | None = None
        self._progress = Progress()
        self._first_rates: list[float] = []  # of each rule, after the first look
        self._earlier_looks = 0  # before the run was resumed

    def state_dict(self) -> dict[str, Any]:
        """Returns what the line at the end says of the time before resuming; the scheduler has a state of its own."""
        return {"first_rates": self._first_rates, "looks": self._looks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self._first_rates, self._earlier_looks = state_dict["first_rates"], state_dict["looks"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the callback; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            self._restart()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the optimizer and replaces its scheduler."""
        check_rate_is_free(trainer, pl_module)
        self._kind = _three_point_or_hessian(trainer, pl_module) if self.curvature == "auto" else self.curvature
        check_precision(trainer, self._kind)
        replaced = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if replaced:
            rank_zero_warn(f"ExactGeN replaces {', '.join(replaced)}; configure no scheduler")
        self._scheduler = ExactGeNLR(trainer.optimizers[0], curvature=self._kind, **asdict(self.options))
        self._logged = 0
        trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(self._scheduler, interval="step", name="ExactGeN")]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the length of the run; reading it earlier makes the Trainer forget where to resume its data."""
        self._losses = ModuleLosses(trainer, pl_module, Ranks(trainer))
        steps = float(trainer.estimated_stepping_batches)
        if math.isfinite(steps):
            self._active_scheduler.total_steps = int(steps)
        elif self.options.final_decay:
            rank_zero_warn("ExactGeN omits the final decay, because the length of the run is unknown; set max_steps")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks along the last update, on a batch that did not produce it."""
        scheduler = self._active_scheduler
        # here, because accumulation may change from epoch to epoch
        scheduler.every_n_steps = math.ceil(self.every_n_batches / trainer.accumulate_grad_batches)
        if scheduler.wants_loss:
            # a look after the step needs a copy, because the training step may change the batch
            loss = self._losses.inner(batch if scheduler.is_pending else copied(batch))
            if not self._losses.is_verified:
                with self._progress.showing(trainer, "trying the first batch"):
                    scheduler.curvature = self._settled_curvature(loss)
            # the first look takes a gradient too, which a compiled graph would not keep
            kind: str = scheduler.curvature
            if kind == "three_point" and not scheduler.looks:
                kind = "finite_difference"
            scheduler.probe(loss, partial(self._losses.session, kind, step=scheduler.last_epoch))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs each look once."""
        if self._active_scheduler.looks != self._logged:
            self._logged = self._active_scheduler.looks
            self._first_rates = self._first_rates or self._rates
            log_metrics(trainer, pl_module, _metrics(self._active_scheduler), headlines={"gen/lr": "gen/lr"})

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Detaches the scheduler from the optimizer."""
        if self._scheduler is not None:
            self._scheduler.detach()
        self.__dict__.pop("_losses", None)  # a callback outlives the fit, and should not keep the model

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Does what `on_fit_end` and `teardown` do, which the Trainer does not call after an exception."""
        self._tell()
        self.teardown(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says where the rate went."""
        self._tell()

    def _tell(self) -> None:
        if self._scheduler is None or not self._first_rates:
            return  # without a look there is no rate
        refused, present = self._scheduler.refused, max(float(rate) for rate in self._scheduler.get_lr())
        notes = f"; {refused} could not be used" if refused else ""
        notes += "" if all(rule.settled for rule in self._scheduler.rules) else "; it has not settled yet"
        notes += f"; the final decay took it to {present:.3g}" if present < max(self._rates) else ""
        first, last = (", ".join(f"{rate:.3g}" for rate in rates) for rates in (self._first_rates, self._rates))
        looks = "one look" if self._looks == 1 else f"{self._looks} looks"
        rank_zero_info(f"ExactGeN: the learning rate went from {first} to {last} by {looks}{notes}")

    @property
    def _rates(self) -> list[float]:
        """The rate of each rule, before the final decay."""
        return [rule.lr or 0.0 for rule in self._active_scheduler.rules]

    @property
    def _looks(self) -> int:
        return self._earlier_looks + (0 if self._scheduler is None else self._scheduler.looks)

    def _settled_curvature(self, loss: Loss) -> Any:
        """Returns the curvature that the first batch allows, which is verified unless it needs no derivative."""
        with suppress(NoLossError), self._losses.session(self._kind):
            loss.value()  # shows whether the module needs autocast, and losses are then in half precision
            if self.curvature == "auto" and self._losses.has_low_precision:
                self._kind = "hessian"
            if self._kind == "three_point":
                self._losses.is_verified = True
            else:
                _, self._kind = trusted_operator(self._losses, loss, self._kind, "ExactGeN")
        return self._kind

    @property
    def _active_scheduler(self) -> ExactGeNLR:
        assert self._scheduler is not None, "training has not started"
        return self._scheduler


def _three_point_or_hessian(trainer: L.Trainer, module: L.LightningModule) -> DirectionalCurvature:
    half = has_half_weights(trainer) or any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())
    return "hessian" if half else "three_point"


def _metrics(scheduler: ExactGeNLR) -> dict[str, float]:
    rates = [float(rate) for rate in scheduler.get_lr()]
    metrics = {
        "gen/lr": max(rates),
        "gen/accepted": float(scheduler.accepted),
        "gen/refused": float(scheduler.refused),
        "gen/shortened": float(scheduler.shortened),
        "gen/settled": float(all(rule.settled for rule in scheduler.rules)),
    }
    several = len(scheduler.parabolas) > 1
    if several:
        metrics |= {f"gen/lr/{index}": rate for index, rate in enumerate(rates)}
    for index, (rule, parabola) in enumerate(zip(scheduler.rules, scheduler.parabolas, strict=True)):
        suffix = f"/{index}" if several else ""
        if rule.center is not None:
            metrics[f"gen/center{suffix}"] = rule.center
        if parabola.is_finite:
            metrics[f"gen/directional_sharpness{suffix}"] = parabola.sharpness
            if parabola.optimal_step is not None:
                metrics[f"gen/alpha{suffix}"] = parabola.optimal_step
    return metrics

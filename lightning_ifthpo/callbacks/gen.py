"""The callback that chooses the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_ifthpo.core.validation import require_choice
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.loggers import log_metrics
from lightning_ifthpo.runtime.losses import Losses, evaluating
from lightning_ifthpo.runtime.requirements import check_precision, check_real_weights, check_strategy, is_half
from lightning_ifthpo.step_size import ExactGeNLR
from lightning_ifthpo.step_size.scheduler import DIRECTIONAL_CURVATURES, DirectionalCurvature, check_options


class ExactGeN(L.Callback):
    """Chooses the learning rate while the Trainer trains, by the generalized Newton's method; none has to be given.

    On every batch until the rate has settled, and on every n-th after that, it looks along the update that the
    optimizer has just made, with all its momentum, preconditioning, decay and clipping: slope and curvature of the
    training loss on the next batch say whether a longer or a shorter step would have been better. See `AveragedRule`.
    Works on any LightningModule with one optimizer whose update is linear in its learning rate. The learning rates in
    `configure_optimizers` count only in relation to each other, and a configured scheduler is replaced.

    Args:
        every_n_batches: Optimizer steps between two looks once the rate has settled, at least 1.
        rule: "averaged", the safe one; "published", the formula of the paper with its smoothing.
        probe: "next_batch", which did not produce the update; "same_batch", for plain gradient descent.
        curvature: Of the loss along the update. "auto" and "three_point": from the losses at both ends of the step and
            one step beyond, by forward passes alone; "hessian", exact; "gauss_newton", for losses that call
            `mark_outputs`, in one forward pass; "finite_difference", from two gradients. "auto" takes the Hessian
            where weights are in half precision, whose losses are too rough for differences.
        lr_min: Lower bound of the rate.
        lr_max: Upper bound of the rate.
        final_decay: Fraction of the run, at its end, over which the rate goes to zero linearly; of max_steps or
            max_epochs, also where max_time ends the run before.
        per_group: Choose a rate for each parameter group, by as many looks as there are groups.

    Logs at each look `gen/lr`, the highest of all groups; `gen/alpha`, the optimal step along the last update, where
    there is one; `gen/directional_sharpness`; `gen/accepted`, 0 where the look was of no use; and `gen/refused`, how
    many were not. With `per_group`, `gen/lr/0` and so on are those of each group.

    Raises:
        ValueError: If an argument is out of range.

    >>> callback = ExactGeN(every_n_batches=16)
    """

    def __init__(
        self,
        every_n_batches: int = 8,
        *,
        rule: Literal["averaged", "published"] = "averaged",
        probe: Literal["next_batch", "same_batch"] = "next_batch",
        curvature: Literal["auto"] | DirectionalCurvature = "auto",
        lr_min: float = 1e-8,
        lr_max: float = 10.0,
        final_decay: float = 0.3,
        per_group: bool = False,
    ) -> None:
        super().__init__()
        require_choice("curvature", curvature, ("auto", *DIRECTIONAL_CURVATURES))
        self.curvature = curvature
        self._options: dict[str, Any] = {
            "every_n_steps": every_n_batches,
            "rule": rule,
            "probe": probe,
            "lr_min": lr_min,
            "lr_max": lr_max,
            "final_decay": final_decay,
            "per_group": per_group,
        }
        check_options(curvature="three_point", **self._options)
        self._scheduler: ExactGeNLR | None = None
        self._logged = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks the optimizer and takes the place of its scheduler."""
        _check(trainer, pl_module)
        half = is_half(trainer) or any(p.dtype in (torch.float16, torch.bfloat16) for p in pl_module.parameters())
        automatic: DirectionalCurvature = "hessian" if half else "three_point"
        self._kind = automatic if self.curvature == "auto" else self.curvature
        check_precision(trainer, self._kind, "32")
        replaced = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if replaced:
            rank_zero_warn(f"ExactGeN takes the place of {', '.join(replaced)}; do not configure a scheduler beside it")
        self._scheduler = ExactGeNLR(trainer.optimizers[0], curvature=self._kind, **self._options)
        self._logged = 0
        trainer.strategy.lr_scheduler_configs = [LRSchedulerConfig(self._scheduler, interval="step", name="ExactGeN")]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out how long the run is: asked any earlier, the Trainer forgets where to resume its data."""
        self._ranks = Ranks(trainer)
        steps = float(trainer.estimated_stepping_batches)
        if math.isfinite(steps):
            self._active_scheduler.total_steps = int(steps)
        elif self._options["final_decay"]:
            rank_zero_warn("ExactGeN does not know how long this run is, and leaves out the final decay; set max_steps")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks along the last update, on a batch that had no part in it."""
        scheduler = self._active_scheduler
        if not scheduler.wants_loss:
            return
        kept = batch if scheduler.pending else copied(batch)  # which is looked at after the step, if not at once
        losses: list[Losses] = []

        @contextmanager
        def context() -> Iterator[None]:
            with evaluating(trainer, pl_module, scheduler.last_epoch, self._kind) as evaluated:
                losses.append(evaluated)
                yield

        share = self._ranks.share(lambda: losses[-1].inner(kept)(), kept)
        scheduler.probe(share, context, all_reduce=self._ranks.all_reduce)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what was seen, if anything was."""
        scheduler = self._active_scheduler
        if scheduler.looks == self._logged:
            return
        self._logged = scheduler.looks
        rates = [float(rate) for rate in scheduler.get_lr()]
        metrics = {
            "gen/lr": max(rates),
            "gen/accepted": float(scheduler.accepted),
            "gen/refused": float(scheduler.refused),
        }
        if len(scheduler.models) > 1:
            metrics |= {f"gen/lr/{index}": rate for index, rate in enumerate(rates)}
        for index, model in enumerate(scheduler.models):
            suffix = f"/{index}" if len(scheduler.models) > 1 else ""
            if model.is_finite:
                metrics[f"gen/directional_sharpness{suffix}"] = model.sharpness
            if model.is_finite and model.optimal_step is not None:
                metrics[f"gen/alpha{suffix}"] = model.optimal_step
        log_metrics(trainer, pl_module, metrics, headline="gen/lr")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves the optimizer alone."""
        if self._scheduler is not None:
            self._scheduler.detach()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Does what teardown would, which is not called after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says how many looks were of no use."""
        if self._active_scheduler.refused:
            rank_zero_info(f"ExactGeN: number of looks that could not be used: {self._active_scheduler.refused}")

    @property
    def _active_scheduler(self) -> ExactGeNLR:
        assert self._scheduler is not None, "training has not started"
        return self._scheduler


def _check(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Raises ValueError for what cannot be served, as far as the Trainer and the module know before the first batch."""
    check_strategy(trainer, "ExactGeN")
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, and ExactGeN needs the Trainer to make the steps; use "
            "ExactGeNLR inside training_step"
        )
    optimizers = [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]
    if len(optimizers) != 1:
        raise ValueError(f"ExactGeN chooses the rate of one optimizer, and there are {len(optimizers)}")
    check_real_weights(module, module.parameters())
    if any(isinstance(callback, StochasticWeightAveraging) for callback in vars(trainer)["callbacks"]):
        raise ValueError("StochasticWeightAveraging sets its own learning rates; use it or ExactGeN, not both")

"""Critical sharpness along the steps of a run, and whether the run is about to diverge."""

from __future__ import annotations

from statistics import fmean

import lightning as L
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_ifthpo.callbacks.divergence import DivergenceWatch
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import trainable
from lightning_ifthpo.runtime.observed_loss import ObservedLoss
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.step_size.critical import CriticalTracker


class CriticalGauge:
    """Measures the critical sharpness along the steps that the optimizers make, and watches for divergence.

    Args:
        tracker: Measures critical steps.

    Attributes:
        divergence: Tells when the run is about to diverge.
    """

    def __init__(self, tracker: CriticalTracker) -> None:
        self.divergence = DivergenceWatch()
        self._tracker = tracker
        self._rate = 0.0
        self._kept_at = -1  # optimizer step before which the weights were kept
        self._observed = -1  # optimizer step whose loss was observed
        self._losses: list[float] = []  # of the batches whose gradients are accumulated

    def begin_batch(self, trainer: L.Trainer, module: L.LightningModule, *, may_measure: bool) -> None:
        """Keeps the weights and the learning rate before a step that may be measured, until it is made."""
        if self._kept_at != trainer.global_step or not module.automatic_optimization:
            self._tracker.before_update([])
        if may_measure and not self._tracker.is_ready:
            self._keep(trainer, module)

    def take_loss(self, trainer: L.Trainer, loss: Tensor) -> None:
        """Takes note of a batch's loss, without what the Trainer has multiplied it by."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._losses.append(float(loss.detach()) * trainer.accumulate_grad_batches / scale)

    def begin_step(self, trainer: L.Trainer, module: L.LightningModule, ranks: Ranks) -> bool:
        """Returns whether the step that follows should be measured, because the loss has grown; keeps the weights then.

        An optimizer that evaluates the loss several times in a step begins it once.
        """
        losses, self._losses = self._losses, []
        if not losses or self._observed == trainer.global_step:
            return False
        self._observed = trainer.global_step
        mean = ranks.all_reduce(torch.tensor(fmean(losses), device=module.device)) / ranks.count
        is_suspicious = self.divergence.observe(float(mean))
        if is_suspicious and not self._tracker.is_ready:
            self._keep(trainer, module)
        return is_suspicious

    def measure(self, observed: ObservedLoss, batch: object) -> dict[str, float]:
        """Returns the metrics of the last step, and warns the first time that training is about to diverge."""
        with observed.session("three_point"):
            found = self._tracker.measure(observed.on(batch))
        if found is None:  # the learning rate is zero, or a loss scaler has skipped the step
            return {"edge_ratio": 0.0, "bound": 0.0, "evaluations": 0.0}
        metrics = {
            "edge_ratio": 1.0 / found.step,
            "bound": float(found.is_bound),
            "evaluations": float(found.evaluations),
        }
        if self._rate > 0.0:
            edge = 2.0 / self._rate
            metrics |= {"critical": edge / found.step, "edge": edge}
        reason = self.divergence.judge(found)
        if reason and self.divergence.alarms == 1:
            ratio = f"more than {1.0 / found.step:.0f}" if found.is_bound else f"{1.0 / found.step:.2g}"
            rank_zero_warn(
                f"SharpnessMonitor, step {observed.trainer.global_step}: training is about to diverge: the last step "
                f"is {ratio} times as long as the longest one that does not raise the loss, and {reason}. Lower the "
                "learning rate, or let ExactGeN choose it"
            )
        return metrics

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = trainable(module)
        if any(map(is_lazy, weights)):
            return  # there are none before the first forward pass
        self._tracker.before_update(weights)
        self._kept_at = trainer.global_step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rate = max((float(group["lr"]) for group in groups), default=0.0)

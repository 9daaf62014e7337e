"""Critical sharpness along the steps of a run, and whether the run is about to diverge."""

from __future__ import annotations

from statistics import fmean

import lightning as L
import torch
from torch.nn.parameter import is_lazy

from lightning_ifthpo.callbacks.divergence import DivergenceWatch
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import trainable
from lightning_ifthpo.step_size.critical import CriticalStep, CriticalTracker


class CriticalSharpness:
    """Measures the critical sharpness along the steps that the optimizers make, and watches for divergence.

    Args:
        tracker: Measures critical steps.
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

    def take_loss(self, loss: float) -> None:
        """Takes note of a batch's loss."""
        self._losses.append(loss)

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

    def measure(self, loss: Loss) -> tuple[dict[str, float], str]:
        """Returns the metrics of the last step, and the reason for an alarm, empty if there is none."""
        found = self._tracker.measure(loss)
        if found is None:  # the learning rate is zero, or a loss scaler has skipped the step
            return {"edge_ratio": 0.0, "bound": 0.0, "evaluations": 0.0}, ""
        metrics = {
            "edge_ratio": 1.0 / found.step,
            "bound": float(found.is_bound),
            "evaluations": float(found.evaluations),
        }
        if self._rate > 0.0:
            edge = 2.0 / self._rate
            metrics |= {"critical": edge / found.step, "edge": edge}
        return metrics, _alarm(found, self.divergence.judge(found))

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = trainable(module)
        if any(map(is_lazy, weights)):
            return  # there are none before the first forward pass
        self._tracker.before_update(weights)
        self._kept_at = trainer.global_step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rate = max((float(group["lr"]) for group in groups), default=0.0)


def _alarm(found: CriticalStep, reason: str) -> str:
    if not reason:
        return ""
    ratio = f"more than {1.0 / found.step:.0f}" if found.is_bound else f"{1.0 / found.step:.2g}"
    return f"the last step is {ratio} times as long as the longest one that does not raise the loss, and {reason}"

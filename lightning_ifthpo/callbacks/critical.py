"""Critical sharpness along the steps of a run, and whether the run is about to diverge."""

from __future__ import annotations

import lightning as L

from lightning_ifthpo.callbacks.divergence import DivergenceWatch
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.runtime.losses import trainable
from lightning_ifthpo.step_size.critical import CriticalStep, CriticalTracker


class CriticalSharpness:
    """Measures the critical sharpness along the steps that the optimizers make, and watches for divergence.

    Args:
        tracker: Measures critical steps.
        watches: Whether to look at the loss of each batch, and to measure at once where it has grown.
    """

    def __init__(self, tracker: CriticalTracker, *, watches: bool) -> None:
        self.divergence = DivergenceWatch()
        self.watches = watches
        self._tracker = tracker
        self._rate = 0.0

    def begin_batch(self, trainer: L.Trainer, module: L.LightningModule, *, may_measure: bool) -> None:
        """Keeps the weights and the learning rate before the step, if that may be measured."""
        self._tracker.before_update([])
        if may_measure:
            self._keep(trainer, module)

    def is_suspicious(self, trainer: L.Trainer, module: L.LightningModule, loss: float) -> bool:
        """Takes note of a batch's loss before its step; returns whether that step should be measured."""
        suspicious = self.watches and self.divergence.observe(loss)
        if suspicious and not self._tracker.is_ready:
            self._keep(trainer, module)
        return suspicious

    def measure(self, loss: Loss) -> tuple[dict[str, float], str]:
        """Returns the metrics of the last step, and the reason for an alarm, empty if there is none."""
        found = self._tracker.measure(loss)
        if found is None:  # the learning rate is zero, or a loss scaler has skipped the step
            return {"edge_ratio": 0.0, "evaluations": 0.0}, ""
        metrics = {"edge_ratio": 1.0 / found.step, "evaluations": float(found.evaluations)}
        if self._rate > 0.0:
            edge = 2.0 / self._rate
            metrics |= {"critical": edge / found.step, "edge": edge}
        alarm = ""
        if self.watches:
            alarm = _alarm(found, self.divergence.judge(found))
            metrics["alarms"] = float(self.divergence.alarms)
        return metrics, alarm

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._tracker.before_update(trainable(module))
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._rate = max((float(group["lr"]) for group in groups), default=0.0)


def _alarm(found: CriticalStep, reason: str) -> str:
    if not reason:
        return ""
    ratio = f"more than {1.0 / found.step:.0f}" if found.is_bound else f"{1.0 / found.step:.2g}"
    return f"the last step is {ratio} times as long as the longest one that does not raise the loss, and {reason}"

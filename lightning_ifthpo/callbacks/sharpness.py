"""The callback that watches the curvature of the training loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.callbacks.critical import CriticalGauge
from lightning_ifthpo.callbacks.curvature import CurvatureGauge
from lightning_ifthpo.callbacks.periodic import PeriodicCallback
from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.core.validation import require_choice, require_flag
from lightning_ifthpo.curvature.kinds import LossCurvature
from lightning_ifthpo.runtime.batches import copied
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.loggers import log_figure, takes_figures
from lightning_ifthpo.runtime.observed_loss import ObservedLoss
from lightning_ifthpo.runtime.requirements import check_bilevel, check_observed, check_precision
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.spectrum import SpectrumTracker
from lightning_ifthpo.spectrum.tracking import Method
from lightning_ifthpo.step_size.critical import CriticalTracker


class SharpnessMonitor(PeriodicCallback):
    """Logs the largest and smallest eigenvalues of the training loss's curvature, and the optimizer's stability edge.

    Works on any LightningModule: it measures the `inner_loss` if there is one, else the loss of `training_step`, in the
    train/eval modes it finds. It changes nothing: weights, buffers, gradients, modes, metrics, other logged values and
    the random state stay as they would be without it. Failed measurements are counted, the first causes a warning, and
    training goes on. With several processes every error except NaN or infinity ends the run, because the other
    processes would wait forever.

    Args:
        every_n_batches: Training batches between two measurements, at least 1. The first measurement comes before the
            first validation and the end of the first epoch, where other callbacks may read it.
        method: "lanczos"; or "power_iteration", which needs more products, and the memory of four vectors instead of up
            to max_iterations; or "critical", the sharpness along the step that the optimizer has just made, by four
            to six forward passes on its batch. That needs no derivative and works for any optimizer, kernel and
            precision; see `critical_step`. All start from their last result.
        loss: "inner", what training minimizes; or with method="critical" "outer", the `outer_loss` of a
            BilevelLightningModule on the examples of `dataloader`: whether steps of training are too long for it.
        top_k: Number of largest eigenvalues to log; a repeated one counts once.
        curvature: "hessian"; "gauss_newton", for losses that call `mark_outputs`; "finite_difference", for models
            without a second derivative.
        preconditioned: Measure P^½ H P^½ with the preconditioner P of the optimizer and the relative learning rates of
            its groups, on which stability depends. True raises if the optimizer is not known; None then measures H.
            False always measures H, which does not determine the stability of Adam.
        max_iterations: Largest number of products for a measurement, or for each end with power iteration, 30 by
            default; of forward passes with method="critical", 6 by default.
        rtol: Residual to stop at, relative to max(|λ_max|, |λ_min|), or relative error of the critical step. Some
            eigenvalue lies within the residual of each end, and others may lie beyond: λ_min below −rtol · λ_max
            proves negative curvature, but a positive λ_min does not exclude it.
        dataloader: Fixed examples to measure on instead of the last training batch. They are kept in memory, weighted
            by example, and split among processes. The loss has to be a mean over examples.
        spectral_density: Log a figure of the spectral density at the first measurement of each epoch, by 50 products
            for a large network and up to 1,000 for one with some hundred weights.
        trace: Log the trace too, by 60 more products.
        max_overhead: Upper bound of the time of measurements over the training time; measurements become as rare as
            needed. The first one is made in any case, and figures are not counted. None for no limit.
        name: Prefix of all metrics; several monitors need different ones.

    Logs `sharpness/lambda_max` (and `lambda_2` to `lambda_<top_k>`), `lambda_min`, `residual` (the largest
    residual bound over max(|λ_max|, |λ_min|)), `products`, `failures`; `edge`, the λ_max at which the optimizer
    becomes unstable, and `edge_ratio`, 1 at the edge, if the optimizer is known; `trace` and `trace_error`.

    With method="critical" it logs instead `sharpness/critical`, 2 / (η · critical step) with the highest learning rate
    η; `edge`, 2 / η; `edge_ratio`, one over the critical step, which is 1 where each step leads to the same loss on the
    other side of a valley; `bound`, 1 if all steps that were tried raise the loss, or none does, so that the ratio is
    only a bound, such as 1e4 or 1e-4; `evaluations`, forward passes; `failures`; and `alarms`. It measures the first
    step, too, and steps on whose batch the loss is twice its median at the last ten: the first eight of them at once,
    later ones within max_overhead. If the ratio is above .95 there, training is about to diverge: an alarm, and the
    first is a warning.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If a figure is asked for and matplotlib is missing.

    >>> monitor = SharpnessMonitor(every_n_batches=50, top_k=3)
    """

    work = "sharpness"

    def __init__(
        self,
        every_n_batches: int = 100,
        *,
        method: Method | Literal["critical"] = "lanczos",
        loss: Literal["inner", "outer"] = "inner",
        top_k: int = 1,
        curvature: LossCurvature = "hessian",
        preconditioned: bool | None = None,
        max_iterations: int | None = None,
        rtol: float = 1e-2,
        dataloader: Iterable[Any] | None = None,
        spectral_density: bool = False,
        trace: bool = False,
        max_overhead: float | None = 0.05,
        name: str = "sharpness",
    ) -> None:
        super().__init__(every_n_batches, max_overhead=max_overhead)
        require_choice("method", method, (*get_args(Method), "critical"))
        require_choice("loss", loss, ("inner", "outer"))
        require_choice("curvature", curvature, get_args(LossCurvature))
        if preconditioned is not None:
            require_flag("preconditioned", preconditioned)
        require_flag("spectral_density", spectral_density)
        require_flag("trace", trace)
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected name to be the prefix of all metrics, got {name!r}")
        if spectral_density and find_spec("matplotlib") is None:
            raise ModuleNotFoundError("spectral_density=True needs matplotlib: pip install 'lightning_ifthpo[plots]'")
        if method == "critical" and (top_k != 1 or preconditioned is not None):
            raise ValueError(
                "method='critical' measures one number, along the step of the optimizer; leave out top_k and "
                "preconditioned"
            )
        if loss == "outer" and (method != "critical" or dataloader is None or trace or spectral_density):
            raise ValueError(
                "loss='outer' needs method='critical' and dataloader=, the examples on which outer_loss is evaluated, "
                "without trace and spectral_density"
            )
        self.method = method
        self.loss = loss
        self.top_k = top_k
        self.curvature = curvature
        self.preconditioned = preconditioned
        self.max_iterations = (6 if method == "critical" else 30) if max_iterations is None else max_iterations
        self.rtol = rtol
        self.dataloader = dataloader
        self.spectral_density = spectral_density
        self.trace = trace
        self.name = name
        headline = "critical" if method == "critical" else "lambda_max"
        self.headlines = {f"{name}/{headline}": f"{name}/max"}
        self._restart()

    def _restart(self) -> None:
        super()._restart()
        self.failures = 0
        self.unconverged = 0
        self._tracker: SpectrumTracker | CriticalTracker
        self._curvature = CurvatureGauge(self.curvature, self.preconditioned)
        self._critical: CriticalGauge | None = None
        if self.method == "critical":
            self._tracker = CriticalTracker(max_evaluations=self.max_iterations, rtol=self.rtol)
            self._critical = CriticalGauge(self._tracker)
        else:
            options: dict[str, Any] = {"max_iterations": self.max_iterations, "rtol": self.rtol}
            self._tracker = SpectrumTracker(self.method, k=self.top_k, **options)
        self._pictured_epoch = -1

    @property
    def state_key(self) -> str:
        """Distinguishes differently configured instances in a checkpoint."""
        options = {key: getattr(self, key) for key in ("name", "method", "curvature", "preconditioned")}
        return f"{type(self).__qualname__}{options}"

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {
            "metrics": self._metrics,
            "failures": self.failures,
            "unconverged": self.unconverged,
            "cadence": self._cadence.state_dict(),
            "tracker": self._tracker.state_dict(),
            "divergence": None if self._critical is None else self._critical.divergence.state_dict(),
            "pictured_epoch": self._pictured_epoch,
            "kind": self._curvature.kind,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`."""
        self.failures, self.unconverged = state_dict["failures"], state_dict["unconverged"]
        self._cadence.load_state_dict(state_dict["cadence"])
        self._tracker.load_state_dict(state_dict["tracker"])
        if self._critical is not None:
            self._critical.divergence.load_state_dict(state_dict["divergence"])
        self._pictured_epoch = state_dict["pictured_epoch"]
        self._curvature.kind = state_dict["kind"]
        self._metrics = state_dict["metrics"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes all checks that need no batch, and loads the fixed examples."""
        check_observed(trainer, pl_module, self.top_k)
        if self.loss == "outer":
            check_bilevel(pl_module, "SharpnessMonitor(loss='outer')")
        if self._critical is None or self.trace or self.spectral_density:
            check_precision(trainer, self.curvature, "32")
            self._curvature.check(trainer, self.name)
        self._ranks = Ranks(trainer)
        self._observed = ObservedLoss(trainer, pl_module, self.dataloader, self._ranks, self.loss)
        # the first process decides, because the loggers of the others are dummies that accept everything
        self._pictures = self.spectral_density and self._ranks.broadcast_bool(any(map(takes_figures, trainer.loggers)))
        if self.spectral_density and not self._pictures:
            rank_zero_warn("spectral_density=True, but no logger takes figures; add one, such as TensorBoardLogger")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock of the budget."""
        self._cadence.begin(self._ranks.broadcast_bool)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps what a measurement after the step may need."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._critical is not None:
            self._critical.begin_batch(trainer, pl_module, may_measure=self._batch is not None)
            if self._batch is None and self._watches(pl_module):
                self._batch = copied(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Takes note of the loss."""
        if self._critical is not None and self._watches(pl_module):
            self._critical.take_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measures after this step if its loss has grown."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._critical is not None and self._critical.begin_step(trainer, pl_module, self._ranks):
            self._cadence.demand()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures if it is time to, and the weights before the step are known."""
        if isinstance(self._tracker, CriticalTracker) and not self._tracker.is_ready:
            self._batch = None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _watches(self, module: L.LightningModule) -> bool:
        """Returns whether the loss of each batch is looked at, and a step measured where it has grown."""
        return self.method == "critical" and self.loss == "inner" and module.automatic_optimization

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forgets the fixed examples and the model, because a callback outlives the fit."""
        super().teardown(trainer, pl_module, stage)
        self.__dict__.pop("_observed", None)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports how many measurements failed, did not converge, or were postponed."""
        if self.failures:
            rank_zero_info(f"SharpnessMonitor: number of failed measurements: {self.failures}")
        if self.unconverged:
            rank_zero_info(
                f"SharpnessMonitor: {self.unconverged} of {self._tracker.measurements} measurements ended above "
                f"rtol={self.rtol:g}, see {self.name}/residual; raise max_iterations, or rtol"
            )
        if self._cadence.postponed:
            count = self._tracker.measurements
            rank_zero_info(
                f"SharpnessMonitor: measured {'once' if count == 1 else f'{count} times'}, more rarely than every "
                f"{self.every_n_batches} batches, to stay below max_overhead={self.max_overhead}; for a curve set "
                "every_n_batches=10 and max_overhead=None"
            )

    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Returns the metrics of all measurements that succeed."""
        metrics: dict[str, float] = {}
        with self._tolerating_failures():
            if isinstance(self._tracker, SpectrumTracker):
                ends, has_converged = self._curvature.spectrum(self._observed, batch, self._tracker)
                metrics |= ends
                self.unconverged += not has_converged
            elif self._critical is not None:
                metrics |= self._critical.measure(self._observed, batch)
            if self.trace:
                metrics |= self._curvature.trace(self._observed, batch)
        metrics["failures"] = float(self.failures)
        if self._critical is not None and self._watches(module):
            metrics["alarms"] = float(self._critical.divergence.alarms)
        return {f"{self.name}/{key}": value for key, value in metrics.items()}

    def _illustrate(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Logs a figure of the spectral density, once an epoch."""
        if not self._pictures or self._pictured_epoch == trainer.current_epoch:
            return
        with self._tolerating_failures():
            with self._progress.showing(trainer, "spectral density"):
                density = self._curvature.density(self._observed, batch)
            self._pictured_epoch = trainer.current_epoch
            if trainer.is_global_zero:
                with self._tolerating_failures(alone=True):
                    from lightning_ifthpo.plots import plot_spectral_density  # imports matplotlib

                    log_figure(trainer, f"{self.name}/spectral_density", plot_spectral_density(density))

    @contextmanager
    def _tolerating_failures(self, *, alone: bool = False) -> Iterator[None]:
        """Counts errors and warns of the first, so that a monitor does not end the training.

        If processes measure together, an error ends them all, because the others would wait for the failed one. A
        FloatingPointError comes from numbers that all of them have.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, NoLossError) and not self._observed.is_fixed:
                raise  # the next training batch may have a loss; fixed examples do not change
            if self._ranks.count > 1 and not alone and not isinstance(error, FloatingPointError):
                raise
            self.failures += 1
            self._warn_once(
                f"SharpnessMonitor: a measurement failed, and training goes on: {type(error).__name__}: {error}. "
                f"Further failures are not reported, but counted in {self.name}/failures"
            )

    def _preview(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Measures inside an accumulation window, because other callbacks need the metrics at once."""
        if self._critical is None:
            return self._fire(trainer, module, batch)
        return {f"{self.name}/alarms": 0.0} if self._watches(module) else {}  # there is no step to measure

    def _is_last_chance(self, trainer: L.Trainer) -> bool:
        """Also true before the first validation and the end of the first epoch, where other callbacks read metrics."""
        return super()._is_last_chance(trainer) or self._lacks_metrics(trainer)

"""The callback that tunes hyperparameters while the Trainer trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_ifthpo.callbacks.failures import Failures, Policy
from lightning_ifthpo.callbacks.frozen import FrozenHyperparameters, freeze
from lightning_ifthpo.callbacks.hyper_metrics import many, result_metrics, summaries
from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.callbacks.periodic import PeriodicCallback, check_single_process, is_monitored
from lightning_ifthpo.callbacks.report import Report
from lightning_ifthpo.callbacks.summary import TuningSummary
from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.core.validation import require_choice, require_flag
from lightning_ifthpo.curvature.kinds import OPERATORS, Curvature
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.runtime.advice import examine_data, tell_of_few_steps, warn_of_no_step
from lightning_ifthpo.runtime.loggers import log_histograms, log_result
from lightning_ifthpo.runtime.optimizer_state import include_hyperparameters
from lightning_ifthpo.runtime.outer_data import check_batches, find_outer_data
from lightning_ifthpo.runtime.precision import CurvaturePrecision
from lightning_ifthpo.runtime.requirements import check_module, check_precision
from lightning_ifthpo.solvers import Amortized, Solver


class IFTHypergradient(PeriodicCallback):
    """Updates the hyperparameters of a `BilevelLightningModule` by implicit differentiation during training.

    After every n-th training batch it takes that batch for the inner loss and the next outer batch for the outer loss,
    solves for the hypergradient, and makes one step of the module's hyper-optimizer. Nothing else changes: weights,
    buffers, gradients, modes, metrics, other logged values and the random state stay as they would be without it.

    Args:
        every_n_batches: Training batches between two hyper steps, at least 1.
        curvature: "hessian"; "gauss_newton", for losses that call `mark_outputs`; "kfac", likewise and with
            `Direct(damping=...)`; "gradient_outer_product", with `Direct(damping=...)`; "finite_difference", for models
            without a second derivative; "auto" takes that for `SAMA()`, Gauss–Newton if outputs are marked, else the
            Hessian.
        solver: Solver of the linear system; None takes `Amortized(products=2, horizon=100)`.
        warm_start: Start each solve from the last solution; `Amortized` always does.
        start_after_batches: Training batches before the first of every_n_batches is counted.
        outer_dataloader: Loader of outer batches. None takes the module's `outer_dataloader()`, or the data module's,
            or the validation data with a warning.
        held_out_dataloader: Loader of batches that nothing learns from. The mean outer loss of its first eight batches,
            before training and after it, is part of the summary. They are kept in memory.
        on_failure: "skip", "use" if it is finite, or "raise" an error for a solve that neither converged nor completed,
            and for an outer loss that is 32 times too large because running statistics, as those of BatchNorm, do not
            fit the weights yet. A hyper step that runs out of memory is skipped, except with "raise" or several
            processes.
        max_overhead: Upper bound of the time of hyper steps over the training time; hyper steps become as rare as
            needed, and the run then depends on the clock. None for no limit.
        precision: In mixed precision "32" evaluates the losses without autocast, "inherit" as training does.

    Logs once per hyper step `hypergrad/norm`, `direct_norm`, `indirect_norm`, `outer_loss`, `residual` if the solver
    measures it, `products`, `skipped`, and `hyperparameter/<name>/mean`, `min` and `max`, in natural units. A
    hyperparameter of at most 24 numbers is also logged number by number, and of more as a histogram, once an epoch, to
    loggers that accept histograms. At the end loggers get the mean of each as a hyperparameter of the run. If a
    callback or a scheduler monitors one of the metrics, and no hyper step has been made before the first validation or
    the end of the first epoch, a hypergradient is computed there for `callback_metrics` alone.

    Raises:
        ValueError: If an argument is out of range.

    >>> callback = IFTHypergradient(every_n_batches=10, curvature="gauss_newton")
    """

    work = "hyper step"
    moves_hyperparameters = True

    def __init__(
        self,
        every_n_batches: int = 5,
        *,
        curvature: Literal["auto"] | Curvature = "auto",
        solver: Solver | None = None,
        warm_start: bool = True,
        start_after_batches: int = 0,
        outer_dataloader: Iterable[Any] | None = None,
        held_out_dataloader: Iterable[Any] | None = None,
        on_failure: Policy = "skip",
        max_overhead: float | None = None,
        precision: CurvaturePrecision = "32",
    ) -> None:
        super().__init__(every_n_batches, start_after_batches=start_after_batches, max_overhead=max_overhead)
        if not isinstance(solver, Solver | None):
            raise TypeError(f"expected solver to be an instance such as ConjugateGradient(), or None, got {solver!r}")
        require_choice("curvature", curvature, ("auto", *OPERATORS))
        require_flag("warm_start", warm_start)
        require_choice("on_failure", on_failure, get_args(Policy))
        require_choice("precision", precision, ("32", "inherit"))
        self.curvature = curvature
        self.solver = Amortized(products=2, horizon=100) if solver is None else solver
        if isinstance(self.solver, Amortized) and not warm_start:
            raise ValueError("Amortized improves one estimate over all solves; use it with warm_start=True")
        self.warm_start = warm_start
        if held_out_dataloader is not None:
            check_batches(held_out_dataloader, "held_out_dataloader: ")
        self.outer_dataloader, self.held_out_dataloader = outer_dataloader, held_out_dataloader
        self.on_failure = on_failure
        self.precision = precision
        self.headlines = {"hypergrad/outer_loss": "hypergrad/outer", "hypergrad/gain": "hypergrad/gain"}
        self._restart()

    def _restart(self) -> None:
        super()._restart()
        self._failures = Failures(self.on_failure)
        self._report: Report | None = None
        self._summary: TuningSummary | None = None
        self._restored: dict[str, Any] = {}
        self._stepper: HyperStepper | None = None
        self.shared_examples = ""  # how many outer examples are training examples, as "8 of 20"
        self._frozen: FrozenHyperparameters | None = None
        self._unfrozen: list[str] = []
        self._optimizer_states: list[dict[str, Any]] = []

    @property
    def skipped(self) -> int:
        """Number of hyper steps that were skipped."""
        return sum(self._failures.causes.values())

    @property
    def skipped_by_cause(self) -> dict[str, int]:
        """Number of hyper steps that were skipped, for each cause."""
        return dict(self._failures.causes)

    @property
    def stepper(self) -> HyperStepper | None:
        """Makes the hyper steps while training goes on; None before and after."""
        return self._stepper

    @property
    def latest_summary(self) -> TuningSummary | None:
        """The same as `summary()`, and None before the end of a fit."""
        return self._summary

    @property
    def state_key(self) -> str:
        """Distinguishes differently configured instances in a checkpoint."""
        options = {"every_n_batches": self.every_n_batches, "curvature": self.curvature, "solver": repr(self.solver)}
        return f"{type(self).__qualname__}{options}"

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        if self._stepper is None or self._report is None:
            return self._restored
        return {
            "skipped": self.skipped,
            "causes": self._failures.causes,
            "report": self._report.state_dict(),
            "metrics": self._metrics,
            "cadence": self._cadence.state_dict(),
            "stepper": self._stepper.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._restored = state_dict

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the states of the optimizers, which may be those of a plain module, until there are optimizers."""
        self._optimizer_states = checkpoint.get("optimizer_states", [])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the callback, and freezes the hyperparameters before a strategy wraps the module."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and isinstance(pl_module, BilevelLightningModule):
            self._unfrozen = freeze(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes all checks that need no data."""
        check_module(trainer, pl_module, self._unfrozen)
        check_precision(trainer, self.curvature, self.precision)
        for optimizer, state in zip(trainer.optimizers, self._optimizer_states, strict=False):
            include_hyperparameters(state, optimizer, pl_module)
        self._optimizer_states = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the outer data and restores a checkpoint's state."""
        self._frozen = FrozenHyperparameters(pl_module)
        if pl_module.has_fixed_hyperparameters:
            return
        restored, self._restored = self._restored, {}
        source = find_outer_data(trainer, pl_module, self.outer_dataloader)
        self.shared_examples = examine_data(trainer, pl_module, source)
        tell_of_few_steps(trainer, self.every_n_batches, self.start_after_batches)
        self._stepper = HyperStepper(
            trainer,
            pl_module,
            source,
            curvature=self.curvature,
            solver=self.solver,
            warm_start=self.warm_start,
            precision=self.precision,
            every_n_batches=self.every_n_batches,
            state=restored.get("stepper", {}),
        )
        self._report = Report(self._stepper, pl_module, source, self.held_out_dataloader, restored.get("report", {}))
        if restored:
            self._failures.causes, self._metrics = restored["causes"], restored["metrics"]
            self._cadence.load_state_dict(restored["cadence"])
        self._cadence.begin(self._stepper.ranks.broadcast_bool)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freezes the hyperparameters again, and makes a dry run on the first batch that has a loss."""
        assert self._frozen is not None, "training has not started"
        self._frozen.refreeze()
        if self._stepper is None or self._report is None or pl_module.has_fixed_hyperparameters:
            return  # without a batch there is no hyper step
        if not self._stepper.is_tried:
            try:
                with self._progress.showing(trainer, "trying the first batch"):
                    self._stepper.dry_run(batch)
                    self._report.begin()
            except NoLossError:
                check_single_process(trainer)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Makes one hyper step."""
        metrics: dict[str, float] = {}
        stepper = self._active_stepper
        with self._failures.skipping_without_memory(trainer, stepper):
            result, doubt = stepper.compute(batch, diagnosed=self._failures.reports_next)
            metrics = result_metrics(result)
            if self._failures.accepts(result, doubt, stepper.steps):
                stepper.apply(result)
        return {**metrics, **self._totals(), **summaries(module)}

    def _preview(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Returns the metrics of a hyper step that is not made."""
        metrics = result_metrics(self._active_stepper.preview(batch))
        return {**metrics, **self._totals(), **summaries(module)}

    def _totals(self) -> dict[str, float]:
        return {"hypergrad/skipped": float(self.skipped), "hypergrad/gain": self._active_stepper.evidence.confirmed}

    def _lacks_metrics(self, trainer: L.Trainer) -> bool:
        """Also asks whether a callback or a scheduler monitors one of the metrics, because a preview costs a solve."""
        return super()._lacks_metrics(trainer) and is_monitored(trainer, ("hypergrad/", "hyperparameter/"))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the worker processes of the outer data, and forgets the model; the state remains."""
        super().teardown(trainer, pl_module, stage)
        if self._stepper is not None:
            self._restored = self.state_dict()
            self._stepper.outer_data.close()
            self._stepper = self._report = None
        if self._frozen is not None:
            self._frozen.release()
            self._frozen = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes histograms of the hyperparameters that are too many to be logged one by one."""
        if self._metrics:
            log_histograms(trainer, ((f"hyperparameter/{name}", values) for name, values in many(pl_module)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarizes the hyper steps, for the console, the loggers and `summary`."""
        if self._stepper is None or self._report is None or pl_module.has_fixed_hyperparameters:
            return
        if not self._stepper.steps:
            warn_of_no_step(self.every_n_batches, self.start_after_batches)
            return
        with self._progress.showing(trainer, "losses at the end"):
            self._summarize(self._report)
        log_result(trainer, *self.summary().result())

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Summarizes what was done so far, as after Ctrl-C, without evaluating a loss again."""
        if self._report is not None and self._active_stepper.evidence.steps:
            self._summarize(self._report, evaluated=False)
        super().on_exception(trainer, pl_module, exception)

    def summary(self) -> TuningSummary:
        """Returns what the hyper steps of the last fit have done.

        Raises:
            RuntimeError: If no fit with hyper steps has come to its end.
        """
        if self._summary is None:
            raise RuntimeError("there is no summary before the end of a fit with hyper steps; call trainer.fit first")
        return self._summary

    def _summarize(self, report: Report, *, evaluated: bool = True) -> None:
        """Keeps and tells a summary."""
        self._summary = report.summary(self._failures.causes, self._cadence, self.shared_examples, evaluated=evaluated)
        rank_zero_info(str(self._summary))

    @property
    def _active_stepper(self) -> HyperStepper:
        assert self._stepper is not None, "training has not started"
        return self._stepper

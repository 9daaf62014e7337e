"""The callback that tunes hyperparameters while the Trainer trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.callbacks.periodic import PeriodicCallback
from lightning_ifthpo.core.validation import require_choice, require_flag
from lightning_ifthpo.curvature.kinds import OPERATORS, Curvature
from lightning_ifthpo.hypergradients import Hypergradient
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.runtime.outer_data import find_outer_data
from lightning_ifthpo.runtime.precision import CurvaturePrecision
from lightning_ifthpo.runtime.requirements import check_module, check_precision
from lightning_ifthpo.solvers import Amortized, Solver, Status

_CURVATURES = ("auto", *OPERATORS)


class IFTHypergradient(PeriodicCallback):
    """Updates the hyperparameters of a `BilevelLightningModule` by implicit differentiation during training.

    After every n-th training batch it takes that batch for the inner loss and a fresh outer batch for the outer loss,
    solves for the hypergradient, and lets the module's hyper-optimizer make one step. Nothing else changes: weights,
    buffers, gradients, modes, metrics, other logged values and the random state stay as they would be without it.

    Args:
        every_n_batches: Training batches between two hyper steps, at least 1.
        curvature: "hessian"; "gauss_newton", for losses that mark the model's outputs; "kfac" likewise, and
            "gradient_outer_product", both with `Direct(damping=...)`; "finite_difference", for models without a second
            derivative; "auto" takes Gauss–Newton if outputs are marked, else the Hessian.
        solver: How the linear system is solved; None takes `Amortized(products=2, horizon=100)`.
        warm_start: Start each solve from the last solution; `Amortized` always does.
        start_after_batches: Training batches before the first of every_n_batches is counted.
        outer_dataloader: Loader of outer batches. None asks the module's `outer_dataloader()`, then the data module's,
            then takes the validation data and warns.
        on_failure: What to do with a solve that neither converged nor completed: "skip" it, "use" it if it is finite,
            or "raise" an error. A hyper step that runs out of memory is skipped, except with "raise" or several
            processes.
        max_overhead: Fraction of the training time that hyper steps may cost; they become as rare as needed, and the
            run then depends on the clock. None for no limit.
        precision: "32" evaluates the losses without autocast in mixed precision, "inherit" as training does.

    Logs once per hyper step `hypergrad/norm`, `direct_norm`, `indirect_norm`, `outer_loss`, `residual`, `products`,
    `skipped`, and `hyperparameter/<name>/mean`, `min` and `max`.

    Raises:
        ValueError: If an argument is out of range.

    >>> callback = IFTHypergradient(every_n_batches=10, curvature="gauss_newton")
    """

    @property
    def headline(self) -> str:
        """The metric for the progress bar."""
        return "hypergrad/norm"

    def __init__(
        self,
        every_n_batches: int = 5,
        *,
        curvature: Literal["auto"] | Curvature = "auto",
        solver: Solver | None = None,
        warm_start: bool = True,
        start_after_batches: int = 0,
        outer_dataloader: Iterable[Any] | None = None,
        on_failure: Literal["skip", "use", "raise"] = "skip",
        max_overhead: float | None = None,
        precision: CurvaturePrecision = "32",
    ) -> None:
        super().__init__(every_n_batches, start_after_batches=start_after_batches, max_overhead=max_overhead)
        if not isinstance(solver, Solver | None):
            raise TypeError(f"expected solver to be an instance such as ConjugateGradient(), or None, got {solver!r}")
        require_choice("curvature", curvature, _CURVATURES)
        require_flag("warm_start", warm_start)
        require_choice("on_failure", on_failure, ("skip", "use", "raise"))
        require_choice("precision", precision, ("32", "inherit"))
        self.curvature = curvature
        self.solver = Amortized(products=2, horizon=100) if solver is None else solver
        if isinstance(self.solver, Amortized) and not warm_start:
            raise ValueError("Amortized moves one estimate from solve to solve, and warm_start=False would discard it")
        self.warm_start = warm_start
        self.outer_dataloader = outer_dataloader
        self.on_failure = on_failure
        self.precision = precision
        self._restored: dict[str, Any] = {}
        self._restart()

    def _restart(self) -> None:
        super()._restart()
        self.skipped = 0
        self._stepper: HyperStepper | None = None
        self._unfrozen: list[str] = []
        self._is_tested = False

    @property
    def state_key(self) -> str:
        """Distinguishes differently configured instances in a checkpoint."""
        return self._generate_state_key(
            every_n_batches=self.every_n_batches, curvature=self.curvature, solver=repr(self.solver)
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        if self._stepper is None:
            return self._restored
        return {
            "skipped": self.skipped,
            "cadence": self._cadence.state_dict(),
            "stepper": self._stepper.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._restored = state_dict

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Freezes the hyperparameters before a strategy wraps the module, and resets the callback."""
        if stage != "fit":
            return
        self._restart()
        self._restored = {}  # a checkpoint that belongs to this fit is loaded after this
        if isinstance(pl_module, BilevelLightningModule):
            tunable = dict(pl_module.named_hyperparameters())
            self._unfrozen = [name for name, parameter in tunable.items() if parameter.requires_grad]
            for parameter in tunable.values():
                parameter.requires_grad_(False)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks what can be checked without data."""
        check_module(trainer, pl_module, self._unfrozen)
        check_precision(trainer, self.curvature, self.precision)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the outer data and restores a checkpoint's state."""
        restored, self._restored = self._restored, {}
        self._stepper = HyperStepper(
            trainer,
            pl_module,
            find_outer_data(trainer, pl_module, self.outer_dataloader),
            curvature=self.curvature,
            solver=self.solver,
            warm_start=self.warm_start,
            precision=self.precision,
            state=restored.get("stepper", {}),
        )
        if restored:
            self.skipped = restored["skipped"]
            self._cadence.load_state_dict(restored["cadence"])
        self._cadence.begin(self._stepper.ranks.broadcast_bool)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Makes a dry run on the first batch, before training uses it."""
        if not self._is_tested:
            self._active_stepper.dry_run(batch)
            self._is_tested = True
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Makes one hyper step."""
        result = self._computed(trainer, batch)
        if result is not None and self._accepts(result):
            self._active_stepper.apply(result)
        metrics = {} if result is None else _metrics(result)
        return {**metrics, "hypergrad/skipped": float(self.skipped), **_summaries(module)}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the worker processes of the outer data."""
        if self._stepper is not None:
            self._stepper.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Does what teardown would, which is not called after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says how many hyper steps were skipped."""
        if self.skipped:
            rank_zero_info(f"IFTHypergradient: {self.skipped} of {self._active_stepper.steps} hyper steps were skipped")

    @property
    def _active_stepper(self) -> HyperStepper:
        assert self._stepper is not None, "training has not started"
        return self._stepper

    def _computed(self, trainer: L.Trainer, batch: Any) -> Hypergradient | None:
        """Returns a hypergradient; None, with a warning, if memory runs out."""
        stepper = self._active_stepper
        try:
            # A diagnosis costs products, so that only a failure that is reported gets one.
            return stepper.compute(batch, diagnosed=not self._has_warned or self.on_failure == "raise")
        except RuntimeError as error:
            # a process that skips alone would leave the others waiting
            if self.on_failure == "raise" or trainer.world_size > 1 or not is_oom_error(error):
                raise
            reason = f"hyper step {stepper.steps} ran out of memory ({str(error).splitlines()[0]})"
        garbage_collection_cuda()  # the error no longer holds its tensors
        self._skip(f"{reason}; a smaller outer batch or curvature='finite_difference' takes less")
        return None

    def _skip(self, reason: str) -> None:
        """Counts a hyper step that is not made, and reports the first."""
        self.skipped += 1
        self._report(f"{reason}. It is skipped")

    def _report(self, what: str) -> None:
        self._warn_once(f"{what}; further ones are not reported, but counted in hypergrad/skipped")

    def _accepts(self, result: Hypergradient) -> bool:
        """Returns whether to use a result; one whose solve failed is counted and reported."""
        if result.status.succeeded:
            return True
        reason = (
            f"hyper step {self._active_stepper.steps} ended with status {result.status.value!r}: {result.diagnosis}"
        )
        if self.on_failure == "raise":
            raise RuntimeError(reason)
        if self.on_failure == "use" and result.status is not Status.NONFINITE:
            self._report(f"{reason}. It is used nevertheless")
            return True
        self._skip(reason)
        return False


def _metrics(result: Hypergradient) -> dict[str, float]:
    return {
        "hypergrad/norm": _norm(result.gradients),
        "hypergrad/direct_norm": _norm(result.direct),
        "hypergrad/indirect_norm": _norm(result.indirect),
        "hypergrad/outer_loss": float(result.outer_loss),
        "hypergrad/residual": result.relative_residual,
        "hypergrad/products": float(result.products + result.solution.extra_products),
    }


def _summaries(module: Any) -> dict[str, float]:
    """Returns mean, minimum and maximum of each registered hyperparameter, a module taken as a whole."""
    values: dict[str, list[Tensor]] = {}
    for path, parameter in module.named_hyperparameters():
        values.setdefault(path.split(".")[0], []).append(parameter.detach().reshape(-1))
    summaries: dict[str, float] = {}
    for name, parts in values.items():
        flat = torch.cat(parts)
        mean, smallest, largest = torch.stack([flat.mean(), flat.min(), flat.max()]).tolist()
        prefix = f"hyperparameter/{name}"
        summaries |= {f"{prefix}/mean": mean, f"{prefix}/min": smallest, f"{prefix}/max": largest}
    return summaries


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.reshape(-1) for tensor in tensors])))

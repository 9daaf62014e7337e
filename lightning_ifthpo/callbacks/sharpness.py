"""The callback that watches the curvature of the training loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DistributedSampler

from lightning_ifthpo import spectrum
from lightning_ifthpo.callbacks.periodic import PeriodicCallback
from lightning_ifthpo.core.random_state import isolated
from lightning_ifthpo.core.validation import require_choice, require_flag
from lightning_ifthpo.curvature import AverageOperator, CurvatureOperator, LossCurvature, curvature_operator
from lightning_ifthpo.optimizers.stability import StabilityEdge, has_edge
from lightning_ifthpo.runtime.batches import prepared
from lightning_ifthpo.runtime.cadence import Cadence
from lightning_ifthpo.runtime.distributed import Ranks, batch_size
from lightning_ifthpo.runtime.loggers import log_figure, takes_figures
from lightning_ifthpo.runtime.losses import evaluating
from lightning_ifthpo.runtime.outer_data import check_batches
from lightning_ifthpo.runtime.requirements import check_observed, check_precision, trainable
from lightning_ifthpo.spectrum import SpectrumTracker
from lightning_ifthpo.spectrum.tracking import Method

# One seed for all measurements: dropout masks are the same in each, so that its values can be compared.
_SEED = 0


class SharpnessMonitor(PeriodicCallback):
    """Logs both ends of the spectrum of the training loss's curvature, and how far training is from instability.

    Works on any LightningModule: it measures the `inner_loss` where there is one, else the loss of `training_step`, in
    the train/eval modes it finds, on the batch just seen or on a fixed set of examples. It changes nothing: weights,
    buffers, gradients, modes, metrics, other logged values and the random state stay as they would be without it. A
    measurement that fails is reported, counted and survived; among several processes it ends the run, since the others
    would wait for ever.

    Args:
        every_n_batches: Training batches between two measurements, at least 1. The first is made after the first epoch
            at the latest.
        method: "lanczos"; or "power_iteration", which needs more products, and the memory of four vectors instead of up
            to max_iterations. Both start from their last result.
        top_k: Eigenvalues to log from the top, a repeated one once.
        curvature: "hessian"; "gauss_newton", for losses that call `mark_outputs`; "finite_difference", for models
            without a second derivative.
        preconditioned: Measure P^½ H P^½ with the preconditioner P of the optimizer and the relative learning rates of
            its groups, which is what its stability depends on. None and True do so; True insists, and refuses an
            optimizer that is not known. False measures H itself, which says nothing of the stability of Adam.
        max_iterations: Products to spend at most on a measurement, or on each end with power iteration.
        rtol: Residual to stop at, relative to max(|λ_max|, |λ_min|). An eigenvalue lies within the residual of each
            end, and others may lie beyond: λ_min below −rtol · λ_max proves negative curvature, and a positive one does
            not exclude it.
        dataloader: Fixed examples to measure on instead of the training batch, kept in memory; weighted per example,
            with batches of any size, which several processes share out. The loss has to be a mean over examples.
        spectral_density: Log a figure of the spectral density at the first measurement of each epoch, by 50
            products for a large network, and up to 1,000 for one of some hundred weights.
        trace: Log the trace too, by 60 more products.
        max_overhead: Fraction of the training time that measurements may cost; they become as rare as needed. The first
            measurement and figures are not counted. None for no limit.
        name: Prefix of all metrics, by which several monitors are told apart.

    Logs `sharpness/lambda_max` (and `lambda_2` to `lambda_<top_k>`), `lambda_min`, `residual` (the larger residual
    bound of both ends over the larger magnitude), `products`, `failures`; `edge`, the λ_max at which the optimizer
    becomes unstable, and `edge_ratio`, 1 at the edge, if the optimizer is known; `trace` and `trace_error`.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If a figure is asked for and matplotlib is missing.

    >>> monitor = SharpnessMonitor(every_n_batches=50, top_k=3)
    """

    @property
    def headline(self) -> str:
        """The metric for the progress bar."""
        return f"{self.name}/lambda_max"

    def __init__(
        self,
        every_n_batches: int = 100,
        *,
        method: Method = "lanczos",
        top_k: int = 1,
        curvature: LossCurvature = "hessian",
        preconditioned: bool | None = None,
        max_iterations: int = 30,
        rtol: float = 1e-2,
        dataloader: Iterable[Any] | None = None,
        spectral_density: bool = False,
        trace: bool = False,
        max_overhead: float | None = 0.05,
        name: str = "sharpness",
    ) -> None:
        super().__init__()
        require_choice("curvature", curvature, get_args(LossCurvature))
        if preconditioned is not None:
            require_flag("preconditioned", preconditioned)
        require_flag("spectral_density", spectral_density)
        require_flag("trace", trace)
        if not isinstance(name, str) or not name:
            raise ValueError(f"expected name to be the prefix of all metrics, got {name!r}")
        if spectral_density and find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "spectral_density=True draws with matplotlib: pip install 'lightning_ifthpo[plots]'"
            )
        self.every_n_batches = every_n_batches
        self.method = method
        self.top_k = top_k
        self.curvature = curvature
        self.preconditioned = preconditioned
        self.max_iterations = max_iterations
        self.rtol = rtol
        self.dataloader = dataloader
        self.spectral_density = spectral_density
        self.trace = trace
        self.max_overhead = max_overhead
        self.name = name
        self._restart()

    def _restart(self) -> None:
        self._begin(Cadence(self.every_n_batches, max_overhead=self.max_overhead))
        self.failures = 0
        self.unconverged = 0
        self._tracker = SpectrumTracker(self.method, k=self.top_k, max_iterations=self.max_iterations, rtol=self.rtol)
        self._examples: list[tuple[Any, int]] = []
        self._weight = 0
        self._pictured_epoch = -1
        self._told = False

    @property
    def state_key(self) -> str:
        """Tells differently configured instances apart in a checkpoint."""
        return self._generate_state_key(
            name=self.name, method=self.method, curvature=self.curvature, preconditioned=self.preconditioned
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns all that resuming needs, as tensors and plain numbers."""
        return {
            "fired": self._fired,
            "failures": self.failures,
            "unconverged": self.unconverged,
            "cadence": self._cadence.state_dict(),
            "tracker": self._tracker.state_dict(),
            "pictured_epoch": self._pictured_epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        self.failures, self.unconverged = state_dict["failures"], state_dict["unconverged"]
        self._cadence.load_state_dict(state_dict["cadence"])
        self._tracker.load_state_dict(state_dict["tracker"])
        self._pictured_epoch = state_dict["pictured_epoch"]
        self._fired = state_dict["fired"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begins anew; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            self._restart()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks what can be checked before the first batch, and loads the fixed examples."""
        check_observed(trainer, pl_module, self.top_k)
        check_precision(trainer, self.curvature, "32")
        self._check_optimizers(trainer)
        self._ranks = Ranks(trainer)
        if self.dataloader is not None:
            self._examples, self._weight = _loaded(self.dataloader, pl_module.device, self._ranks)
        # loggers take everything in all processes but the first
        self._pictures = self.spectral_density and self._ranks.agreed(any(map(takes_figures, trainer.loggers)))
        if self.spectral_density and not self._pictures:
            rank_zero_warn("spectral_density=True, but no logger takes figures; add a TensorBoardLogger, say")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock of the budget."""
        self._cadence.begin(self._ranks.agreed)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Says how many measurements did not do what was asked."""
        if self.failures:
            rank_zero_info(f"SharpnessMonitor: number of failed measurements: {self.failures}")
        if self.unconverged:
            rank_zero_info(
                f"SharpnessMonitor: {self.unconverged} of {self._tracker.measurements} measurements ended above "
                f"rtol={self.rtol:g}, see {self.name}/residual; raise max_iterations, or rtol"
            )
        if self._cadence.postponed:
            rank_zero_info(
                f"SharpnessMonitor: measured {self._tracker.measurements} times, more rarely than every "
                f"{self.every_n_batches} batches, to stay below max_overhead={self.max_overhead}"
            )

    def _fire(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> dict[str, float]:
        """Measures all that is asked for; what fails is missing from the metrics."""
        metrics: dict[str, float] = {}
        with self._surviving():
            for part in [self._ends, self._trace] if self.trace else [self._ends]:
                with self._operator(trainer, module, batch) as (operator, edge):
                    metrics |= part(operator, edge)
        return {f"{self.name}/{key}": value for key, value in {**metrics, "failures": float(self.failures)}.items()}

    def _illustrate(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> None:
        """Logs a figure of the spectral density, once an epoch."""
        if not self._pictures or self._pictured_epoch == trainer.current_epoch:
            return
        with self._surviving():
            with self._operator(trainer, module, batch) as (operator, _):
                density = spectrum.spectral_density(operator)
            self._pictured_epoch = trainer.current_epoch
            if trainer.is_global_zero:
                with self._surviving(alone=True):
                    from lightning_ifthpo.plots import plot_spectral_density  # and so matplotlib

                    log_figure(trainer, f"{self.name}/spectral_density", plot_spectral_density(density))

    @contextmanager
    def _surviving(self, *, alone: bool = False) -> Iterator[None]:
        """Counts an error instead of letting an observer end what it observes, and tells of the first in a fit.

        Where processes measure together the others would wait for one that has failed, so that they all end with it,
        unless the error comes from numbers that all of them have.
        """
        try:
            yield
        except Exception as error:
            together = self._ranks.count > 1 and not alone
            if together and not isinstance(error, FloatingPointError):
                raise
            self.failures += 1
            if not self._told:
                self._told = True
                rank_zero_warn(
                    f"SharpnessMonitor: a measurement failed, and training goes on: {type(error).__name__}: {error}. "
                    f"Further ones are counted in {self.name}/failures"
                )

    def _hurries(self, trainer: L.Trainer) -> bool:
        """Others may want to watch a metric from the end of the first epoch on."""
        return super()._hurries(trainer) or (trainer.is_last_batch and not self._fired)

    def _ends(self, operator: CurvatureOperator, edge: StabilityEdge | None) -> dict[str, float]:
        """Returns the ends of the spectrum, and where the edge of stability lies."""
        ends = self._tracker.measure(operator)
        self.unconverged += not ends.converged
        assert ends.largest_vectors is not None
        largest = ends.largest.tolist()
        metrics = {
            "lambda_max": largest[0],
            **{f"lambda_{rank}": value for rank, value in enumerate(largest[1:], start=2)},
            "lambda_min": float(ends.smallest[0]),
            "residual": ends.relative_residual,
            "products": float(ends.products),
        }
        if edge is not None:
            metrics["edge_ratio"] = edge.ratio(largest[0], ends.largest_vectors[0])
            if math.isfinite(edge.sharpness):  # it is not at a learning rate of zero
                metrics["edge"] = edge.sharpness
        return _finite(metrics)

    def _trace(self, operator: CurvatureOperator, edge: StabilityEdge | None) -> dict[str, float]:
        """Returns the trace."""
        estimate = spectrum.trace(operator)
        return _finite({"trace": estimate.trace, "trace_error": estimate.standard_error})

    @contextmanager
    def _operator(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any
    ) -> Iterator[tuple[CurvatureOperator, StabilityEdge | None]]:
        """Gives the operator to measure, and the edge of its λ_max if any; nothing that evaluations do is kept."""
        edge = StabilityEdge.of(trainer.optimizers, trainable(module))
        if edge is not None and edge.metric is not None and self.preconditioned is False:
            edge = None  # it is not the curvature itself that the edge bounds
        with evaluating(trainer, module, _SEED, self.curvature) as losses:
            parameters = trainable(module)
            if self._examples:
                operators = [
                    lambda examples=examples: curvature_operator(
                        self.curvature, losses.inner(prepared(trainer, module, examples, _SEED)), parameters
                    )
                    for examples, _ in self._examples
                ]
                mean = AverageOperator(operators, [size for _, size in self._examples])
                operator = self._ranks.mean(mean, self._weight)
            else:
                share = self._ranks.share(losses.inner(batch), batch)
                operator = curvature_operator(self.curvature, share, parameters, self._ranks.all_reduce)
            if edge is not None and edge.metric is not None:
                operator = operator.preconditioned(edge.metric)
            yield operator, edge

    def _check_optimizers(self, trainer: L.Trainer) -> None:
        unknown = sorted({type(optimizer).__name__ for optimizer in trainer.optimizers if not has_edge(optimizer)})
        if not unknown or self.preconditioned is False:
            return
        names = ", ".join(unknown)
        if self.preconditioned:
            raise ValueError(f"preconditioned=True needs an optimizer whose update is understood, and {names} is not")
        rank_zero_warn(
            f"the stability edge of {names} is not known: sharpness/lambda_max is that of the curvature itself, and "
            "sharpness/edge_ratio is not logged"
        )


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the metrics, or raises FloatingPointError if one is not finite."""
    if not all(map(math.isfinite, metrics.values())):
        raise FloatingPointError("NaN or infinity in the curvature; look at the batch, the loss and the weights")
    return metrics


def _loaded(source: Iterable[Any], device: torch.device, ranks: Ranks) -> tuple[list[tuple[Any, int]], int]:
    """Returns this process's part of the batches of a loader, each with its number of examples, and their sum."""
    check_batches(source)
    with isolated(device, _SEED):
        batches = [(batch, _size(batch)) for batch in source]
    if not batches or min(size for _, size in batches) < 1:
        raise ValueError(
            "the dataloader of SharpnessMonitor is empty, or has an empty batch: check its data set, and drop_last "
            "beside batch_size"
        )
    split = isinstance(getattr(source, "sampler", None), DistributedSampler)
    own = batches if split else batches[ranks.rank :: ranks.count]
    # a process without any takes a batch all the same, which weighs nothing
    return own or batches[:1], sum(size for _, size in own)


def _size(batch: Any) -> int:
    size = batch_size(batch)
    if size is None:
        raise ValueError(
            f"cannot tell the number of examples in a batch of type {type(batch).__name__}; the dataloader of "
            "SharpnessMonitor should yield tensors, or tuples, lists or dicts of tensors"
        )
    return size

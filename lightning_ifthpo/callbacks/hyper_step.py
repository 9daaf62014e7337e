"""The hyper steps of one fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import compress
from statistics import fmean
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_ifthpo.callbacks.evidence import Evidence
from lightning_ifthpo.callbacks.hyper_optimizer import HyperOptimizer
from lightning_ifthpo.callbacks.outer_level import OuterLevel
from lightning_ifthpo.core.autodiff import differentiable
from lightning_ifthpo.core.loss import NoLossError
from lightning_ifthpo.curvature.finite_difference import FiniteDifferenceOperator
from lightning_ifthpo.curvature.kinds import Curvature
from lightning_ifthpo.hypergradients import Hypergradient, implicit_hypergradient
from lightning_ifthpo.hypergradients.result import OuterGradient
from lightning_ifthpo.optimizers import UpdateRule, moving
from lightning_ifthpo.runtime.advice import warn_of_direct_effects, warn_of_equal_hypergradients, warn_of_long_step
from lightning_ifthpo.runtime.batches import prepared
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import ModuleLosses
from lightning_ifthpo.runtime.outer_data import OuterData
from lightning_ifthpo.runtime.precision import CurvaturePrecision, first_loss_scale, loss_scales
from lightning_ifthpo.runtime.verification import trusted_operator
from lightning_ifthpo.solvers import SAMA, Solver, SolveResult, Status
from lightning_ifthpo.solvers.causes import Cause


class HyperStepper:
    """Computes and applies hypergradients of one module in one fit.

    Args:
        trainer: The Trainer, with optimizers and data set up.
        module: A LightningModule with the bilevel mixin.
        source: Loader of outer batches.
        curvature, solver, warm_start, precision, every_n_batches: As in `IFTHypergradient`.
        state: A result of `state_dict`; empty for a new start.

    Attributes:
        curvature: The curvature in use; "auto" before `dry_run`.
        is_tried: Whether `dry_run` has found nothing wrong, as it has to before a hypergradient is computed.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: Any,
        source: Iterable[Any],
        *,
        curvature: Literal["auto"] | Curvature,
        solver: Solver,
        warm_start: bool,
        precision: CurvaturePrecision,
        every_n_batches: int,
        state: dict[str, Any],
    ) -> None:
        self._trainer, self._module = trainer, module
        self.is_tried = False
        first_order = curvature == "auto" and isinstance(solver, SAMA)
        self.curvature = "finite_difference" if first_order else curvature
        self._solver = solver
        self._warm_start = warm_start
        self._hyperparameters = list(module.hyperparameters())
        ranks = self.ranks = Ranks(trainer)
        ranks.broadcast(self._hyperparameters)  # not every strategy broadcasts frozen parameters
        self._optimizer = HyperOptimizer(module, max(1.0, solver.horizon / every_n_batches))
        self._losses = ModuleLosses(trainer, module, ranks, precision)
        if state:
            self._optimizer.load_state_dict(state["optimizer"])
        else:
            # torch's initial seed is the user's, if the user set one, and reading it draws no random number
            seed = ranks.broadcast_int(torch.initial_seed() % 2**31)
            loss_scale = first_loss_scale(trainer, precision)
            state = {"steps": 0, "seed": seed, "consumed": 0, "x0": None, "loss_scale": loss_scale}
            state |= {"x0_names": [], "outer_losses": [], "curvature": self.curvature, "difference_factor": None}
            state |= {"evidence": {}}
        self.steps, self._seed, self._loss_scale = state["steps"], state["seed"], state["loss_scale"]
        self._x0: Tensor | None = None if state["x0"] is None else state["x0"].to(module.device)
        self._x0_names: list[str] = state["x0_names"]  # of the weights that x0 belongs to
        self._moving: list[str] = []
        self._losses.difference_factor = state["difference_factor"]
        self._outer_level = OuterLevel(state["outer_losses"])
        self.curvature = state["curvature"]
        self.evidence = Evidence(state["evidence"])
        self.outer_data = OuterData(
            source, module.device, seed=self._seed, consumed=state["consumed"], rank=ranks.rank, world_size=ranks.count
        )

    def dry_run(self, batch: Any) -> None:
        """Evaluates everything once to find faults before training, and chooses the curvature if it is "auto".

        Raises:
            ValueError: If a loss is not finite, or a hyperparameter has no influence.
            NoLossError: If the inner loss skips this batch.
        """
        outer_batch = self._prepared(self.outer_data.peek())
        # a rate may be zero at the beginning only
        self._moving = self._names_of_moving(at_any_rate=True)
        with self._session(), differentiable(self._hyperparameters):
            outer = OuterGradient.of(self._losses.outer(outer_batch).over(self._weights), self._hyperparameters)
            if not bool(outer.value.isfinite()):
                value = float(outer.value)
                raise ValueError(f"outer_loss is {value} on the first batch; check the data and the initial weights")
            loss = self._losses.inner(batch).over(self._weights)
            operator, self.curvature = trusted_operator(
                self._losses, loss, self.curvature, "IFTHypergradient", self._hyperparameters
            )
            self._outer_level.begin(min(abs(float(operator.loss)), abs(float(outer.value))))
            mixed = operator.mixed_product(outer.v, self._hyperparameters)
            if isinstance(operator, FiniteDifferenceOperator) and self._losses.difference_factor is None:
                self._losses.difference_factor = operator.factor
        pairs = zip(outer.direct, mixed, strict=True)
        self._check_influence({index for index, pair in enumerate(pairs) if pair == (None, None)})
        paths = [path for path, _ in self._module.named_hyperparameters()]
        has_effect = [direct is not None and bool(direct.any()) for direct in outer.direct]
        warn_of_direct_effects(self._module, list(compress(paths, has_effect)))
        self.is_tried = True

    def compute(self, batch: Any, *, diagnosed: bool) -> tuple[Hypergradient, str]:
        """Returns the hypergradient for a training batch and the next outer batch, and why it should not be used.

        Raises:
            NoLossError: If there is no inner loss on this batch, or on none so far; nothing is counted or used up.
        """
        outer_batch = self._next_outer_batch()
        solver = self._solver_for_moving_weights()
        with self._session(), self._counting():
            result, scale = self._scaled_hypergradient(batch, outer_batch, solver, diagnosed=diagnosed)
            if result.status is Status.NONFINITE:
                return result, ""
            self._loss_scale = scale
            doubt = self._outer_level.doubt(float(result.outer_loss), partial(self._by_batch_statistics, outer_batch))
        if self._warm_start and not doubt:
            self._remember(result.solution)
        return result, doubt

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Counts a hyper step and uses up an outer batch, also if memory runs out, unless there is no inner loss."""
        counts = True
        try:
            yield
        except NoLossError:
            counts = False
            raise
        finally:
            if counts:
                self.steps += 1
                self.outer_data.next()

    def preview(self, batch: Any) -> Hypergradient:
        """Returns the hypergradient for a training batch and the next outer batch, and changes no state."""
        outer_batch = self._next_outer_batch()
        solver = self._solver_for_moving_weights()
        with self._session():
            return self._scaled_hypergradient(batch, outer_batch, solver, diagnosed=False)[0]

    def apply(self, result: Hypergradient) -> None:
        """Makes one step of the hyper-optimizer, and warns of the first that was far too long."""
        loss = float(result.outer_loss)
        before = [hyperparameter.detach().clone() for hyperparameter in self._hyperparameters]
        excess = self._optimizer.step(result.gradients, loss)
        if excess and self.replaced == 1:
            warn_of_long_step(self.steps, excess)
        units, batch = self._optimizer.units, self.outer_data.consumed - 1
        self.evidence.add(result.gradients, before, self._hyperparameters, units, loss, batch)
        if self.evidence.steps == 1:
            paths = [path for path, _ in self._module.named_hyperparameters()]
            warn_of_equal_hypergradients(compress(paths, self.evidence.reach.alike))

    @property
    def replaced(self) -> int:
        """Number of steps of the hyper-optimizer that were far too long."""
        return self._optimizer.replaced

    def mean_loss(self, batches: Iterable[Any]) -> float:
        """Returns the mean outer loss of batches, as many in each process."""
        losses = []
        for batch in batches:
            with self._session():
                losses.append(float(self._losses.outer(self._prepared(batch)).value()))
        return fmean(losses)

    def outer_batches(self, source: Iterable[Any], numbers: Collection[int]) -> Iterator[Any]:
        """Yields some of the outer batches that hyper steps have taken, by number, from the loader that they used."""
        ranks = self.ranks
        data = OuterData(source, self._module.device, seed=self._seed, rank=ranks.rank, world_size=ranks.count)
        try:
            for number in range(max(numbers) + 1):
                batch = data.next()
                if number in numbers:
                    yield batch
        finally:
            data.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "steps": self.steps,
            "seed": self._seed,
            "consumed": self.outer_data.consumed,
            "x0": self._x0,
            "x0_names": self._x0_names,
            "outer_losses": self._outer_level.accepted,
            "curvature": self.curvature,
            "loss_scale": self._loss_scale,
            "difference_factor": self._losses.difference_factor,
            "evidence": self.evidence.state_dict(),
        }

    def _names_of_moving(self, *, at_any_rate: bool = False) -> list[str]:
        weights = dict(self._module.named_inner_parameters())
        return list(compress(weights, moving(self._trainer.optimizers, weights.values(), at_any_rate=at_any_rate)))

    @property
    def _weights(self) -> list[Tensor]:
        """The weights that training moves, chosen by name: a session exchanges sharded ones for full copies."""
        weights = dict(self._module.named_inner_parameters())
        return [weights[name] for name in self._moving]

    def _solver_for_moving_weights(self) -> Solver:
        """Chooses the weights that move at present, and returns the solver with the update rule of their optimizer."""
        self._moving = self._names_of_moving()
        return self._solver.with_optimizer(UpdateRule.of(self._trainer.optimizers, self._weights))

    def _scaled_hypergradient(
        self, batch: Any, outer_batch: Any, solver: Solver, *, diagnosed: bool
    ) -> tuple[Hypergradient, float]:
        """Returns the hypergradient at the largest loss scale without overflow, and that scale."""
        for scale in loss_scales(self._loss_scale):
            result = self._hypergradient(batch, outer_batch, solver, scale, diagnosed=diagnosed)
            if result.status is not Status.NONFINITE:
                break
        return result, scale

    def _hypergradient(
        self, batch: Any, outer_batch: Any, solver: Solver, scale: float, *, diagnosed: bool
    ) -> Hypergradient:
        assert self.curvature != "auto", "dry_run() comes first"
        weights = self._weights
        return implicit_hypergradient(
            self._losses.inner(batch, scale=scale).over(weights),
            self._losses.outer(outer_batch, scale=scale).over(weights),
            weights,
            self._hyperparameters,
            curvature=self.curvature,
            solver=solver,
            x0=self._x0 if self._x0_names == self._moving else None,  # else it belongs to other weights
            allow_unused=True,
            diagnosed=diagnosed,
        )

    def _by_batch_statistics(self, outer_batch: Any) -> float:
        """Returns the outer loss by the statistics of its batch; NaN where BatchNorm refuses a single example."""
        try:
            return float(self._losses.outer_by_batch_statistics(outer_batch).value())
        except ValueError:
            if self.ranks.count > 1:  # the others wait for this process
                raise
            return math.nan

    def _remember(self, solution: SolveResult) -> None:
        """Keeps the solution as the first iterate of the next solve."""
        if solution.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED):
            self._x0 = None  # the estimate may have grown along negative curvature
        elif solution.status is not Status.NONFINITE and (solution.products or solution.extra_products):
            # after NaN, or without a product (flat outer loss), the earlier one stays
            self._x0, self._x0_names = solution.next_start, self._moving

    def _session(self) -> AbstractContextManager[None]:
        return self._losses.session(self.curvature, seed=self._seed, step=self.steps)

    def _next_outer_batch(self) -> Any:
        if not self.is_tried:
            raise NoLossError("no batch has had a loss yet")
        return self._prepared(self.outer_data.peek())

    def _prepared(self, batch: Any) -> Any:
        return prepared(self._trainer, self._module, batch, seed=self._seed, step=self.steps)

    def _check_influence(self, unused: set[int]) -> None:
        """Raises ValueError unless each hyperparameter, or some tensor of a registered module, has an influence."""
        names = [path.split(".")[0] for path, _ in self._module.named_hyperparameters()]
        used = {name for index, name in enumerate(names) if index not in unused}
        for name in names:
            if name not in used:
                raise ValueError(Cause.NO_INFLUENCE.describe(name=f"hyperparameter {name!r}"))

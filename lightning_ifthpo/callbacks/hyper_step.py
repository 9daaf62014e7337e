"""The hyper steps of one fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import differentiable
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature.kinds import Curvature
from lightning_ifthpo.hypergradients import Hypergradient, implicit_hypergradient
from lightning_ifthpo.optimizers import UpdateRule
from lightning_ifthpo.runtime.batches import prepared
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import ModuleLosses, trainable
from lightning_ifthpo.runtime.outer_data import OuterData
from lightning_ifthpo.runtime.precision import CurvaturePrecision, first_loss_scale, loss_scales
from lightning_ifthpo.solvers import Identity, Solver, SolveResult, Status
from lightning_ifthpo.solvers.causes import Cause


class HyperStepper:
    """Computes and applies hypergradients of one module in one fit.

    Args:
        trainer: The Trainer, with optimizers and data set up.
        module: A LightningModule with the bilevel mixin.
        source: Loader of outer batches.
        curvature, solver, warm_start, precision: As in `IFTHypergradient`.
        state: A result of `state_dict`; empty for a new start.
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
        state: dict[str, Any],
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._curvature = curvature
        self._solver = solver
        self._warm_start = warm_start
        self._hyperparameters = list(module.hyperparameters())
        self.optimizer: torch.optim.Optimizer = module.configure_hyper_optimizer()
        ranks = self.ranks = Ranks(trainer)
        ranks.broadcast(self._hyperparameters)  # not every strategy broadcasts frozen parameters
        self._losses = ModuleLosses(trainer, module, ranks, precision)
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            # torch's initial seed is the user's, if the user set one, and reading it draws no random number
            seed = ranks.broadcast_int(torch.initial_seed() % 2**31)
            loss_scale = first_loss_scale(trainer, precision)
            state = {"steps": 0, "seed": seed, "consumed": 0, "x0": None, "loss_scale": loss_scale}
        self.steps, self._seed, self._loss_scale = state["steps"], state["seed"], state["loss_scale"]
        self._x0: Tensor | None = None if state["x0"] is None else state["x0"].to(module.device)
        self.outer_data = OuterData(
            source, module.device, seed=self._seed, consumed=state["consumed"], rank=ranks.rank, world_size=ranks.count
        )

    def dry_run(self, batch: Any) -> None:
        """Evaluates everything once to find faults before training, and chooses the curvature if it is "auto".

        Raises:
            ValueError: If a loss is not finite, or a hyperparameter has no influence.
        """
        outer_batch = self._prepared(self.outer_data.peek())
        with self._session():
            with differentiable(self._hyperparameters):
                marks_outputs = _check_finite(self._losses.inner(batch))
                _check_finite(self._losses.outer(outer_batch))
            if self._curvature == "auto":
                self._curvature = "gauss_newton" if marks_outputs else "hessian"
            result = self._hypergradient(batch, outer_batch, Identity(), self._loss_scale, diagnosed=False)
        self._check_influence(set(result.unused))

    def compute(self, batch: Any, *, diagnosed: bool) -> Hypergradient:
        """Returns the hypergradient for a training batch and the next outer batch."""
        outer_batch = self._prepared(self.outer_data.next())
        weights = trainable(self._module)
        if self._x0 is not None and self._x0.numel() != sum(weight.numel() for weight in weights):
            self._x0 = None  # weights were frozen or unfrozen
        solver = self._solver.with_optimizer(UpdateRule.of(self._trainer.optimizers, weights))
        with self._session():
            self.steps += 1  # counts also if memory runs out
            for scale in loss_scales(self._loss_scale):
                result = self._hypergradient(batch, outer_batch, solver, scale, diagnosed=diagnosed)
                if result.status is not Status.NONFINITE:
                    self._loss_scale = scale
                    break
        if self._warm_start:
            self._remember(result.solution)
        return result

    def apply(self, result: Hypergradient) -> None:
        """Makes one step of the hyper-optimizer."""
        for hyperparameter, gradient in zip(self._hyperparameters, result.gradients, strict=True):
            hyperparameter.grad = gradient
        self.optimizer.step()
        for hyperparameter in self._hyperparameters:
            hyperparameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seed": self._seed,
            "consumed": self.outer_data.consumed,
            "x0": self._x0,
            "loss_scale": self._loss_scale,
        }

    def _hypergradient(
        self, batch: Any, outer_batch: Any, solver: Solver, scale: float, *, diagnosed: bool
    ) -> Hypergradient:
        assert self._curvature != "auto", "dry_run() comes first"
        return implicit_hypergradient(
            self._losses.inner(batch, scale=scale),
            self._losses.outer(outer_batch, scale=scale),
            trainable(self._module),
            self._hyperparameters,
            curvature=self._curvature,
            solver=solver,
            x0=self._x0,
            allow_unused=True,
            diagnosed=diagnosed,
        )

    def _remember(self, solution: SolveResult) -> None:
        """Keeps the solution as the first iterate of the next solve."""
        if solution.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED):
            self._x0 = None  # the estimate may have grown along negative curvature
        elif solution.status is not Status.NONFINITE and (solution.products or solution.extra_products):
            self._x0 = solution.x  # after NaN, or without a product (flat outer loss), the earlier one stays

    def _session(self) -> AbstractContextManager[None]:
        return self._losses.session(self._curvature, seed=self._seed, step=self.steps)

    def _prepared(self, batch: Any) -> Any:
        return prepared(self._trainer, self._module, batch, seed=self._seed, step=self.steps)

    def _check_influence(self, unused: set[int]) -> None:
        """Raises ValueError unless each hyperparameter, or some tensor of a registered module, has an influence."""
        names = [path.split(".")[0] for path, _ in self._module.named_hyperparameters()]
        used = {name for index, name in enumerate(names) if index not in unused}
        for name in names:
            if name not in used:
                raise ValueError(Cause.NO_INFLUENCE.describe(name=f"hyperparameter {name!r}"))


def _check_finite(loss: Loss) -> bool:
    """Raises ValueError unless a loss is finite, in all processes alike; returns whether it marks outputs."""
    own, outputs = loss.evaluate()
    value = float(loss.combine(own))
    if not math.isfinite(value):
        raise ValueError(f"{loss.name} is {value} on the first batch; check the data and the initial weights")
    return bool(outputs)

"""The hyper steps of one fit: hypergradients of its module, the hyper-optimizer, and what resuming needs."""

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
from lightning_ifthpo.runtime.precision import (
    FIRST_LOSS_SCALE,
    CurvaturePrecision,
    loss_scales,
    passes_through_float16,
)
from lightning_ifthpo.solvers import Identity, Solver, SolveResult, Status


class HyperStepper:
    """Computes and applies hypergradients of one module in one fit.

    Args:
        trainer: The Trainer, with optimizers and data set up.
        module: A LightningModule with the bilevel mixin.
        source: Loader of outer batches.
        curvature: As in `IFTHypergradient`.
        solver: As in `IFTHypergradient`.
        warm_start: As in `IFTHypergradient`.
        precision: As in `IFTHypergradient`.
        state: What `state_dict` returned, to resume; empty for a new start.
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
        self.steps = 0
        self.ranks = Ranks(trainer)
        self.ranks.broadcast(self._hyperparameters)  # not every strategy does so
        self._losses = ModuleLosses(trainer, module, self.ranks, precision)
        # torch's initial seed is the user's, if the user set one, and reading it draws no random number
        self._seed = self.ranks.broadcast_int(torch.initial_seed() % 2**31)
        self._x0: Tensor | None = None
        self._loss_scale = FIRST_LOSS_SCALE if passes_through_float16(trainer, precision) else 1.0
        consumed = 0
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self._seed, consumed = state["steps"], state["seed"], state["consumed"]
            x0 = state["x0"]
            self._x0 = None if x0 is None else x0.to(module.device)
            self._loss_scale = state["loss_scale"]
        self._outer_data = OuterData(
            source,
            module.device,
            seed=self._seed,
            consumed=consumed,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
        )

    def dry_run(self, batch: Any) -> None:
        """Evaluates everything once, to find faults before training, and which curvature "auto" stands for.

        Raises:
            ValueError: If a loss is not finite, or a hyperparameter has no influence.
            Exception: Whatever the user's losses raise.
        """
        outer_batch = self._prepared(self._outer_data.peek())
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
        outer_batch = self._prepared(self._outer_data.next())
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
        """Lets the hyper-optimizer make one step."""
        for hyperparameter, gradient in zip(self._hyperparameters, result.gradients, strict=True):
            hyperparameter.grad = gradient
        self.optimizer.step()
        for hyperparameter in self._hyperparameters:
            hyperparameter.grad = None

    def close(self) -> None:
        """Ends the worker processes of the outer data."""
        self._outer_data.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as tensors and plain numbers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seed": self._seed,
            "consumed": self._outer_data.consumed,
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
            self._x0 = None  # it has grown for a wrong reason
        elif solution.status is not Status.NONFINITE and (solution.products or solution.extra_products):
            self._x0 = solution.x  # a bad batch, or a flat outer loss, says nothing about the estimate

    def _session(self) -> AbstractContextManager[None]:
        return self._losses.session(self._curvature, seed=self._seed, step=self.steps)

    def _prepared(self, batch: Any) -> Any:
        return prepared(self._trainer, self._module, batch, seed=self._seed, step=self.steps)

    def _check_influence(self, unused: set[int]) -> None:
        """Raises unless each registered hyperparameter, a module as a whole, has an influence."""
        groups: dict[str, list[bool]] = {}
        for index, (path, _) in enumerate(self._module.named_hyperparameters()):
            groups.setdefault(path.split(".")[0], []).append(index in unused)
        for name, idle in groups.items():
            if all(idle):
                raise ValueError(
                    f"hyperparameter {name!r} does not influence the gradient of the inner loss, nor the outer loss, "
                    "so that implicit differentiation cannot tune it. Use it in inner_loss; for a learning rate, "
                    "ExactGeN or a sweep is the tool"
                )


def _check_finite(loss: Loss) -> bool:
    """Raises unless a loss is finite, in all processes alike; returns whether it marks outputs."""
    own, outputs = loss.evaluate()
    value = float(loss.combine(own))
    if not math.isfinite(value):
        raise ValueError(f"{loss.name} is {value} on the first batch; look at the data and the initial weights")
    return bool(outputs)

"""One hyper step after another: what `IFTHypergradient` does when it fires, and what it must remember."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from lightning_ifthpo.core.autodiff import differentiable
from lightning_ifthpo.core.loss import check_loss
from lightning_ifthpo.curvature import Curvature
from lightning_ifthpo.curvature.outputs import recording_outputs
from lightning_ifthpo.hypergradients import Hypergradient, implicit_hypergradient
from lightning_ifthpo.optimizers.update_rule import UpdateRule
from lightning_ifthpo.runtime.batches import prepared
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.losses import CurvaturePrecision, Losses, evaluating
from lightning_ifthpo.runtime.outer_data import OuterData
from lightning_ifthpo.runtime.precision import LARGEST, LossScale, passes_through_float16
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
        self._precision = precision
        self._hyperparameters = list(module.hyperparameters())
        self.optimizer: torch.optim.Optimizer = module.configure_hyper_optimizer()
        self.steps = 0
        self.ranks = Ranks(trainer)
        self.ranks.unify(self._hyperparameters)  # not every strategy does so
        # torch's seed is the user's where there is one, and asking for it draws nothing
        self._seed = self.ranks.agreed_number(torch.initial_seed() % 2**31)
        self._estimate: Tensor | None = None
        self._scale = LossScale(LARGEST if passes_through_float16(trainer, precision) else 1.0)
        consumed = 0
        if state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self._seed, consumed = state["steps"], state["seed"], state["consumed"]
            estimate = state["estimate"]
            self._estimate = None if estimate is None else estimate.to(module.device)
            self._scale = LossScale(state["loss_scale"])
        self._outer_data = OuterData(
            source,
            module.device,
            seed=self._seed,
            consumed=consumed,
            rank=self.ranks.rank,
            world_size=self.ranks.count,
        )

    def rehearse(self, batch: Any) -> None:
        """Evaluates everything once, to find out whether it works and which curvature "auto" stands for.

        Raises:
            ValueError: If a loss is not finite, or a hyperparameter has no influence.
            Exception: Whatever the user's losses raise.
        """
        outer_batch = self._prepared(self._outer_data.peek())
        with self._evaluation() as losses:
            with differentiable(self._hyperparameters):
                with recording_outputs() as outputs:
                    self._check_value("inner_loss", losses.inner(batch)())
                self._check_value("outer_loss", losses.outer(outer_batch)())
            if self._curvature == "auto":
                self._curvature = "gauss_newton" if outputs else "hessian"
            result = self._hypergradient(losses, batch, outer_batch, Identity(), self._scale, diagnosed=False)
        self._check_influence(set(result.unused))

    def compute(self, batch: Any, *, diagnosed: bool) -> Hypergradient:
        """Returns the hypergradient for a training batch and the next outer batch."""
        outer_batch = self._prepared(self._outer_data.next())
        parameters = self._parameters()
        if self._estimate is not None and self._estimate.numel() != sum(p.numel() for p in parameters):
            self._estimate = None  # weights were frozen or unfrozen
        rule = UpdateRule.of(self._trainer.optimizers, parameters)
        with self._evaluation() as losses:
            self.steps += 1  # counts also where memory does not suffice
            solver = self._solver.bound_to(rule)
            for scale in self._scale.smaller():
                result = self._hypergradient(losses, batch, outer_batch, solver, scale, diagnosed=diagnosed)
                if result.status is not Status.NONFINITE:
                    self._scale = scale
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
        """Returns all that resuming needs, as tensors and plain numbers."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seed": self._seed,
            "consumed": self._outer_data.consumed,
            "estimate": self._estimate,
            "loss_scale": self._scale.factor,
        }

    def _hypergradient(
        self, losses: Losses, batch: Any, outer_batch: Any, solver: Solver, scale: LossScale, *, diagnosed: bool
    ) -> Hypergradient:
        assert self._curvature != "auto", "rehearse() comes first"
        return implicit_hypergradient(
            scale.scaled(self.ranks.share(losses.inner(batch), batch)),
            scale.scaled(self.ranks.share(losses.outer(outer_batch), outer_batch)),
            self._parameters(),
            self._hyperparameters,
            curvature=self._curvature,
            solver=solver,
            x0=self._estimate,
            allow_unused=True,
            diagnosed=diagnosed,
            all_reduce=scale.divided(self.ranks.all_reduce),
        )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._module.inner_parameters() if parameter.requires_grad]

    def _remember(self, solution: SolveResult) -> None:
        """Keeps what the next solve starts from."""
        if solution.status in (Status.NEGATIVE_CURVATURE, Status.DIVERGED):
            self._estimate = None  # it grew where it should not have
        elif solution.status is not Status.NONFINITE and (solution.products or solution.checks):
            self._estimate = solution.x  # a bad batch, or a flat outer loss, says nothing about the estimate

    def _evaluation(self) -> AbstractContextManager[Losses]:
        return evaluating(
            self._trainer, self._module, self._seed + self.steps, self._curvature, precision=self._precision
        )

    def _prepared(self, batch: Any) -> Any:
        return prepared(self._trainer, self._module, batch, self._seed + self.steps)

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

    def _check_value(self, name: str, value: Any) -> None:
        """Raises unless a loss can be differentiated and is finite, in all processes alike."""
        check_loss(value, name)
        total = self.ranks.total(value)
        if not bool(torch.isfinite(total)):
            raise ValueError(f"{name} is {float(total)} on the first batch; look at the data and the initial weights")

"""Why a hypergradient is missing or wrong, in words, numbers and remedies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp
from lightning_ifthpo.core.consistency import follows_its_gradient
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.vectors import length
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.hypergradients.result import Hypergradient, OuterGradient
from lightning_ifthpo.solvers import Amortized, Identity, Neumann, Solver, SolveResult, Status
from lightning_ifthpo.solvers.causes import Cause
from lightning_ifthpo.solvers.diagnosis import diagnose, settings_of
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class Computation:
    """What a hypergradient was computed from.

    Attributes:
        inner: The inner loss.
        outer: The outer loss and its gradients.
        hyperparameters: λ, which require a gradient.
        operator: The curvature A of the inner loss.
        solver: The solver of (A + δ) q = v.
        curvature: The name of the curvature.
    """

    inner: Loss
    outer: OuterGradient
    hyperparameters: Sequence[Tensor]
    operator: LossOperator
    solver: Solver
    curvature: str

    def diagnosis(self, result: Hypergradient) -> str:
        """Returns what is wrong with a result and what to do; "" if nothing is known to be wrong.

        Cost: two forward passes and a gradient in λ of the inner loss for a solve that succeeded, unless it is
        verified; else at most 62 products and a gradient.
        """
        solution = self._measured(result.solution)
        if result.status is Status.NONFINITE:
            found = self._not_finite(result)
        elif length(self.outer.v) == 0.0:
            found = self.unknown_weights() or Cause.ZERO_RIGHT_HAND_SIDE.describe()
        elif result.status.succeeded:
            found = self._unused(result) or self._not_its_gradient()
            found = found or self._not_at_minimum(result) or self._no_influence(result)
        else:
            found = self._no_curvature() or self.unknown_weights()
        if found or (result.status.succeeded and (solution.relative_residual or 0.0) <= 1.0):
            return found
        return diagnose(self._system, solution, self.outer.v, solver=self.solver, curvature=self.curvature)

    def _measured(self, solution: SolveResult) -> SolveResult:
        """Returns a solve with its residual; in a fit that costs too much, if the solver has not measured it."""
        if solution.relative_residual is not None or self.inner.is_verified:
            return solution
        return replace(solution, relative_residual=self._system.relative_residual(solution.x, self.outer.v))

    @property
    def _system(self) -> LinearSystem:
        return LinearSystem(self.operator) if self.solver.needs_optimizer else self.solver.system(self.operator)

    @property
    def _settings(self) -> set[str]:
        return settings_of(self._system, self.solver, self.curvature)

    def _not_finite(self, result: Hypergradient) -> str:
        """Returns the first term that is not finite, in the order in which they are computed; "" before the solve."""
        places: list[tuple[str, list[Tensor], str]] = [
            (
                "the weights",
                list(self.inner.parameters),
                "look for the first training loss that is not finite: training has lost the weights, by an example "
                "with NaN, or by a learning rate that is too high",
            ),
            ("the outer loss", [self.outer.value], "look at the outer batch"),
            ("the gradient of the outer loss", [self.outer.v, *result.direct], "look at the outer batch"),
            ("the inner loss", [self.operator.loss], "look at the training batch, the weights and hyperparameters"),
            ("the gradient of the inner loss", [self.operator.gradient], "look for a square root or a norm at zero"),
        ]
        if bool(torch.isfinite(self.operator.matvec(result.solution.x)).all()) and result.solution.x.any():
            mixed = "the mixed derivative of weights and hyperparameters"
            places.append((mixed, result.indirect, "look at the hyperparameters, such as the logarithm of a zero"))
        for where, tensors, advice in places:
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                return Cause.NOT_FINITE.describe(where=where, advice=advice)
        return ""

    def _unused(self, result: Hypergradient) -> str:
        """Returns that a hyperparameter enters neither loss. In a fit the dry run tells, and batches use some alone."""
        if not result.unused or (self.solver.rule is not None and len(result.unused) < len(result.direct)):
            return ""
        return Cause.NO_INFLUENCE.describe(name=f"hyperparameter {result.unused[0]}")

    def _no_influence(self, result: Hypergradient) -> str:
        """Returns that all terms of the hypergradient are exactly zero."""
        if any(bool(gradient.any()) for gradient in result.gradients) or not bool(result.solution.x.any()):
            return ""
        return Cause.NO_INFLUENCE.describe(name="any hyperparameter, at its present value,")

    def _not_at_minimum(self, result: Hypergradient) -> str:
        """Returns that a Newton step to the minimum of the inner loss would change the outer loss much.

        With q = A⁻¹v it changes the outer loss by −gᵀq to first order. Weights in a fit are never at a minimum, and
        solvers for them do not assume it; nor do truncated series, and an approximate curvature knows no minimum.
        """
        truncated = isinstance(self.solver, Amortized | Identity | Neumann) or (result.relative_residual or 0.0) > 0.1
        approximate = self.curvature in ("gradient_outer_product", "kfac")
        if self.solver.rule is not None or truncated or approximate:
            return ""
        gradient = self.operator.gradient
        change, loss = abs(float(gradient @ result.solution.x)), abs(float(self.outer.value))
        # After 2,000 steps of Adam, 16 models of four data sets (linear and with a hidden layer, decay 1e-3 and 1e-1)
        # had at most 0.045; weights of ten times the decay or of another batch had more than 0.05 in 28 cases of 32.
        if not change > 0.05 * loss:
            return ""
        numbers = (
            f"‖∇L‖ = {float(torch.linalg.vector_norm(gradient)):.2g}, and a Newton step to the minimum would change "
            f"the outer loss of {loss:.3g} by {change:.2g}"
        )
        return Cause.NOT_AT_MINIMUM.describe(self._settings, numbers=numbers)

    def _not_its_gradient(self) -> str:
        """Returns that the inner loss does not follow its gradient; in a fit that was checked on the first batch."""
        if self.inner.is_verified:
            return ""
        if not follows_its_gradient(self.inner, self.operator.gradient, self.operator.loss):
            return Cause.NOT_ITS_GRADIENT.describe(what="the weights")
        if not follows_its_gradient(self.inner.over(self.hyperparameters), here=self.operator.loss):
            return Cause.NOT_ITS_GRADIENT.describe(what="the hyperparameters")
        return ""

    def _no_curvature(self) -> str:
        """Returns that the inner loss is linear in the weights, and so has no minimum. One product."""
        ones = torch.ones_like(self.outer.v)
        gradient = torch.linalg.vector_norm(self.operator.gradient)
        if bool(self.operator.matvec(ones).any()) or bool(self.operator.matvec(self.outer.v).any()) or not gradient > 0:
            return ""
        numbers = f"‖∇L‖ = {float(gradient):.2g}, and no curvature: it has no minimum"
        return Cause.NOT_AT_MINIMUM.describe(self._settings, numbers=numbers)

    def unknown_weights(self) -> str:
        """Returns that the inner loss does not depend on weights that have a tenth of the right-hand side, or on any.

        One gradient.
        """
        own, _ = self.inner.evaluate()
        known = [gradient is not None for gradient in vjp([own], self.inner.parameters)]
        parts = self.inner.space.split(self.outer.v)
        unknown = [index for index, seen in enumerate(known) if not seen]
        lengths = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        damped = bool((torch.as_tensor(self._system.damping) > 0.0).all())
        if len(unknown) == len(known):
            name = "any of the weights"
        elif unknown and not damped and bool(lengths[unknown].norm() > 0.1 * lengths.norm()):
            shape = tuple(parts[unknown[0]].shape)
            name = (
                f"{len(unknown)} of the {len(known)} tensors of weights, such as number {unknown[0]} of shape {shape}"
            )
        else:
            return ""
        return Cause.UNKNOWN_WEIGHTS.describe(self._settings, name=name)

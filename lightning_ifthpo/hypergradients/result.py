"""The terms of a hypergradient, with the residual and status of its linear solve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from lightning_ifthpo.core.autodiff import vjp, zeros_for_none
from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.core.vectors import largest
from lightning_ifthpo.solvers import SolveResult, Status
from lightning_ifthpo.solvers.causes import Cause


@dataclass(frozen=True)
class Hypergradient:
    """dL_V/dλ with the residual and status of its linear solve.

    Attributes:
        direct: ∂L_V/∂λ, shaped like the hyperparameters.
        indirect: −(∂²L_T/∂w∂λᵀ)ᵀ q with q ≈ H⁻¹ ∂L_V/∂w, shaped like the hyperparameters.
        outer_loss: L_V, a scalar.
        solution: The linear solve; `solution.x` is q, [n].
        diagnosis: Why the solve failed, or what makes its result meaningless, and what to do; empty if all is well.
        unused: Indices of hyperparameters that influence neither loss; their gradients are zero.
    """

    direct: list[Tensor]
    indirect: list[Tensor]
    outer_loss: Tensor
    solution: SolveResult
    diagnosis: str = ""
    unused: tuple[int, ...] = ()

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Direct plus indirect term, shaped like the hyperparameters."""
        return [direct + indirect for direct, indirect in zip(self.direct, self.indirect, strict=True)]

    @property
    def relative_residual(self) -> float | None:
        """‖Hq − v‖ / ‖v‖ of the linear solve; None if no product has measured it."""
        return self.solution.relative_residual

    @property
    def products(self) -> int:
        """Curvature products that led to the solution."""
        return self.solution.products

    @property
    def status(self) -> Status:
        """How the linear solve ended; NONFINITE if a loss or a gradient is NaN or infinite."""
        return self.solution.status


@dataclass(frozen=True)
class OuterGradient:
    """The outer loss and its gradients, detached.

    Attributes:
        value: L_V, a scalar.
        v: ∂L_V/∂w, [n].
        direct: ∂L_V/∂λ, shaped like the hyperparameters; `None` where L_V does not depend on one.
    """

    value: Tensor
    v: Tensor
    direct: list[Tensor | None]

    @classmethod
    def of(cls, loss: Loss, hyperparameters: Sequence[Tensor]) -> OuterGradient:
        """Returns a loss and its gradients; one gradient, and one collective over several processes."""
        own, _ = loss.evaluate()
        gradients = vjp([own], [*loss.parameters, *hyperparameters])
        flat = loss.space.flatten(gradients[: len(loss.parameters)])
        parts = [own.detach(), flat, *gradients[len(loss.parameters) :]]
        value, v, *direct = loss.combine_list(parts, [own, flat, *hyperparameters])
        assert value is not None
        assert v is not None
        return cls(value, v, direct)


def combine(
    outer: OuterGradient,
    hyperparameters: Sequence[Tensor],
    mixed: Sequence[Tensor | None],
    inner_losses: Sequence[Tensor],
    solution: SolveResult,
    allow_unused: bool = False,
) -> Hypergradient:
    """Returns the hypergradient from its terms; a NaN or an infinity makes the status NONFINITE.

    Raises:
        ValueError: If a hyperparameter influences neither loss, unless `allow_unused`.
    """
    pairs = enumerate(zip(outer.direct, mixed, strict=True))
    unused = tuple(index for index, (direct, m) in pairs if direct is None and m is None)
    if unused and not allow_unused:
        name = f"hyperparameter {unused[0]}, of shape {tuple(hyperparameters[unused[0]].shape)},"
        raise ValueError(f"{Cause.NO_INFLUENCE.describe(name=name)}. Pass allow_unused=True to get zeros")
    direct = zeros_for_none(outer.direct, hyperparameters)
    indirect = zeros_for_none([None if m is None else -m for m in mixed], hyperparameters)
    if not all(math.isfinite(largest(tensor)) for tensor in [outer.value, *inner_losses, *direct, *indirect]):
        solution = replace(solution, status=Status.NONFINITE)
    return Hypergradient(direct, indirect, outer.value, solution, unused=unused)

"""The first-order hyper step for large models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_ifthpo.solvers.base import Solver, SolveResult, Status
from lightning_ifthpo.solvers.system import LinearSystem


@dataclass(frozen=True)
class SAMA(Solver):
    """A⁻¹ ≈ S, the long-run step of the inner optimizer: learning rate over 1 − β, times the preconditioner.

    The hypergradient looks one training step ahead, as with `Identity`, along the step that the optimizer would really
    make. With curvature="finite_difference", which `IFTHypergradient` chooses for this solver by itself, it needs no
    second derivative: the mixed product is a difference of two gradients in the hyperparameters. After Choe et al.
    2023, with the preconditioner held constant.

    Cost: no product. A hyper step costs one outer gradient, and two inner ones in the hyperparameters alone, which
    are forward passes where these enter behind the model.

    >>> from lightning_ifthpo.curvature import MatrixOperator
    >>> from lightning_ifthpo.optimizers import UpdateRule
    >>> solver = SAMA().with_optimizer(UpdateRule(step_size=torch.tensor([0.5, 0.1])))
    >>> solver.solve(MatrixOperator(torch.eye(2)), torch.tensor([1.0, 2.0])).x
    tensor([0.5000, 0.2000])
    """

    _scales_by_itself = True

    def _solve(self, system: LinearSystem, b: Tensor, x0: Tensor | None) -> SolveResult:
        if self.rule is None:
            raise ValueError(
                "SAMA() needs the inner optimizer: use it inside IFTHypergradient, or call "
                "solver.with_optimizer(UpdateRule.of(optimizers, parameters))"
            )
        step = torch.as_tensor(self.rule.step_size, dtype=b.dtype, device=b.device)
        return SolveResult(step * b, None, products=0, status=Status.COMPLETE)

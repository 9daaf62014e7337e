"""A linear hypernetwork, which learns how the best weights depend on the hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import differentiable, vjp
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.hypergradients.result import Hypergradient, OuterGradient, combine
from lightning_ifthpo.solvers import SolveResult, Status


class LinearBestResponse:
    """ŵ(λ + ε) = w + Jε near the present weights and hyperparameters, with J trained by gradient descent.

    Random ε perturbs the hyperparameters, Jε perturbs the weights, and J learns to lower the inner loss there, as in a
    self-tuning network with a linear hypernetwork (MacKay et al. 2019; Lorraine and Duvenaud 2018). At a minimum in w,
    J converges to the Jacobian of the best response, −H⁻¹ ∂²L_T/∂w∂λᵀ, without second derivatives. J has n × m entries,
    so that the method suits few hyperparameters.

    Args:
        inner_loss: L_T, a callable without arguments that returns a scalar tensor, or (loss, outputs).
        parameters: w, together [n].
        hyperparameters: λ, real leaf tensors, together [m].
        lr: Learning rate of J, in parameter² / loss; stable below 2/λ_max of the inner loss.
        scale: Standard deviation of ε, in units of the hyperparameters: small, because ŵ is linear, but large compared
            with rounding.
        generator: Draws ε.

    Attributes:
        jacobian: J, [n, m].

    Raises:
        ValueError: If lr or scale is not positive.

    >>> w = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    >>> decay = torch.tensor(1.0, dtype=torch.float64)
    >>> response = LinearBestResponse(lambda: ((w - 1) ** 2 + decay * w**2).sum() / 2, [w], [decay], lr=0.2)
    >>> for _ in range(100):
    ...     response.step()
    >>> response.jacobian.round(decimals=3)  # w*(λ) = 1/(1 + λ), whose derivative is −1/4
    tensor([[-0.2500]], dtype=torch.float64)
    """

    def __init__(
        self,
        inner_loss: LossFunction,
        parameters: Sequence[Tensor],
        hyperparameters: Sequence[Tensor],
        *,
        lr: float,
        scale: float = 1e-3,
        generator: torch.Generator | None = None,
    ) -> None:
        if not (lr > 0.0 and scale > 0.0):
            raise ValueError(f"expected lr > 0 and scale > 0, got {lr!r} and {scale!r}")
        self._inner_loss = inner_loss
        self._space, self._hyper_space = ParameterSpace(parameters), ParameterSpace(hyperparameters)
        self._lr, self._scale, self._generator = lr, scale, generator
        shape = (self._space.size, self._hyper_space.size)
        self.jacobian = torch.zeros(shape, dtype=self._space.dtype, device=self._space.device)

    def step(self) -> None:
        """Updates J by one pair of perturbations ±ε; weights and hyperparameters stay as they are. Two gradients."""
        space = self._hyper_space
        noise = torch.randn(space.size, dtype=space.dtype, device=space.device, generator=self._generator)
        response = self.jacobian @ (self._scale * noise)
        direction = [*self._space.split(response), *self._hyper_space.split(self._scale * noise)]
        loss = Loss(self._inner_loss, [*self._space.tensors, *self._hyper_space.tensors], name="the inner loss")
        with loss.along(direction) as at:
            ahead, behind = (self._space.flatten(vjp([at(sign)], self._space.tensors)) for sign in (1.0, -1.0))
        slope = (ahead - behind) / (2.0 * self._scale)  # (HJ + ∂²L/∂w∂λᵀ) ε
        self.jacobian -= self._lr * torch.outer(slope, noise) / (noise @ noise)

    def hypergradient(self, outer_loss: LossFunction) -> Hypergradient:
        """Returns dL_V/dλ = ∂L_V/∂λ + Jᵀ ∂L_V/∂w, with a NaN as residual, because no linear system is solved.

        Args:
            outer_loss: L_V, a callable without arguments that returns a scalar tensor.

        Cost: one gradient.
        """
        hyperparameters = self._hyper_space.tensors
        with differentiable(hyperparameters):
            outer = OuterGradient.of(as_loss(outer_loss, self._space.tensors, "the outer loss"), hyperparameters)
        indirect = self._hyper_space.split(-(self.jacobian.T @ outer.v))
        solution = SolveResult(torch.zeros_like(outer.v), torch.nan, 0, Status.COMPLETE)
        return combine(outer, hyperparameters, indirect, [], solution)

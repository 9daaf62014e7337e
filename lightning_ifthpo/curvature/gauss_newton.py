"""The generalized Gauss–Newton matrix: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_ifthpo.core.autodiff import add, tangent, tangents, vjp, zeros_for_none
from lightning_ifthpo.core.graph import check_differentiable
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.outputs import checked_outputs, cut_at


class GaussNewtonOperator(LossOperator):
    """G = [Jᵀ I] ∇²L [Jᵀ I]ᵀ for a loss L(z, w) of the model's outputs z and J = ∂z/∂w (Schraudolph 2002).

    For a loss of the outputs alone this is Jᵀ L_zz J. A term that depends on the parameters directly (a penalty) enters
    with its exact Hessian and its cross terms with the outputs. G is positive semi-definite where L is convex in (z, w)
    together, as for cross-entropy or squared error plus a convex penalty. G equals the Hessian where the model is
    linear or the residuals vanish.

    Cost: one forward pass and one differentiable gradient when made. A product by double vjp costs 1.2 gradients with
    linear layers, and 2 to 2.6 with convolutions, because torch's second derivative of a convolution also computes
    terms that are not needed.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several, or the loss
            alone if it calls `mark_outputs`; or a `Loss`.
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph, or no outputs are known.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> def loss():
    ...     z = w**2
    ...     return (z**2).sum() / 2, z
    >>> GaussNewtonOperator(loss, [w]).to_dense()  # J = diag(2w), L_zz = I
    tensor([[ 4.,  0.],
            [ 0., 16.]])
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        super().__init__(as_loss(loss, parameters))
        self._total, outputs = self._loss.evaluate()
        self._outputs = checked_outputs(outputs)
        parameters = self._loss.parameters
        self._output_gradient = vjp([self._total], self._outputs, create_graph=True)
        with cut_at(self._outputs):
            self._penalty_gradient = vjp([self._total], parameters, create_graph=True)
        # Jᵀu is linear in u, so that its own vjp with respect to u is Jv for any u. With u = ∂L/∂z, Jᵀu is also the
        # gradient of the loss. Views make the entries of u separate variables: one tensor may be the gradient of two
        # outputs (of z₁ + z₂), or one gradient may be computed from the other (of z₁ − z₂).
        slopes = zeros_for_none(self._output_gradient, self._outputs)
        self._u = [u.view_as(u) if u.requires_grad else u.detach().requires_grad_() for u in slopes]
        self._transposed_product = vjp(self._outputs, parameters, self._u, create_graph=True)
        if not self._loss.is_verified:
            gradients = [*self._output_gradient, *self._penalty_gradient, *self._transposed_product]
            check_differentiable(gradients, self._total, self._loss.name)

    def _own_loss(self) -> Tensor:
        return self._total

    def _own_gradient(self) -> Tensor:
        return self._loss.space.flatten(self._differentiable_gradient)

    def _own_product(self, v: Tensor) -> Tensor:
        outputs, space = self._outputs, self._loss.space
        vs = space.split(v)
        jv = zeros_for_none(vjp(self._transposed_product, self._u, vs), self._u)
        with cut_at(outputs):
            gradients = [*self._output_gradient, *self._penalty_gradient]
            curved = vjp(gradients, [*outputs, *space.tensors], [*jv, *vs])
        through_outputs, direct = curved[: len(outputs)], curved[len(outputs) :]
        used = [None if u is None else z for z, u in zip(outputs, through_outputs, strict=True)]
        return space.flatten(add(vjp(used, space.tensors, through_outputs), direct))

    def _own_mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        return vjp(self._differentiable_gradient, hyperparameters, self._loss.space.split(v))

    @property
    def _differentiable_gradient(self) -> list[Tensor | None]:
        return add(self._transposed_product, self._penalty_gradient)


def forward_slope_and_curvature(loss: Loss, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ∇L·v and vᵀGv for v: [n] of this process's share, scalars, by one forward pass in forward mode.

    Raises:
        RuntimeError: If an operation of the loss has no derivative in forward mode.
        TypeError, ValueError: As `GaussNewtonOperator`.
    """
    space = loss.space
    with tangents(space.tensors, space.split(v)):
        total, outputs = loss.evaluate()
        inputs = [*checked_outputs(outputs), *space.tensors]
        with cut_at(inputs[: -len(space.tensors)]):
            gradients = vjp([total], inputs)  # their tangents are ∇²L [Jv v]
        pairs = [(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=True) if gradient is not None]
        curvature = sum(((tangent(left) * tangent(right)).sum() for left, right in pairs), start=v.new_zeros(()))
        return tangent(total).reshape(()), curvature

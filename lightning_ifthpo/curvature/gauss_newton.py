"""The generalized Gauss–Newton matrix: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import add, tangent, tangents, vjp
from lightning_ifthpo.core.loss import Loss, LossFunction, as_loss
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.outputs import checked_outputs, cut_at


class GaussNewtonOperator(LossOperator):
    """G = [Jᵀ I] ∇²L [Jᵀ I]ᵀ for a loss L(z, w) of the model's outputs z and J = ∂z/∂w (Schraudolph 2002).

    For a loss of the outputs alone this is Jᵀ L_zz J. A term that depends on the parameters directly (a penalty) enters
    with its exact Hessian, including the cross terms with the outputs. G is positive semi-definite wherever L is convex
    in (z, w) together: cross-entropy or squared error of the outputs plus a convex penalty. It equals the Hessian where
    the model is linear or the residuals vanish.

    Cost: one forward pass and one differentiable gradient when made. A product by double vjp then costs 1.2 gradients
    with linear layers, and 2 to 2.6 with convolutions, because torch's second derivative of a convolution also computes
    terms that are not needed.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several, or the loss
            alone if it calls `mark_outputs`; or a `Loss`.
        parameters: The tensors w, together [n].

    Raises:
        TypeError, ValueError: If the loss is not a scalar tensor with a graph, or no outputs are known.

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
        # Jᵀu is linear in u, so that its own vjp with respect to u is Jv, whatever u is. With u = ∂L/∂z, Jᵀu is also
        # the gradient of the loss.
        pairs = zip(self._output_gradient, self._outputs, strict=True)
        self._u = [_variable(slope, output) for slope, output in pairs]
        self._transposed_product = vjp(self._outputs, parameters, self._u, create_graph=True)

    def _own_loss(self) -> Tensor:
        return self._total

    def _own_gradient(self) -> Tensor:
        return self._loss.space.flatten(self._differentiable_gradient)

    def _own_product(self, v: Tensor) -> Tensor:
        outputs, space = self._outputs, self._loss.space
        vs = space.split(v)
        jv = [
            torch.zeros_like(u) if product is None else product  # of an output that depends on no parameter
            for product, u in zip(vjp(self._transposed_product, self._u, vs), self._u, strict=True)
        ]
        with cut_at(outputs):
            gradients = [*self._output_gradient, *self._penalty_gradient]
            curved = vjp(gradients, [*outputs, *space.tensors], [*jv, *vs])
        through_outputs, direct = curved[: len(outputs)], curved[len(outputs) :]
        return space.flatten(add(_nonzero_vjp(outputs, space.tensors, through_outputs), direct))

    def _own_mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        return vjp(self._differentiable_gradient, hyperparameters, self._loss.space.split(v))

    @property
    def _differentiable_gradient(self) -> list[Tensor | None]:
        return add(self._transposed_product, self._penalty_gradient)


def forward_slope_and_curvature(loss: Loss, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ∇L·v and vᵀGv of this process's share, scalars, by one forward pass in forward mode, no backward pass.

    Args:
        loss: As for `GaussNewtonOperator`.
        v: [n].

    Raises:
        RuntimeError: If an operation of the loss has no derivative in forward mode.
        TypeError, ValueError: As `GaussNewtonOperator`.
    """
    space = loss.space
    with tangents(space.tensors, space.split(v)):
        total, outputs = loss.evaluate()
        inputs = [*checked_outputs(outputs), *space.tensors]
        with cut_at(inputs[: -len(space.tensors)]):
            gradients = vjp([total], inputs)  # they carry ∇²L [Jv v] along
        pairs = [(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=True) if gradient is not None]
        curvature = sum(
            ((tangent(gradient) * tangent(tensor)).sum() for gradient, tensor in pairs), start=v.new_zeros(())
        )
        return tangent(total).reshape(()), curvature


def _variable(slope: Tensor | None, output: Tensor) -> Tensor:
    """Returns ∂L/∂z as a separate tensor to differentiate by.

    A view makes it separate: without it, one tensor may be the gradient of two outputs (of z₁ + z₂), or one gradient
    may be computed from the other (of z₁ − z₂).
    """
    slope = torch.zeros_like(output) if slope is None else slope
    return slope.view_as(slope) if slope.requires_grad else slope.detach().requires_grad_()


def _nonzero_vjp(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns Jᵀu; `None` in u stands for zeros."""
    pairs = [(output, u) for output, u in zip(outputs, cotangents, strict=True) if u is not None]
    return vjp([output for output, _ in pairs], parameters, [u for _, u in pairs])

"""The generalized Gauss–Newton matrix: the Hessian without the curvature of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_ifthpo.core.autodiff import add, tangent, tangents, vjp
from lightning_ifthpo.core.loss import LossValue, check_loss, loss_and_outputs
from lightning_ifthpo.core.space import ParameterSpace
from lightning_ifthpo.curvature.base import LossOperator
from lightning_ifthpo.curvature.outputs import cut_at, known_outputs, recording_outputs


class GaussNewtonOperator(LossOperator):
    """G = [Jᵀ I] ∇²L [Jᵀ I]ᵀ for a loss L(z, w) of the model's outputs z and J = ∂z/∂w (Schraudolph 2002).

    For a loss of the outputs alone this is Jᵀ L_zz J. What depends on the parameters beside the outputs (a penalty)
    enters with its exact Hessian, cross terms with the outputs included. G is positive semi-definite wherever L is
    convex in (z, w) together: cross-entropy or squared error of the outputs plus a convex penalty. It equals the
    Hessian where the model is linear or the residuals vanish.

    Cost: one forward pass and one differentiable gradient when made; then, by double vjp, 1.2 gradients a product with
    linear layers and 2 to 2.6 with convolutions, of whose second derivative torch computes more than is asked for.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several, or the loss
            alone if it calls `mark_outputs`.
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

    def __init__(self, loss: Callable[[], LossValue], parameters: Sequence[Tensor]) -> None:
        with recording_outputs() as marked:
            total, outputs = loss_and_outputs(loss())
        check_loss(total, "the loss")
        self._space = ParameterSpace(parameters)
        self._outputs = known_outputs(outputs or marked)
        self.loss = total.detach()
        self.size, self.dtype, self.device = self._space.size, self._space.dtype, self._space.device

        parameters = self._space.tensors
        self._output_gradient = vjp([total], self._outputs, create_graph=True)
        with cut_at(self._outputs):
            self._penalty_gradient = vjp([total], parameters, create_graph=True)
        # Jᵀu is linear in u, so that its own vjp with respect to u is Jv, whatever u is. With u = ∂L/∂z it is the
        # gradient of the loss as well.
        pairs = zip(self._output_gradient, self._outputs, strict=True)
        self._u = [_variable(slope, output) for slope, output in pairs]
        self._transposed_product = vjp(self._outputs, parameters, self._u, create_graph=True)

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._space.flatten(self._differentiable_gradient)

    @property
    def _differentiable_gradient(self) -> list[Tensor | None]:
        return add(self._transposed_product, self._penalty_gradient)

    def _product(self, v: Tensor) -> Tensor:
        outputs, parameters, vs = self._outputs, self._space.tensors, self._space.split(v)
        jv = [
            torch.zeros_like(u) if product is None else product  # of an output that depends on no parameter
            for product, u in zip(vjp(self._transposed_product, self._u, vs), self._u, strict=True)
        ]
        with cut_at(outputs):
            curved = vjp([*self._output_gradient, *self._penalty_gradient], [*outputs, *parameters], [*jv, *vs])
        through, beside = curved[: len(outputs)], curved[len(outputs) :]
        return self._space.flatten(add(_backward(outputs, parameters, through), beside))

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly (no Gauss–Newton approximation here); about two gradients."""
        return vjp(self._differentiable_gradient, hyperparameters, self._space.split(v))


def forward_slope_and_curvature(
    loss: Callable[[], LossValue], parameters: Sequence[Tensor], v: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns ∇L·v and vᵀGv, scalars, by one forward pass that carries derivatives along, without a backward pass.

    Args:
        loss: As for `GaussNewtonOperator`.
        parameters: The tensors w, together [n].
        v: [n].

    Raises:
        RuntimeError: If an operation of the loss has no derivative in forward mode.
        TypeError, ValueError: As `GaussNewtonOperator`.
    """
    space = ParameterSpace(parameters)
    with recording_outputs() as marked, tangents(space.tensors, space.split(v)):
        total, outputs = loss_and_outputs(loss())
        check_loss(total, "the loss")
        inputs = [*known_outputs(outputs or marked), *space.tensors]
        with cut_at(inputs[: -len(space.tensors)]):
            gradients = vjp([total], inputs)  # they carry ∇²L [Jv v] along
        pairs = [(gradient, tensor) for gradient, tensor in zip(gradients, inputs, strict=True) if gradient is not None]
        curvature = sum(
            ((tangent(gradient) * tangent(tensor)).sum() for gradient, tensor in pairs), start=v.new_zeros(())
        )
        return tangent(total).reshape(()), curvature


def _variable(slope: Tensor | None, output: Tensor) -> Tensor:
    """Returns ∂L/∂z as a tensor of its own to differentiate by.

    Without the view it could be the slope of another output too (of z₁ + z₂), or what that is computed from (z₁ − z₂).
    """
    slope = torch.zeros_like(output) if slope is None else slope
    return slope.view_as(slope) if slope.requires_grad else slope.detach().requires_grad_()


def _backward(
    outputs: Sequence[Tensor], parameters: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Returns Jᵀu, where u may have structural zeros."""
    pairs = [(output, u) for output, u in zip(outputs, cotangents, strict=True) if u is not None]
    return vjp([output for output, _ in pairs], parameters, [u for _, u in pairs])

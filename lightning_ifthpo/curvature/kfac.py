"""Kronecker-factored curvature, by curvlinops."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_ifthpo.core.autodiff import vjp, zeros_for_none
from lightning_ifthpo.core.functions import keeping_hooks
from lightning_ifthpo.core.loss import Loss, LossFunction, LossGraph, as_loss
from lightning_ifthpo.curvature.base import InvertibleOperator, LossOperator
from lightning_ifthpo.curvature.outputs import checked_outputs


class KFACOperator(LossOperator, InvertibleOperator):
    """One block for each linear or convolutional layer, a Kronecker product of two covariances (Martens, Grosse 2015).

    The factors are the covariance of the layer's inputs and the covariance of the gradients at its outputs. They use
    the exact Hessian of the loss in the model's outputs, or its positive part. KFAC is exact for one linear layer with
    squared error, if all rows have the same weight and no dimension is pooled. Elsewhere it approximates Gauss–Newton,
    and ignores penalties on weights and curvature between layers. Use it with `Direct(damping=...)`.

    Cost: two forward passes, one differentiable gradient and C + 1 backward passes for C outputs of an example when
    made. A product costs O(d_in² d_out + d_in d_out²) for each layer, and an inverse O(d_in³ + d_out³) more.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several of shape
            [B, ..., C], or the loss alone if it calls `mark_outputs`; or a `Loss`. A sum or a mean over B.
        parameters: The tensors w, together [n]: weights and biases of Linear and Conv2d layers that the loss calls.
            Parameters that are frozen, or on which no output depends, have blocks of zeros. KFAC does not notice that
            a weight is also used outside of its layer.

    Raises:
        ImportError: If curvlinops is not installed: `pip install lightning_ifthpo[kfac]`.
        TypeError, ValueError: If the loss is not a scalar tensor with a graph, no outputs are known, or the loss is not
            a sum over their rows.
        ValueError: If a parameter belongs to no layer that KFAC knows or to a layer that is called several times, or if
            the examples are spread over processes.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> def loss():
    ...     z = layer(torch.eye(2))
    ...     return (z**2).sum() / 2, z
    >>> KFACOperator(loss, [layer.weight]).to_dense().round(decimals=4)
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, loss: LossFunction | Loss, parameters: Sequence[Tensor]) -> None:
        try:
            self._library: Any = importlib.import_module("curvlinops")
        except ImportError as error:
            raise ImportError("KFAC needs curvlinops: pip install 'lightning_ifthpo[kfac]'") from error
        loss = as_loss(loss, parameters)
        if loss.all_reduce is not None or loss.scale != 1.0:
            raise ValueError(
                "curvature='kfac' needs all examples in one process, and no loss scale; otherwise use 'gauss_newton'"
            )
        with _record_layers() as calls:
            total, outputs = loss.evaluate()
        super().__init__(loss)
        self._graph = LossGraph(total, loss)
        outputs = checked_outputs(outputs)
        parameters = loss.parameters  # those that were passed may have been a generator
        slopes = vjp(outputs, parameters, [torch.zeros_like(output) for output in outputs])
        # vjp returns None for frozen or unused parameters
        used = [parameter for parameter, slope in zip(parameters, slopes, strict=True) if slope is not None]
        if not used:
            raise ValueError("no marked output depends on any of the parameters")
        examples = _check_layers(calls, used)
        self._used = loss.space.flatten(None if slope is None else torch.ones_like(slope) for slope in slopes).bool()
        model = _SquaredError(loss, [layer for layer, _ in calls], _roots(total, outputs))
        self._kfac = self._library.KFACLinearOperator(
            model,
            nn.MSELoss(reduction="sum"),
            used,
            [(torch.zeros(examples, device=self.device), torch.zeros_like(model.roots[:, 0]))],
            fisher_type="type-2",
            check_deterministic=False,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
        )
        self._own_product(torch.zeros_like(self.gradient))  # computes the factors now, while the weights are these

    def _own_product(self, v: Tensor) -> Tensor:
        product = torch.zeros_like(v)
        product[self._used] = self._kfac @ v[self._used]
        return product

    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (A + δI)⁻¹ b, exactly, by eigendecompositions of the factors.

        A Kronecker product can be damped by one number only, so that δ: [n] is replaced by its geometric mean. The
        residual that `Direct` reports shows the error.

        Args:
            b: Right side, [n], or several of them, [n, k].
            delta: Damping δ, a number, or [n] for one right side.

        Raises:
            ValueError: If δ is not positive.
        """
        delta = torch.as_tensor(delta, dtype=b.dtype, device=b.device)
        if not bool((delta > 0.0).all()):
            raise ValueError("the inverse of KFAC needs damping > 0: Direct(damping=1e-3), or damping='horizon'")
        damping = float(delta.log().mean().exp())
        inverse = self._library.KFACInverseLinearOperator(self._kfac, damping=damping, use_exact_damping=True)
        solution = b / delta
        solution[self._used] = inverse @ b[self._used]
        return solution


class _SquaredError(nn.Module):
    """The model followed by z ↦ Sᵀz for its outputs z: the squared error of Sᵀz has the loss's curvature in z.

    curvlinops supports three losses only. With this model its squared error stands for any loss.
    """

    def __init__(self, loss: Loss, layers: Sequence[nn.Module], roots: Tensor) -> None:
        super().__init__()
        self._loss = loss
        self.layers = nn.ModuleList(layers)
        self.roots = roots
        # These dicts are private to torch. curvlinops keeps the handles of its hooks to itself until the backward pass
        # is done, and torch has no public way to remove a hook without its handle.
        hooks_of_layers = [hooks for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks)]
        self._hooks = [(hooks, set(hooks)) for hooks in hooks_of_layers]

    def forward(self, _: Tensor) -> Tensor:
        """Returns Sᵀz for each row, [R, C]. The argument is ignored, because the loss holds its own batch.

        The forward pass removes the hooks of curvlinops from the layers. Otherwise activation checkpointing would call
        them again in the backward pass, and an error would leave them on the layers.
        """
        try:
            with keeping_hooks():  # by which curvlinops reads the gradients of layers
                _, outputs = self._loss.evaluate()
        finally:
            for hooks, own in self._hooks:
                for added in hooks.keys() - own:
                    del hooks[added]
        return torch.einsum("rij,ri->rj", self.roots, _rows(outputs))


def _roots(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Returns S with 2 S Sᵀ = ∂²L/∂z∂zᵀ, or its positive part, for each row z of the outputs, [R, C, C]."""
    slopes = zeros_for_none(vjp([loss], outputs, create_graph=True), outputs)

    def times(v: Tensor) -> Tensor:
        """Returns ∂²L/∂z∂zᵀ v, [R, C]."""
        columns = torch.split(v, [_width(output) for output in outputs], dim=1)
        images = vjp(slopes, outputs, [part.reshape(z.shape) for part, z in zip(columns, outputs, strict=True)])
        return _rows(zeros_for_none(images, outputs))

    like = _rows(outputs).detach()
    units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    blocks = torch.stack([times(unit.expand_as(like)) for unit in units], dim=2)
    # A pseudo-random probe: if the loss couples rows, the block-diagonal product differs from the exact one.
    probe = torch.arange(like.numel(), dtype=like.dtype, device=like.device).square().sin().reshape(like.shape)
    expected = torch.einsum("rij,rj->ri", blocks, probe)
    tolerance = torch.finfo(like.dtype).eps ** 0.5  # the same numbers summed in another order
    if bool((times(probe) - expected).abs().amax() > tolerance * expected.abs().amax()):
        raise ValueError(
            "KFAC needs a loss that is a sum over the rows of the model's outputs, marked as [B, ..., C] with the "
            "classes last, and this one couples them; use curvature='gauss_newton'"
        )
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    roots: Tensor = vectors * (values.clamp_min(0.0) / 2).sqrt().unsqueeze(1)
    return roots


def _rows(outputs: Sequence[Tensor]) -> Tensor:
    """Returns all outputs side by side, [R, C]."""
    counts = {output.numel() // _width(output) for output in outputs}
    if len(counts) > 1:
        raise ValueError(f"KFAC needs outputs with the same number of rows, got {sorted(counts)}")
    return torch.cat([output.reshape(-1, _width(output)) for output in outputs], dim=1)


def _width(output: Tensor) -> int:
    return output.shape[-1] if output.ndim > 1 else 1


@contextmanager
def _record_layers() -> Iterator[list[tuple[nn.Module, torch.Size]]]:
    """Collects the Linear and Conv2d layers that are called inside the block, with the shapes of their inputs."""
    calls: list[tuple[nn.Module, torch.Size]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # A subclass with a forward pass of its own may compute something else.
        if type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and inputs:
            calls.append((module, inputs[0].shape))

    handle = register_module_forward_pre_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def _check_layers(calls: Sequence[tuple[nn.Module, torch.Size]], parameters: Sequence[Tensor]) -> int:
    """Returns the number of examples, after checking the layers of the parameters."""
    examples = set()
    for parameter in parameters:
        name = f"a parameter of shape {tuple(parameter.shape)}"
        owners = [call for call in calls if any(parameter is weight for weight in call[0].parameters(recurse=False))]
        if len(owners) > 1:
            raise ValueError(f"{name} is shared between layers or used several times, which KFAC cannot express")
        if not owners:
            raise ValueError(
                f"{name} belongs to no Linear or Conv2d layer that the loss calls with a tensor, and KFAC knows no "
                "other; freeze it, or use curvature='gauss_newton'"
            )
        ((layer, shape),) = owners
        # curvlinops would compute the curvature of these layers wrongly, without an error.
        convolutional = isinstance(layer, nn.Conv2d)
        if convolutional and layer.padding_mode != "zeros":
            raise ValueError(f"KFAC knows zero padding only, and a Conv2d has padding_mode={layer.padding_mode!r}")
        if convolutional and layer.groups != 1:
            raise ValueError(f"KFAC knows no groups, and a Conv2d has groups={layer.groups}")
        if len(shape) < (4 if convolutional else 2):
            raise ValueError(f"KFAC needs batches, and a {type(layer).__name__} is called with shape {tuple(shape)}")
        examples.add(shape[0])
    if len(examples) > 1:
        raise ValueError(f"KFAC needs layers that see the same number of examples, got {sorted(examples)}")
    return examples.pop()

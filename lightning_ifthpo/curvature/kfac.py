"""Kronecker-factored curvature, by curvlinops."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_ifthpo.autodiff import vjp
from lightning_ifthpo.curvature.marking import known_outputs, recording_outputs
from lightning_ifthpo.curvature.operator import InvertibleOperator
from lightning_ifthpo.loss_graph import LossGraph, LossValue, loss_and_outputs
from lightning_ifthpo.random_state import RandomState


class KFACOperator(InvertibleOperator):
    """A block for each linear or convolutional layer, the Kronecker product of two covariances (Martens, Grosse 2015).

    One is that of the layer's inputs, the other that of gradients at its outputs, with the exact Hessian of the loss in
    the model's outputs, or its positive part. Its inverse is cheap; itself it is exact for a single linear layer with
    squared error. It approximates Gauss–Newton, and knows nothing of how layers act on each other, nor of penalties on
    weights. Needs `pip install lightning_ifthpo[kfac]`, which brings curvlinops. Use it with `Direct(damping=...)`.

    Cost: two forward passes, one differentiable gradient and C backward passes for C outputs of an example when made; a
    product and an inverse cost less than a pass.

    Args:
        loss: Callable without arguments that returns (loss, outputs) with outputs one tensor or several of shape
            [B, ..., C], or the loss alone if it calls `mark_outputs`. A sum or a mean over B.
        parameters: The tensors w, together [n]: weights and biases of Linear and Conv2d layers that the loss calls.

    Raises:
        ImportError: If curvlinops is not installed.
        TypeError, ValueError: If the loss is not a scalar tensor with a graph, no outputs are known, or the loss is no
            sum over their rows.
        ValueError: If a parameter is shared between layers or belongs to no layer that KFAC knows.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> def loss():
    ...     z = layer(torch.eye(2))
    ...     return (z**2).sum() / 2, z
    >>> KFACOperator(loss, [layer.weight]).to_dense().round(decimals=4)
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, loss: Callable[[], LossValue], parameters: Sequence[Tensor]) -> None:
        try:
            self._library: Any = importlib.import_module("curvlinops")
        except ImportError as error:
            raise ImportError("KFAC needs curvlinops: pip install 'lightning_ifthpo[kfac]'") from error
        state = RandomState(parameters[0].device)
        with recording_outputs() as marked, _recording_layers() as calls:
            total, outputs = loss_and_outputs(loss())
        self._graph = LossGraph(total, parameters)
        self.loss = total.detach()
        self.size, self.dtype, self.device = self._graph.space.size, self._graph.space.dtype, self._graph.space.device
        examples = _checked_layers(calls, parameters)
        model = _SquaredError(loss, [layer for layer, _ in calls], _roots(total, known_outputs(outputs or marked)))
        self._kfac = self._library.KFACLinearOperator(
            model,
            nn.MSELoss(reduction="sum"),
            list(self._graph.space.tensors),
            [(torch.zeros(examples, device=self.device), torch.zeros_like(model.roots[:, 0]))],
            fisher_type="type-2",
            check_deterministic=False,
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
        )
        with state.replayed():  # the same dropout masks as in the gradient
            self._product(torch.zeros_like(self.gradient))  # computes the factors, now

    @property
    def gradient(self) -> Tensor:
        """∂L/∂w, [n], detached."""
        return self._graph.gradient

    def _product(self, v: Tensor) -> Tensor:
        product: Tensor = self._kfac @ v
        return product

    def solve(self, b: Tensor, delta: float | Tensor) -> Tensor:
        """Returns (A + δI)⁻¹ b, exactly, by eigendecompositions of the factors.

        Kronecker products know damping by one number only: of δ: [n] it takes the geometric mean, and the residual that
        `Direct` reports tells what that is worth.

        Raises:
            ValueError: If δ is not positive.
        """
        delta = torch.as_tensor(delta, dtype=b.dtype, device=b.device)
        if not bool((delta > 0.0).all()):
            raise ValueError("the inverse of KFAC needs damping > 0: Direct(damping=1e-3), or damping='horizon'")
        damping = float(delta.log().mean().exp())
        inverse = self._library.KFACInverseLinearOperator(self._kfac, damping=damping, use_exact_damping=True)
        solution: Tensor = inverse @ b
        return solution

    def mixed_product(self, v: Tensor, hyperparameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Returns (∂²L/∂w∂λᵀ)ᵀ v, exactly; about two gradients."""
        return self._graph.mixed_product(v, hyperparameters)


class _SquaredError(nn.Module):
    """The model behind a loss, with outputs turned so that the loss has the curvature of their squared sum.

    So that curvlinops, which knows three losses, serves any.

    Args:
        loss: As for `KFACOperator`.
        layers: Those that it calls.
        roots: S with 2 S Sᵀ = ∂²L/∂z∂zᵀ for each row z of the outputs, [R, C, C].
    """

    def __init__(self, loss: Callable[[], LossValue], layers: Sequence[nn.Module], roots: Tensor) -> None:
        super().__init__()
        self._loss = loss
        self.layers = nn.ModuleList(layers)
        self.roots = roots

    def forward(self, _: Tensor) -> Tensor:
        """Returns Sᵀz for each row, [R, C]; whatever it is called with, it is the loss that knows the batch."""
        with recording_outputs() as marked:
            _, outputs = loss_and_outputs(self._loss())
        return torch.einsum("rij,ri->rj", self.roots, _rows(outputs or marked))


def _roots(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Returns S with 2 S Sᵀ = ∂²L/∂z∂zᵀ, or its positive part, for each row z of the outputs, [R, C, C]."""
    slopes = vjp([loss], outputs, create_graph=True)
    used = [torch.zeros_like(z) if slope is None else slope for z, slope in zip(outputs, slopes, strict=True)]

    def times(v: Tensor) -> Tensor:
        """∂²L/∂z∂zᵀ v, [R, C]."""
        columns = torch.split(v, [_width(output) for output in outputs], dim=1)
        images = vjp(used, outputs, [part.reshape(z.shape) for part, z in zip(columns, outputs, strict=True)])
        pairs = zip(images, outputs, strict=True)
        return _rows([torch.zeros_like(z) if image is None else image for image, z in pairs])

    like = _rows(outputs).detach()
    units = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    blocks = torch.stack([times(unit.expand_as(like)) for unit in units], dim=2)
    # signs without a pattern, which no coupling of rows survives
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
def _recording_layers() -> Iterator[list[tuple[nn.Module, int]]]:
    """Collects the linear and convolutional layers that are called inside the block, with their batch sizes."""
    calls: list[tuple[nn.Module, int]] = []

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # not subclasses with a forward pass of their own
        if type(module).forward in (nn.Linear.forward, nn.Conv2d.forward) and inputs:
            calls.append((module, len(inputs[0])))

    handle = register_module_forward_pre_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def _checked_layers(calls: Sequence[tuple[nn.Module, int]], parameters: Sequence[Tensor]) -> int:
    """Returns the number of examples that the layers of the parameters see."""
    owners: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    for layer, examples in calls:
        for weight in layer.parameters(recurse=False):
            owners[id(weight)] += 1
            sizes[id(weight)] = examples
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(
                f"KFAC knows padding with zeros only, and a Conv2d has padding_mode={layer.padding_mode!r}"
            )
    for index, parameter in enumerate(parameters):
        name = f"parameter {index}, of shape {tuple(parameter.shape)},"
        if owners[id(parameter)] > 1:
            raise ValueError(f"{name} is shared between layers or used several times, which KFAC cannot express")
        if not owners[id(parameter)]:
            raise ValueError(
                f"{name} belongs to no Linear or Conv2d layer that the loss calls, and KFAC knows no other; freeze it, "
                "or use curvature='gauss_newton'"
            )
    found = {sizes[id(parameter)] for parameter in parameters}
    if len(found) > 1:
        raise ValueError(f"KFAC needs layers that see the same number of examples, got {sorted(found)}")
    return found.pop()

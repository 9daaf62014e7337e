"""Hyperparameters that stay out of training."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_ifthpo.runtime.telling import rank_zero_warn


def freeze(module: Any) -> list[str]:
    """Freezes the hyperparameters of a bilevel module; returns the names of those that were not frozen."""
    unfrozen = {name: parameter for name, parameter in module.named_hyperparameters() if parameter.requires_grad}
    for parameter in unfrozen.values():
        parameter.requires_grad_(False)
    return list(unfrozen)


class FrozenHyperparameters:
    """Keeps hyperparameters from the training optimizer, whatever unfreezes them during training.

    A backward pass leaves no gradient on them. Optimizers neither move nor decay tensors without a gradient, and
    clipping does not count them.

    Args:
        module: A LightningModule with the bilevel mixin, on its device.
    """

    def __init__(self, module: Any) -> None:
        self._hyperparameters = dict(module.named_hyperparameters())
        self._hooks = [_without_gradients(hyperparameter) for hyperparameter in self._hyperparameters.values()]
        self._has_warned = False

    def refreeze(self) -> None:
        """Freezes the hyperparameters again that something has unfrozen, and warns the first time."""
        unfrozen = [name for name, parameter in self._hyperparameters.items() if parameter.requires_grad]
        for name in unfrozen:
            self._hyperparameters[name].requires_grad_(False)
            self._hyperparameters[name].grad = None
        if unfrozen and not self._has_warned:
            self._has_warned = True
            name = unfrozen[0]
            rank_zero_warn(
                f"hyperparameter {name!r} was unfrozen during training, and is frozen again: only hyper steps "
                "move hyperparameters. To unfreeze weights alone, use self.inner_parameters()"
            )

    def release(self) -> None:
        """Lets backward passes leave gradients again."""
        for hook in self._hooks:
            hook.remove()


def _without_gradients(parameter: nn.Parameter) -> Any:
    """Lets backward passes drop the gradient of a parameter; returns the handle that ends this."""
    required = parameter.requires_grad
    parameter.requires_grad_(True)  # torch adds hooks to such tensors only, and keeps them on frozen ones
    parameter.grad = None
    handle = parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    parameter.requires_grad_(required)
    return handle


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None

"""Learned gates of low-rank adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_ifthpo.hyperparameters.bounded import Bounded


class LoRAGates(Bounded):
    """A learned factor g = maximum · σ(λ) for what each adapter adds to its layer, W x + g · B A x; all start alike.

    The gates hook onto modules whose output is the contribution of an adapter: the last layer of one written by hand,
    or `lora_B` of `peft`. They act wherever the network is used, in the outer loss and in prediction too. Decay the
    weights of the adapters in the training loss: without it B takes up any factor, and a gate changes nothing but the
    speed of learning. With it, an adapter with a gate near zero costs too much to be used, and can be left out.

    Args:
        adapters: The modules whose outputs are scaled, by names of your choice. They do not become part of this module.
        initial: Each gate at the start, in (0, maximum); 1 changes nothing.
        maximum: Upper bound of each gate.

    Raises:
        ValueError: If there are no adapters or one has two names, or an argument is out of range.
        TypeError: If `adapters` is not a mapping to modules.

    >>> adapter = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False))
    >>> gates = LoRAGates({"query": adapter[1]}, initial=0.5)
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(adapter(x), 0.5 * x @ adapter[0].weight.T @ adapter[1].weight.T)
    True

    With peft: `LoRAGates({n: m for n, m in net.named_modules() if n.endswith("lora_B.default")})`. Merging adapters
    into their layers does not know of gates: multiply the weights of each by its gate before.
    """

    def __init__(self, adapters: Mapping[str, nn.Module], *, initial: float = 1.0, maximum: float = 2.0) -> None:
        is_mapping = isinstance(adapters, Mapping)
        if not is_mapping or not all(isinstance(adapter, nn.Module) for adapter in adapters.values()):
            raise TypeError(f"expected a mapping from names to adapter modules, got {adapters!r}")
        if len(set(map(id, adapters.values()))) < len(adapters):
            raise ValueError(f"expected each adapter once, got a module under several names: {', '.join(adapters)}")
        if not adapters:
            raise ValueError("expected at least one adapter; is the ending of their names right?")
        super().__init__(initial, maximum)
        self.names = tuple(adapters)
        self.logits = nn.Parameter(torch.full((len(adapters),), self._logit(initial)), requires_grad=False)
        for place, adapter in enumerate(adapters.values()):
            # a partial of a bound method is copied and pickled together with the gates
            adapter.register_forward_hook(partial(self._scale, place))

    def natural_values(self) -> dict[str, Tensor]:
        """Returns the gate of each adapter, a scalar, by its name."""
        return dict(zip(self.names, self._value(self.logits), strict=True))

    def forward(self) -> Tensor:
        """Returns the gates, [number of adapters], in the order of the names; for a penalty on them, say."""
        return self._value(self.logits)

    def _scale(self, place: int, adapter: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._value(self.logits[place]).to(output.dtype) * output

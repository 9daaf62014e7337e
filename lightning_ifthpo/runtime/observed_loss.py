"""The loss that a monitor looks at: on the last training batch, or on fixed examples in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.curvature import CurvatureOperator
from lightning_ifthpo.runtime.batches import prepared
from lightning_ifthpo.runtime.distributed import Ranks
from lightning_ifthpo.runtime.fixed_batches import FixedBatches
from lightning_ifthpo.runtime.losses import ModuleLosses, trainable


class ObservedLoss:
    """A loss of a module, and its curvature, on a training batch or on fixed examples.

    Args:
        trainer: The Trainer.
        module: The module.
        examples: Batches to look at in place of the training batch; None for the latter.
        ranks: The processes among which batches are split.
        name: "inner", or "outer" for the `outer_loss` of a BilevelLightningModule.

    Attributes:
        trainer: The Trainer.
        module: The module.
        losses: The losses of the module on a batch.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        examples: Iterable[Any] | None,
        ranks: Ranks,
        name: Literal["inner", "outer"],
    ) -> None:
        self.trainer = trainer
        self.module = module
        self._examples = None if examples is None else FixedBatches(examples, module.device, ranks)
        self.losses = ModuleLosses(trainer, module, ranks if self._examples is None else None)
        self._make = self.losses.outer if name == "outer" else self.losses.inner

    @property
    def is_fixed(self) -> bool:
        """Whether the examples are fixed."""
        return self._examples is not None

    def session(self, curvature: str) -> AbstractContextManager[None]:
        """Allows the loss to be evaluated inside the block; see `ModuleLosses.session`.

        The default seed draws the same dropout masks each time, so that measurements can be compared.
        """
        return self.losses.session(curvature)

    def on(self, batch: Any) -> Loss:
        """Returns the loss; of one on fixed examples only the values may be used, and no derivatives."""
        if self._examples is None:
            return self._make(batch)
        return self._examples.mean_loss(lambda part: self._make(self._prepared(part)), trainable(self.module))

    def curvature_on(self, batch: Any, operator: Callable[[Loss], CurvatureOperator]) -> CurvatureOperator:
        """Returns the curvature of the loss, given that of its parts."""
        if self._examples is None:
            return operator(self._make(batch))
        return self._examples.mean(lambda part: operator(self._make(self._prepared(part))))

    def _prepared(self, part: Any) -> Any:
        return prepared(self.trainer, self.module, part, seed=0)

"""AutoGeN, the published implementation of GeN (`pip install gen-optim`), as its documentation uses it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class AutoGeN(Callback):
    """Adapts the rate every eighth step, on a second stream of training batches, with its linear decay.

    Args:
        criterion: Returns the loss of outputs of `pl_module.net` and targets.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.criterion = criterion

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the second stream."""

        def batches() -> Iterator[Any]:
            while True:
                yield from trainer.train_dataloader  # type: ignore[misc]

        self._batches = batches()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Adapts the rate."""
        gen: Any = importlib.import_module("GeN.GeN")
        if trainer.global_step % 8 == 7:
            gen.lr_parabola(
                pl_module.net,
                optimizer,
                self.criterion,
                tr_iter=self._batches,
                task="image_cls",  # batches of inputs and targets
                device="cpu",
                scale=1.0 - trainer.global_step / trainer.estimated_stepping_batches,
            )

"""Batches as the Trainer would hand them over, and copies of them."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated


def copied(batch: Any) -> Any:
    """Returns a copy of a batch, which may be changed in place and taken apart."""
    return apply_to_collection(batch, Tensor, Tensor.clone)


def prepared(trainer: L.Trainer, module: L.LightningModule, batch: Any, seed: int, step: int = 0) -> Any:
    """Returns a copy of a batch on the device, converted as in validation; random transforms draw from a seed."""
    trainer.validating = True  # augmentations that ask self.trainer.training must not touch it
    try:
        own_seed = derive_seed(Stream.BATCH_TRANSFORMS, seed=seed, step=step, rank=trainer.global_rank)
        with isolated(module.device, own_seed):
            batch = trainer.precision_plugin.convert_input(copied(batch))
            batch = _transfer_hook_owner(trainer, module).on_before_batch_transfer(batch, 0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True


def _transfer_hook_owner(trainer: L.Trainer, module: Any) -> Any:
    """Returns the data module where it overrides the hook, else the module, as the Trainer does."""
    owner = data_module(trainer)
    hook = None if owner is None else type(owner).on_before_batch_transfer
    return module if hook is None or hook.__module__.split(".")[0] in ("lightning", "pytorch_lightning") else owner


def data_module(trainer: L.Trainer) -> Any:
    """Returns the LightningDataModule in use, if any."""
    return getattr(trainer, "datamodule", None)


def batch_size(batch: Any) -> int | None:
    """Returns the number of examples, as Lightning counts them; None where it cannot."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None

"""Batches as the Trainer would hand them over, and copies of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.memory import is_oom_error
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_ifthpo.core.random_state import Stream, derive_seed, isolated
from lightning_ifthpo.training_loss import is_stub


def copied(batch: Any) -> Any:
    """Returns a copy of a batch with its own containers, tensors and objects.

    What cannot be copied inside an object, such as a lock, is shared.
    """
    return apply_to_collection(batch, object, _copied_leaf, wrong_dtype=(Mapping, list, tuple), allow_frozen=True)


def _copied_leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        clone = value.clone()
        if type(value) is not Tensor and getattr(value, "__dict__", None):  # a subclass may have attributes
            vars(clone).update(copied(vars(value)))
        return clone
    try:
        return copy.deepcopy(value)
    except Exception as error:  # a class may raise anything here
        if is_oom_error(error):
            raise
    try:
        shallow = copy.copy(value)
        vars(shallow).update(copied(vars(value)))
    except Exception:
        return value
    return shallow


def prepared(trainer: L.Trainer, module: L.LightningModule, batch: Any, seed: int, step: int = 0) -> Any:
    """Returns a copy of a batch on the device, converted as in validation; random transforms draw from the seed."""
    trainer.validating = True  # augmentations that ask self.trainer.training must not change the batch
    try:
        own_seed = derive_seed(Stream.BATCH_TRANSFORMS, seed=seed, step=step, rank=trainer.global_rank)
        with isolated(module.device, own_seed):
            batch = trainer.precision_plugin.convert_input(copied(batch))
            # the data module takes precedence, as in the Trainer
            hook: Any = getattr(getattr(trainer, "datamodule", None), "on_before_batch_transfer", None)
            batch = (module.on_before_batch_transfer if is_stub(hook) else hook)(batch, 0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        trainer.training = True


def batch_size(batch: Any) -> int | None:
    """Returns the number of examples, as Lightning counts them; None where it cannot."""
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None

"""Recording how hyperparameters move in a run, and moving them the same way in another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_ifthpo.callbacks.hypergradient import IFTHypergradient
from lightning_ifthpo.module import BilevelLightningModule
from lightning_ifthpo.runtime.requirements import check_bilevel

_Moves = list[tuple[int, dict[str, Tensor]]]
"""Values after so many training batches, for hyperparameters that had others before."""


class HyperparameterRecorder(L.Callback):
    """Writes the hyperparameters' values to a file, with the training batch after which they changed.

    Name it behind `IFTHypergradient` in the list of callbacks. The file is written at the end of the fit, also when an
    error ends it, and can be read by `HyperparameterSchedule`.

    Args:
        path: The file. It takes four bytes for each number at each hyper step: 72 MB for 60,000 example weights and 300
            hyper steps. Memory and the checkpoints of the run hold as much.

    Raises:
        ValueError: At the start of the fit, if `IFTHypergradient` stands behind it.
        TypeError: At the start of the fit, if the module has no `BilevelLightningModule` among its bases.

    >>> recorder = HyperparameterRecorder("schedule.pt")
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path
        self._moves: _Moves = []
        self._latest: dict[str, Tensor] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what was recorded so far, as tensors and plain numbers."""
        return {"moves": self._moves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues a record."""
        self._moves = state_dict["moves"]
        for _, values in self._moves:
            self._latest |= values

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begins a new record; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            check_bilevel(pl_module, "HyperparameterRecorder")
            self._moves, self._latest, self._versions = [], {}, {}

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Refuses a place before the callback that moves the hyperparameters."""
        behind = trainer.callbacks[trainer.callbacks.index(self) :]
        if any(isinstance(callback, IFTHypergradient) for callback in behind):
            raise ValueError("HyperparameterRecorder stands before IFTHypergradient; name it behind, to see its steps")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Records the values at the start."""
        self._record(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the values that have changed."""
        self._record(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the file."""
        if trainer.is_global_zero and self._moves:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"moves": self._moves}, self.path)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Does the same; the Trainer does not call `on_fit_end` after an exception."""
        self.on_fit_end(trainer, pl_module)

    def _record(self, trainer: L.Trainer, module: Any) -> None:
        """Adds the values that have changed; the version counter shows most batches after which there are none."""
        if not trainer.is_global_zero:
            return
        changed: dict[str, Tensor] = {}
        for name, parameter in module.named_hyperparameters():
            version = (id(parameter), parameter._version)
            if self._versions.get(name) != version:
                self._versions[name] = version
                value = parameter.detach().to("cpu", copy=True)
                if name not in self._latest or not torch.equal(value, self._latest[name]):
                    changed[name] = value
        if changed:
            self._moves.append((_batches_of(trainer), changed))
            self._latest |= changed


class HyperparameterSchedule(L.Callback):
    """Moves the hyperparameters as a `HyperparameterRecorder` has seen them move, without hyper steps.

    Train again with the schedule, and once more with the final values alone: this shows whether a gain comes from the
    values or from their change during training. With the data, seed and module of the recorded run, training repeats
    that run bit for bit.

    Args:
        path: The file that was recorded.

    Raises:
        ValueError: At the start of the fit, if the module has other hyperparameters, `IFTHypergradient` moves them, or
            the record begins later.
        TypeError: At the start of the fit, if the module has no `BilevelLightningModule` among its bases.

    >>> schedule = HyperparameterSchedule("schedule.pt")
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = path
        self._moves: dict[int, dict[str, Tensor]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reads the file."""
        if stage != "fit":
            return
        check_bilevel(pl_module, "HyperparameterSchedule")
        moves: _Moves = torch.load(self.path, map_location="cpu", weights_only=True)["moves"]
        self._moves = dict(moves)
        assert isinstance(pl_module, BilevelLightningModule)
        own = {path: tuple(tensor.shape) for path, tensor in pl_module.named_hyperparameters()}
        recorded = {path: tuple(tensor.shape) for _, values in moves for path, tensor in values.items()}
        if own != recorded:
            raise ValueError(
                f"HyperparameterSchedule: {self.path} was recorded for the hyperparameters {recorded}, and "
                f"{type(pl_module).__name__} has {own}"
            )

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Refuses a second callback that moves hyperparameters."""
        if any(isinstance(callback, IFTHypergradient) for callback in trainer.callbacks):
            raise ValueError(
                "HyperparameterSchedule and IFTHypergradient both move the hyperparameters; use one of them"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets the values at the start; a resumed run has its own."""
        if min(self._moves) > _batches_of(trainer):
            raise ValueError(
                f"HyperparameterSchedule: {self.path} begins after {min(self._moves)} training batches; record a run "
                "from its start"
            )
        self._move(pl_module, _batches_of(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sets the values that changed after this batch."""
        self._move(pl_module, _batches_of(trainer))

    def _move(self, module: Any, batches: int) -> None:
        hyperparameters = dict(module.named_hyperparameters())
        with torch.no_grad():
            for name, value in self._moves.get(batches, {}).items():
                hyperparameters[name].copy_(value)


def _batches_of(trainer: L.Trainer) -> int:
    """Returns the number of training batches so far, inside `on_train_start` and `on_train_batch_end`."""
    return trainer.fit_loop.total_batch_idx + 1

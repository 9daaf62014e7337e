"""A training run that is killed at a given moment, and goes on from its newest checkpoint when it is started again."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from tests.helpers.device import deterministic
from tests.helpers.trainers import Deterministic, L, quiet_trainer

EPOCHS, BATCHES = 3, 4
Phase: TypeAlias = Literal["training", "saving"]


class Checkpoints(ModelCheckpoint):
    """Saves after every step, and tells when."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        self.saving = False
        self.began = 0.0
        self.seconds = 0.0  # that the last one took

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        self.began, self.saving = time.perf_counter(), True
        super()._save_checkpoint(trainer, filepath)
        self.seconds, self.saving = time.perf_counter() - self.began, False


class Death(Callback):
    """Kills the process at a moment of its training.

    Args:
        phase: During a step, or while the checkpoint after it is being written.
        fraction: How far into the phase, judged by how long the last one took.
        step: Which one, from 2 on.
        checkpoints: Knows when they are written.
        note: File to say in, before dying, whether a checkpoint was being written.
    """

    def __init__(self, phase: Phase, fraction: float, step: int, checkpoints: Checkpoints, note: Path) -> None:
        self.phase, self.fraction, self.step = phase, fraction, step
        self.checkpoints, self.note = checkpoints, note
        self.began = 0.0
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.seconds, self.began = now - self.began, now
        if trainer.global_step == self.step - 1:
            threading.Thread(target=self.die, daemon=True).start()

    def die(self) -> None:
        if self.phase == "training":
            time.sleep(self.fraction * self.seconds)
        else:
            while not self.checkpoints.saving:
                time.sleep(1e-5)
            time.sleep(
                max(0.0, self.checkpoints.began + self.fraction * self.checkpoints.seconds - time.perf_counter())
            )
        self.note.write_text("saving" if self.checkpoints.saving else "training")
        os.kill(os.getpid(), signal.SIGKILL)


def live(folder: Path, death: tuple[Phase, float, int] | None = None) -> None:
    """Trains from the newest checkpoint of a folder, or from the beginning, to the end or to a death."""
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty")
    deterministic()
    torch.set_num_threads(1)
    torch.manual_seed(3)
    checkpoints = Checkpoints(folder)
    callbacks = [IFTHypergradient(2), SharpnessMonitor(3, max_overhead=None), ExactGeN(2), checkpoints]
    if death is not None:
        callbacks.append(Death(*death, checkpoints, folder / "death.txt"))
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(Deterministic(), ckpt_path=newest(folder))


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint of the most steps."""
    return max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), default=None)

"""How far an experiment has come: a bar on the terminal that leaves nothing behind.

Elsewhere, as in a file or a pipe, and in worker processes, nothing is written, and rich is not needed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from multiprocessing import parent_process
from typing import Any, TypeVar

import lightning as L

Item = TypeVar("Item")

_SECONDS = 1.0  # between two pictures of a training run; one takes about a millisecond
_RUNS = count(1)


def is_watched() -> bool:
    """Returns whether there is a terminal to show something on."""
    return sys.stderr.isatty() and parent_process() is None


def watched(items: Sequence[Item], name: str) -> Iterable[Item]:
    """Returns the items, and shows how many of them are done; do not watch a loop inside another one, or training."""
    return _watched(items, name) if is_watched() else items


def _watched(items: Sequence[Item], name: str) -> Iterator[Item]:
    with _bar() as bar:
        yield from bar.track(items, description=name)


class Watching(L.Callback):
    """Shows how many batches of a training run are done."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the bar."""
        self._bar, self._drawn = _bar(), time.perf_counter()
        steps = float(trainer.estimated_stepping_batches)
        total = None if steps == float("inf") else steps * trainer.accumulate_grad_batches
        self._task = self._bar.add_task(f"training run {next(_RUNS)}", total=total)
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws it again from time to time."""
        if time.perf_counter() - self._drawn > _SECONDS:
            self._drawn = time.perf_counter()
            done = trainer.global_step * trainer.accumulate_grad_batches
            self._bar.update(self._task, completed=done, refresh=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes it."""
        self._bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Removes it, if training had begun."""
        if hasattr(self, "_bar"):
            self._bar.stop()


def _bar() -> Any:
    """Returns a bar without a thread of its own, which would disturb what is being timed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)

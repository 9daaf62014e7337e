"""The callback that writes a page about a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_ifthpo.callbacks.training_report.clock import Clock
from lightning_ifthpo.callbacks.training_report.collector import Collector
from lightning_ifthpo.callbacks.training_report.diagnosis import diagnose
from lightning_ifthpo.callbacks.training_report.facts import Finding
from lightning_ifthpo.callbacks.training_report.sections import sections_of
from lightning_ifthpo.core.validation import is_number, require_at_least, require_fraction
from lightning_ifthpo.runtime.telling import Notes, rank_zero_warn

_CHARTS = 0.4  # seconds that the charts of a page take, at 30 ms each
_FREE = 100  # pieces of work that are done in any case; a look has two


class TrainingReport(L.Callback):
    """Writes one HTML page about a run: a diagnosis in words, and the curves that it rests on.

    The page says what is wrong, by which numbers, and what to do, worst first. Below are warnings of the package,
    losses, hyperparameters in natural units, what hyper steps predicted and what was confirmed, solves, curvature,
    learning rates, gradients and updates of each layer, and the time of callbacks; what there are no data for is left
    out. It needs nothing outside itself. It is written when training starts, again and again while it goes on, and at
    the end, also after an error, which then comes first. Each time it is a new file that takes the place of the old
    one. Diagnosis and numbers are always new; charts are drawn again as often as the budget allows, and at the end.

    It works on any LightningModule, with the other callbacks of this package or without, and changes nothing: it draws
    no random numbers, and reads the device every n batches. The first process writes what it sees.

    Args:
        path: Where to write the page; missing folders are made. Later fits replace it.
        every_n_batches: Training batches between two looks at metrics and gradients, at least 1. The losses of all
            batches are read at the same time.
        every_n_seconds: Seconds between two pages, at least.
        max_overhead: Upper bound of its time over the training time, without the first page and the last one: looks
            and charts become as rare as needed. None for no limit.

    Cost: each look takes a pass over the gradients, and some looks one over the first 500 tensors of weights, to which
    findings on layers are limited; a chart takes some 30 ms.

    Raises:
        ValueError: If an argument is out of range, or path is no path of a file.
        ModuleNotFoundError: If matplotlib or Jinja2 is missing.

    >>> report = TrainingReport("report.html", every_n_batches=20)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "report.html",
        *,
        every_n_batches: int = 10,
        every_n_seconds: float = 10.0,
        max_overhead: float | None = 0.02,
    ) -> None:
        super().__init__()
        require_at_least("every_n_batches", every_n_batches, 1)
        if not is_number(every_n_seconds) or not every_n_seconds >= 0.0:
            raise ValueError(f"expected every_n_seconds >= 0, got {every_n_seconds!r}")
        require_fraction("max_overhead", max_overhead)
        if not Path(path).name or Path(path).is_dir():
            raise ValueError(f"expected path to be that of a file, such as 'report.html', got {str(path)!r}")
        for name in ("matplotlib", "jinja2"):
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"TrainingReport needs {name}: pip install 'lightning_ifthpo[plots]'")
        self.path = Path(path)
        self._state_key = f"{type(self).__qualname__}{{'path': {str(self.path)!r}}}"  # the Trainer asks at every hook
        self.every_n_batches = every_n_batches
        self.every_n_seconds = every_n_seconds
        self.max_overhead = max_overhead
        self._restart()

    def _restart(self) -> None:
        self._collector = Collector()
        self._findings: list[Finding] = []
        self._charts: dict[str, str] = {}
        self._error = ""
        self._notes = Notes()
        self._is_open = self._is_active = self._has_warned = self._misses_beginning = False
        share = float("inf") if self.max_overhead is None else self.max_overhead / 2
        self._looking, self._drawing = Clock(share, free=_FREE), Clock(share, expected=_CHARTS)
        self._written = 0.0  # seconds after the start

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong with the run, worst first, as of the last page; empty if nothing unusual was seen."""
        return tuple(self._findings)

    @property
    def state_key(self) -> str:
        """Distinguishes differently configured instances in a checkpoint."""
        return self._state_key

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers, strings and lists."""
        return self._collector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a result of `state_dict`; one of another version is not restored, with a warning."""
        collector = Collector()
        with self._tolerating_failures():
            collector.load_state_dict(state_dict)
            self._collector = collector

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with a report that was written to another path, if the checkpoint has no state for this one."""
        states: dict[str, Any] = checkpoint.get("callbacks", {})
        others = (state for key, state in states.items() if key.startswith(f"{type(self).__qualname__}{{"))
        if self.state_key not in states and (other := next(others, None)):
            self.load_state_dict(other)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Resets the callback; a checkpoint that belongs to this fit is loaded after this."""
        if stage == "fit":
            self._restart()
            self._is_open = trainer.is_global_zero
            self._notes.begin()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the first page, which has no charts yet."""
        if trainer.is_global_zero:
            self._is_active = True
            self._misses_beginning = trainer.global_step > 0 and not self._collector.batches
            self._write(trainer, pl_module, "Training has begun.")
            if not self._has_warned:
                rank_zero_info(f"TrainingReport: {self.path.absolute().as_uri()} shows how training goes on")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Decides whether to look at this batch."""
        if self._is_active:
            self._collector.begin_batch(self.every_n_batches, self._looking.affords)

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the gradient of a micro-batch."""
        if self._is_active and self._collector.backward_is_watched():
            with self._tolerating_failures():
                self._collector.backward(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at gradients."""
        if self._is_active and self._collector.step_is_watched():
            with self._looking.working(), self._tolerating_failures():
                self._collector.before_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at losses, metrics and updates, and writes a page if it is time."""
        if not self._is_active or not self._collector.end_batch(trainer, pl_module, outputs, self.every_n_batches):
            return
        with self._looking.working(), self._tolerating_failures():
            self._collector.collect(trainer, pl_module)
        if self._looking.elapsed - self._written >= self.every_n_seconds:
            self._write(trainer, pl_module, f"Training, {self._batches}.", draws=self._drawing.affords())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares epochs."""
        self._collector.end_epoch()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks at the modes of layers."""
        if self._is_active and batch_idx == 0:
            self._collector.validate(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads validation losses."""
        if self._is_active:
            with self._tolerating_failures():
                self._collector.end_validation(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the last page, when other callbacks have made their summaries, and tells the worst finding."""
        self._finish(trainer, pl_module, f"Training is over, {self._batches}.")
        if self._findings and not self._has_warned:
            rank_zero_info(f"TrainingReport: found {self._findings[0].kind!r}; see {self.path.absolute().as_uri()}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the last page, also if training has not begun: an older page would be taken for one of this run."""
        kind = type(exception).__name__
        after = f", {self._batches}" if self._collector.batches else " before the first training batch"
        error = f"{kind}: {exception}" if isinstance(exception, Exception) else ""  # Ctrl-C is none
        self._finish(trainer, pl_module, f"Training was ended by {kind}{after}.", error)

    @property
    def _batches(self) -> str:
        count = self._collector.batches
        since = " since the run was resumed, without a report of what was before" if self._misses_beginning else ""
        return f"one training batch{since}" if count == 1 else f"{count:,} training batches{since}"

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, state: str, error: str = "") -> None:
        self._notes.end()
        if self._is_open:
            self._is_open = self._is_active = False
            self._error = error
            self._write(trainer, module, state, draws=True, is_over=True)

    def _write(
        self, trainer: L.Trainer, module: L.LightningModule, state: str, *, draws: bool = False, is_over: bool = False
    ) -> None:
        """Writes a page, with charts as they are, or were when they were drawn the last time."""
        from lightning_ifthpo.callbacks.training_report import page  # imports matplotlib and Jinja2

        with self._tolerating_failures():
            facts = self._collector.facts(trainer, module, is_over=is_over, error=self._error)
            self._findings = diagnose(facts)
            extras = self._collector.extras(trainer, module, self._own_share)
            sections = sections_of(facts, replace(extras, told=self._notes.messages))
            if draws:
                with self._drawing.working():
                    self._charts = page.drawn(sections)
            heading = page.Heading(type(module).__name__, state, facts.batches, is_over)
            _replace(self.path, page.render(heading, self._findings, sections, self._charts))
        self._written = self._looking.elapsed

    @property
    def _own_share(self) -> dict[str, float]:
        own = self._looking.seconds + self._drawing.seconds
        return {type(self).__name__: own / elapsed} if (elapsed := self._looking.elapsed) else {}

    @contextmanager
    def _tolerating_failures(self) -> Iterator[None]:
        """Warns of the first error, so that a report does not end the training."""
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                rank_zero_warn(
                    f"TrainingReport failed, and training goes on: {type(error).__name__}: {error}. Further failures "
                    "are not reported"
                )


def _replace(path: Path, text: str) -> None:
    """Writes a file that takes the place of an older one at once, so that a reader never sees a part of it."""
    path = path.resolve()  # a link stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8", errors="replace")  # names may have what UTF-8 has not
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise

"""Measuring what a fit with hyper steps has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from statistics import fmean
from typing import Any

from lightning_ifthpo.callbacks.hyper_metrics import extents, named_numbers
from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.callbacks.summary import Change, Losses, TuningSummary, judge, remarks
from lightning_ifthpo.core.random_state import isolated
from lightning_ifthpo.runtime.cadence import Cadence
from lightning_ifthpo.runtime.telling import rank_zero_warn

_HELD_OUT = 8  # batches


class Report:
    """Values of the hyperparameters, and losses of the same examples, at the start of a fit and at its end.

    Args:
        stepper: Makes the hyper steps, and evaluates losses.
        module: A LightningModule with the bilevel mixin.
        source: The loader of outer batches that hyper steps use.
        held_out: Loader of batches that nothing learns from, or None.
        state: A result of `state_dict`; empty for a new start.
    """

    def __init__(
        self,
        stepper: HyperStepper,
        module: Any,
        source: Iterable[Any],
        held_out: Iterable[Any] | None,
        state: Mapping[str, Any],
    ) -> None:
        self._stepper, self._module = stepper, module
        self._source, self._held_out_source = source, held_out
        self._held_out: list[Any] = []
        self._start: dict[str, tuple[float, float, float]] = state.get("start") or extents(module)
        self._parts: dict[str, dict[str, float]] = state.get("parts") or named_numbers(module)
        self._held_out_start: float | None = state.get("held_out_start")

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that resuming needs, as plain numbers."""
        return {"start": self._start, "parts": self._parts, "held_out_start": self._held_out_start}

    def begin(self) -> None:
        """Takes the first batches of held-out data, and evaluates them.

        Raises:
            ValueError: If there is none, or the outer loss fails on them.
        """
        if self._held_out_source is None:
            return
        with isolated(self._module.device):
            batches = list(islice(self._held_out_source, _HELD_OUT))
        if not batches:
            raise ValueError("held_out_dataloader is empty: check its data set, and drop_last with batch_size")
        # as many in each process, or they would wait for each other
        self._held_out = list(islice(cycle(batches), self._stepper.ranks.broadcast_int(len(batches))))
        try:
            loss = self._stepper.mean_loss(self._held_out)
        except Exception as error:
            raise ValueError(
                f"held_out_dataloader: its batches have no outer loss ({type(error).__name__}: {error}); they should "
                "be like outer batches"
            ) from error
        if self._held_out_start is None:
            self._held_out_start = loss

    def summary(
        self, skipped: Mapping[str, int], cadence: Cadence, shared: str = "", *, evaluated: bool = True
    ) -> TuningSummary:
        """Returns the summary of the hyper steps so far.

        Args:
            skipped: Number of skipped hyper steps for each cause.
            cadence: Of the hyper steps.
            shared: How many outer examples are training examples, as "8 of 20"; empty if there are none.
            evaluated: Whether to evaluate losses at the end, or to take the last one that is known.
        """
        evidence = self._stepper.evidence
        outer = self._outer_losses(evaluated=evaluated)
        held_out = self._held_out_losses() if evaluated else None
        verdict, reason, advice = judge(evidence, outer, held_out, cadence.remedy, shared)
        return TuningSummary(
            verdict=verdict,
            reason=reason,
            advice=(*advice, *remarks(self._module, evidence)),
            hyperparameters=tuple(self._changes()),
            outer_loss=outer,
            held_out_loss=held_out,
            predicted=evidence.predicted,
            confirmed=evidence.confirmed,
            error=evidence.error,
            hyper_steps=self._stepper.steps,
            skipped=dict(skipped),
            replaced=self._stepper.replaced,
            share_of_time=cadence.share_of_time,
            curvature=self._stepper.curvature,
        )

    def _changes(self) -> Iterator[Change]:
        parts = named_numbers(self._module)
        for name, end in extents(self._module).items():
            pairs = {part: (self._parts[name][part], value) for part, value in parts.get(name, {}).items()}
            yield Change(name, self._start[name], end, pairs)

    def _outer_losses(self, *, evaluated: bool) -> Losses | None:
        evidence = self._stepper.evidence
        if not evidence.steps:
            return None
        start, end = fmean(evidence.first_losses.values()), evidence.last_loss
        if evaluated:
            with self._told("outer"):
                end = self._stepper.mean_loss(self._stepper.outer_batches(self._source, evidence.first_losses))
        return start, end

    def _held_out_losses(self) -> Losses | None:
        if self._held_out_start is not None and self._held_out:
            with self._told("held-out"):
                return self._held_out_start, self._stepper.mean_loss(self._held_out)
        return None

    @contextmanager
    def _told(self, loss: str) -> Iterator[None]:
        """Turns an error into a warning, as the training is done; of several processes the others would wait."""
        try:
            yield
        except Exception as error:
            if self._stepper.ranks.count > 1:
                raise
            rank_zero_warn(
                f"IFTHypergradient could not measure the {loss} loss at the end: {type(error).__name__}: {error}"
            )

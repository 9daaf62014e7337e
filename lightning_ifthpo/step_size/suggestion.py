"""What a race of learning rates has shown."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_ifthpo.step_size.race import RateTrial


@dataclass(frozen=True)
class RateSuggestion:
    """A learning rate to begin a decaying schedule with, such as a cosine, and how it was found.

    Attributes:
        lr: The suggested rate, the highest of all parameter groups.
        lrs: The rate of each parameter group, in the ratios in which the optimizer was made.
        edge: The highest rate at which the first update does not raise the loss of its batch, for the highest group:
            the median of four batches, within 10 %. No trial was made above it. Infinite if no rise was found.
        trials: The rates that were tried, ascending, for the highest group, each with the mean training loss that it
            ended with on four batches that are the same for all; infinite if the trial diverged.
        trial_steps: Optimizer steps of each trial.
        steps: Optimizer steps in all.
        is_open: Whether the lowest or the highest rate that was tried is the best, so that one beyond it may be better.

    >>> trials = (RateTrial(0.025, 1.3), RateTrial(0.1, 1.2), RateTrial(0.4, math.inf))
    >>> suggestion = RateSuggestion(0.1, (0.1, 0.01), edge=0.5, trials=trials, trial_steps=20, steps=64)
    >>> print(suggestion)
    0.1, by 3 trials of 20 steps; the first update does not raise the loss below 0.5; 1 diverged
    """

    lr: float
    lrs: tuple[float, ...]
    edge: float
    trials: tuple[RateTrial, ...]
    trial_steps: int
    steps: int
    is_open: bool = False

    def __str__(self) -> str:
        steps = "one step" if self.trial_steps == 1 else f"{self.trial_steps} steps"
        text = f"{self.lr:.3g}, by {len(self.trials)} trials of {steps}"
        text += f"; the first update does not raise the loss below {self.edge:.3g}" if math.isfinite(self.edge) else ""
        lost = sum(math.isinf(trial.loss) for trial in self.trials)
        text += f"; {lost} diverged" if lost else ""
        if self.is_open:
            side = ("lowest", "lower") if self.lr == self.trials[0].lr else ("highest", "higher")
            text += "; the {} rate that was tried is the best, and a {} one may be better".format(*side)
        return text

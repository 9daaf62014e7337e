"""What becomes of hyper steps that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import lightning as L
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_ifthpo.callbacks.hyper_step import HyperStepper
from lightning_ifthpo.hypergradients import Hypergradient
from lightning_ifthpo.runtime.telling import rank_zero_warn
from lightning_ifthpo.solvers import Status
from lightning_ifthpo.solvers.causes import Cause

Policy: TypeAlias = Literal["skip", "use", "raise"]
"""See `IFTHypergradient`."""


class Failures:
    """Skips hyper steps that fail, uses them or raises an error, counts them by cause, and warns of the first.

    Args:
        policy: `on_failure` of `IFTHypergradient`.

    Attributes:
        causes: Number of hyper steps that were skipped, for each cause.
    """

    def __init__(self, policy: Policy) -> None:
        self.causes: dict[str, int] = {}
        self._policy = policy
        self._has_warned = False
        self._has_remarked = False

    @property
    def reports_next(self) -> bool:
        """Whether the next failure is reported, so that a diagnosis, which costs products, is worth its price."""
        return not self._has_warned or self._policy == "raise"

    @contextmanager
    def skipping_without_memory(self, trainer: L.Trainer, stepper: HyperStepper) -> Iterator[None]:
        """Skips a hyper step that runs out of memory, if it may be skipped."""
        reason = ""
        try:
            yield
        except RuntimeError as error:
            # if one process skips alone, the others wait forever
            if self._policy == "raise" or trainer.world_size > 1 or not is_oom_error(error):
                raise
            reason = f"hyper step {stepper.steps} ran out of memory ({str(error).splitlines()[0]})"
        if reason:
            garbage_collection_cuda()  # outside the except block, the error no longer holds its tensors
            advice = "a smaller outer batch or curvature='finite_difference' needs less"
            self._skip("out of memory", f"{reason}; {advice}")

    def accepts(self, result: Hypergradient, doubt: str, step: int) -> bool:
        """Returns whether to use a result, and reports a failed solve, or a doubt about the outer loss.

        Raises:
            RuntimeError: If it failed, and the policy is "raise".
        """
        if result.status.succeeded and not doubt:
            self._remark(result.diagnosis, step)
            return True
        reason = f"hyper step {step} "
        reason += f"is doubtful: {doubt}" if doubt else f"ended with status {result.status.value!r}: {result.diagnosis}"
        if self._policy == "raise":
            raise RuntimeError(reason)
        usable = self._policy == "use" and result.status is not Status.NONFINITE
        if usable:
            self._warn_once(f"{reason}. It is used nevertheless; further ones are not reported")
        else:
            self._skip("doubtful outer loss" if doubt else result.status.value, reason)
        return usable

    def _skip(self, cause: str, reason: str) -> None:
        self.causes[cause] = self.causes.get(cause, 0) + 1
        self._warn_once(f"{reason}. It is skipped; further ones are not reported, but counted in hypergrad/skipped")

    def _warn_once(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            rank_zero_warn(message)

    def _remark(self, diagnosis: str, step: int) -> None:
        """Warns once if the outer loss ignores the weights; other remarks on a solve that succeeded pass in a fit."""
        if not self._has_remarked and Cause.ZERO_RIGHT_HAND_SIDE.words in diagnosis:
            self._has_remarked = True
            rank_zero_warn(f"hyper step {step}: {diagnosis}")

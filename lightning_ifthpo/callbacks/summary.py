"""What a run with hyper steps has done, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_ifthpo.callbacks.evidence import Evidence
from lightning_ifthpo.hyperparameters import SampleWeights
from lightning_ifthpo.hyperparameters.bounded import Bounded

Verdict: TypeAlias = Literal["helped", "did nothing", "harmed", "unclear"]

# Measured on the runs of examples/experiments/without_tuning.py with seeds that are not shown.
_SURE = 2.0  # standard errors
_MUCH = 0.03  # of the outer loss
_FAR = 1.0  # units of the hyperparameters
_FEW = 10  # hyper steps
_EXPLODED = 3.0  # times the outer loss at the start
_FELL = 0.75  # of the outer loss at the start
_AT_BOUND = 0.99
_APART = 1.5  # times the outer loss


@dataclass(frozen=True)
class Change:
    """One registered hyperparameter at the start and at the end: mean, minimum and maximum in natural units."""

    name: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]

    def __str__(self) -> str:
        return f"{self.name}: {_extent(self.start)} → {_extent(self.end)}"


@dataclass(frozen=True)
class TuningSummary:
    """The result of `IFTHypergradient.summary`; print it, or read its attributes.

    Attributes:
        verdict: "helped", "did nothing", "harmed" or "unclear". It judges by the outer loss and by held-out data where
            there are some. Only a second run with `freeze_hyperparameters` can prove it.
        reason: Why, in a sentence or two.
        advice: What to change; empty if nothing.
        hyperparameters: The change of each.
        outer_loss: On the outer batches of the first hyper steps, then and at the end; None before the end.
        held_out_loss: The same for `held_out_dataloader`; None without it.
        predicted: By how much hyper steps predicted to lower the outer loss, in all.
        confirmed: How much of it the next hypergradients confirm.
        error: Standard error of `confirmed`.
        hyper_steps: Number of hyper steps, with the skipped ones.
        skipped: Number of skipped ones for each cause.
        replaced: Number of steps of the hyper-optimizer that were far too long, and were replaced by default ones.
        share_of_time: Time of hyper steps over the time of training with them.
    """

    verdict: Verdict
    reason: str
    advice: tuple[str, ...]
    hyperparameters: tuple[Change, ...]
    outer_loss: tuple[float, float] | None
    held_out_loss: tuple[float, float] | None
    predicted: float
    confirmed: float
    error: float
    hyper_steps: int
    skipped: dict[str, int]
    replaced: int
    share_of_time: float

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as a dict of plain values."""
        return asdict(self)

    def rows(self) -> list[dict[str, float | str]]:
        """Returns a row for each hyperparameter, for a table or a data frame."""
        names = ("mean", "min", "max")
        return [
            {"name": change.name}
            | {f"start_{name}": value for name, value in zip(names, change.start, strict=True)}
            | {f"end_{name}": value for name, value in zip(names, change.end, strict=True)}
            for change in self.hyperparameters
        ]

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {cause}" for cause, count in self.skipped.items())
        lines = [
            f"IFTHypergradient made {self.hyper_steps} hyper steps{f' (skipped: {skipped})' if skipped else ''} in "
            f"{self.share_of_time:.0%} of the time. Verdict: {self.verdict}. {self.reason}"
        ]
        lines += [f"  {change}" for change in self.hyperparameters]
        for name, losses in (("outer loss", self.outer_loss), ("held-out loss", self.held_out_loss)):
            if losses is not None:
                lines.append(f"  {name}: {losses[0]:.4g} → {losses[1]:.4g}")
        lines += [f"  {advice}" for advice in self.advice]
        return "\n".join(lines)


def judge(
    evidence: Evidence, outer: tuple[float, float] | None, held_out: tuple[float, float] | None
) -> tuple[Verdict, str, tuple[str, ...]]:
    """Returns a verdict, the reason, and what to change.

    Args:
        evidence: What was predicted and confirmed.
        outer: The outer loss of the same examples at the start and at the end; None without hyper steps.
        held_out: The same on held-out examples; None without them.
    """
    if outer is None:
        return "did nothing", "The hyperparameters are as they were.", ()
    first, last = outer
    told = (
        f"Hyper steps predicted to lower the outer loss by {evidence.predicted:.2g} in all; the next hypergradients "
        f"confirm {evidence.confirmed:.2g} ± {evidence.error:.1g}."
    )
    control = "Compare with a run after freeze_hyperparameters()."
    has_exploded = abs(last) > _EXPLODED * abs(first) and evidence.travel > _FAR
    if not math.isfinite(last) or has_exploded:
        return "harmed", f"The outer loss went from {first:.3g} to {last:.3g}: training diverges.", (control,)
    advice = _learned_by_heart(outer, held_out)
    share = evidence.confirmed / abs(last) if last else math.inf
    is_sure = abs(evidence.confirmed) > _SURE * evidence.error
    if is_sure and share > _MUCH:
        return "helped", told, advice
    if is_sure and share < -_MUCH:
        return "harmed", f"{told} The hyperparameters moved past the best values.", (*advice, control)
    if evidence.steps < _FEW:
        advice += (f"{evidence.steps} hyper steps are few; train longer, or lower every_n_batches.",)
    if evidence.travel < _FAR:
        moved = f"The hyperparameters moved by {evidence.travel:.2g} units in all (1 is a factor of e, for a decay)."
        return "did nothing", f"{moved} {told}", (*advice, "If they should move further, train longer.")
    if share > -_MUCH and abs(last) < _FELL * abs(first):
        return "did nothing", told, advice
    return "unclear", f"{told} The outer loss hardly fell.", (*advice, control)


def _learned_by_heart(outer: tuple[float, float], held_out: tuple[float, float] | None) -> tuple[str, ...]:
    """Returns a sentence if the outer loss falls and the held-out loss does not follow."""
    if held_out is None or outer[1] >= outer[0] or abs(held_out[1]) <= _APART * abs(outer[1]):
        return ()
    return (
        f"The held-out loss is {held_out[1] / outer[1]:.1f} times the outer loss: the hyperparameters learn the outer "
        "examples by heart. Fewer hyperparameters or more outer examples help, and early stopping on held-out data.",
    )


def remarks(module: Any, evidence: Evidence) -> tuple[str, ...]:
    """Returns sentences on hyperparameters that stand at their upper bound, or have stopped having a hypergradient."""
    found = []
    for name, value in module.named_natural_values():
        kind = getattr(module, name)
        if isinstance(kind, Bounded) and not isinstance(kind, SampleWeights):
            largest = max(float(part.amax()) for part in (value.values() if isinstance(value, Mapping) else [value]))
            if largest > _AT_BOUND * kind.maximum:
                found.append(
                    f"{name!r} stands at its bound, maximum={kind.maximum:g}. If that is no sign of a fault in the "
                    "losses, raise it."
                )
    paths = [path for path, _ in module.named_hyperparameters()]
    for path, last in zip(paths, evidence.last_gradient, strict=False):
        if evidence.steps - last >= _FEW:
            found.append(
                f"{path!r} has had no hypergradient since hyper step {last}: a clamp or a saturated function cuts it "
                "off, and nothing can bring it back. Register positive numbers as Positive(initial)."
            )
    return tuple(found)


def extents(module: Any) -> dict[str, tuple[float, float, float]]:
    """Returns mean, minimum and maximum of each hyperparameter of a module, in natural units."""
    found = {}
    for name, value in module.named_natural_values():
        parts = list(value.values()) if isinstance(value, Mapping) else [value]
        flat = torch.cat([part.reshape(-1) for part in parts]) if len(parts) > 1 else parts[0].reshape(-1)
        found[name] = _mean_min_max(flat)
    return found


def _mean_min_max(flat: Tensor) -> tuple[float, float, float]:
    mean, least, most = torch.stack([flat.mean(), flat.amin(), flat.amax()]).tolist()
    return mean, least, most


def _extent(values: tuple[float, float, float]) -> str:
    mean, least, most = values
    return f"{mean:.3g}" if least == most else f"{mean:.3g} ({least:.3g} to {most:.3g})"

"""What a run with hyper steps has done, for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lightning_ifthpo.callbacks.evidence import Evidence
from lightning_ifthpo.hyperparameters.bounded import Bounded
from lightning_ifthpo.hyperparameters.per_example import PerExample
from lightning_ifthpo.runtime.requirements import hyperparameter_modules

Losses: TypeAlias = tuple[float, float]
"""At the start and at the end."""

Verdict: TypeAlias = Literal["helped", "did nothing", "harmed", "unclear"]

# Chosen on the runs of examples/experiments/without_tuning.py with 300 steps and seeds 0 to 2.
_SURE = 2.0  # standard errors
_MUCH = 0.03  # of the outer loss
_FAR = 1.0  # units of the hyperparameters
_FEW = 10  # hyper steps
_MANY = 10  # lines
_EXPLODED = 3.0  # times the outer loss at the start
_FELL = 0.25  # of the outer loss at the start
_APART = 0.5  # of the outer loss
FURTHER = "If they should move further, train longer; with an optimizer of your own, raise its rate or leave it out."
_CONTROL = "Compare with a run after freeze_hyperparameters()."


@dataclass(frozen=True)
class Change:
    """One registered hyperparameter at the start and at the end, in natural units.

    Attributes:
        name: Its registered name.
        start: Mean, minimum and maximum at the start.
        end: The same at the end.
        parts: Start and end of each number that has a name of its own, such as the weight of a term of the loss, if
            there are at most five.
    """

    name: str
    start: tuple[float, float, float]
    end: tuple[float, float, float]
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.parts:
            named = (f"{part} {first:.3g} → {last:.3g}" for part, (first, last) in self.parts.items())
            return f"{self.name}: {', '.join(named)}"
        return f"{self.name}: {_extent(self.start)} → {_extent(self.end)}"


@dataclass(frozen=True)
class TuningSummary:
    """The result of `IFTHypergradient.summary`; print it, or read its attributes.

    Attributes:
        verdict: "helped", "did nothing", "harmed" or "unclear". It follows from what is confirmed, and is "unclear" if
            the outer or the held-out loss ends higher than it began, or outer examples are learned by heart or are all
            training examples, without held-out data. Only a second run after `freeze_hyperparameters` can prove it.
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
        curvature: The curvature of their linear systems, such as "gauss_newton"; with "auto" the one that was chosen.
    """

    verdict: Verdict
    reason: str
    advice: tuple[str, ...]
    hyperparameters: tuple[Change, ...]
    outer_loss: Losses | None
    held_out_loss: Losses | None
    predicted: float
    confirmed: float
    error: float
    hyper_steps: int
    skipped: dict[str, int]
    replaced: int
    share_of_time: float
    curvature: str

    def as_dict(self) -> dict[str, Any]:
        """Returns all of it as a dict of plain values."""
        return asdict(self)

    def result(self) -> tuple[dict[str, float], dict[str, float]]:
        """Returns the tuned values and the final outer loss, by the names that loggers get them under."""
        tuned = {f"hyperparameter/{change.name}": change.end[0] for change in self.hyperparameters}
        return tuned, {"hypergrad/final_outer_loss": math.nan if self.outer_loss is None else self.outer_loss[1]}

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
        counts = [f"{count} skipped: {cause}" for cause, count in self.skipped.items()]
        counts += [f"{self.replaced} too long and replaced by default ones"] if self.replaced else []
        steps = "one hyper step" if self.hyper_steps == 1 else f"{self.hyper_steps} hyper steps"
        lines = [
            f"IFTHypergradient made {steps}{' (' + ', '.join(counts) + ')' if counts else ''} in "
            f"{self.share_of_time:.0%} of the time. Verdict: {self.verdict}. {self.reason}"
        ]
        lines += [f"  {change}" for change in self.hyperparameters[:_MANY]]
        if len(self.hyperparameters) > _MANY:
            lines.append(f"  and {len(self.hyperparameters) - _MANY} more, see summary().rows()")
        for name, losses in (("outer loss", self.outer_loss), ("held-out loss", self.held_out_loss)):
            if losses is not None:
                lines.append(f"  {name}: {losses[0]:.4g} → {losses[1]:.4g}, by training and tuning together")
        lines += [f"  {advice}" for advice in self.advice[:_MANY]]
        return "\n".join(lines)


def judge(
    evidence: Evidence,
    outer: Losses | None,
    held_out: Losses | None,
    remedy: str = "lower every_n_batches",
    shared: str = "",
) -> tuple[Verdict, str, tuple[str, ...]]:
    """Returns a verdict, the reason, and what to change.

    Args:
        evidence: What was predicted and confirmed.
        outer: The outer loss of the same examples at the start and at the end; None without hyper steps.
        held_out: The same on held-out examples; None without them.
        remedy: What makes hyper steps more frequent.
        shared: How many outer examples are training examples, as "8 of 20".
    """
    if outer is None:
        return "did nothing", "The hyperparameters are as they were.", ()
    first, last = outer
    confirmed, error = evidence.confirmed, evidence.error
    told = (
        f"By the hypergradients that followed, hyper steps changed the outer loss by {-confirmed:+.2g} ± {error:.1g}, "
        f"to first order; {-evidence.predicted:+.2g} was predicted."
    )
    if not math.isfinite(last):
        return "harmed", f"The outer loss is {last}: training diverged.", (_CONTROL,)
    is_sure = abs(confirmed) > _SURE * error and abs(confirmed) > _MUCH * abs(last)
    advice = by_heart = _learned_by_heart(outer, held_out)
    if evidence.steps < _FEW:
        steps = "One hyper step is" if evidence.steps == 1 else f"{evidence.steps} hyper steps are"
        advice += (f"{steps} few; train longer, or {remedy}.",)
    if is_sure and confirmed < 0.0:
        return "harmed", f"{told} The hyperparameters moved past the best values.", (*advice, _CONTROL)
    if evidence.travel < _FAR and not is_sure:
        moved = f"The hyperparameters moved by {evidence.travel:.2g} units in all (1 is a factor of e, for a decay)."
        return "did nothing", f"{moved} {told}", (*advice, FURTHER)
    if 0.0 < _EXPLODED * first < last:
        return "harmed", f"The outer loss rose from {first:.3g} to {last:.3g}.", (*advice, _CONTROL)
    if risen := _risen(outer, held_out):
        return "unclear", f"{told} But {risen}, by training or by tuning.", (*advice, _CONTROL)
    if by_heart:
        return "unclear", f"{told} But it may be true of the outer examples alone.", (*advice, _CONTROL)
    count, _, total = shared.partition(" of ")
    if is_sure and shared and count == total and held_out is None:
        but = "But all outer examples are training examples, so that it says nothing of other data."
        return "unclear", f"{told} {but}", (*advice, "Take outer data that training does not see.")
    if is_sure:
        return "helped", told, advice
    if last < first - _FELL * abs(first):
        return "did nothing", f"{told} The fall of the outer loss comes from training.", advice
    return "unclear", told, (*advice, _CONTROL)


def _risen(outer: Losses, held_out: Losses | None) -> str:
    """Returns which losses have risen, in words; empty if none has by as much as three digits show."""
    pairs = [("outer", outer), *([] if held_out is None else [("held-out", held_out)])]
    shown = [(name, f"{a:.3g}", f"{b:.3g}") for name, (a, b) in pairs]
    risen = [f"the {name} loss rose from {a} to {b}" for name, a, b in shown if float(b) > float(a)]
    return " and ".join(risen)


def is_learned_by_heart(outer: Losses, held_out: Losses) -> bool:
    """Returns whether the outer loss falls, and the held-out loss ever less so.

    Gaps are compared relative to the outer loss. It is first measured at the first hyper steps, and the held-out loss
    before training, so that the first gap can be larger than it was.
    """
    gaps = [behind - ahead for behind, ahead in zip(held_out, outer, strict=True)]
    has_grown = gaps[1] * abs(outer[0]) > gaps[0] * abs(outer[1])
    return outer[1] < outer[0] and has_grown and gaps[1] > _APART * abs(outer[1])


def _learned_by_heart(outer: Losses, held_out: Losses | None) -> tuple[str, ...]:
    """Returns a sentence if outer examples are learned by heart."""
    if held_out is None or not is_learned_by_heart(outer, held_out):
        return ()
    return (
        f"The outer loss ends at {outer[1]:.2g} and the held-out loss at {held_out[1]:.2g}: the hyperparameters learn "
        "the outer examples by heart. Fewer hyperparameters or more outer examples help, and "
        "early stopping on held-out data.",
    )


def remarks(module: Any, evidence: Evidence) -> tuple[str, ...]:
    """Returns sentences on hyperparameters at their upper bound, without a hypergradient, or used in a wrong way."""
    cut_off = _cut_off(module, evidence)
    latest = max(evidence.last_gradient, default=evidence.steps)
    if evidence.steps - latest >= _FEW:
        return (
            f"No hyperparameter has had a hypergradient {_since(latest)}: the outer loss is constant, or flat where "
            "the weights are.",
        )
    found = list(_of_examples(module, evidence))
    for name, value in module.named_natural_values():
        kind = getattr(module, name)
        parts = list(value.values()) if isinstance(value, Mapping) else [value]
        if isinstance(kind, Bounded) and kind.is_at_bound(max(float(part.amax()) for part in parts)):
            found.append(f"{name!r} stands at its bound, maximum={kind.maximum:g}; raise it if that is meant.")
        elif name in cut_off:
            count, total, last = cut_off[name]
            what = repr(name) if total == 1 else f"{count} of {total} tensors of {name!r}"
            cause = (
                "a clamp or a saturated function cuts it off for good; register positive numbers as Positive(initial)"
                if isinstance(kind, Tensor)
                else "it belongs to weights that do not train, or is saturated"
            )
            found.append(f"No hypergradient of {what} {_since(last)}: {cause}.")
    return tuple(found)


def _of_examples(module: Any, evidence: Evidence) -> Iterator[str]:
    """Yields sentences on tables with an entry for each training example that are used in a wrong way."""
    paths, reach = [path for path, _ in module.named_hyperparameters()], evidence.reach
    yield from (
        f"All entries of {path!r} had the same hypergradient at the first hyper step: they acted as one number. "
        "Multiply the loss of each example by its entry before the mean: cross_entropy(..., reduction='none')."
        for path in compress(paths, reach.alike)
    )
    tables = {f"{name}.logits" for name, part in hyperparameter_modules(module) if isinstance(part, PerExample)}
    for (path, table), most, reached in zip(module.named_hyperparameters(), reach.most, reach.reached, strict=False):
        if path in tables and 0 < reached == most < table.numel() and evidence.steps >= _FEW:
            yield (
                f"No hypergradient of {table.numel() - reached} of {table.numel()} entries of {path!r}, as each hyper "
                "step reaches the same ones: take the number of an example in the training set, which IndexedDataset "
                "adds, and not its place in the batch."
            )


def _cut_off(module: Any, evidence: Evidence) -> dict[str, tuple[int, int, int]]:
    """Returns how many of how many tensors have no hypergradient any more, and since when, by registered name."""
    lasts: dict[str, list[int]] = {}
    for (path, _), last in zip(module.named_hyperparameters(), evidence.last_gradient, strict=False):
        lasts.setdefault(path.split(".")[0], []).append(last)
    dead = {name: [last for last in some if evidence.steps - last >= _FEW] for name, some in lasts.items()}
    return {name: (len(some), len(lasts[name]), max(some)) for name, some in dead.items() if some}


def _since(step: int) -> str:
    return f"since hyper step {step}" if step else "in any hyper step"


def _extent(values: tuple[float, float, float]) -> str:
    mean, least, most = values
    return f"{mean:.3g}" if least == most else f"mean {mean:.3g} ({least:.3g} to {most:.3g})"

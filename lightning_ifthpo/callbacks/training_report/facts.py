"""What was seen of a run, as plain data, and what may follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_ifthpo.callbacks.summary import Losses
from lightning_ifthpo.callbacks.training_report.gradients import LayerRecord
from lightning_ifthpo.callbacks.training_report.records import Records
from lightning_ifthpo.callbacks.training_report.training_loss import TrainingLoss


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run.

    Attributes:
        kind: A short name, such as "learning rate too high".
        evidence: The numbers that show it, in a sentence.
        remedy: What to do about it, in a sentence.
        rank: How far up it belongs. A cause has a higher rank than what follows from it.
    """

    kind: str
    evidence: str
    remedy: str
    rank: float


@dataclass(frozen=True)
class Bound:
    """A hyperparameter at its upper bound, in natural units."""

    name: str
    value: float
    maximum: float


@dataclass(frozen=True)
class Tuning:
    """What `IFTHypergradient` has done so far.

    Attributes:
        hyper_steps: Number of hyper steps, with the skipped ones.
        is_amortized: Whether one estimate is improved over all solves, on a new batch each time.
        made: Number of those that moved the hyperparameters.
        predicted: By how much they predicted to lower the outer loss, in all.
        confirmed: How much of it the next hypergradients confirm.
        error: Standard error of `confirmed`.
        travel: How far hyperparameters moved in all, in their units (1 is a factor of e, for a decay); NaN if unknown.
        replaced: Number of steps of the hyper-optimizer that were far too long.
        skipped: Number of skipped hyper steps for each cause.
        bounds: The hyperparameters that are at their upper bound.
        remarks: Sentences of the package on hyperparameters that have no hypergradient any more.
        shared: How many outer examples are training examples, as "8 of 20"; empty if there are none.
        held_out: Held-out loss at the start and at the end; None before the end, or without held-out data.
        outer: The same for the outer loss.
        curvature: The curvature of the linear systems, such as "gauss_newton"; empty if it is not known.
        verdict: Verdict and reason of the summary; empty before the end.
    """

    hyper_steps: int = 0
    is_amortized: bool = True
    made: int = 0
    predicted: float = 0.0
    confirmed: float = 0.0
    error: float = 0.0
    travel: float = math.nan
    replaced: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    bounds: tuple[Bound, ...] = ()
    remarks: tuple[str, ...] = ()
    shared: str = ""
    held_out: Losses | None = None
    outer: Losses | None = None
    curvature: str = ""
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that a diagnosis is made of.

    Attributes:
        batches: Number of training batches so far.
        is_over: Whether the fit has come to its end.
        error: The error that has ended it, as "ValueError: words"; empty without one.
        records: Curves by the name of their metric; "gradient_norm", "validation/<name>".
        loss: The training loss.
        layers: What was seen of each tensor of weights, by name.
        frozen: Names of weights of single layers with requires_grad=False, behind weights that train.
        frozen_share: Share of all weights, by number of entries, that have requires_grad=False.
        evaluating: Layers that are in evaluation mode while the module trains.
        training: Layers that are in training mode during validation.
        is_shuffled: Whether the training loader draws in random order; None if that is unknown, as of a stream.
        is_automatic: Whether the Trainer steps the optimizer, so that there is one loss which it makes smaller.
        untuned: Names of hyperparameters that nothing tunes, and that are as they were registered.
        tuning: What the hyper steps have done; None without them.
    """

    batches: int
    is_over: bool = True
    error: str = ""
    records: Records = field(default_factory=Records)
    loss: TrainingLoss = field(default_factory=TrainingLoss)
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    frozen_share: float = 0.0
    evaluating: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    is_shuffled: bool | None = None
    is_automatic: bool = True
    untuned: tuple[str, ...] = ()
    tuning: Tuning | None = None

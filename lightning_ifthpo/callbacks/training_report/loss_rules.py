"""What a training loss says of a run: one rule for each fault, from facts alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import median

from lightning_ifthpo.callbacks.training_report.facts import Facts, Finding
from lightning_ifthpo.callbacks.training_report.records import mean
from lightning_ifthpo.callbacks.training_report.training_loss import detrended, noise, smoothness

_FEW = 3  # measurements of layers, and of curvature
_FEW_BATCHES = 10
_GROWN = 1.5  # times the loss at the start
_EARLY = 5  # points of the loss
_PEAK = 10.0  # times the loss at the start; also growth, where hyperparameters, games or a stream change the loss
_SURE = 3.0  # standard errors
_OFTEN = 0.03  # of the run: a bad batch is rarer
_FALLEN = 0.8  # of the loss at the start: less than this is progress
_HIGH = 0.4  # of the loss at the start; networks that learn end below, unless labels are noisy
_JUMP = 1.25  # times the loss at the start; momentum and noise alone lift two batches in a row by 1.2
_DOUBLE = 2.0  # times the loss at the start, in one batch of a run that ends no lower than it began
_UNLIKE_NOISE = 5.0  # standard deviations of single batches
_CLIMB = 1.4  # times the lowest eighth of the run
_STILL = 0.02  # of the length of the weights, in a whole run: what trains goes several times their length
_UNMOVED = 0.97  # of the loss at the start
_MANY_BATCHES = 50
_BEYOND_EDGE = 1.5  # edge ratio; training at the edge of stability hovers slightly above 1, by up to 1.2
_ABSURD = 1000.0  # times the edge of stability


def nonfinite_loss(facts: Facts) -> Finding | None:
    """NaN or infinity in the loss, which was not growing before."""
    loss = facts.loss
    if not loss.first_nonfinite or _has_diverged(facts):
        return None
    share = loss.curve.nonfinite / loss.curve.count
    after = (
        "all later losses are, too, so that the weights are lost"
        if loss.curve.nonfinite > facts.batches - loss.first_nonfinite
        else f"{share:.1%} of all losses are"
    )
    before = "" if math.isnan(loss.before_nonfinite) else f", after {loss.before_nonfinite:.3g} on the batches before"
    return Finding(
        "NaN or infinity in a batch",
        f"The training loss of batch {loss.first_nonfinite} is the first that is not finite{before}; {after}.",
        "The loss did not grow before, so look at the data of this batch (missing values, a logarithm or a division by "
        "zero) and at half precision. [i for i, (x, *_) in enumerate(data) if not x.isfinite().all()] lists examples "
        "with missing values, and Trainer(detect_anomaly=True) names the operation.",
        1.0,
    )


def rate_too_high(facts: Facts) -> Finding | None:
    """A loss that grows, jumps up, or hardly falls after jumps or beyond the optimizer's edge of stability."""
    curve, (ratio, highest) = facts.loss.curve, _edge_ratio(facts)
    first, last = _start(facts), mean(curve.part(0.75))
    if not (_has_diverged(facts) or _rises(facts, ratio)):
        return None
    seen = f"The training loss began at {first:.3g}, and was {curve.most:.3g} at most"
    if facts.loss.first_nonfinite:
        seen += f"; it is not finite from batch {facts.loss.first_nonfinite} on"
    else:
        seen += f" and {last:.3g} in the last quarter of the run"
    if not math.isnan(ratio):
        seen += f". {_edge_words(ratio, highest)}"
    counts = [facts.records[name].last for name in facts.records.names() if name.endswith("/alarms")]
    if alarms := max(counts, default=0.0):
        seen += f". SharpnessMonitor gave {alarms:.0f} {'alarm' if alarms == 1.0 else 'alarms'} of divergence"
    # of weights that have exploded the ratio says nothing
    factor = f" by a factor of {ratio:.2g} or more" if 1.0 < ratio < _ABSURD else ", by a factor of 10 to begin with"
    return Finding(
        "learning rate too high", f"{seen}.", f"Lower the learning rate{factor}, or let ExactGeN choose it.", 0.95
    )


def hardly_moved(facts: Facts) -> Finding | None:
    """A loss that stays where it is, because weights do."""
    curve, ratios = facts.loss.curve, facts.records["update_ratio/median"]
    first, last = mean(curve.part(0.0, 0.25)), mean(curve.part(0.75))
    way = mean(ratios.part(0.0)) * facts.batches
    is_still = way < _STILL and last > _UNMOVED * first > 0.0
    if not is_still or not facts.is_automatic or curve.count < _MANY_BATCHES or len(ratios) < _FEW:
        return None
    return Finding(
        "training has hardly moved",
        f"In {facts.batches:,} batches the weights went about {way:.1e} of their length, and the training loss from "
        f"{first:.4g} to {last:.4g} (first and last quarter).",
        "Raise the learning rate, by a factor of 10 at a time, or let ExactGeN choose it; or train longer.",
        0.785,  # dead layers are a cause, and hyperparameters at their bounds may follow
    )


RULES: tuple[Callable[[Facts], Finding | None], ...] = (nonfinite_loss, rate_too_high, hardly_moved)


def _has_diverged(facts: Facts) -> bool:
    """Returns whether the loss is not finite at the end, and grew before it was not."""
    before = facts.loss.before_nonfinite
    return bool(facts.loss.first_nonfinite) and before > max(_PEAK * abs(_start(facts)), facts.loss.curve.most / 2)


def _start(facts: Facts) -> float:
    """Returns the training loss at the start, where a rate that is too high has done little yet; 0 if unknown."""
    first = facts.loss.curve.first
    return 0.0 if math.isnan(first) else first


def _rises(facts: Facts, ratio: float) -> bool:
    """Returns whether the loss grows, jumps up, or does not fall beyond the edge, by more than single batches do."""
    curve, first, values = facts.loss.curve, _start(facts), facts.loss.curve.part(0.0)
    if first <= 0.0 or curve.count < _FEW_BATCHES:
        return False
    begin = values[: max(_EARLY, len(values) // 20)]
    early, last = max(first, mean(begin)), mean(curve.part(0.75))
    is_fixed = facts.tuning is None and facts.is_automatic and facts.is_shuffled is not None
    single = noise(values)  # the spread of single batches
    grows = last > early * (_GROWN if is_fixed else _PEAK) and last - early > _SURE * single / len(begin) ** 0.5
    stays_beyond_edge = last > _FALLEN * early and ratio > _BEYOND_EDGE
    blew_up = min(values[1:4], default=0.0) > max(_PEAK * first, single)
    level = max(first, median(values))
    peaks = sum(value > _PEAK * level for value in values) / len(values)
    # losses of single examples have such peaks, too, but not next to each other
    has_peaks = peaks > _OFTEN and smoothness(detrended(values)) > _SURE
    return grows or stays_beyond_edge or blew_up or has_peaks or _is_thrown_back(facts)


def _is_thrown_back(facts: Facts) -> bool:
    """Returns whether the loss hardly falls, and jumps above its start or climbs from its lowest level on the way.

    SGD with momentum 0.9 at ten times the best rate does so. One batch is a jump if the run never gets below its start.
    """
    curve, values = facts.loss.curve, facts.loss.curve.part(0.0)
    level, single = mean(curve.part(0.75)), noise(curve.part(0.75))
    is_fixed = facts.is_shuffled and facts.is_automatic  # sorted data, streams and games go up and down by themselves
    if not is_fixed or facts.loss.first_nonfinite or not level > _HIGH * curve.first:
        return False
    highest = max(map(min, pairwise(values)))  # of two batches in a row, because one may be a bad batch
    jumps = highest > _JUMP * max(curve.first, level) and highest - level > _UNLIKE_NOISE * single
    eighths = [mean(curve.part(k / 8, (k + 1) / 8)) for k in range(8)]
    # the median, because a bad batch in the last quarter lifts its mean
    is_lost = median(curve.part(0.75)) >= curve.first and curve.most > _DOUBLE * curve.first
    is_lost = is_lost and curve.most - level > _UNLIKE_NOISE * single
    rise, error = level - min(eighths), single / (len(values) / 8) ** 0.5
    climbs = level > _CLIMB * min(eighths) and rise > _UNLIKE_NOISE * error
    return jumps or ((climbs or is_lost) and facts.tuning is None)


def _edge_words(ratio: float, highest: float) -> str:
    """Returns a clause on λ_max, with the highest value first: a rate that is too high may end in a flat region."""
    edge = "the optimizer's edge of stability (1 is the edge)"
    if highest <= max(1.0, 1.01 * ratio):
        return f"λ_max is {ratio:.2g} times {edge}"
    region = ", where training has ended in a flatter region" if ratio < 1.0 else ""
    return f"λ_max was up to {highest:.3g} times {edge}, and {ratio:.2g} times in the second half of the run{region}"


def _edge_ratio(facts: Facts) -> tuple[float, float]:
    """Returns λ_max over the stability edge, its median in the second half of the run and its highest value, or NaN.

    Ratios along single steps, by the critical step, are left out: they scatter over orders of magnitude.
    """
    critical = {name.removesuffix("critical") for name in facts.records.names() if name.endswith("/critical")}
    for name in facts.records.names():
        if not name.endswith("/edge_ratio") or name.removesuffix("edge_ratio") in critical:
            continue
        if len(values := facts.records[name].part(0.5)) >= _FEW:
            return median(values), facts.records[name].most
    return math.nan, math.nan

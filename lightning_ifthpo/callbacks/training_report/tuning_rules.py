"""What can be wrong with tuning: one rule for each fault, from facts alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

from lightning_ifthpo.callbacks.summary import FURTHER, is_learned_by_heart
from lightning_ifthpo.callbacks.training_report.facts import Facts, Finding, Tuning
from lightning_ifthpo.callbacks.training_report.records import mean

_FEW = 10  # hyper steps
_SURE = 2.0  # standard errors
_MUCH = 0.03  # of the outer loss
_REPLACED = 0.05  # of the hyper steps
_SKIPPED = 0.1  # of the hyper steps
_INACCURATE = 0.9  # relative residual; 1 is that of no solution at all
_STALE = 3.0  # that of an estimate, on a batch that it has not seen; up to 1.5 in runs in which tuning helps
_STILL = 1e-3  # units of the hyperparameters
_RISEN = 1.1  # times the lowest validation loss; weights alone that fit the training data raised it by 1.06
_FALLEN = 0.75  # of the outer loss at that time
_POINTS = 6  # of the validation loss

_CAUSES = {
    "negative_curvature": (
        "solves meet negative curvature",
        "Mark the outputs (mark_outputs), which gives Gauss–Newton curvature, or use damping, such as "
        "damping='horizon', or start_after_batches.",
    ),
    "nonfinite": ("solves end in NaN or infinity", "Look for NaN in the outer data, and at the scale of the losses."),
    "diverged": ("solves diverge", "Use step_size='auto', the default solver, or a lower learning rate of training."),
    "max_iterations": (
        "solves do not converge",
        "Allow more iterations, raise the damping or rtol, or use the default solver.",
    ),
    "out of memory": ("hyper steps run out of memory", "Use a smaller outer batch, or curvature='finite_difference'."),
    "doubtful outer loss": (
        "the outer loss is doubtful",
        "Running statistics, as those of BatchNorm, do not fit the weights yet: set start_after_batches.",
    ),
}


def untuned(facts: Facts) -> Finding | None:
    """Hyperparameters in a run without a callback that tunes them."""
    if not facts.untuned:
        return None
    return Finding(
        "nothing tunes the hyperparameters",
        f"{', '.join(map(repr, facts.untuned))} stay as they were registered, because the Trainer has no "
        "IFTHypergradient among its callbacks.",
        "Add IFTHypergradient(), or call freeze_hyperparameters() if this is meant, as in a run to compare with.",
        0.72,
    )


def shared_data(facts: Facts) -> Finding | None:
    """Outer examples that are training examples."""
    if facts.tuning is None or not facts.tuning.shared:
        return None
    remedy = (
        "Take outer data that training does not see, unless both losses are meant for the same data, as in a game: on "
        "training data hyperparameters learn what helps to fit these."
    )
    return Finding(
        "outer data are training data",
        f"{facts.tuning.shared} outer examples are training examples, too.",
        remedy,
        0.83,
    )


def rate_too_high(facts: Facts) -> Finding | None:
    """Hyper steps that are too long, or that do harm."""
    tuning = facts.tuning
    if tuning is None or not tuning.made:
        return None
    remedy = (
        "Lower the learning rate of the hyper-optimizer, or leave out configure_hyper_optimizer: the default has none."
    )
    if tuning.replaced > _REPLACED * tuning.made:
        return Finding(
            "hyper rate too high",
            f"{tuning.replaced} of {tuning.made} steps of the hyper-optimizer were longer than weights can follow, and "
            "were replaced by default ones.",
            remedy,
            0.82,
        )
    if tuning.confirmed < -_SURE * tuning.error and -tuning.confirmed > _MUCH * _outer_level(facts):
        return Finding(
            "hyper rate too high",
            f"Hyper steps predicted to lower the outer loss by {tuning.predicted:.2g}; by the hypergradients that "
            f"followed, they raised it by {-tuning.confirmed:.2g} ± {tuning.error:.1g}. They go past the best values.",
            remedy,
            0.82,
        )
    return None


def failing_solves(facts: Facts) -> Finding | None:
    """Solves that fail, by their main cause."""
    tuning = facts.tuning
    if tuning is None or not tuning.skipped:
        return None
    cause, count = max(tuning.skipped.items(), key=lambda pair: pair[1])
    is_lost = cause == "nonfinite" and facts.loss.first_nonfinite > 0  # training itself has no finite loss any more
    if is_lost or count <= _SKIPPED * tuning.hyper_steps:
        return None
    kind, remedy = _CAUSES.get(cause, (f"solves end with status {cause}", "See summary() for the cause."))
    share = count / max(1, tuning.hyper_steps)
    evidence = f"{count} of {tuning.hyper_steps} hyper steps ({share:.0%}) were skipped for this reason."
    return Finding(kind, evidence, remedy, 0.81)


def learned_by_heart(facts: Facts) -> Finding | None:
    """An outer loss that falls while the loss of other data does not."""
    if facts.tuning is None or facts.tuning.travel < _STILL:
        return None
    seen = _held_out_gap(facts.tuning) or _validation_rise(facts)
    if not seen:
        return None
    return Finding(
        "outer data are learned by heart",
        seen,
        "Use fewer hyperparameters or more outer examples, and stop early by a loss on held-out data.",
        0.79,
    )


def at_bound(facts: Facts) -> Finding | None:
    """A hyperparameter at its upper bound."""
    for bound in facts.tuning.bounds if facts.tuning else ():
        return Finding(
            "hyperparameter at its bound",
            f"{bound.name!r} is {bound.value:.4g}, and its maximum is {bound.maximum:.4g}, where steps hardly move it.",
            "Raise maximum= if such values are meant; otherwise look at whether the outer data differ from the "
            "training data.",
            0.78,
        )
    return None


def odd_hypergradients(facts: Facts) -> Finding | None:
    """A hyperparameter without a hypergradient, or whose entries all have the same one."""
    for remark in facts.tuning.remarks if facts.tuning else ():
        if "hypergradient" in remark:
            seen, _, remedy = remark.partition(": ")
            kind = "entries with the same" if "same hypergradient" in seen else "hyperparameter without a"
            return Finding(f"{kind} hypergradient", f"{seen}.", remedy[:1].upper() + remedy[1:], 0.77)
    return None


def stale_estimate(facts: Facts) -> Finding | None:
    """Solves whose residual stays large."""
    residuals = facts.records["hypergrad/residual"].part(0.5)
    if facts.tuning is None or facts.tuning.made < _FEW or len(residuals) < _FEW // 2:
        return None
    if median(residuals) < (_STALE if facts.tuning.is_amortized else _INACCURATE):
        return None
    return Finding(
        "inaccurate hypergradients",
        f"The relative residual of the solves is {median(residuals):.2g} (median of the second half of the run); 1 "
        "means no solution at all.",
        "Take more products for each solve, raise the damping or shorten the horizon, or make hyper steps more often, "
        "so that the estimate keeps up with the weights.",
        0.74,
    )


def few_hyper_steps(facts: Facts) -> Finding | None:
    """A run that is over after a handful of hyper steps."""
    if facts.tuning is None or not facts.is_over or facts.tuning.hyper_steps >= _FEW:
        return None
    return Finding(
        "too few hyper steps",
        f"The run of {facts.batches} batches had {facts.tuning.hyper_steps} hyper steps, which hardly move anything.",
        "Train longer, or lower every_n_batches or start_after_batches.",
        0.76,
    )


def no_movement(facts: Facts) -> Finding | None:
    """Hyperparameters that stay where they are in spite of many hyper steps."""
    if facts.tuning is None or facts.tuning.made < _FEW or not facts.tuning.travel < _STILL:
        return None
    return Finding(
        "hyperparameters do not move",
        f"{facts.tuning.made} hyper steps moved them by {facts.tuning.travel:.1e} units in all (1 is a factor of e, "
        "for a decay).",
        f"{FURTHER} Leave out the options of the solver, too. If all are the defaults, the outer loss hardly depends "
        "on these hyperparameters.",
        0.73,
    )


RULES: tuple[Callable[[Facts], Finding | None], ...] = (
    untuned,
    shared_data,
    rate_too_high,
    failing_solves,
    learned_by_heart,
    at_bound,
    odd_hypergradients,
    few_hyper_steps,
    stale_estimate,
    no_movement,
)


def _outer_level(facts: Facts) -> float:
    """Returns the size of the outer loss at present; 0 if it is unknown."""
    level = mean(facts.records["hypergrad/outer_loss"].part(0.75))
    return abs(level) if math.isfinite(level) else 0.0


def _held_out_gap(tuning: Tuning) -> str:
    """Returns what held-out data say, if outer examples are learned by heart; else nothing."""
    if tuning.held_out is None or tuning.outer is None or not is_learned_by_heart(tuning.outer, tuning.held_out):
        return ""
    outer, held_out = (f"from {first:.3g} to {last:.3g}" for first, last in (tuning.outer, tuning.held_out))
    return f"The outer loss went {outer}, and the held-out loss {held_out}."


def _validation_rise(facts: Facts) -> str:
    """Returns what the validation loss says, if it rises while the outer loss falls; else nothing."""
    outer = facts.records["hypergrad/outer_loss"]
    for name in facts.records.names("validation/"):
        values = facts.records[name].part(0.0)
        lowest = min(range(len(values)), key=values.__getitem__, default=0)
        place = (lowest + 0.5) / max(1, len(values))  # as a fraction of the run
        if len(values) < _POINTS or place > 0.75:
            continue
        end = mean(values[-(len(values) // 4) :])
        first, last = mean(outer.part(max(0.0, place - 0.1), place + 0.1)), mean(outer.part(0.75))
        if end > _RISEN * values[lowest] > 0.0 and last < _FALLEN * first:
            return (
                f"{name.split('/', 1)[1]!r} rose from {values[lowest]:.3g} to {end:.3g}, while the outer loss went "
                f"from {first:.3g} to {last:.3g}."
            )
    return ""

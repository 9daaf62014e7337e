"""What can be wrong with a fit, its weights, layers and data: one rule for each fault, from facts alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from textwrap import shorten

from lightning_ifthpo.callbacks.training_report.facts import Facts, Finding
from lightning_ifthpo.callbacks.training_report.gradients import LayerRecord
from lightning_ifthpo.callbacks.training_report.records import mean

_FEW = 3  # measurements of layers, and of curvature
_SURE = 3.0  # standard errors
_TINY = 1e-4  # of the largest gradient; rounding alone moves a bias in front of BatchNorm
_VANISHED = 0.01  # of the length of the weights at the start
_DEAD = 0.5  # share of the units of a layer
_MOST_FROZEN = 0.9  # of all weights; with more, adapters are trained
_ALIKE = 0.8  # correlation of epochs
_UNEVEN = 0.05  # standard deviation of the loss along an epoch over its mean
_UP = 0.2  # share of rises along an epoch; a loss that falls has 0
_NAMES = 4  # that are listed
_LONG = 500  # characters of an error


def error(facts: Facts) -> Finding | None:
    """An error that has ended the fit."""
    if not facts.error:
        return None
    when = f"after {facts.batches:,} training batches" if facts.batches else "before the first training batch"
    return Finding(
        "an error ended the run",
        f"{shorten(facts.error, _LONG).rstrip('.')}. It came {when}.",
        "Do what the message says; the console shows where it arose. What else stands here is of the time before.",
        2.0,
    )


def weights_vanish(facts: Facts) -> Finding | None:
    """Weights that shrink to nothing, as under far too much decay."""
    layers = [layer for layer in facts.layers.values() if layer.first_norm > 0.0 and layer.measurements >= _FEW]
    before, now = (math.hypot(*values) for values in (_lengths(layers, "first_norm"), _lengths(layers, "least_norm")))
    if not layers or not now < _VANISHED * before:
        return None
    decays = [name for name in facts.records.names("hyperparameter/") if "decay" in name and name.endswith("/mean")]
    grown = [
        f" {name.split('/')[1]!r} went from {facts.records[name].first:.3g} to {facts.records[name].last:.3g}."
        for name in decays[:1]
    ]
    return Finding(
        "weights vanish",
        f"The weights shrank to {now / before:.1e} of their length at the start.{''.join(grown)}",
        "Weight decay is far too strong: lower it, bound it (WeightDecay has maximum=), or lower the learning rate, by "
        "which it is multiplied.",
        0.96,
    )


def wrong_mode(facts: Facts) -> Finding | None:
    """BatchNorm or dropout in evaluation mode while the module trains."""
    if not facts.evaluating:
        return None
    return Finding(
        "evaluation mode during training",
        f"{_listed(facts.evaluating)} in evaluation mode while the module trains: running statistics do not follow, "
        "and dropout does nothing.",
        "Call train() on them before the fit; Trainer keeps the modes that it finds. If they are frozen on purpose, "
        "nothing is wrong.",
        0.85,
    )


def training_mode_in_validation(facts: Facts) -> Finding | None:
    """BatchNorm or dropout in training mode during validation."""
    if not facts.training:
        return None
    return Finding(
        "training mode during validation",
        f"{_listed(facts.training)} in training mode during validation: validation losses depend on the other examples "
        "of a batch, and validation data enter the running statistics.",
        "Leave the modes to the Trainer, or call eval() before validation.",
        0.84,
    )


def dead_layers(facts: Facts) -> Finding | None:
    """Layers whose gradient is exactly zero."""
    dead = _having(facts.layers, lambda layer: layer.zero_gradient >= _FEW)
    if len(dead) == len(facts.layers):  # examples without a loss, if it was not so from the start
        dead = [name for name in dead if facts.layers[name].zero_gradient == facts.layers[name].measurements]
    if not dead or facts.loss.curve.last == 0.0:
        return None
    count = min(facts.layers[name].zero_gradient for name in dead)
    return Finding(
        "no gradient reaches a layer",
        f"The gradient is exactly zero in {_listed(dead, verb='')}, in each of the last {count} measurements.",
        "Units before or behind it are saturated or dead (ReLU that is never positive): lower the learning rate, use a "
        "smaller initialization or LeakyReLU, and look for a factor of zero or a detach.",
        0.8,
    )


def frozen_layers(facts: Facts) -> Finding | None:
    """Trainable weights that never move."""
    unused = _having(facts.layers, lambda layer: layer.without_gradient == layer.measurements >= _FEW)
    still = _having(facts.layers, lambda layer: layer.unmoved == layer.measurements >= _FEW)
    largest = max((layer.gradient for layer in facts.layers.values()), default=0.0)
    still = [name for name in still if facts.layers[name].gradient > _TINY * largest]
    if still:
        return Finding(
            "weights that never move",
            f"{_listed(still)} exactly as at the start, although gradients reach them.",
            "Pass them to the optimizer in configure_optimizers, and look at the learning rate of their group. Weights "
            "in half precision lose short updates by rounding: train in mixed precision.",
            0.75,
        )
    if unused:
        return Finding(
            "weights without a gradient",
            f"{_listed(unused, verb='')} require gradients and never get one.",
            "Use them in the loss without detach() or no_grad(), or set requires_grad=False.",
            0.7,
        )
    if facts.frozen and facts.frozen_share < _MOST_FROZEN:
        return Finding(
            "frozen weights",
            f"{_listed(facts.frozen, verb='')}, among weights that train, have requires_grad=False.",
            "If they should train, call requires_grad_(True) before the fit. If they are frozen on purpose, nothing is "
            "wrong.",
            0.65,
        )
    return None


def dead_units(facts: Facts) -> Finding | None:
    """Layers of which most units get no gradient."""
    shares = {
        name: layer.dead_units
        for name, layer in facts.layers.items()
        if layer.dead_units > _DEAD and layer.zero_gradient < _FEW and not layer.without_gradient
    }
    if not shares:
        return None
    worst = max(shares, key=lambda name: shares[name])
    return Finding(
        "dead units",
        f"{shares[worst]:.0%} of the units of {worst!r} got a gradient of exactly zero in each of the last "
        f"{len(facts.layers[worst].zero_rows)} measurements.",
        "Use LeakyReLU or GELU, a smaller learning rate, or a smaller initialization of the biases.",
        0.6,
    )


def unshuffled(facts: Facts) -> Finding | None:
    """A loss that depends on the place in the epoch, in the same way in each epoch."""
    loss = facts.loss
    alike, uneven, smooth, up = (
        mean(series.part(0.5)) for series in (loss.likeness, loss.unevenness, loss.smoothness, loss.rises)
    )
    if facts.is_shuffled or not (alike > _ALIKE and uneven > _UNEVEN and smooth > _SURE and up > _UP):
        return None
    return Finding(
        "data are not shuffled",
        f"Along an epoch the training loss varies by {uneven:.0%} of its mean, and in the same way in each epoch "
        f"(correlation {alike:.2f}).",
        "The order of the data is learned and forgotten in turns, as with sorted classes: DataLoader(shuffle=True).",
        0.55,
    )


RULES: tuple[Callable[[Facts], Finding | None], ...] = (
    error,
    weights_vanish,
    wrong_mode,
    training_mode_in_validation,
    dead_layers,
    frozen_layers,
    dead_units,
    unshuffled,
)


def _lengths(layers: Iterable[LayerRecord], attribute: str) -> list[float]:
    return [getattr(layer, attribute) for layer in layers]


def _having(layers: Mapping[str, LayerRecord], condition: Callable[[LayerRecord], bool]) -> list[str]:
    return [name for name, layer in layers.items() if condition(layer)]


def _listed(names: Iterable[str], verb: str | None = None) -> str:
    """Returns some names, and how many more there are, with "is" or "are" behind them."""
    listed = list(names)
    shown = ", ".join(map(repr, listed[:_NAMES]))
    shown += f" and {len(listed) - _NAMES} more" if len(listed) > _NAMES else ""
    if verb is None:
        verb = "is" if len(listed) == 1 else "are"
    return f"{shown} {verb}".rstrip()

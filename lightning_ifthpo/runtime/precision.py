"""The Trainer's precision, and which derivatives it affects."""

from __future__ import annotations

from typing import Literal, TypeAlias

import lightning as L

CurvaturePrecision: TypeAlias = Literal["32", "inherit"]

FIRST_LOSS_SCALE = 2.0**16
"""torch's GradScaler starts from the same factor."""


def precision_of(trainer: L.Trainer) -> str:
    """Returns the name of the Trainer's precision, such as "bf16-mixed"."""
    return str(trainer.precision_plugin.precision)


def has_half_weights(trainer: L.Trainer) -> bool:
    """Returns whether the Trainer keeps the weights in half precision."""
    return precision_of(trainer) in ("16-true", "bf16-true")


def is_autocast(trainer: L.Trainer, precision: CurvaturePrecision) -> bool:
    """Returns whether losses are evaluated under autocast."""
    return "mixed" in precision_of(trainer) and precision == "inherit"


def first_loss_scale(trainer: L.Trainer, precision: CurvaturePrecision) -> float:
    """Returns the first loss scale: larger than 1 for gradients in float16, which rounds small ones to zero."""
    kind = precision_of(trainer)
    return FIRST_LOSS_SCALE if kind == "16-true" or (kind == "16-mixed" and precision == "inherit") else 1.0


def loss_scales(first: float) -> list[float]:
    """Returns a loss scale and smaller ones, down to 1, to try in this order where products overflow.

    They fall by 16 = 2⁴, so that five evaluations reach 1 from 2¹⁶. The Trainer's GradScaler is not used, because its
    state belongs to training.
    """
    scales = [first]
    while scales[-1] > 1.0:
        scales.append(max(1.0, scales[-1] / 16.0))
    return scales

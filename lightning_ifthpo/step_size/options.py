"""Options of ExactGeN."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lightning_ifthpo.core.validation import is_ascending, is_number, require_choice, require_flag
from lightning_ifthpo.curvature.kinds import LossCurvature
from lightning_ifthpo.step_size.rules import AveragedRule, PublishedRule, Rule

DirectionalCurvature: TypeAlias = Literal["three_point"] | LossCurvature
DIRECTIONAL_CURVATURES: tuple[str, ...] = ("three_point", *get_args(LossCurvature))

RULES: dict[str, Callable[[float, float], Rule]] = {"averaged": AveragedRule, "published": PublishedRule}


@dataclass(frozen=True)
class RateOptions:
    """The options that `ExactGeNLR` and `ExactGeN` share; see there."""

    rule: Literal["averaged", "published"] = "averaged"
    probe: Literal["next_batch", "same_batch"] = "next_batch"
    lr_min: float = 1e-8
    lr_max: float = 1e3
    final_decay: float = 0.6
    per_group: bool = False

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, tuple(RULES))
        require_choice("probe", self.probe, ("next_batch", "same_batch"))
        low, high = self.lr_min, self.lr_max
        if not (is_ascending(0.0, low, math.inf) and is_ascending(0.0, high, math.inf) and low <= high):
            raise ValueError(f"expected 0 < lr_min <= lr_max < infinity, got {low!r} and {high!r}")
        if not (is_number(self.final_decay) and 0.0 <= self.final_decay <= 1.0):
            raise ValueError(f"expected 0 <= final_decay <= 1, a fraction of the run, got {self.final_decay!r}")
        require_flag("per_group", self.per_group)
        if self.per_group and self.probe == "same_batch":
            raise ValueError("per_group=True needs probe='next_batch': on the same batch no other group has moved")

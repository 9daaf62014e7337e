"""The learning rates of an optimizer's parameter groups, as rules choose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.step_size.rules import Rule
from lightning_ifthpo.step_size.update import Update


class GroupRates:
    """Learning rates of parameter groups: one rule for all groups, which keeps their ratios, or one rule for each.

    Args:
        optimizer: The optimizer. The initial rates of its groups count only in relation to each other.
        make_rule: Returns a rule at its start.
        per_group: Use a rule for each group; the initial rates then do not count at all.

    Attributes:
        rules: One rule, or one for each group.
        multipliers: The rate of each group over the rate of its rule.
        applied: The rate at which each rule's part of the last update was applied.
        shortened: Number of updates that were partly taken back.
    """

    def __init__(self, optimizer: Optimizer, make_rule: Callable[[], Rule], per_group: bool) -> None:
        # a warm-up that is being replaced has set `lr` to zero
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        highest = max(rates)
        self._optimizer = optimizer
        self._make_rule = make_rule
        self._per_group = per_group
        self.multipliers = [1.0 if per_group or not highest else rate / highest for rate in rates]
        self.rules = [make_rule() for _ in (rates if per_group else [highest])]
        self.applied = [0.0] * len(self.rules)
        self.shortened = 0
        self._total_steps: int | None = None

    @property
    def total_steps(self) -> int | None:
        """Length of the run, which the rules plan with; None if it is unknown."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: int | None) -> None:
        self._total_steps = total_steps
        for rule in self.rules:
            if total_steps:
                rule.plan(total_steps)

    @property
    def started(self) -> bool:
        """Whether a rule has chosen a rate."""
        return any(rule.lr is not None for rule in self.rules)

    @property
    def choosing(self) -> list[Rule]:
        """The rules that have something to choose: not that of a group that has never moved and has no gradient."""
        if not self._per_group:
            return self.rules
        pairs = zip(self.rules, self._optimizer.param_groups, strict=True)
        return [rule for rule, group in pairs if rule.lr is not None or _has_gradient(group)]

    def of_rules(self, factor: float) -> list[float]:
        """Returns the rate of each rule, times a factor."""
        return [(rule.lr or 0.0) * factor for rule in self.rules]

    def of_groups(self, factor: float) -> list[float | Tensor]:
        """Returns the rate of each parameter group, times a factor."""
        rates = cycle(self.of_rules(factor))  # a single rule serves all groups
        return [rate * multiplier for rate, multiplier in zip(rates, self.multipliers, strict=False)]

    def parts(self, update: Update) -> list[Update]:
        """Returns the part of an update that belongs to each rule."""
        if not self._per_group:
            return [update]
        return [update.restricted_to(group["params"]) for group in self._optimizer.param_groups]

    def apply(self, update: Update, factor: float) -> None:
        """Moves the weights by each rule's part of an update, at the rate of the rule times a factor."""
        self.applied = self.of_rules(factor)
        for part, rate in zip(self.parts(update), self.applied, strict=True):
            part.apply(rate)

    def correct(self, update: Update) -> None:
        """Takes back as much of an applied update as its rules found too much."""
        corrected = False
        for index, (rule, part) in enumerate(zip(self.rules, self.parts(update), strict=True)):
            if rule.corrected is not None:
                part.apply(rule.corrected - self.applied[index])
                self.applied[index] = rule.corrected
                corrected = True
        self.shortened += corrected

    def write(self, rates: Sequence[float | Tensor]) -> None:
        """Sets the learning rates of the optimizer's groups."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def include_new_groups(self, factor: float) -> None:
        """Includes groups that were added during training, by the ratio of their rate to the highest present rate."""
        present = max(float(rate) for rate in self.of_groups(factor))
        for group in self._optimizer.param_groups[len(self.multipliers) :]:
            self.multipliers.append(1.0 if self._per_group or not present else float(group["lr"]) / present)
            if self._per_group:
                self.rules.append(self._make_rule())
                self.total_steps = self._total_steps
                self.applied.append(0.0)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, as plain numbers."""
        rules = [{"name": type(rule).__name__} | rule.state_dict() for rule in self.rules]
        return {"multipliers": self.multipliers, "rules": rules, "applied": self.applied, "shortened": self.shortened}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state; raises ValueError if it belongs to another scheduler, or to other options."""
        expected = [type(rule).__name__ for rule in self.rules]
        names = [rule.get("name") for rule in state.get("rules", [])]
        if names != expected:
            raise ValueError(
                f"the checkpoint holds the state of {names or 'another scheduler'}, and this ExactGeN has the rules "
                f"{expected}; resume with the options of the run that wrote it"
            )
        self.multipliers, self.applied, self.shortened = state["multipliers"], state["applied"], state["shortened"]
        for rule, rule_state in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(rule_state)


def _has_gradient(group: dict[str, Any]) -> bool:
    return any(parameter.grad is not None for parameter in group["params"])

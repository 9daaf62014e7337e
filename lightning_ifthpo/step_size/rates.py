"""The learning rates of an optimizer's parameter groups, as rules choose them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from lightning_ifthpo.step_size.parabola import Parabola


class Rule(Protocol):
    """Chooses a learning rate from the parabolas that it observes."""

    lr: float | None
    refused: int

    @property
    def settled(self) -> bool:
        """Whether the rate has stopped changing fast, so that looks can be rare."""

    def observe(self, parabola: Parabola) -> bool:
        """Changes the rate; returns whether the parabola was used."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what changes, as plain numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state."""


class GroupRates:
    """Learning rates of parameter groups: one rule for all groups, which keeps their ratios, or one rule for each.

    Args:
        optimizer: The optimizer. The initial rates of its groups count only in relation to each other.
        make_rule: Returns a rule at its start.
        per_group: Use a rule for each group; the initial rates then do not count at all.

    Attributes:
        rules: One rule, or one for each group.
        multipliers: The rate of each group over that of its rule.
    """

    def __init__(self, optimizer: Optimizer, make_rule: Callable[[], Rule], per_group: bool) -> None:
        # a warm-up that is being replaced has already set the rates themselves to zero
        rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        highest = max(rates)
        self._optimizer = optimizer
        self._make_rule = make_rule
        self._per_group = per_group
        self.multipliers = [1.0 if per_group or not highest else rate / highest for rate in rates]
        self.rules = [make_rule() for _ in (rates if per_group else [highest])]

    @property
    def started(self) -> bool:
        """Whether a rule has chosen a rate."""
        return any(rule.lr is not None for rule in self.rules)

    @property
    def settled(self) -> bool:
        """Whether all rules have settled."""
        return all(rule.settled for rule in self.rules)

    def of_rules(self, factor: float) -> list[float]:
        """Returns the rate of each rule, times a factor."""
        return [(rule.lr or 0.0) * factor for rule in self.rules]

    def of_groups(self, factor: float) -> list[float | Tensor]:
        """Returns the rate of each parameter group, times a factor."""
        rates = self.of_rules(factor)
        return [rates[self._rule_of(index)] * multiplier for index, multiplier in enumerate(self.multipliers)]

    def parameters_of_rules(self) -> list[list[Tensor]]:
        """Returns the parameters for which each rule chooses the rate."""
        parameters: list[list[Tensor]] = [[] for _ in self.rules]
        for index, group in enumerate(self._optimizer.param_groups):
            parameters[self._rule_of(index)].extend(group["params"])
        return parameters

    def write(self, rates: Sequence[float | Tensor]) -> None:
        """Sets the learning rates of the optimizer's groups."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def include_new_groups(self, factor: float) -> None:
        """Includes groups that were added during training, by the ratio of their rate to the highest present rate."""
        new = self._optimizer.param_groups[len(self.multipliers) :]
        if not new:
            return
        present = max(float(rate) for rate in self.of_groups(factor))
        for group in new:
            self.multipliers.append(1.0 if self._per_group or not present else float(group["lr"]) / present)
            if self._per_group:
                self.rules.append(self._make_rule())

    def state_dict(self) -> dict[str, Any]:
        """Returns what changes, as plain numbers."""
        rules = [{"name": type(rule).__name__} | rule.state_dict() for rule in self.rules]
        return {"multipliers": self.multipliers, "rules": rules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state.

        Raises:
            ValueError: If it belongs to another scheduler, or to other options.
        """
        names = [rule.get("name") for rule in state.get("rules", [])]
        if names != [type(rule).__name__ for rule in self.rules]:
            raise ValueError(
                f"the checkpoint holds the state of {names or 'another scheduler'}, and this ExactGeN has the rules "
                f"{[type(rule).__name__ for rule in self.rules]}; resume with the options of the run that wrote it"
            )
        self.multipliers = state["multipliers"]
        for rule, rule_state in zip(self.rules, state["rules"], strict=True):
            rule.load_state_dict(rule_state)

    def _rule_of(self, group: int) -> int:
        return group if self._per_group else 0

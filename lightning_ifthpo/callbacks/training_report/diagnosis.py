"""The diagnosis of a run: what is wrong with it, worst first."""

from __future__ import annotations

from lightning_ifthpo.callbacks.training_report import loss_rules, training_rules, tuning_rules
from lightning_ifthpo.callbacks.training_report.facts import Facts, Finding


def diagnose(facts: Facts) -> list[Finding]:
    """Returns all findings, causes before what follows from them; an empty list if nothing unusual was seen.

    Pure: it reads facts alone. Cost: some passes over curves of at most 800 points.
    """
    rules = (*loss_rules.RULES, *training_rules.RULES, *tuning_rules.RULES)
    findings = [finding for rule in rules if (finding := rule(facts)) is not None]
    return sorted(findings, key=lambda finding: -finding.rank)

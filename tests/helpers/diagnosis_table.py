"""Prints docs/diagnoses.md: every diagnosis, and what is said of the situations of tests/helpers/situations.py.

python -m tests.helpers.diagnosis_table > docs/diagnoses.md
"""

from __future__ import annotations

import logging
import re
import warnings

from lightning_ifthpo.solvers.causes import Cause
from tests.helpers.situations import Situation, faulty, healthy


def named(diagnosis: str) -> Cause | None:
    """Returns the cause that a diagnosis names first."""
    places = {cause: diagnosis.find(cause.words) for cause in Cause if cause.words in diagnosis}
    return min(places, key=lambda cause: places[cause]) if places else None


def first_words(diagnosis: str) -> str:
    """Returns the title of a diagnosis, before it says what that means."""
    return re.split(r": | \(", diagnosis)[0] if diagnosis else "—"


def is_right(situation: Situation, diagnosis: str, succeeded: bool) -> bool:
    """Whether a diagnosis names the true cause and nothing that is so already; or is silent where all is well."""
    if situation.cause is None:
        return succeeded and not diagnosis
    said = all(words in diagnosis for words in situation.words)
    return named(diagnosis) is situation.cause and said and not any(words in diagnosis for words in situation.never)


def table(situations: list[Situation]) -> str:
    """Returns a row for each situation, and the score."""
    rows, right = ["| situation | true cause | the diagnosis begins |", "|---|---|---|"], 0
    for situation in situations:
        diagnosis, succeeded = situation.run()
        right += is_right(situation, diagnosis, succeeded)
        cause = "—" if situation.cause is None else situation.cause.name.lower().replace("_", " ")
        rows.append(f"| {situation.name} | {cause} | {first_words(diagnosis)} |")
    return "\n".join([*rows, "", f"{right} of {len(situations)} are right."])


def causes() -> str:
    """Returns every diagnosis with its meaning and its remedies."""
    rows = ["| diagnosis | meaning | remedies |", "|---|---|---|"]
    for cause in Cause:
        remedies = "; ".join(remedy.advice for remedy in cause.remedies)
        rows.append(f"| {cause.title} | {cause.meaning} | {remedies} |")
    return "\n".join(rows)


def page() -> str:
    """Returns the page of the documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [
            "# Diagnoses",
            "Why a hypergradient is missing or wrong, in words. A diagnosis fills in the numbers, and leaves out "
            "remedies that are in use already. Made by `python -m tests.helpers.diagnosis_table`.",
            causes(),
            "## Situations with a known fault",
            table(faulty()),
            "## Healthy situations",
            table(healthy()),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(page(), end="")


if __name__ == "__main__":
    main()

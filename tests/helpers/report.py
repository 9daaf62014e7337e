"""What the tests tried, as a table made from their own reports.

python -m pytest --junitxml=newest.xml
python -m tests.helpers.report newest.xml oldest.xml > tests/README.md
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias
from xml.etree import ElementTree

from tests.helpers.features import FEATURES
from tests.system.test_trainer_features import COLUMNS

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true")
Cases: TypeAlias = dict[str, ElementTree.Element]

HEADER = """# What the tests tried

Made from the reports of test runs, on a CPU, by `python -m tests.helpers.report`; nothing here is typed.
"""


class Report:
    """A report in the format of JUnit.

    Args:
        file: Path of the XML file.
    """

    def __init__(self, file: str) -> None:
        suite = next(ElementTree.parse(file).getroot().iter("testsuite"))
        self.versions = {p.get("name"): p.get("value") for p in suite.findall("./properties/property")}
        self.cases: Cases = {f"{c.get('classname')}::{c.get('name')}": c for c in suite.iter("testcase")}

    def passed(self, start: str = "") -> list[str]:
        """Returns the names of tests that passed, of those that start so."""
        return [
            name
            for name, case in self.cases.items()
            if name.startswith(start) and all(case.find(end) is None for end in ("failure", "error", "skipped"))
        ]

    def total(self, module: str, name: str) -> int:
        """Returns the sum of what the tests of a module have recorded under a name."""
        return sum(
            int(p.get("value", 0))
            for case in self.passed(f"tests.{module}::")
            for p in self.cases[case].iter("property")
            if p.get("name") == name
        )

    def skipped(self) -> str:
        """Returns how many tests were skipped, with the reasons."""
        reasons = Counter(case[0].get("message") for case in self.cases.values() if case.find("skipped") is not None)
        return "; ".join(f"{count}: {reason}" for reason, count in reasons.items()) or "none"

    def features(self, column: str, names: list[str]) -> int:
        """Returns with how many features a callback was seen to work, or to be refused with the reason."""
        return len(
            {f"test_feature[{name}-{column}]" for name in names}
            & {c.split("::")[1] for c in self.passed("tests.system.test_trainer_features::")}
        )


def two_ranks(report: Report, *, sharded: bool) -> list[str]:
    """Returns the cases in which two ranks were seen to equal one."""
    return [
        n
        for n in report.passed("tests.system.test_two_ranks::test_two_ranks_equal_one")
        if ("[sharded" in n) == sharded
    ]


ROWS: dict[str, Callable[[Report], object]] = {
    **{
        package: lambda report, package=package: report.versions[package]
        for package in ("Python", "torch", "lightning", "torchmetrics")
    },
    "tests passed": lambda report: len(report.passed()),
    "tests skipped": Report.skipped,
    "killed by SIGKILL, resumed, and ended as if uninterrupted": lambda report: report.total(
        "system.test_faults", "kills"
    ),
    "... while a checkpoint was being written": lambda report: report.total(
        "system.test_faults", "kills while a checkpoint was being written"
    ),
    "bad inputs that ended in an answer or an error in words": lambda report: report.total(
        "system.test_properties", "inputs"
    ),
    "strategy ddp: runs on two ranks that equal one": lambda report: len(two_ranks(report, sharded=False)),
    "strategy ddp_spawn": lambda report: len(
        report.passed("tests.system.test_two_ranks::test_processes_that_the_trainer_starts")
    ),
    "ModelParallelStrategy, weights spread by fully_shard": lambda report: len(two_ranks(report, sharded=True)),
    "loggers read back": lambda report: len(report.passed("tests.runtime.test_loggers::test_what_is_logged")),
    **{
        f"{column}: precisions": lambda report, column=column: (
            f"{report.features(column, list(PRECISIONS))} of {len(PRECISIONS)}"
        )
        for column in COLUMNS
    },
    **{
        f"{column}: features of the Trainer that work, or are refused with the reason": lambda report, column=column: (
            f"{report.features(column, list(FEATURES))} of {len(FEATURES)}"
        )
        for column in COLUMNS
    },
}


def support() -> str:
    """Returns which callback serves which feature of the Trainer, as a table for the README."""
    served: dict[tuple[str, ...], list[str]] = {}
    for name, feature in FEATURES.items():
        served.setdefault(tuple(column for column in COLUMNS if column not in feature.refused), []).append(name)
    lines = ["| | works with |", "|---|---|"]
    lines += [
        f"| {', '.join(f'`{column}`' for column in columns)} | {', '.join(names)} |"
        for columns, names in served.items()
    ]
    return "\n".join(lines)


def table(reports: list[Report]) -> str:
    """Returns what reports say side by side."""
    lines = [f"| |{' |' * len(reports)}", "|---|" + "---|" * len(reports)]
    lines += [f"| {name} | {' | '.join(str(row(report)) for report in reports)} |" for name, row in ROWS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(HEADER, table([Report(file) for file in sys.argv[1:]]), sep="\n")

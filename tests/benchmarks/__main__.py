"""Measures speed and memory, as ratios to a training gradient, and compares two versions of the package.

Run:
    python -m tests.benchmarks                              # all cases, about nine minutes of a free core
    python -m tests.benchmarks --only "hyper step" kfac     # the cases with these words in their names
    python -m tests.benchmarks --compare ../other-checkout  # the ratio of both versions, measured in turns

Every case runs in a process with one thread. In each round a process measures the case and a training gradient one
after the other, and the two versions take turns; the medians over all rounds are printed. "cost" is processor time in
training gradients. "memory" is the highest sum of what tensors hold during a call, over that of a training gradient. A
ratio below 1 says that this version is cheaper than the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
# glibc adapts these thresholds to what a process has freed so far, and with them the number of page faults. Two
# versions with the same code of Nystrom differed by 53 % on a diagonal, and by 1 % with fixed thresholds.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class Version:
    """A process that measures the package of a checkout.

    Args:
        checkout: The folder that holds `lightning_ifthpo`.
    """

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **MALLOC}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cases.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about = self._answer()
        if not Path(self.about["file"]).is_relative_to(checkout):
            raise SystemExit(f"expected the package of {checkout}, but Python imports {self.about['file']}")

    def ask(self, what: str, case: str = "") -> dict[str, Any]:
        """Returns the answer to a request."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "case": case}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the measuring process ended; run tests/benchmarks/cases.py by itself to see why")
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(versions: list[Version], case: str, rounds: int) -> str:
    """Returns the line of a case: cost and memory of the first version, and their ratios to the second."""
    for version in versions:
        failure = version.ask("set up", case).get("error")
        if failure:
            return f"failed, {failure.splitlines()[0]}"
    costs: list[list[float]] = [[] for _ in versions]
    for turn in range(rounds):
        order = range(len(versions)) if turn % 2 == 0 else reversed(range(len(versions)))
        for index in order:
            costs[index].append(versions[index].ask("cost")["cost"])
    memory = [version.ask("memory")["memory"] for version in versions]
    line = f"{statistics.median(costs[0]):9.2f} {memory[0]:9.2f}"
    if len(versions) > 1:
        ratios = sorted(new / old for new, old in zip(*costs, strict=True))
        spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}"
        line += f" {statistics.median(ratios):11.2f} {spread:>14} {memory[0] / memory[1]:13.2f}"
    return line


def main(argv: list[str] | None = None) -> None:
    """Measures what the command line asks for, and prints a line for each case."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", type=Path, help="another checkout of the project")
    parser.add_argument("--only", nargs="+", default=[""], help="words, one of which a case's name has to contain")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    versions = [Version(checkout.resolve()) for checkout in (HERE, args.compare) if checkout]
    heads = f"{'':52}{'cost':>9} {'memory':>9}"
    print(heads + (f" {'cost ratio':>11} {'middle half':>14} {'memory ratio':>13}" if args.compare else ""))
    for case in versions[0].about["cases"]:
        if any(word in case for word in args.only):
            print(f"{case:52}{measure(versions, case, args.rounds)}", flush=True)
    for version in versions:
        version.close()


if __name__ == "__main__":
    main()

"""Measures speed and memory, as ratios to a training gradient, and compares two versions of the package.

Run:
    python -m tests.benchmarks                                  # all cases, about fifteen minutes of a free core
    python -m tests.benchmarks --only "hyper step" kfac         # the cases with these words in their names
    python -m tests.benchmarks --compare ../other-checkout      # the ratio of both versions, measured in turns
    python -m tests.benchmarks --device cuda:0 --json gpu.json  # on a GPU, and kept in a file
    python -m tests.benchmarks.table cpu.json gpu.json          # the page of the documentation, from such files

Every case runs in a process with one thread. In each round a process measures the case and a training gradient one
after the other, and the two versions take turns; the medians over all rounds are printed. "cost" is time in training
gradients: processor time, or the time of a GPU. "ms" is the time itself, which says something on a GPU alone. "memory"
is the highest sum of what tensors hold during a call, over that of a training gradient. A ratio below 1 says that this
version is cheaper than the other.
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

from examples.experiments.watching import watched

HERE = Path(__file__).resolve().parents[2]
# glibc adapts these thresholds to what a process has freed so far, and with them the number of page faults. Two
# versions with the same code of Nystrom differed by 53 % on a diagonal, and by 1 % with fixed thresholds.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class Version:
    """A process that measures the package of a checkout.

    Args:
        checkout: The folder that holds `lightning_ifthpo`.
        device: Where it computes.
    """

    def __init__(self, checkout: Path, device: str) -> None:
        own = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "DEVICE": device}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cases.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **own, **MALLOC},
        )
        self.says = self._answer()
        if not Path(self.says["file"]).is_relative_to(checkout):
            raise SystemExit(f"expected the package of {checkout}, but Python imports {self.says['file']}")

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


def measure(versions: list[Version], case: str, rounds: int) -> dict[str, Any]:
    """Returns cost, time and memory of a case for the first version, and the ratios to the second."""
    for version in versions:
        failure = version.ask("set up", case).get("error")
        if failure:
            return {"error": failure.splitlines()[0]}
    answers: list[list[dict[str, Any]]] = [[] for _ in versions]
    for turn in watched(range(rounds), case):
        order = range(len(versions)) if turn % 2 == 0 else reversed(range(len(versions)))
        for index in order:
            answers[index].append(versions[index].ask("cost"))
    memory = [version.ask("memory")["memory"] for version in versions]
    costs = [sorted(answer["cost"] for answer in version) for version in answers]
    found = {
        "cost": statistics.median(costs[0]),
        "least": costs[0][0],
        "most": costs[0][-1],
        "ms": 1e3 * statistics.median(answer["seconds"] for answer in answers[0]),
        "memory": memory[0],
    }
    if len(versions) > 1:
        pairs = zip(*answers, strict=True)
        ratios = sorted(new["cost"] / old["cost"] for new, old in pairs)
        found |= {"ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4]}
        found |= {"high": ratios[-1 - len(ratios) // 4], "memory_ratio": memory[0] / memory[1]}
    return found


def line(found: dict[str, Any]) -> str:
    """Returns the figures of a case as they are printed."""
    if "error" in found:
        return f"failed, {found['error']}"
    text = f"{found['cost']:9.2f} {found['ms']:9.2f} {found['memory']:9.2f}"
    if "ratio" in found:
        spread = f"{found['low']:.2f} to {found['high']:.2f}"
        text += f" {found['ratio']:11.2f} {spread:>14} {found['memory_ratio']:13.2f}"
    return text


def main(argv: list[str] | None = None) -> None:
    """Measures what the command line asks for, and prints a line for each case."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", type=Path, help="another checkout of the project")
    parser.add_argument("--only", nargs="+", default=[""], help="words, one of which a case's name has to contain")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--json", type=Path, help="a file to keep the figures in")
    args = parser.parse_args(argv)
    versions = [Version(checkout.resolve(), args.device) for checkout in (HERE, args.compare) if checkout]
    heads = f"{'':52}{'cost':>9} {'ms':>9} {'memory':>9}"
    print(heads + (f" {'cost ratio':>11} {'middle half':>14} {'memory ratio':>13}" if args.compare else ""))
    kept = {"about": {**versions[0].says["about"], "rounds": args.rounds}, "cases": {}}
    for case in versions[0].says["cases"]:
        if any(word in case for word in args.only):
            kept["cases"][case] = measure(versions, case, args.rounds)
            print(f"{case:52}{line(kept['cases'][case])}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(kept, indent=1) + "\n")
    for version in versions:
        version.close()


if __name__ == "__main__":
    main()

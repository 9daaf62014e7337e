"""Makes the page of benchmarks from files that runs have kept.

python -m tests.benchmarks.table docs/benchmarks/*.json > docs/benchmarks.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = """# What a hyper step, a measurement and a look cost

Cost is in training gradients: one forward and one backward pass of the same batch. What a callback costs is the
difference of a training batch with it and without. In brackets the least and the largest of all rounds. Memory is the
highest sum of what tensors hold during a call, over that of a training gradient; for a callback, what it adds.

Milliseconds are shown for a GPU alone, because those of a shared machine say nothing, and memory for a CPU alone: what
a GPU's allocator holds depends on the run before. These networks are small for a GPU, which waits for Python. Weights
of examples are tuned, and with "noise before the model" the scale of noise on the inputs, too.

Made by `python -m tests.benchmarks.table` from the files in `docs/benchmarks`, which `python -m tests.benchmarks
--json` has written.
"""


def page(files: list[Path]) -> str:
    """Returns the page."""
    return "\n".join([HEAD, *(section(json.loads(file.read_text())) for file in files)])


def section(run: dict[str, Any]) -> str:
    """Returns the tables of a run."""
    return beside_others(run) if "peers" in run else whole_runs(run) if "large" in run else costs(run)


def beside_others(run: dict[str, Any]) -> str:
    """Returns the tables of a run of `tests.benchmarks.peers`."""
    about = run["about"]
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    rows = [
        f"## Beside other libraries, on {about['device']}",
        "",
        "Each method solves the same problem, described in `tests/benchmarks/peers.py`. The error is relative to a",
        "dense solution; the cost is in gradients of the same loss. The default here includes checks that the others",
        "lack: that the loss follows its gradient, and why a solve failed. They cost as much as four gradients of this",
        "small problem, and `diagnosed=False` leaves them out.",
        "",
        f"torch {about['torch']}, {libraries}; {about['rounds']} rounds.",
    ]
    for problem, methods in run["peers"].items():
        rows += ["", f"| {problem} | error | cost |", "|---|---|---|"]
        for name, found in methods.items():
            cost = f"{found['cost']:.1f} ({found['least']:.1f} to {found['most']:.1f})"
            rows.append(f"| {name} | {found['error']:.1e} | {cost} |")
    return "\n".join([*rows, ""])


def whole_runs(run: dict[str, Any]) -> str:
    """Returns the table of a run of `tests.benchmarks.large`."""
    about = run["about"]
    rows = [
        f"## Whole runs of large networks, {about['device']}",
        "",
        "One run each of 50 batches with AdamW through the Trainer, of which the first ten are not counted. Time and",
        "memory are those of the run over those of a run without the callback. Where the two plain runs differ by",
        "much, so may the ratios.",
        "",
        f"torch {about['torch']}, Lightning {about['lightning']}.",
        "",
        "| network and precision | plain: ms a batch | plain: GiB | tuned | time | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in run["large"].items():
        plain = f"{found['ms']:.0f} (runs differ by {found['plain runs differ by']:.0%}) | {found['GiB']:.1f}"
        for method, time in found["time"].items():
            rows.append(f"| {name} | {plain} | {method} | {time:.2f} | {found['memory'][method]:.2f} |")
    return "\n".join([*rows, ""])


def costs(run: dict[str, Any]) -> str:
    """Returns the table of a run of `tests.benchmarks`."""
    about, on_gpu = run["about"], "core" not in run["about"]["device"]
    heads = ["case", "cost", "ms" if on_gpu else "memory"]
    rows = [
        f"## {about['device']}, {about['rounds']} rounds",
        "",
        f"torch {about['torch']}, Lightning {about['lightning']}.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for case, found in run["cases"].items():
        if "error" in found:
            cells = [found["error"], ""]
        else:
            cost = f"{found['cost']:.2f} ({found['least']:.2f} to {found['most']:.2f})"
            cells = [cost, f"{found['ms']:.1f}" if on_gpu else f"{found['memory']:.2f}"]
        rows.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    print(page(list(map(Path, sys.argv[1:]))), end="")

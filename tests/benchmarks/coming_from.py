"""Runs the code of `docs/coming_from.md`, there and here, and fills its tables.

Run:
    pip install betty-ml torchopt higher PyHessian prodigyopt curvlinops-for-pytorch optuna scipy
    python -m tests.benchmarks.coming_from --json docs/coming_from.json  # runs the page and keeps figures: two minutes
    python -m tests.benchmarks.coming_from                               # fills the tables from the file

The libraries are not needed by anything else, and some of them ask for old versions of NumPy or torch: install them
with `--no-deps`. Release 0.2.1 of Betty wants a Python before 3.11, and runs with 3.11: `--ignore-requires-python`.
The package `hypergrad` of hypertorch comes from its repository, github.com/prolearner/hypertorch. A library that
cannot be imported has "not run here" in the table.

The problems are those of `peers`, which has their exact solutions. Blocks take turns, and the cost of one is that of
the block over that of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import re
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks import peers
from tests.benchmarks.cases import about

DOCS = Path(__file__).parents[2] / "docs"
KEPT = DOCS / "coming_from.json"
BETWEEN = re.compile(r"(?<=<!-- coming from -->\n).*?(?=<!-- end -->)", re.DOTALL)
PACKAGES = ("betty-ml", "torchopt", "higher", "PyHessian", "curvlinops-for-pytorch", "optuna", "prodigyopt")
Place = tuple[str, str]
"""A heading of the page, and "py" for the code there or "python" for the code here."""

HYPERGRADIENTS: dict[str, Place] = {
    "here, `implicit_hypergradient`, CG": ("hypertorch", "python"),
    "Betty, CG": ("Betty", "py"),
    "hypertorch, CG": ("hypertorch", "py"),
    "TorchOpt, CG": ("TorchOpt", "py"),
    "by hand, CG": ("A hand-written loop", "py"),
    "here, `unrolled_hypergradient`": ("higher", "python"),
    "higher, unrolled": ("higher", "py"),
}
"""The first one is the unit of cost."""
EIGENVALUES: dict[str, Place] = {
    "here, `lanczos`, rtol=1e-2": ("PyHessian", "python"),
    "PyHessian, power iteration": ("PyHessian", "py"),
    "here, `lanczos`, rtol=1e-4": ("curvlinops", "python"),
    "curvlinops, with scipy": ("curvlinops", "py"),
}


RUNS: dict[str, dict[str, Place | str]] = {
    "decay": {
        "nothing tuned": "found = fit(Digits(), train)",
        "Optuna, one decay, 10 trials": ("Optuna", "py"),
        "here, four decays, one run": ("Optuna", "python"),
    },
    "rate": {
        "AdamW at its default rate": "found = fit(Digits(optimizer=torch.optim.AdamW), thousand)",
        "Prodigy": ("Prodigy", "py"),
        "here, AdamW with `ExactGeN`": ("Prodigy", "python"),
    },
}
"""Whole runs, by code of the page or by a line of our own."""
NO_RUN = "not run here | |"
SEEN = {"decay": 600, "rate": 1000}
"""Images by which weights or hyperparameters are chosen; the rest is for the test."""


class Blocks:
    """The code of the page.

    Attributes:
        sections: The blocks of each heading, in order, as pairs of language and text.
    """

    def __init__(self, text: str) -> None:
        parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
        self.sections: dict[str, list[tuple[str, str]]] = {
            heading: re.findall(r"^```(py|python)\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
            for heading, body in zip(parts[::2], parts[1::2], strict=True)
        }

    def __getitem__(self, place: Place) -> str:
        """Returns the last block of a heading and a language: those before it prepare."""
        heading, language = place
        return [text for own, text in self.sections[heading] if own == language][-1]

    def lines(self, place: Place) -> int:
        """Returns the number of lines of code without imports."""
        return sum(
            bool(line.strip()) and not line.startswith(("import ", "from ")) for line in self[place].splitlines()
        )

    def namespace(self, until: str) -> dict[str, Any]:
        """Returns the names that the code of this package has made before the end of a section."""
        names: dict[str, Any] = {"__name__": "page"}
        for heading, blocks in self.sections.items():
            for language, text in blocks:
                if language == "python":
                    exec(compile(text, heading, "exec"), names)
            if heading == until:
                break
        return names

    def run(self, code: Place | str, names: dict[str, Any]) -> Any:
        """Returns what a block or another text calls `found`; other names stay as they are."""
        own = dict(names)
        exec(compile(code if isinstance(code, str) else self[code], "page", "exec"), own)
        return own["found"]


class Hypergradients(peers.Regression):
    """The first task of the page, which is that of `peers`."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks, self.names = blocks, blocks.namespace("higher")
        for own, shown in zip(self.weights, self.names["weights"], strict=True):
            torch.testing.assert_close(shown, own)  # otherwise the page has another problem than its exact solution

    def unit(self) -> Any:
        """Returns what is found here: the unit of all costs."""
        return self.found(next(iter(HYPERGRADIENTS.values())))

    def found(self, place: Place) -> Tensor:
        """Returns what a block finds, [n]."""
        return peers.flat(self.blocks.run(place, self.names))

    def methods(self) -> dict[str, peers.Method]:
        """Returns each way to a hypergradient, [n]."""
        return {name: partial(self.found, place) for name, place in HYPERGRADIENTS.items()}


class Eigenvalues(peers.Network):
    """The second task of the page, which is that of `peers`."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__(300)
        self.blocks, self.names = blocks, blocks.namespace("PyHessian") | {"images": self.x}
        self.names["found"] = self  # where the code takes the network from
        self.names["net"] = self.net

    def unit(self) -> Any:
        """Returns what is found here: the unit of all costs."""
        return self.found(next(iter(EIGENVALUES.values())))

    def found(self, place: Place) -> Tensor:
        """Returns what a block finds, a scalar."""
        found = torch.as_tensor(self.blocks.run(place, self.names))
        self.net.zero_grad()  # PyHessian leaves gradients with a graph
        return found

    def methods(self) -> dict[str, peers.Method]:
        """Returns each way to the largest eigenvalue, a scalar."""
        return {name: partial(self.found, place) for name, place in EIGENVALUES.items()}


class Runs:
    """The third task of the page: whole training runs, tested on images by which nothing was chosen.

    Args:
        blocks: The code of the page.
        kind: What is chosen: "decay" or "rate".
        epochs: Of each run.
    """

    def __init__(self, blocks: Blocks, kind: str, epochs: int) -> None:
        self.blocks, self.methods, self.names = blocks, RUNS[kind], blocks.namespace("Betty")
        self.names["epochs"] = epochs
        rest = self.names["order"][SEEN[kind] :]
        self.images, self.labels = self.names["images"][rest], self.names["y"][rest]

    def run(self, seed: int, code: Place | str) -> dict[str, float]:
        """Returns what one run reaches, and the seconds that it takes."""
        self.names["seed"] = seed
        began = time.process_time()
        module = self.blocks.run(code, self.names)
        seconds = time.process_time() - began
        with torch.no_grad():
            logits = module.net(self.images)
        accuracy = float((logits.argmax(1) == self.labels).double().mean())
        return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits, self.labels)), "seconds": seconds}

    def measure(self, seeds: int) -> dict[str, list[dict[str, float]]]:
        """Returns the runs of each method whose library can be imported; all of them take turns."""
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self.methods}
        for seed in range(seeds):
            for name, code in self.methods.items():
                with contextlib.suppress(ImportError):
                    found[name].append(self.run(seed, code))
        return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides what Betty, Optuna and Lightning tell about each run."""
    logging.disable()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def measured(blocks: Blocks, rounds: int, seeds: int, epochs: tuple[int, int]) -> dict[str, Any]:
    """Returns all figures of the tables."""
    return {
        "about": {**about(), "rounds": rounds, "seeds": seeds, "epochs": epochs, "libraries": versions()},
        "hypergradient": peers.measure(Hypergradients(blocks), rounds),
        "eigenvalue": peers.measure(Eigenvalues(blocks), rounds),
        "decay": Runs(blocks, "decay", epochs[0]).measure(seeds),
        "rate": Runs(blocks, "rate", epochs[1]).measure(seeds),
    }


def tables(kept: dict[str, Any], blocks: Blocks) -> str:
    """Returns the tables of the page."""
    about = kept["about"]
    rows = ["| task | method | lines | relative error | time |", "|---|---|---|---|---|"]
    for task, kind, places in (
        ("hypergradient", "hypergradient", HYPERGRADIENTS),
        ("largest eigenvalue", "eigenvalue", EIGENVALUES),
    ):
        for name, place in places.items():
            one = kept[kind].get(name)
            cells = f"{one['error']:.1e} | {one['cost']:.1f}" if one else "not run here |"
            rows.append(f"| {task} | {name} | {blocks.lines(place)} | {cells} |")
    rows += ["", "| task | method | test accuracy | test loss | time |", "|---|---|---|---|---|"]
    for task, kind in (("decay, 300 images", "decay"), ("rate, 1,000 images", "rate")):
        unit = mean(next(iter(kept[kind].values())), "seconds")
        for name, found in kept[kind].items():
            accuracies = " / ".join(f"{100 * one['accuracy']:.1f}" for one in found)
            cells = (
                f"{accuracies} | {mean(found, 'loss'):.3f} | {mean(found, 'seconds') / unit:.1f}" if found else NO_RUN
            )
            rows.append(f"| {task} | {name} | {cells} |")
    libraries = ", ".join(
        f"{name} {version}" for name, version in {"torch": about["torch"], **about["libraries"]}.items()
    )
    return "\n".join(
        [
            *rows,
            "",
            f"Medians of {about['rounds']} rounds, on {about['device']}; {about['seeds']} seeds of runs of "
            f"{about['epochs'][0]} epochs for decays and {about['epochs'][1]} for rates.",
            f"{libraries}.",
            "",
        ]
    )


def mean(found: list[dict[str, float]], what: str) -> float:
    """Returns the mean of a figure over runs."""
    return statistics.mean(one[what] for one in found)


def filled(text: str, kept: dict[str, Any]) -> str:
    """Returns the page with its tables."""
    return BETWEEN.sub(lambda _: tables(kept, Blocks(text)), text)


def main(argv: list[str] | None = None) -> None:
    """Measures if asked to, and fills the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.coming_from",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, nargs=2, default=(50, 20), help="of runs for decays and for rates")
    parser.add_argument("--json", type=Path, help="measure, and keep the figures in this file")
    parser.add_argument("--page", type=Path, default=DOCS / "coming_from.md", help="the page to run and to fill")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    text = args.page.read_text(encoding="utf-8")
    if args.json:
        with quiet():
            kept = measured(Blocks(text), args.rounds, args.seeds, tuple(args.epochs))
        args.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    kept = json.loads((args.json or KEPT).read_text(encoding="utf-8"))
    args.page.write_text(filled(text, kept), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Makes all tables of README.md and of the site from the result files.

A table stands between two comments, `<!-- table: name -->` and `<!-- end -->`. The name is that of an experiment, or
`name.function` for a table other than the first, or `wins_and_losses` for one of several experiments.

    python -m examples.experiments.tables            # write them
    python -m examples.experiments.tables --check    # only say which differ
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

from examples.experiments.common import HERE, markdown, mean, number, read

ROOT = HERE.parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
PLACE = re.compile(r"(<!-- table: ([\w.]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """Returns a table."""
    if name == "wins_and_losses":
        return wins_and_losses()
    name, _, function = name.partition(".")
    results = read(name)
    made: str = getattr(_experiment(name), function or "table")(results)
    earlier = any("earlier version" in stamp for stamp in results["measured"])
    return made + ("\n\nMeasured with an earlier version." if earlier else "")


def _experiment(name: str) -> Any:
    return importlib.import_module(f"examples.experiments.{name}")


def wins_and_losses() -> str:
    """Returns the test accuracies of several experiments: without tuning, tuned, and of what a sceptic would choose."""
    labels, images = read("clean_noisy_labels")["accuracy"], read("distill_dataset")["scores"]
    decays, augmentation = read("tune_weight_decay"), read("learned_augmentation")["scores"]
    overfitted = read("overfit_validation")["models"]["resnet18"]
    final = _experiment("overfit_validation").final
    free, rate = _experiment("learning_rate_free"), read("learning_rate_free")["cells"]["convolutions/SGD"]
    rows = [
        (
            "45 % of 3,000 labels one too high: weights and confusions, by 400 checked images",
            mean(labels["equal"]),
            mean(labels["ours"]),
            mean(labels["no_hyper"]),
            "the same with confusions that were estimated, not tuned",
        ),
        (
            "a training set of 10 images, every pixel learned",
            mean(images["means"]),
            mean(images["distilled"]),
            mean(images["all"]),
            "all 3,500 images",
        ),
        (
            "augmentation of 300 images, learned from 400",
            mean(augmentation["none"]),
            mean(augmentation["distribution"]),
            mean(augmentation["hand"]),
            "strengths chosen by a grid",
        ),
        (
            "weight decay on 300 images, one run",
            mean(decays["none"]["test"]),
            mean(decays["global"]["test"]),
            mean(decays["grid"]["test"]),
            "the best of five runs",
        ),
        (
            f"{overfitted['decays']:,} decays by 50 images",
            final(overfitted["not tuned"], "test"),
            final(overfitted["tuned"], "test"),
            final(overfitted["trained on both"], "test"),
            "training on these 50 images, too",
        ),
        (
            "`ExactGeN` in place of a learning rate, convolutions, SGD",
            None,
            mean(free.pooled(rate["ExactGeN"])) / 100,
            mean(free.best(rate["constant"])[1]) / 100,
            "the best of nine constant rates",
        ),
    ]
    header = ["test accuracy", "not tuned", "tuned", "rival", "which is"]
    cells = ([what, *("" if x is None else number(x) for x in figures), rival] for what, *figures, rival in rows)
    return markdown(header, cells)


def filled(text: str) -> str:
    """Returns a document with all its tables made from the result files."""
    return PLACE.sub(lambda place: f"{place[1]}{table(place[2])}\n{place[4]}", text)


def main(argv: list[str] | None = None, *documents: Path) -> bool:
    """Writes the tables of documents, by default of all; returns whether they were up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    are_current = True
    for document in documents or DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        now = filled(text)
        for before, after in zip(PLACE.finditer(text), PLACE.finditer(now), strict=True):
            print(f"{before[2]:28}{'up to date' if before[0] == after[0] else 'changed'}")
        if not args.check:
            document.write_text(now, encoding="utf-8")
        are_current = are_current and text == now
    return are_current


if __name__ == "__main__":
    sys.exit(not main() and "--check" in sys.argv)

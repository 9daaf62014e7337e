"""Draws all pictures of the documentation.

Most are drawn from the result files. Those of `CHEAP` need more than a result file holds, so their experiments are run
again, which takes a minute. An experiment of which an earlier version has recorded less than that keeps its picture.

    python -m examples.experiments.pictures                       # all
    python -m examples.experiments.pictures tune_weight_decay     # one
"""

from __future__ import annotations

import argparse
import importlib

from examples.experiments.common import PICTURES, read, save

# What a result file must hold for its picture.
DRAWN = {
    "clean_noisy_labels": "picture",
    "label_noise": "accuracy",
    "tune_weight_decay": "global",
    "class_imbalance": "offsets",
    "learning_rate_free": "cells",
    "learning_rates": "test",
    "distill_dataset": "picture",
    "compare_inversions": "models",
    "learned_augmentation": "picture",
    "mixed_search": "searches",
    "overfit_validation": "memory",
    "stackelberg_gan": "samples",
}
CHEAP = ("edge_of_stability", "inverse_hessian")


def main(argv: list[str] | None = None) -> None:
    """Draws what is asked for."""
    names = [*DRAWN, *CHEAP]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="experiments; all if none is given", metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.names or names:
        if name not in names:
            parser.error(f"expected names among {', '.join(names)}, got {name}")
        experiment = importlib.import_module(f"examples.experiments.{name}")
        if name in CHEAP:
            experiment.main(["--record"])
        elif DRAWN[name] in read(name):
            print(f"Picture: {save(experiment.draw, read(name), PICTURES / f'{name}.png')}")
        else:
            print(f"{name}: its results are those of an earlier version, without what the picture needs")


if __name__ == "__main__":
    main()

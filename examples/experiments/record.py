"""Runs the examples and writes what they measure to `examples/results.json`, from which they read what to expect.

python -m examples.experiments.record                 # all
python -m examples.experiments.record weight_decay    # one
"""

from __future__ import annotations

import argparse
import importlib
import sys

from examples.experiments.common import HERE, read, stamp, write

EXAMPLES = HERE.parent


def main(argv: list[str] | None = None) -> None:
    """Runs what is asked for."""
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; all if none is given", metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.names or names:
        if name not in names:
            parser.error(f"expected names among {', '.join(names)}, got {name}")
        sys.argv[1:] = []  # LightningCLI reads them, too
        example = importlib.import_module(f"examples.{name}")
        if name == "cli":
            runs = {path.stem: example.main(["--config", str(path)]) for path in sorted(example.CONFIGS.glob("*.yaml"))}
            measured = {config: printed["test accuracy"]["measured"] for config, printed in runs.items()}
        else:
            measured = {key: entry["measured"] for key, entry in example.main().items()}
        results = read("results", EXAMPLES)
        write("results", {**results, "measured": stamp(), name: measured}, EXAMPLES)


if __name__ == "__main__":
    main()

"""Makes all tables of README.md and docs/defaults.md from the result files.

A table stands between two comments, `<!-- table: name -->` and `<!-- end -->`. The name is that of an experiment, or
`name.function` for a table other than the first.

    python -m examples.experiments.tables            # write them
    python -m examples.experiments.tables --check    # only say which differ
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

from examples.experiments.common import HERE, read

README = HERE.parents[1] / "README.md"
DOCUMENTS = (README, HERE.parents[1] / "docs" / "defaults.md")
PLACE = re.compile(r"(<!-- table: ([\w.]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(name: str) -> str:
    """Returns a table of an experiment."""
    name, _, function = name.partition(".")
    results = read(name)
    made: str = getattr(importlib.import_module(f"examples.experiments.{name}"), function or "table")(results)
    earlier = any("earlier version" in stamp for stamp in results["measured"])
    return made + ("\n\nMeasured with an earlier version." if earlier else "")


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

"""The page that maps the sources to the code names what exists."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from_the_paper.md").read_text(encoding="utf-8")


def named(pattern):
    return sorted(set(re.findall(rf"`({pattern})`", TEXT)))


def resolved(name):
    """The object of a dotted name: the longest importable module, then attributes; a field counts by its annotation."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", named(r"lightning_ifthpo\.[\w.]+"))
def test_each_name_of_the_package_exists(name):
    assert resolved(name) is not None


def test_a_name_that_does_not_exist_is_noticed():
    with pytest.raises(AttributeError, match="Newmann"):
        resolved("lightning_ifthpo.solvers.Newmann")


@pytest.mark.parametrize("name", named(r"examples\.[\w.]+"))
def test_each_example_exists(name):
    assert importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("name", named(r"tests/[\w/]+\.py"))
def test_each_test_exists(name):
    assert (ROOT / name).is_file()


def test_every_source_has_a_table_whose_rows_name_code():
    tables = [[line for line in part.splitlines() if line.startswith("| ")] for part in TEXT.split("\n## ")[1:]]
    assert len(tables) == 4
    for header, *rows in tables:
        assert header == "| there | here | where ours differs, and why |"
        assert len(rows) >= 5
        for row in rows:
            cells = re.split(r"(?<!\\)\|", row)[1:-1]
            assert len(cells) == 3, row
            assert re.search(r"`(lightning_ifthpo|examples)\.", cells[1]), row

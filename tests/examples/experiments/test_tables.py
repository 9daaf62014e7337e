"""README.md and docs/defaults.md show what the result files hold."""

import re

import pytest

from examples.experiments import tables
from examples.experiments.common import HERE, RECORDED, read

EXPERIMENTS = {path.stem for path in HERE.glob("*.py")} - {"common", "tables", "pictures", "record"}
TEXT = tables.README.read_text(encoding="utf-8")
SHOWN = {name: table for _, name, table, _ in tables.PLACE.findall(TEXT)}
ELSEWHERE = {
    name: table
    for document in tables.DOCUMENTS[1:]
    for _, name, table, _ in tables.PLACE.findall(document.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", [*SHOWN, *ELSEWHERE])
def test_a_table_is_made_from_its_file(name):
    assert (SHOWN | ELSEWHERE)[name] == tables.table(name) + "\n"


def test_all_experiments_with_a_table_there_have_results():
    named = SHOWN.keys()
    assert named <= {path.stem for path in RECORDED.glob("*.json")} <= EXPERIMENTS
    assert EXPERIMENTS - named == {"inverse_hessian"}  # whose numbers are in its picture


def test_results_say_when_they_were_measured():
    for path in RECORDED.glob("*.json"):
        assert read(path.stem)["measured"], path.name


def test_tables_are_written_between_their_marks(tmp_path, capsys):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table: edge_of_stability -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    assert not tables.main(["--check"], document)
    assert "old" in document.read_text(encoding="utf-8")
    assert not tables.main([], document)
    written = document.read_text(encoding="utf-8")
    assert written.startswith("before\n<!-- table: edge_of_stability -->\n| ")
    assert written.endswith("<!-- end -->\nafter\n")
    assert tables.main(["--check"], document)


def test_the_readme_shows_pictures_that_exist():
    root = tables.README.parent
    shown = set(re.findall(r"\]\((examples/experiments/pictures/[\w.]+)\)", TEXT))
    assert shown == {str(path.relative_to(root)) for path in (HERE / "pictures").glob("*.png")}

"""The README and the site show what the result files hold."""

import re

import pytest

from examples.experiments import tables
from examples.experiments.common import HERE, RECORDED, read

EXPERIMENTS = {path.stem for path in HERE.glob("*.py")} - {
    "common",
    "style",
    "watching",
    "tables",
    "pictures",
    "record",
}
TEXTS = {str(path.relative_to(tables.ROOT)): path.read_text(encoding="utf-8") for path in tables.DOCUMENTS}
SHOWN = {name for text in TEXTS.values() for _, name, _, _ in tables.PLACE.findall(text)}


@pytest.mark.parametrize("document", [document for document, text in TEXTS.items() if tables.PLACE.search(text)])
def test_all_tables_of_a_document_are_made_from_files(document):
    assert tables.filled(TEXTS[document]) == TEXTS[document]


def test_all_experiments_with_a_table_there_have_results():
    named = {name for name in SHOWN if "." not in name} - {"wins_and_losses"}
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


def test_all_pictures_are_shown_and_exist():
    shown = {name for text in TEXTS.values() for name in re.findall(r"examples/experiments/pictures/([\w.]+)\)", text)}
    assert shown == {path.name for path in (HERE / "pictures").glob("*.png")}

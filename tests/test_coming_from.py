"""The page for those who come from another library: its tables are those of its file, and its code can be measured."""

import copy
import json
from pathlib import Path

import pytest

from tests.benchmarks import coming_from
from tests.benchmarks.coming_from import EIGENVALUES, HYPERGRADIENTS, Blocks, filled, tables

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "coming_from.md").read_text(encoding="utf-8")
KEPT = json.loads((DOCS / "coming_from.json").read_text(encoding="utf-8"))


def test_the_tables_of_the_page_are_those_of_its_file():
    again = "run `python -m tests.benchmarks.coming_from`"
    assert filled(TEXT, KEPT) == TEXT, again
    assert tables(KEPT, Blocks(TEXT)) in TEXT


def test_another_figure_changes_the_page():
    other = copy.deepcopy(KEPT)
    other["hypergradient"]["Betty, CG"]["error"] = 0.125
    assert "| Betty, CG | 11 | 1.2e-01 |" in filled(TEXT, other)


def test_a_library_that_was_not_there_has_no_figures():
    other = copy.deepcopy(KEPT)
    del other["hypergradient"]["Betty, CG"]
    other["rate"]["Prodigy"] = []
    page = filled(TEXT, other)
    assert "| Betty, CG | 11 | not run here | |" in page
    assert "| Prodigy | not run here | | |" in page


@pytest.mark.parametrize("places", [HYPERGRADIENTS, EIGENVALUES], ids=["hypergradients", "eigenvalues"])
def test_each_row_has_code_on_the_page(places):
    blocks = Blocks(TEXT)
    assert all("found = " in blocks[place] for place in places.values())


def test_lines_are_counted_without_imports_and_blank_ones():
    blocks = Blocks(
        "## Theirs\n```py\nimport a\nfrom b import c\n\ndef f():\n    import d\n    return c\nfound = f()\n```\n"
    )
    assert blocks.lines(("Theirs", "py")) == 4


@pytest.mark.slow  # ten seconds
@pytest.mark.filterwarnings("ignore")  # other libraries warn, if they are installed
def test_what_is_here_is_exact_beside_others_and_kept(tmp_path):
    file, page = tmp_path / "kept.json", tmp_path / "page.md"
    page.write_text(TEXT, encoding="utf-8")
    shortest = ["--rounds", "1", "--seeds", "1", "--epochs", "1", "1"]
    coming_from.main([*shortest, "--json", str(file), "--page", str(page)])
    kept = json.loads(file.read_text(encoding="utf-8"))
    # 20 products leave 2e-3 of the hypergradient, and 20 steps 86 %
    for name in ("here, `implicit_hypergradient`, CG", "by hand, CG"):
        assert kept["hypergradient"][name]["error"] < 1e-2
    assert kept["hypergradient"]["here, `unrolled_hypergradient`"]["error"] == pytest.approx(0.86, abs=0.02)
    assert kept["eigenvalue"]["here, `lanczos`, rtol=1e-2"]["error"] < 1e-2
    assert kept["eigenvalue"]["here, `lanczos`, rtol=1e-4"]["error"] < 1e-4
    assert len(kept["decay"]["here, four decays, one run"]) == 1
    assert page.read_text(encoding="utf-8") == filled(TEXT, kept)

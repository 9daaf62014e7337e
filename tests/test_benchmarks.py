"""The page of benchmarks is that of its files, and a reduced benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import peers
from tests.benchmarks.table import page, section

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_page_of_the_documentation_is_made_from_its_files():
    files = sorted((DOCS / "benchmarks").glob("*.json"))
    assert files
    assert (DOCS / "benchmarks.md").read_text() == page(files)


@pytest.mark.slow  # four seconds
def test_what_is_here_is_exact_beside_others_and_kept(tmp_path):
    file = tmp_path / "kept.json"
    peers.main(["--rounds", "1", "--json", str(file)])
    kept = json.loads(file.read_text())
    hypergradients, *eigenvalues = kept["peers"].values()
    for name in ("here, ConjugateGradient, 100", "by hand, CG, 100", "here, Direct"):
        assert hypergradients[name]["error"] < 1e-10
    assert all(found["here, lanczos, rtol=1e-4"]["error"] < 1e-4 for found in eigenvalues)
    assert "| here, Direct | " in section(kept)


@pytest.mark.slow  # starts two processes
def test_a_case_is_measured_in_both_versions_and_kept(tmp_path):
    file, case = tmp_path / "kept.json", "gradient_outer_product: product, convolutions"
    command = [sys.executable, "-m", "tests.benchmarks", "--rounds", "1", "--compare", str(ROOT), "--only", case]
    run = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=True)
    kept = json.loads(file.read_text())
    found = kept["cases"][case]
    assert list(kept["cases"]) == [case]
    assert kept["about"]["rounds"] == 1
    assert found["least"] <= found["cost"] <= found["most"]
    assert found["ratio"] > 0.0
    assert f"{found['cost']:.2f}" in run.stdout

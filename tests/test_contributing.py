"""The files that CONTRIBUTING.md shows work as they are printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = re.findall(r"^```python\n# (\S+)\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
SOURCES = [(path, code) for path, code in FILES if path.startswith("lightning_ifthpo/")]


@pytest.mark.slow  # starts a process for each
@pytest.mark.parametrize(("path", "code"), SOURCES, ids=[path for path, _ in SOURCES])
def test_a_new_file_passes_its_doctest_and_its_test(path, code, tmp_path):
    shutil.copytree(ROOT / "lightning_ifthpo", tmp_path / "lightning_ifthpo")
    (tmp_path / path).write_text(code)
    test = f"tests/{Path(path).parent.name}/test_{Path(path).name}"
    shown = tmp_path / Path(test).name
    shown.write_text(dict(FILES)[test])
    command = [sys.executable, "-m", "pytest", "-q", "--doctest-modules", path, shown]
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout).group(1)) >= 3


def test_all_three_kinds_are_shown():
    assert [Path(path).parent.name for path, _ in SOURCES] == ["solvers", "curvature", "hyperparameters"]

"""Every example runs as it stands, in seconds, and prints what it measured and what to expect."""

import ast
import importlib
import json
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest depends on there

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SOURCES = sorted(EXAMPLES.rglob("*.py"))
WHERE_INSTALLED = {"GeN", "prodigyopt"}  # competitors that take part in one experiment where they are installed
# Measured on the machine that recorded; elsewhere rounding differs, and a test image is at least 0.001.
TOLERANCE = 0.03


def test_there_are_at_most_ten_examples_of_at_most_120_lines():
    assert len(NAMES) <= 10
    assert all(len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 120 for name in NAMES)


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("name", NAMES)
def test_example_measures_what_was_recorded(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    result = importlib.import_module(f"examples.{name}").main()
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result
    for entry in result.values():
        assert set(entry) == {"measured", "expected"}
        wanted = entry["expected"]
        assert entry["measured"] == (wanted if isinstance(wanted, str) else pytest.approx(wanted, abs=TOLERANCE))


def test_examples_stand_alone():
    """None imports another file of the repository, so that each can be copied."""
    for name in NAMES:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert not {module.split(".")[0] for module in imported(source)} & {"examples", *NAMES} - {"json"}, name


def test_experiments_import_only_what_they_share():
    for path in EXAMPLES.glob("experiments/*.py"):
        shared = {module for module in imported(path.read_text(encoding="utf-8")) if module.startswith("examples.")}
        allowed = tuple(f"examples.experiments.{name}" for name in ("common", "problems", "style", "watching"))
        assert all(module.startswith(allowed) for module in shared), path.name


def imported(source):
    """The names of all modules that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def declared(extra):
    """The names of the distributions that an extra of the package brings, those of the package itself included."""
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = set()
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"][extra]):
        if requirement.name == project["name"]:
            names = names.union(*(declared(other) for other in requirement.extras))
        else:
            names.add(normalized(requirement.name))
    return names


def normalized(name):
    return re.sub("[-_.]+", "-", name.lower())


def test_the_extra_brings_all_that_examples_import():
    """The environment of the README's first command can run every file, but for sentences: their encoder is large."""
    brought, distributions = declared("examples"), packages_distributions()
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        for module in imported(source):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("examples", "lightning_ifthpo"):
                continue
            found = set(map(normalized, distributions.get(top, [top])))
            with_text = declared("text") if path.name == "sentences.py" else set()
            assert found & (brought | with_text), f"{path.name} imports {module}, which the extra does not bring"
        if "kfac" in source.lower():
            assert "curvlinops-for-pytorch" in brought
        if "LightningCLI" in source:
            assert "jsonargparse" in brought
        for name in re.findall(r'import_module\("(\w+)', source):
            assert name in WHERE_INSTALLED

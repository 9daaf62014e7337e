"""What the README shows is run as it stands."""

import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest

from examples.experiments import tables
from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from tests.helpers.report import support

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def versions_of_the_diff():
    """The module before and after the change that the README shows, and the lines that are new."""
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return before, after, [line for line in lines if line.startswith("+") and line[1:].strip()]


def test_fewer_than_ten_lines_make_a_forty_line_module_bilevel():
    before, _, new = versions_of_the_diff()
    assert len(before.splitlines()) >= 40
    assert len(new) < 10


@pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
@pytest.mark.parametrize("which", ["before", "after"])
def test_both_versions_of_the_module_train(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after, _ = versions_of_the_diff()
    namespace = {"__name__": "readme"}
    exec(compile(before if which == "before" else after, "README.md", "exec"), namespace)
    module, trainer = namespace["main"](epochs=4)
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.85
    if which == "after":
        assert any(decay != pytest.approx(1e-4, rel=1e-3) for decay in module.hyperparameter_values()["decay"].values())
        assert float(trainer.callback_metrics["hypergrad/skipped"]) == 0


@pytest.mark.parametrize("callback", [ExactGeN, IFTHypergradient, SharpnessMonitor])
def test_the_arguments_of_a_callback_are_those_of_its_constructor(callback):
    (block,) = (block for block in blocks("python") if block.startswith(f"{callback.__name__}("))
    shown = dict(re.findall(r"^    (\w+)=(.*?),", block, re.MULTILINE))
    real = {k: v.default for k, v in inspect.signature(callback).parameters.items()}
    assert {k: eval(v) for k, v in shown.items()} == real


def test_the_functional_example_prints_its_diagnosis():
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        (block,) = (block for block in blocks("python") if "implicit_hypergradient(" in block)
        exec(compile(block, "README.md", "exec"), {})
    (shown,) = (block for block in blocks("text") if block.startswith("negative curvature"))
    assert " ".join(shown.split()) in output.getvalue()
    assert "negative_curvature" in output.getvalue()


def test_the_spectrum_without_a_trainer():
    output = io.StringIO()
    (block,) = (block for block in blocks("python") if "lanczos(" in block)
    with contextlib.redirect_stdout(output):
        exec(compile(block, "README.md", "exec"), {})
    assert "StabilityEdge(sharpness=38.0)" in output.getvalue()


def test_what_is_supported_is_what_is_tested():
    assert support() in README.read_text(encoding="utf-8")


def test_the_tables_are_made_from_the_result_files():
    text = README.read_text(encoding="utf-8")
    assert tables.filled(text) == text

"""What the README and the site show runs as it stands."""

import contextlib
import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import lightning_ifthpo
from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor, TrainingReport
from tests.helpers.report import support

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [
    page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts and "auto_examples" not in page.parts
]
SIGNATURES = {
    IFTHypergradient: DOCS / "start" / "your_module.md",
    SharpnessMonitor: DOCS / "callbacks" / "sharpness.md",
    ExactGeN: DOCS / "callbacks" / "learning_rate.md",
    TrainingReport: DOCS / "callbacks" / "report.md",
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOOLS = ("venv", "pip", "pytest", "sphinx")  # of which the text around the command makes sure
COMMAND = re.compile(r"python3? (?:-m ([a-z_][\w.]*\w)|([\w/]+\.py))")
ADVICE = (
    "ignore:The .*dataloader.* does not have many workers",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",  # the mixin did
    "ignore:Starting from v1.9.0, `tensorboardX`",
)


def blocks(page):
    """The language and the text of each block of code, in order."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def blocks_in(page, language):
    return [text for own, text in blocks(page) if own == language]


def name_of(page):
    return str(page.relative_to(DOCS))


@pytest.mark.slow  # up to five seconds
@pytest.mark.filterwarnings(*ADVICE)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_in(page, "python")], ids=name_of)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch, capsys):
    """Blocks of Python share one namespace; a block of text right behind one is what it prints."""
    monkeypatch.chdir(tmp_path)
    namespace, before = {"__name__": "page"}, ""
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
        elif language == "text" and before == "python":
            assert_shown(" ".join(text.split()), " ".join(capsys.readouterr().out.split()))
        before = language


DECIMAL = re.compile(r"\d+\.\d+")


def assert_shown(shown, printed):
    """Compares all but decimal numbers exactly, and these within 5 % or one unit of their last digit.

    Processors round float32 in different ways: after hundreds of steps a page made on one differs by that from another.
    """
    found = re.search(f"({DECIMAL.pattern})".join(map(re.escape, DECIMAL.split(shown))), printed)
    assert found, f"expected {shown!r}, the page printed {printed!r}"
    for wanted, got in zip(DECIMAL.findall(shown), found.groups(), strict=True):
        unit = 10.0 ** -len(wanted.split(".")[1])
        assert abs(float(wanted) - float(got)) <= 1.01 * max(unit, 0.05 * float(wanted)), (shown, printed)


@pytest.mark.parametrize(
    ("printed", "same"), [("T 1.26, 3 runs", True), ("T 1.2, 3 runs", False), ("T 1.30, 4 runs", False)]
)
def test_a_page_is_compared_by_its_words_and_roughly_by_its_numbers(printed, same):
    with contextlib.nullcontext() if same else pytest.raises(AssertionError):
        assert_shown("T 1.30, 3 runs", printed)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_start_what_exists(page):
    for module, file in COMMAND.findall(page.read_text(encoding="utf-8")):
        if module:
            assert module in TOOLS or find_spec(module), module
        else:
            assert file == "train.py" or (ROOT / file).exists(), file


def versions_of_the_diff():
    """The module before and after the change that the README shows, and the lines that are new."""
    (diff,) = blocks_in(README, "diff")
    lines = diff.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    return before, after, [line for line in lines if line.startswith("+") and line[1:].strip()]


def test_the_readme_is_short_and_ten_lines_are_ten():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert len(versions_of_the_diff()[2]) == 10


def test_five_minutes_shows_the_same():
    """It stands there twice, because GitHub includes no files."""
    page = DOCS / "start" / "five_minutes.md"
    for language in ("diff", "console"):
        assert blocks_in(page, language) == blocks_in(README, language)
    (plain,) = blocks_in(page, "python")
    assert plain.split() == versions_of_the_diff()[1].split()


@pytest.mark.slow  # ten seconds
@pytest.mark.filterwarnings(*ADVICE)
def test_the_ten_lines_gain_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after, _ = versions_of_the_diff()
    promised = re.search(r"from \*\*(\.\d+) to (\.\d+)\*\*", README.read_text(encoding="utf-8"))
    for source, wanted in zip((before, after), promised.groups(), strict=True):
        namespace = {"__name__": "readme"}
        exec(compile(source, "README.md", "exec"), namespace)
        # rounding differs between machines; the gain is seven times as much
        assert namespace["main"]() == pytest.approx(float(wanted), abs=0.03)


@pytest.mark.parametrize("callback", SIGNATURES)
def test_the_arguments_of_a_callback_are_those_of_its_constructor(callback):
    (block,) = (block for block in blocks_in(SIGNATURES[callback], "py") if block.startswith(f"{callback.__name__}("))
    shown = dict(re.findall(r"^    (\w+)=(.*?),", block, re.MULTILINE))
    real = {k: v.default for k, v in inspect.signature(callback).parameters.items()}
    assert {k: eval(v) for k, v in shown.items()} == real


def test_what_is_supported_is_what_is_tested():
    assert support() in (DOCS / "support.md").read_text(encoding="utf-8")


# What functions return and take, and base classes: the functions have the examples.
WITHOUT_EXAMPLE = {
    *("Curvature", "CurvatureOperator", "LossOperator", "LinearSystem", "Solver", "SolveResult", "Status"),
    *("Hypergradient", "HypergradientMismatchError", "Influence"),
    *("CriticalStep", "Eigenpair", "ExtremeEigenvalues", "SpectralDensity", "TraceEstimate"),
}
PUBLIC = {
    name: getattr(module, name)
    for module in (
        lightning_ifthpo,
        *(import_module(f"lightning_ifthpo.{part}") for part in ("callbacks", "curvature", "hyperparameters")),
        *(import_module(f"lightning_ifthpo.{part}") for part in ("optimizers", "solvers", "spectrum", "step_size")),
    )
    for name in module.__all__
}


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT_EXAMPLE))
def test_what_is_public_has_an_example(name):
    assert ">>>" in PUBLIC[name].__doc__

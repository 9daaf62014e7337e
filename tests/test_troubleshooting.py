"""The page about messages: it is complete, up to date, and its links lead somewhere."""

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from lightning_ifthpo import IFTHypergradient, implicit_hypergradient
from lightning_ifthpo.callbacks.summary import Verdict
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.hyperparameters import Positive
from lightning_ifthpo.solvers import ConjugateGradient, Neumann, Status
from lightning_ifthpo.solvers.causes import Cause
from lightning_ifthpo.step_size import ExactGeNLR
from tests.helpers import troubleshooting
from tests.helpers import troubleshooting_words as words
from tests.helpers.troubleshooting import Message, explained, messages, messages_of
from tests.helpers.troubleshooting_words import Explanation

DOCS = Path(__file__).parents[1] / "docs"
AGAIN = "run `python -m tests.helpers.troubleshooting > docs/troubleshooting.md`"
WORDS = "tests/helpers/troubleshooting_words.py"


def texts(source, module="module"):
    return [message.text for message in messages_of(source, module)]


def pattern(text):
    """A regular expression for what a message says when its fields are filled in."""
    return re.compile(".*".join(map(re.escape, re.split("‹[^›]*›", text))), re.DOTALL)


def knows(said, kind):
    """Whether one of the messages of this kind can say these words."""
    said = " ".join(said.split())
    return any(message.kind == kind and pattern(message.text).fullmatch(said) for message in messages())


def test_the_page_is_what_the_package_says_now():
    shown = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert shown == troubleshooting.page(), f"messages or explanations have changed; {AGAIN}"


@pytest.mark.parametrize(
    ("own", "explained_ones", "where"),
    [
        ({status.name for status in Status}, words.STATUSES, "STATUSES"),
        ({cause.name for cause in Cause}, words.CAUSES, "CAUSES"),
        (set(get_args(Verdict)), words.VERDICTS, "VERDICTS"),
    ],
    ids=["statuses", "causes", "verdicts"],
)
def test_each_has_an_explanation(own, explained_ones, where):
    assert set(explained_ones) == own, f"complete {where} of {WORDS}, and {AGAIN}"
    assert all(text.strip() for entry in explained_ones.values() for text in entry)


def test_each_warning_has_one_explanation():
    entries = [entry for group in words.WARNINGS.values() for entry in group]
    told = [message for message in messages() if message.kind in ("warning", "notice")]
    assert len(told) >= 30
    explained(told, entries, "WARNINGS")  # raises a LookupError that says what to add, and where
    assert all(entry.meaning and entry.remedy for entry in (*entries, *words.SUMMARY))


def test_a_new_warning_fails_with_the_place_for_its_explanation():
    source = "def warn_of_moon(phase):\n    rank_zero_warn(f'the moon is {phase} tonight')"
    (message,) = messages_of(source, "runtime.moon")
    entries = [entry for group in words.WARNINGS.values() for entry in group]
    with pytest.raises(LookupError, match=rf"'the moon is ‹phase› tonight', .* no explanation.* WARNINGS of {WORDS}"):
        explained([message], entries, "WARNINGS")


def test_an_explanation_of_nothing_and_two_of_one_message_are_errors():
    message = Message("a", "warning", "something is odd here")
    with pytest.raises(LookupError, match="nothing in the package says 'even'"):
        explained([message], [Explanation("odd", "", ""), Explanation("even", "", "")], "WARNINGS")
    with pytest.raises(LookupError, match="has 2 explanations"):
        explained([message], [Explanation("odd", "", ""), Explanation("here", "", "")], "WARNINGS")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x): raise ValueError('expected more than this')", ["expected more than this"]),
        ("def f(x): raise ValueError(f'expected {x!r}, got {len(x)} and {type(x).__name__}')",
         ["expected ‹x›, got ‹number of x› and ‹class of x›"]),
        ("def f(x): raise ValueError(f'got {x.shape} ' + ('' if x else 'and nothing else'))",
         ["got ‹x› and nothing else"]),
        ("_LOST = 'lost in {dtype:.2g} noise'\ndef f(x): warnings.warn(_LOST.format(dtype=x), stacklevel=2)",
         ["lost in ‹dtype› noise"]),
        ("def f(self, x):\n    reason = f'step {x} '\n    reason += 'is odd' if x else 'is even'\n"
         "    raise RuntimeError(reason)", ["step ‹x› is odd", "step ‹x› is even"]),
        ("def f(self, x): self._skip('a cause', f'step {x} is late')", ["step ‹x› is late"]),
        ("def _skip(self, cause, reason): self._warn_once(f'{reason}. It is left out')", ["‹reason›. It is left out"]),
        ("def _warn_once(self, message): rank_zero_warn(message)", []),
        ("def f():\n    try: g()\n    except ValueError as error: raise", []),
        ("def f(n): raise ValueError(Cause.UNKNOWN_WEIGHTS.describe(name=n))",
         [troubleshooting.cause_text(Cause.UNKNOWN_WEIGHTS)]),
        ("def f(n): raise SecondDerivativeError(f'{n} is not smooth')",
         ["‹n› is not smooth; use curvature='finite_difference'"]),
    ],
)  # fmt: skip
def test_messages_are_found_in_a_source(source, expected):
    assert texts(source) == expected


def test_a_message_without_words_has_to_be_named():
    with pytest.raises(LookupError, match=f"SAID_ELSEWHERE of {WORDS}.* TELLERS"):
        texts("def tell(message): rank_zero_warn(message)")


def test_messages_of_real_calls_are_on_the_page():
    w, x = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0])
    calls = [
        (lambda: IFTHypergradient(every_n_batches=0), ValueError),
        (lambda: IFTHypergradient(solver=ConjugateGradient), TypeError),
        (lambda: Positive(-1.0), ValueError),
        (lambda: Neumann(step_size="optimizer").solve(MatrixOperator(torch.eye(1)), x), ValueError),
        (lambda: implicit_hypergradient(lambda: (w**2).sum(), lambda: (w**2).sum(), [w], [x]), ValueError),
        (lambda: implicit_hypergradient(lambda: w.detach().sum(), lambda: w.sum(), [w], [x]), ValueError),
    ]
    for call, kind in calls:
        with pytest.raises(kind, match=r".") as caught:
            call()
        assert knows(str(caught.value), kind.__name__), caught.value


def test_a_real_warning_is_on_the_page():
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    scheduler = ExactGeNLR(torch.optim.SGD([weight], lr=0.1), probe="same_batch")
    scheduler.probe(lambda: (weight * weight.detach()).sum())
    weight.grad = torch.ones(1)
    with pytest.warns(UserWarning, match="does not change along its gradient") as caught:
        scheduler.optimizer.step()
    assert knows(str(caught[0].message), "warning")


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["troubleshooting.md", "theory.md", "from_the_paper.md"])
def test_links_lead_to_pages_and_headings(name):
    page = DOCS / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            other = page if not path else (DOCS / path)
            assert other.is_file(), target
            assert not anchor or anchor in anchors(other), target

"""The bar on a terminal, and nothing elsewhere."""

import io
import re
import time
from contextlib import redirect_stderr

import pytest

from examples.experiments import common
from examples.experiments.watching import watched
from tests.helpers.trainers import Classifier


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _kind_of_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def seen_on(terminal):
    """What people see, without colours and line ends."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())


def test_items_are_counted_on_a_terminal():
    with redirect_stderr(Terminal()) as terminal:
        assert list(watched("abc", "letters")) == ["a", "b", "c"]
    assert re.search(r"letters .* 2/3 ", seen_on(terminal))


def test_items_are_counted_nowhere_else(capsys):
    assert watched("abc", "letters") == "abc"
    assert capsys.readouterr().err == ""


class Slow(Classifier):
    def inner_loss(self, batch):
        time.sleep(0.4)  # the bar is drawn once a second
        return super().inner_loss(batch)


def test_a_training_run_is_shown_on_a_terminal():
    with redirect_stderr(Terminal()) as terminal:
        common.quiet_trainer().fit(Slow())
    assert re.search(r"training run \d+ .* 0/4 ", seen_on(terminal))
    assert re.search(r"training run \d+ .* 3/4 ", seen_on(terminal))


def test_the_bar_goes_when_training_fails():
    class Failing(Classifier):
        def inner_loss(self, batch):
            raise RuntimeError("a mistake of the user")

    with redirect_stderr(Terminal()) as terminal:
        for _ in range(2):  # rich allows one bar at a time
            with pytest.raises(RuntimeError, match="a mistake of the user"):
                common.quiet_trainer(limit_val_batches=0).fit(Failing())
    assert len(set(re.findall(r"training run \d+", seen_on(terminal)))) == 2

"""What is seen of slow work, in the real bars of real Trainers."""

import io
import re
import time
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger
from packaging.version import Version

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.curvature import MatrixOperator
from lightning_ifthpo.runtime.progress import Progress
from lightning_ifthpo.solvers import Identity, Neumann
from tests.checks import check_leaves_training_untouched
from tests.helpers.monitored import Plain
from tests.helpers.trainers import Classifier, quiet_trainer, trained

OPERATOR = MatrixOperator(torch.eye(2))
OWN = ("trying the first batch", "hyper step", "sharpness,", "sharpness:", "spectral density", "losses at the end")


def rich_bar():
    versions = [Version(version(name)) for name in ("lightning", "rich")]
    if versions[0] < Version("2.5.3") and versions[1] >= Version("14.1"):
        pytest.skip("RichProgressBar of this Lightning cannot stop a bar of this rich: pop from empty list")
    return RichProgressBar(console_kwargs={"force_terminal": True, "width": 160})


BARS = {"tqdm": TQDMProgressBar, "rich": rich_bar}


class Slow(Classifier):
    """A product by differences takes two evaluations, which are longer than a number stays."""

    def inner_loss(self, batch):
        time.sleep(0.06)
        return super().inner_loss(batch)


class SlowPlain(Plain):
    def training_step(self, batch, batch_idx):
        time.sleep(0.06)
        return super().training_step(batch, batch_idx)


def shown(capsys):
    """The text that the bars have written, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)


def fit(module, callbacks, bar, **options):
    trainer = quiet_trainer(callbacks=[*callbacks, bar], enable_progress_bar=True, **options)
    trainer.fit(module)
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", BARS)
def test_hyper_steps_and_what_comes_before_and_after_them(kind, capsys):
    """Eleven products of .12 s and two evaluations: the second hyper step is known to take longer than a second."""
    tuner = IFTHypergradient(2, solver=Neumann(terms=9, damping=5.0), curvature="finite_difference", on_failure="use")
    fit(Slow(), [tuner], BARS[kind](), limit_val_batches=0)
    text = shown(capsys)
    epoch = {"tqdm": "Epoch 0", "rich": "Epoch 0/0"}[kind]
    assert f"{epoch}: trying the first batch" in text
    first, second = (text.index(f"{epoch}: hyper step, product {number}") for number in (2, "3 of about "))
    assert first < second
    assert f"{epoch}: losses at the end" in text
    after = text[text.rindex("hyper step") :].replace("losses at the end", "")
    assert not any(own in after[len("hyper step") :] for own in OWN)


@pytest.mark.parametrize("kind", BARS)
def test_measurements_and_spectral_densities(kind, capsys, tmp_path):
    monitor = SharpnessMonitor(
        1, curvature="finite_difference", max_iterations=5, spectral_density=True, max_overhead=None
    )
    logger = TensorBoardLogger(tmp_path)
    fit(SlowPlain(), [monitor], BARS[kind](), logger=logger)
    text = shown(capsys)
    assert re.search(r"Epoch 0(/0)?: sharpness, product 3", text)
    assert re.search(r"Epoch 0(/0)?: spectral density, product 9", text)
    assert monitor.failures == 0


def test_what_exact_gen_tries_on_the_first_batch(capsys):
    fit(Plain(), [ExactGeN()], TQDMProgressBar())
    assert "Epoch 0: trying the first batch" in shown(capsys)


class Disabled(TQDMProgressBar):
    """As Lightning leaves the bar in all processes but the first."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.disable()


class DisabledRich(RichProgressBar):
    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.disable()


class Own(ProgressBar):
    """A user's bar, which prints."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.print(f"batch {batch_idx}")


@pytest.mark.parametrize(
    "make",
    [Disabled, DisabledRich, Own, lambda: TQDMProgressBar(refresh_rate=0), lambda: RichProgressBar(refresh_rate=0)],
    ids=["tqdm, other rank", "rich, other rank", "a bar of the user", "tqdm, off", "rich, off"],
)
def test_nothing_is_shown_in_a_bar_that_is_off_or_unknown(make, capsys):
    fit(Classifier(), [IFTHypergradient(1, solver=Identity()), SharpnessMonitor(1)], make())
    assert not any(own in shown(capsys) for own in OWN)


def test_nothing_is_shown_without_a_bar(capsys):
    quiet_trainer(callbacks=[IFTHypergradient(1), SharpnessMonitor(1)]).fit(Classifier())
    assert shown(capsys) == ""


@pytest.mark.parametrize("kind", BARS)
def test_training_is_left_untouched(kind):
    """The hyper steps have length zero."""

    def make():
        return Classifier(hyper_lr=0.0)

    options = {"enable_progress_bar": True}
    callbacks = [IFTHypergradient(2, on_failure="use"), SharpnessMonitor(2, max_overhead=None), BARS[kind]()]
    _, _, watched = trained(callbacks, make, **options)
    _, _, plain = trained([BARS[kind]()], make, **options)
    assert watched.own
    check_leaves_training_untouched(watched, plain)


@pytest.mark.parametrize("kind", BARS)
def test_an_error_leaves_the_bar_as_it_was(kind):
    class Failing(Classifier):
        def outer_loss(self, batch):
            raise RuntimeError("a mistake of the user")

    bar = BARS[kind]()
    descriptions = []

    class Watched(IFTHypergradient):
        def on_exception(self, trainer, pl_module, exception):
            shown = bar.train_progress_bar
            descriptions.append(shown.desc if kind == "tqdm" else shown.description)
            super().on_exception(trainer, pl_module, exception)

    with pytest.raises(RuntimeError, match="a mistake of the user"):
        fit(Failing(), [Watched(1)], bar, limit_val_batches=0, num_sanity_val_steps=0)
    assert [description.rstrip(" :") for description in descriptions] == [
        {"tqdm": "Epoch 0", "rich": "Epoch 0/0"}[kind]
    ]
    heard = []
    OPERATOR.matvec(torch.ones(2))
    assert not heard


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def watched_bar():
    """A Trainer's tqdm bar that writes to a file, as far as `Progress` looks at it; and what it has said."""
    callback, written = TQDMProgressBar(), io.StringIO()
    callback.train_progress_bar = Tqdm(desc="Epoch 3", total=9, file=written)
    return SimpleNamespace(progress_bar_callback=callback), lambda: re.findall(
        r"(Epoch 3[^%]*?):? +\d+%", written.getvalue()
    )


def test_work_is_shown_the_first_time_if_it_is_known_to_be_long_and_after_a_second():
    clock = Hand()
    progress = Progress(clock)
    trainer, said = watched_bar()

    def work(*seconds):
        before = len(said())
        with progress.showing(trainer, "hyper step"):
            for duration in seconds:
                clock.seconds += duration
                OPERATOR.matvec(torch.ones(2))
        return said()[before:]

    step = "Epoch 3: hyper step"
    assert work(0.01, 0.01) == [step, "Epoch 3"]  # nobody knows yet how long it takes
    assert work(0.4, 0.4) == []
    assert work(0.4, 0.4, 0.4) == [f"{step}, product 3", "Epoch 3"]  # two were expected
    assert work(0.4, 0.09, 0.09) == [
        step,
        f"{step}, product 1 of about 3",
        f"{step}, product 3 of about 3",  # the second came .09 seconds after the first
        "Epoch 3",
    ]
    assert work(0.4, 0.4) == []


def test_each_work_is_expected_to_take_as_long_as_the_last_one_of_its_name():
    clock = Hand()
    progress = Progress(clock)
    trainer, said = watched_bar()
    for name, seconds in (("hyper step", 0.1), ("sharpness", 2.0)) * 2:
        with progress.showing(trainer, name):
            clock.seconds += seconds
    told = [text for text in said() if text != "Epoch 3"]
    assert told == ["Epoch 3: hyper step", "Epoch 3: sharpness", "Epoch 3: sharpness"]

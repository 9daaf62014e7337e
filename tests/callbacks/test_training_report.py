"""The page that a run writes about itself."""

import copy
import html.parser
import pickle
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor, TrainingReport
from lightning_ifthpo.callbacks.training_report import callback as written
from lightning_ifthpo.callbacks.training_report.records import Series
from tests.callbacks.training_report.planted import DeadLayer, Plain
from tests.checks import check_leaves_training_untouched, check_state_is_plain
from tests.helpers.features import Simple
from tests.helpers.trainers import Classifier, Deterministic, quiet_trainer, same, trained

SECTIONS = ["told", "losses", "hyperparameters", "hyper-steps", "solves", "curvature", "rates", "gradients", "time"]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """A page that is checked as it is read: tags are closed, ids are unique, and headings skip no level."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open, self.ids, self.levels, self.links, self.images, self.words = [], [], [], [], [], []
        self.feed(self.text)
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)
        assert self.levels[0] == 1
        assert all(after <= before + 1 for before, after in zip(self.levels, self.levels[1:], strict=False))
        assert all(link[1:] in self.ids for link in self.links)  # nothing outside the page
        assert all(self.images)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert tag not in ("script", "img", "iframe")
        assert not {"src", "onclick", "onload"} & values.keys()
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if re.fullmatch(r"h\d", tag):
            self.levels.append(int(tag[1]))
        if "href" in values or "xlink:href" in values:
            self.links.append(values.get("href") or values["xlink:href"])
        if tag == "svg":
            self.images.append(values["role"] == "img" and len(values["aria-label"]) > 20)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def sections(self):
        return [name for name in self.ids if name in SECTIONS]


def everything():
    return [IFTHypergradient(2, on_failure="use"), SharpnessMonitor(2, max_overhead=None), ExactGeN(2)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "report.html"


def test_all_sections_are_there_if_all_callbacks_are(path):
    report = TrainingReport(path, every_n_batches=1)
    trained([*everything(), report], accumulate_grad_batches=2)
    page = Page(path)
    assert page.sections == SECTIONS[1:]
    words = " ".join(" ".join(page.words).split())
    for text in (
        "Training is over, 12 training batches.",
        "Verdict:",
        "Their matrix is",
        "Gradient noise scale",
        "was predicted.",
        "net.0.weight",
        "IFTHypergradient",
        "SharpnessMonitor",
        "Ticks on the horizontal axis mark hyper steps.",
        "validation: outer_loss: from",
    ):
        assert text in words
    for title in (
        "Training loss",
        "decay",
        "λ_max of the training loss (sharpness)",
        "Learning rate",
        "What ExactGeN found",
    ):
        assert title in page.text
    assert "#0a0b" not in page.text.replace("#0a0b0c", "")  # each colour is one of the page
    assert "#010203" not in page.text
    assert "prefers-color-scheme: dark" in page.text
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_without_other_callbacks_and_without_the_mixin(path):
    quiet_trainer(callbacks=[TrainingReport(path)], max_epochs=2).fit(Plain())
    page = Page(path)
    assert page.sections == ["losses", "rates", "gradients", "time"]
    assert "training loss: from" in page.text
    assert "use accumulate_grad_batches &gt; 1" in page.text
    assert "validation: val_loss: from" in page.text


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("others", [list, everything])
def test_training_is_left_untouched(others, accumulate, path):
    report = TrainingReport(path, every_n_batches=1, every_n_seconds=0.0)
    _, trainer, watched = trained([*others(), report], accumulate_grad_batches=accumulate)
    _, plain, twin = trained(others(), accumulate_grad_batches=accumulate)
    check_leaves_training_untouched(watched, twin)
    assert trainer.callback_metrics.keys() == plain.callback_metrics.keys()
    assert watched.own == twin.own


class Reader(Callback):
    """Reads the page after each batch, as a person would."""

    def __init__(self, path):
        self.path, self.pages = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pages.append(Page(self.path))


def test_the_page_is_there_while_training_goes_on(path):
    reader = Reader(path)
    report = TrainingReport(path, every_n_batches=2, every_n_seconds=0.0, max_overhead=None)
    trained([report, reader], lambda: Classifier().freeze_hyperparameters(), max_epochs=1)
    assert "Training, one training batch." in reader.pages[0].text
    assert "Nothing unusual was seen by these rules so far." in reader.pages[0].text
    assert "Training, 3 training batches." in reader.pages[3].text
    assert "<svg" in reader.pages[0].text


def test_charts_are_as_rare_as_the_budget_wants(path, monkeypatch):
    from lightning_ifthpo.callbacks.training_report import page

    drawn, times = page.drawn, []
    monkeypatch.setattr(page, "drawn", lambda sections: times.append(1) or drawn(sections))
    reader = Reader(path)
    trained([TrainingReport(path, every_n_batches=1, every_n_seconds=0.0, max_overhead=1e-6), reader])
    assert len(times) == 1
    assert "This chart is drawn later." in reader.pages[8].text
    assert "This chart is drawn later." not in Page(path).text


def test_pages_are_not_written_more_often_than_wanted(path, monkeypatch):
    replace, times = written._replace, []
    monkeypatch.setattr(written, "_replace", lambda *args: times.append(1) or replace(*args))
    trained([TrainingReport(path, every_n_batches=1, every_n_seconds=1e6)])
    assert len(times) == 2


class Failing(Simple):
    def inner_loss(self, batch):
        if self.trainer.global_step == 3:
            raise KeyError("x")
        return super().inner_loss(batch)


@pytest.mark.parametrize("first", [True, False])
def test_the_page_is_written_after_an_exception(first, path):
    report, tuner = TrainingReport(path), IFTHypergradient(1)
    with pytest.raises(KeyError):
        quiet_trainer(callbacks=[report, tuner] if first else [tuner, report]).fit(Failing())
    page = Page(path)
    assert re.search("Training was ended by KeyError, [23] training batches.", page.text)
    assert re.fullmatch("KeyError: 'x'. It came after [23] training batches.", report.findings[0].evidence)
    assert ("predicted to lower the outer loss" if first else "was predicted.") in page.text


@pytest.mark.parametrize(
    ("kind", "told"), [(DeadLayer, ["TrainingReport: found 'no gradient reaches a layer'; see {uri}"]), (Plain, [])]
)
def test_the_worst_finding_is_told_at_the_end(kind, told, path, caplog):
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[TrainingReport(path)], max_epochs=20).fit(kind())
    messages = [record.getMessage() for record in caplog.records if "TrainingReport: found" in record.getMessage()]
    assert messages == [line.format(uri=path.absolute().as_uri()) for line in told]


class Unusable(Plain):
    def configure_optimizers(self):
        raise KeyError("x")


class WithoutData(Simple):
    """Fails in `on_train_start` of the tuner, behind the report or before it."""

    def outer_dataloader(self):
        return []


@pytest.mark.parametrize(("make", "error"), [(Unusable, KeyError), (WithoutData, ValueError)])
@pytest.mark.parametrize("first", [True, False])
def test_an_error_before_training_comes_first_on_a_page_that_replaces_an_older_one(make, error, first, path):
    path.parent.mkdir()
    path.write_text("an older page")
    report = TrainingReport(path)
    others = [IFTHypergradient(1)] if make is WithoutData else []
    with pytest.raises(error, match=r".") as raised:
        quiet_trainer(callbacks=[report, *others] if first else [*others, report]).fit(make())
    page, (finding,) = Page(path), report.findings
    assert f"Training was ended by {error.__name__} before the first training batch." in page.text
    assert "Nothing unusual" not in page.text
    assert finding.kind == "an error ended the run"
    assert finding.evidence.startswith(f"{error.__name__}: {str(raised.value)[:60]}")
    assert finding.evidence.endswith("It came before the first training batch.")


class Penalized(Classifier):
    def outer_loss(self, batch):
        return super().outer_loss(batch) + self.decay()


def test_warnings_of_the_package_are_shown_as_long_as_the_fit_lasts(path):
    report = TrainingReport(path)
    with pytest.warns(UserWarning, match="by itself, not only through the weights"):
        trained([IFTHypergradient(1, on_failure="use"), report], Penalized)
    page = Page(path)
    assert page.sections[0] == "told"
    assert page.text.count("outer_loss depends on hyperparameter &#39;decay&#39; by itself") == 1
    with pytest.warns(UserWarning, match="by itself, not only through the weights"):
        trained([IFTHypergradient(1, on_failure="use")], Penalized)
    report.setup(None, None, "validate")
    assert len(report._notes.messages) == 1
    trained([report], Plain)
    assert "told" not in Page(path).sections


def test_ctrl_c_is_no_fault(path):
    class Stopped(Plain):
        def training_step(self, batch, batch_idx):
            if self.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    report = TrainingReport(path)
    with pytest.raises(SystemExit, match=r"1"):
        quiet_trainer(callbacks=[report]).fit(Stopped())
    assert report.findings == ()
    assert "Training was ended by KeyboardInterrupt, 3 training batches." in Page(path).text


def test_a_second_fit_starts_anew(path):
    report, module = TrainingReport(path, every_n_batches=1), Classifier()
    quiet_trainer(callbacks=[IFTHypergradient(2, on_failure="use"), report], max_epochs=2).fit(module)
    assert "8 training batches" in Page(path).text
    quiet_trainer(callbacks=[report], max_epochs=1).fit(module)
    page = Page(path)
    assert "Training is over, 4 training batches." in page.text
    assert "hyper-steps" not in page.sections


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    def fit(name, max_epochs, checkpoint=None):
        torch.manual_seed(0)
        report = TrainingReport(tmp_path / "report.html", every_n_batches=1)
        saving = ModelCheckpoint(tmp_path / name, save_last=True)
        options = {"callbacks": [IFTHypergradient(2), report, saving], "enable_checkpointing": True}
        quiet_trainer(**options, max_epochs=max_epochs).fit(Deterministic(), ckpt_path=checkpoint)
        return report.state_dict()

    whole = fit("whole", 4)
    fit("part", 2)
    check_state_is_plain(whole)
    resumed = fit("resumed", 4, tmp_path / "part" / "last.ckpt")
    assert same(resumed, whole)
    assert "16 training batches" in (tmp_path / "report.html").read_text()


def resumed(tmp_path, report, earlier=()):
    """Trains for two epochs of four batches, and goes on for one with a report."""
    first = quiet_trainer(callbacks=[*earlier], max_epochs=2)
    first.fit(Classifier())
    first.save_checkpoint(tmp_path / "last.ckpt")
    quiet_trainer(callbacks=[report], max_epochs=3).fit(Classifier(), ckpt_path=tmp_path / "last.ckpt")
    return Page(report.path)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_report_may_be_written_to_another_path(tmp_path):
    report = TrainingReport(tmp_path / "new.html", every_n_batches=1)
    page = resumed(tmp_path, report, [TrainingReport(tmp_path / "old.html", every_n_batches=1)])
    assert "Training is over, 12 training batches." in page.text


def test_a_report_that_is_new_in_a_resumed_run_says_so(tmp_path):
    page = resumed(tmp_path, TrainingReport(tmp_path / "report.html", every_n_batches=1))
    assert "Training is over, 4 training batches since the run was resumed, without a report of what was" in page.text


def test_a_state_of_another_version_does_not_end_training(path):
    report = TrainingReport(path)
    trained([report], max_epochs=1)
    before = report.state_dict()
    state = copy.deepcopy(before)
    state["layers"]["net.0.weight"]["unknown"] = 1.0
    with pytest.warns(UserWarning, match="TrainingReport failed, and training goes on: TypeError"):
        report.load_state_dict(state)
    assert same(report.state_dict(), before)


def test_it_can_be_copied_and_pickled(path):
    report = TrainingReport(path)
    for clone in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert clone.state_key == report.state_key
        assert clone.state_dict() == report.state_dict()
        trained([clone], max_epochs=1)


def test_validation_alone_does_nothing(path):
    report = TrainingReport(path)
    before = report.state_dict()
    quiet_trainer(callbacks=[report]).validate(Classifier(), verbose=False)
    assert report.state_dict() == before
    assert not path.exists()


class Manual(Plain):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return [
            torch.optim.SGD(part.parameters(), lr=rate) for part, rate in ((self.net[:3], 0.1), (self.net[3:], 0.2))
        ]


class Skipping(Plain):
    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 0 else super().training_step(batch, batch_idx)


class Closure(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3, line_search_fn="strong_wolfe")


class Words(Plain):
    """An embedding with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 16, sparse=True)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0] + self.words(batch[1])), batch[1])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("kind", [Manual, Skipping, Closure, Words])
def test_unusual_modules_are_shown_too(kind, path):
    report = TrainingReport(path, every_n_batches=2)
    quiet_trainer(callbacks=[report], max_epochs=4).fit(kind())
    page = Page(path)
    assert page.sections == ["losses", "rates", "gradients", "time"]
    assert report.findings == ()
    if kind is Manual:
        assert "optimizer 1, group 0: from 0.2 to 0.2" in page.text


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_are_not_taken_for_weights_without_a_gradient(path):
    class WithoutLoss(Plain):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)

    report = TrainingReport(path, every_n_batches=2)  # looks at those without
    quiet_trainer(callbacks=[report], max_epochs=4).fit(WithoutLoss())
    assert report.findings == ()
    assert "training loss: from" in Page(path).text


def test_text_of_the_user_is_escaped(path):
    class Strange(Plain):
        def validation_step(self, batch, batch_idx):
            self.log('val_<b>"loss"&$x$', 1.0)

    quiet_trainer(callbacks=[TrainingReport(path, every_n_batches=1)], max_epochs=1).fit(Strange())
    page = Page(path)
    assert "<b>" not in page.text
    assert any('val_<b>"loss"&$x$' in words for words in page.words)


def test_a_long_run_makes_a_small_page(path):
    """As many values as in 100,000 batches, in as many curves as a report keeps."""
    module, report = Classifier(), TrainingReport(path, every_n_batches=1)
    trainer = quiet_trainer(callbacks=[*everything(), report], max_epochs=10)
    trainer.fit(module)
    collector = report._collector
    for name in range(20):
        for part in ("mean", "min", "max", *range(4)):
            collector._records.open(f"hyperparameter/h{name}/{part}").add(0, 1.0)
    noise = (torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1).tolist()
    full = Series()
    for step, value in enumerate(noise):
        full.add(step, value)
    for name in collector._records.names():
        collector._records._series[name] = full
    collector._loss.curve = collector._marks = full
    report._write(trainer, module, "Training.", draws=True)
    assert len(Page(path).images) >= 20
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_package_is_told_at_once(missing, monkeypatch):
    monkeypatch.setattr(written, "find_spec", lambda name: None if name == missing else True)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}: pip install 'lightning_ifthpo\[plots\]'"):
        TrainingReport()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_batches": 0}, "expected every_n_batches to be an integer >= 1, got 0"),
        ({"every_n_seconds": -1.0}, "expected every_n_seconds >= 0, got -1.0"),
        ({"max_overhead": 2.0}, "expected 0 <= max_overhead < 1 or None, got 2.0"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingReport(**options)


def test_a_page_that_cannot_be_written_does_not_end_training(tmp_path):
    (tmp_path / "file").write_text("")
    report = TrainingReport(tmp_path / "file" / "report.html", every_n_seconds=0.0, every_n_batches=1)
    with pytest.warns(UserWarning, match="TrainingReport failed, and training goes on: .*Error") as told:
        _, trainer, _ = trained([report])
    assert trainer.global_step == 12
    assert len([warning for warning in told if "TrainingReport failed" in str(warning.message)]) == 1


def test_a_page_that_cannot_take_its_place_leaves_nothing_behind(path):
    report = TrainingReport(path)
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="TrainingReport failed, and training goes on: IsADirectoryError"):
        trained([report], max_epochs=1)
    assert list(path.parent.iterdir()) == [path]


def test_a_link_to_a_page_stays_a_link(tmp_path):
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "report.html")
    trained([TrainingReport(link)], max_epochs=1)
    assert link.is_symlink()
    assert "Training is over" in (tmp_path / "report.html").read_text()


def test_a_name_that_utf_8_has_not_is_shown_with_a_question_mark(path):
    class Strange(Plain):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss\ud800", 1.0)

    quiet_trainer(callbacks=[TrainingReport(path)], max_epochs=1).fit(Strange())
    assert "validation: val_loss?: from" in Page(path).text


@pytest.mark.parametrize("name", ["", "."])
def test_a_path_without_a_file_is_refused(name):
    with pytest.raises(ValueError, match=r"expected path to be that of a file, such as 'report.html', got '\.?'"):
        TrainingReport(name)


def test_the_path_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected path to be that of a file"):
        TrainingReport(tmp_path)


@pytest.mark.slow  # starts a process
def test_importing_the_package_imports_no_page():
    code = "import sys, lightning_ifthpo; print([m for m in sys.modules if m.endswith(('.page', '.drawing'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

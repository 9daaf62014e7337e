"""The verdict on a run, and what people see of it."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_ifthpo import IFTHypergradient
from lightning_ifthpo.callbacks.hyper_metrics import extents
from lightning_ifthpo.callbacks.summary import Change, judge
from lightning_ifthpo.hyperparameters import IndexedDataset, LossWeights, SampleWeights, WeightNetwork
from lightning_ifthpo.solvers import Identity
from tests.callbacks.training_report.planted import OuterIsTraining, blobs
from tests.helpers.trainers import Classifier, Ridge, loader, quiet_trainer


def evidence(confirmed=0.0, error=0.1, travel=5.0, steps=60):
    return SimpleNamespace(predicted=1.0, confirmed=confirmed, error=error, travel=travel, steps=steps)


JUDGED = {
    "confirmed": (
        evidence(0.5),
        (1.0, 0.8),
        None,
        "helped",
        "changed the outer loss by -0.5 ± 0.1, to first order; -1 was",
        "",
    ),
    "confirmed, by heart": (
        evidence(0.5),
        (1.0, 0.2),
        (1.0, 0.5),
        "unclear",
        "outer examples alone",
        "ends at 0.2 and the held-out loss at 0.5",
    ),
    "by heart, in spite of a gap at the start": (
        evidence(0.5),
        (2.02, 0.02),
        (2.32, 0.19),
        "unclear",
        "outer examples alone",
        "ends at 0.02 and the held-out loss at 0.19",
    ),
    "confirmed, held out too": (evidence(0.5), (1.0, 0.4), (1.0, 0.5), "helped", "changed", ""),
    "confirmed, and risen": (evidence(0.5), (1.0, 1.4), None, "unclear", "the outer loss rose from 1 to 1.4", "freeze"),
    "risen by less than is shown": (evidence(0.5), (1.341, 1.3412), (1.0, 1.0001), "helped", "changed", ""),
    "held out risen": (evidence(0.5), (1.0, 0.9), (1.0, 1.1), "unclear", "the held-out loss rose from 1 to 1.1", "fre"),
    "too little": (evidence(0.02, 0.001), (1.0, 0.8), None, "unclear", "changed the outer loss by -0.02", "freeze"),
    "taken back": (evidence(-0.5), (1.0, 0.8), None, "harmed", "past the best", "freeze_hyperparameters"),
    "not sure": (evidence(0.15), (1.0, 0.5), None, "did nothing", "comes from training", ""),
    "no travel": (evidence(0.0, 0.0, 0.2), (1.0, 0.5), None, "did nothing", "moved by 0.2 units", "train longer"),
    "little travel, and sure": (evidence(0.5, 0.1, 0.2), (1.0, 0.5), None, "helped", "changed", ""),
    "few": (
        evidence(0.0, 0.0, 0.2, 3),
        (1.0, 0.5),
        None,
        "did nothing",
        "moved",
        "3 hyper steps are few; train",
    ),
    "one": (evidence(0.5, steps=1), (1.0, 0.5), None, "helped", "", "One hyper step is few"),
    "training overfits by itself": (evidence(0.0, 0.0, 0.2), (1.0, 4.0), None, "did nothing", "moved", "longer"),
    "exploded": (evidence(0.5), (1.0, 4.0), None, "harmed", "rose from 1 to 4", "freeze"),
    "not a number": (evidence(0.5, travel=0.1), (1.0, math.nan), None, "harmed", "is nan: training diverged", "freeze"),
    "zero": (evidence(0.5), (1.0, 0.0), (1.0, 0.0), "helped", "changed", ""),
    "zero, taken back": (evidence(-0.5), (1.0, 0.0), None, "harmed", "past the best", "freeze"),
    "likelihood, better": (evidence(0.5), (-1.0, -4.0), (-1.0, -5.0), "helped", "changed", ""),
    "likelihood, worse": (evidence(0.1), (-4.0, -1.0), None, "unclear", "rose from -4 to -1", "freeze"),
    "no step": (evidence(), None, None, "did nothing", "as they were", ""),
}


@pytest.mark.parametrize("case", JUDGED)
def test_verdicts(case):
    found, outer, held_out, verdict, reason, advice = JUDGED[case]
    judged, why, told = judge(found, outer, held_out, "more")
    assert judged == verdict
    assert reason in why
    assert advice in " ".join(told)
    assert bool(told) == bool(advice)


def fitted(callback, make=Classifier, **options):
    torch.manual_seed(0)
    module = make()
    quiet_trainer(**{"callbacks": [callback], "max_epochs": 3, "limit_val_batches": 0, **options}).fit(module)
    return module


def test_a_summary_has_values_in_natural_units_losses_and_counts():
    callback = IFTHypergradient(1, held_out_dataloader=loader(20, batch_size=5, seed=3))
    module = fitted(callback)
    summary = callback.summary()
    assert summary.hyper_steps == 12
    assert summary.skipped == {}
    assert 0.0 < summary.share_of_time < 1.0
    (change,) = summary.hyperparameters
    assert change.name == "decay"
    assert change.start == pytest.approx((Classifier().decay.natural_values()["0.weight"].item(),) * 3)
    assert change.end == pytest.approx(extents(module)["decay"])
    module.eval()
    with torch.no_grad():
        held_out = [float(module.outer_loss(batch)) for batch in loader(20, batch_size=5, seed=3)]
    assert summary.held_out_loss[1] == pytest.approx(sum(held_out) / 4, rel=1e-5)
    assert summary.held_out_loss[0] != summary.held_out_loss[1]
    assert summary.outer_loss[0] != summary.outer_loss[1]
    json.dumps(summary.as_dict())
    assert summary.rows() == [
        {
            "name": "decay",
            **dict(zip(("start_mean", "start_min", "start_max"), change.start, strict=True)),
            **dict(zip(("end_mean", "end_min", "end_max"), change.end, strict=True)),
        }
    ]
    assert set(summary.as_dict()) == {field.name for field in dataclasses.fields(summary)}


def test_the_outer_loss_at_the_end_is_of_the_examples_at_the_start():
    """With one full batch of outer examples both are known."""
    callback = IFTHypergradient(1)
    module = fitted(callback, Ridge, max_epochs=4)
    expected = module.outer_loss((module.xv, module.yv)).item()
    assert callback.summary().outer_loss[1] == pytest.approx(expected)
    assert callback.summary().outer_loss[0] > expected


def test_the_console_shows_it(capsys, caplog):
    caplog.set_level("INFO", logger="lightning.pytorch")
    callback = IFTHypergradient(1)
    fitted(callback)
    shown = [record.message for record in caplog.records if "Verdict" in record.message]
    assert shown == [str(callback.summary())]
    assert "made 12 hyper steps in" in shown[0]
    assert "decay: 0.01 → " in shown[0]


def test_a_skipped_hyper_step_is_counted_with_its_cause():
    class Failing(Classifier):
        def outer_loss(self, batch):
            loss = super().outer_loss(batch)
            return loss * math.nan if self.trainer.global_step == 3 else loss

    callback = IFTHypergradient(1)
    with pytest.warns(UserWarning, match="nonfinite"):
        fitted(callback, Failing)
    summary = callback.summary()
    assert summary.skipped == {"nonfinite": 1}
    assert "12 hyper steps (1 skipped: nonfinite) in" in str(summary)


def test_there_is_none_before_the_end_of_a_fit():
    with pytest.raises(RuntimeError, match=r"call trainer\.fit first"):
        IFTHypergradient().summary()


def test_held_out_data_are_checked_early():
    with pytest.raises(TypeError, match=r"held_out_dataloader: expected one DataLoader, or a list of batches"):
        IFTHypergradient(held_out_dataloader=loader().dataset)
    for data, message in (([], "is empty"), ([{"x": torch.ones(2, 3)}], "no outer loss .ValueError")):
        with pytest.raises(ValueError, match=f"held_out_dataloader.*{message}"):
            fitted(IFTHypergradient(1, start_after_batches=1000, held_out_dataloader=data))


def test_held_out_data_and_the_summary_change_nothing():
    held_out = DataLoader(loader(20, seed=3).dataset, batch_size=5, shuffle=True)
    modules = [fitted(IFTHypergradient(2, held_out_dataloader=data)) for data in (None, held_out)]
    state, other = (module.state_dict() for module in modules)
    assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("shared", "held_out", "verdict"),
    [("20 of 20", None, "unclear"), ("8 of 20", None, "helped"), ("20 of 20", (1.0, 0.9), "helped")],
)
def test_a_gain_on_training_examples_alone_means_nothing(shared, held_out, verdict):
    found, reason, advice = judge(evidence(0.5), (1.0, 0.8), held_out, shared=shared)
    assert found == verdict
    assert ("all outer examples are training examples" in reason) == (verdict == "unclear")
    assert bool(advice) == (verdict == "unclear")


def test_a_run_on_training_examples_is_not_said_to_help():
    class Decayed(OuterIsTraining):
        initial = 0.1

    verdicts = []
    for held_out in (None, DataLoader(blobs(100, 3), 50)):
        torch.manual_seed(0)
        callback = IFTHypergradient(5, held_out_dataloader=held_out)
        with pytest.warns(UserWarning, match="200 of 200 outer examples are training examples"):
            quiet_trainer(callbacks=[callback], max_steps=150, max_epochs=-1, limit_val_batches=0).fit(Decayed())
        verdicts.append(callback.summary().verdict)
    assert verdicts == ["unclear", "helped"]


def test_a_change_says_what_it_was_and_is():
    assert str(Change("decay", (1e-4, 1e-4, 1e-4), (2e-3, 1e-3, 3e-3))) == "decay: 0.0001 → mean 0.002 (0.001 to 0.003)"


def test_loggers_get_tuned_values_as_hyperparameters_and_histograms(tmp_path):
    """Read back from the files."""

    class Many(Classifier):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 8})
            self.register_hyperparameter("weights", SampleWeights(30))

        def inner_loss(self, batch):
            return super().inner_loss(batch) * (self.weights(torch.arange(30)) * torch.arange(30)).mean()

    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tensorboard", default_hp_metric=False)]
    callback = IFTHypergradient(1)
    fitted(callback, Many, logger=loggers)
    ends = {f"hyperparameter/{change.name}": change.end[0] for change in callback.summary().hyperparameters}
    written = yaml.safe_load((Path(loggers[0].log_dir) / "hparams.yaml").read_text())
    assert written == {"width": 8, **ends}
    events = EventAccumulator(loggers[1].log_dir, size_guidance={"histograms": 0})
    events.Reload()
    assert events.Tags()["histograms"] == ["hyperparameter/weights"]
    assert len(events.Histograms("hyperparameter/weights")) == 3
    assert events.Histograms("hyperparameter/weights")[-1].histogram_value.num == 30
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(name.encode() in plugin for name in ("width", *ends))
    (final,) = events.Scalars("hypergrad/final_outer_loss")
    assert final.step > 0
    assert final.value == pytest.approx(callback.summary().outer_loss[1])
    assert [event.step for event in events.Scalars("hypergrad/outer_loss")] == list(range(12))
    assert dict(loggers[1].hparams) == {"width": 8}


class Clamped(Classifier):
    """A positive number that is registered as it is: a step makes it negative, and the clamp keeps it dead."""

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("raw", torch.tensor(1e-4))

    def squares(self):
        return sum(weight.square().sum() for weight in self.net.parameters())

    def inner_loss(self, batch):
        return super().inner_loss(batch) - self.raw.clamp(min=0.0) * self.squares()

    def outer_loss(self, batch):
        return super().outer_loss(batch) + 10.0 * self.squares()

    def configure_hyper_optimizer(self):
        return None


def test_a_hyperparameter_that_a_clamp_cuts_off_is_named():
    callback = IFTHypergradient(1, solver=Identity(0.1, horizon=1))  # one hyper step may travel four units
    module = fitted(callback, Clamped, max_epochs=5)
    assert module.raw.item() < 0.0
    (told,) = (advice for advice in callback.summary().advice if "No hypergradient of" in advice)
    assert "'raw' since hyper step" in told
    assert "Positive(initial)" in told


def test_a_value_at_its_bound_is_named():
    class AtBound(Classifier):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                for value in self.decay.parameters():
                    value.fill_(10.0)

    callback = IFTHypergradient(4)
    fitted(callback, AtBound)
    assert any("'decay' stands at its bound, maximum=1;" in advice for advice in callback.summary().advice)


def test_large_parameters_of_a_network_of_weights_are_at_no_bound():
    class Weighed(Classifier):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("weigh", WeightNetwork())
            with torch.no_grad():
                self.weigh.net[0].weight[0] = 5.0  # the weights themselves are at most 2

        def inner_loss(self, batch):
            losses = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
            return (self.weigh(losses) * losses).mean() + self.decay()

    callback = IFTHypergradient(4, solver=Identity())
    fitted(callback, Weighed)
    assert not any("stands at its bound" in advice for advice in callback.summary().advice)
    other = IFTHypergradient(4)
    fitted(other)
    assert not any("bound" in advice for advice in other.summary().advice)


def test_the_tensors_of_one_module_without_a_hypergradient_share_a_sentence():
    class HalfFrozen(Classifier):
        def on_fit_start(self):
            self.net[0].requires_grad_(False)

    callback = IFTHypergradient(1)
    fitted(callback, HalfFrozen)
    told = [advice for advice in callback.summary().advice if "hypergradient" in advice]
    assert told == [
        "No hypergradient of 2 of 6 tensors of 'decay' in any hyper step: it belongs to weights that do not train, or "
        "is saturated."
    ]


@pytest.mark.parametrize("by_place", [True, False])
def test_a_table_that_is_read_by_the_place_in_the_batch_is_named(by_place):
    class Weighted(Classifier):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("weights", SampleWeights(32))

        def inner_loss(self, batch):
            x, y, index = batch
            losses = F.cross_entropy(self.mark_outputs(self.net(x)), y, reduction="none")
            return (self.weights(torch.arange(8) if by_place else index) * losses).mean() + self.decay()

        def train_dataloader(self):
            return DataLoader(IndexedDataset(loader().dataset), batch_size=8, shuffle=True)

    callback = IFTHypergradient(1)
    fitted(callback, Weighted)
    told = [advice for advice in callback.summary().advice if "hypergradient" in advice]
    assert len(told) == by_place
    assert not by_place or "No hypergradient of 24 of 32 entries of 'weights.logits', as each hyper" in told[0]


def test_an_outer_loss_that_is_flat_is_named_once():
    class Flat(Classifier):
        def outer_loss(self, batch):
            return 0.0 * super().outer_loss(batch) + 1.0

    callback = IFTHypergradient(1)
    with pytest.warns(UserWarning, match="outer loss"):
        fitted(callback, Flat)
    summary = callback.summary()
    assert summary.verdict == "did nothing"
    assert sum("No hyperparameter has had a hypergradient in any hyper step" in line for line in summary.advice) == 1


def test_many_hyperparameters_are_summed_up():
    class Many(Classifier):
        def __init__(self):
            super().__init__()
            for index in range(15):
                self.register_hyperparameter(f"shift{index}", torch.tensor(0.0))

        def inner_loss(self, batch):
            shift = sum(getattr(self, f"shift{index}") for index in range(15))
            return super().inner_loss(batch) + shift * self.net[-1].bias.square().sum()

    callback = IFTHypergradient(1)
    fitted(callback, Many)
    text = str(callback.summary())
    assert "and 6 more, see summary().rows()" in text
    assert len(text.splitlines()) < 16
    assert len(callback.summary().rows()) == 16


def test_steps_that_were_replaced_are_counted_in_the_text():
    class Wild(Classifier):
        def configure_hyper_optimizer(self):
            return torch.optim.Adam(self.hyperparameters(), lr=10.0)

    callback = IFTHypergradient(1)
    with pytest.warns(UserWarning, match="would have moved the hyperparameters by 10 units"):
        fitted(callback, Wild)
    assert callback.summary().replaced == 12
    assert "(12 too long and replaced by default ones)" in str(callback.summary())


@pytest.mark.parametrize("curvature", ["auto", "finite_difference"])
def test_it_knows_the_curvature_in_use(curvature):
    callback = IFTHypergradient(4, curvature=curvature, solver=Identity())
    fitted(callback)
    assert callback.summary().curvature == ("gauss_newton" if curvature == "auto" else curvature)


def test_a_summary_resumes(tmp_path):
    """Everything but the time, of a run that ends in the middle and goes on."""

    def run(max_epochs, **options):
        module = Ridge()
        callback = IFTHypergradient(1, held_out_dataloader=[(module.x[:5], module.y[:5])])
        trainer = quiet_trainer(callbacks=[callback], max_epochs=max_epochs, limit_val_batches=0)
        trainer.fit(module, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return dataclasses.replace(callback.summary(), share_of_time=0.0)

    whole = run(14)
    assert run(7) != whole
    assert run(14, ckpt_path=tmp_path / "last.ckpt") == whole


def test_an_interrupted_fit_has_a_summary(caplog):
    class Interrupted(Classifier):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 5:
                raise RuntimeError("stop")

    callback = IFTHypergradient(1)
    caplog.set_level("INFO", logger="lightning.pytorch")
    with pytest.raises(RuntimeError, match="stop"):
        fitted(callback, Interrupted)
    assert callback.summary().hyper_steps == 5
    assert any("Verdict" in record.message for record in caplog.records)


def test_a_report_that_fails_does_not_end_the_fit(tmp_path):
    class Failing(Classifier):
        def outer_loss(self, batch):
            if self.trainer.should_stop:
                raise OSError("network share gone")
            return super().outer_loss(batch)

        def on_train_epoch_end(self):
            self.trainer.should_stop = True

    class Refusing(CSVLogger):
        def log_hyperparams(self, params=None):
            if params and any(name.startswith("hyperparameter/") for name in params):
                raise ValueError("Changing param values is not allowed")

    callback = IFTHypergradient(1)
    with (
        pytest.warns(UserWarning, match="could not measure the outer loss at the end: OSError: network share gone"),
        pytest.warns(UserWarning, match="Refusing did not take the tuned values: Changing param"),
    ):
        fitted(callback, Failing, max_epochs=1, min_epochs=1, logger=Refusing(tmp_path))
    assert callback.summary().hyper_steps == 4


class Terms(Classifier):
    """Two terms of the loss with weights, by name or not."""

    terms: object = ("data", "size")

    def __init__(self):
        super().__init__()
        self.register_hyperparameter("weights", LossWeights(self.terms))

    def inner_loss(self, batch):
        x, y = batch
        losses = [F.cross_entropy(self.net(x), y), self.net[0].weight.square().sum()]
        named = isinstance(self.terms, tuple)
        return self.weights(dict(zip(self.terms, losses, strict=True)) if named else losses) + self.decay()


def test_a_few_named_numbers_are_told_one_by_one():
    """Their mean is always one. The decays have more names than there is room for."""
    callback = IFTHypergradient(1, on_failure="use", solver=Identity())
    module = fitted(callback, Terms)
    decay, weights = callback.summary().hyperparameters
    last = {name: value.item() for name, value in module.weights.natural_values().items()}
    assert weights.parts == {name: (pytest.approx(1.0), pytest.approx(value)) for name, value in last.items()}
    assert str(weights) == f"weights: data 1 → {last['data']:.3g}, size 1 → {last['size']:.3g}"
    assert str(weights) in str(callback.summary())
    assert last["data"] != pytest.approx(1.0, abs=1e-3)
    assert decay.parts == {}


def test_numbers_without_names_are_summed_up():
    class Unnamed(Terms):
        terms = 2

    callback = IFTHypergradient(1, on_failure="use", solver=Identity())
    fitted(callback, Unnamed)
    weights = callback.summary().hyperparameters[-1]
    assert weights.parts == {}
    assert str(weights).startswith("weights: 1 → mean 1 (")


def test_named_numbers_at_the_start_are_those_before_the_run_was_resumed(tmp_path):
    def changes(epochs, checkpoint=None):
        callback = IFTHypergradient(1, on_failure="use", solver=Identity())
        torch.manual_seed(0)
        trainer = quiet_trainer(callbacks=[callback], max_epochs=epochs)
        trainer.fit(Terms(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return callback.summary().hyperparameters

    changes(1)
    assert changes(2, tmp_path / "last.ckpt")[1].parts["data"][0] == pytest.approx(1.0)

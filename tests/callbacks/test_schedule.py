"""Recording and replaying how hyperparameters move."""

import lightning as L
import pytest
import torch

from lightning_ifthpo import HyperparameterRecorder, HyperparameterSchedule, IFTHypergradient
from tests.helpers.trainers import Classifier, Deterministic, quiet_trainer


def trained(callbacks, *, module=None, ckpt_path=None):
    torch.manual_seed(0)
    module = Deterministic() if module is None else module
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module, ckpt_path=ckpt_path)
    return module


def assert_equal(module, other):
    for (name, one), two in zip(module.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records" / "schedule.pt"


@pytest.fixture
def tuned(path):
    return trained([IFTHypergradient(2), HyperparameterRecorder(path)])


def test_a_schedule_repeats_a_run_bit_for_bit(path, tuned):
    replayed = trained([HyperparameterSchedule(path)])
    assert_equal(replayed, tuned)
    assert replayed.hyperparameter_values() != Deterministic().hyperparameter_values()


def test_final_values_can_be_used_and_kept(tuned):
    """They are moved to a new module, which the same callback leaves alone."""
    values = dict(tuned.named_hyperparameters())

    def fixed():
        torch.manual_seed(0)
        module = Deterministic()
        with torch.no_grad():
            for name, hyperparameter in module.named_hyperparameters():
                hyperparameter.copy_(values[name])
        return module

    frozen = trained([IFTHypergradient(1)], module=fixed().freeze_hyperparameters())
    assert_equal(frozen, trained([], module=fixed()))
    assert frozen.hyperparameter_values() == tuned.hyperparameter_values()


def test_a_record_survives_an_interruption_and_a_schedule_resumes(path, tuned, tmp_path):
    whole = torch.load(path, weights_only=True)["moves"]

    def run(callbacks, name):
        class Stop(L.Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 5:
                    trainer.save_checkpoint(tmp_path / name)
                    raise InterruptedError

        with pytest.raises(InterruptedError):
            trained([*callbacks(), Stop()])
        return trained(callbacks(), ckpt_path=tmp_path / name)

    other = tmp_path / "other.pt"
    resumed = run(lambda: [IFTHypergradient(2), HyperparameterRecorder(other)], "tuned")
    for (batch, values), (expected_batch, expected) in zip(
        torch.load(other, weights_only=True)["moves"], whole, strict=True
    ):
        assert batch == expected_batch
        assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert_equal(run(lambda: [HyperparameterSchedule(path)], "replayed"), resumed)


def test_a_record_that_begins_late_is_refused(path, tmp_path):
    """A recorder that was added to a resumed run has not seen the first values."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    trained([IFTHypergradient(2), Save()])
    trained([IFTHypergradient(2), HyperparameterRecorder(path)], ckpt_path=tmp_path / "four.ckpt")
    with pytest.raises(ValueError, match="begins after 4 training batches; record a run from its start"):
        trained([HyperparameterSchedule(path)])


def test_only_what_changes_is_recorded(path):
    trained([HyperparameterRecorder(path)])
    moves = torch.load(path, weights_only=True)["moves"]
    assert [batch for batch, _ in moves] == [0]


def test_what_does_not_fit_is_refused_in_words(path, tuned):
    class Other(Classifier):
        def __init__(self):
            super().__init__()
            self.register_hyperparameter("more", torch.zeros(3))

    with pytest.raises(ValueError, match=r"recorded for the hyperparameters .* Other has .*more"):
        trained([HyperparameterSchedule(path)], module=Other())
    with pytest.raises(ValueError, match="both move the hyperparameters"):
        trained([HyperparameterSchedule(path), IFTHypergradient(1)])
    with pytest.raises(ValueError, match="stands before IFTHypergradient"):
        trained([HyperparameterRecorder(path), IFTHypergradient(1)])
    for callback in (HyperparameterSchedule(path), HyperparameterRecorder(path)):
        with pytest.raises(
            TypeError, match=r"needs a BilevelLightningModule, got Plain; add the mixin: class Plain\(Bilevel"
        ):
            trained([callback], module=Plain())


class Plain(L.LightningModule):
    def training_step(self, batch, batch_idx):
        raise AssertionError("the first batch must not be reached")

    def train_dataloader(self):
        return [torch.zeros(1)]

    def configure_optimizers(self):
        return None

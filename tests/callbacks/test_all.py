"""What all callbacks promise."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from tests.checks import check_leaves_training_untouched, check_state_is_plain
from tests.helpers.trainers import OWN_METRICS, Classifier, quiet_trainer, trained

CALLBACKS = {
    "IFTHypergradient": lambda: IFTHypergradient(2, on_failure="use"),
    "SharpnessMonitor": lambda: SharpnessMonitor(2, max_iterations=6, max_overhead=None),
    "critical": lambda: SharpnessMonitor(2, method="critical", max_overhead=None),
    "ExactGeN": lambda: ExactGeN(2),
}
# what may differ between a run and its twin: hyper steps of length zero change nothing, and ExactGeN makes the same of
# any learning rate
TWINS = {
    "IFTHypergradient": (lambda: Classifier(hyper_lr=0.0), lambda: Classifier(hyper_lr=0.0), False),
    "SharpnessMonitor": (Classifier, Classifier, False),
    "critical": (Classifier, Classifier, False),
    "ExactGeN": (lambda: Classifier(lr=1e-3), lambda: Classifier(lr=0.3), True),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_training_is_left_untouched(name):
    make, make_twin, in_both = TWINS[name]
    _, _, watched = trained([CALLBACKS[name]()], make)
    _, _, twin = trained([CALLBACKS[name]()] if in_both else [], make_twin)
    assert watched.own
    check_leaves_training_untouched(watched, twin)


class States(Callback):
    """Keeps the state of a callback, and of the schedulers, after each batch."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        self.seen.append(copy.deepcopy({"callback": self.callback.state_dict(), "schedulers": schedulers}))


@pytest.mark.parametrize("name", CALLBACKS)
def test_states_are_tensors_and_plain_numbers(name):
    callback = CALLBACKS[name]()
    states = States(callback)
    trained([callback, states], max_epochs=1)
    assert len(states.seen) == 4
    for state in states.seen:
        check_state_is_plain(state)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_has_not_trained_can_be_copied_and_pickled(name):
    callback = CALLBACKS[name]()
    for clone in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert clone.state_key == callback.state_key
        assert clone.state_dict() == callback.state_dict()
        trained([clone], max_epochs=1)


@pytest.mark.parametrize("name", CALLBACKS)
def test_metrics_carry_a_prefix_and_are_finite(name):
    _, trainer, _ = trained([CALLBACKS[name]()])
    own = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(OWN_METRICS)}
    _, plain, _ = trained([])
    assert trainer.callback_metrics.keys() == plain.callback_metrics.keys() | own.keys()
    assert own
    assert all(torch.tensor(list(own.values())).isfinite())


@pytest.mark.parametrize("name", CALLBACKS)
def test_validation_alone_does_nothing(name):
    callback = CALLBACKS[name]()
    trainer, before = quiet_trainer(callbacks=[callback]), callback.state_dict()
    trainer.validate(Classifier(), verbose=False)
    assert callback.state_dict() == before
    assert not any(key.startswith(OWN_METRICS) for key in trainer.callback_metrics)

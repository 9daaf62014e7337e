"""When callbacks fire."""

import pytest

from lightning_ifthpo import IFTHypergradient, SharpnessMonitor
from tests.helpers.trainers import trained


def fired_batches(every, batches=12, **options):
    trainer_options = options.pop("trainer", {})
    fired = []

    class Spy(IFTHypergradient):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = self.state_dict()["stepper"]["steps"]
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.state_dict()["stepper"]["steps"] > before:
                fired.append(trainer.fit_loop.total_batch_idx + 1)

    trained([Spy(every, **options)], max_epochs=batches // 4, **trainer_options)
    return fired


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"every": 1}, list(range(1, 13))),
        ({"every": 5}, [5, 10]),
        ({"every": 5, "start_after_batches": 3}, [8]),
        ({"every": 1, "trainer": {"accumulate_grad_batches": 2}}, [2, 4, 6, 8, 10, 12]),
        ({"every": 3, "trainer": {"accumulate_grad_batches": 2}}, [4, 8, 12]),
        ({"every": 5, "trainer": {"fast_dev_run": True}}, [1]),
        ({"every": 1, "max_overhead": 1e-9}, [1, 2]),  # the first is not counted
    ],
    ids=str,
)
def test_hyper_steps_are_made_when_due(arguments, expected):
    assert fired_batches(**arguments) == expected


@pytest.mark.parametrize(
    ("options", "trainer_options", "expected"),
    [
        ({"every_n_batches": 3}, {}, [3, 6, 9, 12]),
        ({"every_n_batches": 5}, {}, [4, 9]),  # after the first epoch at the latest
        ({"every_n_batches": 1}, {"accumulate_grad_batches": 2}, [2, 4, 6, 8, 10, 12]),
        ({"every_n_batches": 5}, {"fast_dev_run": True}, [1]),
        ({"every_n_batches": 1, "max_overhead": 1e-9}, {}, [1, 2]),  # the first is not counted
    ],
    ids=str,
)
def test_measurements_are_made_when_due(options, trainer_options, expected):
    fired = []

    class Spy(SharpnessMonitor):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = self.state_dict()["tracker"]["measurements"]
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            if self.state_dict()["tracker"]["measurements"] > before:
                fired.append(trainer.fit_loop.total_batch_idx + 1)

    trained([Spy(**({"max_overhead": None, "rtol": 0.1} | options))], **trainer_options)
    assert fired == expected

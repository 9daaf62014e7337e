"""Several processes, of which the others are played."""

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_ifthpo import SharpnessMonitor
from lightning_ifthpo.runtime.distributed import Ranks, is_replicated
from tests.helpers.trainers import quiet_trainer


class OwnStrategy(DDPStrategy):
    pass


def test_strategies_are_known_by_name():
    import pytorch_lightning

    assert is_replicated(OwnStrategy())
    assert is_replicated(pytorch_lightning.strategies.DDPStrategy())
    assert not is_replicated(type("DeepSpeedStrategy", (DDPStrategy,), {})())


def two_processes(other):
    """Two processes, of which the other one is played."""
    ranks = Ranks(quiet_trainer())
    ranks.count = 2
    ranks.all_reduce = lambda part: part + other.to(part)
    return ranks


def test_batches_of_unknown_size_count_alike():
    known = [torch.ones(6, 2)]
    assert two_processes(torch.tensor([2.0, 0.0])).share_of(known) == 6 / 8
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type list"):
        assert two_processes(torch.tensor([0.0, 1.0])).share_of(known) == 0.5
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type object"):
        assert two_processes(torch.tensor([2.0, 0.0])).share_of(object()) == 0.5
    assert two_processes(torch.tensor([0.0, 0.0])).share_of([torch.ones(0, 2)]) == 0.5


def test_an_error_that_other_processes_do_not_have_is_not_survived():
    monitor = SharpnessMonitor()
    monitor._ranks = two_processes(torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="mine"), monitor._tolerating_failures():
        raise RuntimeError("mine")
    with pytest.warns(UserWarning, match="a measurement failed"), monitor._tolerating_failures():
        raise FloatingPointError("everybody's")
    with monitor._tolerating_failures(alone=True):
        raise RuntimeError("nobody waits for it")
    assert monitor.failures == 2

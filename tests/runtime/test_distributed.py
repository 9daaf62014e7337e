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
    ranks.total = lambda part: part + other.to(part)
    return ranks


def test_batches_of_unknown_size_count_alike():
    loss = torch.tensor(3.0)
    known = [torch.ones(6, 2)]
    assert two_processes(torch.tensor([2.0, 0.0])).share(lambda: loss, known)() == 3.0 * 6 / 8
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type list"):
        assert two_processes(torch.tensor([0.0, 1.0])).share(lambda: loss, known)() == 1.5
    with pytest.warns(UserWarning, match="cannot tell the number of examples in a batch of type object"):
        assert two_processes(torch.tensor([2.0, 0.0])).share(lambda: loss, object())() == 1.5
    assert two_processes(torch.tensor([0.0, 0.0])).share(lambda: loss, [torch.ones(0, 2)])() == 1.5


def test_an_error_that_other_processes_do_not_have_is_not_survived():
    monitor = SharpnessMonitor()
    monitor._ranks = two_processes(torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="mine"), monitor._surviving():
        raise RuntimeError("mine")
    with pytest.warns(UserWarning, match="a measurement failed"), monitor._surviving():
        raise FloatingPointError("everybody's")
    with monitor._surviving(alone=True):
        raise RuntimeError("nobody waits for it")
    assert monitor.failures == 2

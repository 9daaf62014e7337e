"""What a module is put back to."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric

from lightning_ifthpo.runtime.snapshot import restored
from tests.helpers.monitored import Plain, monitor
from tests.helpers.trainers import quiet_trainer, same


class InPlace(Plain):
    """Changes all sorts of things in its training step that are no registered state."""

    def __init__(self):
        super().__init__()
        self.momentum_encoder = nn.Linear(4, 5)
        self.momentum_encoder.requires_grad_(False)
        self.generator, self.numpy_generator = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.outputs, self.counter, self.seen, self.recent = [], {"n": 0}, set(), deque(maxlen=3)
        self.moving = torch.zeros(3)
        self.register_buffer("buffer", torch.zeros(2))
        self.view = self.buffer[:1]
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        with torch.no_grad():
            for slow, fast in zip(self.momentum_encoder.parameters(), self.net[0].parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
            self.net[2].weight.mul_(0.99)
            self.net[2].bias.data = self.net[2].bias.data + 0.01
            self.moving += y.float().mean()
            self.view += 1
        self.momentum_encoder.bias.requires_grad_(not self.momentum_encoder.bias.requires_grad)
        self.counter["n"] += 1
        self.seen.add(len(self.seen))
        noise = torch.randn(x.shape, generator=self.generator) + self.numpy_generator.normal()
        x = self.scripted(x) + 0.1 * noise * self.counter["n"] + self.momentum_encoder(x).mean() + self.moving.mean()
        loss = F.cross_entropy(self.net(x), y)
        self.outputs.append(loss.detach())
        self.recent.append(len(self.outputs))
        return loss

    def state(self):
        tensors = [*self.state_dict().values(), self.moving, self.view, *self.outputs, self.generator.get_state()]
        numbers = [self.counter, len(self.seen), list(self.recent), self.momentum_encoder.bias.requires_grad]
        return [t.clone() for t in tensors], copy.deepcopy(numbers), self.numpy_generator.bit_generator.state


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_a_training_step_does_in_place_is_undone():
    states = []
    for callbacks in ([monitor(rtol=0.1)], []):
        torch.manual_seed(5)
        module = InPlace()
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=4)
        trainer.fit(module)
        states.append(module.state())
        assert float(trainer.callback_metrics.get("sharpness/failures", 0)) == 0
    assert same(*states)


class Stateful(nn.Module):
    """One attribute of each kind that can be put back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.zeros(2))
        self.metric = MeanMetric()
        self.items, self.table, self.names, self.queue = [1], {"a": 1}, {"a"}, deque([1], maxlen=2)
        self.plain, self.number = torch.zeros(2), 1
        self.generator, self.python = torch.Generator().manual_seed(0), random.Random(0)


CHANGES = {
    "rebound attribute": lambda module: setattr(module, "number", 2),
    "new attribute": lambda module: setattr(module, "late", 1),
    "deleted attribute": lambda module: delattr(module, "number"),
    "new submodule": lambda module: setattr(module, "extra", nn.Linear(1, 1)),
    "list": lambda module: module.items.append(2),
    "dict": lambda module: module.table.update(b=2),
    "set": lambda module: module.names.clear(),
    "deque": lambda module: module.queue.extend([2, 3]),
    "tensor in place": lambda module: module.plain.add_(1.0),
    "buffer in place": lambda module: module.buffer.add_(1.0),
    "parameter in place": lambda module: module.layer.weight.data.add_(1.0),
    "data of a parameter": lambda module: setattr(module.layer.bias, "data", torch.ones(2)),
    "requires_grad": lambda module: module.layer.requires_grad_(False),
    "mode": lambda module: module.eval(),
    "metric": lambda module: module.metric.update(3.0),
    "generator of torch": lambda module: torch.rand(3, generator=module.generator),
    "generator of Python": lambda module: module.python.random(),
}


def contents(module):
    """All that a change can be seen by."""
    tensors = [
        *module.state_dict().values(),
        module.plain,
        module.generator.get_state(),
        *module.metric.metric_state.values(),
    ]
    names = sorted(vars(module).keys()), sorted(name for name, _ in module.named_modules())
    flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]
    values = list(module.items), dict(module.table), set(module.names), list(module.queue), module.number
    return [tensor.clone() for tensor in tensors], names, flags, values, module.python.getstate()


@pytest.mark.parametrize("name", CHANGES)
def test_each_kind_of_change_is_undone(name):
    module = Stateful()
    before = contents(module)
    with restored(module):
        CHANGES[name](module)
    assert same(contents(module), before)


@pytest.mark.parametrize("name", ["buffer in place", "list", "mode"])
def test_an_error_restores_too(name):
    module = Stateful()
    before = contents(module)

    def fails():
        with restored(module):
            CHANGES[name](module)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert same(contents(module), before)


def test_a_graph_that_needs_a_buffer_survives():
    """Inside the block buffers are copies, so that putting them back does not change what a graph has kept."""
    module = nn.BatchNorm1d(2).eval()
    with restored(module):
        output = module(torch.ones(3, 2, requires_grad=True)).sum()
        module.running_var.mul_(4.0)
    assert torch.equal(module.running_var, torch.ones(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_a_shared_buffer_stays_shared_inside():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    module[1].running_mean = module[0].running_mean
    with restored(module):
        assert module[0].running_mean is module[1].running_mean
        module[0].running_mean.add_(1.0)
    assert module[0].running_mean.tolist() == [0.0, 0.0]

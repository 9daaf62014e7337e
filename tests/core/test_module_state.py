"""What a module is put back to, and what evaluations find."""

import copy
import functools
import itertools
import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric

from lightning_ifthpo.core.side_effects import modules_rewound, restored
from tests.helpers.device import DEVICE
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
        self.moving = torch.zeros(3, device=DEVICE)
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
        noise = (torch.randn(x.shape, generator=self.generator) + self.numpy_generator.normal()).to(x)
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
@pytest.mark.filterwarnings("ignore:SharpnessMonitor. inner_loss (does not change along|is not the same function)")
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


class Slotted:
    __slots__ = ("items", "total")

    def __init__(self):
        self.items, self.total = [], 0


class Meter:
    """An object of a class that nobody knows."""

    made = 0

    def __init__(self):
        self.total, self.values, self.average = 0.0, [], torch.zeros(2)


def remember(layer):
    kept = []
    layer.register_forward_hook(lambda *_: kept.append(1))
    return lambda: len(kept)


class Counting(nn.Module):
    """Its class counts."""

    calls, seen = 0, []


class Stateful(Counting):
    """One attribute of each kind that can be put back."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("buffer", torch.zeros(2))
        self.metric = MeanMetric()
        self.items, self.table, self.names, self.queue = [1], {"a": 1}, {"a"}, deque([1], maxlen=2)
        self.plain, self.number = torch.zeros(2), 1
        self.generator, self.python = torch.Generator().manual_seed(0), random.Random(0)
        self.numpy, self.old_numpy = np.random.default_rng(0), np.random.RandomState(0)
        self.nested, self.pair = {"list": [[1]]}, ([1], torch.zeros(2))
        self.meter, self.teacher = Meter(), [nn.Linear(2, 2).requires_grad_(False)]
        self.hook_memory = remember(self.layer)
        self.array, self.bytes, self.slotted = np.zeros(3), bytearray(2), Slotted()
        self.partial, self.streams = functools.partial(list.append, []), [iter(range(3))]
        self.stream, self.letters = iter(range(9)), (letter for letter in "abc")

    def kept(self, *values, cache=[], last={"value": 0}):  # noqa: B006
        """Keeps values in its defaults, as a function with a memory does."""
        cache.extend(values)
        last.update(value=len(cache))
        return cache, last

    @staticmethod
    def shared(value, kept=[]):  # noqa: B006
        kept.append(value)
        return kept

    @classmethod
    def of_class(cls, value, kept=[]):  # noqa: B006
        kept.append(value)
        return kept

    def counted(self):
        type(self).counted.calls = getattr(type(self).counted, "calls", 0) + 1


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
    "generator of NumPy": lambda module: module.numpy.random(),
    "old generator of NumPy": lambda module: module.old_numpy.rand(),
    "list in a list in a dict": lambda module: module.nested["list"][0].append(2),
    "list in a tuple": lambda module: module.pair[0].append(2),
    "tensor in a tuple": lambda module: module.pair[1].add_(1.0),
    "attribute of an object": lambda module: setattr(module.meter, "total", 1.0),
    "list of an object": lambda module: module.meter.values.append(1.0),
    "tensor of an object": lambda module: module.meter.average.add_(1.0),
    "module in a list": lambda module: module.teacher[0].weight.mul_(2.0),
    "memory of a hook": lambda module: module.layer(torch.zeros(1, 2)),
    "NumPy array": lambda module: module.array.__setitem__(0, 1.0),
    "bytes": lambda module: module.bytes.__setitem__(0, 1),
    "slot": lambda module: setattr(module.slotted, "total", 1),
    "list in a slot": lambda module: module.slotted.items.append(1),
    "argument of a partial function": lambda module: module.partial(1),
    "iterator in a list": lambda module: next(module.streams[0]),
    "gradient": lambda module: module.layer(torch.ones(1, 2)).sum().backward(),
    "iterator": lambda module: next(module.stream),
    "running generator": lambda module: next(module.letters),
    "attribute of a class": lambda module: setattr(type(module), "calls", module.calls + 1),
    "attribute of a base class": lambda module: setattr(Counting, "calls", Counting.calls + 1),
    "list of a class": lambda module: module.seen.append(1),
    "new attribute of a class": lambda module: setattr(type(module), "late", 1),
    "attribute of an object's class": lambda module: setattr(Meter, "made", Meter.made + 1),
    "default of a method": lambda module: module.kept(1),
    "default of a static method": lambda module: module.shared(1),
    "default of a class method": lambda module: module.of_class(1),
    "attribute of a method": lambda module: module.counted(),
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
    tensors += [module.pair[1], module.meter.average, module.teacher[0].weight]
    generators = module.python.getstate(), module.numpy.bit_generator.state, str(module.old_numpy.get_state())
    others = list(module.array), list(module.bytes), module.slotted.total, list(module.slotted.items)
    inside = copy.deepcopy(
        (others, list(module.partial.args[0]), module.nested, module.pair[0], module.meter.total, module.meter.values)
    )
    of_classes = Counting.calls, sorted(vars(Stateful)), vars(Stateful).get("calls"), list(module.seen), Meter.made
    defaults = module.kept.__kwdefaults__, module.shared.__defaults__, module.of_class.__func__.__defaults__
    of_methods = copy.deepcopy(defaults), dict(vars(Stateful.counted))
    inside = (*inside, of_classes, of_methods)
    gradients = [p.grad for p in module.parameters()]
    memory = module.hook_memory()
    return [tensor.clone() for tensor in tensors], names, flags, values, generators, inside, gradients, memory


def rest(module):
    """What its iterators yield from here."""
    return [next(module.stream), next(module.stream), next(module.letters), next(module.streams[0])]


@pytest.mark.parametrize("name", CHANGES)
def test_each_kind_of_change_is_undone(name):
    module = Stateful()
    before = contents(module)
    with restored(module) as state:
        state.exchange()
        CHANGES[name](module)
        state.rewind()
        state.exchange()
        CHANGES[name](module)
    assert same(contents(module), before)
    assert rest(module) == [0, 1, "a", 0]


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
    with restored(module) as state:
        state.exchange()
        assert module[0].running_mean is module[1].running_mean
        module[0].running_mean.add_(1.0)
    assert module[0].running_mean.tolist() == [0.0, 0.0]


def test_a_graph_keeps_the_buffers_that_it_was_made_with():
    """An evaluation works on copies, so that the next one does not change what its graph has kept."""
    module = Stateful()
    x = torch.ones(2, requires_grad=True)
    with restored(module) as state:
        state.exchange()
        module.buffer.add_(3.0)
        value = (x * module.buffer).sum()
        state.rewind()
        state.exchange()
        module.buffer.add_(5.0)
        assert module.buffer.tolist() == [5.0, 5.0]
    value.backward()
    assert x.grad.tolist() == [3.0, 3.0]


def test_weights_that_somebody_moves_between_evaluations_stay_moved():
    module = Stateful()
    with restored(module) as state:
        before = module.layer.weight.detach().clone()
        with torch.no_grad():
            module.layer.weight.add_(1.0)
        state.rewind()
        assert torch.equal(module.layer.weight, before + 1.0)
    assert torch.equal(module.layer.weight, before)


class Moving(nn.Module):
    """A forward pass that depends on how often it was called, by a buffer, an attribute and a generator of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.seen = 0, []
        self.generator = torch.Generator().manual_seed(3)
        self.stream = itertools.count()

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(self.count)
        return x * self.calls * len(self.seen) + torch.rand((), generator=self.generator) + next(self.stream)


def test_modules_that_a_function_calls_are_put_back():
    module = nn.Sequential(Moving(), Moving())
    results = []
    for _ in range(3):
        with modules_rewound():
            results.append(module(torch.ones(2)))
    assert same(results[0], results[1])
    assert same(results[0], results[2])
    assert module[0].calls == 0
    assert (module[1].count, module[1].seen) == (0, [])
    assert same(module(torch.ones(2)), results[0])


@pytest.mark.parametrize("buffers", [False, True])
def test_a_functional_call_keeps_its_own_tensors(buffers):
    module = nn.BatchNorm1d(2)
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    extra = {name: b.clone() for name, b in module.named_buffers()} if buffers else {}
    before = dict(module.named_parameters()), dict(module.named_buffers())
    with modules_rewound():
        output = torch.func.functional_call(module, weights | extra, torch.randn(4, 2))
    output.sum().backward()
    assert all(module.get_parameter(name) is p for name, p in before[0].items())
    assert all(module.get_buffer(name) is b for name, b in before[1].items())
    assert weights["weight"].grad is not None
    assert module.num_batches_tracked == 0


def test_modules_under_vmap_are_left_alone():
    module = nn.Linear(2, 1)
    stacked, _ = torch.func.stack_module_state([nn.Linear(2, 1), nn.Linear(2, 1)])
    with modules_rewound():
        torch.func.vmap(lambda p: torch.func.functional_call(module, p, torch.ones(1, 2)))(stacked)
    assert isinstance(module.weight, nn.Parameter)


def test_a_trainer_or_a_data_set_is_not_looked_into():
    class Data(torch.utils.data.Dataset):
        def __init__(self):
            self.reads = 0

    module = Stateful()
    module.data = Data()
    with restored(module):
        module.data.reads = 5
    assert module.data.reads == 5


def test_a_compiled_module_does_not_warn():
    module = torch.compile(nn.Linear(2, 2), backend="eager")
    with modules_rewound():
        module(torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_buffer_is_kept():
    module = nn.Module()
    module.register_buffer("q", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with restored(module) as state, state.evaluation():
        module.q.dequantize()
    assert module.q.dequantize().tolist() == pytest.approx([1.0, 1.0])


def test_long_lists_are_left_alone():
    module = nn.Module()
    module.data = [[1]] * 1000
    with restored(module):
        module.data[0].append(2)
        module.data.append([3])
    assert len(module.data) == 1000
    assert module.data[0] == [1, 2]


def test_attributes_that_somebody_has_put_on_a_layer_are_restored():
    layer = nn.Linear(2, 2)
    layer.seen = []
    with restored(layer):
        layer.seen.append(1)
        layer.calls = 1
    assert layer.seen == []
    assert not hasattr(layer, "calls")


def test_an_iterator_under_two_names_stays_one():
    module = nn.Module()
    module.one = module.other = iter(range(9))
    with restored(module) as state, state.evaluation():
        assert (next(module.one), next(module.other)) == (0, 1)
    assert (next(module.one), next(module.other)) == (0, 1)


def test_a_module_with_an_iterator_that_was_read_ahead_can_be_copied():
    module = nn.Module()
    module.stream = iter([1, 2, 3])
    with restored(module) as state, state.evaluation():
        next(module.stream)
    assert list(copy.deepcopy(module).stream) == [1, 2, 3]

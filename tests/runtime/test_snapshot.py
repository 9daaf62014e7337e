"""What a module is put back to."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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

"""Optimizers whose update is linear in the learning rate, and others."""

import pytest
import torch
from torch import nn

from lightning_ifthpo.step_size import (
    check_linear_in_lr,
)
from tests.helpers.device import DEVICE


@pytest.mark.parametrize(
    "optimizer_type", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Adafactor], ids=lambda t: t.__name__
)
def test_optimizers_that_are_not_linear_in_their_rate_are_refused(optimizer_type):
    optimizer = optimizer_type([nn.Parameter(torch.ones(3, device=DEVICE))])
    with pytest.raises(ValueError, match=f"{optimizer_type.__name__} (cannot do that|is not linear)"):
        check_linear_in_lr(optimizer)


def test_no_list_of_names_decides():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, power=1.0):
            super().__init__(params, {"lr": lr, "power": power})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"] ** group["power"])

    check_linear_in_lr(Own([nn.Parameter(torch.ones(2, device=DEVICE))]))
    with pytest.raises(ValueError, match="update of Own is not linear"):
        check_linear_in_lr(Own([nn.Parameter(torch.ones(2, device=DEVICE))], power=2.0))


def test_optimizers_of_matrices_are_tried_out_on_one_and_none_may_maximize():
    class Matrices(torch.optim.SGD):
        def step(self, closure=None):
            assert all(weight.ndim == 2 for group in self.param_groups for weight in group["params"])
            return super().step(closure)

    check_linear_in_lr(Matrices([nn.Parameter(torch.ones(2, 2, device=DEVICE))], lr=0.1))
    with pytest.raises(ValueError, match="this SGD maximizes"):
        check_linear_in_lr(torch.optim.SGD([nn.Parameter(torch.ones(2, device=DEVICE))], lr=0.1, maximize=True))


def test_an_optimizer_that_does_not_move_is_refused():
    class Still(torch.optim.SGD):
        def step(self, closure=None):
            pass

    with pytest.raises(ValueError, match="update of Still is not linear"):
        check_linear_in_lr(Still([nn.Parameter(torch.ones(2, device=DEVICE))], lr=0.1))

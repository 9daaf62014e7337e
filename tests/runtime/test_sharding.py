"""Weights that are spread over processes, put together for a while; here over a single process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_ifthpo.core.space import full_tensor
from lightning_ifthpo.runtime.sharding import unsharded
from tests.helpers.two_ranks import SHARDS_ON_CPU


@pytest.fixture
def mesh(tmp_path):
    """A group of one process."""
    if not SHARDS_ON_CPU:
        pytest.skip(f"torch {torch.__version__} never returns from the end of a gloo group of one process")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def spread(net, mesh):
    """Replaces the weights of a network by their spread versions."""
    for layer in net.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            spread_out = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            layer.register_parameter(name, nn.Parameter(spread_out, parameter.requires_grad))
    return net


def test_a_module_without_spread_weights_stays_as_it_is():
    net = nn.Linear(2, 2)
    before = dict(net.named_parameters())
    with unsharded(net):
        assert dict(net.named_parameters()) == before
    assert not isinstance(net.weight, DTensor)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_inside_the_block_weights_are_whole_and_differentiable_and_afterwards_what_they_were(mesh):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    plain[2].bias.requires_grad_(False)
    values = [parameter.detach().clone() for parameter in plain.parameters()]
    net = spread(plain, mesh)
    before = dict(net.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    with unsharded(net):
        inside = list(net.parameters())
        assert not any(isinstance(parameter, DTensor) for parameter in inside)
        assert all(torch.equal(parameter, value) for parameter, value in zip(inside, values, strict=True))
        assert [parameter.requires_grad for parameter in inside] == [True, True, True, False]
        loss = net(torch.ones(2, 3)).square().sum()
        (slope,) = torch.autograd.grad(loss, [net[0].weight], create_graph=True)
        torch.autograd.grad(slope.sum(), [net[0].weight])
    assert all(parameter is before[name] for name, parameter in net.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_shared_weights_stay_shared_and_an_error_restores_them(mesh):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    spread(net, mesh)
    net[1].weight = net[0].weight
    shared = net[0].weight

    def fails():
        with unsharded(net):
            assert net[0].weight is net[1].weight
            assert not isinstance(net[0].weight, DTensor)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert net[0].weight is net[1].weight is shared


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_spread_tensor_is_put_together(mesh):
    tensor = torch.arange(6.0).view(3, 2)
    assert torch.equal(full_tensor(distribute_tensor(tensor, mesh, [Shard(0)])), tensor)
    assert full_tensor(tensor) is tensor

"""Gates of low-rank adapters."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_ifthpo.hyperparameters import LoRAGates
from tests.helpers.hyperparameters import EXTREMES, disturb, fill


class LoRALinear(nn.Module):
    """A frozen layer plus a product of low rank, written by hand."""

    def __init__(self, features: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Linear(features, features).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(features, rank, bias=False), nn.Linear(rank, features, bias=False))

    def forward(self, x):
        return self.frozen(x) + self.adapter(x)


def gated(**options):
    """A network of two such layers with their gates, as one module, and the layers."""
    net = nn.Sequential(LoRALinear(), LoRALinear())
    net.gates = LoRAGates({"first": net[0].adapter, "second": net[1].adapter}, **options)
    return net, nn.Sequential(net[0], net[1])


def test_gates_of_one_change_nothing():
    layers = nn.Sequential(LoRALinear(), LoRALinear())
    x = torch.randn(3, 4)
    before = layers(x)
    LoRAGates({"first": layers[0].adapter, "second": layers[1].adapter})
    assert torch.allclose(layers(x), before)


def test_each_gate_scales_the_contribution_of_its_adapter():
    net, layers = gated()
    with torch.no_grad():
        net.gates.logits.copy_(torch.tensor([-30.0, 0.5]))
    x = torch.randn(3, 4)
    g = net.gates.natural_values()
    assert list(g) == ["first", "second"]
    assert float(g["first"]) == pytest.approx(0.0, abs=1e-9)
    down, up = net[1].adapter
    h = net[0].frozen(x)  # the first adapter is shut
    wanted = net[1].frozen(h) + g["second"] * (h @ down.weight.T @ up.weight.T)
    assert torch.allclose(layers(x), wanted, atol=1e-6)
    assert net.gates().tolist() == pytest.approx([float(value) for value in g.values()])


def test_the_last_layer_of_an_adapter_may_be_scaled_as_in_peft():
    layer, x = LoRALinear(), torch.randn(3, 4)
    wanted = layer.frozen(x) + 0.25 * layer.adapter(x)
    LoRAGates({name: module for name, module in layer.named_modules() if name.endswith("adapter.1")}, initial=0.25)
    assert torch.allclose(layer(x), wanted, atol=1e-6)


def test_adapters_do_not_become_part_of_the_gates():
    net, _ = gated()
    assert list(net.gates.state_dict()) == ["logits"]
    assert [name for name, _ in net.gates.named_parameters()] == ["logits"]
    assert not net.gates.logits.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_has_gates_of_its_own(copied):
    net, layers = gated()
    other = copied(net)
    x = torch.randn(3, 4)
    before = layers(x)
    fill(other.gates, -30.0)
    assert torch.equal(layers(x), before)
    frozen = nn.Sequential(other[0].frozen, other[1].frozen)
    assert torch.allclose(nn.Sequential(other[0], other[1])(x), frozen(x), atol=1e-6)


@pytest.mark.parametrize("extreme", EXTREMES)
def test_gates_are_bounded_and_their_derivatives_finite(extreme):
    net, layers = gated(maximum=3.0)
    fill(net.gates, extreme)
    assert all(0.0 <= float(gate) <= 3.0 for gate in net.gates.natural_values().values())
    net.gates.requires_grad_(True)
    (gradient,) = torch.autograd.grad(layers(torch.randn(3, 4)).square().sum(), net.gates.logits)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_output_keeps_the_dtype_of_the_adapter(dtype):
    layer = LoRALinear().to(dtype)
    LoRAGates({"": layer.adapter})  # stays float32
    assert layer(torch.randn(3, 4, dtype=dtype)).dtype == dtype


def test_gates_and_weights_have_mixed_derivatives():
    net, layers = gated()
    disturb(net.gates.double().requires_grad_(True))
    layers.double()
    x = torch.randn(3, 4, dtype=torch.float64)
    first = torch.autograd.grad(layers(x).square().mean(), net[0].adapter[1].weight, create_graph=True)[0]
    (mixed,) = torch.autograd.grad(first.sum(), net.gates.logits)
    assert bool(mixed.all())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LoRAGates({}), ValueError, "at least one adapter"),
        (lambda: LoRAGates([nn.Linear(1, 1)]), TypeError, "a mapping from names to adapter modules"),
        (lambda: LoRAGates({"a": torch.ones(1)}), TypeError, "a mapping from names to adapter modules"),
        (lambda: LoRAGates({"a": nn.Linear(1, 1)}, initial=2.0), ValueError, "0 < initial < maximum"),
        (lambda: LoRAGates({"a": nn.Linear(1, 1)}, initial=0.0), ValueError, "0 < initial < maximum"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_module_with_two_names_is_refused():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"each adapter once.*first, second"):
        LoRAGates({"first": layer, "second": layer})

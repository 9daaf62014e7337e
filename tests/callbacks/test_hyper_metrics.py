"""Metrics of a hyper step."""

import lightning as L
import pytest
import torch
from torch import nn

from lightning_ifthpo import BilevelLightningModule
from lightning_ifthpo.callbacks.hyper_metrics import result_metrics, summaries
from lightning_ifthpo.hypergradients import implicit_hypergradient
from lightning_ifthpo.hyperparameters import LossWeights, SampleWeights, WeightDecay
from lightning_ifthpo.solvers import ConjugateGradient


def test_norms_are_those_of_all_hyperparameters_together():
    """w* = λ₁ and the outer loss w²/2 + 2λ₂: the hypergradient is (w, 2)."""
    w, first, second = torch.tensor([3.0], requires_grad=True), torch.tensor(3.0), torch.zeros(1)
    result = implicit_hypergradient(
        lambda: ((w - first) ** 2 / 2).sum() + 0 * second.sum(),
        lambda: (w**2 / 2).sum() + 2 * second.sum(),
        [w],
        [first, second],
        solver=ConjugateGradient(max_iterations=5, rtol=1e-6),
    )
    metrics = result_metrics(result)
    assert metrics["hypergrad/norm"] == pytest.approx(13**0.5)
    assert (metrics["hypergrad/direct_norm"], metrics["hypergrad/indirect_norm"]) == pytest.approx((2.0, 3.0))
    assert metrics["hypergrad/outer_loss"] == pytest.approx(4.5)
    assert metrics["hypergrad/residual"] == result.relative_residual
    assert metrics["hypergrad/products"] == result.products + result.solution.extra_products


def test_summaries_are_taken_over_each_registered_name():
    module = type("Empty", (BilevelLightningModule, L.LightningModule), {})()
    module.register_hyperparameter("tensor", torch.tensor([1.0, 2.0, 6.0]))
    module.register_hyperparameter("module", nn.ParameterList([torch.tensor(-1.0), torch.tensor([[5.0]])]))
    assert summaries(module) == {
        "hyperparameter/tensor/0": 1.0,
        "hyperparameter/tensor/1": 2.0,
        "hyperparameter/tensor/2": 6.0,
        "hyperparameter/tensor/mean": 3.0,
        "hyperparameter/tensor/min": 1.0,
        "hyperparameter/tensor/max": 6.0,
        "hyperparameter/module/mean": 2.0,
        "hyperparameter/module/min": -1.0,
        "hyperparameter/module/max": 5.0,
    }


def test_summaries_are_in_natural_units_and_name_few_parts():
    """A decay and not its logarithm, by the names of the tensors; 25 numbers are too many to log one by one."""
    module = type("Empty", (BilevelLightningModule, L.LightningModule), {})()
    net = nn.Linear(2, 1)
    module.register_hyperparameter("decay", WeightDecay(net, "tensor", initial=0.25))
    module.register_hyperparameter("weights", LossWeights(["one", "mean"]))
    module.register_hyperparameter("few", SampleWeights(24))
    module.register_hyperparameter("many", SampleWeights(25))
    found = summaries(module)
    assert found["hyperparameter/decay/weight"] == found["hyperparameter/decay/bias"] == pytest.approx(0.25)
    assert found["hyperparameter/decay/max"] == pytest.approx(0.25)
    assert found["hyperparameter/few/23"] == found["hyperparameter/few/min"] == 1.0
    assert "hyperparameter/many/24" not in found
    assert found["hyperparameter/weights/one"] == 1.0
    with torch.no_grad():
        module.weights.logits[1] = 1.0
    assert summaries(module)["hyperparameter/weights/mean"] == pytest.approx(1.0)  # the mean, not the term of this name

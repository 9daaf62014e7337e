"""Each callback with each feature of the Trainer: it works and disturbs nothing, or is refused with the reason."""

import math
from contextlib import nullcontext

import pytest
import torch

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from tests.helpers.features import FEATURES
from tests.helpers.trainers import Recorder, quiet_trainer, same

pytestmark = pytest.mark.slow


def run(feature, callbacks, **options):
    torch.manual_seed(7)
    module = feature.make(**options)
    recorder = Recorder()
    others = [make() for make in feature.callbacks]
    trainer = quiet_trainer(**({"max_epochs": 2} | feature.options()), callbacks=[*others, *callbacks, recorder])
    feature.fit(trainer, module)
    return recorder


def hypergradients(feature):
    """Hyper steps of length zero leave no trace."""
    watched = run(feature, [IFTHypergradient(2, on_failure="use")], hyper_lr=0.0)
    assert 0.0 < watched.own["hypergrad/indirect_norm"] < math.inf
    assert leaves_no_trace(watched, run(feature, [], hyper_lr=0.0))


def sharpness(feature):
    watched = run(feature, [SharpnessMonitor(2, max_iterations=6, max_overhead=None)])
    assert 0.0 < watched.own["sharpness/lambda_max"] < math.inf
    assert watched.own["sharpness/failures"] == 0.0
    assert leaves_no_trace(watched, run(feature, []))


def critical(feature):
    watched = run(feature, [SharpnessMonitor(2, method="critical", max_overhead=None)])
    assert 0.0 < watched.own["sharpness/critical"] < math.inf
    assert watched.own["sharpness/failures"] == 0.0
    assert leaves_no_trace(watched, run(feature, []))


def learning_rates(feature):
    """It does not matter what the optimizer was made with."""
    left, right = (run(feature, [ExactGeN(2)], lr=lr) for lr in (1e-3, 0.3))
    assert left.own["gen/accepted"] == 1.0
    assert leaves_no_trace(left, right)


def leaves_no_trace(left, right):
    return same(left.batches, right.batches) and same(left.logged, right.logged)


COLUMNS = {
    "IFTHypergradient": hypergradients,
    "SharpnessMonitor": sharpness,
    "SharpnessMonitor(method='critical')": critical,
    "ExactGeN": learning_rates,
}


# what compilers say of Lightning's own `log`
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, column):
    feature = FEATURES[name]
    if column in feature.refused:
        expectation = pytest.raises(ValueError, match=feature.refused[column])
    elif column in feature.warned:
        expectation = pytest.warns(UserWarning, match=feature.warned[column])
    else:
        expectation = nullcontext()
    with expectation:
        COLUMNS[column](feature)

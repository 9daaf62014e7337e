"""The diagnosis of small real runs: each planted fault comes first, and healthy runs have none."""

import pytest

from lightning_ifthpo import ExactGeN, IFTHypergradient, SharpnessMonitor
from lightning_ifthpo.solvers import Amortized, ConjugateGradient
from tests.callbacks.training_report import planted
from tests.callbacks.training_report.planted import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:hyper step .* ended with status"),
    pytest.mark.filterwarnings("ignore:hyper step .*would have moved the hyperparameters"),
    pytest.mark.filterwarnings("ignore:.*outer examples are training examples, too"),
    pytest.mark.filterwarnings("ignore:SharpnessMonitor. a measurement failed"),
    pytest.mark.filterwarnings("ignore:The `train_dataloader` does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training"),
]

FAULTS = {
    "NaNBatch": ("NaN or infinity in a batch",),
    "RateTooHigh": ("learning rate too high",),
    "ThrownBack": ("learning rate too high",),
    "HardlyMoved": ("training has hardly moved",),
    "AdamTooHigh": ("learning rate too high",),
    "DecayTooStrong": ("weights vanish",),
    "DecayExplodes": ("weights vanish",),
    "DeadLayer": ("no gradient reaches a layer",),
    "DeadUnits": ("dead units",),
    "Forgotten": ("weights that never move",),
    "Unused": ("weights without a gradient",),
    "Frozen": ("frozen weights",),
    "Evaluating": ("evaluation mode during training",),
    "TrainingInValidation": ("training mode during validation",),
    "OuterIsTraining": ("outer data are training data",),
    "HyperRateTooHigh": ("hyper rate too high",),
    "AtBound": ("hyperparameter at its bound",),
    "ByHeart": ("outer data are learned by heart",),
}
HEALTHY = [
    *("Plain", "WithAdam", "FullBatch", "FineTuned", "WithDropout", "InOrder", "Tuned"),
    *("FrozenStem", "FrozenBody", "WithTeacher", "Averaged", "SingleExamples", "Factors"),
    "NoisyLabels",
]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_comes_first(name, tmp_path):
    found = run(getattr(planted, name), path=tmp_path / "report.html").findings
    assert found[0].kind == FAULTS[name][0]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert found[0].remedy[:40] in page.replace("&#39;", "'")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_has_no_finding(name, tmp_path):
    assert run(getattr(planted, name), path=tmp_path / "report.html").findings == ()
    assert "Nothing unusual was seen by these rules." in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_sorted_data_are_found(tmp_path):
    assert run(planted.Sorted, steps=480, path=tmp_path / "a").findings[0].kind == "data are not shuffled"
    assert run(planted.Sorted.in_random_order(), steps=480, path=tmp_path / "b").findings == ()


@pytest.mark.parametrize(
    ("callback", "kind"),
    [
        (lambda: IFTHypergradient(50), "too few hyper steps"),
        (
            lambda: IFTHypergradient(5, curvature="hessian", solver=ConjugateGradient(max_iterations=10)),
            "solves meet negative curvature",
        ),
        (lambda: IFTHypergradient(5, solver=Amortized(products=2, horizon=100_000)), "hyperparameters do not move"),
    ],
)
def test_a_wrong_setting_of_the_hyper_steps_is_found(callback, kind, tmp_path):
    assert [finding.kind for finding in run(planted.Tuned, callback(), path=tmp_path / "report.html").findings] == [
        kind
    ]


def test_the_edge_of_stability_is_evidence(tmp_path):
    monitor = SharpnessMonitor(5, max_overhead=None)
    found = run(planted.JustTooHigh, monitor, path=tmp_path / "report.html").findings
    assert found[0].kind == "learning rate too high"
    assert "times the optimizer's edge of stability" in found[0].evidence


def test_runs_with_all_callbacks_have_no_finding(tmp_path):
    callbacks = [IFTHypergradient(5), SharpnessMonitor(20, max_overhead=None), ExactGeN(5)]
    assert run(planted.Tuned, *callbacks, path=tmp_path / "report.html").findings == ()

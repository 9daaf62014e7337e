"""The rules of the diagnosis, on plain facts."""

import dataclasses
import math

import pytest
import torch

from lightning_ifthpo.callbacks.training_report.diagnosis import diagnose
from lightning_ifthpo.callbacks.training_report.facts import Bound, Facts, Tuning
from lightning_ifthpo.callbacks.training_report.gradients import LayerRecord
from lightning_ifthpo.callbacks.training_report.records import Records
from lightning_ifthpo.callbacks.training_report.training_loss import TrainingLoss
from lightning_ifthpo.callbacks.training_report.tuning_rules import _CAUSES
from lightning_ifthpo.solvers import Status

HEALTHY = LayerRecord(measurements=10, ratio=1e-3, norm=2.0, first_norm=1.8, least_norm=1.7, gradient=0.1)
TUNED = Tuning(hyper_steps=40, made=40, predicted=0.5, confirmed=0.3, error=0.05, travel=5.0)


def records(**curves):
    made = Records()
    for name, values in curves.items():
        for step, value in enumerate(values):
            made.open(name.replace("__", "/")).add(step, value)
    return made


def losses(values):
    loss = TrainingLoss()
    for batch, value in enumerate(values, start=1):
        loss.add(batch, torch.tensor(value))
    loss.flush()
    return loss


def falling(n=200, start=2.0, end=0.5):
    return [end + (start - end) * math.exp(-4 * k / n) for k in range(n)]


def facts(values=None, layers=None, **options):
    chosen = {"a.weight": HEALTHY, "b.weight": HEALTHY} | {
        name: dataclasses.replace(HEALTHY, **changes) for name, changes in (layers or {}).items()
    }
    values = falling() if values is None else values
    return Facts(batches=len(values), loss=losses(values), layers=chosen, **options)


def tuned(curves=None, **changes):
    defaults = {"hypergrad__outer_loss": falling(40), "hypergrad__residual": [0.8] * 40}
    return facts(tuning=dataclasses.replace(TUNED, **changes), records=records(**(defaults | (curves or {}))))


SHARED = "10 of 20"
VANISHED = {name: {"least_norm": 1e-4} for name in ("a.weight", "b.weight")}
GROWING = [2.0 + 0.02 * k for k in range(200)]
NOISE = [0.05 * math.sin(12.9898 * k) for k in range(200)]
THROWN_BACK = [2.3, 5.0, 4.0, *[1.8 + noise for noise in NOISE]]
LOST = [2.31, 7.06, *[2.34 + 0.2 * noise for noise in NOISE]]
CLIMBING = [2.3, *falling(60, 2.0, 0.8), *[1.9 + noise for noise in NOISE[:100]]]
CASES = {
    "NaN": (facts([*falling(100), math.nan, *falling(10, 0.5)]), "NaN or infinity in a batch", "batch 101"),
    "NaN for good": (facts([*falling(100), *[math.nan] * 9]), "NaN or infinity in a batch", "all later losses"),
    "diverged": (
        facts([2.0 * 1.5**k for k in range(20)] + [math.inf] * 10),
        "learning rate too high",
        "not finite from batch 21",
    ),
    "NaN after one batch": (facts([2.0] + [math.nan] * 20), "NaN or infinity in a batch", "batch 2"),
    "diverged at once": (
        facts([2.0, 50.0, 1e4, math.inf, math.nan]),
        "learning rate too high",
        "not finite from batch 4",
    ),
    "diverged from below zero": (
        facts([*[-0.1 * k for k in range(20)], 10.0, 1e5, math.inf, math.nan]),
        "learning rate too high",
        "not finite from batch 23",
    ),
    "growing": (facts(GROWING, is_shuffled=True), "learning rate too high", r"began at 2, and was 5.98"),
    "thrown back": (facts(THROWN_BACK, is_shuffled=True), "learning rate too high", "was 5 at most and 1.8 in"),
    "thrown back, watched": (
        facts(THROWN_BACK, is_shuffled=True, records=records(sharpness__edge_ratio=[1.21, *[0.2] * 9])),
        "learning rate too high",
        r"λ_max was up to 1.21 times the optimizer's edge .* and 0.2 times in the second half .* in a flatter region\.",
    ),
    "diverged, with alarms": (
        facts(THROWN_BACK, is_shuffled=True, records=records(sharpness__alarms=[1.0, 3.0])),
        "learning rate too high",
        r"SharpnessMonitor gave 3 alarms of divergence\.",
    ),
    "lost after one batch": (facts(LOST, is_shuffled=True), "learning rate too high", "was 7.06 at most and 2.34 in"),
    "climbing from its lowest level": (facts(CLIMBING, is_shuffled=True), "learning rate too high", "1.9 in the last"),
    "spikes": (facts([2.0, *[300.0] * 20, *falling(200)]), "learning rate too high", "was 300 at most"),
    "beyond the edge": (
        facts([2.0] * 200, records=records(sharpness__edge_ratio=[10.0] * 9)),
        "learning rate too high",
        "10 times the optimizer's edge",
    ),
    "beyond the edge, and further before": (
        facts([2.0] * 200, records=records(sharpness__edge_ratio=[30.0, *[10.0] * 9])),
        "learning rate too high",
        r"was up to 30 times the optimizer's edge .* and 10 times in the second half of the run\.",
    ),
    "still weights": (
        facts([2.3 + noise for noise in NOISE], records=records(update_ratio__median=[7e-6] * 5)),
        "training has hardly moved",
        "In 200 batches the weights went about 1.4e-03 of their length, and the training loss from 2.304 to 2.304",
    ),
    "vanished": (facts(layers=VANISHED), "weights vanish", "to 5.6e-05 of"),
    "dead layer": (facts(layers={"a.weight": {"zero_gradient": 4}}), "no gradient reaches a layer", "'a.weight'"),
    "dead units": (
        facts(layers={"a.weight": {"rows": 10, "zero_rows": [0b1101111111, 0b0101111101] * 4}}),
        "dead units",
        "70% of the units",
    ),
    "still": (facts(layers={"a.weight": {"unmoved": 10}}), "weights that never move", "'a.weight' is exactly"),
    "unused": (facts(layers={"c.weight": {"without_gradient": 10}}), "weights without a gradient", "'c.weight'"),
    "an error": (facts(error="OSError:" + " long" * 200), "an error ended the run", r"\[...\]. It came after 200"),
    "frozen": (facts(frozen=("c",), frozen_share=0.7), "frozen weights", "'c', among weights that train"),
    "evaluating": (facts(evaluating=("norm",)), "evaluation mode during training", "'norm' is"),
    "training": (facts(training=("n", "m")), "training mode during validation", "'n', 'm' are"),
    "untuned": (facts(untuned=("decay", "w")), "nothing tunes the hyperparameters", "'decay', 'w' stay as they were"),
    "shared": (tuned(shared=SHARED), "outer data are training data", "10 of 20"),
    "replaced": (tuned(replaced=5), "hyper rate too high", "5 of 40"),
    "harmful": (tuned(confirmed=-0.4), "hyper rate too high", r"raised it by 0.4 ± 0.05"),
    "skipped": (tuned(skipped={"negative_curvature": 30}), "solves meet negative curvature", r"30 of 40 .*75%"),
    "gap": (
        tuned(outer=(2.0, 0.2), held_out=(2.0, 1.0)),
        "outer data are learned by heart",
        "held-out loss from 2 to 1",
    ),
    "rise": (
        tuned({"validation__val_loss": [2.0, 1.0, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]}),
        "outer data are learned by heart",
        "'val_loss' rose from 0.8 to 1.25",
    ),
    "bound": (tuned(bounds=(Bound("decay", 0.999, 1.0),)), "hyperparameter at its bound", "'decay' is 0.999"),
    "cut off": (
        tuned(remarks=("No hypergradient of 'a' since hyper step 3: a clamp cuts it off; use Positive.",)),
        "hyperparameter without a hypergradient",
        "since hyper step 3",
    ),
    "alike": (
        tuned(remarks=("All entries of 'w' had the same hypergradient at the first hyper step: multiply.",)),
        "entries with the same hypergradient",
        "All entries of 'w'",
    ),
    "few": (tuned(hyper_steps=4, made=4), "too few hyper steps", "4 hyper steps"),
    "still hyperparameters": (tuned(travel=1e-5), "hyperparameters do not move", "1.0e-05 units"),
    "stale": (tuned({"hypergrad__residual": [5.0] * 20}), "inaccurate hypergradients", "is 5"),
    "inaccurate": (
        tuned({"hypergrad__residual": [0.95] * 20}, is_amortized=False),
        "inaccurate hypergradients",
        "is 0.95",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_fault_is_found_alone(name):
    case, kind, evidence = CASES[name]
    findings = diagnose(case)
    assert [finding.kind for finding in findings] == [kind]
    (finding,) = findings
    with pytest.raises(AssertionError, match=evidence):
        raise AssertionError(finding.evidence)
    assert finding.evidence.endswith(".")
    assert finding.remedy.endswith(".")
    assert finding.remedy[0].isupper()


HEALTHY_RUNS = {
    "nothing": Facts(batches=0),
    "falling": facts(),
    "negative": facts([-value for value in falling(200, 0.5, 2.0)]),
    "one bad batch": facts([*falling(100), 50.0, *falling(100, 0.5)]),
    "edge of stability": facts(records=records(sharpness__edge_ratio=[0.5, 1.0, 1.2, 1.1, 1.2])),
    "steps beyond the critical one": facts(
        [2.0] * 200, records=records(sharpness__edge_ratio=[30.0] * 9, sharpness__critical=[1.0] * 9)
    ),
    "small steps that lower the loss": facts(records=records(update_ratio__median=[7e-6] * 5)),
    "a loss that stays, under long steps": facts([2.3] * 200, records=records(update_ratio__median=[1e-2] * 5)),
    "a short run": facts([2.3] * 40, records=records(update_ratio__median=[7e-6] * 5)),
    "small steps in a game": facts([2.3] * 200, records=records(update_ratio__median=[7e-6] * 5), is_automatic=False),
    "labels by chance": facts([2.3, *[2.2 + 4 * noise for noise in NOISE]], is_shuffled=True),
    "one bad batch among labels by chance": facts([2.3, *[2.2 + x for x in NOISE], 50.0, 2.2], is_shuffled=True),
    "thrown back and recovered": facts([2.3, 5.0, 4.0, *falling(200, 3.0, 0.3)], is_shuffled=True),
    "one bad batch that doubles a loss that then falls": facts(
        [2.31, 7.06, *[2.2 + 0.2 * noise for noise in NOISE]], is_shuffled=True
    ),
    "a loss that stays, with a batch below its double": facts([2.31, 4.5, *LOST[2:]], is_shuffled=True),
    "losses of single examples that stay": facts([1.0, *[1.0, 1.0, 3.0, 0.1] * 50], is_shuffled=True),
    "lost in a game": facts(LOST, is_shuffled=True, is_automatic=False),
    "lost along a stream": facts(LOST, is_shuffled=None),
    "lost while tuned": dataclasses.replace(tuned(), loss=losses(LOST), is_shuffled=True),
    "thrown back in a game": facts(THROWN_BACK, is_shuffled=True, is_automatic=False),
    "thrown back along a stream": facts(THROWN_BACK, is_shuffled=None),
    "climbing while tuned": dataclasses.replace(tuned(), loss=losses(CLIMBING), is_shuffled=True),
    "thrown back by sorted data": facts(THROWN_BACK, is_shuffled=False),
    "climbing in sorted data": facts(CLIMBING, is_shuffled=False),
    "noise of single examples": facts([-math.log(1.0 - (k * 0.618034 + 0.05) % 1.0) for k in range(300)]),
    "growing in a game": facts(GROWING, is_shuffled=True, is_automatic=False),
    "growing along a stream": facts(GROWING, is_shuffled=None),
    "growing by chance": facts([0.001, *[0.002] * 20, *[0.001, 0.001, 0.001, 0.1] * 50], is_shuffled=True),
    "fine-tuned, of single examples": facts([1e-3 * 10 ** ((k * 0.618034 + 0.2) % 1.0 * 3) for k in range(300)]),
    "no loss left": facts([*falling(50), 0.0], layers={"a.weight": {"zero_gradient": 5}}),
    "no loss in some batches": facts(layers={"a.weight": {"zero_gradient": 5}, "b.weight": {"zero_gradient": 5}}),
    "sparse activations": facts(layers={"a.weight": {"rows": 4, "zero_rows": [0b0111, 0b1110] * 4}}),
    "few measurements": facts(layers={"a.weight": {"rows": 4, "zero_rows": [0b1111] * 7}}),
    "bias before BatchNorm": facts(layers={"a.bias": {"unmoved": 10, "gradient": 1e-9}}),
    "adapters": facts(frozen=("a",), frozen_share=0.99),
    "tuned": tuned(),
    "larger loss by tuning": dataclasses.replace(tuned(), loss=losses([1.0 + 0.01 * k for k in range(200)])),
    "few skipped": tuned(skipped={"nonfinite": 3}),
    "few steps so far": dataclasses.replace(tuned(made=3, hyper_steps=3), is_over=False),
    "weights overfit": tuned({"validation__val_loss": [0.3, 0.2, 0.19, 0.19, 0.19, 0.195, 0.2, 0.2]}),
    "gap as before": tuned(outer=(1.0, 0.2), held_out=(1.8, 0.36)),
    "all fall": tuned({"validation__val_loss": falling(9)}),
    "all rise": tuned({"validation__val_loss": [1.0, 0.5, 0.6, 0.7, 0.8, 0.9], "hypergrad__outer_loss": [1.0] * 40}),
}


@pytest.mark.parametrize("name", HEALTHY_RUNS)
def test_nothing_is_found_in_a_healthy_run(name):
    assert diagnose(HEALTHY_RUNS[name]) == []


def test_order_matters_only_where_the_loader_is_not_known_to_shuffle():
    loss = losses(falling())
    for _ in range(4):
        for curve, value in ((loss.likeness, 0.95), (loss.unevenness, 0.4), (loss.smoothness, 6.0), (loss.rises, 0.4)):
            curve.add(len(curve), value)
    for shuffled, wanted in ((True, []), (False, ["data are not shuffled"]), (None, ["data are not shuffled"])):
        found = diagnose(Facts(batches=200, loss=loss, is_shuffled=shuffled))
        assert [finding.kind for finding in found] == wanted


def test_causes_come_before_what_follows_from_them():
    run = facts(
        [2.0 * 1.5**k for k in range(20)] + [math.nan] * 10,
        layers={"a.weight": {"zero_gradient": 5}},
        tuning=dataclasses.replace(TUNED, skipped={"nonfinite": 20}),
    )
    kinds = [finding.kind for finding in diagnose(run)]
    assert kinds == ["learning rate too high", "no gradient reaches a layer"]


def test_training_that_hardly_moved_comes_before_bounds():
    run = tuned({"update_ratio__median": [7e-6] * 5}, bounds=(Bound("decay", 0.999, 1.0),))
    kinds = [finding.kind for finding in diagnose(dataclasses.replace(run, loss=losses([2.3] * 200)))]
    assert kinds == ["training has hardly moved", "hyperparameter at its bound"]


def test_solves_are_not_to_blame_for_weights_that_training_has_lost():
    lost = dataclasses.replace(tuned(skipped={"nonfinite": 30}), loss=losses([*falling(100), *[math.nan] * 9]))
    assert [finding.kind for finding in diagnose(lost)] == ["NaN or infinity in a batch"]
    assert [finding.kind for finding in diagnose(tuned(skipped={"nonfinite": 30}))] == ["solves end in NaN or infinity"]


def test_each_way_in_which_a_solve_fails_has_a_remedy():
    assert {status.value for status in Status if not status.succeeded} < set(_CAUSES)
    kinds = diagnose(tuned(skipped={"something new": 40}))
    assert [finding.kind for finding in kinds] == ["solves end with status something new"]


@pytest.mark.parametrize(("ratio", "factor"), [(10.0, "by a factor of 10 or more"), (1e14, "10 to begin with")])
def test_curvature_of_exploded_weights_is_no_advice(ratio, factor):
    (found,) = diagnose(facts([2.0] * 200, records=records(sharpness__edge_ratio=[ratio] * 9)))
    assert factor in found.remedy

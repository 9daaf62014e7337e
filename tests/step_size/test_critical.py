"""The longest step along an update that does not raise a loss."""

import math

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from lightning_ifthpo.core.loss import Loss
from lightning_ifthpo.optimizers import StabilityEdge
from lightning_ifthpo.step_size.critical import CriticalTracker, critical_step


def counted(loss):
    calls = []

    def loss_at(step):
        calls.append(step)
        return loss(step)

    return loss_at, calls


def quadratic(root):
    """Falls along the update, and has its first value again at the root."""
    return lambda step: 5.0 - step + step**2 / root


@pytest.mark.parametrize("guess", [1.0, 0.1, 30.0])
@pytest.mark.parametrize("root", [1e-3, 0.02, 0.6, 1.0, 1.7, 40.0, 2000.0])
def test_a_quadratic_takes_at_most_six_losses(root, guess):
    loss_at, calls = counted(quadratic(root))
    found = critical_step(loss_at, guess=guess, dtype=torch.float64)
    assert found.evaluations == len(calls) <= 6
    assert calls[:2] == [0.0, guess]
    assert found.step == pytest.approx(root, rel=1e-2)
    assert not found.is_bound


@pytest.mark.parametrize("root", [0.02, 1.0, 40.0])
def test_a_good_guess_saves_losses(root):
    assert critical_step(quadratic(root), guess=1.02 * root, dtype=torch.float64).evaluations <= 4


@pytest.mark.parametrize(
    ("loss", "root"),
    [
        (lambda step: -step + step**4, 1.0),
        (lambda step: abs(1.0 - 1.3 * step), 2.0 / 1.3),
        (lambda step: math.exp(min(3.0 * step, 700.0)) - 6.0 * step, 0.4190),
        (lambda step: -step if step <= 0.3 else math.nan, 0.3),
        (lambda step: -step if step <= 7.0 else math.inf, 7.0),
    ],
    ids=["quartic", "kink", "exponential", "NaN", "infinity"],
)
def test_other_losses(loss, root):
    """Six losses find a smooth one to a percent, and one that ends at a wall to half of its length."""
    wall = not math.isfinite(loss(100.0))
    found = critical_step(loss)
    assert found.step == pytest.approx(root, rel=0.5 if wall else 0.02)
    assert not found.is_bound


@pytest.mark.parametrize(("slope", "is_longer"), [(-1.0, True), (0.0, True), (1.0, False)])
def test_a_loss_that_only_falls_or_rises_gives_a_bound(slope, is_longer):
    found = critical_step(lambda step: 1.0 + slope * step)
    assert found.is_bound
    assert (found.step > 1000.0) if is_longer else (found.step < 1e-3)
    assert found.evaluations == 6


def test_a_rise_within_rounding_is_none():
    """In float32 a loss of one cannot rise by 1e-9."""
    loss_at = quadratic(0.5)

    def small(step):
        return 1.0 + 1e-9 * loss_at(step)

    assert critical_step(small, dtype=torch.float64).step == pytest.approx(0.5, rel=1e-2)
    assert critical_step(small, dtype=torch.float32).step > 1.0


def test_tolerance_and_budget_are_kept():
    def loss(step):
        return -step + step**4

    exact, rough = (critical_step(loss, guess=3.0, rtol=rtol, max_evaluations=30) for rtol in (1e-9, 0.5))
    assert exact.step == pytest.approx(1.0, rel=1e-8)
    assert rough.evaluations < exact.evaluations
    assert critical_step(loss, guess=3.0, max_evaluations=3).evaluations == 3


def test_a_loss_that_is_not_finite_to_begin_with():
    with pytest.raises(FloatingPointError, match="the loss before the update is nan"):
        critical_step(lambda step: math.nan)


@pytest.mark.parametrize("options", [{"max_evaluations": 2}, {"rtol": 0.0}, {"rtol": math.inf}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"expected"):
        CriticalTracker(**options)


OPTIMIZERS = {
    "gradient descent": lambda w: SGD(w, lr=0.1),
    "heavy ball": lambda w: SGD(w, lr=0.1, momentum=0.9),
    "Nesterov": lambda w: SGD(w, lr=0.1, momentum=0.9, nesterov=True),
    "weight decay": lambda w: SGD(w, lr=0.1, weight_decay=0.5),
    "Adam": lambda w: Adam(w, lr=0.1, eps=1.0, betas=(0.9, 0.5)),
    "AdamW": lambda w: AdamW(w, lr=0.1, eps=1.0, betas=(0.9, 0.5), weight_decay=0.0),
    "NAdam": lambda w: NAdam(w, lr=0.1, eps=1.0, betas=(0.9, 0.5)),
    "RMSprop": lambda w: RMSprop(w, lr=0.1, eps=1.0, momentum=0.5, alpha=0.5),
}


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "weight decay"])
def test_at_the_edge_of_stability_it_is_one_for_any_optimizer(name):
    """On a quadratic whose curvature is at the edge of `StabilityEdge`, weights go back and forth."""
    weight = torch.tensor([1e-3], dtype=torch.float64, requires_grad=True)
    optimizer = OPTIMIZERS[name]([weight])
    tracker, curvature, ratios = CriticalTracker(), 1.0, []
    for _ in range(400):
        tracker.before_update([weight])
        optimizer.zero_grad()
        (curvature / 2.0 * weight**2).sum().backward()
        optimizer.step()
        found = tracker.measure(Loss(lambda c=curvature: (c / 2.0 * weight**2).sum(), [weight]))
        ratios.append(1.0 / found.step)
        edge = StabilityEdge.of(optimizer, [weight])
        scale = 1.0 if edge.metric is None else float(edge.metric)
        curvature = edge.sharpness / scale
    assert ratios[-1] == pytest.approx(1.0, rel=0.01)


def test_a_step_on_a_quadratic_agrees_with_slope_and_curvature():
    """Weights of two shapes and dtypes; they, and the random state, are left as they are."""
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in (3, (2, 2))
    ]
    curvatures = [torch.rand(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]

    def loss():
        return sum((c * w**2).sum() for c, w in zip(curvatures, weights, strict=True))

    tracker = CriticalTracker(rtol=1e-6)
    tracker.before_update(weights)
    gradients = torch.autograd.grad(loss(), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 0.2 * gradient
    slope = sum(float((g**2).sum()) for g in gradients)
    curvature = sum(float((2 * c * g**2).sum()) for c, g in zip(curvatures, gradients, strict=True))
    after = [weight.detach().clone() for weight in weights]
    found = tracker.measure(Loss(loss, weights))
    assert 0.2 * found.step == pytest.approx(2.0 * slope / curvature, rel=1e-6)
    assert all(torch.equal(weight, value) for weight, value in zip(weights, after, strict=True))
    assert not tracker.is_ready


def test_weights_that_have_not_moved_have_no_critical_step():
    weight = torch.ones(2, requires_grad=True)
    tracker = CriticalTracker()
    tracker.before_update([weight])
    assert tracker.measure(Loss(lambda: weight.sum(), [weight])) is None
    assert tracker.measurements == 0


def test_a_tracker_starts_from_the_last_result_and_resumes():
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def step(tracker, steps):
        with torch.no_grad():
            weight.fill_(1.0)
            tracker.before_update([weight])
            weight.sub_(0.002)
        tried = []
        original = weight.detach().clone()

        def loss():
            tried.append(float((weight.detach() - 1.0) / (original - 1.0)))
            return (weight**2).sum()

        found = tracker.measure(Loss(loss, [weight]))
        steps.append(found.step)
        return tried[1]

    first, second, steps = CriticalTracker(), CriticalTracker(), []
    assert step(first, steps) == pytest.approx(1.0)
    assert step(first, steps) == pytest.approx(steps[0], rel=1e-6) == pytest.approx(1000.0, rel=1e-2)
    second.load_state_dict(first.state_dict())
    assert step(second, steps) == pytest.approx(steps[1], rel=1e-6)
    assert second.measurements == 3

"""The rate made of slopes and curvatures."""

import math

import pytest
import torch

from lightning_ifthpo.step_size import (
    AveragedRule,
    Parabola,
    PublishedRule,
)


def feed(rule, slope, curvature, count, *, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        wobble = noise * float(torch.randn((), generator=generator))
        rule.observe(Parabola(slope(rule.lr or 0.0) + wobble, curvature, 1.0))
    return rule.lr


def test_the_averaged_rule_climbs_to_the_optimal_step_and_rests_there():
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, 4.0, 3) == pytest.approx(0.003 * 0.5)
    assert feed(rule, lambda _: 2.0, 4.0, 1) == pytest.approx(0.003 * 0.5 * 1.08**0.997)
    assert not rule.settled
    assert feed(rule, lambda _: 2.0, 4.0, 200) == pytest.approx(0.5, rel=5e-2)
    assert rule.settled


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_averaged_rule_rests_in_the_stationary_state_of_noisy_descent(seed):
    """There slope / curvature is half the rate, whatever the rate: a rule that follows it would be gone long ago."""
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 4.0, 200)
    before = rule.lr
    rates = [feed(rule, lambda lr: lr * 4.0 / 2, 4.0, 1, noise=1.0, seed=seed * 10_000 + i) for i in range(3000)]
    assert max(rates) < 1.25 * before
    assert min(rates) > before / 4
    assert sum(rates) / len(rates) > 0.6 * before


def test_the_averaged_rule_shrinks_when_steps_make_the_loss_worse():
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 4.0, 200)
    # down to twice the optimal step, where the gain is zero, and back and forth about it by one recovery or shrinkage
    assert 2.0 / 400.0 < feed(rule, lambda _: 2.0, 400.0, 200) < 1.25 * 2 * 2.0 / 400.0


def test_where_the_loss_curves_downwards_the_rate_grows_as_if_it_were_straight():
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, -4.0, 13) == pytest.approx(0.003 * 0.5 * 1.08**10)


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_rates_stay_within_bounds_and_bad_probes_change_nothing(rule_type):
    rule = rule_type(lr_min=1e-3, lr_max=1e-2)
    assert feed(rule, lambda _: 1.0, 1e-6, 300) == pytest.approx(1e-2)
    before = rule.lr
    for model in (Parabola(math.nan, 1.0, 1.0), Parabola(1.0, math.inf, 1.0)):
        assert not rule.observe(model)
    assert rule.lr == before
    assert rule.refused == 2
    assert feed(rule, lambda _: 1.0, 1e9, 300) == pytest.approx(1e-3)


def test_a_loss_without_curvature_grows_the_rate_slowly():
    rule = AveragedRule()
    assert feed(rule, lambda _: 1.0, 0.0, 13) == pytest.approx(1e-8 * 1.08**10)


def test_only_the_first_probe_decides_how_high_a_run_begins():
    rule = AveragedRule()
    assert feed(rule, lambda _: 1.0, 0.0, 1) == 1e-8
    assert feed(rule, lambda _: 1.0, 1e-6, 2) == pytest.approx(1e-8 * 1.08**2)
    rule = AveragedRule()
    feed(rule, lambda _: 1.0, 1.0, 1)
    assert feed(rule, lambda _: 1.0, 10.0, 1) == pytest.approx(0.0003)


def test_a_rate_that_hardly_grows_any_more_is_settled():
    """Without noise the slope at the end of a step never vanishes."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    assert 0.4 < rule.lr < 0.5


def test_the_rate_does_not_collapse_where_a_shorter_step_is_no_better():
    """As with few batches in a fixed order, whose next slope is negative whatever the rate."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    before = rule.lr
    assert feed(rule, lambda _: -1.5, 4.0, 400) == pytest.approx(before / 4, rel=0.25)
    assert feed(rule, lambda _: -0.01, 4.0, 400) < before / 8


def test_a_probe_without_length_is_not_used_and_not_refused():
    rule = AveragedRule()
    assert not rule.observe(Parabola(0.0, 0.0, 0.0))
    assert (rule.lr, rule.refused) == (None, 0)


def test_a_rate_at_its_bound_is_settled():
    rule = AveragedRule(lr_max=1e-3)
    feed(rule, lambda _: 2.0, 0.1, 100)
    assert rule.settled


def test_once_settled_the_rate_grows_slowly_even_where_nothing_curves():
    """As where a network has learned its data by heart: slope and curvature vanish together."""
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    feed(rule, lambda _: 2e-6, 0.0, 100)
    before = rule.lr
    assert feed(rule, lambda _: 2e-6, 0.0, 10) == pytest.approx(before * 1.01**10)
    assert rule.settled


def test_the_published_rule_is_a_moving_average():
    rule = PublishedRule(smoothing=0.5)
    assert feed(rule, lambda _: 2.0, 4.0, 1) == pytest.approx(0.5)
    assert feed(rule, lambda _: 4.0, 4.0, 1) == pytest.approx(0.75)
    assert feed(rule, lambda _: 4.0, -4.0, 5) == pytest.approx(0.75)
    assert rule.refused == 5


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_rules_go_on_from_their_state(rule_type):
    rule, other = rule_type(), rule_type()
    feed(rule, lambda _: 2.0, 4.0, 20)
    other.load_state_dict(rule.state_dict())
    assert feed(rule, lambda _: 2.0, 4.0, 30) == feed(other, lambda _: 2.0, 4.0, 30)


def diverge(rule, growth, count, *, curvature=10.0, decay=1.0):
    """Looks at updates that grow and are too long, of slope 1; returns the rate after each."""
    rates = []
    for index in range(count):
        squared = 1e-20 * growth**index
        rule.observe(Parabola(squared, curvature * squared, squared), decay)
        rates.append(rule.lr)
    return rates


def settled_rule():
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 2.0, 1)
    return rule


@pytest.mark.parametrize(("growth", "looks"), [(5.0, 4), (50.0, 3), (2000.0, 2)])
def test_updates_that_grow_and_are_too_long_cut_the_rate_at_once(growth, looks):
    """To slope / curvature, half the edge of stability. The first look has nothing to compare with."""
    rule = settled_rule()
    before = rule.lr
    assert before > 0.5
    assert not rule.watchful
    rates = diverge(rule, growth, looks)
    assert rates[:-1] == pytest.approx([before] * (looks - 1), rel=0.02)
    assert rates[-1] == pytest.approx(0.1)


def test_growing_updates_make_looks_frequent_and_others_do_not():
    rule = settled_rule()
    diverge(rule, 5.0, 2)
    assert rule.watchful
    rule.observe(Parabola(2.0, 2.0, 1.0))
    assert not rule.watchful
    shrinking = settled_rule()
    diverge(shrinking, 0.1, 3)
    short = settled_rule()
    diverge(short, 50.0, 3, curvature=0.1)
    assert not shrinking.watchful
    assert not short.watchful
    assert shrinking.lr == pytest.approx(short.lr, rel=0.05)


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_in_a_decay_the_rate_only_falls_and_only_where_steps_are_too_long(rule_type):
    rule = rule_type()
    feed(rule, lambda _: 2.0, 4.0, 200)
    before = rule.lr
    for _ in range(40):
        rule.observe(Parabola(2.0, 1.0, 1.0), 0.5)  # a longer step would be better
        rule.observe(Parabola(2.0, 14.0, 1.0), 0.5)  # twice the best step is 0.29, and the step is 0.25
    assert rule.lr == before
    for _ in range(40):
        rule.observe(Parabola(2.0, 40.0, 1.0), 0.5)
    assert rule.lr < before / 2


def test_a_rule_goes_on_in_the_middle_of_a_divergence():
    rule, other = settled_rule(), AveragedRule()
    diverge(rule, 5.0, 2)
    other.load_state_dict(rule.state_dict())
    assert other.watchful
    for _ in range(2):
        for each in (rule, other):
            each.observe(Parabola(1.0, 10.0, 1.0))
    assert rule.lr == other.lr

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
    assert feed(rule, lambda _: 2.0, 4.0, 3) == pytest.approx(0.003 * 0.5 * 1.08**0.998, rel=1e-3)
    assert not rule.settled
    assert 0.4 < feed(rule, lambda _: 2.0, 4.0, 200) <= 0.5
    assert rule.settled


def test_the_climb_of_a_short_run_takes_a_fifth_of_it():
    """333-fold in 20 steps, from 0.003 of the optimal step; in long runs 8 % per step, which is slow enough."""
    rule = AveragedRule()
    rule.plan(100)
    assert feed(rule, lambda _: 2.0, -4.0, 22) == pytest.approx(0.0015 * 333.0)
    rule = AveragedRule()
    rule.plan(4)  # as in a fast_dev_run
    assert feed(rule, lambda _: 2.0, -4.0, 4) == pytest.approx(0.0015 * 2.0**2)
    rule = AveragedRule()
    rule.plan(10_000)
    assert feed(rule, lambda _: 2.0, -4.0, 22) == pytest.approx(0.0015 * 1.08**20)


def test_growth_is_that_of_all_steps_since_the_last_look():
    rules = AveragedRule(), AveragedRule()
    for rule, count, steps in zip(rules, (12, 4), (1, 3), strict=True):
        for _ in range(2):
            rule.observe(Parabola(2.0, -1.0, 1.0))
        for _ in range(count):
            rule.observe(Parabola(2.0, -1.0, 1.0), steps=steps)
    assert rules[0].lr == pytest.approx(rules[1].lr) == pytest.approx(0.006 * 1.08**12)


@pytest.mark.parametrize("seed", range(3))
def test_a_settled_rate_stays_in_the_stationary_state_of_noisy_descent(seed):
    """There slope / curvature is half the rate, whatever the rate: a rule that follows it would be gone long ago."""
    rule = settled_rule()
    before = rule.lr
    feed(rule, lambda lr: lr * 2.0 / 2, 2.0, 1000, noise=1.0, seed=seed)
    assert before / 4 < rule.lr <= before


def test_the_averaged_rule_shrinks_when_steps_make_the_loss_worse():
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 4.0, 200)
    # until the gain is not negative any more, at twice the optimal step
    assert 0.6 * 2 * 2.0 / 400.0 < feed(rule, lambda _: 2.0, 400.0, 200) <= 2 * 2.0 / 400.0


def test_where_the_loss_curves_downwards_the_rate_grows_as_if_it_were_straight():
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, -4.0, 13) == pytest.approx(0.003 * 0.5 * 1.08**11)


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


def test_the_first_rate_is_between_the_first_move_and_a_tenth_of_it():
    """0.003 of the optimal step where that lies between: what noise says of slope and curvature does not count alone.

    Where the loss does not fall, or does not curve, there is no optimal step.
    """
    for slope, wanted in ((1.0, 0.003), (1000.0, 0.01), (0.01, 0.001), (-1.0, 0.01), (0.0, 0.01)):
        rule = AveragedRule()
        rule.observe(Parabola(slope, 1.0, 1.0), first_rate=0.01)
        assert rule.lr == pytest.approx(wanted)


def test_a_loss_without_curvature_and_weights_without_length_begin_at_the_lowest_rate():
    rule = AveragedRule()
    assert feed(rule, lambda _: 1.0, 0.0, 13) == pytest.approx(1e-8 * 1.08**11)


def test_a_rate_that_hardly_grows_any_more_is_settled():
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 4.0, 1)
    assert 0.4 < rule.lr < 0.5
    assert rule.center == pytest.approx(0.5)


def test_a_settled_rate_does_not_grow_even_where_nothing_curves():
    """As where a network has learned its data by heart: slope and curvature vanish together."""
    rule = settled_rule()
    before = rule.lr
    feed(rule, lambda _: 2e-6, 0.0, 100)
    assert rule.lr == before


def test_a_probe_without_length_is_not_used_and_not_refused():
    rule = AveragedRule()
    assert not rule.observe(Parabola(0.0, 0.0, 0.0))
    assert (rule.lr, rule.refused) == (None, 0)


def test_a_rate_at_its_bound_is_settled():
    rule = AveragedRule(lr_max=1e-3)
    feed(rule, lambda _: 2.0, 0.1, 100)
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
    rule.plan(100)
    feed(rule, lambda _: 2.0, 4.0, 5)
    other.load_state_dict(rule.state_dict())
    assert feed(rule, lambda _: 2.0, 4.0, 3) == feed(other, lambda _: 2.0, 4.0, 3)


def settled_rule():
    rule = AveragedRule()
    while not rule.settled:
        feed(rule, lambda _: 2.0, 2.0, 1)
    return rule


@pytest.mark.parametrize(
    ("steep", "corrected"),
    [
        (Parabola(2.0, 8.0, 1.0, loss=1.0), 0.25),  # lowest at 2/8
        (Parabola(-1.0, 8.0, 1.0, loss=1.0), 0.0),  # every step along it raises the loss
        (Parabola(2.0, 8.0, 1.0, loss=25.0), None),  # by 1.3, which is less than three tenths
        (Parabola(2.0, 8.0, 1.0), None),  # without a loss there is no part of it
    ],
)
def test_a_step_that_raises_the_loss_by_much_is_taken_back_to_its_lowest_point_and_lowers_the_rate(steep, corrected):
    rule = settled_rule()
    before = rule.lr
    assert before == pytest.approx(0.87, rel=0.05)  # a step of that length raises the loss by 1.3
    assert rule.corrected is None
    assert rule.observe(steep)
    assert rule.corrected == corrected
    assert rule.lr == (before if corrected is None else pytest.approx(0.6 * before))


def test_what_raises_the_loss_no_more_than_noise_does_is_not_taken_back():
    rule = settled_rule()
    for curvature, corrected in ((6.0, pytest.approx(1 / 3)), (2.0, None), *[(2.0, None)] * 7):
        rule.observe(Parabola(2.0, curvature, 1.0, loss=0.1))
        assert rule.corrected == corrected
    noisy = Parabola(-2.0, 2.0, 1.0, loss=10.0)  # which raises the loss by less than three tenths
    rule.observe(noisy)
    assert rule.corrected is None
    rule.observe(Parabola(-2.0, 2.0, 1.0, loss=0.1))
    assert rule.corrected is None
    rule.observe(Parabola(-20.0, 2.0, 1.0, loss=0.1))
    assert rule.corrected == 0.0


def test_without_a_known_length_the_climb_ends_after_a_hundred_steps_even_where_nothing_curves():
    """As where data can be separated: there is no upper limit in sight."""
    rule = AveragedRule()
    assert feed(rule, lambda _: 2.0, -4.0, 101) == feed(rule, lambda _: 2.0, -4.0, 100)
    assert rule.settled


def test_after_a_rate_has_fallen_looks_are_frequent_and_it_grows_again_after_a_window_of_them():
    rule = AveragedRule()
    feed(rule, lambda _: 2.0, 0.1, 20)
    assert not rule.watchful
    rule.observe(Parabola(2.0, 4e9, 1.0, loss=1e-3))
    before = rule.lr
    assert rule.watchful
    assert not rule.settled
    assert feed(rule, lambda _: 2.0, 0.1, 7) == before
    assert rule.watchful
    assert feed(rule, lambda _: 2.0, 0.1, 1) > before
    assert not rule.watchful


@pytest.mark.parametrize("rule_type", [AveragedRule, PublishedRule])
def test_in_a_decay_the_rate_only_falls_and_only_where_steps_are_too_long(rule_type):
    rule = rule_type()
    feed(rule, lambda _: 2.0, 4.0, 200)
    before = rule.lr
    for _ in range(40):
        rule.observe(Parabola(2.0, 1.0, 1.0), decay=0.5)  # a longer step would be better
        rule.observe(Parabola(2.0, 3.0 / before, 1.0), decay=0.5)  # twice the best step is 4/3 of the rate
    assert rule.lr == before
    for _ in range(40):
        rule.observe(Parabola(2.0, 40.0, 1.0), decay=0.5)
    assert rule.lr < before / 2

"""Which rates a race tries, and which one wins."""

import math

import pytest

from lightning_ifthpo.step_size import RateSuggestion, RateTrial
from lightning_ifthpo.step_size.race import RateRace


def run(loss, anchor=1.0, **options):
    race, order = RateRace(anchor, **options), []
    while (rate := race.next_rate) is not None:
        order.append(rate)
        race.observe(loss(rate))
    return race, order


def around(best):
    return lambda rate: abs(math.log(rate / best))


def test_five_rates_by_factors_of_four_and_then_half_and_twice_the_best():
    race, order = run(around(0.26), anchor=1.0)
    assert order == [4.0, 1.0, 0.25, 1 / 16, 1 / 64, 0.125, 0.5]
    assert race.winner.lr == 0.25
    assert not race.is_open
    assert [trial.lr for trial in race.trials] == sorted(order)


@pytest.mark.parametrize("best", [1e-3, 2e-2, 3.0, 40.0])
def test_the_best_of_a_smooth_loss_is_found_within_a_factor_of_one_and_a_half(best):
    race, _ = run(around(best))
    assert best / 1.5 < race.winner.lr < 1.5 * best


@pytest.mark.parametrize(("best", "side"), [(1e-30, 0), (1e30, -1)])
def test_beyond_the_first_rates_it_goes_on_four_times(best, side):
    race, order = run(around(best))
    assert len(order) == 5 + 4 + 2
    assert race.winner == race.trials[side]
    assert race.is_open


def test_no_rate_above_the_highest_is_tried():
    race, order = run(around(1e30), highest=2.5)
    assert max(order) == 2.0
    assert race.winner.lr == 2.0
    assert not race.is_open  # there is nowhere to go


def test_the_anchor_is_tried_in_any_case():
    assert max(run(around(1.0), highest=0.1)[1]) == 1.0


def test_lost_trials_never_win():
    race, _ = run(lambda rate: math.nan if rate > 0.1 else -rate)
    assert race.winner.lr == 1 / 16
    assert all(math.isinf(trial.loss) for trial in race.trials if trial.lr > 0.1)


def test_where_all_trials_are_lost_it_goes_down_four_times():
    race, order = run(lambda _: math.inf)
    assert len(order) == 9
    assert min(order) == 4.0**-7
    assert math.isinf(race.winner.loss)


TRIALS = (RateTrial(0.025, 1.3), RateTrial(0.1, 1.2), RateTrial(0.4, math.inf))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "0.1, by 3 trials of 20 steps; the first update does not raise the loss below 0.5; 1 diverged"),
        ({"edge": math.inf, "trial_steps": 1, "trials": TRIALS[:2]}, "0.1, by 2 trials of one step"),
        (
            {"edge": math.inf, "trials": TRIALS[1:], "is_open": True},
            "0.1, by 2 trials of 20 steps; 1 diverged; the lowest rate that was tried is the best, and a lower one may "
            "be better",
        ),
    ],
)
def test_a_suggestion_in_words(changes, words):
    options = {"edge": 0.5, "trials": TRIALS, "trial_steps": 20, "steps": 64}
    assert str(RateSuggestion(0.1, (0.1,), **(options | changes))) == words

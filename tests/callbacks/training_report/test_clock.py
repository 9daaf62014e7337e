"""The budget of a report."""

import pytest

from lightning_ifthpo.callbacks.training_report.clock import Clock


class Time:
    now = 0.0

    def __call__(self):
        return self.now


def work(clock, time, seconds):
    with clock.working():
        time.now += seconds


def test_own_work_takes_the_share_that_it_is_given():
    time = Time()
    clock = Clock(0.1, clock=time)
    for _ in range(1000):
        time.now += 1.0
        if clock.affords():
            work(clock, time, 2.0)
    assert 0.08 < clock.seconds / clock.elapsed <= 0.1
    assert clock.last_cost == 2.0


def test_the_first_work_is_free():
    time = Time()
    clock = Clock(0.01, free=2, clock=time)
    assert clock.affords()
    work(clock, time, 1.0)
    assert clock.affords()
    work(clock, time, 1.0)
    assert not clock.affords()


def test_the_first_work_waits_until_it_is_expected_to_be_affordable():
    time = Time()
    clock = Clock(0.1, expected=1.0, clock=time)
    time.now = 9.0
    assert not clock.affords()
    time.now = 11.0
    assert clock.affords()


def test_work_that_fails_counts():
    time = Time()
    clock = Clock(0.1, clock=time)
    with pytest.raises(KeyError):
        fail(clock, time)
    assert clock.seconds == 3.0


def fail(clock, time):
    with clock.working():
        time.now += 3.0
        raise KeyError

"""When to fire."""

import pytest

from lightning_ifthpo.runtime.cadence import Cadence


def fired(cadence, batches, *, step_every=1, **options):
    result = []
    for batch in range(1, batches + 1):
        if batch % step_every == 0:
            cadence.optimizer_stepped()
        if cadence.is_due(**options):
            with cadence.firing(lambda: None):
                result.append(batch)
    return result


def test_every_n_batches_after_the_start():
    assert fired(Cadence(3), 10) == [3, 6, 9]
    assert fired(Cadence(3, start_after_batches=4), 12) == [7, 10]


def test_it_waits_for_the_optimizer_step():
    assert fired(Cadence(3), 16, step_every=4) == [4, 8, 12, 16]


def test_the_last_chance_is_the_first_optimizer_step():
    assert fired(Cadence(100), 2, step_every=2, last_chance=True) == [2]


def test_resuming_goes_on_counting():
    whole, first = Cadence(3, 2), Cadence(3, 2)
    wanted = fired(whole, 12)
    got = fired(first, 4)
    second = Cadence(3, 2)
    second.load_state_dict(first.state_dict())
    assert got + [4 + batch for batch in fired(second, 8)] == wanted


@pytest.mark.parametrize("max_overhead", [0.05, 0.25, 1.0])
def test_a_budget_of_time_is_kept(max_overhead):
    """Batches of one second, hyper steps of three."""
    now, own = [0.0], [0.0]
    cadence = Cadence(1, max_overhead=max_overhead, clock=lambda: now[0])
    cadence.begin()
    synchronized = []
    for _ in range(1000):
        now[0] += 1.0
        cadence.optimizer_stepped()
        if cadence.is_due():
            with cadence.firing(lambda: synchronized.append(1)):
                now[0] += 3.0
                own[0] += 3.0
    assert 0.9 * max_overhead * 1000 <= own[0] <= max_overhead * 1000
    assert synchronized


def test_without_a_budget_the_device_is_not_synchronized():
    cadence = Cadence(1)
    with cadence.firing(lambda: pytest.fail("synchronized")):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "every_n_batches to be an integer >= 1, got 0"),
        ((1.5,), "every_n_batches to be an integer"),
        ((1, -1), "start_after_batches"),
        ((1, 0, 0.0), "max_overhead > 0"),
        ((1, 0, -0.1), "max_overhead > 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cadence(*arguments)


def test_processes_keep_a_budget_of_time_together():
    clocks = iter([0.0] * 10)
    cadence = Cadence(1, max_overhead=0.1, clock=lambda: next(clocks))
    asked = []

    def agreed(decision):
        asked.append(decision)
        return False

    cadence.begin(agreed)
    cadence.optimizer_stepped()
    assert not cadence.is_due()
    assert asked == [True]
    assert cadence.postponed == 1

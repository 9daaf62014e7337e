"""Random numbers that are drawn again, and those that are due, which nobody disturbs."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from lightning_ifthpo.core.random_state import RandomState, Stream, derive_seed, generator_of, isolated
from tests.helpers.device import DEVICE

CPU = torch.device("cpu")


def draw():
    """One number from each generator."""
    python, numpy = random.random(), float(np.random.rand())  # noqa: NPY002 - the legacy state is the global one
    return [python, numpy, torch.rand(()).item(), torch.rand((), device=DEVICE).item()]


def test_a_state_is_replayed_as_often_as_asked_and_the_numbers_that_are_due_stay():
    state = RandomState(DEVICE)
    first, second = draw(), draw()
    for _ in range(2):
        before = RandomState(DEVICE)
        with state.replayed():
            assert [draw(), draw()] == [first, second]
        due = draw()
        before.restore()
        assert draw() == due
        state.restore()
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_restoring_goes_back_for_good():
    state = RandomState(DEVICE)
    first = draw()
    state.restore()
    assert draw() == first


def test_a_seed_holds_inside_the_block_only():
    with isolated(DEVICE, seed=5):
        first = draw()
    after = RandomState(DEVICE)
    with isolated(DEVICE, seed=5):
        assert draw() == first
    with isolated(DEVICE, seed=6):
        assert all(one != other for one, other in zip(draw(), first, strict=True))
    due = draw()
    after.restore()
    assert draw() == due


def test_without_a_seed_the_block_goes_on_drawing():
    state = RandomState(CPU)
    with isolated(CPU):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)
    state.restore()
    assert torch.equal(torch.rand(3), inside)


def test_an_error_restores_too():
    before = torch.get_rng_state()

    def fails():
        with isolated(CPU, seed=1):
            torch.rand(3)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**32, 2**40 + 1])
def test_seeds_may_be_larger_than_numpy_takes(seed):
    with isolated(CPU, seed):
        assert torch.initial_seed() == seed
        draw()


def test_seeds_differ_with_each_argument_and_are_small_enough_for_torch():
    numbers = list(product(Stream, range(3), range(3), range(3)))
    seeds = [derive_seed(stream, seed=seed, step=step, rank=rank) for stream, seed, step, rank in numbers]
    assert len(set(seeds)) == len(numbers)
    assert 0 <= min(seeds) < max(seeds) < 2**63
    for stream, seed, step, rank in numbers:
        if rank == 0:
            wanted = derive_seed(stream, seed=seed, step=step)
            assert generator_of(stream, seed=seed, step=step).initial_seed() == wanted

"""Iterators that are read ahead."""

from itertools import count

from lightning_ifthpo.core.rewindable import Rewindable


def test_reading_ahead_does_not_advance():
    numbers = Rewindable(count())
    first, second = numbers.ahead(), numbers.ahead()
    assert [next(first), next(first), next(second), next(first)] == [0, 1, 0, 2]
    assert [next(numbers) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_it_ends_where_its_source_ends():
    letters = Rewindable(iter("ab"))
    assert list(letters.ahead()) == ["a", "b"]
    assert list(letters) == ["a", "b"]
    assert list(letters.ahead()) == []


def test_what_was_read_is_forgotten():
    numbers = Rewindable(count())
    next(numbers.ahead())
    next(numbers)
    assert not numbers.read_ahead


def test_other_attributes_are_those_of_the_source():
    class Stream:
        name = "stream"

        def __next__(self):
            return 1

    assert Rewindable(Stream()).name == "stream"

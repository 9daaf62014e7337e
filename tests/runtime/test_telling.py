"""Warnings that are kept for a report."""

import copy
import gc

import pytest

from lightning_ifthpo.runtime import telling
from lightning_ifthpo.runtime.telling import Notes, rank_zero_warn


def warn(*messages):
    for message in messages:
        with pytest.warns(UserWarning, match=message):
            rank_zero_warn(message)


def test_warnings_are_kept_from_the_beginning_to_the_end_each_once():
    notes, copied = Notes(), copy.deepcopy(Notes())
    warn("before")
    notes.begin()
    warn("first", "second", "first")
    notes.end()
    warn("after")
    assert (notes.messages, copied.messages) == (("first", "second"), ())
    notes.begin()
    assert notes.messages == ()
    notes.end()


def test_a_flood_is_cut_off():
    notes = Notes()
    notes.begin()
    warn(*(f"number {number}" for number in range(30)))
    assert len(notes.messages) == 20
    notes.end()


def test_the_place_of_a_warning_is_where_it_was_given():
    with pytest.warns(UserWarning, match="here") as told:
        rank_zero_warn("here")
    assert told[0].filename == __file__


def test_notes_that_nobody_ended_are_forgotten_with_their_owner():
    count, notes = len(telling._OPEN), Notes()
    notes.begin()
    assert len(telling._OPEN) == count + 1
    del notes
    gc.collect()
    assert len(telling._OPEN) == count

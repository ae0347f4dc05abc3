"""The table of states: total in the sense of its laws."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iocp_ctypes import CloseReason
from iocp_ctypes import _lifecycle as life

PAIRS = list(itertools.product(life.STATES, life.EVENTS))


def after(state: int, event: str) -> int:
    """Tell a state an event, as `Lifetime._move` does."""
    return life.TRANSITIONS.get((state, event), state)


def test_states_and_events_are_all_there_are() -> None:
    assert list(life.STATES) == list(range(len(life.STATES))), "states are ordered numbers"
    assert len(life.STATE_NAMES) == len(life.STATES)
    for state, name in zip(life.STATES, life.STATE_NAMES, strict=True):
        assert getattr(life, name.upper()) == state
    assert len(set(life.EVENTS)) == len(life.EVENTS)
    for (state, event), target in life.TRANSITIONS.items():
        assert state in life.STATES
        assert event in life.EVENTS
        assert target in life.STATES
    assert {event for _state, event in life.TRANSITIONS} == set(life.EVENTS), "an event that does nothing"


def test_no_state_goes_back() -> None:
    for state, event in PAIRS:
        assert after(state, event) >= state
        if (state, event) in life.TRANSITIONS:
            assert after(state, event) > state, "a row that changes nothing"


def test_an_event_told_twice_is_told_once() -> None:
    for state, event in PAIRS:
        once = after(state, event)
        assert after(once, event) == once


@given(st.sampled_from(life.STATES), st.lists(st.sampled_from(life.EVENTS), max_size=20))
def test_any_events_lead_forward_and_stutter_freely(state: int, events: list[str]) -> None:
    plain = stuttering = state
    for event in events:
        before = plain
        plain = after(plain, event)
        stuttering = after(after(stuttering, event), event)
        assert before <= plain == stuttering


@pytest.mark.parametrize("state", life.STATES)
def test_every_state_reaches_closed(state: int) -> None:
    seen = {state}
    while grown := {after(at, event) for at in seen for event in life.EVENTS} - seen:
        seen |= grown
    assert life.CLOSED in seen


@pytest.mark.parametrize("state", [state for state in life.STATES if state < life.JOINING])
def test_a_failure_leads_to_joining_from_everywhere(state: int) -> None:
    assert after(state, life.FAIL) == life.JOINING


def test_joining_has_one_way_out_and_closed_has_one_way_in() -> None:
    ways_out = {
        (event, target) for (state, event), target in life.TRANSITIONS.items() if state == life.JOINING
    }
    assert ways_out == {(life.JOINED, life.CLOSED)}
    ways_in = {pair for pair, target in life.TRANSITIONS.items() if target == life.CLOSED}
    assert ways_in == {(life.JOINING, life.JOINED)}
    assert not [pair for pair in life.TRANSITIONS if pair[0] == life.CLOSED]


def test_the_graceful_way() -> None:
    state, way = life.CONNECTING, []
    for event in (life.CONNECTED, life.CLOSE, life.DRAINED, life.FINISHED, life.JOINED):
        state = after(state, event)
        way.append(life.STATE_NAMES[state])
    assert way == ["open", "draining", "lingering", "joining", "closed"]


def test_nothing_is_closed_gracefully_that_was_never_open() -> None:
    assert after(life.CONNECTING, life.CLOSE) == life.JOINING
    assert after(life.CONNECTING, life.DRAINED) == life.CONNECTING


def test_only_close_begins_draining_and_only_draining_lingers() -> None:
    assert {pair for pair, target in life.TRANSITIONS.items() if target == life.DRAINING} == {
        (life.OPEN, life.CLOSE)
    }
    assert {pair for pair, target in life.TRANSITIONS.items() if target == life.LINGERING} == {
        (life.DRAINING, life.DRAINED)
    }


def test_reasons_are_their_own_text() -> None:
    assert " ".join(CloseReason) == (
        "local eof reset aborted timeout idle silent deadline overflow tls error shutdown refused detached"
    )
    for reason in CloseReason:
        assert reason == reason.value == str(reason) == f"{reason}"
        assert CloseReason(str(reason)) is reason
        assert {reason: 1}[reason.value] == 1, "a reason and its text are one key"

"""Deadlines against a naive model, on a clock that the test turns."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from iocp_ctypes import _deadlines
from iocp_ctypes._deadlines import DEAD_MIN, Deadline, Deadlines


class DeadlinesMachine(RuleBasedStateMachine):
    """The heap against a list. DEAD_MIN is small here, so that rebuilding happens often."""

    DEAD = 3

    def __init__(self) -> None:
        super().__init__()
        self.usual, _deadlines.DEAD_MIN = _deadlines.DEAD_MIN, self.DEAD
        self.deadlines = Deadlines()
        self.now = 0.0
        self.model: list[tuple[float, int]] = []
        self.entries: list[Deadline] = []
        self.called: list[int] = []

    def teardown(self) -> None:
        _deadlines.DEAD_MIN = self.usual

    @rule(ahead=st.integers(-2, 12))
    def add(self, ahead: int) -> None:
        number = len(self.entries)
        entry = self.deadlines.add(self.now + ahead, lambda: self.called.append(number))
        assert entry.due == self.now + ahead
        self.entries.append(entry)
        self.model.append((self.now + ahead, number))

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        number = data.draw(st.integers(0, len(self.entries) - 1))
        self.deadlines.cancel(self.entries[number])  # living, cancelled before, or expired: all are allowed
        self.model = [pair for pair in self.model if pair[1] != number]

    @rule(count=st.integers(2, 12), due=st.integers(1, 30))
    def set_and_cancel_many(self, count: int, due: int) -> None:
        for entry in [self.deadlines.add(self.now + due, lambda: None) for _ in range(count)]:
            self.deadlines.cancel(entry)

    @rule(step=st.integers(0, 6))
    def expire(self, step: int) -> None:
        self.now += step
        due = sorted(pair for pair in self.model if pair[0] <= self.now)
        self.model = [pair for pair in self.model if pair[0] > self.now]
        self.called.clear()
        for action in self.deadlines.take_due(self.now):
            action()
        assert self.called == [number for _due, number in due], "by instant, then by age"

    @rule()
    def look(self) -> None:
        assert self.deadlines.next_due() == (min(self.model)[0] if self.model else None)

    @invariant()
    def counts_and_memory_are_bounded(self) -> None:
        living = len(self.model)
        assert len(self.deadlines) == living
        assert len(self.deadlines._heap) <= 2 * living + self.DEAD


TestDeadlinesMachine = DeadlinesMachine.TestCase
TestDeadlinesMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def nothing() -> None:
    """Do nothing."""


def test_nothing_is_due_of_nothing() -> None:
    deadlines = Deadlines()
    assert len(deadlines) == 0
    assert deadlines.next_due() is None
    assert deadlines.take_due(float("inf")) == []


def test_due_is_due_at_its_very_instant() -> None:
    deadlines = Deadlines()
    deadlines.add(5.0, nothing)
    assert deadlines.take_due(4.999) == []
    assert deadlines.take_due(5.0) == [nothing]
    assert deadlines.take_due(5.0) == []


def test_equal_instants_come_in_the_order_of_setting() -> None:
    deadlines = Deadlines()
    actions = [lambda number=number: number for number in range(50)]
    for action in actions:
        deadlines.add(1.0, action)
    assert deadlines.take_due(1.0) == actions


def test_cancelling_twice_or_too_late_is_harmless() -> None:
    deadlines = Deadlines()
    entry = deadlines.add(1.0, nothing)
    other = deadlines.add(2.0, nothing)
    assert deadlines.take_due(1.0) == [nothing]
    deadlines.cancel(entry)
    deadlines.cancel(entry)
    assert len(deadlines) == 1
    deadlines.cancel(other)
    deadlines.cancel(other)
    assert len(deadlines) == 0


def test_cancelling_lets_go_of_the_action_at_once() -> None:
    class Action:
        def __call__(self) -> None: ...

    action = Action()
    dead = weakref.ref(action)
    deadlines = Deadlines()
    entry = deadlines.add(1e9, action)
    del action
    assert dead() is not None
    deadlines.cancel(entry)
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("living", [0, 1, 100])
def test_dead_entries_are_bounded_when_timers_are_set_and_cancelled_for_ever(living: int) -> None:
    deadlines = Deadlines()
    for _ in range(living):
        deadlines.add(1e9, nothing)
    most = 0
    for turn in range(5000):
        deadlines.cancel(deadlines.add(1e6 + turn, nothing))
        most = max(most, len(deadlines._heap))
    assert most <= 2 * living + DEAD_MIN + 1
    assert len(deadlines) == living


def test_dead_entries_are_bounded_when_the_living_ones_expire_before_them() -> None:
    deadlines = Deadlines()
    for _ in range(1000):
        deadlines.add(1.0, nothing)
    for entry in [deadlines.add(1e9, nothing) for _ in range(1000)]:
        deadlines.cancel(entry)
    deadlines.add(0.5, nothing)
    assert len(deadlines.take_due(1.0)) == 1001
    assert len(deadlines) == 0
    assert len(deadlines._heap) <= DEAD_MIN

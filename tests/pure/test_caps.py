"""Caps that shrink at a shortage and come back."""

from __future__ import annotations

from iocp_ctypes._caps import STEP_FIRST, STEP_MAX, Recovery


def test_a_shortage_halves_what_was_in_use_and_one_is_left() -> None:
    assert Recovery().shrink("cap", 64, 63) == 31
    assert Recovery().shrink("cap", 64, 1000) == 32
    for cap, in_use in ((4, 0), (2, 1), (1, 1), (3, 3)):
        assert Recovery().shrink("cap", cap, in_use) == 1


def test_what_was_assigned_comes_back_in_doubled_steps() -> None:
    recovery = Recovery()
    cap = recovery.shrink("cap", 20, 2)
    cap = recovery.shrink("cap", cap, 0)
    assert recovery.assigned == {"cap": 20}
    steps = []
    while recovery.assigned:
        cap = recovery.step("cap", cap)
        steps.append(cap)
    assert steps == [2, 4, 8, 16, 20]
    assert recovery.step("cap", 7) == 7, "a cap that has not shrunk stays"


def test_a_cap_that_cannot_shrink_is_not_remembered() -> None:
    recovery = Recovery()
    assert recovery.shrink("cap", 1, 1) == 1
    assert recovery.assigned == {}


def test_steps_are_further_apart_after_each_shortage_between_them() -> None:
    recovery = Recovery()
    cap, delays = 8, []
    for _ in range(10):
        cap = recovery.shrink("cap", cap, cap)
        cap = recovery.shrink("cap", cap, cap)  # the back-off's own attempts do not count
        recovery.begin(100.0)
        recovery.begin(200.0)  # the first holds
        assert recovery.due == 100.0 + recovery.delay
        delays.append(recovery.delay)
        cap = recovery.step("cap", cap)
    assert delays[:7] == [STEP_FIRST * 2**number for number in range(7)]
    assert delays[7:] == [STEP_MAX] * 3


def test_assigning_ends_the_recovery_of_that_cap_alone() -> None:
    recovery = Recovery()
    recovery.shrink("one", 8, 8)
    recovery.shrink("two", 6, 6)
    recovery.forget("one")
    recovery.forget("never heard of")
    assert recovery.assigned == {"two": 6}

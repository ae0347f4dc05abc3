"""The watchdog: its thread, on a clock that the test turns. The heap itself is tested in test_deadlines."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from iocp_ctypes.watchdog import Watchdog

PATIENCE = 10
YEAR = 365 * 86400.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Turned:
    """A watchdog on such a clock; `turn` returns after it has looked at the new time."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.watchdog = Watchdog(self.clock)
        self.called: list[Any] = []
        self.watchdog.start()

    def turn(self, seconds: float) -> None:
        self.clock.now += seconds
        for _ in range(3):  # what an action of the first has set for now may be behind the second
            self.look()

    def look(self) -> None:
        looked = threading.Event()
        self.watchdog.at(float("-inf"), looked.set)  # sooner than whatever it sleeps for
        assert looked.wait(PATIENCE)

    def note(self, what: Any) -> Callable[[], None]:
        return lambda: self.called.append(what)


@pytest.fixture
def turned() -> Iterator[Turned]:
    made = Turned()
    yield made
    assert made.watchdog.stop(PATIENCE)


def test_an_action_is_called_at_its_instant_and_not_before(turned: Turned) -> None:
    turned.watchdog.at(1010.0, turned.note("ten"))
    turned.turn(9.999)
    assert turned.called == []
    turned.turn(0.001)
    assert turned.called == ["ten"]
    turned.turn(100)
    assert turned.called == ["ten"], "once"


def test_later_counts_from_now(turned: Turned) -> None:
    entry = turned.watchdog.later(5, turned.note("five"))
    assert entry.due == 1005.0
    turned.turn(5)
    assert turned.called == ["five"]


def test_what_is_due_is_called_in_the_order_of_the_instants(turned: Turned) -> None:
    for due in (1003.0, 1001.0, 1002.0, 1001.0):
        turned.watchdog.at(due, turned.note((due, len(turned.watchdog))))
    turned.turn(10)
    assert turned.called == [(1001.0, 1), (1001.0, 3), (1002.0, 2), (1003.0, 0)]


def test_actions_are_called_on_its_own_thread(turned: Turned) -> None:
    turned.watchdog.later(1, lambda: turned.called.append(threading.current_thread().name))
    turned.turn(1)
    assert turned.called == ["iocp_ctypes watchdog"]


def test_a_cancelled_action_is_not_called(turned: Turned) -> None:
    entry = turned.watchdog.later(1, turned.note("cancelled"))
    kept = turned.watchdog.later(1, turned.note("kept"))
    assert len(turned.watchdog) == 2
    turned.watchdog.cancel(entry)
    turned.watchdog.cancel(entry)
    assert len(turned.watchdog) == 1
    turned.turn(1)
    assert turned.called == ["kept"]
    turned.watchdog.cancel(kept)
    assert len(turned.watchdog) == 0


def test_an_action_may_set_and_cancel(turned: Turned) -> None:
    entry = turned.watchdog.later(2, turned.note("cancelled"))

    def first() -> None:
        turned.watchdog.cancel(entry)
        turned.watchdog.later(0, turned.note("second"))

    turned.watchdog.later(1, first)
    turned.turn(1)
    assert turned.called == ["second"]
    turned.turn(5)
    assert turned.called == ["second"]


def test_an_action_that_raises_is_logged_and_the_thread_lives(
    turned: Turned, expects_errors: list[logging.LogRecord]
) -> None:
    def bad() -> None:
        raise ZeroDivisionError

    turned.watchdog.later(1, bad)
    turned.watchdog.later(1, turned.note("after it"))
    turned.turn(1)
    assert turned.called == ["after it"]
    (record,) = expects_errors
    assert record.levelno == logging.CRITICAL
    assert record.exc_info
    assert record.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize("seconds", [60 * 86400.0, YEAR, 1e12, float("inf")])
def test_the_far_future_is_no_time_out_that_the_system_refuses(turned: Turned, seconds: float) -> None:
    # A lock of CPython on Windows waits for 49 days at the most.
    turned.watchdog.later(seconds, turned.note("never"))
    turned.look()
    turned.watchdog.later(1, turned.note("soon"))
    turned.turn(1)
    assert turned.called == ["soon"]


def test_it_is_woken_by_an_earlier_deadline_only(turned: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    rings: list[float] = []
    ring = turned.watchdog._ring
    turned.watchdog.later(100, turned.note("first"))
    turned.look()
    turned.look()  # after it nothing is due, and it sleeps until the first
    monkeypatch.setattr(turned.watchdog, "_ring", lambda: (rings.append(1), ring()))
    turned.watchdog.later(200, turned.note("later"))
    turned.watchdog.later(100, turned.note("at the same time"))
    assert rings == []
    turned.watchdog.later(50, turned.note("sooner"))
    assert rings == [1]


def test_a_deadline_in_the_past_is_due_at_once(turned: Turned) -> None:
    called = threading.Event()
    turned.watchdog.at(0.0, called.set)
    assert called.wait(PATIENCE)


def test_nobody_is_forgotten_when_many_threads_set_and_cancel(turned: Turned) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    called: list[tuple[int, int]] = []
    expected: list[tuple[int, int]] = []

    def work(number: int) -> None:
        chosen = random.Random(seed + number)
        for turn in range(300):
            name = number, turn
            entry = turned.watchdog.later(chosen.uniform(1, 50), lambda name=name: called.append(name))
            if chosen.random() < 0.5:
                turned.watchdog.cancel(entry)
            else:
                expected.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert called == []
    assert len(turned.watchdog) == len(expected)
    turned.turn(50)
    assert sorted(called) == sorted(expected)
    assert len(turned.watchdog) == 0


# -- the real clock, and the end ----------------------------------------------------------------------------


def test_on_the_real_clock_time_passes_by_itself() -> None:
    watchdog = Watchdog()
    assert watchdog.clock is time.monotonic
    watchdog.start()
    called = threading.Event()
    began = time.monotonic()
    watchdog.later(0.05, called.set)
    assert called.wait(PATIENCE)
    assert time.monotonic() - began >= 0.049  # the difference of two instants is rounded
    assert watchdog.stop(PATIENCE)


def test_stopping_does_not_wait_for_what_is_not_due() -> None:
    watchdog = Watchdog()
    watchdog.later(YEAR, lambda: None)
    watchdog.start()
    assert watchdog.stop(PATIENCE) is True
    assert watchdog.stop(PATIENCE) is True
    assert not watchdog._thread.is_alive()


def test_stopping_one_that_was_never_started() -> None:
    assert Watchdog().stop(PATIENCE) is True


def test_an_action_may_stop_it_without_waiting_for_itself() -> None:
    watchdog = Watchdog()
    said: list[bool] = []
    done = threading.Event()

    def stop() -> None:
        said.append(watchdog.stop(PATIENCE))
        done.set()

    watchdog.later(0, stop)
    watchdog.start()
    assert done.wait(PATIENCE)
    assert said == [False], "its thread was still running"
    assert watchdog.stop(PATIENCE) is True


def test_stopping_gives_up_at_its_time_out() -> None:
    watchdog = Watchdog()
    began, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        go_on.wait(PATIENCE)

    watchdog.later(0, slow)
    watchdog.start()
    assert began.wait(PATIENCE)
    assert watchdog.stop(0.01) is False
    go_on.set()
    assert watchdog.stop(PATIENCE) is True


def test_its_thread_keeps_the_interpreter_from_ending_under_it() -> None:
    assert Watchdog()._thread.daemon is False

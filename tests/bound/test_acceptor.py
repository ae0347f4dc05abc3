"""_acceptor.py: the pool of AcceptEx operations. First with fakes below, then with real sockets."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import (
    LOOPBACK,
    Echo,
    Recorder,
    echoes,
    ended,
    handle_count,
    made,
    raw,
    reachable,
    read_exactly,
    rst,
    serving,
    wait_until,
)

from iocp_ctypes import Usage, _acceptor, _sockops, _win32
from iocp_ctypes._acceptor import (
    BEGUN_ALONE,
    BEGUN_IN_ROW,
    FAILURES_IN_ROW,
    RETIRED_IN_ROW,
    RETRY_FIRST,
    RETRY_MAX,
    Acceptor,
)
from iocp_ctypes._caps import STEP_FIRST, STEP_MAX
from iocp_ctypes._proactor import PENDING
from iocp_ctypes._sockops import AcceptOperation, ListeningSocket, OverlappedSocket

NOBUFS = 10055
RESET, CANCELLED = 0xC000020D, 0xC0000120

# -- with fakes ---------------------------------------------------------------------------------------------


class Fault(Exception):
    """What nobody expects."""


class FakeSocket:
    """A socket that is being accepted."""

    def __init__(self) -> None:
        self.closed = 0
        self.silent_for = _win32.CONNECT_TIME_NOT_CONNECTED

    def close(self) -> None:
        self.closed += 1

    def connect_time(self) -> int:
        return self.silent_for


class FakeListening:
    """A listening socket; completes what the test says, when it says so."""

    def __init__(self) -> None:
        self.posted: list[AcceptOperation] = []
        self.attempts = 0
        self.failing = 0  # the code with which posting fails
        self.gone = False  # finish() raises
        self.at_accept: Callable[[], object] = lambda: None
        self.at_finish: Callable[[], object] = lambda: None
        self.closed = False

    def accept(self, handler: Any, data_size: int, home: Any) -> tuple[Any, int]:
        self.attempts += 1
        self.at_accept()
        if self.failing:
            return None, self.failing
        operation = AcceptOperation(FakeSocket(), data_size, home)  # type: ignore[arg-type]
        operation.handler = handler
        self.posted.append(operation)
        return operation, PENDING

    def finish(self, operation: AcceptOperation, transferred: int) -> tuple[Any, bytes]:
        self.at_finish()
        if self.gone:
            raise OSError(10057, "gone")
        return operation.socket, bytes(transferred)

    def give(self, operation: AcceptOperation) -> None:
        """Forget it."""

    def complete(self, status: int = 0, transferred: int = 0, operation: Any = None) -> FakeSocket:
        """Retire an operation, the oldest unless one is named."""
        operation = operation or self.posted[0]
        self.posted.remove(operation)
        operation.handler(operation, transferred, status)
        return operation.socket  # type: ignore[no-any-return]

    def cancel(self) -> None:
        """The packets come when the test retires them."""

    def reap(self, operation: AcceptOperation) -> None:
        operation.reaped = True

    def close(self) -> None:
        self.closed = True


class Bench:
    """An Acceptor with fakes around it; `due` are the back-offs that were asked for."""

    def __init__(self, cap: int = 4, sockets: int = 1, most: int = 1 << 30, data_size: int = 0) -> None:
        self.sockets = [FakeListening() for _ in range(sockets)]
        self.due: list[tuple[float, Callable[[], None]]] = []
        self.open = 0
        self.most = most
        self.accepted: list[bytes] = []
        self.calls: list[Callable[[], None]] = []
        self.patient = False  # calls wait for the test to make them, and all that comes is of one round
        self.came = 0
        self._rounds = itertools.count()
        self.pool = Acceptor(
            self.sockets,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]  # it is the watchdog, too
            self,  # type: ignore[arg-type]  # and the dispatcher
            cap,
            data_size,
            lambda: self.most - self.open,
            self.admit,
            lambda _sock, first: self.accepted.append(first),
        )
        self.pool.top_up()

    @property
    def round(self) -> int:
        return self.came if self.patient else next(self._rounds)

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.due.append((seconds, action))

    def admit(self) -> None:
        self.open += 1

    def leave(self) -> None:
        self.open -= 1
        self.pool.top_up()

    def back_off(self) -> float:
        """Let the time of the one back-off pass; return how long it was."""
        ((seconds, action),) = self.due
        self.due.clear()
        action()
        return seconds

    def recover(self) -> list[Usage]:
        """Let the time of recovering pass, step by step; return what the steps made of the pool."""
        levels = []
        while self.due:
            self.back_off()
            levels.append(self.pool.usage)
        return levels[:-1] if levels[-2:-1] == levels[-1:] else levels  # the last looks that all is well

    def take_turns(self) -> None:
        """Make the calls that wait, and those that they ask for; what one raises is the dispatcher's."""
        while self.calls:
            with contextlib.suppress(Fault):
                self.calls.pop(0)()

    @property
    def listening(self) -> FakeListening:
        return self.sockets[0]

    @property
    def levels(self) -> list[int]:
        return [len(sock.posted) for sock in self.sockets]


@pytest.mark.parametrize(
    ("cap", "sockets", "levels"), [(4, 1, [4]), (5, 2, [3, 2]), (1, 3, [1, 1, 1]), (9, 3, [3, 3, 3])]
)
def test_the_cap_is_shared_out_and_each_socket_has_one(cap: int, sockets: int, levels: list[int]) -> None:
    bench = Bench(cap, sockets)
    assert bench.levels == levels
    assert bench.pool.usage == Usage(cap, sum(levels))


def test_each_accept_is_replaced_before_it_is_handed_over() -> None:
    bench = Bench(cap=3)
    levels = []
    bench.pool._accepted = lambda _sock, _first: levels.append(bench.pool.usage.in_use)
    for _ in range(5):
        bench.listening.complete()
    assert levels == [3] * 5
    assert bench.pool.failed == 0


@pytest.mark.parametrize("alone", [False, True])
def test_after_a_few_in_a_row_the_others_have_their_turn(alone: bool) -> None:
    """More are retired in a turn than begin, and all begin in the order in which they came.

    Where the port has brought nothing since, nobody else waits, and more begin.
    """
    many = 7 * RETIRED_IN_ROW // 2
    bench = Bench(cap=many)
    bench.patient = True
    for size in range(many):
        bench.listening.complete(transferred=size)
    assert len(bench.accepted) == BEGUN_IN_ROW
    assert (bench.pool.usage.in_use, bench.open) == (many, RETIRED_IN_ROW)
    turns = []
    while bench.calls:
        assert len(bench.calls) == 1
        bench.came += not alone
        bench.calls.pop(0)()
        turns.append((len(bench.accepted), bench.open))
    step = BEGUN_ALONE if alone else BEGUN_IN_ROW
    begun = [len_ for len_, _taken in turns]
    taken_by_turn = [min(many, RETIRED_IN_ROW * (turn + 2)) for turn in range(len(turns))]
    assert [taken for _begun, taken in turns] == taken_by_turn
    assert begun[0] <= BEGUN_IN_ROW + step
    assert all(after - before <= step for before, after in itertools.pairwise(begun))
    assert [len(first) for first in bench.accepted] == [*range(many)]
    bench.came += 1
    bench.listening.complete()
    assert len(bench.accepted) == many + 1


def test_who_comes_alone_begins_at_once() -> None:
    bench = Bench(cap=3)
    bench.patient = True
    for number in range(1, 10):
        bench.came += 1
        bench.listening.complete()
        assert len(bench.accepted) == number
    assert bench.calls == []


def test_as_many_as_may_wait_are_taken_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_acceptor, "ARRIVED_MAX", 5)
    monkeypatch.setattr(_acceptor, "RETIRED_IN_ROW", 8)
    bench = Bench(cap=3)
    bench.patient = True
    levels = []
    for _ in range(8):
        bench.listening.complete()
        levels.append(bench.pool.usage.in_use)
    assert levels == [3, 3, 3, 3, 3, 2, 1, 0]
    while len(bench.pool._arrived) >= 5:
        assert bench.pool.usage.in_use == 0
        bench.calls.pop(0)()
    assert bench.pool.usage == Usage(3, 3)
    while bench.calls:
        bench.calls.pop(0)()
    assert bench.pool.usage == Usage(3, 3)
    assert len(bench.accepted) == 8


def test_none_of_several_sockets_stays_deaf_when_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has one AcceptEx, which may be more than the cap says."""
    monkeypatch.setattr(_acceptor, "ARRIVED_MAX", 1)
    bench = Bench(cap=1, sockets=2)
    bench.patient = True
    bench.listening.complete()
    bench.listening.complete()
    assert bench.levels == [0, 1]
    while bench.calls:
        bench.calls.pop(0)()
    assert bench.levels == [1, 1]
    assert len(bench.accepted) == 2


def test_what_arrives_after_its_turn_was_taken_begins_all_the_same() -> None:
    """Another thread may take the turn that was asked for, and find nothing, before an accept is finished."""
    bench = Bench(cap=4)
    bench.patient = True
    others = [bench.listening.complete]

    def other_threads() -> None:
        while bench.calls:
            bench.calls.pop(0)()
        if others:
            others.pop()()

    bench.listening.at_finish = other_threads
    bench.listening.complete()
    assert len(bench.accepted) == 1
    while bench.calls:
        bench.calls.pop(0)()
    assert len(bench.accepted) == 2


@pytest.mark.parametrize("status", [0, RESET])
def test_all_that_a_turn_takes_is_replaced_before_a_callback_runs(status: int) -> None:
    """A callback may take its time: only its own connection waits for it."""
    bench = Bench(cap=3 * RETIRED_IN_ROW)
    bench.patient = True
    for _ in range(RETIRED_IN_ROW):
        bench.listening.complete(status)
    for _ in range(RETIRED_IN_ROW):
        bench.listening.complete()
    seen = []
    bench.pool._accepted = lambda _sock, _first: seen.append(
        (bench.open, bench.pool.usage.in_use, len(bench.calls))
    )
    expected = RETIRED_IN_ROW * (1 if status else 2)
    bench.came += 1  # else nobody waits for a turn, and more begin
    bench.calls.pop(0)()
    assert seen == [(expected, 3 * RETIRED_IN_ROW, 1)]


def test_what_waits_when_the_pool_closes_is_discarded() -> None:
    many = 2 * RETIRED_IN_ROW
    bench = Bench(cap=many)
    bench.patient = True
    socks = [bench.listening.complete() for _ in range(many)]
    bench.pool.close()
    while bench.listening.posted:
        bench.listening.complete(CANCELLED)
    while bench.calls:
        bench.calls.pop(0)()
    assert bench.pool.usage.in_use == 0
    assert sum(sock.closed for sock in socks) == many - RETIRED_IN_ROW  # the others are the server's
    assert len(bench.accepted) == RETIRED_IN_ROW


@pytest.mark.parametrize("status", [RESET, 0xC0000140, 0xC000013B, 0xC0000241, 0xC00000B5, 0xC0000001])
def test_a_failed_accept_is_replaced_and_counted(status: int) -> None:
    bench = Bench(cap=2)
    sock = bench.listening.complete(status)
    assert sock.closed == 1
    assert bench.pool.usage == Usage(2, 2)
    assert (bench.pool.failed, bench.open, bench.accepted) == (1, 0, [])


def test_a_peer_gone_before_the_context_update_is_discarded() -> None:
    bench = Bench(cap=2)
    bench.listening.gone = True
    sock = bench.listening.complete()
    assert sock.closed == 1
    assert bench.pool.usage == Usage(2, 2)
    assert (bench.pool.failed, bench.open, bench.accepted) == (1, 0, [])


def raises(exc: BaseException) -> Any:
    raise exc


@pytest.mark.parametrize("kind", [MemoryError, Fault])
@pytest.mark.parametrize("patient", [False, True], ids=["at once", "in a turn"])
def test_what_cannot_be_finished_is_discarded_whatever_it_raised(
    kind: type[Exception], patient: bool, expects_errors: list[logging.LogRecord]
) -> None:
    bench = Bench(cap=30)
    bench.patient = patient
    bench.listening.at_finish = lambda: raises(kind())
    socks = [bench.listening.complete() for _ in range(20)]
    bench.take_turns()
    assert [sock.closed for sock in socks] == [1] * 20
    assert bench.pool.usage == Usage(30, 30)
    assert (bench.pool.failed, bench.open, bench.accepted) == (20, 0, [])
    assert len(expects_errors) == 20
    assert all(record.exc_info and record.exc_info[0] is kind for record in expects_errors)
    bench.listening.at_finish = lambda: None
    for _ in range(20):
        bench.listening.complete()
    bench.take_turns()
    assert len(bench.accepted) == 20
    assert bench.pool.usage == Usage(30, 30)


@pytest.mark.parametrize("kind", [MemoryError, Fault])
def test_what_posting_raises_costs_no_connection_and_is_tried_again(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(cap=2)
    bench.listening.at_accept = lambda: raises(kind())
    bench.listening.complete()
    bench.listening.complete()
    assert len(bench.accepted) == 2
    assert bench.pool.usage.in_use == 0
    bench.take_turns()
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.exc_info
    assert record.exc_info[0] is kind
    bench.listening.at_accept = lambda: None
    bench.back_off()
    bench.recover()
    assert bench.pool.usage == Usage(2, 2)


class Rude(logging.Handler):
    """A user's handler that raises."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Fault(record.getMessage())


@pytest.fixture
def rude_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that is logged raises."""
    log, rude = logging.getLogger("iocp_ctypes"), Rude()
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(rude)
    yield
    log.removeHandler(rude)
    log.setLevel(level)


def test_a_log_handler_that_raises_does_not_end_accepting(rude_log: None) -> None:
    bench = Bench(cap=30)
    bench.patient = True
    bench.listening.gone = True
    socks = []
    for _ in range(30):
        first = bench.listening.posted[0]
        socks.append(first.socket)
        with contextlib.suppress(Fault):
            bench.listening.complete()
    bench.take_turns()
    while bench.due:
        bench.back_off()
    assert [sock.closed for sock in socks] == [1] * 30  # type: ignore[attr-defined]
    assert bench.pool.usage == Usage(30, 30)
    bench.listening.gone = False
    for _ in range(30):
        bench.listening.complete()
    bench.take_turns()
    assert len(bench.accepted) == 30
    assert bench.pool.usage == Usage(30, 30)


def test_a_log_handler_that_raises_costs_no_connection_where_posting_fails(rude_log: None) -> None:
    bench = Bench(cap=2)
    bench.listening.failing = 10022
    bench.listening.complete()
    assert len(bench.accepted) == 1
    bench.take_turns()
    bench.listening.failing = 0
    bench.back_off()
    assert bench.pool.usage == Usage(2, 2)


def test_a_pool_that_something_raised_in_is_filled_up_later() -> None:
    """Whatever it was, and even when nothing else comes."""
    bench = Bench(cap=1)
    bench.listening.give = lambda _operation: raises(MemoryError())  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        bench.listening.complete()
    assert bench.pool.usage.in_use == 0
    bench.back_off()
    assert bench.pool.usage == Usage(1, 1)
    assert bench.due == []


UNKNOWN = 0xC0000001


def test_failing_in_a_row_backs_off_and_success_ends_that() -> None:
    """Where it is not the peers: a listening socket that is broken fails at once, for ever."""
    cap = 4
    bench = Bench(cap)
    for _ in range(FAILURES_IN_ROW * cap):
        bench.listening.complete(UNKNOWN)
    assert bench.due == []
    assert bench.pool.usage.in_use == cap
    for left in reversed(range(cap)):
        bench.listening.complete(UNKNOWN)
        assert bench.pool.usage.in_use == left
    assert bench.back_off() == RETRY_FIRST
    assert bench.pool.usage.in_use == cap
    bench.listening.complete()
    bench.listening.complete(UNKNOWN)
    assert bench.due == []
    assert bench.pool.usage.in_use == cap


@pytest.mark.parametrize("status", [RESET, 0xC0000140, 0xC000013B, 0xC00000B5, 0xC000023D])
def test_any_number_of_peers_that_are_gone_does_not_delay_accepting(status: int) -> None:
    """Each took a place in the kernel's queue: a back-off would leave those behind it waiting."""
    bench = Bench(cap=4)
    for _ in range(100):
        bench.listening.complete(status)
        bench.listening.gone = True
        bench.listening.complete()
        bench.listening.gone = False
    assert bench.due == []
    assert bench.pool.usage == Usage(4, 4)
    assert bench.pool.failed == 200


def test_no_resources_backs_off_longer_each_time_and_the_pool_recovers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "iocp_ctypes")
    bench = Bench(cap=8)
    bench.listening.failing = NOBUFS
    for _ in range(8):
        bench.listening.complete()
    assert bench.pool.usage == Usage(1, 0)
    waits = [bench.back_off() for _ in range(10)]
    assert waits == [min(RETRY_MAX, RETRY_FIRST * 2**number) for number in range(10)]
    # Few for the connections that came, for the cap had shrunk; one for each back-off, eight in a second.
    assert bench.listening.attempts == 8 + 3 + 10
    assert sum(waits[:8]) > 1
    bench.listening.failing = 0
    bench.back_off()
    assert bench.pool.usage == Usage(1, 1)
    assert bench.recover() == [Usage(2, 2), Usage(4, 4), Usage(8, 8)]
    assert bench.pool.unreplaced == 13
    bench.take_turns()
    assert "10055" in caplog.text


def test_the_cap_shrinks_with_what_is_in_use_and_comes_back_in_steps() -> None:
    bench = Bench(cap=64)
    bench.listening.failing = NOBUFS
    bench.listening.complete()
    assert bench.pool.usage == Usage(31, 63)
    for _ in range(32):  # the surplus drains, and nothing is asked for
        bench.listening.complete()
    assert bench.pool.usage == Usage(31, 31)
    assert bench.listening.attempts == 64 + 1
    bench.listening.failing = 0
    assert bench.back_off() == RETRY_FIRST
    assert bench.recover() == [Usage(62, 62), Usage(64, 64)]
    bench.listening.complete()
    assert bench.pool.usage == Usage(64, 64)


def test_a_shortage_told_by_a_packet_shrinks_the_cap_too() -> None:
    bench = Bench(cap=8)
    bench.listening.complete(0xC000009A)
    assert bench.pool.usage == Usage(3, 7)
    bench.back_off()
    assert bench.recover() == [Usage(6, 7), Usage(8, 8)]


def test_a_shortage_that_stays_is_asked_for_more_and_more_seldom() -> None:
    """The system has room for two: each step above that fails, and the next one comes later."""
    bench = Bench(cap=64)
    while bench.pool.usage.in_use > 2:
        bench.listening.failing = NOBUFS
        bench.listening.complete()
    distances = []
    for _ in range(9):
        bench.listening.failing = 0
        assert bench.back_off() <= RETRY_MAX
        before = bench.listening.attempts
        bench.listening.failing = NOBUFS
        while bench.listening.attempts == before:
            distance = bench.back_off()
        distances.append(distance)
    assert distances == [min(STEP_MAX, STEP_FIRST * 2**number) for number in range(9)]
    bench.listening.failing = 0
    bench.back_off()
    assert bench.recover()[-1] == Usage(64, 64)


def test_a_cap_that_is_assigned_during_a_shortage_holds() -> None:
    bench = Bench(cap=8)
    bench.listening.failing = NOBUFS
    bench.listening.complete()
    assert bench.pool.usage == Usage(3, 7)
    bench.listening.failing = 0
    bench.pool.set_cap(10)
    assert bench.pool.usage == Usage(10, 10)
    while bench.due:
        bench.due.pop(0)[1]()
    assert bench.pool.usage == Usage(10, 10)


def test_closing_ends_a_recovery() -> None:
    bench = Bench(cap=8)
    bench.listening.failing = NOBUFS
    bench.listening.complete()
    bench.listening.failing = 0
    bench.back_off()
    bench.pool.close()
    assert bench.recover() == [Usage(3, 7)]
    assert bench.due == []


@pytest.mark.parametrize("code", [10055, 10024, 10035, 10038, 10022, 1450, 8])
def test_whatever_posting_fails_with_it_is_tried_again(code: int) -> None:
    bench = Bench(cap=2)
    bench.listening.failing = code
    bench.listening.complete()
    bench.listening.complete()
    assert bench.pool.usage.in_use == 0
    assert len(bench.due) == 1
    bench.listening.failing = 0
    bench.back_off()
    bench.recover()
    assert bench.pool.usage == Usage(2, 2)


def test_a_socket_that_fails_does_not_keep_the_others_from_recovering() -> None:
    bench = Bench(cap=4, sockets=2)
    bench.sockets[0].failing = 10022
    bench.sockets[0].complete()
    for _ in range(3):
        bench.sockets[1].complete()
    for _ in range(3):
        bench.back_off()
    assert bench.levels == [1, 2]


def test_the_back_off_begins_anew_after_a_recovery() -> None:
    bench = Bench(cap=2)
    for _ in range(2):
        bench.listening.failing = NOBUFS
        bench.listening.complete()
        assert bench.back_off() == RETRY_FIRST
        bench.listening.failing = 0
        bench.back_off()
        bench.recover()
        bench.listening.complete()


def test_a_raised_cap_is_posted_at_once_and_a_lowered_one_drains() -> None:
    bench = Bench(cap=4)
    bench.pool.set_cap(7)
    assert bench.pool.usage == Usage(7, 7)
    bench.pool.set_cap(2)
    for level in (6, 5, 4, 3, 2, 2, 2):
        bench.listening.complete()
        assert bench.pool.usage == Usage(2, level)


def test_pausing_posts_no_more_and_resuming_fills_up() -> None:
    bench = Bench(cap=3)
    bench.pool.pause()
    bench.listening.complete(CANCELLED)
    bench.listening.complete()  # the kernel had accepted it already
    assert bench.pool.usage.in_use == 1
    assert (bench.open, bench.pool.failed) == (1, 0)
    bench.pool.set_cap(5)
    assert bench.pool.usage == Usage(5, 1)
    bench.pool.resume()
    assert bench.pool.usage == Usage(5, 5)


def test_resuming_before_the_cancelled_packets_came() -> None:
    bench = Bench(cap=3)
    bench.pool.pause()
    bench.pool.resume()
    for _ in range(3):
        bench.listening.complete(CANCELLED)
    assert bench.pool.usage == Usage(3, 3)
    assert bench.pool.failed == 0


def test_what_is_cancelled_unasked_is_a_failure_and_backs_off() -> None:
    """Nobody paused: whatever cancels, it may do so for ever."""
    cap = 4
    bench = Bench(cap)
    for _ in range(FAILURES_IN_ROW * cap):
        bench.listening.complete(CANCELLED)
    assert (bench.pool.failed, bench.due) == (FAILURES_IN_ROW * cap, [])
    assert bench.pool.usage.in_use == cap
    bench.listening.complete(CANCELLED)
    assert bench.pool.usage.in_use == cap - 1
    assert bench.back_off() == RETRY_FIRST
    assert bench.pool.usage.in_use == cap


def test_only_what_was_posted_when_accepting_paused_was_cancelled_by_that() -> None:
    bench = Bench(cap=3)
    asked = list(bench.listening.posted)
    bench.pool.pause()
    for operation in asked[:2]:
        bench.listening.complete(CANCELLED, operation=operation)
    bench.pool.resume()
    for operation in list(bench.listening.posted):
        bench.listening.complete(CANCELLED, operation=operation)
    assert bench.pool.failed == 2, "those that were posted after it"
    assert bench.pool.usage == Usage(3, 3)


def test_closing_posts_no_more_and_closes_the_sockets_of_what_was_posted() -> None:
    bench = Bench(cap=3)
    bench.pool.close()
    bench.pool.close()
    assert bench.listening.closed
    sockets = [
        bench.listening.complete(CANCELLED),
        bench.listening.complete(),
        bench.listening.complete(RESET),
    ]
    bench.pool.top_up()
    bench.pool.set_cap(9)
    bench.pool.resume()
    assert [sock.closed for sock in sockets] == [1, 1, 1]
    assert (bench.pool.usage.in_use, bench.open, bench.due, bench.pool.failed) == (0, 0, [], 0)


def test_at_the_cap_of_connections_posting_pauses_and_goes_on_below_it() -> None:
    bench = Bench(cap=4, most=6)
    for _ in range(6):
        bench.listening.complete()
    assert (bench.open, bench.pool.usage.in_use) == (6, 0)
    bench.leave()
    bench.leave()
    assert bench.pool.usage.in_use == 2


def test_a_connection_counts_before_its_operation_stops_counting() -> None:
    """Another thread may fill the pool at any moment: at no moment may there seem to be more room."""
    bench = Bench(cap=4, most=4)
    bench.listening.at_finish = bench.pool.top_up
    for _ in range(4):
        bench.listening.complete()
    assert bench.listening.attempts == 4
    assert (bench.open, bench.pool.usage.in_use) == (4, 0)


def test_silent_peers_are_reaped_inside_acceptex_and_only_they() -> None:
    bench = Bench(cap=4, data_size=16)
    first, second, third, fourth = list(bench.listening.posted)
    first.socket.silent_for = 5  # type: ignore[attr-defined]
    second.socket.silent_for = 4  # type: ignore[attr-defined]
    third.socket.silent_for = 7  # type: ignore[attr-defined]
    bench.pool.reap_silent(5)
    assert [operation.reaped for operation in (first, second, third, fourth)] == [True, False, True, False]
    assert bench.pool.usage.in_use == 4
    bench.listening.complete(CANCELLED, operation=first)
    bench.listening.complete(0, 3, operation=third)  # its first bytes came at that very moment
    assert bench.accepted == [bytes(3)]
    assert (bench.pool.reaped, bench.pool.failed, bench.pool.usage.in_use) == (1, 0, 4)


# -- with sockets -------------------------------------------------------------------------------------------


def level(server: Any) -> bool:
    """Whether the pool is full."""
    usage = server.backlog
    return bool(usage.in_use == usage.cap)


def storm(address: Any, count: int) -> None:
    for _ in range(count):
        rst(raw(address))


def settled(server: Any, clients: int) -> None:
    """Wait until `clients` came and went."""
    wait_until(
        lambda: (
            server.stats().accepted + server.stats().accept_failed >= clients
            and not server.stats().connections
        ),
        what=f"{clients} clients that came and went",
    )


@pytest.mark.parametrize("accept_data", [0, 64])
def test_peers_that_reset_do_not_end_accepting(
    io_threads: int, accept_data: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "iocp_ctypes")
    with serving(Echo, io_threads=io_threads, accept_data=accept_data, backlog=8) as server:
        storm(server.address, 60)
        settled(server, 60)
        wait_until(lambda: level(server), what="the full pool")
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
        stats = server.stats()
        assert stats.accepted == len(Echo.made) == sum(stats.closed.values())
    assert caplog.text == ""
    for connection in Echo.made:
        connection.check()


@pytest.mark.wine_differs("reset-in-queue")
def test_peers_that_reset_while_they_queue_do_not_end_accepting() -> None:
    """They are gone before an AcceptEx is there for them: its completion, or the update after it, fails."""
    with serving(Echo, backlog=4) as server:
        server.pause_accepting()
        wait_until(lambda: server.backlog.in_use == 0)
        storm(server.address, 40)
        server.resume_accepting()
        reachable(server.address)
        settled(server, 1)
        wait_until(lambda: level(server), what="the full pool")
        reachable(server.address)
        wait_until(lambda: server.stats().accepted == len(Echo.made))


class Spy:
    """Native calls as they were made, on whatever thread: (name, arguments, result)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], Any]] = []
        self._patch = patch

    def on(self, name: str) -> None:
        real = getattr(_win32, name)

        def spied(*args: Any) -> Any:
            result = real(*args)
            self.calls.append((name, args, result))
            return result

        self._patch.setattr(_win32, name, spied)

    def named(self, *names: str) -> list[tuple[str, tuple[Any, ...], Any]]:
        return [call for call in self.calls if call[0] in names]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


@pytest.mark.wine_differs("accept-context")
@pytest.mark.parametrize("inherited", [True, False, None], ids=["inherited", "not inherited", "not known"])
def test_an_accepted_socket_is_set_up_in_the_documented_order(spy: Spy, inherited: bool | None) -> None:
    spy._patch.setattr(OverlappedSocket, "_ask_nodelay", lambda _sock: inherited)
    for name in ("WSASocketW", "setsockopt", "WSAIoctl", "CreateIoCompletionPort"):
        spy.on(name)
    with serving(Echo, backlog=1, nodelay=True, keepalive=7) as server:
        listener = server._sockets[0].fileno()
        spy.calls.clear()
        with raw(server.address) as client:
            echoes(client)
            (connection,) = made(Echo)
            handle = connection._socket._handle
            about = [call for call in spy.calls if call[1][0] == handle]
            update = about[0][1]
            assert update[1:3] == (0xFFFF, 0x700B)
            assert update[3]._obj.value == listener
    assert update[4] == ctypes.sizeof(ctypes.c_void_p) == (8 if sys.maxsize > 1 << 32 else 4)
    assert all(result in (0, 1) or name == "CreateIoCompletionPort" for name, _args, result in about)
    options = ["WSAIoctl"] if inherited else ["setsockopt", "WSAIoctl"]
    assert [call[0] for call in about] == ["setsockopt", *options, "CreateIoCompletionPort"]
    if not inherited:
        assert about[1][1][1:3] == (6, 1)
    assert about[-2][1][1] == 0x98000004


@pytest.mark.windows_only("accept-context")
def test_without_the_context_update_the_socket_is_not_connected(spy: Spy) -> None:
    spy.on("setsockopt")
    before: list[OSError] = []
    finish = ListeningSocket.finish

    def finishing(self: ListeningSocket, operation: AcceptOperation, transferred: int) -> Any:
        name, length = ctypes.create_string_buffer(128), ctypes.c_int(128)
        if _win32.getpeername(operation.socket._handle, name, ctypes.byref(length)):
            before.append(ctypes.WinError(ctypes.get_last_error()))
        return finish(self, operation, transferred)

    spy._patch.setattr(ListeningSocket, "finish", finishing)
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        connection.close()
        assert ended(client) == "eof"
    assert [exc.winerror for exc in before] == [10057]


def test_the_kernel_is_asked_for_sockets_that_children_do_not_inherit(spy: Spy) -> None:
    spy.on("WSASocketW")
    with serving(Echo, backlog=3) as server:
        reachable(server.address)
    flags = {args[5] for _name, args, _result in spy.named("WSASocketW")}
    assert flags == {_win32.WSA_FLAG_OVERLAPPED | _win32.WSA_FLAG_NO_HANDLE_INHERIT} == {0x81}
    assert len(spy.calls) >= 4


def test_nodelay_is_what_the_server_says_whatever_the_listener_has() -> None:
    class Asking(Echo):
        def connected(self) -> None:
            self.nodelay_read = self._socket._ask_nodelay()

    for listener_has, on in ((True, False), (False, True), (True, True), (False, False)):
        given = socket.create_server(("127.0.0.1", 0))
        given.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, listener_has)
        with serving(Asking, given, nodelay=on) as server:
            for _ in range(3):
                reachable(server.address)
        assert [Asking.made.pop().nodelay_read for _ in range(3)] == [on] * 3


def test_options_are_set_after_the_accept() -> None:
    class Asking(Echo):
        def connected(self) -> None:
            value, length = ctypes.c_int(0), ctypes.c_int(4)
            failed = _win32.getsockopt(self._socket._handle, 6, 1, ctypes.byref(value), ctypes.byref(length))
            self.nodelay_read = None if failed else bool(value.value)

    for on in (True, False):
        with serving(Asking, nodelay=on, keepalive=(30, 5)) as server:
            reachable(server.address)
        assert Asking.made.pop().nodelay_read is on


def test_acceptex_always_says_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a peer waits already: so how often it completes at once says nothing about the rush."""
    results: list[tuple[int, int]] = []
    ask = _sockops._extension

    def extension(handle: int, family: int, name: str) -> Any:
        real = ask(handle, family, name)

        def spied(*args: Any) -> int:
            done = real(*args)
            results.append((int(done), ctypes.get_last_error()))
            return int(done)

        return spied if name == "AcceptEx" else real

    monkeypatch.setattr(_sockops, "_extension", extension)
    with serving(Echo, backlog=2) as server:
        server.pause_accepting()
        wait_until(lambda: server.backlog.in_use == 0)
        with raw(server.address) as first, raw(server.address) as second:
            server.resume_accepting()
            echoes(first)
            echoes(second)
    assert len(results) >= 4
    assert set(results) == {(0, 997)}


@pytest.mark.parametrize("failures", [0, 5])
def test_the_pool_recovers_from_sockets_that_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    make = _win32.WSASocketW
    left = [0]

    def failing(*args: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            ctypes.set_last_error(NOBUFS)
            return _win32.INVALID_SOCKET
        return make(*args)

    monkeypatch.setattr(_win32, "WSASocketW", failing)
    with serving(Echo, backlog=20) as server:
        assert server.backlog == (20, 20)
        left[0] = 20
        clients = [raw(server.address) for _ in range(20)]
        wait_until(lambda: server.stats().accept_unreplaced)
        for client in clients:
            echoes(client)
            client.close()
        left[0] = min(left[0], failures)
        wait_until(lambda: server.backlog == (20, 20), timeout=30, what="the full pool")
        reachable(server.address)
        stats = server.stats()
        assert stats.accept_unreplaced >= 1
        assert stats.accepted == 21


def test_attempts_are_bounded_while_the_system_is_short_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = ListeningSocket.accept
    attempts: list[float] = []
    short = threading.Event()

    def failing(self: ListeningSocket, *args: Any) -> Any:
        if short.is_set():
            attempts.append(time.monotonic())
            return None, NOBUFS
        return accept(self, *args)

    monkeypatch.setattr(ListeningSocket, "accept", failing)
    with serving(Echo, backlog=8) as server:
        short.set()
        clients = [raw(server.address) for _ in range(8)]
        wait_until(lambda: attempts and time.monotonic() - attempts[0] >= 1)
        in_a_second = sum(at - attempts[0] <= 1 for at in attempts)
        short.clear()
        assert in_a_second < 50
        for client in clients:
            echoes(client)
            client.close()
        wait_until(lambda: server.backlog == (8, 8), what="the full pool")
        reachable(server.address)


def test_silent_peers_inside_acceptex_do_not_shut_out_who_talks() -> None:
    with serving(Echo, backlog=4, accept_data=64, silent_timeout=1) as server:
        silent = [raw(server.address) for _ in range(8)]

        def served() -> bool:
            with raw(server.address) as talker, contextlib.suppress(OSError, AssertionError):
                echoes(talker, b"now")
                return True
            return False

        wait_until(served, timeout=30)  # on a busy machine it may be taken for silent
        for client in silent:
            assert ended(client) in ("eof", "reset")
            client.close()
        wait_until(lambda: level(server), what="the full pool")
        stats = server.stats()
        assert stats.reaped >= 4
        assert stats.accepted == len(Echo.made) == 1 + stats.closed.get("silent", 0)
        assert stats.accept_failed == 0


def test_first_bytes_that_come_with_the_accept_are_delivered_once() -> None:
    with serving(Echo, accept_data=4) as server:
        for size in (1, 4, 5, 5000):
            reachable(server.address, bytes(range(256)) * 20 if size == 5000 else b"x" * size)
        wait_until(lambda: not server.stats().connections)
        assert [len(connection.received) for connection in Echo.made] == [1, 4, 5, 5120]
        assert server.stats().bytes_received == 1 + 4 + 5 + 5120
    assert all(connection.names[:2] == ["connect", "data"] for connection in Echo.made)


def test_first_bytes_may_come_at_the_moment_of_reaping(io_threads: int) -> None:
    """Each client is either served or sees its connection end; no socket is used by two."""
    count = 60
    with serving(Echo, backlog=count, accept_data=16, silent_timeout=1, io_threads=io_threads) as server:
        began = time.monotonic()
        clients = [raw(server.address) for _ in range(count)]
        outcomes: Counter[str] = Counter()
        for number, client in enumerate(clients):
            # SO_CONNECT_TIME counts whole seconds: the looks that reap find it anywhere in one to two.
            instant = began + 1 + number / count
            wait_until(lambda instant=instant: time.monotonic() >= instant)
            token = b"token %05d" % number
            try:
                client.sendall(token)
                back = read_exactly(client, len(token))
            except OSError:
                back = b""
            assert back in (token, b"")
            outcomes["served" if back else "reaped"] += 1
            client.close()
        wait_until(lambda: level(server) and not server.stats().connections, what="the full pool")
        stats = server.stats()
        assert stats.accepted == len(Echo.made)
        assert stats.accepted - stats.closed.get("silent", 0) == outcomes["served"]
        wait_until(lambda: server.stats().reaped + server.stats().accept_failed >= outcomes["reaped"])
        reachable(server.address)


def test_peers_that_are_silent_after_the_accept_are_reaped() -> None:
    with serving(Echo) as server, raw(server.address) as talker:
        echoes(talker)
        server.silent_timeout = 1
        began = time.monotonic()
        with raw(server.address) as silent:
            assert ended(silent) == "eof"
            assert time.monotonic() - began >= 0.95
            lost = made(Echo, 2)[1]
            assert lost.until("close").value.errno is not None
            assert lost.close_reason == "silent"
            echoes(talker)
        wait_until(lambda: server.stats().reaped == 1)
        assert server.stats().closed["silent"] == 1


@pytest.mark.wine_differs("full-queue")
def test_three_hundred_clients_at_once_and_a_pool_of_64() -> None:
    with serving(Echo, backlog=64, listen_backlog=400) as server:
        clients = [socket.socket() for _ in range(300)]
        try:
            for client in clients:
                client.setblocking(False)
                client.connect_ex(server.address)
            waiting = set(clients)
            deadline = time.monotonic() + 20
            while waiting and time.monotonic() < deadline:
                _, ready, failed = select.select([], list(waiting), list(waiting), 1)
                assert not failed
                waiting -= set(ready)
            assert not waiting
            for number, client in enumerate(clients):
                client.settimeout(10)
                echoes(client, b"%d" % number)
        finally:
            for client in clients:
                client.close()
        wait_until(lambda: not server.stats().connections)
        stats = server.stats()
        assert (stats.accepted, stats.accept_failed, stats.connections_peak) == (300, 0, 300)
        wait_until(lambda: level(server), what="the full pool")


def test_the_listening_queue_has_the_length_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = socket.socket.listen

    def listening(self: socket.socket, *args: int) -> None:
        asked.extend(args)
        real(self, *args)

    monkeypatch.setattr(socket.socket, "listen", listening, raising=False)
    for options in ({}, {"backlog": 5}, {"backlog": 500}, {"listen_backlog": 7}):
        with serving(Echo, **options) as server:
            reachable(server.address)
    assert asked == [200, 200, 500, 7]


def test_accepting_for_a_while_costs_no_handles(flat_handles: None) -> None:
    for number in range(50):
        with serving(Echo, backlog=8, accept_data=16 * (number % 2)) as server:
            if number % 5 == 0:
                reachable(server.address)


def test_stopping_closes_the_sockets_that_were_made_in_advance() -> None:
    with serving(Echo, backlog=1) as one:
        reachable(one.address)
        wait_until(lambda: not one.stats().connections)
        few = handle_count()
        one.backlog = 200
        many = handle_count()
        assert many - few > 190
    wait_until(lambda: handle_count() <= few, what="the handles")


def test_an_ipv6_listener_serves_both_families_and_shows_ipv4_as_such() -> None:
    with serving(Echo, ("::", 0), dualstack=True) as server:
        port = server.address[1]
        with raw(("127.0.0.1", port)) as four, raw(("::1", port)) as six:
            echoes(four)
            echoes(six)
            mapped, native = sorted(made(Echo, 2), key=lambda connection: len(connection.peer_address))
            assert mapped.peer_address == four.getsockname()
            assert mapped.local_address == ("127.0.0.1", port)
            assert native.peer_address == six.getsockname()
            assert native.local_address == ("::1", port, 0, 0)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Something callbacks can wait for; opened in any case."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("options", [{"work_threads": 2}, {"io_threads": 1}, {"io_threads": 4}], ids=str)
def test_callbacks_that_take_their_time_do_not_hold_up_accepting(
    gate: threading.Event, options: dict[str, int]
) -> None:
    class Slow(Recorder):
        def got(self, data: bytes) -> None:
            if data == b"block":
                gate.wait(30)
            self.send(data)

    blocking = 2 * (options.get("work_threads", 0) + options.get("io_threads", 0))
    with serving(Slow, backlog=16, **options) as server:
        blockers = [raw(server.address) for _ in range(blocking)]
        for client in blockers:
            client.sendall(b"block")
        wait_until(lambda: sum(c.received == b"block" for c in list(Slow.made)) >= min(2, blocking))
        clients = [raw(server.address) for _ in range(200)]
        wait_until(lambda: server.stats().accepted == blocking + 200, what="200 connections accepted")
        assert not gate.is_set()
        assert server.stats().connections == blocking + 200
        gate.set()
        for client in blockers:
            assert read_exactly(client, 5) == b"block"
        for client in (*blockers, *clients):
            client.close()
        wait_until(lambda: not server.stats().connections)


def test_no_more_connections_than_allowed(io_threads: int) -> None:
    with serving(Echo, max_connections=10, io_threads=io_threads) as server:
        clients = [raw(server.address) for _ in range(15)]
        for client in clients:
            client.sendall(b"x")
        wait_until(lambda: server.stats().connections == 10)
        wait_until(lambda: server.backlog.in_use == 0)
        served = {c.peer_address for c in made(Echo, 10)}
        outside = [client for client in clients if client.getsockname() not in served]
        assert len(outside) == 5
        inside = next(client for client in clients if client.getsockname() in served)
        inside.close()
        wait_until(lambda: server.stats().accepted == 11, what="the eleventh")
        wait_until(lambda: server.backlog.in_use == 0 and server.stats().connections == 10)
        for client in clients:
            client.close()
        wait_until(lambda: server.stats().accepted == 15 and not server.stats().connections)
        assert server.stats().connections_peak == 10
        reachable(server.address)


def test_no_more_connections_than_allowed_in_a_rush(io_threads: int) -> None:
    with serving(Echo, max_connections=3, io_threads=io_threads) as server:

        def client() -> None:
            for _ in range(30):
                reachable(server.address)

        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        wait_until(lambda: not server.stats().connections)
        assert server.stats().accepted == 180
        assert server.stats().connections_peak <= 3


def test_a_flood_of_connects_leaves_the_pool_full() -> None:
    with serving(Echo, backlog=32) as server:
        for number in range(300):
            client = raw(server.address)
            if number % 2:
                rst(client)
            else:
                client.close()
        settled(server, 300)
        wait_until(lambda: level(server), what="the full pool")
        reachable(server.address)


def test_several_sockets_share_the_pool() -> None:
    with serving(Echo, [LOOPBACK, LOOPBACK, LOOPBACK], backlog=8) as server:
        assert server.backlog == (8, 8)
        assert len(set(server.addresses)) == 3
        for address in server.addresses:
            for _ in range(5):
                reachable(address)
        wait_until(lambda: not server.stats().connections)
        wait_until(lambda: server.backlog == (8, 8))
        server.backlog = 1
        for address in server.addresses:
            for _ in range(4):
                reachable(address)
        wait_until(lambda: server.backlog == (1, 3), what="one AcceptEx for each socket")

"""Connections on fakes: what the kernel may do and seldom does. Each step is the test's: each fault is met.

Of _channel, _lifetime and connection; what they do with real sockets is in the files of those names.
"""

from __future__ import annotations

import errno
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import (
    LOCAL_CLOSE_STATUSES,
    STATUS_RESET,
    AtOnce,
    Before,
    Fail,
    FakeEngine,
    FakeSocket,
    Hold,
)
from support import Recorder

from iocp_ctypes import ConnectionClosedError, Usage, _burstchannel, _channel, _lifetime, connection
from iocp_ctypes._flow import SEND_GATHER_MAX, SEND_IN_FLIGHT_MAX, SEND_SLICE_MAX
from iocp_ctypes._lifetime import DRAIN_PATIENCE_MIN, RETRY_FIRST, RETRY_MAX, Home
from iocp_ctypes._options import make_settings

WSAEWOULDBLOCK, WSAENOBUFS, WSAECONNRESET = 10035, 10055, 10054
STATUS_INSUFFICIENT_RESOURCES = 0xC000009A
PEER = ("192.0.2.1", 9)


class Rig:
    """One connection on fakes. `run` lets the I/O thread, which is the test's own, serve what is ready."""

    def __init__(
        self,
        handler: type[Recorder] = Recorder,
        skips: bool = True,
        engine: FakeEngine | None = None,
        start: bool = True,
        **options: Any,
    ) -> None:
        self.engine = engine or FakeEngine()
        self.sock = FakeSocket(self.engine, skips)
        self.gone: list[Any] = []
        self.failed: list[tuple[Any, BaseException]] = []
        home = Home(
            engine=self.engine,  # type: ignore[arg-type]
            gone=self.gone.append,
            failed=lambda connection, exc: self.failed.append((connection, exc)),
            executor=None,
            is_callback_thread=self.engine.dispatcher.is_io_thread,
        )
        self.connection = handler()
        settings = make_settings({"recv_mode": "flow", "recv_size": 64, **options})
        self.connection._attach(None, home, self.sock, settings, PEER)  # type: ignore[arg-type]
        if start:
            self.serve(lambda: self.connection._start(b""))

    def serve(self, function: Callable[[], object]) -> None:
        """Call a function on the I/O thread, and then what became ready by it."""
        self.engine.dispatcher.call_soon(lambda: (function(), None)[1])
        self.run()

    def run(self) -> None:
        self.engine.dispatcher.run()

    def advance(self, seconds: float) -> None:
        """Let time pass and serve what became ready by it."""
        self.engine.watchdog.advance(seconds)
        self.run()

    def complete(self, part: int | None = None, status: int = 0) -> None:
        """Complete the oldest send that the kernel has."""
        self.sock.complete_send(part, status)
        self.run()

    def deliver(self, *chunks: bytes) -> None:
        self.sock.deliver(*chunks)
        self.run()

    def held(self) -> list[bytes]:
        """What the kernel has of the sends, oldest first."""
        return [data for _operation, data in self.sock.sends]

    def ended(self) -> None:
        """Assert that the connection ended as every connection has to."""
        for thread in self.sock.threads:
            thread.join(10)
        self.run()
        self.connection.check()
        assert self.sock.closed
        assert self.sock.calls.count("close") == 1
        assert self.sock.calls[-1] == "close"
        assert self.gone == [self.connection]
        assert self.engine.ops_pending == 0
        assert len(self.engine.watchdog) == 0, "a timer outlived its connection"
        assert self.connection._flow.sends == self.connection._flow.in_flight == 0

    def end(self) -> None:
        """Abort it, if it lives, and assert that it ended well."""
        self.sock.cancels_at_once = True
        self.connection.abort()
        self.run()
        self.ended()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEngine]:
    """All rigs of a test share an engine and its clock; whichever thread sends does as on Windows."""
    engine = FakeEngine()
    for module in (_lifetime, _channel, _burstchannel, connection):
        monkeypatch.setattr(module, "monotonic", engine.clock)
    monkeypatch.setattr(_channel, "ENDING_THREADS_DROP", False)
    yield engine
    assert engine.ops_pending == 0


@pytest.fixture
def rig(clock: FakeEngine) -> Callable[..., Rig]:
    return lambda *args, **kwargs: Rig(*args, engine=clock, **kwargs)


Make = Callable[..., Rig]


# -- a send takes only a part -------------------------------------------------------------------------------


@pytest.mark.parametrize("skips", [True, False])
def test_the_rest_of_a_short_send_goes_before_what_is_queued(rig: Make, skips: bool) -> None:
    made = rig(sendcap=1, skips=skips)
    made.connection.send(b"a" * 100)
    made.connection.send(b"b" * 10)
    assert made.held() == [b"a" * 100]
    made.complete(part=40)
    assert b"".join(made.held()) == b"a" * 60 + b"b" * 10
    made.complete(part=0)
    made.complete(part=65)
    made.complete()
    assert made.sock.sent == b"a" * 100 + b"b" * 10
    assert made.connection.bytes_sent == 110
    assert made.connection.write_buffer_size == 0
    made.end()


def test_a_short_send_with_another_behind_it_is_fatal(rig: Make) -> None:
    # The second may have gone out after a part of the first: nothing can put them in order again.
    made = rig(sendcap=2)
    made.connection.send(b"a" * 100)
    made.connection.send(b"b" * 10)
    assert made.held() == [b"a" * 100, b"b" * 10]
    made.complete(part=40)
    made.ended()
    exc = made.connection.until("close").value
    assert exc.errno == errno.EIO
    assert "cut short" in str(exc)
    assert made.connection.close_reason == "aborted"
    assert "reset_on_close" in made.sock.calls


def test_a_short_send_is_fatal_too_where_what_was_behind_it_is_done(rig: Make) -> None:
    made = rig(sendcap=2)
    made.connection.send(b"a" * 100)
    made.sock.complete_send(part=40)  # its packet is on the way
    made.sock.plan(sends=[AtOnce()])
    made.connection.send(b"b" * 10)
    assert made.held() == []
    made.run()
    made.ended()
    assert made.connection.until("close").value.errno == errno.EIO
    assert made.sock.sent == b"a" * 40 + b"b" * 10, "nothing more goes out in the wrong order"


def test_the_newest_of_several_may_be_short(rig: Make) -> None:
    made = rig(sendcap=3)
    for data in (b"first", b"second", b"third"):
        made.connection.send(data)
    made.connection.send(b"fourth")
    made.sock.complete_send(part=2, index=2)
    made.run()
    assert made.held() == [b"first", b"second", b"irdfourth"]
    made.sock.complete_send()
    made.sock.complete_send()
    made.complete()
    assert made.connection.bytes_sent == 22
    made.end()


def test_the_last_of_several_may_be_short(rig: Make) -> None:
    made = rig(sendcap=2)
    made.connection.send(b"a" * 100)
    made.connection.send(b"b" * 10)
    made.complete()
    made.complete(part=3)
    assert made.held() == [b"b" * 7]
    made.complete()
    assert made.sock.sent == b"a" * 100 + b"b" * 10
    made.end()


def test_a_send_that_is_short_at_once_sends_the_rest_by_itself(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[AtOnce(part=30), AtOnce(part=0), AtOnce(part=69)])
    assert made.connection.send(b"a" * 100) is True
    assert made.held() == [b"a"], "nobody has to send again for it"
    made.complete()
    assert made.sock.sent == b"a" * 100
    made.end()


def test_a_gathered_send_that_is_short_at_once(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[AtOnce(part=5)])
    made.connection.send_many([b"abc", b"defg", b"hi"])
    assert made.held() == [b"fghi"]
    made.complete()
    assert made.sock.sent == b"abcdefghi"
    made.end()


def test_a_short_send_of_a_closing_connection_is_sent_to_its_end(rig: Make) -> None:
    made = rig(sendcap=1)
    made.connection.send(b"a" * 100)
    made.connection.close()
    made.complete(part=99)
    assert "shutdown_send" not in made.sock.calls
    made.complete()
    assert made.sock.calls == ["shutdown_send"]
    made.deliver(b"")
    made.ended()
    assert made.sock.sent == b"a" * 100
    assert made.connection.until("close").value is None
    assert made.connection.close_reason == "local"


def test_sends_of_threads_that_may_end_go_one_by_one(rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the system may drop what an ending thread issued, it must be possible to issue it again.
    monkeypatch.setattr(_channel, "ENDING_THREADS_DROP", True)
    made = rig(sendcap=4)
    for data in (b"first", b"second", b"third"):
        made.connection.send(data)
    assert made.held() == [b"first"]
    made.complete(part=0, status=0x103)  # dropped undone
    assert b"".join(made.held()) == b"firstsecondthird"
    made.complete()
    assert made.sock.sent == b"firstsecondthird"
    made.end()


# -- the system is short of something -----------------------------------------------------------------------


@pytest.mark.parametrize("code", [WSAEWOULDBLOCK, WSAENOBUFS, 1450, 1816])
def test_a_send_that_lacks_resources_is_tried_again_in_its_place(rig: Make, code: int) -> None:
    made = rig()
    made.sock.plan(sends=[Fail(code), Fail(code)])
    assert made.connection.send(b"first") is True
    assert made.connection.send(b"second") is True
    assert made.held() == []
    assert made.connection.write_buffer_size == 11
    made.advance(RETRY_FIRST / 2)
    assert made.held() == []
    made.advance(RETRY_FIRST / 2)
    assert made.held() == [], "the second attempt failed as well"
    made.advance(2 * RETRY_FIRST)
    assert b"".join(made.held()) == b"firstsecond"
    made.complete()
    assert made.sock.sent == b"firstsecond"
    assert made.engine.retries == 2
    assert made.connection.names == ["connect"]
    made.end()


@pytest.mark.parametrize("code", [WSAEWOULDBLOCK, WSAENOBUFS, 1450, 1816])
def test_a_receive_that_lacks_resources_is_tried_again(rig: Make, code: int) -> None:
    made = rig(start=False)
    made.sock.plan(receives=[Fail(code)] * 3)
    made.serve(lambda: made.connection._start(b""))
    made.sock.deliver(b"hello")
    for wait in (RETRY_FIRST, 2 * RETRY_FIRST):
        made.advance(wait)
        assert made.connection.names == ["connect"]
    made.advance(4 * RETRY_FIRST)
    assert made.connection.received == b"hello"
    assert made.engine.retries == 3
    made.deliver(b" world")
    assert made.connection.received == b"hello world"
    made.end()


def test_a_receive_that_was_put_off_and_lacks_resources_is_tried_again(rig: Make) -> None:
    made = rig()
    made.engine.dispatcher.crowded = True
    made.sock.plan(receives=[Fail(WSAENOBUFS)])
    made.deliver(b"hello")
    made.sock.deliver(b" world")
    assert made.connection.received == b"hello"
    made.advance(RETRY_FIRST)
    assert made.connection.received == b"hello world"
    made.end()


def test_a_receive_whose_packet_tells_of_a_shortage_is_tried_again(rig: Make) -> None:
    made = rig()
    made.sock.fail_receive(STATUS_INSUFFICIENT_RESOURCES)
    made.run()
    made.deliver(b"hello")
    assert made.connection.received == b""
    made.advance(RETRY_FIRST)
    assert made.connection.received == b"hello"
    made.end()


def test_a_send_whose_packet_tells_of_a_shortage_is_tried_again(rig: Make) -> None:
    made = rig()
    made.connection.send(b"hello")
    made.complete(part=2, status=STATUS_INSUFFICIENT_RESOURCES)
    assert made.held() == []
    made.advance(RETRY_FIRST)
    assert made.held() == [b"llo"]
    made.complete()
    assert made.sock.sent == b"hello"
    made.end()


def test_attempts_are_further_and_further_apart_and_start_anew_after_a_success(rig: Make) -> None:
    made = rig()
    attempts: list[float] = []
    made.sock.plan(sends=[Fail(WSAENOBUFS)] * 10)
    made.connection.send(b"hello")
    waited = 0.0
    while not made.held():
        due = made.engine.watchdog.deadlines.next_due()
        assert due is not None
        wait = due - made.engine.clock.now
        attempts.append(round(wait, 6))
        waited += wait
        made.advance(wait)
    expected = [min(RETRY_MAX, RETRY_FIRST * 2**number) for number in range(10)]
    assert attempts == [round(wait, 6) for wait in expected]
    made.complete()
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    made.connection.send(b"again")
    due = made.engine.watchdog.deadlines.next_due()
    assert due is not None
    assert round(due - made.engine.clock.now, 6) == RETRY_FIRST
    made.advance(RETRY_FIRST)
    made.complete()
    assert made.sock.sent == b"helloagain"
    made.end()


def test_what_is_sent_while_waiting_keeps_its_order(rig: Make) -> None:
    made = rig(sendcap=3)
    made.connection.send(b"0")
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    for number in range(1, 9):
        made.connection.send(b"%d" % number)
    assert made.held() == [b"0"]
    made.complete()
    assert made.held() == [], "the shortage is waited out, although a send came back"
    made.advance(RETRY_FIRST)
    while made.held():
        made.complete()
    assert made.sock.sent == b"012345678"
    made.end()


def test_a_short_send_with_a_shortage_behind_it_is_fatal_only_if_others_are_in_flight(rig: Make) -> None:
    made = rig(sendcap=2)
    made.connection.send(b"a" * 10)
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    made.connection.send(b"b" * 10)  # has not gone out
    made.complete(part=3)
    made.advance(RETRY_FIRST)
    while made.held():
        made.complete()
    assert made.sock.sent == b"a" * 10 + b"b" * 10
    made.end()


def test_closing_while_waiting_for_resources_sends_all_first(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    made.connection.send(b"hello")
    made.connection.close()
    made.run()
    assert "shutdown_send" not in made.sock.calls
    made.advance(RETRY_FIRST)
    made.complete()
    assert made.sock.calls == ["shutdown_send"]
    made.deliver(b"")
    made.ended()
    assert made.sock.sent == b"hello"


def test_closing_while_the_receive_waits_for_resources(rig: Make) -> None:
    made = rig()
    made.sock.plan(receives=[Fail(WSAENOBUFS)] * 2)
    made.deliver(b"x")
    made.connection.close()
    made.run()
    assert made.sock.receives == []
    made.sock.deliver(b"")
    made.advance(10 * RETRY_FIRST)
    made.ended()
    assert made.connection.until("close").value is None


def test_aborting_while_waiting_for_resources_tries_no_more(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    made.connection.send(b"hello")
    made.connection.abort()
    made.run()
    made.ended()
    assert made.sock.sent == b""


def test_pausing_while_the_receive_waits_for_resources(rig: Make) -> None:
    made = rig()
    made.sock.plan(receives=[Fail(WSAENOBUFS)])
    made.deliver(b"first")
    made.connection.pause_reading()
    made.advance(1)
    assert made.sock.receives == []
    made.sock.deliver(b" second")
    made.serve(made.connection.resume_reading)
    made.advance(1)
    assert made.connection.received == b"first second"
    made.end()


def test_on_drain_comes_after_a_shortage_too(rig: Make) -> None:
    made = rig(high_mark=10, low_mark=0)
    made.sock.plan(sends=[Fail(WSAENOBUFS), AtOnce()])
    assert made.connection.send(b"a" * 20) is False
    made.advance(RETRY_FIRST)
    assert made.sock.sent == b"a" * 20
    assert made.connection.names == ["connect", "drain"]
    made.end()


def test_a_shortage_shrinks_sendcap_which_recovers_step_by_step(rig: Make) -> None:
    made = rig(sendcap=20)
    connection = made.connection
    for _ in range(10):
        connection.send(b"a" * 10)
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    connection.send(b"b" * 10)
    assert connection.sendcap == Usage(5, 10), "half of what was in use"
    while made.held():
        made.complete()
    assert connection.sendcap == Usage(5, 0)
    for _ in range(40):  # each a send of its own
        connection.send(b"c" * SEND_SLICE_MAX)
    assert made.held() == [], "the back-off is not over"
    made.advance(RETRY_FIRST)
    levels = [connection.sendcap.cap]
    while levels[-1] < 20:
        made.advance(RETRY_FIRST)
        levels.append(connection.sendcap.cap)
    assert levels == [5, 10, 20]
    while made.held():
        made.complete()
    assert made.sock.sent == b"a" * 100 + b"b" * 10 + b"c" * 40 * SEND_SLICE_MAX
    made.advance(1)
    assert connection._short is None
    made.end()


def test_a_shortage_told_by_a_sends_packet_shrinks_sendcap(rig: Make) -> None:
    made = rig(sendcap=4)
    made.connection.send(b"hello")
    made.complete(part=2, status=STATUS_INSUFFICIENT_RESOURCES)
    assert made.connection.sendcap == Usage(1, 0)
    made.advance(RETRY_FIRST)
    made.complete()
    made.advance(1)
    assert made.connection.sendcap == Usage(4, 0)
    assert made.sock.sent == b"hello"
    made.end()


def test_sendcap_that_is_assigned_during_a_shortage_holds(rig: Make) -> None:
    made = rig(sendcap=8)
    made.sock.plan(sends=[Fail(WSAENOBUFS)])
    made.connection.send(b"hello")
    made.connection.sendcap = 6
    made.advance(1)
    assert made.connection.sendcap == Usage(6, 1)
    made.complete()
    made.end()


def test_a_shortage_that_stays_tries_a_larger_cap_more_and_more_seldom(rig: Make) -> None:
    """The system takes two sends at a time, and no more: a second has few attempts."""
    made = rig(sendcap=8, write_buffer_max=1 << 30, high_mark=1 << 30)
    attempts = 0
    send = made.sock.send

    def short(*args: Any) -> int:
        nonlocal attempts
        attempts += 1
        if len(made.sock.sends) >= 2:
            made.sock.plan_sends.appendleft(Fail(WSAENOBUFS))
        return send(*args)

    made.sock.send = short  # type: ignore[method-assign]
    for _ in range(30):
        made.connection.send(b"x" * SEND_SLICE_MAX)
    made.advance(2)
    begun, attempts = made.engine.clock.now, 0
    while made.engine.clock.now < begun + 10:
        made.advance(0.01)
    assert attempts <= 40, "two seconds of back-off in between, after a while"
    while made.held():
        made.complete()
        made.advance(1)
    assert made.sock.sent == b"x" * 30 * SEND_SLICE_MAX
    made.end()


# -- a call fails -------------------------------------------------------------------------------------------


def test_a_send_that_fails_is_told_once(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[Fail(WSAECONNRESET)])
    made.connection.send(b"hello")
    made.run()
    made.ended()
    exc = made.connection.until("close").value
    assert isinstance(exc, ConnectionResetError)
    assert exc.winerror == WSAECONNRESET
    assert made.connection.close_reason == "reset"
    assert made.connection.names == ["connect", "close"]
    with pytest.raises(ConnectionClosedError):
        made.connection.send(b"more")


def test_a_send_and_a_receive_that_fail_together_are_told_once(rig: Make) -> None:
    made = rig()
    made.connection.send(b"held")
    made.sock.plan(sends=[Fail(WSAECONNRESET)])
    made.connection.send(b"fails")
    made.run()
    made.ended()
    assert made.connection.names == ["connect", "close"]


@pytest.mark.parametrize("first", ["send", "receive"])
def test_the_first_of_two_failures_is_the_reason(rig: Make, first: str) -> None:
    made = rig()
    made.sock.cancels_at_once = False
    made.connection.send(b"held")
    if first == "send":
        made.complete(part=0, status=STATUS_RESET)
        made.sock.fail_receive(0xC00000B5)
    else:
        made.sock.fail_receive(STATUS_RESET)
        made.run()
        made.sock.complete_send(part=0, status=0xC00000B5)
    made.run()
    made.ended()
    assert made.connection.close_reason == "reset"
    assert isinstance(made.connection.until("close").value, ConnectionResetError)


def test_a_first_receive_that_fails_still_begins_with_on_connect(rig: Make) -> None:
    made = rig(start=False)
    made.sock.plan(receives=[Fail(WSAECONNRESET)])
    made.serve(lambda: made.connection._start(b""))
    made.ended()
    assert made.connection.names == ["connect", "close"]
    assert made.connection.close_reason == "reset"


def test_a_failing_send_inside_a_callback_ends_the_connection_after_it(rig: Make) -> None:
    class Sending(Recorder):
        def got(self, data: bytes) -> None:
            self.send(data)
            self.said = self.closing, self.names[-1]

    made = rig(Sending)
    made.sock.plan(sends=[Fail(WSAECONNRESET)])
    made.deliver(b"hello")
    made.ended()
    assert made.connection.said[1] == "data", "on_close came inside on_data"  # type: ignore[attr-defined]
    assert made.connection.names == ["connect", "data", "close"]


# -- cancelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("status", LOCAL_CLOSE_STATUSES, ids=hex)
def test_no_status_of_a_local_close_is_an_error(rig: Make, how: str, status: int) -> None:
    made = rig(linger_timeout=1.0)
    made.sock.cancel_status = status
    if how == "abort":
        made.connection.send(b"held")
        made.connection.abort()
    else:
        made.connection.close()
        made.run()
        made.advance(1)
    made.run()
    made.ended()
    assert made.connection.names == ["connect", "close"]
    assert made.connection.until("close").value is None
    assert made.connection.close_reason == ("aborted" if how == "abort" else "local")


def test_packets_that_were_on_their_way_when_it_was_cancelled(rig: Make) -> None:
    # Cancelling finds nothing to cancel: the operations are done, and their packets say so.
    made = rig()
    made.sock.cancels_at_once = False
    made.connection.send(b"hello")
    made.connection.abort()
    made.run()
    assert made.sock.calls == ["reset_on_close", "cancel"]
    made.sock.deliver(b"too late")
    made.run()
    assert not made.sock.closed, "a packet is outstanding"
    assert made.connection.names == ["connect"]
    made.complete()
    made.ended()
    assert made.connection.names == ["connect", "close"]
    assert made.connection.until("close").value is None


def test_what_comes_in_between_closing_and_the_end_is_dropped(rig: Make) -> None:
    made = rig()
    made.connection.close()
    for _ in range(5):
        made.deliver(b"nobody wants this")
    made.deliver(b"")
    made.ended()
    assert made.connection.received == b""
    assert made.connection.until("close").value is None


def test_the_handle_is_closed_after_the_last_packet_and_on_close_comes_after_that(rig: Make) -> None:
    made = rig(sendcap=3)
    made.sock.cancels_at_once = False
    for number in range(3):
        made.connection.send(b"%d" % number)
    made.connection.abort()
    made.run()
    for _ in range(3):
        assert not made.sock.closed
        assert "close" not in made.connection.names
        made.complete(part=0, status=0xC0000120)
    assert not made.sock.closed
    made.sock.fail_receive(0xC0000120)
    assert "close" not in made.connection.names
    made.run()
    made.ended()


def test_aborting_again_and_closing_in_between_cancels_once(rig: Make) -> None:
    made = rig()
    made.sock.cancels_at_once = False
    made.connection.abort()
    made.connection.abort()
    made.connection.close()
    assert made.sock.calls == ["reset_on_close", "cancel"]
    made.sock.finish_cancel()
    made.run()
    made.ended()


def test_a_receive_that_was_done_at_once_is_waited_for(rig: Make) -> None:
    # It is nowhere in the kernel, but the dispatcher has it: its buffer is in use.
    made = rig()
    made.sock.plan(receives=[AtOnce()])
    made.sock.deliver(b"first", b"second")
    made.engine.dispatcher.run(1)
    assert made.engine.ops_pending == 1
    assert made.sock.receives == []
    made.connection.abort()
    assert not made.sock.closed
    made.run()
    made.ended()
    assert made.connection.received == b"first"


# -- packets before the call has returned, and on other threads ---------------------------------------------


def test_receives_whose_packets_come_before_the_calls_return(rig: Make) -> None:
    """Each packet is handled on a thread of its own, while the call that issued it is on its way back."""
    made = rig()
    chunks = [b"<%d>" % number for number in range(50)]
    made.sock.plan(receives=[Before()] * (len(chunks) - 1))
    made.deliver(*chunks)
    for _ in range(1000):
        for thread in list(made.sock.threads):
            thread.join(10)
        made.run()
        if made.connection.received == b"".join(chunks):
            break
    assert made.connection.received == b"".join(chunks)
    assert made.connection.overlaps == 0
    made.end()


def ends_all(made: Any) -> None:
    """Serve until no thread has begun another one; a thread notes who follows it before it ends."""
    for _ in range(1000):
        known = list(made.sock.threads)
        for thread in known:
            thread.join(10)
        made.run()
        if len(made.sock.threads) == len(known):
            break
    assert not made.connection.write_buffer_size


def test_sends_whose_packets_come_before_the_calls_return(rig: Make) -> None:
    made = rig(sendcap=1)
    made.sock.plan(sends=[Before()] * 30)
    expected = b""
    for number in range(30):
        data = b"<%d>" % number
        made.connection.send(data)
        expected += data
    ends_all(made)
    assert made.sock.sent == expected
    assert made.connection.bytes_sent == len(expected)
    made.end()


def test_failures_that_come_before_the_calls_return(rig: Make) -> None:
    made = rig()
    made.sock.plan(sends=[Before(part=0, status=STATUS_RESET)])
    made.connection.send(b"hello")
    for thread in made.sock.threads:
        thread.join(10)
    made.run()
    made.ended()
    assert made.connection.close_reason == "reset"


# -- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sendcap", [3, 4, 5, 1000])
def test_bytes_in_flight_are_bounded_whatever_sendcap_says(rig: Make, sendcap: int) -> None:
    made = rig(sendcap=sendcap, high_mark=1 << 30, write_buffer_max=1 << 30)
    data = b"x" * (20 * SEND_SLICE_MAX)
    made.connection.send(data)
    most = min(sendcap * SEND_SLICE_MAX, SEND_IN_FLIGHT_MAX)
    assert made.connection._flow.in_flight == most
    made.connection.send(b"y")  # the hot path is bounded, too
    assert made.connection._flow.in_flight == most
    while made.held():
        made.complete()
        assert made.connection._flow.in_flight <= most
    assert made.sock.sent == data + b"y"
    made.end()


@pytest.mark.parametrize("extra", [0, 1])
def test_the_bound_of_bytes_in_flight_is_met_exactly_by_sends_that_go_out_at_once(
    rig: Make, extra: int
) -> None:
    made = rig(sendcap=1000, high_mark=1 << 30, write_buffer_max=1 << 30)
    half = SEND_SLICE_MAX // 2
    for _ in range(7):
        made.connection.send(b"x" * half)
    made.connection.send(b"y" * (half + extra))
    assert len(made.held()) == (7 if extra else 8)
    while made.held():
        made.complete()
    assert made.sock.sent == b"x" * 7 * half + b"y" * (half + extra)
    made.end()


class Huge(bytes):
    """An object of any length that takes no memory."""

    length = 0

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("length", [(1 << 32) - 1, 1 << 32, (5 << 30) + 7])
def test_lengths_beyond_a_dword_go_out_in_slices(rig: Make, length: int) -> None:
    made = rig(write_buffer_max=1 << 40, high_mark=1 << 40)
    data = Huge()
    data.length = length
    slices = -(-length // SEND_SLICE_MAX)
    made.sock.plan_sends = deque([AtOnce()] * slices)
    with made.connection._lock:
        assert made.connection._send_queued([data]) is True
    assert len(made.sock.lengths) == slices
    assert sum(made.sock.lengths) == made.connection.bytes_sent == length
    assert max(made.sock.lengths) <= SEND_SLICE_MAX < 1 << 32
    made.end()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_one_send_takes_a_slice_at_the_most(rig: Make, extra: int) -> None:
    made = rig(write_buffer_max=1 << 30, high_mark=1 << 30, sendcap=4)
    made.connection.send(bytes(SEND_SLICE_MAX + extra))
    assert made.sock.lengths == [SEND_SLICE_MAX, 1] if extra > 0 else [SEND_SLICE_MAX + extra]
    made.end()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_one_send_gathers_so_many_buffers_at_the_most(rig: Make, extra: int) -> None:
    made = rig(sendcap=4)
    made.connection.send_many([b"x"] * (SEND_GATHER_MAX + extra))
    assert made.sock.lengths == [SEND_GATHER_MAX, 1] if extra > 0 else [SEND_GATHER_MAX + extra]
    made.end()


@pytest.mark.parametrize("most", [100, 101])
def test_the_most_that_may_wait_is_not_too_much(rig: Make, most: int) -> None:
    made = rig(write_buffer_max=100, high_mark=50, low_mark=10, sendcap=2)
    made.connection.send(b"a" * 30)  # in flight
    made.connection.send(b"b" * 30)  # in flight
    made.connection.send(b"c" * (most - 60))  # queued
    if most <= 100:
        assert made.connection.write_buffer_size == most
        while made.held():
            made.complete()
        assert len(made.sock.sent) == most
        made.end()
    else:
        made.run()
        made.ended()
        assert made.connection.close_reason == "overflow"
        assert made.connection.until("close").value.errno == errno.ENOBUFS
        assert "reset_on_close" in made.sock.calls


@pytest.mark.parametrize("size", [100, 101])
def test_one_buffer_may_be_as_large_as_all_that_may_wait(rig: Make, size: int) -> None:
    made = rig(write_buffer_max=100, high_mark=50, low_mark=10)
    assert made.connection.send(b"a" * size) is False
    made.run()
    assert made.connection.closed is (size > 100)
    made.end()


# -- marks --------------------------------------------------------------------------------------------------


def test_marks_count_what_is_in_flight(rig: Make) -> None:
    made = rig(high_mark=10, low_mark=4, sendcap=8)
    assert made.connection.send(b"a" * 10) is True
    assert made.connection.send(b"b") is False
    assert made.connection.send(b"c") is False
    made.complete()
    assert made.connection.names == ["connect", "drain"]
    assert made.connection.send(b"d") is True
    made.end()


def test_on_drain_comes_at_the_low_mark_and_once(rig: Make) -> None:
    made = rig(high_mark=10, low_mark=4, sendcap=1)
    for _ in range(12):
        made.connection.send(b"x")
    while made.held():
        before = made.connection.write_buffer_size
        made.complete(part=1)
        assert made.connection.names.count("drain") == (made.connection.write_buffer_size <= 4), before
    assert made.connection.names == ["connect", "drain"]
    made.end()


def test_one_on_drain_waits_however_often_the_queue_drained_meanwhile(rig: Make) -> None:
    made = rig(high_mark=100, low_mark=10)
    strand = made.connection._strand
    assert strand.enter()  # a callback that lasts
    for _ in range(5):
        assert made.connection.send(bytes(200)) is False
        made.complete()
    assert len(strand._tasks or ()) == 1
    assert "drain" not in made.connection.names
    strand.leave()
    made.run()
    assert made.connection.names.count("drain") == 1
    assert made.connection.send(bytes(200)) is False
    made.complete()
    assert made.connection.names.count("drain") == 2, "the next crossing is told again"
    made.end()


def test_no_on_drain_of_a_connection_that_is_closing(rig: Make) -> None:
    made = rig(high_mark=1, low_mark=0)
    assert made.connection.send(b"hello") is False
    made.connection.close()
    made.complete()
    made.deliver(b"")
    made.ended()
    assert "drain" not in made.connection.names


# -- receiving ----------------------------------------------------------------------------------------------


def test_the_end_is_told_once_however_often_reading_is_resumed(rig: Make) -> None:
    class Keeping(Recorder):
        def ended(self) -> bool:
            return True

    made = rig(Keeping)
    made.deliver(b"")
    for _ in range(3):
        made.connection.pause_reading()
        made.serve(made.connection.resume_reading)
    assert made.connection.names == ["connect", "eof"]
    made.connection.send(b"still")
    made.complete()
    made.connection.close()
    made.run()
    made.ended()


def test_modes_post_what_they_say(rig: Make) -> None:
    sizes: dict[str, list[int]] = {}
    for mode in ("flow", "zero-byte"):
        made = rig(recv_mode=mode, recv_size=4096)
        sizes[mode] = []
        for _ in range(2):
            sizes[mode].append(made.sock.receives[0].size)
            made.sock.deliver(b"x")
            made.engine.dispatcher.run(1)
            if mode == "zero-byte":
                # What it said was there is taken at once, by a receive that finds it.
                made.run()
        assert made.connection.received == b"xx"
        made.end()
    assert sizes == {"flow": [4096, 4096], "zero-byte": [0, 0]}


def test_a_zero_byte_receive_and_the_end(rig: Make) -> None:
    made = rig(recv_mode="zero-byte")
    made.deliver(b"")
    made.ended()
    assert made.connection.names == ["connect", "eof", "close"]
    assert made.connection.close_reason == "eof"


def test_what_comes_to_a_paused_connection_waits_in_order(rig: Make) -> None:
    made = rig()
    made.connection.pause_reading()
    made.deliver(b"first")
    assert made.sock.receives == []
    made.sock.incoming.append(b"second")
    assert made.connection.received == b""
    made.serve(made.connection.resume_reading)
    assert made.connection.received == b"firstsecond"
    made.end()


def test_pausing_in_on_data_holds_back_what_is_next(rig: Make) -> None:
    class Once(Recorder):
        def got(self, data: bytes) -> None:
            self.pause_reading()

    made = rig(Once)
    made.deliver(b"a", b"b", b"c")
    for expected in (b"a", b"ab", b"abc"):
        assert made.connection.received == expected
        made.serve(made.connection.resume_reading)
    made.end()


# -- time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["send", "send_many", "pending"])
def test_what_is_sent_counts_against_idleness(rig: Make, way: str) -> None:
    made = rig(idle_timeout=10.0, silent_timeout=None)
    made.advance(9)
    if way != "pending":
        made.sock.plan(sends=[AtOnce()])
    if way == "send_many":
        made.connection.send_many([b"he", b"llo"])
    else:
        made.connection.send(b"hello")
    if way == "pending":
        made.complete()
    made.advance(9.5)
    assert made.connection.names == ["connect"]
    made.advance(0.5)
    made.ended()
    assert made.connection.close_reason == "idle"


def test_silence_ends_at_its_very_second(rig: Make) -> None:
    made = rig()
    made.advance(119.999)
    assert made.connection.names == ["connect"]
    made.advance(0.001)
    made.ended()
    assert made.connection.close_reason == "silent"
    assert "timeout" not in made.connection.names


def test_who_sent_one_byte_is_not_silent(rig: Make) -> None:
    made = rig()
    made.advance(119.999)
    made.deliver(b"x")
    made.advance(1e6)
    assert not made.connection.closing
    made.end()


def test_a_deadline_is_told_at_its_very_second(rig: Make) -> None:
    made = rig(silent_timeout=None)
    made.connection.set_deadline(5)
    made.advance(4.999)
    assert made.connection.names == ["connect"]
    made.advance(0.001)
    made.ended()
    assert made.connection.names == ["connect", "timeout", "close"]
    assert made.connection.close_reason == "deadline"


def test_lingering_ends_with_its_time(rig: Make) -> None:
    made = rig(linger_timeout=5.0)
    made.connection.close()
    made.run()
    assert made.sock.calls == ["shutdown_send"]
    made.advance(4.999)
    assert not made.connection.closed
    made.advance(0.001)
    made.ended()
    assert made.connection.until("close").value is None
    assert made.connection.close_reason == "local"


def test_a_peer_that_takes_nothing_is_cut_off_and_one_that_takes_a_little_is_not(rig: Make) -> None:
    made = rig(linger_timeout=1.0, sendcap=1)
    made.connection.send(b"a" * 100)
    made.connection.close()
    for _ in range(5):
        made.advance(DRAIN_PATIENCE_MIN - 1)
        made.complete(part=10)
    assert not made.connection.closed
    made.advance(DRAIN_PATIENCE_MIN)
    made.ended()
    assert isinstance(made.connection.until("close").value, TimeoutError)
    assert "reset_on_close" in made.sock.calls


def test_keepalive_and_nodelay_reach_the_socket(rig: Make) -> None:
    made = rig()
    made.connection.keepalive = 60
    made.connection.keepalive = (60, 5)
    made.connection.keepalive = None
    made.connection.nodelay = False
    assert made.sock.calls == [
        "keepalive 60.0",
        "keepalive (60.0, 5.0)",
        "keepalive None",
        "nodelay False",
    ]
    made.end()
    made.connection.keepalive = 60  # of a closed connection: kept, and no call
    assert made.sock.calls[-1] == "close"


# -- everything at once -------------------------------------------------------------------------------------


class Fuzz:
    """A connection to which anything happens, against what its peer sent and was sent."""

    def __init__(self, seed: int, engine: FakeEngine) -> None:
        self.chosen = random.Random(seed)
        chosen = self.chosen
        self.made = Rig(
            Keeping if chosen.random() < 0.5 else Recorder,
            skips=chosen.random() < 0.5,
            engine=engine,
            sendcap=chosen.choice([1, 1, 2, 4]),
            recv_mode=chosen.choice(["auto", "flow", "zero-byte", "burst", "burst"]),
            recvburst=chosen.choice([1, 3, 5]),
            recv_buffer_max=chosen.choice([150, 350, 10_000]),
            recv_size=chosen.choice([64, 100]),
            high_mark=200,
            low_mark=50,
            write_buffer_max=5000,
            linger_timeout=1.0,
            silent_timeout=chosen.choice([None, 3.0]),
            idle_timeout=chosen.choice([None, 2.0]),
        )
        self.made.sock.cancels_at_once = chosen.random() < 0.5
        self.made.engine.dispatcher.crowded = chosen.random() < 0.5
        self.made.sock.cancel_status = chosen.choice(LOCAL_CLOSE_STATUSES)
        self.delivered = b""
        self.handed_over = b""
        self.peer_ended = self.aborted = False
        self.number = 0

    def step(self) -> None:
        made, chosen = self.made, self.chosen
        sock, connection = made.sock, made.connection
        move = chosen.random()
        if move < 0.25:
            self.send()
        elif move < 0.45:
            if not self.peer_ended:
                data = self.fresh(chosen.randrange(1, 150))
                self.delivered += data
                sock.deliver(data)
        elif move < 0.65:
            if sock.sends:
                length = sock.sends[0][0].length
                part = (
                    chosen.randrange(length + 1) if len(sock.sends) == 1 and chosen.random() < 0.5 else None
                )
                sock.complete_send(part)
        elif move < 0.80:
            if chosen.random() < 0.5:  # several I/O threads: what is ready is served in any order
                chosen.shuffle(made.engine.dispatcher.ready)
            made.engine.dispatcher.run(chosen.randrange(1, 4))
        elif move < 0.85:
            failing = Fail(chosen.choice([WSAENOBUFS, WSAEWOULDBLOCK]))
            sock.plan(sends=[chosen.choice([failing, AtOnce(), Hold()])])
            if not sock.plan_receives:
                sock.plan(receives=[chosen.choice([failing, Hold()])])
        elif move < 0.90:
            made.engine.watchdog.advance(chosen.choice([0.001, 0.01, 0.1, 0.5]))
        elif move < 0.94:
            chosen.choice([connection.pause_reading, connection.resume_reading])()
        elif move < 0.96:
            self.rarely()
        elif not connection.closed:
            chosen.choice([self.tune, lambda: connection.set_deadline(chosen.choice([None, 1.0]))])()

    def rarely(self) -> None:
        chosen, sock, connection = self.chosen, self.made.sock, self.made.connection
        move = chosen.random()
        if move < 0.4 and not self.peer_ended:
            self.peer_ended = True
            sock.deliver(b"")
        elif move < 0.5 and sock.receives:
            self.peer_ended = True
            sock.fail_receive(STATUS_RESET)
        elif move < 0.7:
            connection.close()
        elif move < 0.8:
            connection.abort()
            self.aborted = True  # which drops what is queued, even where close() was called before
        elif not connection.closed:
            try:
                connection.send_eof()
            except ConnectionClosedError:
                assert connection.closing

    def tune(self) -> None:
        connection, chosen = self.made.connection, self.chosen
        connection.sendcap = chosen.choice([1, 2, 4])
        connection.recvburst = chosen.choice([1, 3, 5])
        connection.recv_mode = chosen.choice(["auto", "flow", "zero-byte", "burst", "burst"])

    def send(self) -> None:
        data = self.fresh(self.chosen.randrange(0, 150))
        connection = self.made.connection
        try:
            if self.chosen.random() < 0.3:
                connection.send_many([data[:5], data[5:]])
            else:
                connection.send(data)
        except ConnectionClosedError:
            assert connection.closing or connection.closed or connection._eof_out
        else:
            self.handed_over += data

    def fresh(self, length: int) -> bytes:
        self.number += 1
        return bytes((self.number + index) % 251 for index in range(length))

    def check(self) -> None:
        made = self.made
        connection, flow = made.connection, made.connection._flow
        assert self.delivered.startswith(connection.received)
        assert self.handed_over.startswith(bytes(made.sock.sent[: made.sock.torn_at]))
        assert flow.sends == len(made.sock.sends) + sum(
            operation.handler == connection._sent
            for operation in made.engine.proactor.pending.values()
            if operation not in [held for held, _data in made.sock.sends]
        )
        cap = 1 if connection._burst is None else 5
        assert len(made.sock.receives) <= cap, "too many receives at a time"
        if connection._burst is not None:
            burst = connection._burst
            assert burst.unread + burst.reserved <= connection._settings.recv_buffer_max
        assert connection.overlaps == 0

    def finish(self) -> None:
        """Let everything that is under way come to its end, then check what has to hold then."""
        made = self.made
        connection, sock = made.connection, made.sock
        for _ in range(200):
            if made.gone:
                break
            made.run()
            sock.plan_sends.clear()
            sock.plan_receives.clear()
            while sock.sends:
                sock.complete_send()
            if sock.receives and not self.peer_ended:
                self.peer_ended = True
                sock.deliver(b"")
            if "cancel" in sock.calls:
                sock.finish_cancel()
            if not connection.closing:
                connection._paused = False
                connection.close()
            made.engine.watchdog.advance(1)
        made.run()
        made.ended()
        self.check()
        graceful = connection.close_reason in ("local", "eof") and not self.aborted
        if graceful and connection.until("close").value is None:
            assert sock.torn_at is None, "bytes went out in the wrong order"
            assert sock.sent == self.handed_over, "a graceful end lost what was sent"


class Keeping(Recorder):
    def ended(self) -> bool:
        return True


def test_whatever_happens_bytes_keep_their_order_and_the_end_is_the_end(clock: FakeEngine) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    reasons: set[str] = set()
    for turn in range(250):
        fuzz = Fuzz(seed + turn, clock)
        try:
            for _ in range(fuzz.chosen.randrange(5, 120)):
                fuzz.step()
                fuzz.check()
            fuzz.finish()
        except BaseException:
            print(f"in the run of seed {seed + turn}")
            raise
        reasons.add(str(fuzz.made.connection.close_reason))
    assert reasons >= {"local", "eof", "aborted"}, reasons


def test_threads_that_send_while_packets_come_back_elsewhere(rig: Make) -> None:
    """Real threads on fakes: four send, and each send comes back before its call returns or shortly after."""
    made = rig(sendcap=1, high_mark=1 << 30, write_buffer_max=1 << 30)
    made.sock.plan(sends=[Before()] * 400)
    sent: list[bytes] = []

    def work(number: int) -> None:
        for turn in range(50):
            made.connection.send(b"(%d:%d)" % (number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends_all(made)
    sent = bytes(made.sock.sent).removesuffix(b")").split(b")")
    for number in range(4):
        assert [part for part in sent if part.startswith(b"(%d:" % number)] == [
            b"(%d:%d" % (number, turn) for turn in range(50)
        ]
    made.end()

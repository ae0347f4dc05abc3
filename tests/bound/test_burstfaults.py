"""_burstchannel.py on fakes: each packet comes when the test says so, and in the order it says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from fakes import STATUS_RESET, AtOnce, Fail, FakeEngine
from support import PATIENCE, Recorder
from test_faults import Make, Rig, clock, rig  # noqa: F401  # the fixtures

from iocp_ctypes import Usage, _burstchannel
from iocp_ctypes._burst import Burst
from iocp_ctypes._burstchannel import DELIVERED_MAX, QUIET
from iocp_ctypes._channel import BULK_RECEIVE
from iocp_ctypes._errors import STATUS_CANCELLED, STATUS_PENDING
from iocp_ctypes._lifetime import RETRY_FIRST
from iocp_ctypes._options import RECV_MODES

MIB = 1 << 20
WSAENOBUFS, WSAECONNRESET = 10055, 10054
STATUS_INSUFFICIENT_RESOURCES = 0xC000009A
BURST: dict[str, Any] = {"recv_mode": "burst", "recvburst": 4, "recv_size": 64, "recv_buffer_max": 100_000}


class Bursting(Rig):
    """A connection on fakes in burst mode, with as many receives posted as were asked for."""

    def __init__(self, width: int, handler: type[Recorder], engine: FakeEngine, **options: Any) -> None:
        super().__init__(handler, engine=engine, **{**BURST, **options})
        if width > 1:
            self.widen(width)

    @property
    def burst(self) -> Burst:
        burst = self.connection._burst
        assert burst is not None
        return burst

    def widen(self, width: int) -> None:
        """As if the flow had been ahead of on_data for a while."""
        self.burst.wanted = width
        with self.connection._lock:
            self.connection._burst_go_on()
        assert len(self.sock.receives) == width

    def fill(self, *chunks: bytes) -> list[tuple[Any, int]]:
        """Complete receives, oldest first; returns their packets, which nobody has served yet."""
        ready = self.engine.dispatcher.ready
        assert not ready
        self.sock.deliver(*chunks)
        packets = list(ready)
        ready.clear()
        return packets

    def serve_packets(self, *packets: tuple[Any, int]) -> None:
        """Serve packets in this order, and what becomes ready by them."""
        self.engine.dispatcher.ready.extend(packets)
        self.run()


Burster = Callable[..., Bursting]


@pytest.fixture
def burster(clock: FakeEngine) -> Burster:  # noqa: F811
    def make(width: int = 4, handler: type[Recorder] = Recorder, **options: Any) -> Bursting:
        return Bursting(width, handler, clock, **options)

    return make


class Keeping(Recorder):
    def ended(self) -> bool:
        return True


def names(connection: Recorder) -> list[str]:
    return [name for name in connection.names if name != "data"]


# -- order --------------------------------------------------------------------------------------------------


def test_whoever_retires_them_and_when_bytes_come_in_the_order_of_the_receives(burster: Burster) -> None:
    for seed in range(50):
        made_one = burster()
        chunks = [b"first ", b"second ", b"third ", b"fourth"]
        packets = made_one.fill(*chunks)
        random.Random(seed).shuffle(packets)
        made_one.serve_packets(*packets)
        assert [call.value for call in made_one.connection.calls[1:]] == chunks
        made_one.end()


def test_nothing_is_delivered_before_what_is_in_front_of_it(burster: Burster) -> None:
    made_one = burster()
    first, *others = made_one.fill(b"1", b"2", b"3", b"4")
    made_one.serve_packets(*reversed(others))
    assert made_one.connection.names == ["connect"]
    assert made_one.connection.recvburst.in_use == 4, "three were posted again"
    made_one.serve_packets(first)
    assert made_one.connection.received == b"1234"
    made_one.end()


def test_packets_on_other_threads_while_on_data_runs(burster: Burster) -> None:
    """Handlers on other threads find the strand busy: they post, and the one that delivers takes it."""

    class Busy(Recorder):
        def got(self, data: bytes) -> None:
            if self.data:
                packets, self.data = self.data, None
                for packet in packets:
                    self.rig.engine.dispatcher.serve_elsewhere(*packet).join(PATIENCE)

        rig: Any

    made_one = burster(handler=Busy)
    made_one.connection.rig = made_one
    first, *others = made_one.fill(b"1", b"2", b"3", b"4")
    made_one.connection.data = reversed(others)
    made_one.serve_packets(first)
    assert made_one.connection.received == b"1234"
    assert made_one.connection.overlaps == 0
    made_one.end()


# -- growing and falling ------------------------------------------------------------------------------------


def test_one_is_posted_at_first_and_one_more_each_time_the_flow_is_ahead(burster: Burster) -> None:
    made_one = burster(width=1)
    assert made_one.connection.recvburst == Usage(4, 1)
    made_one.sock.plan(receives=[AtOnce()] * 39)
    made_one.sock.incoming.extend(b"%02d" % number for number in range(40))
    widths = []
    made_one.sock.deliver()
    while made_one.engine.dispatcher.ready:
        made_one.engine.dispatcher.run(1)
        widths.append(made_one.connection.recvburst.in_use)
    assert widths[:5] == [2, 3, 4, 4, 4]
    assert max(widths) == 4
    assert made_one.connection.received == b"".join(b"%02d" % number for number in range(40))
    made_one.end()


def test_messages_with_pauses_between_them_bring_it_down_to_one(burster: Burster) -> None:
    made_one = burster()
    widths = []
    for number in range(6):
        made_one.deliver(b"%d" % number)
        widths.append(made_one.connection.recvburst.in_use)
    assert widths == [4, 3, 2, 1, 1, 1], "the one that brought the first was posted before it was read"
    assert made_one.connection.received == b"012345"
    made_one.end()


def test_a_flow_that_stops_leaves_one_posted(burster: Burster) -> None:
    made_one = burster()
    made_one.advance(QUIET)
    assert made_one.connection.recvburst == Usage(4, 1)
    assert made_one.sock.calls == ["cancel_receive"] * 3
    made_one.deliver(b"after")
    assert made_one.connection.received == b"after"
    made_one.advance(10 * QUIET)
    assert len(made_one.engine.watchdog) == 0 or made_one.connection._burst_due is None
    made_one.end()


def test_a_flow_that_goes_on_is_not_called_quiet(burster: Burster) -> None:
    made_one = burster(recvburst=8, width=8)
    for _ in range(6):
        made_one.advance(QUIET * 0.7)
        made_one.deliver(b"x")
    assert "cancel_receive" not in made_one.sock.calls
    made_one.advance(QUIET * 1.4)
    assert made_one.connection.recvburst.in_use == 1
    made_one.end()


def test_bytes_of_a_receive_that_was_cancelled_too_late_count(burster: Burster) -> None:
    """What a cancelled operation says decides: here two had got their bytes before."""
    made_one = burster()
    made_one.sock.cancels_at_once = False
    packets = made_one.fill(b"1", b"2")
    made_one.advance(QUIET)
    assert made_one.sock.calls == ["cancel_receive"] * 3, "the oldest stays"
    third, fourth = made_one.sock.receives
    for operation in (fourth, third):
        made_one.sock.receives.remove(operation)
        made_one.sock._retire(operation, 0, STATUS_CANCELLED)
    made_one.run()
    made_one.serve_packets(*reversed(packets))
    assert made_one.connection.received == b"12"
    made_one.deliver(b"3")
    assert made_one.connection.received == b"123"
    assert made_one.connection.names == ["connect", "data", "data", "data"]
    made_one.end()


def test_a_receive_that_was_dropped_undone_is_posted_again(burster: Burster) -> None:
    """What Wine does with operations of a thread that ends: STATUS_PENDING, and nothing was done."""
    made_one = burster(width=2)
    made_one.burst.wanted = 2
    made_one.sock.fail_receive(STATUS_PENDING)
    made_one.run()
    assert made_one.connection.recvburst.in_use == 2
    made_one.deliver(b"1", b"2", b"3")
    assert made_one.connection.received == b"123"
    made_one.end()


def test_a_full_receive_makes_the_next_ones_larger_and_a_short_one_smaller(burster: Burster) -> None:
    made_one = burster(width=1, recvburst=1, recv_buffer_max=MIB)
    sizes = []
    for data in (b"x" * 64, b"y" * 64, b"z" * 63, b"."):
        made_one.deliver(data)
        sizes += [operation.size for operation in made_one.sock.receives]
    assert sizes == [BULK_RECEIVE, BULK_RECEIVE, 64, 64]
    made_one.end()


def test_a_large_receive_that_does_not_fit_is_a_small_one(burster: Burster) -> None:
    made_one = burster(width=1, recv_buffer_max=300)
    made_one.deliver(b"x" * 64)
    made_one.burst.wanted = 4
    with made_one.connection._lock:
        made_one.connection._burst_go_on()
    assert [operation.size for operation in made_one.sock.receives] == [64] * 4
    made_one.end()


# -- the knob -----------------------------------------------------------------------------------------------


def test_a_lower_cap_drains_and_a_higher_one_is_used(burster: Burster) -> None:
    made_one = burster()
    made_one.connection.recvburst = 2
    assert made_one.connection.recvburst == Usage(2, 4)
    packets = made_one.fill(b"1", b"2", b"3")
    made_one.serve_packets(*packets)
    assert made_one.connection.recvburst == Usage(2, 2)
    made_one.connection.recvburst = 3
    made_one.burst.wanted = 3
    made_one.deliver(b"4")
    assert made_one.connection.recvburst == Usage(3, 3)
    made_one.end()


def test_a_bad_cap_is_refused_and_changes_nothing(burster: Burster) -> None:
    made_one = burster()
    for wrong, error in ((0, ValueError), (10_001, ValueError), (2.0, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="recvburst="):
            made_one.connection.recvburst = wrong  # type: ignore[assignment]
    assert made_one.connection.recvburst == Usage(4, 4)
    made_one.end()


def test_in_use_of_a_connection_with_one_receive(rig: Make) -> None:  # noqa: F811
    made_one = rig(recvburst=5)
    assert made_one.connection.recvburst == Usage(5, 1)
    made_one.connection.pause_reading()
    made_one.deliver(b"x")
    assert made_one.connection.recvburst == Usage(5, 0)
    made_one.end()
    assert made_one.connection.recvburst == Usage(5, 0)


# -- the limit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [64, 200, 1000])
def test_unread_bytes_stay_below_the_limit_and_receiving_goes_on_with_room(
    burster: Burster, limit: int
) -> None:
    """While on_data is at work other threads retire what comes: only so much, and then TCP holds the peer."""
    stream = random.Random(3).randbytes(5000)
    most = 0

    class Slow(Recorder):
        rig: Any

        def got(self, data: bytes) -> None:
            nonlocal most
            dispatcher = self.rig.engine.dispatcher
            while dispatcher.ready:
                dispatcher.serve_elsewhere(*dispatcher.ready.popleft()).join(PATIENCE)
                burst = self._burst
                assert burst is not None
                assert burst.unread + burst.reserved <= limit
                most = max(most, burst.unread)

    made_one = burster(width=1, handler=Slow, recv_buffer_max=limit)
    made_one.connection.rig = made_one
    for start in range(0, len(stream), 7):
        made_one.sock.deliver(stream[start : start + 7])
        made_one.run()
    for start in range(0, len(stream), 500):
        made_one.sock.incoming.extend([stream[start : start + 500]])
    made_one.sock.deliver()
    made_one.run()
    assert made_one.connection.received == 2 * stream
    assert made_one.burst.unread == 0
    assert limit // 2 < most <= limit or limit == 64
    assert made_one.connection.recvburst.in_use >= 1, "it went on"
    made_one.end()


def test_a_receive_larger_than_the_limit_is_as_large_as_the_limit(burster: Burster) -> None:
    made_one = burster(recv_size=64 * 1024, recv_buffer_max=1000, width=1)
    assert [operation.size for operation in made_one.sock.receives] == [1000]
    made_one.deliver(b"x" * 3000)
    assert made_one.connection.received == b"x" * 3000
    made_one.end()


def test_one_turn_delivers_so_many_and_then_others_have_theirs(burster: Burster) -> None:
    many = DELIVERED_MAX + 5
    made_one = burster(width=many, recvburst=many)
    first, *others = made_one.fill(*[b"x"] * many)
    made_one.serve_packets(*others)
    made_one.engine.dispatcher.ready.append(first)
    made_one.engine.dispatcher.run(1)
    assert made_one.connection.names.count("data") == DELIVERED_MAX
    made_one.run()
    assert made_one.connection.names.count("data") == many
    made_one.end()


# -- pausing ------------------------------------------------------------------------------------------------


def test_what_comes_to_a_paused_connection_waits_in_order_and_nothing_is_posted(burster: Burster) -> None:
    made_one = burster()
    made_one.connection.pause_reading()
    packets = made_one.fill(b"1", b"2", b"3")
    made_one.serve_packets(*reversed(packets))
    assert made_one.connection.names == ["connect"]
    assert made_one.connection.recvburst.in_use == 1
    made_one.sock.deliver(b"4", b"5")
    made_one.run()
    assert made_one.connection.names == ["connect"]
    assert made_one.connection.recvburst.in_use == 0
    made_one.serve(made_one.connection.resume_reading)
    assert made_one.connection.received == b"12345"
    assert made_one.connection.recvburst.in_use >= 1
    made_one.end()


def test_pausing_in_on_data_holds_back_what_has_come_already(burster: Burster) -> None:
    class Pausing(Recorder):
        def got(self, data: bytes) -> None:
            self.pause_reading()

    made_one = burster(handler=Pausing)
    made_one.serve_packets(*made_one.fill(b"1", b"2", b"3"))
    for number in range(1, 4):
        assert made_one.connection.received == b"123"[:number]
        made_one.serve(made_one.connection.resume_reading)
    made_one.end()


def test_resuming_again_and_again_in_on_data_posts_no_more_than_is_wanted(burster: Burster) -> None:
    class Fidgety(Recorder):
        def got(self, data: bytes) -> None:
            for _ in range(10):
                self.pause_reading()
                self.resume_reading()

    made_one = burster(handler=Fidgety)
    for number in range(10):
        made_one.deliver(b"%d" % number)
        assert made_one.connection.recvburst.in_use <= 4
    assert made_one.connection.received == b"0123456789"
    made_one.end()


# -- the end ------------------------------------------------------------------------------------------------


def test_eof_that_is_retired_first_is_told_last_and_once(burster: Burster) -> None:
    made_one = burster()
    packets = made_one.fill(b"1", b"2", b"")
    assert len(packets) == 4, "each receive that is posted at the end has its EOF"
    made_one.serve_packets(*reversed(packets))
    assert made_one.connection.received == b"12"
    assert made_one.connection.close_reason == "eof"
    made_one.ended()
    assert names(made_one.connection) == ["connect", "eof", "close"]


def test_a_kept_connection_sends_on_after_eof_and_posts_nothing(burster: Burster) -> None:
    made_one = burster(handler=Keeping)
    packets = made_one.fill(b"1", b"")
    made_one.serve_packets(*packets[1:], packets[0])
    assert names(made_one.connection) == ["connect", "eof"]
    assert made_one.connection.recvburst.in_use == 0
    assert made_one.connection._burst is None
    for _ in range(2):
        made_one.connection.pause_reading()
        made_one.serve(made_one.connection.resume_reading)
    made_one.connection.send(b"still here")
    made_one.complete()
    assert made_one.sock.sent == b"still here"
    made_one.connection.send_eof()
    made_one.run()
    made_one.ended()
    assert names(made_one.connection) == ["connect", "eof", "close"]


def test_receives_behind_eof_that_do_not_come_back_by_themselves_are_cancelled(burster: Burster) -> None:
    made_one = burster()
    operation = made_one.sock.receives[0]
    made_one.sock.receives.remove(operation)
    made_one.sock._retire(operation, 0, 0)
    made_one.run()
    assert made_one.sock.calls[:2] == ["cancel_receive", "cancel_receive"]
    made_one.ended()
    assert made_one.connection.close_reason == "eof"


def test_eof_waits_while_paused(burster: Burster) -> None:
    made_one = burster()
    made_one.connection.pause_reading()
    made_one.deliver(b"1", b"")
    made_one.advance(5)
    assert made_one.connection.names == ["connect"]
    made_one.serve(made_one.connection.resume_reading)
    made_one.ended()
    assert made_one.connection.names == ["connect", "data", "eof", "close"]


def test_a_reset_comes_after_the_bytes_before_it(burster: Burster) -> None:
    made_one = burster()
    packets = made_one.fill(b"1", b"2")
    for operation in list(made_one.sock.receives):
        made_one.sock.receives.remove(operation)
        made_one.sock._retire(operation, 0, STATUS_RESET)
    made_one.run()  # the failures first
    assert made_one.connection.names == ["connect"]
    made_one.serve_packets(*reversed(packets))
    assert made_one.connection.received == b"12"
    assert made_one.connection.close_reason == "reset"
    made_one.ended()


@pytest.mark.parametrize("unread", [False, True])
def test_a_reset_of_a_paused_connection(burster: Burster, unread: bool) -> None:
    """With nothing in front of it, it is told at once; else what came before is read first."""
    made_one = burster()
    made_one.connection.pause_reading()
    if unread:
        made_one.deliver(b"unread")
    for operation in list(made_one.sock.receives):
        made_one.sock.receives.remove(operation)
        made_one.sock._retire(operation, 0, STATUS_RESET)
    made_one.run()
    assert made_one.connection.closed is not unread
    made_one.serve(made_one.connection.resume_reading)
    made_one.ended()
    assert made_one.connection.received == (b"unread" if unread else b"")
    assert made_one.connection.close_reason == "reset"


def test_a_receive_that_cannot_be_posted_any_more_fails_at_its_place(burster: Burster) -> None:
    made_one = burster()
    made_one.sock.plan(receives=[Fail(WSAECONNRESET)])
    packets = made_one.fill(b"1", b"2")
    made_one.serve_packets(packets[1])  # posting another in its place fails
    assert made_one.connection.names == ["connect"]
    made_one.serve_packets(packets[0])
    assert made_one.connection.received == b"12"
    assert not made_one.connection.closed, "two receives are in front of the one that failed"
    for operation in list(made_one.sock.receives):
        made_one.sock.receives.remove(operation)
        made_one.sock._retire(operation, 0, STATUS_RESET)
    made_one.run()
    made_one.ended()
    assert made_one.connection.close_reason == "reset"


@pytest.mark.parametrize("ending", ["close", "abort"])
@pytest.mark.parametrize("order", [1, -1])
def test_ending_joins_all_receives(burster: Burster, ending: str, order: int) -> None:
    made_one = burster()
    made_one.sock.cancels_at_once = False
    packets = made_one.fill(b"unseen", b"unseen")
    getattr(made_one.connection, ending)()
    made_one.serve_packets(*packets[::order])
    assert not made_one.sock.closed
    assert made_one.connection.recvburst.in_use == 2
    if ending == "close":
        made_one.deliver(b"dropped", b"dropped")
        assert len(made_one.sock.receives) == 1, "one receive waits for the peer's end"
        made_one.deliver(b"dropped, too", b"")
    else:
        made_one.sock.finish_cancel()
        made_one.run()
    made_one.ended()
    assert made_one.connection.received == b""
    assert made_one.connection.close_reason == ("local" if ending == "close" else "aborted")


def test_closing_with_eof_unread_sees_it(burster: Burster) -> None:
    made_one = burster()
    made_one.connection.pause_reading()
    made_one.deliver(b"unread", b"")
    made_one.connection.close()
    made_one.run()
    made_one.ended()
    assert made_one.connection.close_reason == "local"
    assert made_one.connection.names == ["connect", "close"]


def test_closing_with_a_failure_unread_ends_it(burster: Burster) -> None:
    made_one = burster(width=2)
    made_one.connection.pause_reading()
    made_one.deliver(b"unread")
    made_one.sock.fail_receive(STATUS_RESET)
    made_one.run()
    assert not made_one.connection.closed
    made_one.connection.close()
    made_one.run()
    made_one.ended()
    assert made_one.connection.close_reason == "local"


def test_closing_inside_on_data_drops_what_is_behind(burster: Burster) -> None:
    class Closing(Recorder):
        def got(self, data: bytes) -> None:
            self.close()

    made_one = burster(handler=Closing)
    made_one.serve_packets(*made_one.fill(b"1", b"2", b"3", b"4"))
    assert made_one.connection.received == b"1"
    made_one.deliver(b"")
    made_one.ended()


@pytest.mark.parametrize("exception", [RuntimeError, SystemExit])
def test_on_data_that_raises_joins_all_receives(burster: Burster, exception: type[BaseException]) -> None:
    class Raising(Recorder):
        def got(self, data: bytes) -> None:
            raise exception("on purpose")

    made_one = burster(handler=Raising)
    made_one.serve_packets(*made_one.fill(b"1", b"2"))
    made_one.ended()
    assert made_one.connection.received == b"1"
    assert made_one.connection.close_reason == "error"
    assert [type(exc) for _connection, exc in made_one.failed] == [exception]


# -- shortages ----------------------------------------------------------------------------------------------


def test_a_shortage_shrinks_the_cap_backs_off_and_recovers(burster: Burster) -> None:
    made_one = burster(width=4, recvburst=20)
    connection = made_one.connection
    made_one.burst.wanted = 20
    made_one.sock.plan(receives=[Fail(WSAENOBUFS)])
    made_one.serve_packets(*made_one.fill(b"1"))
    assert connection.recvburst == Usage(1, 3), "half of what was in use"
    made_one.serve_packets(*made_one.fill(b"2", b"3", b"4"))
    assert connection.received == b"1234"
    assert connection.recvburst == Usage(1, 0), "nothing is posted before the back-off is over"
    made_one.advance(RETRY_FIRST)
    assert connection.recvburst == Usage(1, 1)
    caps = []
    while connection.recvburst.cap < 20:
        made_one.burst.wanted = 20
        made_one.advance(RETRY_FIRST)
        caps.append(connection.recvburst)
    assert caps == [Usage(2, 2), Usage(4, 4), Usage(8, 8), Usage(16, 16), Usage(20, 20)]
    made_one.advance(RETRY_FIRST)
    assert connection._short is None
    made_one.deliver(*[b"x"] * 30)
    assert connection.received == b"1234" + b"x" * 30
    made_one.end()


def test_a_shortage_told_by_a_packet_loses_nothing(burster: Burster) -> None:
    made_one = burster()
    made_one.sock.fail_receive(STATUS_INSUFFICIENT_RESOURCES)
    made_one.run()
    assert made_one.connection.recvburst == Usage(1, 3)
    made_one.deliver(b"1", b"2", b"3")
    made_one.advance(RETRY_FIRST)
    made_one.deliver(b"4")
    assert made_one.connection.received == b"1234"
    made_one.advance(1)
    assert made_one.connection.recvburst.cap == 4
    made_one.end()


def test_assigning_during_a_shortage_holds(burster: Burster) -> None:
    made_one = burster()
    made_one.sock.plan(receives=[Fail(WSAENOBUFS)])
    made_one.serve_packets(*made_one.fill(b"1"))
    assert made_one.connection.recvburst.cap == 1
    made_one.connection.recvburst = 6
    made_one.advance(1)
    assert made_one.connection.recvburst.cap == 6
    made_one.end()


@pytest.mark.parametrize("ending", ["close", "abort"])
def test_ending_during_a_shortage(burster: Burster, ending: str) -> None:
    made_one = burster(width=2)
    made_one.sock.plan(receives=[Fail(WSAENOBUFS)] * 3)
    made_one.serve_packets(*made_one.fill(b"1", b"2"))
    assert made_one.connection.recvburst.in_use == 0
    getattr(made_one.connection, ending)()
    made_one.run()
    made_one.sock.deliver(b"")
    made_one.advance(1)
    made_one.ended()


# -- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", RECV_MODES)
@pytest.mark.parametrize("before", RECV_MODES)
@pytest.mark.parametrize("paused", [False, True])
def test_each_mode_after_each(burster: Burster, before: str, after: str, paused: bool) -> None:
    made_one = burster(width=1, recv_mode="burst")
    connection = made_one.connection
    connection.recv_mode = before
    made_one.deliver(b"1", b"2")
    if before == "burst":
        made_one.widen(3)
    if paused:
        connection.pause_reading()
    made_one.sock.deliver(b"3")
    connection.recv_mode = after
    made_one.run()
    made_one.deliver(b"4", b"5", b"6")
    if paused:
        made_one.serve(connection.resume_reading)
    made_one.deliver(b"7", b"8")
    made_one.advance(2 * QUIET)
    made_one.deliver(b"9")
    assert connection.received == b"123456789"
    assert connection.recv_mode == after
    assert connection.recvburst.in_use == 1
    made_one.deliver(b".")  # if it was posted for a burst, it is the last of it
    assert (connection._burst is not None) == (after == "burst")
    made_one.end()


def test_auto_bursts_where_the_cap_allows_and_calms_down_again(rig: Make) -> None:  # noqa: F811
    made_one = rig(recv_mode="auto", recvburst=4, recv_size=2048)
    connection = made_one.connection
    made_one.deliver(b"small")
    assert connection._burst is None
    stream = random.Random(4).randbytes(2 * MIB)
    made_one.sock.incoming.append(stream)
    most = 0
    made_one.sock.deliver()
    while made_one.engine.dispatcher.ready:
        made_one.engine.dispatcher.run(1)
        most = max(most, connection.recvburst.in_use)
        while made_one.sock.receives and made_one.sock.incoming:
            made_one.sock.deliver()
    assert most == 4
    assert connection.received == b"small" + stream
    for _ in range(10):
        made_one.deliver(b".")
        made_one.advance(0.01)
    assert connection._burst is None
    assert connection.recvburst == Usage(4, 1)
    assert made_one.sock.receives[0].size == 1024
    made_one.end()


def test_auto_without_a_cap_above_one_never_bursts(
    rig: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_burstchannel, "Burst", None)  # nobody makes one
    made_one = rig(recv_mode="auto")
    made_one.sock.incoming.append(bytes(MIB))
    made_one.sock.deliver()
    while made_one.sock.incoming:
        made_one.sock.deliver()
        made_one.run()
    assert made_one.connection.received == bytes(MIB)
    made_one.end()

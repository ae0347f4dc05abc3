"""DatagramChannel: order whatever that of the packets, the write queue and its bounds, errors, back-off."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from datagrams import Echo, Probe, plain, running
from support import PATIENCE, wait_until

from iocp_ctypes import _datagramchannel, _lifecycle

BUSY, NO_BUFFERS = 10035, 10055


def test_packets_that_are_retired_in_another_order_are_delivered_in_that_of_posting() -> None:
    class Shuffled(Probe):
        def __init__(self) -> None:
            self.held: list[Any] = []
            self.counting = threading.Lock()
            super().__init__(recv_depth=4)

        def _received(self, operation: Any, transferred: int, status: int) -> None:
            with self.counting:
                self.held.append((operation, transferred, status))
                if len(self.held) < 4:
                    return
                held, self.held = self.held, []
            for number in (2, 0, 3, 1):
                super()._received(*held[number])

    with running(Shuffled()) as shuffled, plain() as client:
        for turn in range(20):
            for number in range(4):
                client.sendto(b"%d" % (4 * turn + number), shuffled.address)
            shuffled.until(4 * turn + 4)
        assert shuffled.received == [b"%d" % number for number in range(80)]
        wait_until(lambda: shuffled._engine.ops_pending == 4)  # else fewer than four are cancelled


def test_order_and_no_overlap_with_callbacks_that_stall(io_threads: int) -> None:
    class Stalling(Echo):
        def got(self, data: bytes, address: Any) -> None:
            if data == b"stall":
                threading.Event().wait(0.2)  # long enough for another thread to take over
            super().got(data, address)

    with running(Stalling(io_threads=io_threads)) as stalling, plain() as client:
        sent = []
        for number in range(600):
            sent.append(b"stall" if number % 200 == 100 else b"%d" % number)
            client.sendto(sent[-1], stalling.address)
            if number >= 8:
                assert client.recv(100) == sent[number - 8]
        stalling.until(len(sent))
        assert stalling.received == sent


def test_a_callback_that_lasts_bounds_what_is_kept() -> None:
    gate = threading.Event()

    class Slow(Probe):
        def got(self, data: bytes, address: Any) -> None:
            gate.wait(10)

    with running(Slow(recv_depth=4)) as slow, plain() as client:
        for number in range(10):
            client.sendto(b"%d" % number, slow.address)
        slow.until(1)
        wait_until(lambda: len(slow._arrived) == 3, what="the other three wait for their turn")
        assert slow._engine.ops_pending == 0, "none is posted before its callback returned"
        gate.set()
        slow.until(10)
        assert slow.received == [b"%d" % number for number in range(10)]


@pytest.mark.parametrize("at", [(0, "before"), (0, "after"), (1, "before"), (1, "after")])
def test_what_is_retired_at_any_moment_of_a_delivery_is_delivered(at: tuple[int, str]) -> None:
    """The moments: before a delivery that was posted has looked, when the next one is to be posted already,
    and after it, when nobody will look again; and both with the delivery of who entered the strand, which
    has no token to give back."""

    class Held(Probe):
        def __init__(self) -> None:
            self.held: dict[int, Any] = {}  # by number: other threads may retire them in another order
            self.turns = 0
            super().__init__(recv_depth=3)

        def _received(self, operation: Any, transferred: int, status: int) -> None:
            if operation.number < 3:
                self.held[operation.number] = (operation, transferred, status)
            else:
                super()._received(operation, transferred, status)

        def retire(self, number: int) -> None:
            super()._received(*self.held[number])

        def _deliver(self) -> None:
            turn, self.turns = self.turns, self.turns + 1
            for moment in ("before", "after"):
                if (turn, moment) == at:
                    self.retire(2)
                if moment == "before":
                    super()._deliver()

        def got(self, data: bytes, address: Any) -> None:
            if data == b"0":
                self.retire(1)

    with running(Held()) as held, plain() as client:
        for number in range(3):
            client.sendto(b"%d" % number, held.address)
        wait_until(lambda: len(held.held) == 3)
        held.retire(0)
        held.until(3)
        assert held.received == [b"0", b"1", b"2"]
        wait_until(lambda: not held._strand._tasks and held._strand._token, what="the strand is at rest")
        assert held._due == [True]
        client.sendto(b"3", held.address)
        held.until(4)


def test_who_delivers_at_once_leaves_the_token_of_another_thread_alone() -> None:
    with running(Probe()) as probe, plain() as client:
        assert probe._due.pop()  # that thread is about to post
        for number in range(20):
            client.sendto(b"%d" % number, probe.address)
            probe.until(number + 1)
            wait_until(lambda: probe._strand._token)  # else the one before delivers the next as well
        assert probe._due == []
        probe._strand.post(probe._deliver_due)
        wait_until(lambda: probe._due == [True])


def test_deliveries_that_wait_are_bounded_where_callbacks_are_slower_than_the_flow() -> None:
    class Slow(Probe):
        deepest = retired = 0

        def __init__(self) -> None:
            self.counting = threading.Lock()
            super().__init__(io_threads=4)

        def _received(self, operation: Any, transferred: int, status: int) -> None:
            with self.counting:
                self.retired += not status
            super()._received(operation, transferred, status)

        def got(self, data: bytes, address: Any) -> None:
            threading.Event().wait(0.001)  # others retire meanwhile
            self.deepest = max(self.deepest, len(self._strand._tasks or ()))

    with running(Slow()) as slow, plain() as client:
        number = 0
        while len(slow.received) < 500:
            if number - len(slow.received) < 64:  # the kernel always has some, and drops none
                client.sendto(b"%d" % number, slow.address)
                number += 1
            else:
                threading.Event().wait(0.001)
        slow.until(number)
        assert slow.received == [b"%d" % sent for sent in range(number)]
        assert slow.retired == number
        assert slow.deepest <= 1


# -- the write queue ------------------------------------------------------------------------------------


@pytest.fixture
def stuck() -> Iterator[Any]:
    """A Datagram whose kernel takes nothing until `stuck.free()`; queue of 1,000 bytes, marks 100 and 500."""
    probe = Probe(low_mark=100, high_mark=500, write_buffer_max=1000, linger_timeout=0.1)
    sock: Any = probe._socket
    now, send = sock.send_now, sock.send
    sock.send_now = lambda _data, _target: BUSY
    sock.send = lambda *_given: NO_BUFFERS

    def free() -> None:
        sock.send_now, sock.send = now, send

    probe.free = free  # type: ignore[attr-defined]
    with running(probe):
        yield probe


def test_marks_drops_and_drain(stuck: Any) -> None:
    with plain() as client:
        to = client.getsockname()
        cost = 10 + _datagramchannel.QUEUED_OVERHEAD
        answers = [stuck.send_to(b"%010d" % number, to) for number in range(20)]
        below, held = 500 // cost, 1000 // cost
        assert answers == [True] * below + [False] * (20 - below)
        assert stuck.stats().write_buffer_size == held * cost
        assert stuck.stats().dropped == 20 - held
        assert stuck.values("drain") == []
        stuck.free()
        assert [client.recv(100) for _ in range(held)] == [b"%010d" % number for number in range(held)]
        stuck.until(1, "drain")
        assert stuck.send_to(b"again", to)
        assert client.recv(100) == b"again"
        assert stuck.stats().datagrams_sent == held + 1
        assert stuck.stats().write_buffer_size == 0
        assert len(stuck.values("drain")) == 1
        assert stuck._engine.stats().resource_retries >= 1


def test_one_drain_is_told_however_often_the_queue_drained_meanwhile(stuck: Any) -> None:
    gate = threading.Event()
    stuck.got = lambda _data, _address: gate.wait(60)
    now, send = stuck._socket.send_now, stuck._socket.send

    def fill_and_drain() -> None:
        stuck._socket.send_now, stuck._socket.send = now, send
        stuck._send_backoff.delay = 0.001
        while stuck.send_to(b"x", client.getsockname()):
            pass
        stuck.free()
        wait_until(lambda: not stuck.stats().write_buffer_size)

    with plain() as client:
        client.sendto(b"hold", stuck.address)
        stuck.until(1)
        for _ in range(20):
            fill_and_drain()
        assert len(stuck._strand._tasks) == 1
        gate.set()
        stuck.until(1, "drain")
        fill_and_drain()
        stuck.until(2, "drain")
        assert len(stuck.values("drain")) == 2


def test_empty_datagrams_are_bounded_as_well(stuck: Any) -> None:
    answers = [stuck.send_to(b"", ("127.0.0.1", 9)) for _ in range(100)]
    assert answers[-1] is False
    assert stuck.stats().dropped == 100 - 1000 // _datagramchannel.QUEUED_OVERHEAD


def test_one_that_is_larger_than_the_queue_is_dropped_and_leaves_the_marks_alone(stuck: Any) -> None:
    assert stuck.send_to(bytes(2000), ("127.0.0.1", 9)) is False
    assert stuck.send_to(b"x", ("127.0.0.1", 9)) is True


def test_what_is_queued_at_close_has_linger_timeout(stuck: Any) -> None:
    stuck.send_to(b"x", ("127.0.0.1", 9))
    with stuck._lock:
        stuck.close()
        assert stuck._state == _lifecycle.DRAINING
    assert stuck.wait_closed(10)
    assert stuck.close_reason == "timeout"
    error = stuck.values("close")[0]
    assert isinstance(error, TimeoutError)
    assert "1 queued datagrams were not sent" in str(error)
    assert stuck.stats().dropped == 1


def test_what_is_queued_at_close_is_sent(stuck: Any) -> None:
    stuck._settings = dataclasses.replace(stuck._settings, linger_timeout=PATIENCE)
    with plain() as client:
        for number in range(5):
            stuck.send_to(b"%d" % number, client.getsockname())
        stuck.close()
        stuck.free()
        assert [client.recv(100) for _ in range(5)] == [b"%d" % number for number in range(5)]
        assert stuck.wait_closed(10)
        assert stuck.close_reason == "local"


def test_what_is_queued_at_abort_is_dropped(stuck: Any) -> None:
    stuck.send_to(b"x", ("127.0.0.1", 9))
    stuck.abort()
    assert stuck.wait_closed(10)
    assert (stuck.close_reason, stuck.stats().dropped) == ("aborted", 1)


def test_without_room_sends_become_operations_and_keep_their_order(io_threads: int) -> None:
    with running(Probe(io_threads=io_threads)) as probe, plain() as client:
        now: Any = probe._socket.send_now
        turns = iter(range(10**6))
        # Two of three calls find no room: then it goes on with an operation, and with its packet.
        probe._socket.send_now = lambda data, target: now(data, target) if next(turns) % 3 == 0 else BUSY
        for number in range(150):
            probe.send_to(b"%d" % number, client.getsockname())
        assert [client.recv(100) for _ in range(150)] == [b"%d" % number for number in range(150)]
        wait_until(lambda: probe.stats().datagrams_sent == 150)
        wait_until(lambda: probe._engine.ops_pending == 8)


@pytest.mark.parametrize("wanted", [False, True])
def test_an_error_of_an_earlier_datagram_costs_a_queued_one_nothing(wanted: bool) -> None:
    with running(Probe(report_errors=wanted)) as probe, plain() as client:
        send: Any = probe._socket.send
        codes = [10054]
        probe._socket.send_now = lambda _data, _target: BUSY
        probe._socket.send = lambda *given: codes.pop() if codes else send(*given)
        for number in range(3):
            assert probe.send_to(b"%d" % number, client.getsockname())
        assert [client.recv(100) for _ in range(3)] == [b"0", b"1", b"2"]
        wait_until(lambda: probe.stats().datagrams_sent == 3)
        assert (probe.stats().send_errors, probe.stats().receive_errors) == (0, 1)
        assert [exc.winerror for exc in probe.until(int(wanted), "error")] == [10054] * wanted


# -- errors of receives ---------------------------------------------------------------------------------


def test_icmp_errors_at_posting_are_told_and_posting_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Echo(report_errors=True)) as echo, plain() as client:
        native = echo._socket.receive
        codes = [10054] * 5 + [10052] * 5
        monkeypatch.setattr(echo._socket, "receive", lambda op: codes.pop() if codes else native(op))
        client.sendto(b"a", echo.address)
        assert client.recv(10) == b"a"
        assert [exc.winerror for exc in echo.until(10, "error")].count(10054) == 5
        for _ in range(20):
            client.sendto(b"b", echo.address)
            assert client.recv(10) == b"b"
        assert echo.stats().receives.in_use >= 7
        assert echo.stats().receive_errors == 10
        assert echo._engine.stats().resource_retries == 0


@pytest.mark.parametrize("code", [NO_BUFFERS, 10050])
def test_errors_that_last_are_retried_later(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    with running(Echo(recv_depth=2, report_errors=True)) as echo, plain() as client:
        native = echo._socket.receive
        codes = [code] * 3
        monkeypatch.setattr(echo._socket, "receive", lambda op: codes.pop() if codes else native(op))
        for number in range(10):
            client.sendto(b"%d" % number, echo.address)
            assert client.recv(10) == b"%d" % number
        wait_until(lambda: not codes and echo.stats().receives.in_use == 2)
        assert echo._engine.stats().resource_retries == 3
        assert len(echo.values("error")) == (0 if code == NO_BUFFERS else 3)


@pytest.mark.parametrize("status", [0xC000023F, 0xC000023D, 0xC0000236, 0xC000009A, 0xC0FFEE])
def test_receives_that_fail_are_posted_again(status: int) -> None:
    class Failing(Echo):
        failures = 20
        counting = threading.Lock()

        def _received(self, operation: Any, transferred: int, given: int) -> None:
            with self.counting:
                if self.failures and not given:
                    self.failures -= 1
                    given = status
            super()._received(operation, transferred, given)

    with running(Failing(report_errors=True)) as failing, plain() as client:
        for _ in range(20):
            client.sendto(b"lost", failing.address)
        wait_until(lambda: failing.stats().receive_errors == 20)
        for number in range(20):
            client.sendto(b"%d" % number, failing.address)
            assert client.recv(10) == b"%d" % number
        wait_until(lambda: failing.stats().receives.in_use == 8)
        assert len(failing.values("error")) == (0 if status == 0xC000009A else 20)


def test_calls_of_on_error_are_bounded() -> None:
    gate = threading.Event()

    class Slow(Probe):
        def got(self, data: bytes, address: Any) -> None:
            gate.wait(10)

    with running(Slow(report_errors=True)) as slow, plain() as client:
        client.sendto(b"x", slow.address)
        slow.until(1)
        for _ in range(200):
            assert slow.send_to(b"x", ("255.255.255.255", 9)) is False
        assert slow.stats().send_errors == 200
        gate.set()
        slow.until(_datagramchannel.ERRORS_WAITING_MAX, "error")
        client.sendto(b"y", slow.address)
        slow.until(2)
        assert len(slow.values("error")) == _datagramchannel.ERRORS_WAITING_MAX


def test_addresses_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_datagramchannel, "ADDRESSES_MAX", 4)
    with running(Echo()) as echo:
        for _ in range(20):
            with plain() as client:
                client.sendto(b"x", echo.address)
                assert client.recv(10) == b"x"
                assert echo.senders[-1] == client.getsockname()
        assert len(echo._senders) <= 4
        assert len(echo._targets) <= 4

"""One contract for the real and for the fakes, so that what the tests of faults rely on is true."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import STATUS_RESET, AtOnce, FakeClock, FakeEngine, FakePort, FakeSocket, FakeWatchdog
from support import wait_until

from iocp_ctypes import _dispatcher, _win32
from iocp_ctypes._dispatcher import Dispatcher
from iocp_ctypes._fileops import TransmitOperation, open_source
from iocp_ctypes._flow import SEND_GATHER_MAX, Piece
from iocp_ctypes._port import KEY_IO, Batch, CompletionPort
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation, Proactor
from iocp_ctypes._sockops import OverlappedSocket, error_code
from iocp_ctypes.watchdog import Watchdog

PATIENCE = 10
PATIENCE_MS = 1000 * PATIENCE

# -- ports --------------------------------------------------------------------------------------------------


class RealPort(CompletionPort):
    __slots__ = ()

    def put(self, *packets: tuple[int, int]) -> None:
        for address, transferred in packets:
            assert _win32.PostQueuedCompletionStatus(self._handle, transferred, KEY_IO, address)


@pytest.fixture(params=[RealPort, FakePort, lambda: FakePort(lifo=True)], ids=["real", "fake", "fake-lifo"])
def port(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.close()


def reap(port: Any, size: int = 64, timeout_ms: int = PATIENCE_MS) -> list[tuple[Any, int]]:
    ready: deque[tuple[Any, int]] = deque()
    assert port.reap(Batch(size), timeout_ms, ready) == len(ready)
    return list(ready)


def test_a_port_gives_back_what_was_put_in_order_and_by_batches(port: Any) -> None:
    port.post()
    port.put(*((number << 4, number) for number in range(1, 10)))
    assert reap(port, 1) == [(0, 0)]
    assert reap(port, 4) == [(number << 4, number) for number in range(1, 5)]
    assert reap(port, 64) == [(number << 4, number) for number in range(5, 10)]
    assert reap(port, 64, 0) == []
    assert reap(port, 64, 1) == []


def test_a_port_wakes_who_waits(port: Any) -> None:
    taken: list[Any] = []
    threads = [threading.Thread(target=lambda: taken.extend(reap(port, 1, 0xFFFFFFFF))) for _ in range(3)]
    for thread in threads:
        thread.start()
    port.put((16, 1), (32, 2))
    port.post()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(taken) == [(0, 0), (16, 1), (32, 2)]


def test_a_port_takes_a_socket_once(port: Any) -> None:
    with socket.socket() as sock:
        port.associate(sock.fileno())
        with pytest.raises(OSError, match="already belongs to another completion port") as caught:
            port.associate(sock.fileno())
        assert caught.value.winerror == 10022


def test_a_closed_port_refuses_all(port: Any) -> None:
    port.close()
    for refused in (port.post, lambda: reap(port, 1, 0), lambda: port.associate(1)):
        with pytest.raises(OSError, match=r"port|Status") as caught:
            refused()
        assert caught.value.winerror == 10038


# -- sockets ------------------------------------------------------------------------------------------------


class RealEnd:
    """A real socket with its port and its peer."""

    def __init__(self, skips: bool) -> None:
        self.port = CompletionPort()
        self.proactor = Proactor()
        left, self.peer = socket.socketpair()
        self.peer.settimeout(PATIENCE)
        self.sock: Any = OverlappedSocket(left.detach(), socket.AF_INET, self.proactor)
        if skips:
            self.sock.associate(self.port)
        else:
            self.port.associate(self.sock._handle)

    def deliver(self, data: bytes) -> None:
        if data:
            self.peer.sendall(data)
        else:
            self.peer.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00")
        self.peer.close()

    def got(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += self.peer.recv(count)
        return data

    def arrived(self) -> None:
        """Wait until what was delivered is there."""
        operation = Operation(0)
        if self.sock.receive(operation) == COMPLETED:
            del self.proactor.pending[operation.address]
        else:
            self.next()

    def next(self) -> tuple[Operation, int, int]:
        ready: deque[tuple[Any, int]] = deque()
        assert self.port.reap(Batch(1), PATIENCE_MS, ready) == 1
        address, transferred = ready.popleft()
        operation = self.proactor.pending.pop(address)
        return operation, transferred, operation.Internal

    def nothing_comes(self) -> bool:
        return not self.port.reap(Batch(1), 0, deque())

    def end(self) -> None:
        self.sock.cancel()
        while self.proactor.pending:
            self.next()
        self.sock.close()
        self.peer.close()
        self.port.close()


class FakeEnd:
    """A fake one."""

    def __init__(self, skips: bool) -> None:
        self.engine = FakeEngine()
        self.proactor = self.engine.proactor
        self.sock: Any = FakeSocket(self.engine, skips)
        self.taken = 0
        self.sock.plan_sends.extend([AtOnce()] * 100)

    def deliver(self, data: bytes) -> None:
        self.sock.deliver(data)

    def reset(self) -> None:
        self.sock.fail_receive(STATUS_RESET)

    def got(self, count: int) -> bytes:
        data = bytes(self.sock.sent[self.taken : self.taken + count])
        self.taken += count
        return data

    def arrived(self) -> None:
        """It is there."""

    def next(self) -> tuple[Operation, int, int]:
        address, transferred = self.engine.dispatcher.ready.popleft()
        operation = self.proactor.pending.pop(address)
        return operation, transferred, operation.Internal

    def nothing_comes(self) -> bool:
        return not self.engine.dispatcher.ready

    def end(self) -> None:
        self.sock.cancel()
        while self.proactor.pending:
            self.next()
        self.sock.close()


End = RealEnd | FakeEnd


@pytest.fixture(
    params=[(RealEnd, True), (RealEnd, False), (FakeEnd, True), (FakeEnd, False)],
    ids=["real-skips", "real-packets", "fake-skips", "fake-packets"],
)
def end(request: pytest.FixtureRequest) -> Iterator[End]:
    kind, skips = request.param
    made = kind(skips)
    yield made
    made.end()
    assert not made.proactor.pending


def receive(end: End, size: int) -> tuple[Operation, int, int]:
    """Receive what is there, in whichever way it comes."""
    operation = Operation(size)
    code = end.sock.receive(operation)
    if code == COMPLETED:
        assert end.proactor.pending.pop(operation.address) is operation
        return operation, int(operation.InternalHigh), 0
    assert code == PENDING
    return end.next()


def next_of(end: End, count: int) -> list[tuple[Operation, int, int]]:
    """Take the next packets, in whichever order they come."""
    return [end.next() for _ in range(count)]


def test_a_receive_is_pending_until_bytes_come(end: End) -> None:
    operation = Operation(10)
    assert end.sock.receive(operation) == PENDING
    assert end.proactor.pending == {operation.address: operation}
    assert end.nothing_comes()
    end.deliver(b"hello")
    assert end.next() == (operation, 5, 0)
    assert (operation.InternalHigh, operation.buffer[:5]) == (5, b"hello")
    assert end.nothing_comes()


def test_a_transmit_sends_header_file_and_trailer(end: End) -> None:
    assert end.sock.transmits
    with tempfile.TemporaryFile() as file:
        file.write(b"FFFFFF")
        source = open_source(file, 2, 3)
    operation = TransmitOperation(source, 3, b"head", b"tail")
    code = end.sock.transmit(operation, lambda *_: None)
    if code == COMPLETED:
        assert end.sock.skips
        assert operation.InternalHigh == 11
    else:
        assert code == PENDING
        assert end.next() == (operation, 11, 0)
    assert end.got(11) == b"headFFFtail"
    assert end.nothing_comes()
    source.close()


def test_both_say_what_they_can_do(end: End) -> None:
    assert (end.sock.half_closes, end.sock.detachable) == (True, True)
    assert end.sock.gather_max == SEND_GATHER_MAX


def test_more_than_a_buffer_takes_comes_in_several(end: End) -> None:
    end.deliver(b"hello world")
    end.arrived()
    parts = []
    for size in (4, 4, 100):
        operation, transferred, status = receive(end, size)
        assert status == 0
        parts.append(operation.buffer[:transferred])
    assert parts == [b"hell", b"o wo", b"rld"]


def test_a_receive_of_no_bytes_takes_none(end: End) -> None:
    operation = Operation(0)
    assert end.sock.receive(operation) == PENDING
    assert end.nothing_comes()
    end.deliver(b"hello")
    assert end.next() == (operation, 0, 0)
    operation, transferred, _status = receive(end, 10)
    assert operation.buffer[:transferred] == b"hello"


def test_the_end_comes_after_the_bytes_and_stays(end: End) -> None:
    end.deliver(b"last")
    end.deliver(b"")
    end.arrived()
    operation, transferred, _status = receive(end, 10)
    assert operation.buffer[:transferred] == b"last"
    for size in (10, 0, 10):
        _operation, transferred, status = receive(end, size)
        assert (transferred, status) == (0, 0)


def test_receives_are_filled_in_their_order(end: End) -> None:
    operations = [Operation(3) for _ in range(3)]
    for operation in operations:
        assert end.sock.receive(operation) == PENDING
    end.deliver(b"abc")
    end.deliver(b"def")
    for expected, data in zip(operations, (b"abc", b"def"), strict=False):
        operation, transferred, _status = end.next()
        assert operation is expected
        assert operation.buffer[:transferred] == data
    assert end.nothing_comes()


def test_a_reset_fails_the_receive(end: End) -> None:
    operation = Operation(10)
    assert end.sock.receive(operation) == PENDING
    end.reset()
    done, transferred, status = end.next()
    assert (done, transferred, error_code(status)) == (operation, 0, 10054)


def test_a_cancel_ends_all_that_is_pending(end: End) -> None:
    operations = [Operation(10) for _ in range(3)]
    for operation in operations:
        assert end.sock.receive(operation) == PENDING
    end.sock.cancel()
    told = [end.next() for _ in operations]
    assert {operation.address for operation, _count, _status in told} == {op.address for op in operations}
    assert {(count, error_code(status)) for _operation, count, status in told} == {(0, 995)}
    end.sock.cancel()
    assert end.nothing_comes()


def test_several_receives_have_their_share_and_each_the_end(end: End) -> None:
    """What comes at once fills as many receives as it takes; at the end all that are left are empty."""
    operations = [Operation(3) for _ in range(6)]
    for operation in operations:
        assert end.sock.receive(operation) == PENDING
        assert not operation.done
    end.deliver(b"abcdefgh")
    told = {
        operation.address: (operation.buffer[:count], status) for operation, count, status in next_of(end, 3)
    }
    assert [told.get(operation.address) for operation in operations[:3]] == [
        (b"abc", 0),
        (b"def", 0),
        (b"gh", 0),
    ]
    assert [operation.done for operation in operations] == [True] * 3 + [False] * 3
    end.deliver(b"")
    assert {(count, status) for _operation, count, status in next_of(end, 3)} == {(0, 0)}
    assert all(operation.done for operation in operations)


def test_one_receive_can_be_cancelled_and_the_others_go_on(end: End) -> None:
    operations = [Operation(10) for _ in range(3)]
    for operation in operations:
        assert end.sock.receive(operation) == PENDING
    end.sock.cancel_receive(operations[1])
    operation, count, status = end.next()
    assert (operation, count, error_code(status)) == (operations[1], 0, 995)
    for operation, data in ((operations[0], b"first"), (operations[2], b"second")):
        end.deliver(data)
        assert end.next() == (operation, len(data), 0)
        assert operation.buffer[: len(data)] == data
    end.sock.cancel_receive(operations[0])  # which is done: nothing happens
    assert end.nothing_comes()


def test_a_receive_that_is_done_cannot_be_cancelled(end: End) -> None:
    operation = Operation(10)
    assert end.sock.receive(operation) == PENDING
    end.deliver(b"hello")
    end.sock.cancel_receive(operation)
    done, count, status = end.next()
    if status:  # the system was not quick enough to fill it: then nothing was taken
        assert (count, error_code(status)) == (0, 995)
        done, count, status = receive(end, 10)
    assert (status, done.buffer[:count]) == (0, b"hello")
    assert end.nothing_comes()


def test_bytes_are_sent_in_the_order_of_the_calls(end: End) -> None:
    handled: list[Any] = []

    def handler(*told: Any) -> None:
        handled.append(told)

    expected = b""
    for number in range(5):
        operation = end.proactor.take_send()
        data = b"<%d>" % number
        if number % 2:
            operation.load(data)
            code = end.sock.send(operation, handler)
            expected += data
        else:
            vector, count = operation.load_pieces([Piece(data, 1, 2), Piece(b"gathered", 0, 8)])
            code = end.sock.send(operation, handler, vector, count)
            expected += data[1:2] + b"gathered"
        if code == COMPLETED:
            assert end.sock.skips
            assert operation.InternalHigh == operation.length
        else:
            assert code == PENDING
            assert end.next() == (operation, operation.length, 0)
        assert operation.handler is handler
        assert not end.proactor.pending
    assert end.got(len(expected)) == expected
    assert not handled, "calling it is for who retires the operation"


def test_a_packet_comes_for_what_is_done_at_once_unless_it_is_skipped(end: End) -> None:
    operation = end.proactor.take_send()
    operation.load(b"x")
    code = end.sock.send(operation, lambda *_told: None)
    assert code == (COMPLETED if end.sock.skips else PENDING)
    if code == PENDING:
        assert end.next() == (operation, 1, 0)
    assert end.nothing_comes()


# -- dispatchers --------------------------------------------------------------------------------------------


class RealServing:
    def __init__(self) -> None:
        self.port = CompletionPort()
        self.proactor = Proactor()
        self.watchdog = Watchdog()
        self.watchdog.start()
        self.dispatcher: Any = Dispatcher(self.port, self.proactor, 1, lambda _seconds, _function: None)
        self.dispatcher.start()

    def settle(self, done: Callable[[], bool]) -> None:
        wait_until(done)

    def end(self) -> None:
        assert self.dispatcher.stop(PATIENCE)
        assert self.watchdog.stop(PATIENCE)
        self.port.close()


class FakeServing:
    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.proactor = self.engine.proactor
        self.dispatcher: Any = self.engine.dispatcher

    def settle(self, done: Callable[[], bool]) -> None:
        self.dispatcher.run()
        assert done()

    def end(self) -> None: ...


@pytest.mark.parametrize("kind", [RealServing, FakeServing])
def test_a_dispatcher_serves_calls_and_operations_in_turn(kind: Any) -> None:
    serving = kind()
    told: list[Any] = []

    def handler(*arguments: Any) -> None:
        told.append((*arguments, operation.address in serving.proactor.pending))

    operation = Operation()
    operation.handler = handler
    operation.Internal = 0xC0000120
    serving.proactor.pending[operation.address] = operation
    dispatcher = serving.dispatcher

    def first() -> None:
        told.append((dispatcher.is_io_thread(), dispatcher.is_serving()))
        dispatcher.call_soon(lambda: told.append("second"))
        dispatcher.completed(operation.address, 7)
        told.append("first")

    assert (dispatcher.is_io_thread(), dispatcher.is_serving()) == (False, False)
    dispatcher.call_soon(first)
    serving.settle(lambda: len(told) == 4)
    assert told == [(True, True), "first", "second", (operation, 7, 0xC0000120, False)]
    serving.end()


@pytest.mark.parametrize("kind", [RealServing, FakeServing])
@pytest.mark.parametrize("crowded", [False, True])
def test_a_dispatcher_puts_off_what_may_wait_where_that_is_a_crowd(
    kind: Any, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatcher, "CROWD", 0 if crowded else 1000)
    serving = kind()
    if kind is FakeServing:
        serving.dispatcher.crowded = crowded
    told: list[Any] = []

    def first() -> None:
        told.append(serving.dispatcher.defer(lambda: told.append("deferred")))

    serving.dispatcher.call_soon(first)
    serving.settle(lambda: len(told) == 1 + crowded)
    assert told == [crowded, *["deferred"] * crowded]
    serving.end()


# -- watchdogs ----------------------------------------------------------------------------------------------


class RealTime:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.watchdog: Any = Watchdog(self.clock)
        self.watchdog.start()

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        for _ in range(3):  # what an action of the first has set for now may be behind the second
            looked = threading.Event()
            self.watchdog.at(float("-inf"), looked.set)
            assert looked.wait(PATIENCE)

    def end(self) -> None:
        assert self.watchdog.stop(PATIENCE)


class FakeTime:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.watchdog: Any = FakeWatchdog(self.clock)

    def advance(self, seconds: float) -> None:
        self.watchdog.advance(seconds)

    def end(self) -> None: ...


@pytest.mark.parametrize("kind", [RealTime, FakeTime])
def test_a_watchdog_calls_what_is_due_and_not_before(kind: Any) -> None:
    time = kind()
    called: list[str] = []
    watchdog = time.watchdog
    assert watchdog.clock is time.clock
    watchdog.at(1002.0, lambda: called.append("b"))
    watchdog.later(1.0, lambda: called.append("a"))
    cancelled = watchdog.later(1.0, lambda: called.append("never"))
    watchdog.cancel(cancelled)
    watchdog.later(3.0, lambda: watchdog.later(0.0, lambda: called.append("c")))
    assert len(watchdog) == 3
    time.advance(0.999)
    assert called == []
    time.advance(0.001)
    assert called == ["a"]
    time.advance(2)
    assert called == ["a", "b", "c"]
    assert len(watchdog) == 0
    time.end()

"""connection.py: the face of a connection, which is each callback, method, property and tunable of it."""

from __future__ import annotations

import array
import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Echo,
    Recorder,
    echoes,
    ended,
    made,
    raw,
    read_all,
    read_exactly,
    serving,
    wait_until,
)

from iocp_ctypes import CloseReason, Connection, ConnectionClosedError, Usage, _channel, _win32

#: More than the kernel takes for a peer that does not read, and less than write_buffer_max.
STUCK = bytes(range(256)) * (8 << 12)
SOON = 0.05  # seconds in which nothing may happen; too short a time can only hide a defect, never show one


@pytest.fixture
def sends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many buffers each WSASend had, in the order of the calls."""
    counts: list[int] = []
    real = _win32.hot_send

    def spy(*args: Any) -> Any:
        counts.append(args[2])
        return real(*args)

    monkeypatch.setattr(_win32, "hot_send", spy)
    return counts


@pytest.fixture
def pair() -> Iterator[tuple[Any, socket.socket]]:
    """A recorded connection and its client."""
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        yield connection, client


def stick(connection: Connection, size: int = len(STUCK)) -> None:
    """Send so much to a client that does not read that bytes stay with us."""
    connection.send(STUCK[:size])
    assert connection.write_buffer_size > 0


def read_until_cut(client: socket.socket) -> bytes:
    """Read until the end, which may be a reset, and under Wine look like EOF."""
    parts: list[bytes] = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


# -- callbacks ----------------------------------------------------------------------------------------------


def test_callbacks_come_in_their_order(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    client.sendall(b"one")
    connection.until("data")
    client.sendall(b"two")
    connection.until("data", 2)
    client.close()
    connection.until("close")
    assert connection.names == ["connect", "data", "data", "eof", "close"]
    assert [call.value for call in connection.calls[1:3]] == [b"one", b"two"]
    assert all(type(call.value) is bytes for call in connection.calls[1:3])
    assert connection.calls[-1].value is None, "a clean end has no exception"
    connection.check()


def test_a_connection_without_callbacks_takes_everything() -> None:
    with serving(Connection) as server:
        with raw(server.address) as client:
            client.sendall(STUCK)
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b""
        wait_until(lambda: server.stats().closed == {"eof": 1})
        assert server.stats().bytes_received == len(STUCK)


def test_a_subclass_may_have_a_constructor_of_its_own_and_attributes() -> None:
    class Own(Connection):
        def __init__(self, server: Any, peer_address: Any) -> None:
            self.seen = (server, peer_address)

        def on_data(self, data: bytes) -> None:
            self.send(data)

    with serving(Own) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = server.connections
        assert connection.seen == (server, client.getsockname())


def test_on_eof_that_returns_true_keeps_the_other_direction() -> None:
    class HalfOpen(Recorder):
        def ended(self) -> bool:
            return True

    with serving(HalfOpen) as server, raw(server.address) as client:
        (connection,) = made(HalfOpen)
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        connection.until("eof")
        assert not connection.closing
        connection.send(b"an answer, ")
        connection.send(STUCK)
        connection.close()
        assert read_all(client) == b"an answer, " + STUCK
        connection.until("close")
        assert connection.names == ["connect", "data", "eof", "close"]
        assert connection.close_reason == "local"
        connection.check()


def test_on_eof_comes_once_however_often_reading_is_paused_and_resumed() -> None:
    class HalfOpen(Recorder):
        def ended(self) -> bool:
            self.pause_reading()
            self.resume_reading()
            return True

    with serving(HalfOpen) as server, raw(server.address) as client:
        (connection,) = made(HalfOpen)
        client.shutdown(socket.SHUT_WR)
        connection.until("eof")
        for _ in range(3):
            connection.pause_reading()
            connection.resume_reading()
        passed = threading.Event()
        connection.call_soon(passed.set)  # after all that was posted before
        assert passed.wait(PATIENCE)
        assert connection.names == ["connect", "eof"]
        connection.close()
        connection.until("close")
        connection.check()


def test_close_in_on_connect_leaves_nothing_but_on_close() -> None:
    class Shy(Recorder):
        def connected(self) -> None:
            self.close()

    with serving(Shy) as server, raw(server.address) as client:
        client.sendall(b"in vain")
        assert read_all(client) == b""
        client.close()
        (connection,) = made(Shy)
        connection.until("close")
        assert connection.names == ["connect", "close"]
        assert connection.bytes_received == 0


# -- sending ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["text", 1, None, [1, 2], object()])
@pytest.mark.parametrize("method", ["send", "send_many"])
def test_sending_what_is_not_bytes_is_a_type_error(
    pair: tuple[Recorder, socket.socket], method: str, wrong: Any
) -> None:
    connection, client = pair
    with pytest.raises(TypeError, match=type(wrong).__name__) as caught:
        connection.send(wrong) if method == "send" else connection.send_many([b"never sent", wrong])
    assert ("encode" in str(caught.value)) == isinstance(wrong, str), "only a str has an obvious remedy"
    connection.send(b"and it goes on")
    assert read_exactly(client, 14) == b"and it goes on"


@pytest.mark.parametrize(
    "make", [bytearray, lambda data: memoryview(bytearray(data)), lambda data: array.array("B", data)]
)
def test_what_can_change_is_copied(
    pair: tuple[Recorder, socket.socket], make: Callable[[bytes], Any]
) -> None:
    connection, client = pair
    stick(connection)
    one, two = make(b"as it was"), make(b"as it was, too")
    connection.send(one)
    connection.send_many([two])
    one[:2] = two[:2] = make(b"is")
    if isinstance(one, bytearray):
        one.clear()  # nor is it locked
    assert read_exactly(client, len(STUCK)) == STUCK
    assert read_exactly(client, 23) == b"as it was" + b"as it was, too"


def test_bytes_are_kept_uncopied_until_they_are_sent(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    stick(connection)
    data = bytes(bytearray(b"kept" * 100))
    before = sys.getrefcount(data)
    connection.send(data)
    connection.send_many([data, data])
    assert sys.getrefcount(data) >= before + 3
    assert read_exactly(client, len(STUCK) + 3 * len(data)) == STUCK + 3 * data
    wait_until(lambda: connection.write_buffer_size == 0)
    client.sendall(b"a turn for what is kept for use again")
    connection.until("data")
    connection.send(b"x")
    wait_until(lambda: sys.getrefcount(data) <= before + 3, what="references")


def test_an_empty_send_is_a_no_op(pair: tuple[Recorder, socket.socket], sends: list[int]) -> None:
    connection, client = pair
    assert connection.send(b"") is True
    assert connection.send(bytearray()) is True
    assert connection.send_many([]) is True
    assert connection.send_many([b"", bytearray()]) is True
    assert sends == []
    assert connection.send_many([b"", b"so", b"", b"me", b""]) is True
    assert read_exactly(client, 4) == b"some"
    assert len(sends) == 1


def test_send_many_is_one_call_for_ten_buffers(
    pair: tuple[Recorder, socket.socket], sends: list[int]
) -> None:
    connection, client = pair
    buffers = [b"%d " % number * number for number in range(1, 11)]
    assert connection.send_many(buffers) is True
    assert read_exactly(client, sum(map(len, buffers))) == b"".join(buffers)
    assert sends == [10]
    wait_until(lambda: connection.write_buffer_size == 0)
    wait_until(lambda: connection.bytes_sent == sum(map(len, buffers)))


def test_send_many_takes_any_number_of_any_buffers(
    pair: tuple[Recorder, socket.socket], sends: list[int]
) -> None:
    connection, client = pair
    kinds = (bytes, bytearray, lambda data: memoryview(data))
    buffers = [kinds[number % 3](b"%d," % number) for number in range(1000)]
    connection.send_many(buffer for buffer in buffers)
    joined = b"".join(map(bytes, buffers))
    assert read_exactly(client, len(joined)) == joined
    assert 1000 / 64 <= len(sends) <= 1000 / 64 + 1


def test_send_says_when_to_wait_and_on_drain_when_to_go_on(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    assert connection.send(b"little") is True
    stick(connection)
    assert connection.send(b"more") is False
    size = connection.write_buffer_size
    assert size > connection.high_mark
    assert "drain" not in connection.names
    read_exactly(client, 6 + len(STUCK) + 4)
    connection.until("drain")
    wait_until(lambda: connection.write_buffer_size == 0)
    assert connection.send(b"little") is True
    assert connection.names.count("drain") == 1


@pytest.mark.parametrize("end", ["close", "abort", "send_eof", "peer"])
def test_sending_after_the_end_is_refused(pair: tuple[Recorder, socket.socket], end: str) -> None:
    connection, client = pair
    if end == "peer":
        client.close()
        connection.until("close")
    else:
        getattr(connection, end)()
    for send in (lambda: connection.send(b"x"), lambda: connection.send_many([b"x"])):
        with pytest.raises(ConnectionClosedError, match=str(connection.id)):
            send()
    assert issubclass(ConnectionClosedError, ConnectionError)
    assert connection.bytes_sent == 0


def test_sending_in_on_close_is_refused() -> None:
    class Late(Recorder):
        refused = 0

        def gone(self, exc: OSError | None) -> None:
            for late in (lambda: self.send(b"x"), self.send_eof, lambda: self.call_soon(print)):
                try:
                    late()
                except ConnectionClosedError:
                    self.refused += 1

    with serving(Late) as server, raw(server.address) as client:
        (connection,) = made(Late)
        connection.close()
        assert ended(client) == "eof"
        client.close()
        connection.until("close")
        wait_until(lambda: connection.refused == 3)


# -- the end ------------------------------------------------------------------------------------------------


def test_send_eof_ends_one_direction_only(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    stick(connection)
    connection.send_eof()
    connection.send_eof()
    assert read_all(client) == STUCK
    assert not connection.closing
    connection.until("drain")
    client.sendall(b"still heard")
    assert connection.until("data").value == b"still heard"
    client.close()
    connection.until("close")
    assert connection.names[-3:] == ["data", "eof", "close"]
    assert connection.close_reason == "eof"
    with pytest.raises(ConnectionClosedError):
        connection.send_eof()


def test_send_eof_after_the_peers_is_the_end() -> None:
    class HalfOpen(Recorder):
        def ended(self) -> bool:
            return True

    with serving(HalfOpen) as server, raw(server.address) as client:
        (connection,) = made(HalfOpen)
        client.shutdown(socket.SHUT_WR)
        connection.until("eof")
        connection.send(b"last words")
        connection.send_eof()
        assert read_all(client) == b"last words"
        assert connection.until("close").value is None
        assert connection.close_reason == "eof"
        connection.check()


def test_close_delivers_what_was_sent_and_says_what_it_is_doing(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    stick(connection)
    connection.close()
    connection.close()
    assert connection.closing
    assert not connection.closed
    assert connection.close_reason is CloseReason.LOCAL
    assert connection.wait_closed(SOON) is False
    assert read_all(client) == STUCK
    client.close()
    assert connection.wait_closed(PATIENCE) is True
    assert connection.wait_closed() is True
    assert connection.closed
    assert not connection.closing
    connection.close()
    connection.abort()
    assert connection.names == ["connect", "close"]
    assert connection.calls[-1].value is None
    assert connection.close_reason == "local" == str(CloseReason.LOCAL)


def test_abort_resets_and_drops_what_was_not_sent(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    stick(connection)
    connection.abort()
    assert connection.wait_closed(PATIENCE) is True
    assert len(read_until_cut(client)) < len(STUCK)
    assert connection.names == ["connect", "close"]
    assert connection.close_reason == "aborted"
    assert connection.write_buffer_size == 0


@pytest.mark.wine_differs("reset-seen")
def test_abort_of_a_quiet_connection_is_a_reset(
    pair: tuple[Recorder, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, client = pair
    calls: list[Any] = []
    setsockopt, closesocket = _win32.setsockopt, _win32.closesocket

    def set_and_note(handle: int, level: int, name: int, value: Any, length: int) -> Any:
        calls.append((handle, level, name, bytes(value._obj), length))
        return setsockopt(handle, level, name, value, length)

    def close_and_note(handle: int) -> Any:
        calls.append(handle)
        return closesocket(handle)

    monkeypatch.setattr(_win32, "setsockopt", set_and_note)
    monkeypatch.setattr(_win32, "closesocket", close_and_note)
    handle = connection._socket._handle
    connection.abort()
    assert connection.until("close").value is None, "it is what we wanted"
    assert connection.close_reason is CloseReason.ABORTED
    linger = (handle, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH", 1, 0), 4)
    assert [call for call in calls if call in (linger, handle)] == [linger, handle]
    seen = ended(client)
    assert seen == "reset" or (_win32.is_wine() and seen == "eof")


def test_abort_cuts_a_close_short(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    stick(connection)
    connection.close()
    connection.abort()
    assert connection.wait_closed(PATIENCE) is True
    assert connection.close_reason == "local", "the first reason wins"
    assert len(read_until_cut(client)) < len(STUCK)


def test_everybody_may_close_at_once() -> None:
    with serving(Recorder) as server:
        for _ in range(20):
            with raw(server.address):
                connection = made(Recorder)[-1]
                wait_until(lambda seen=connection: seen.names)
                start = threading.Barrier(6)
                waited: list[bool] = []

                def end(
                    method: Callable[[], None], seen: Any = connection, ready: Any = start, out: Any = waited
                ) -> None:
                    ready.wait(PATIENCE)
                    method()
                    out.append(seen.wait_closed(PATIENCE))

                methods = (connection.close, connection.abort, connection.send_eof) * 2
                threads = [threading.Thread(target=_quietly, args=(end, method)) for method in methods]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(2 * PATIENCE)
            connection.until("close")
            connection.check()
            assert all(waited)
            Recorder.made.clear()


def _quietly(function: Callable[..., None], *args: Any) -> None:
    try:
        function(*args)
    except ConnectionClosedError:
        pass  # send_eof, where another was first


def test_wait_closed_waits_for_on_close_to_return() -> None:
    let_go = threading.Event()

    class Slow(Recorder):
        def gone(self, exc: OSError | None) -> None:
            assert let_go.wait(PATIENCE)

    with serving(Slow) as server, raw(server.address) as client:
        (connection,) = made(Slow)
        waited: list[bool] = []
        waiters = [threading.Thread(target=lambda: waited.append(connection.wait_closed())) for _ in range(3)]
        for waiter in waiters:
            waiter.start()
        client.close()
        connection.until("close")
        assert connection.closed
        assert connection.wait_closed(0) is False
        assert connection.wait_closed(SOON) is False
        assert waited == []
        let_go.set()
        for waiter in waiters:
            waiter.join(PATIENCE)
        assert waited == [True, True, True]
        assert connection.wait_closed(0) is True


@pytest.mark.parametrize("work_threads", [0, 2])
def test_wait_closed_in_a_callback_is_refused(work_threads: int) -> None:
    class Waiting(Recorder):
        refusals: list[str]

        def attempt(self, name: str) -> None:
            try:
                self.wait_closed(PATIENCE)
            except RuntimeError as exc:
                self.data = [*(self.data or ()), (name, "callback" in str(exc))]

        def connected(self) -> None:
            self.attempt("connect")

        def got(self, data: bytes) -> None:
            self.attempt("data")
            self.call_soon(self.attempt, "soon")

        def ended(self) -> None:
            self.attempt("eof")

        def gone(self, exc: OSError | None) -> None:
            self.attempt("close")

    with serving(Waiting, work_threads=work_threads) as server:
        with raw(server.address) as client:
            client.sendall(b"x")
            (connection,) = made(Waiting)
            connection.until("data")
            wait_until(lambda: len(connection.data or ()) == 3)
        assert connection.wait_closed(PATIENCE)
        assert connection.data == [(name, True) for name in ("connect", "data", "soon", "eof", "close")]


# -- time and tasks -----------------------------------------------------------------------------------------


def test_call_soon_keeps_the_order_and_does_not_overlap(io_threads: int) -> None:
    class Busy(Recorder):
        def got(self, data: bytes) -> None:
            self.call_soon(self.note, "inner")
            self.note("data")

        def note(self, *what: Any) -> None:
            self.data = [*(self.data or ()), what]

    with serving(Busy, io_threads=io_threads) as server, raw(server.address) as client:
        (connection,) = made(Busy)
        client.sendall(b"x")
        connection.until("data")
        wait_until(lambda: len(connection.data or ()) == 2)
        assert connection.data == [("data",), ("inner",)], (
            "a task comes after the callback it was asked for in"
        )

        def soon(number: int) -> None:
            with connection.record("soon"):
                connection.note(number)

        def ask(first: int) -> None:
            for number in range(first, first + 500):
                connection.call_soon(soon, number)

        askers = [threading.Thread(target=ask, args=(first,)) for first in (0, 1000, 2000)]
        for asker in askers:
            asker.start()
        for _ in range(100):
            client.sendall(b"y")
        for asker in askers:
            asker.join()
        wait_until(lambda: sum(isinstance(what[0], int) for what in list(connection.data)) == 1500)
        numbers = [what[0] for what in connection.data if isinstance(what[0], int)]
        for first in (0, 1000, 2000):
            assert [number for number in numbers if first <= number < first + 500] == list(
                range(first, first + 500)
            )
        connection.close()
        client.close()
        connection.until("close")
        connection.check()


def test_call_soon_after_the_end_is_refused_and_nothing_follows_on_close(io_threads: int) -> None:
    class Counting(Recorder):
        asked = ran = ran_after_close = 0

        def soon(self) -> None:
            self.ran += 1
            self.ran_after_close += "close" in self.names

    with serving(Counting, io_threads=io_threads) as server:
        for _ in range(20):
            client = raw(server.address)
            connection = made(Counting)[-1]
            connection.until("connect")

            def ask(seen: Any = connection) -> None:
                with contextlib.suppress(ConnectionClosedError):
                    while True:
                        seen.call_soon(seen.soon)
                        seen.asked += 1
                        if seen.asked - seen.ran > 1000:
                            time.sleep(0.001)

            asker = threading.Thread(target=ask)
            asker.start()
            wait_until(lambda seen=connection: seen.ran)
            connection.abort()
            client.close()
            asker.join(PATIENCE)
            assert not asker.is_alive()
            connection.until("close")
            wait_until(lambda seen=connection: seen.ran == seen.asked, what="every task that was taken runs")
            assert connection.ran_after_close == 0
            Counting.made.clear()


@pytest.mark.parametrize("wrong", ["1", True, [1], b"1"])
def test_set_deadline_refuses_what_is_no_number(pair: tuple[Recorder, socket.socket], wrong: Any) -> None:
    connection, _client = pair
    with pytest.raises(TypeError, match="seconds="):
        connection.set_deadline(wrong)


@pytest.mark.parametrize("wrong", [-1, -0.001, float("nan")])
def test_set_deadline_refuses_what_has_passed(pair: tuple[Recorder, socket.socket], wrong: float) -> None:
    connection, _client = pair
    with pytest.raises(ValueError, match="seconds="):
        connection.set_deadline(wrong)


# -- properties ---------------------------------------------------------------------------------------------


def test_properties_of_a_connection() -> None:
    began = time.monotonic()
    with serving(Echo) as server, raw(server.address) as client, raw(server.address) as other:
        wait_until(lambda: len(server.connections) == 2)
        connection, second = server.connections
        if connection.peer_address != client.getsockname():
            connection, second = second, connection
        assert connection.server is server
        assert connection.peer_address == client.getsockname()
        assert second.peer_address == other.getsockname()
        assert connection.local_address == client.getpeername() == server.address
        assert isinstance(connection.id, int)
        assert connection.id != second.id
        assert began <= connection.connected_at <= time.monotonic()
        assert connection.connected_at <= connection.last_activity
        assert (connection.closing, connection.closed, connection.close_reason) == (False, False, None)
        assert connection.tls is None
        assert connection.data is None
        connection.data = "mine"
        assert (connection.data, second.data) == ("mine", None)
        echoes(client, b"x" * 1234)
        wait_until(lambda: connection.bytes_sent == 1234)
        assert connection.bytes_received == 1234
        assert connection.write_buffer_size == 0
        assert (second.bytes_received, second.bytes_sent) == (0, 0)
        assert f"{client.getsockname()[1]}" in repr(connection)
        assert "open" in repr(connection)
        client.close()
        assert connection.wait_closed(PATIENCE)
        assert "closed" in repr(connection)
        assert connection.peer_address
        assert connection.local_address == server.address
        assert "not connected" in repr(Connection())


def test_last_activity_follows_bytes_in_and_out(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    for move in (lambda: client.sendall(b"in"), lambda: connection.send(b"out")):
        before = connection.last_activity
        # Windows' clock ticks every 16 ms.
        wait_until(lambda seen=before: time.monotonic() > seen)
        move()
        wait_until(lambda seen=before: connection.last_activity > seen)


# -- live tunables ------------------------------------------------------------------------------------------

GOOD: dict[str, list[Any]] = {
    "sendcap": [1, 1000],
    "recvburst": [1, 10_000],
    "recv_mode": ["flow", "zero-byte", "burst", "auto"],
    "high_mark": [16 * 1024, 1 << 20],
    "low_mark": [0, 64 * 1024],
    "idle_timeout": [30, 3600, None],
    "nodelay": [False, True],
    "keepalive": [30, (30, 5), None],
}
BAD: list[tuple[str, Any, type[Exception]]] = [
    ("sendcap", 0, ValueError),
    ("sendcap", 1001, ValueError),
    ("sendcap", True, TypeError),
    ("sendcap", 2.0, TypeError),
    ("sendcap", None, TypeError),
    ("sendcap", Usage(2, 0), TypeError),
    ("recvburst", 0, ValueError),
    ("recvburst", 10_001, ValueError),
    ("recvburst", False, TypeError),
    ("recvburst", "2", TypeError),
    ("recvburst", Usage(2, 0), TypeError),
    ("recv_mode", "fast", ValueError),
    ("recv_mode", None, TypeError),
    ("high_mark", -1, ValueError),
    ("high_mark", 16 * 1024 - 1, ValueError),  # below low_mark
    ("high_mark", (16 << 20) + 1, ValueError),  # above write_buffer_max
    ("high_mark", 65536.0, TypeError),
    ("low_mark", -1, ValueError),
    ("low_mark", 64 * 1024 + 1, ValueError),  # above high_mark
    ("low_mark", "0", TypeError),
    ("idle_timeout", 0, ValueError),
    ("idle_timeout", -1, ValueError),
    ("idle_timeout", float("nan"), ValueError),
    ("idle_timeout", float("inf"), ValueError),
    ("idle_timeout", "1", TypeError),
    ("nodelay", 1, TypeError),
    ("nodelay", None, TypeError),
    ("keepalive", 0, ValueError),
    ("keepalive", (1, 2, 3), ValueError),
    ("keepalive", (1, 0), ValueError),
    ("keepalive", [1, 2], TypeError),
    ("keepalive", True, TypeError),
]


def _value(connection: Connection, name: str) -> Any:
    value = getattr(connection, name)
    return value.cap if isinstance(value, Usage) else value


def test_good_values_of_tunables_are_this_connections_own() -> None:
    with serving(Echo) as server, raw(server.address) as client, raw(server.address) as other:
        wait_until(lambda: len(server.connections) == 2)
        connection, second = server.connections
        defaults = {name: _value(connection, name) for name in GOOD}
        for name, values in GOOD.items():
            for value in values:
                setattr(connection, name, value)
                assert _value(connection, name) == value
                assert _value(second, name) == defaults[name]
            setattr(connection, name, defaults[name])
        server.high_mark = 100_000
        assert connection.high_mark == defaults["high_mark"], (
            "the server's values hold for connections to come"
        )
        echoes(client)
        echoes(other)
        with raw(server.address) as late:
            echoes(late)
            newest = max(server.connections, key=lambda one: one.id)
            assert newest.high_mark == 100_000


def test_bad_values_of_tunables_change_nothing(pair: tuple[Recorder, socket.socket]) -> None:
    connection, _client = pair
    for name, value, error in BAD:
        before = {each: _value(connection, each) for each in GOOD}
        with pytest.raises(error) as caught:
            setattr(connection, name, value)
        assert name in str(caught.value), f"{name}={value!r}: the message does not name the option"
        assert isinstance(value, tuple) or repr(value) in str(caught.value)
        assert {each: _value(connection, each) for each in GOOD} == before, f"{name}={value!r}"


def test_read_only_properties_are(pair: tuple[Recorder, socket.socket]) -> None:
    connection, _client = pair
    for name in (
        "server",
        "peer_address",
        "local_address",
        "closing",
        "closed",
        "close_reason",
        "tls",
        "write_buffer_size",
    ):
        with pytest.raises(AttributeError):
            setattr(connection, name, None)


def _option(connection: Any, level: int, name: int) -> int:
    value, length = _win32.c_int(0), _win32.c_int(4)
    failed = _win32.getsockopt(
        connection._socket._handle, level, name, _win32.ctypes.byref(value), _win32.ctypes.byref(length)
    )
    assert not failed
    return int(value.value) & 0xFF  # of a BOOL Windows may write one byte only


def test_nodelay_and_keepalive_reach_the_socket(pair: tuple[Recorder, socket.socket]) -> None:
    connection, _client = pair
    assert _option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    connection.nodelay = False
    assert _option(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
    assert _option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    connection.keepalive = (30, 5)
    assert _option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    connection.keepalive = None
    assert _option(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_tunables_of_a_connection_that_ended_may_still_be_set(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    client.close()
    assert connection.wait_closed(PATIENCE)
    for name, values in GOOD.items():
        setattr(connection, name, values[0])
        assert _value(connection, name) == values[0]


def test_a_larger_sendcap_takes_effect_at_once(
    pair: tuple[Recorder, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_channel, "ENDING_THREADS_DROP", False)  # as on Windows; this thread lives on
    connection, client = pair
    connection.sendcap = 1
    stick(connection)
    assert connection.sendcap == Usage(1, 1)
    connection.sendcap = 3
    assert connection.sendcap == Usage(3, 3)
    connection.sendcap = 2
    assert connection.sendcap == Usage(2, 3), "what is in flight stays in flight"
    assert read_exactly(client, len(STUCK)) == STUCK
    wait_until(lambda: connection.sendcap == Usage(2, 0))


def test_idle_timeout_that_is_set_late_counts_from_the_last_byte(
    pair: tuple[Recorder, socket.socket],
) -> None:
    connection, client = pair
    connection.idle_timeout = 3600
    connection.idle_timeout = 0.2
    assert connection.until("timeout").value == "idle"
    connection.until("close")
    assert connection.close_reason == "idle"
    assert ended(client) in ("eof", "reset")

"""The end of a connection, across _channel.py, _lifetime.py, _sockops.py: what arrives, what is called.

Each of these ways to go wrong has been seen in servers on completion ports: bytes lost by closing, a handle
used by two, memory freed under the kernel, callbacks after the last one, tracebacks about lost peers.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
from collections.abc import Callable
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
    reachable,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)
from traffic import beside, chance

from iocp_ctypes import ConnectionClosedError, _win32
from iocp_ctypes._proactor import Operation, Proactor

MUCH = bytes(range(250)) * 32_000  # 8 MB: more than any system takes at once


# -- what was sent arrives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_off", ["close", "close_in_callback", "stop"])
def test_what_was_sent_before_the_end_arrives_whole(io_threads: int, cut_off: str) -> None:
    class Giving(Recorder):
        def got(self, data: bytes) -> None:
            self.send(MUCH)
            if cut_off == "close_in_callback":
                self.close()

    with serving(Giving, io_threads=io_threads, linger_timeout=60) as server, raw(server.address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        client.sendall(b"x")
        (connection,) = made(Giving)
        wait_until(lambda: connection.write_buffer_size or connection.closing)
        with beside(lambda: server.stop(30) if cut_off == "stop" else connection.close()):
            wait_until(lambda: connection.closing)
            assert connection.write_buffer_size > 1_000_000
            received = read_all(client)
            assert received == MUCH
            client.close()
        assert connection.until("close").value is None
        assert connection.bytes_sent == len(MUCH)


def test_an_answer_arrives_although_the_question_was_not_read_to_its_end() -> None:
    """The client reads when it has sent all: what it sends is taken, and not read by nobody, which would
    make a reset of the end."""

    class Refusing(Recorder):
        def got(self, data: bytes) -> None:
            self.send(b"too much" * 100)
            self.close()

    with serving(Refusing, linger_timeout=60) as server, raw(server.address, timeout=60) as client:
        client.sendall(MUCH)
        assert read_all(client) == b"too much" * 100
        client.close()
        (connection,) = made(Refusing)
        assert connection.until("close").value is None
        assert connection.close_reason == "local"
        assert connection.names.count("data") == 1


@pytest.mark.wine_differs("reset-seen")
def test_abort_is_a_reset_whatever_is_going_on() -> None:
    with serving(Recorder) as server:
        for going_on in ("nothing", "sending", "closing", "paused"):
            with raw(server.address) as client:
                wait_until(lambda: server.connections)
                (connection,) = server.connections
                connection.until("connect")
                if going_on in ("sending", "closing"):
                    connection.send(MUCH)
                if going_on == "closing":
                    connection.close()
                if going_on == "paused":
                    connection.pause_reading()
                connection.abort()
                assert connection.wait_closed(PATIENCE)
                with contextlib.suppress(ConnectionResetError, ConnectionAbortedError):
                    assert len(read_exactly(client, len(MUCH))) < len(MUCH)
                assert ended(client) == "reset"
                assert connection.close_reason == ("local" if going_on == "closing" else "aborted")
                assert connection.write_buffer_size == 0
            wait_until(lambda: not server.connections)


# -- ending is not an error ---------------------------------------------------------------------------------

ENDINGS: dict[str, Callable[[Any], object]] = {
    "close": lambda connection: connection.close(),
    "abort": lambda connection: connection.abort(),
    "close twice": lambda connection: (connection.close(), connection.close()),
    "abort twice": lambda connection: (connection.abort(), connection.abort()),
    "close, then abort": lambda connection: (connection.close(), connection.abort()),
    "abort, then close": lambda connection: (connection.abort(), connection.close()),
    "send_eof, then close": lambda connection: (connection.send_eof(), connection.close()),
    "abort, then cancel": lambda connection: (connection.abort(), connection._socket.cancel()),
}


@pytest.mark.wine_differs("local-close")
@pytest.mark.parametrize("pending", ["a receive", "a receive and sends"])
@pytest.mark.parametrize("how", ENDINGS)
def test_what_we_end_is_no_error(how: str, pending: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the cancelled operations say: 995, 64, or what Wine has for it."""
    caplog.set_level(logging.INFO, "iocp_ctypes")
    with serving(Echo, linger_timeout=0.2) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        if pending != "a receive":
            connection.send(MUCH)
        ENDINGS[how](connection)
        if "abort" not in how:
            assert len(read_all(client)) in (0, len(MUCH))
            client.close()
        exc = connection.until("close").value
        assert exc is None
        assert connection.close_reason == ("aborted" if how.startswith("abort") else "local")
        connection.check()
        ENDINGS[how](connection) if how in ("close", "abort") else None
        assert connection.names.count("close") == 1
    assert caplog.text == ""


def test_peers_that_reset_leave_no_trace_in_the_log(
    caplog: pytest.LogCaptureFixture, io_threads: int
) -> None:
    """Before, while and after we send, and while we close."""
    caplog.set_level(logging.DEBUG, "iocp_ctypes")
    caplog.clear()

    class Busy(Echo):
        def got(self, data: bytes) -> None:
            if data.startswith(b"much"):
                self.send(bytes(2_000_000))
            elif data.startswith(b"bye"):
                self.send(b"bye")
                self.close()
            else:
                super().got(data)

    with serving(Busy, io_threads=io_threads) as server:
        for number in range(200):
            client = raw(server.address)
            if number % 5:
                client.sendall((b"", b"x", b"much", b"bye", b"x" * 5000)[number % 5])
            if number % 3 == 0:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    client.recv(10)
            rst(client)
        wait_until(lambda: server.stats().accepted + server.stats().accept_failed == 200)
        wait_until(lambda: not server.stats().connections)
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert all(record.exc_info is None for record in caplog.records)
    for connection in Busy.made:
        connection.check()
        assert connection.close_reason in ("reset", "local", "aborted", "eof"), connection.close_reason


# -- once, and last -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["connect", "data", "eof", "close"])
@pytest.mark.parametrize("method", ["close", "abort", "send_eof", "wait_closed", "send"])
def test_anything_may_be_called_in_any_callback(where: str, method: str) -> None:
    outcomes: list[object] = []

    class Calling(Recorder):
        def call_in(self, name: str) -> None:
            if name == where:
                try:
                    outcomes.append(getattr(self, method)(*([b"y"] if method == "send" else [])))
                except Exception as exc:
                    outcomes.append(type(exc))

        def connected(self) -> None:
            self.call_in("connect")

        def got(self, data: bytes) -> None:
            self.call_in("data")

        def ended(self) -> None:
            self.call_in("eof")

        def gone(self, exc: OSError | None) -> None:
            self.call_in("close")

    with serving(Calling) as server, raw(server.address) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"x")
            client.shutdown(socket.SHUT_WR)
            read_all(client)
        (connection,) = made(Calling)
        connection.until("close")
        wait_until(lambda: outcomes)
        connection.check()
    (outcome,) = outcomes
    if method == "wait_closed":
        assert outcome is RuntimeError  # on_close could not come while it waits
    elif where == "close" and method in ("send", "send_eof"):
        assert outcome is ConnectionClosedError
    elif method == "send":
        assert outcome is True
    else:
        assert outcome is None


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("mode", ["auto", "flow", "zero-byte"])
@pytest.mark.parametrize("work_threads", [0, 1])
def test_data_that_arrives_as_the_connection_ends(how: str, mode: str, work_threads: int) -> None:
    """The packet was under way already: it says success, and it is the last one."""

    class Ending(Recorder):
        def _received(self, operation: Any, transferred: int, status: int) -> None:
            if not status and not self.closing:
                getattr(self, how)()  # as another thread may, before the packet is retired
            super()._received(operation, transferred, status)

    options = {"recv_mode": mode, "work_threads": work_threads, "linger_timeout": 0.2}
    with serving(Ending, **options) as server, raw(server.address) as client:
        client.sendall(b"late")
        (connection,) = made(Ending)
        connection.until("close")
        connection.check()
        assert connection.names == ["connect", "close"]


class Intruder:
    """A strand on whose way in, once, another thread has its moment."""

    def __init__(self, strand: Any, moment: Callable[[], object]) -> None:
        self._strand = strand
        self._moment: Callable[[], object] | None = moment

    def enter(self) -> bool:
        moment, self._moment = self._moment, None
        if moment is not None:
            moment()
        return bool(self._strand.enter())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strand, name)


@pytest.mark.parametrize("what", ["data", "eof", "drain"])
def test_on_close_is_the_last_even_where_it_overtakes(what: str) -> None:
    """Between a packet's look at the state and its callback, another thread ends the connection."""
    with (
        serving(Recorder, io_threads=4, high_mark=1000, low_mark=10) as server,
        raw(server.address) as client,
    ):
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: connection._reading == 1)

        def end() -> None:
            connection.abort()
            # Served by another I/O thread, where there is one to spare; else it follows at once.
            with contextlib.suppress(AssertionError):
                wait_until(lambda: "close" in connection.names, timeout=1)

        intruder = Intruder(connection._strand, end)
        connection._strand = intruder
        if what == "data":
            client.sendall(b"x")
        elif what == "eof":
            client.shutdown(socket.SHUT_WR)
        else:
            connection.send(MUCH)
            with contextlib.suppress(OSError):
                read_exactly(client, len(MUCH))
        connection.until("close")
    assert intruder._moment is None
    assert connection.names == ["connect", "close"]  # now that all threads have ended


# -- handles and memory -------------------------------------------------------------------------------------


def test_no_byte_ever_reaches_another_connection(io_threads: int) -> None:
    """Handles are used again as soon as they are closed: what comes late must not hit the next owner."""
    dice = chance()
    seeds = [dice.random() for _ in range(4)]
    rounds = 100

    class Token(Recorder):
        """Answers with the token that its client began with, and ends in any way."""

        def got(self, data: bytes) -> None:
            number = data[0]
            answer = data[:5] * (1 + number * 100)
            with contextlib.suppress(ConnectionClosedError):
                for _ in range(1 + number % 3):
                    self.send(answer)
            end = (self.close, self.abort, self.send_eof, lambda: None)[number % 4]
            threading.Thread(target=self.late, args=(answer, end)).start()

        def late(self, answer: bytes, end: Callable[[], object]) -> None:
            with contextlib.suppress(ConnectionClosedError):
                end()
                self.send(answer)
            self.close()

    with serving(Token, io_threads=io_threads, linger_timeout=0.5) as server:
        foreign: list[bytes] = []

        def clients(number: int) -> None:
            own = random.Random(seeds[number])
            for turn in range(rounds):
                token = bytes([own.randrange(16), number, turn % 256, own.randrange(256), 0xFF])
                with raw(server.address) as client, contextlib.suppress(ConnectionError):
                    client.sendall(token)
                    got = read_exactly(client, 1 + own.randrange(20_000)) if own.random() < 0.8 else b""
                    whole = len(got) // 5
                    if got != (token * (whole + 1))[: len(got)]:
                        foreign.append(got[:20])
                    if own.random() < 0.3:
                        rst(client)

        with beside(*(lambda number=number: clients(number) for number in range(4))):
            pass
        assert foreign == []
        wait_until(lambda: server.stats().accepted >= 4 * rounds * 0.9)
        server.close_clients()
        wait_until(lambda: not server.stats().connections)
        wait_until(lambda: not [t for t in threading.enumerate() if "(late)" in t.name])
    for connection in Token.made:
        if connection.calls:  # else it ended before it began
            connection.check()
        tokens = {data[:5] for data in (call.value for call in connection.calls if call.name == "data")}
        assert len(tokens) <= 1


class Checked(dict[int, Operation]):
    """A pending table that notes who is entered twice or keeps no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = 0
        self.faults: list[str] = []

    def __setitem__(self, address: int, operation: Operation) -> None:
        self.entered += 1
        if address in self:
            self.faults.append(f"{address:#x} is pending already")
        if address != operation.address:
            self.faults.append(f"{address:#x} is not the address of its operation")
        if operation.handler is None:
            self.faults.append(f"{address:#x} has no handler")
        super().__setitem__(address, operation)


def test_an_operation_is_pending_once_and_before_it_is_issued(
    monkeypatch: pytest.MonkeyPatch, io_threads: int
) -> None:
    tables: list[Checked] = []
    build = Proactor.__init__

    def building(self: Proactor) -> None:
        build(self)
        self.pending = Checked()
        tables.append(self.pending)

    monkeypatch.setattr(Proactor, "__init__", building)
    early: list[str] = []
    issued: list[str] = []
    for name in ("hot_receive", "hot_send"):
        real = getattr(_win32, name)

        def issuing(*args: Any, name: str = name, real: Any = real) -> Any:
            issued.append(name)
            if not any(
                args[5] is operation.overlapped for table in tables for operation in [*table.values()]
            ):
                early.append(name)
            return real(*args)

        monkeypatch.setattr(_win32, name, issuing)
    with serving(Echo, io_threads=io_threads, linger_timeout=0.2) as server:

        def visit() -> None:
            for number in range(60):
                with raw(server.address) as client:
                    echoes(client, bytes(1 + number * 50))
                    if number % 3 == 0:
                        server.abort_clients()
                    elif number % 3 == 1:
                        server.close_clients()

        def visits() -> None:
            for _ in range(4):
                with contextlib.suppress(ConnectionError, AssertionError):
                    visit()

        with beside(visits, visits, visits):
            pass
        wait_until(lambda: not server.stats().connections)
    (table,) = (table for table in tables if table.entered)
    assert table.entered > 100
    assert table.faults == []
    assert early == []
    assert {*issued} == {"hot_receive", "hot_send"}
    assert len(table) == 0


def test_cancelling_is_asking_and_the_packet_answers() -> None:
    """Cancelled twice, or with nothing in flight: no packet is made up and none is missed."""
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        connection.pause_reading()
        echoes_no_more = connection.names.count("data")
        client.sendall(b"a")
        wait_until(lambda: connection._reading == 0)  # nothing is in flight
        connection._socket.cancel()
        connection._socket.cancel()
        assert connection.names.count("data") == echoes_no_more
        connection.resume_reading()
        assert read_exactly(client, 1) == b"a"
        connection.abort()
        connection._socket.cancel()  # the handle is closed, or about to be
        assert connection.wait_closed(PATIENCE)
        connection.check()

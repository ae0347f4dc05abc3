"""_lifetime.py: how connections end, why, when, and what is left of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

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
    read_exactly,
    rst,
    serving,
    wait_until,
)
from traffic import LONG, beside, chance, cut

from iocp_ctypes import Connection, ConnectionClosedError, Server, _lifetime, _win32

SOON = 0.05  # seconds in which nothing may happen; too short a time can only hide a defect, never show one
MIB = 1 << 20
#: Windows' clock ticks every 16 ms: by so much less than a timeout may seem to have passed.
TICK = 0.02
STUCK = bytes(8 * MIB)


@pytest.fixture
def pair() -> Iterator[tuple[Any, socket.socket]]:
    """A recorded connection and its client."""
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        yield connection, client


class Timed(Recorder):
    """Notes when its timeouts came; goes on for as many as `patience` says."""

    patience = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.at: list[float] = []

    def timed_out(self, kind: str) -> bool:
        self.at.append(time.monotonic())
        return len(self.at) <= self.patience


# -- idle ---------------------------------------------------------------------------------------------------


def test_an_idle_connection_is_closed() -> None:
    with serving(Timed) as server, raw(server.address) as client:
        client.sendall(b"x")
        (connection,) = made(Timed)
        connection.until("data")
        connection.idle_timeout = 0.2
        exc = connection.until("close").value
        assert isinstance(exc, TimeoutError)
        assert "0.2 s" in str(exc)
        assert connection.names == ["connect", "data", "timeout", "close"]
        assert connection.calls[2].value == "idle"
        assert connection.at[0] - connection.last_activity >= 0.2 - TICK
        assert connection.close_reason == "idle"
        assert ended(client) in ("eof", "reset")
        wait_until(lambda: server.stats().reaped == 1)


def test_an_idle_connection_that_goes_on_is_asked_again_each_time() -> None:
    class Patient(Timed):
        patience = 2

    with serving(Patient, idle_timeout=0.15) as server, raw(server.address):
        (connection,) = made(Patient)
        connection.until("close")
        assert connection.names == ["connect", "timeout", "timeout", "timeout", "close"]
        for times, at in enumerate(connection.at, 1):  # one call may be late, and the next one not
            assert at - connection.connected_at >= times * 0.15 - TICK
        assert connection.close_reason == "idle"


@pytest.mark.parametrize("direction", ["in", "out"])
def test_who_talks_is_not_idle(direction: str) -> None:
    idle = 1.0

    class Patient(Timed):
        patience = 1000

    with serving(Patient, idle_timeout=idle) as server, raw(server.address) as client:
        (connection,) = made(Patient)
        connection.until("connect")
        previous, longest = connection.connected_at, 0.0
        while time.monotonic() < connection.connected_at + 1.4 * idle:
            began = time.monotonic()
            if direction == "in":
                before = len(connection.received)
                client.sendall(b"x")
                wait_until(lambda seen=before: len(connection.received) > seen)
            else:
                connection.send(b"x")
                read_exactly(client, 1)
            longest, previous = max(longest, time.monotonic() - previous), began
            time.sleep(0.01)
        names = connection.names  # before the clock is asked
        longest = max(longest, time.monotonic() - previous)
        assert "timeout" not in names or longest >= idle, "the machine was busy for so long"


def test_idle_timeout_can_be_switched_off_and_on(pair: tuple[Recorder, socket.socket]) -> None:
    connection, _client = pair
    with connection._lock:  # no timer in between
        connection.idle_timeout = 0.1
        connection.idle_timeout = None
    time.sleep(0.1 + SOON)
    assert connection.names == ["connect"]
    connection.idle_timeout = 0.1
    connection.until("close")
    assert connection.close_reason == "idle"


# -- deadlines ----------------------------------------------------------------------------------------------


def test_a_deadline_comes_whatever_is_exchanged() -> None:
    class Limited(Timed):
        def connected(self) -> None:
            self.set_deadline(0.3)

        def got(self, data: bytes) -> None:
            self.send(data)

    with serving(Limited) as server, raw(server.address) as client:
        (connection,) = made(Limited)
        with contextlib.suppress(OSError):
            while client.recv(1) if client.send(b"x") else False:
                assert time.monotonic() < connection.connected_at + PATIENCE
        assert isinstance(connection.until("close").value, TimeoutError)
        assert connection.at[0] - connection.connected_at >= 0.3 - TICK
        assert connection.names.count("timeout") == 1
        assert connection.names[-2:] == ["timeout", "close"]
        assert connection.calls[-2].value == "deadline"
        assert connection.close_reason == "deadline"
        wait_until(lambda: server.stats().reaped == 1)


def test_a_slow_loris_is_cut_at_its_deadline() -> None:
    class Request(Timed):
        def got(self, data: bytes) -> None:
            if b"\n" in self.received:
                self.set_deadline(None)
                self.send(b"thanks\n")
            elif self.received == data:  # its first bytes
                self.set_deadline(0.4)

    with (
        serving(Request, idle_timeout=30) as server,
        raw(server.address) as slow,
        raw(server.address) as quick,
    ):
        quick.sendall(b"request\n")
        assert read_exactly(quick, 7) == b"thanks\n"
        connection = next(one for one in made(Request, 2) if one.peer_address == slow.getsockname())
        sent = 0
        with contextlib.suppress(OSError):
            while not connection.closed:
                sent += slow.send(b"x")
                time.sleep(0.02)
        connection.until("close")
        assert connection.close_reason == "deadline"
        assert 1 <= len(connection.received) <= sent


def test_a_deadline_that_goes_on_is_over() -> None:
    class Patient(Timed):
        patience = 1

    with serving(Patient) as server, raw(server.address) as client:
        (connection,) = made(Patient)
        connection.until("connect")
        connection.set_deadline(0)
        connection.until("timeout")
        time.sleep(SOON)
        assert connection.names == ["connect", "timeout"]
        connection.set_deadline(0)
        connection.until("close")
        assert connection.close_reason == "deadline"
        assert ended(client) in ("eof", "reset")


def test_the_last_deadline_counts(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    with connection._lock:  # no timer in between
        connection.set_deadline(0.1)
        connection.set_deadline(None)
    time.sleep(0.1 + SOON)
    assert connection.names == ["connect"]
    with connection._lock:
        connection.set_deadline(0.1)
        connection.set_deadline(3600)
    time.sleep(0.1 + SOON)
    assert connection.names == ["connect"]
    connection.set_deadline(0.1)
    connection.until("timeout")
    connection.until("close")
    connection.set_deadline(0.1)
    connection.set_deadline(None)
    assert connection.close_reason == "deadline"
    assert ended(client) in ("eof", "reset")


def test_a_deadline_of_a_closing_connection_changes_nothing(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    with connection._lock:  # no timer in between
        connection.set_deadline(0.1)
        connection._close(_lifetime.CloseReason.LOCAL)
    assert ended(client) == "eof"
    time.sleep(0.1 + SOON)
    assert connection.names == ["connect"]
    client.close()
    connection.until("close")
    assert connection.close_reason == "local"


# -- silence ------------------------------------------------------------------------------------------------


def test_who_never_sends_is_reaped_and_who_sent_once_is_not() -> None:
    with (
        serving(Recorder, silent_timeout=None) as server,
        raw(server.address) as silent,
        raw(server.address) as talker,
    ):
        talker.sendall(b"x")
        dumb, other = sorted(made(Recorder, 2), key=lambda one: one.peer_address != silent.getsockname())
        other.until("data")
        dumb.until("connect")
        for one in (dumb, other):
            one._change(silent_timeout=0.3)
        exc = dumb.until("close").value
        assert time.monotonic() - dumb.connected_at >= 0.3 - TICK
        assert isinstance(exc, TimeoutError)
        assert dumb.close_reason == "silent"
        assert dumb.names == ["connect", "close"], "on_timeout is not asked"
        assert ended(silent) in ("eof", "reset")
        time.sleep(SOON)
        assert other.names == ["connect", "data"]
        wait_until(lambda: server.stats().reaped == 1)
        assert server.stats().closed["silent"] == 1


def test_who_only_listens_is_silent_too() -> None:
    class Newsreader(Recorder):
        def connected(self) -> None:
            self.send(b"news")
            self._change(silent_timeout=0.2)

    with serving(Newsreader, silent_timeout=None) as server, raw(server.address) as client:
        assert read_exactly(client, 4) == b"news"
        (connection,) = made(Newsreader)
        connection.until("close")
        assert connection.close_reason == "silent"


def test_silent_timeout_none_is_never() -> None:
    with serving(Echo, silent_timeout=None) as server, raw(server.address) as client:
        made(Echo)[0].until("connect")
        assert len(server.engine.watchdog) <= 1, "at most the look for stalled threads"
        echoes(client)


def test_a_full_pool_of_silent_peers_is_reaped_and_the_talker_served() -> None:
    """Accepting waits for first bytes: eight who send none are twice the pool, and a ninth has to get in."""
    options = {"backlog": 4, "accept_data": 64, "silent_timeout": 1.0}
    with serving(Echo, **options) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(raw(server.address)) for _ in range(8)]

        def served() -> bool:
            with raw(server.address) as talker, contextlib.suppress(OSError, AssertionError):
                echoes(talker)
                return True
            return False

        began = time.monotonic()
        wait_until(served)  # on a busy machine it may be taken for silent
        print(f"the talker was served after {time.monotonic() - began:.2f} s")
        assert server.stats().reaped >= 4
        assert len(Echo.made) == 1 + server.stats().closed.get("silent", 0), "nobody hears of the others"
        assert {ended(client) for client in silent} <= {"eof", "reset"}
        wait_until(lambda: server.stats().reaped >= 8)
        wait_until(lambda: server.backlog.in_use == 4)
        assert server.stats().accept_failed == 0
        server.silent_timeout = None
        reachable(server.address)


@pytest.mark.parametrize("accept_data", [0, 64])
def test_bytes_at_the_very_moment_of_the_silent_timeout(accept_data: int) -> None:
    """Each byte is either served or its connection reaped; nobody gets another's, and nothing is lost."""
    dice = chance()
    count, timeout = 150, 1.0
    options = {"accept_data": accept_data, "silent_timeout": timeout, "backlog": count}
    with serving(Echo, **options) as server, contextlib.ExitStack() as stack:
        clients = [(stack.enter_context(raw(server.address)), time.monotonic()) for _ in range(count)]
        # Inside AcceptEx the system counts whole seconds, and the watchdog looks every quarter of one.
        spread = 0.3 if accept_data else 0.01
        schedule = sorted(
            (born + timeout + dice.uniform(-0.01, spread), index) for index, (_, born) in enumerate(clients)
        )
        for due, index in schedule:
            time.sleep(max(0.0, due - time.monotonic()))
            with contextlib.suppress(OSError):
                clients[index][0].sendall(b"%03d" % index)
                clients[index][0].shutdown(socket.SHUT_WR)
        served = 0
        for index, (client, _) in enumerate(clients):
            came = cut(client)
            assert came in (b"", b"%03d" % index)
            served += came != b""
        wait_until(lambda: server.stats().connections == 0)
        stats = server.stats()
        print(f"{served} of {count} were served, {stats.reaped} reaped, closed: {dict(stats.closed)}")
        assert sum(stats.closed.values()) == stats.accepted == len(Echo.made)
        wait_until(lambda: served + server.stats().reaped >= count)
        wait_until(lambda: server.backlog.in_use == count)
        for connection in Echo.made:
            if connection.calls:  # else it was reaped before it began
                connection.check()


# -- linger -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linger", [0, 0.3])
def test_a_peer_that_never_closes_is_waited_for_so_long(linger: float) -> None:
    with serving(Recorder, linger_timeout=linger) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        began = time.monotonic()
        connection.send(b"bye")
        connection.close()
        assert read_exactly(client, 3) == b"bye"
        assert ended(client) == "eof"
        assert connection.until("close").value is None
        assert time.monotonic() - began >= linger - TICK
        assert connection.close_reason == "local"


def test_a_peer_that_talks_on_while_we_linger_is_dropped_at_the_end_of_it() -> None:
    with serving(Recorder, linger_timeout=0.2) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.close()
        with contextlib.suppress(OSError):
            while not connection.closed:
                client.sendall(b"and another thing")
                time.sleep(0.005)
        connection.until("close")
        assert connection.names == ["connect", "close"]
        assert connection.bytes_received == 0
        assert connection.close_reason == "local"


def test_a_peer_that_never_reads_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lifetime, "DRAIN_PATIENCE_MIN", 0.3)
    with serving(Recorder, linger_timeout=0.1) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send(STUCK)
        began = connection.last_activity
        connection.close()
        exc = connection.until("close").value
        assert time.monotonic() - began >= 0.3 - TICK
        assert isinstance(exc, TimeoutError)
        assert connection.close_reason == "local", "the first reason wins"
        assert len(cut(client)) < len(STUCK)
        assert connection.write_buffer_size == 0


def test_a_peer_that_reads_slowly_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lifetime, "DRAIN_PATIENCE_MIN", 6.0)
    with serving(Recorder, linger_timeout=0.1) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send(STUCK)
        connection.close()
        began, came = time.monotonic(), 0
        while part := client.recv(MIB):
            came += len(part)
            if time.monotonic() < began + 8.0:
                time.sleep(0.05)
        assert came == len(STUCK)
        client.close()
        assert connection.until("close").value is None


# -- reasons ------------------------------------------------------------------------------------------------


class Fragile(Recorder):
    def got(self, data: bytes) -> None:
        raise ZeroDivisionError("on purpose")


def _shut_down(connection: Any, client: socket.socket) -> None:
    threading.Thread(target=connection.server.stop).start()
    assert ended(client) == "eof"
    client.close()


Ending = Callable[[Any, socket.socket], object]
ENDINGS: dict[str, tuple[Ending, type[OSError] | None]] = {
    "local": (lambda connection, client: (connection.close(), client.close()), None),
    "eof": (lambda connection, client: client.close(), None),
    "reset": (lambda connection, client: rst(client), ConnectionResetError),
    "aborted": (lambda connection, client: connection.abort(), None),
    "deadline": (lambda connection, client: connection.set_deadline(0), TimeoutError),
    "idle": (lambda connection, client: setattr(connection, "idle_timeout", 0.01), TimeoutError),
    "overflow": (lambda connection, client: connection.send(bytes(17 * MIB)), OSError),
    "error": (lambda connection, client: client.sendall(b"x"), ConnectionAbortedError),
    "shutdown": (_shut_down, None),
}


@pytest.mark.parametrize("work_threads", [0, 2])
@pytest.mark.parametrize("reason", ENDINGS)
def test_each_reason(reason: str, work_threads: int, request: pytest.FixtureRequest) -> None:
    if reason == "error":
        request.getfixturevalue("expects_errors")
    end, kind = ENDINGS[reason]
    with serving(Fragile if reason == "error" else Recorder, work_threads=work_threads) as server:
        handler = server._handler
        with raw(server.address) as client:
            (connection,) = made(handler)
            connection.until("connect")
            assert connection.close_reason is None
            wait_until(lambda: connection._reading == _lifetime.POSTED)  # later a reset may be seen as EOF
            end(connection, client)
            exc = connection.until("close").value
            assert connection.close_reason == reason
            assert isinstance(exc, kind) if kind else exc is None
            if reason not in ("local", "eof", "shutdown", "reset"):
                assert ended(client) in ("eof", "reset")
        connection.check()
        wait_until(lambda: server.stats().closed == {reason: 1})
        assert server.stats().reaped == (reason in ("deadline", "idle"))


@pytest.mark.parametrize("call", ["hot_receive", "hot_send"])
@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (10054, "reset", ConnectionResetError),
        (10053, "aborted", ConnectionAbortedError),
        (10060, "timeout", TimeoutError),
        (10065, "timeout", OSError),
        (10058, "aborted", BrokenPipeError),
        (12345, "aborted", OSError),
    ],
)
def test_reasons_of_what_the_system_reports(
    call: str, code: int, reason: str, kind: type[OSError], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(_win32, call)
    failing = threading.Event()

    def fails(*args: Any) -> Any:
        if not failing.is_set():
            return real(*args)
        ctypes.set_last_error(code)
        return -1

    monkeypatch.setattr(_win32, call, fails)
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        failing.set()
        client.sendall(b"x")
        if call == "hot_send":
            connection.send(b"x")
        exc = connection.until("close").value
        failing.clear()
        assert connection.close_reason == reason
        assert isinstance(exc, kind)
        assert getattr(exc, "winerror", 0) == code
        connection.check()


def test_refused_peers_see_no_connection() -> None:
    class Choosy(Server):
        def verify_request(self, peer_address: Any) -> bool:
            return False

    with serving(Recorder, server=Choosy) as server, raw(server.address) as client:
        assert ended(client) in ("eof", "reset")
        wait_until(lambda: server.stats().refused == 1)
        assert Recorder.made == []
        assert server.stats().connections == 0


def test_the_first_reason_wins(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    connection.send(STUCK)
    connection.close()
    rst(client)
    connection.until("close")
    assert connection.close_reason == "local"
    assert connection.server.stats().closed in ({}, {"local": 1})
    connection.check()


# -- callbacks that raise -----------------------------------------------------------------------------------


class Raising(Recorder):
    """Raises in the callback whose name `place` is."""

    place = ""
    error: type[BaseException] = ZeroDivisionError

    def strike(self, name: str) -> None:
        if type(self).place == name:
            raise self.error(f"on purpose, in {name}")

    def connected(self) -> None:
        self.strike("on_connect")

    def got(self, data: bytes) -> None:
        self.strike("on_data")
        if data == b"drain":
            self.send(STUCK)
        elif data == b"timeout":
            self.set_deadline(0)
        elif data == b"soon":
            self.call_soon(self.strike, "call_soon")
        elif data == b"close":
            self.close()

    def ended(self) -> None:
        self.strike("on_eof")

    def drained(self) -> None:
        self.strike("on_drain")

    def timed_out(self, kind: str) -> None:
        self.strike("on_timeout")

    def gone(self, exc: OSError | None) -> None:
        self.strike("on_close")


#: What a client does so that a callback comes.
PROVOKE: dict[str, Callable[[socket.socket], object]] = {
    "on_connect": lambda client: None,
    "on_data": lambda client: client.sendall(b"x"),
    "on_eof": lambda client: client.shutdown(socket.SHUT_WR),
    "on_drain": lambda client: (client.sendall(b"drain"), cut(client)),
    "on_timeout": lambda client: client.sendall(b"timeout"),
    "call_soon": lambda client: client.sendall(b"soon"),
    "on_close": lambda client: (client.sendall(b"close"), client.shutdown(socket.SHUT_WR)),
}


@pytest.mark.parametrize("work_threads", [0, 2])
@pytest.mark.parametrize("place", PROVOKE)
def test_a_callback_that_raises_ends_its_connection_and_nothing_else(
    place: str, work_threads: int, expects_errors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Raising, work_threads=work_threads) as server, raw(server.address) as other:
        (bystander,) = made(Raising)
        bystander.until("connect")
        wait_until(lambda: bystander._reading == _lifetime.POSTED)  # its on_connect has returned
        monkeypatch.setattr(Raising, "place", place)
        with raw(server.address) as client:
            PROVOKE[place](client)
            connection = made(Raising, 2)[1]
            exc = connection.until("close").value
            wait_until(lambda: expects_errors)
        monkeypatch.setattr(Raising, "place", "")
        assert connection.wait_closed(PATIENCE)
        if place == "on_close":
            assert connection.close_reason == "local"
            assert exc is None
        else:
            assert connection.close_reason == "error"
            assert isinstance(exc, ConnectionAbortedError)
            assert isinstance(exc.__cause__, ZeroDivisionError)
        connection.check()
        (record,) = expects_errors
        assert record.exc_info[0] is ZeroDivisionError
        assert f"connection {connection.id} " in record.getMessage()
        before = len(bystander.received)
        other.sendall(b"still here")
        wait_until(lambda: len(bystander.received) == before + 10)
        with raw(server.address) as late:
            late.sendall(b"and still accepting")
            wait_until(lambda: Raising.made[-1].received == b"and still accepting")


def test_handle_error_hears_of_it_instead_of_the_log() -> None:
    told: list[tuple[Any, BaseException]] = []

    class Listening(Server):
        def handle_error(self, connection: Any, exc: BaseException) -> None:
            told.append((connection, exc))

    with serving(Fragile, server=Listening) as server, raw(server.address) as client:
        client.sendall(b"x")
        (connection,) = made(Fragile)
        connection.until("close")
        assert connection.close_reason == "error"
        ((who, exc),) = told
        assert who is connection
        assert isinstance(exc, ZeroDivisionError)


def test_handle_error_that_raises_is_logged_and_harms_nobody(expects_errors: list[Any]) -> None:
    class Clumsy(Server):
        def handle_error(self, connection: Any, exc: BaseException) -> None:
            raise KeyError("on purpose")

    with serving(Fragile, server=Clumsy) as server:
        for count in (1, 2):
            with raw(server.address) as client:
                client.sendall(b"x")
                connection = made(Fragile, count)[-1]
                connection.until("close")
                assert connection.close_reason == "error"
                connection.check()
        assert [record.exc_info[0] for record in expects_errors] == [KeyError, KeyError]


@pytest.mark.parametrize("what", ["constructor", "factory", "verify_request"])
def test_a_hook_that_raises_turns_its_peer_away_and_nobody_else(what: str, expects_errors: list[Any]) -> None:
    faulty = threading.Event()
    faulty.set()

    class Picky(Recorder):
        def __init__(self, server: Any, peer_address: Any) -> None:
            if what == "constructor" and faulty.is_set():
                raise ZeroDivisionError("on purpose")
            super().__init__(server, peer_address)

    class Choosy(Server):
        def verify_request(self, peer_address: Any) -> bool:
            if what == "verify_request" and faulty.is_set():
                raise ZeroDivisionError("on purpose")
            return True

    def factory(server: Any, peer_address: Any) -> Any:
        return "no connection" if faulty.is_set() else Picky(server, peer_address)

    with serving(factory if what == "factory" else Picky, server=Choosy, max_connections=3) as server:
        for _ in range(5):  # more than max_connections: those turned away count no more
            with raw(server.address) as client:
                assert ended(client) in ("eof", "reset")
        faulty.clear()
        with raw(server.address) as client:
            client.sendall(b"x")
            wait_until(lambda: Picky.made and Picky.made[0].received == b"x")
        assert len(expects_errors) == 5
        kind = TypeError if what == "factory" else ZeroDivisionError
        assert {record.exc_info[0] for record in expects_errors} == {kind}
        wait_until(lambda: server.stats().connections == 0)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize(
    "place", ["on_connect", "on_data", "on_close", "constructor", "verify_request", "handle_error"]
)
def test_what_ends_a_program_ends_serve_forever_and_no_thread_before(
    place: str, error: type[BaseException]
) -> None:
    class Leaving(Raising):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.strike("constructor")

        def got(self, data: bytes) -> None:
            super().got(data)
            if type(self).place == "handle_error":
                raise ZeroDivisionError("on the way to handle_error")

    class Hooked(Server):
        def start(self) -> None:
            self._serving = True  # as if serve_forever, which is called below, were about to look
            super().start()

        def verify_request(self, peer_address: Any) -> bool:
            if Leaving.place == "verify_request":
                raise error("on purpose")
            return True

        def handle_error(self, connection: Any, exc: BaseException) -> None:
            raise error("on purpose")

    Leaving.place, Leaving.error = place, error
    with serving(Leaving, server=Hooked) as server, raw(server.address) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"x")
        if place == "on_close":
            client.close()
        wait_until(server._shutdown_wanted.is_set)
        # The thread it happened on goes on: this one is accepted and closed by it.
        Leaving.place = ""
        with raw(server.address) as late:
            late.shutdown(socket.SHUT_WR)
            assert late.recv(1) == b""
        client.close()
        with pytest.raises(error):
            server.serve_forever(0.01)
        for connection in Leaving.made:
            if connection.calls:
                connection.check()


# -- what is left -------------------------------------------------------------------------------------------


class Ephemeral(Connection):
    """Leaves no trace, unless the library keeps one."""

    living: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    def __init__(self, server: Any, peer_address: Any) -> None:
        Ephemeral.living.add(self)

    def on_connect(self) -> None:
        self.set_deadline(3600)

    def on_data(self, data: bytes) -> None:
        self.send(data)
        if data == b"abort":
            self.abort()
        elif data == b"close":
            self.close()
        elif data == b"pause":
            self.pause_reading()
        elif data == b"raise":
            raise ZeroDivisionError("on purpose")
        elif data == b"deadline":
            self.set_deadline(0)
        elif data == b"much":
            self.send(STUCK)
        elif data == b"overflow":
            self.send(bytes(17 * MIB))
        elif data == b"soon":
            self.call_soon(self.send, b"soon")


#: What another thread let go is freed by its owner there, once that runs again, or by the collector.
FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()


def living() -> int:
    """How many Ephemeral connections there are."""
    if FREE_THREADED:
        gc.collect()
    return len(Ephemeral.living)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """What dies here dies because nothing refers to it."""
    if FREE_THREADED:
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("work_threads", [0, 2])
def test_a_thousand_connections_leave_nothing(work_threads: int) -> None:
    options = {"idle_timeout": 3600, "silent_timeout": 3600, "work_threads": work_threads}
    with serving(Ephemeral, **options) as server, no_collector():
        for number in range(20):
            clients = [raw(server.address) for _ in range(50)]
            for client in clients:
                client.sendall(b"x")
            for client in clients:
                assert client.recv(1) == b"x"
            if number == 0:
                assert len(server.engine.watchdog) >= 50
                assert len(Ephemeral.living) == 50
            for index, client in enumerate(clients):
                rst(client) if index % 2 else client.close()
        wait_until(lambda: server.stats().connections == 0)
        assert server.stats().accepted == 1000
        wait_until(lambda: living() == 0, what="no Connection object is left")
        wait_until(lambda: len(server.engine.watchdog) == 0, what="no deadline is left")
        wait_until(lambda: server.engine.ops_pending == server.backlog.in_use)


@pytest.mark.parametrize("work_threads", [0, 2])
@pytest.mark.parametrize(
    "how", ["eof", "reset", "abort", "close", "pause", "raise", "deadline", "much", "overflow", "soon"]
)
def test_however_it_ends_nothing_is_left(how: str, work_threads: int, request: pytest.FixtureRequest) -> None:
    records = request.getfixturevalue("expects_errors") if how == "raise" else None
    with serving(Ephemeral, linger_timeout=0.1, work_threads=work_threads) as server, no_collector():
        with raw(server.address) as client:
            client.sendall(how.encode())
            if how not in ("abort", "raise", "overflow", "deadline"):
                read_exactly(client, len(how))
            if how in ("reset", "pause", "much"):
                rst(client)
                connection = None
                for connection in server.connections:  # none, where the reset was noticed already
                    with contextlib.suppress(ConnectionClosedError):
                        connection.send(b"so that it notices")
                del connection
            elif how == "eof":
                client.close()
            else:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_WR)
                    cut(client)
        if how == "pause":
            # Nobody looks at a paused connection: it notices by sending.
            while server.connections:
                with contextlib.suppress(ConnectionClosedError):
                    server.broadcast(b"?")
        wait_until(lambda: server.stats().connections == 0)
        if records is not None:
            wait_until(lambda: records)
            records[0].exc_info = None  # the record of this test's own log handler
            records[0].exc_text = None
        wait_until(lambda: living() == 0, what="no Connection object is left")
        wait_until(lambda: len(server.engine.watchdog) == 0, what="no deadline is left")


def test_a_connection_lives_while_nobody_but_the_library_refers_to_it() -> None:
    with serving(Ephemeral) as server, raw(server.address) as client:
        for _ in range(3):
            gc.collect()
            echoes(client)
        assert len(Ephemeral.living) == 1


# -- everything at once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("work_threads", [0, 2])
def test_aborted_before_it_began_it_has_neither_on_connect_nor_on_close(work_threads: int) -> None:
    class Stillborn(Recorder):
        def _start(self, first: bytes) -> None:
            """As another thread may do once the connection is in the server's table."""
            self.abort()
            super()._start(first)

    with serving(Stillborn, work_threads=work_threads) as server, raw(server.address) as client:
        assert ended(client) in ("eof", "reset")
        wait_until(lambda: server.stats().connections == 0)
        assert Stillborn.made[0].wait_closed(PATIENCE)
        assert Stillborn.made[0].names == []


@pytest.mark.parametrize("work_threads", [0, 2])
def test_on_connect_comes_before_all_that_others_ask_for(work_threads: int) -> None:
    class Awaited(Recorder):
        def _start(self, first: bytes) -> None:
            """As other threads may do once the connection is in the server's table."""
            askers = [
                lambda: self.call_soon(self.soon),
                lambda: self.set_deadline(0),
                lambda: self.server.broadcast(STUCK),
                lambda: (self.pause_reading(), self.resume_reading()),
            ]
            for asker in askers:
                thread = threading.Thread(target=asker)
                thread.start()
                thread.join()
            settled = threading.Event()
            self.server.engine.watchdog.later(0, settled.set)
            assert settled.wait(PATIENCE)
            super()._start(first)

        def soon(self) -> None:
            with self.record("soon"):
                pass

        def timed_out(self, kind: str) -> bool:
            return True

    options = {"work_threads": work_threads, "io_threads": 4, "accept_data": 10}
    with serving(Awaited, **options) as server, raw(server.address) as client:
        client.sendall(b"first")
        (connection,) = made(Awaited)
        assert read_exactly(client, len(STUCK)) == STUCK
        for name in ("soon", "timeout", "data", "drain"):
            connection.until(name)
        client.close()
        connection.until("close")
        connection.check()


def test_closing_and_aborting_in_all_ways_at_once(io_threads: int) -> None:
    """No callback after on_close, none overlaps, each on_connect has its on_close, nothing hangs or leaks."""
    dice = chance()

    class Wild(Recorder):
        def got(self, data: bytes) -> None:
            act(self, data[0])

        def timed_out(self, kind: str) -> bool:
            return dice.random() < 0.5

        def ended(self) -> bool:
            return dice.random() < 0.3

    def act(connection: Any, number: int) -> None:
        acts: list[Callable[[], object]] = [
            lambda: connection.send(bytes(100)),
            lambda: connection.send(bytes(300_000)),
            lambda: connection.send_many([b"a", b"b"]),
            connection.send_eof,
            connection.close,
            connection.abort,
            connection.pause_reading,
            connection.resume_reading,
            lambda: connection.set_deadline(dice.random() * 0.01),
            lambda: connection.call_soon(note, connection),
            lambda: setattr(connection, "recv_mode", dice.choice(("flow", "zero-byte", "auto", "burst"))),
            lambda: setattr(connection, "recvburst", dice.randint(1, 5)),
            lambda: setattr(connection, "idle_timeout", 0.01 + dice.random() * 0.05),
            connection.resume_reading,
            lambda: connection.send(b"x"),
        ]
        with contextlib.suppress(ConnectionClosedError):
            acts[number % len(acts)]()

    def note(connection: Any) -> None:
        with connection.record("soon"):
            pass

    over = threading.Event()
    with serving(Wild, io_threads=io_threads, linger_timeout=0.2, silent_timeout=0.5) as server:

        def meddle() -> None:
            own = random.Random(dice.random())
            while not over.is_set():
                for connection in server.connections:
                    act(connection, own.randrange(100))
                time.sleep(0.001)

        def visit() -> None:
            own = random.Random(dice.random())
            for _ in range(75):
                with raw(server.address) as client:
                    client.settimeout(0.05)
                    with contextlib.suppress(OSError):
                        for _ in range(own.randrange(6)):
                            client.sendall(own.randbytes(own.choice((1, 3, 2000))))
                            if own.random() < 0.3:
                                client.recv(1 << 16)
                    if own.random() < 0.3:
                        rst(client)

        def visits() -> None:
            with beside(visit, visit, visit, visit):
                pass
            over.set()

        with beside(meddle, meddle, visits):
            assert over.wait(LONG)
        # More than once: one may have been accepted a moment ago.
        wait_until(lambda: server.close_clients() or server.stats().connections == 0)
        stats = server.stats()
        print(dict(stats.closed))
        assert sum(stats.closed.values()) >= 150  # the others were reset before they were accepted
        wait_until(lambda: len(server.engine.watchdog) == 0)
        wait_until(lambda: server.engine.ops_pending == server.backlog.in_use)
    for connection in Wild.made:
        if connection.calls:
            connection.check()
        assert connection.closed


def test_what_a_thread_sent_arrives_after_the_thread_has_gone(pair: tuple[Recorder, socket.socket]) -> None:
    connection, client = pair
    sender = threading.Thread(target=lambda: connection.send(STUCK))
    sender.start()
    sender.join()
    assert connection.write_buffer_size > 0
    assert read_exactly(client, len(STUCK)) == STUCK

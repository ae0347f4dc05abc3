"""connect(): what a connection does before it is connected, how it fails, and what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import socket
import threading
import time
import weakref
from typing import Any

import pytest
from program import Program
from secure import client_context, server_context
from support import PATIENCE, Echo, Recorder, made, raw, serving, wait_until
from targets import Asked, closed_port, full_queue, names

from iocp_ctypes import Connection, ConnectionClosedError, Engine, connect
from iocp_ctypes import engine as engine_module


class Sink(Recorder):
    """Keeps what comes."""


def test_connect_send_receive_close() -> None:
    with serving(Echo) as server:
        connection = connect(server.address, Asked)
        assert connection.send(b"before it is connected")
        asked = made(Asked)[0]
        wait_until(lambda: asked.received == b"before it is connected")
        assert connection.peer_address == server.address
        assert connection.local_address == made(Echo)[0].peer_address
        assert connection.server is None
        connection.close()
        assert connection.wait_closed(PATIENCE)
        asked.check()
        assert asked.close_reason == "local"
        assert asked.calls[-1].value is None
        assert (asked.bytes_sent, asked.bytes_received) == (22, 22)


def test_without_any_server_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        connection = connect(listener.getsockname(), Asked)
        peer, _address = listener.accept()
        with peer:
            peer.sendall(b"welcome")
        assert connection.wait_closed(PATIENCE)
    asked = made(Asked)[0]
    asked.check()
    assert asked.received == b"welcome"
    assert asked.close_reason == "eof"


def test_much_is_sent_before_it_is_connected_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with serving(Sink) as server:
        names(monkeypatch, {"late.test": lambda: go.wait(10) and [server.address]})
        connection = connect(("late.test", 80), Asked, write_buffer_max=1 << 24)
        blocks = [bytes([number]) * 40_000 for number in range(100)]
        below = [connection.send(block) for block in blocks]
        assert below == [True] + [False] * 99
        connection.send_eof()
        with pytest.raises(ConnectionClosedError):
            connection.send(b"after send_eof")
        assert connection.write_buffer_size == 4_000_000
        go.set()
        assert connection.wait_closed(10)
        sink = made(Sink)[0]
        assert hashlib.sha256(sink.received).digest() == hashlib.sha256(b"".join(blocks)).digest()
        made(Asked)[0].check()
        assert made(Asked)[0].names.count("drain") <= 1  # none where the peer's EOF was served before


@pytest.mark.parametrize("tls", [False, True])
def test_what_went_at_once_when_it_was_connected_ends_with_on_drain(
    monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    """It is more than the high mark, and yet no packet of a send tells that it has gone."""
    go = threading.Event()
    secured = {"tls": client_context(), "server_hostname": "localhost"} if tls else {}
    with serving(Sink, tls=server_context() if tls else None) as server:
        names(monkeypatch, {"late.test": lambda: go.wait(10) and [server.address]})
        connection = connect(("late.test", 80), Asked, **secured)
        assert connection.send(bytes(40_000))
        assert not connection.send(bytes(40_000))
        go.set()
        made(Asked)[0].until("drain")
        assert connection.send(b"on it goes")
        connection.close()
        wait_until(lambda: len(made(Sink)[0].received) == 80_010)


def test_what_was_queued_is_sent_by_a_close_in_on_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    class Brief(Asked):
        def connected(self) -> None:
            self.close()

    sent = threading.Event()  # before that it must not be connected
    with serving(Sink) as server:
        names(monkeypatch, {"late.test": lambda: sent.wait(10) and [server.address]})
        connection = connect(("late.test", 80), Brief)
        connection.send(b"all of it")
        sent.set()
        assert connection.wait_closed(10)
        sink = made(Sink)[0]
        sink.until("close")
        assert sink.received == b"all of it"
        made(Brief)[0].check()


def test_options_set_while_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    with serving(Echo) as server:
        names(monkeypatch, {"late.test": lambda: go.wait(10) and [server.address]})
        connection = connect(("late.test", 80), Asked)
        connection.nodelay = False
        connection.keepalive = 30.0
        connection.sendcap = 2
        connection.idle_timeout = 60.0
        connection.pause_reading()
        connection.resume_reading()
        assert connection.local_address is None
        assert connection.peer_address == ("late.test", 80)
        assert "connecting" in repr(connection)
        go.set()
        connection.send(b"x")
        wait_until(lambda: made(Asked)[0].received == b"x")
        assert connection.nodelay is False
        connection.abort()
        assert connection.wait_closed(PATIENCE)


def test_pause_while_connecting_holds() -> None:
    with serving(Echo) as server:
        connection = connect(server.address, Asked)
        connection.pause_reading()
        connection.send(b"x")
        asked = made(Asked)[0]
        asked.until("connect")
        wait_until(lambda: made(Echo)[0].bytes_sent == 1)
        assert asked.received == b""
        connection.resume_reading()
        asked.until("data")
        connection.abort()
        assert connection.wait_closed(PATIENCE)
        asked.check()


def test_a_deadline_runs_from_when_it_is_set() -> None:
    with serving(Echo) as server:
        connection = connect(server.address, Asked)
        connection.set_deadline(0.05)
        assert connection.wait_closed(PATIENCE)
    made(Asked)[0].check()
    assert connection.close_reason == "deadline"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_refusal(host: str) -> None:
    address = closed_port(host)
    connection = connect(address, Asked)
    with contextlib.suppress(ConnectionClosedError):  # refused so soon
        connection.send(b"nobody will read this")
    assert connection.wait_closed(10)
    asked = made(Asked)[0]
    asked.check_failed(ConnectionRefusedError, "refused")
    assert asked.calls[0].value.winerror == 10061
    assert connection.peer_address[:2] == address
    with pytest.raises(ConnectionClosedError):
        connection.send(b"x")
    with pytest.raises(ConnectionClosedError):
        connection.send_eof()
    connection.close()
    connection.abort()
    assert len(asked.calls) == 1


def test_500_time_outs_at_a_full_queue(flat_handles: None) -> None:
    """On Windows a full queue refuses."""
    with full_queue() as address:
        for _ in range(500):
            connect(address, Asked, timeout=0.3)
        wait_until(lambda: all(asked.names for asked in made(Asked, 500)), 30, "500 on_close")
        assert len(Asked.made) == 500
        for asked in Asked.made:
            if asked.close_reason == "refused":
                asked.check_failed(ConnectionRefusedError, "refused")
            else:
                asked.check_failed(TimeoutError, "timeout")
    Asked.made.clear()


@pytest.mark.parametrize("how", ["close", "abort"])
def test_given_up_while_connecting(how: str) -> None:
    with full_queue() as address:
        connection = connect(address, Asked)
        connection.send(b"x")
        getattr(connection, how)()
        with pytest.raises(ConnectionClosedError):
            connection.send(b"y")
        assert connection.wait_closed(PATIENCE)
    made(Asked)[0].check_failed(None, {"close": "local", "abort": "aborted"}[how])


@pytest.mark.parametrize("how", ["close", "abort"])
def test_given_up_at_any_moment(how: str) -> None:
    """Connecting, connected, in on_connect: on_close comes once and last, and nothing is left."""
    with serving(Sink) as server:
        for number in range(150):
            connection = connect(server.address, Asked)
            connection.send(b"x")
            deadline = time.monotonic() + number % 15 * 0.0002
            while time.monotonic() < deadline:
                pass
            getattr(connection, how)()
        for asked in made(Asked, 150):
            assert asked.wait_closed(10)
            assert asked.names in (["close"], ["connect", "close"]), asked.names
            assert asked.overlaps == 0
        if how == "abort":
            server.abort_clients()


def test_overflow_while_connecting() -> None:
    with full_queue() as address:
        connection = connect(address, Asked, write_buffer_max=100, high_mark=50, low_mark=10)
        assert connection.send(bytes(50)) is True
        assert connection.send(bytes(50)) is False
        assert connection.send(bytes(1)) is False
        assert connection.wait_closed(PATIENCE)
    assert connection.close_reason == "overflow"
    assert made(Asked)[0].names == ["close"]


def test_call_soon_while_connecting() -> None:
    ran = threading.Event()
    with full_queue() as address:
        connection = connect(address, Asked)
        connection.call_soon(ran.set)
        assert ran.wait(PATIENCE)
        connection.abort()
        assert connection.wait_closed(PATIENCE)


def test_a_callback_that_raises(expects_errors: Any) -> None:
    class Broken(Asked):
        def connected(self) -> None:
            raise KeyError("mine")

    with serving(Sink) as server:
        connection = connect(server.address, Broken)
        assert connection.wait_closed(PATIENCE)
        made(Broken)[0].check()
        assert connection.close_reason == "error"
        assert "callback raised" in expects_errors[0].getMessage()


def test_a_connection_from_inside_a_callback() -> None:
    class Relay(Echo):
        def got(self, data: bytes) -> None:
            self.onward = connect(self.data, Asked)
            self.onward.send(data)

    with serving(Sink) as behind, serving(Relay) as server, raw(server.address) as client:
        made(Relay)[0].data = behind.address
        client.sendall(b"through")
        wait_until(lambda: made(Sink)[0].received == b"through")
        made(Asked)[0].abort()
        assert made(Asked)[0].wait_closed(PATIENCE)


def test_from_a_local_address_by_name_of_both_families(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Echo) as server:
        names(monkeypatch, {"two.test": ["::1", server.address]})
        connection = connect(("two.test", server.address[1]), Asked, local_address=("127.0.0.5", 0))
        connection.send(b"x")
        made(Asked)[0].until("data")
        assert connection.local_address is not None
        assert connection.local_address[0] == "127.0.0.5"
        connection.abort()
        assert connection.wait_closed(PATIENCE)


def test_the_engine_given(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(io_threads=1)
    with serving(Sink) as server:
        connection = connect(server.address, Asked, engine=engine)
        made(Asked)[0].until("connect")
        assert engine.running
        connection.close()
        assert connection.wait_closed(PATIENCE)
        wait_until(lambda: not engine.running)
        with pytest.raises(RuntimeError, match="this engine has been stopped"):
            connect(server.address, engine=engine)


def test_the_engine_ends_with_its_last_connection_and_makes_no_thread_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    start = threading.Thread.start

    def noting(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noting)
    address = closed_port()
    for _ in range(20):
        connect(address, Asked)
    for asked in made(Asked, 20):
        assert asked.wait_closed(10)
    wait_until(lambda: not len(engine_module._engines))
    assert all(name.startswith(("iocp_ctypes watchdog", "iocp_ctypes I/O ")) for name in started), started


def test_engines_come_and_go_while_others_connect() -> None:
    """The last connection of an engine may end at the very moment a new one enters."""
    problems: list[BaseException] = []

    def some() -> None:
        try:
            for _ in range(60):
                connection = connect(address, Asked)
                assert connection.wait_closed(20)
        except BaseException as exc:
            problems.append(exc)

    address = closed_port()
    threads = [threading.Thread(target=some) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert problems == []
    assert len(Asked.made) == 180


def test_2000_connections_leave_nothing(flat_handles: None) -> None:
    with serving(Echo) as server:
        for _ in range(20):
            for _ in range(100):
                connect(server.address, Asked, linger_timeout=5.0).send(b"ping")
            for asked in made(Asked, 100):
                wait_until(lambda asked=asked: asked.received == b"ping" or asked.closed)
                asked.abort()
            for asked in made(Asked, 100):
                assert asked.wait_closed(10)
                asked.check()
            Asked.made.clear()
            Echo.made.clear()


def test_a_connection_is_freed_without_the_collector() -> None:
    with serving(Echo) as server:
        gc.disable()
        try:
            connection: Connection | None = connect(server.address, lambda _s, _a: Recorder())
            assert connection is not None
            connection.send(b"x")
            dead = weakref.ref(connection)
            wait_until(lambda: dead().received == b"x")  # type: ignore[union-attr]
            connection.abort()
            assert connection.wait_closed(PATIENCE)
            Recorder.made.clear()
            connection = None
            wait_until(lambda: dead() is None, what="the connection is freed")
        finally:
            gc.enable()


def test_a_script_that_just_ends() -> None:
    script = (
        "import iocp_ctypes, sys\n"
        "class C(iocp_ctypes.Connection):\n"
        "    def on_connect(self): print('connected', flush=True)\n"
        "    def on_close(self, exc): print('closed', self.close_reason, flush=True)\n"
        "c = iocp_ctypes.connect((sys.argv[1], int(sys.argv[2])), C)\n"
        "c.send(b'hello')\n"
        "while not c.bytes_received: pass\n"
    )
    with serving(Echo) as server:
        host, port = server.address
        program = Program("-c", script, host, str(port))
        try:
            program.line("connected")
            program.line("closed aborted")
            assert program.ended() == (0, [])
        finally:
            program.kill()


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        (("127.0.0.1",), {}, ValueError, "an address is (host, port)"),
        ((("", 80),), {}, ValueError, "address=('', 80): names no host"),
        ((("127.0.0.1", 0),), {}, ValueError, "port 0 is nobody's; it must be from 1 to 65535"),
        ((("127.0.0.1", 65536),), {}, ValueError, "port=65536"),
        ((("127.0.0.1", 80), 5), {}, TypeError, "handler=5: must be a subclass of Connection"),
        ((("127.0.0.1", 80), str), {}, TypeError, "must be a subclass of Connection"),
        ((("127.0.0.1", 80), lambda _s, _a: 3), {}, TypeError, "must make a Connection, and made 3"),
        ((("127.0.0.1", 80),), {"timeout": 0}, ValueError, "timeout=0: must be a number of seconds"),
        ((("127.0.0.1", 80),), {"timeout": "3"}, TypeError, "timeout='3'"),
        ((("127.0.0.1", 80),), {"local_address": "127.0.0.1"}, TypeError, "local_address='127.0.0.1'"),
        ((("127.0.0.1", 80),), {"local_address": ("here", 0)}, ValueError, "must be numeric"),
        ((("127.0.0.1", 80),), {"engine": 1}, TypeError, "engine=1: must be an Engine or None"),
        ((("127.0.0.1", 80),), {"sendcap": 0}, ValueError, "sendcap=0: must be a whole number"),
        ((("127.0.0.1", 80),), {"backlog": 5}, TypeError, "unknown option backlog=5: those of a client are"),
        ((("127.0.0.1", 80),), {"colour": 5}, TypeError, "unknown option colour=5"),
    ],
)
def test_bad_arguments(arguments: Any, options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        connect(*arguments, **options)
    assert text in str(caught.value)
    assert not list(engine_module._engines)


def test_a_connection_is_not_used_twice() -> None:
    with serving(Echo) as server:
        first = connect(server.address, Asked)
        with pytest.raises(ValueError, match="must make a new Connection"):
            connect(server.address, lambda _s, _a: first)
        first.abort()
        assert first.wait_closed(PATIENCE)

"""server.py: addresses, options, limits, live tunables, hooks, what raises, and the ways to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import (
    LOOPBACK,
    OWN_HOST,
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
    serve_beside,
    serving,
    wait_until,
)

from iocp_ctypes import OPTIONS, Connection, ConnectionClosedError, Engine, Server, Usage, _listening, _win32
from iocp_ctypes import server as server_module

# -- what is refused before a socket exists -----------------------------------------------------------------

FREE = LOOPBACK

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"backlog": 0}, ValueError, "from 1 to 10000"),
    ({"backlog": 10_001}, ValueError, "from 1 to 10000"),
    ({"backlog": 8.0}, TypeError, "from 1 to 10000"),
    ({"backlog": True}, TypeError, "from 1 to 10000"),
    ({"listen_backlog": 0}, ValueError, "from 1 to 65535 or None"),
    ({"listen_backlog": "9"}, TypeError, "from 1 to 65535 or None"),
    ({"accept_data": -1}, ValueError, "from 0 to 65536"),
    ({"accept_data": None}, TypeError, "from 0 to 65536"),
    ({"silent_timeout": 0}, ValueError, "more than 0"),
    ({"silent_timeout": "1"}, TypeError, "more than 0"),
    ({"idle_timeout": -0.5}, ValueError, "more than 0"),
    ({"idle_timeout": float("nan")}, ValueError, "more than 0"),
    ({"linger_timeout": -1}, ValueError, "seconds (0"),
    ({"linger_timeout": None}, TypeError, "seconds (0"),
    ({"max_connections": 0}, ValueError, "from 1 to 1000000 or None"),
    ({"max_connections": 1.5}, TypeError, "from 1 to 1000000 or None"),
    ({"max_per_host": 0}, ValueError, "from 1 to 1000000 or None"),
    ({"max_per_host": b"3"}, TypeError, "from 1 to 1000000 or None"),
    ({"sendcap": 0}, ValueError, "from 1 to 1000"),
    ({"sendcap": None}, TypeError, "from 1 to 1000"),
    ({"recvburst": 0}, ValueError, "from 1 to 10000"),
    ({"recvburst": 2.0}, TypeError, "from 1 to 10000"),
    ({"recv_buffer_max": 63}, ValueError, "from 64 to"),
    ({"recv_buffer_max": None}, TypeError, "from 64 to"),
    ({"recv_mode": "fast"}, ValueError, "'zero-byte'"),
    ({"recv_mode": 1}, TypeError, "'zero-byte'"),
    ({"recv_size": 63}, ValueError, "from 64 to"),
    ({"recv_size": "big"}, TypeError, "from 64 to"),
    ({"high_mark": -1}, ValueError, "from 0 to"),
    ({"high_mark": 1.0}, TypeError, "from 0 to"),
    ({"low_mark": -1}, ValueError, "from 0 to"),
    ({"low_mark": None}, TypeError, "from 0 to"),
    ({"low_mark": 101, "high_mark": 100}, ValueError, "from 0 to high_mark, which is 100"),
    ({"write_buffer_max": 0}, ValueError, "from 1 to"),
    ({"write_buffer_max": "0"}, TypeError, "from 1 to"),
    (
        {"high_mark": 200, "low_mark": 1, "write_buffer_max": 100},
        ValueError,
        "write_buffer_max, which is 100",
    ),
    ({"io_threads": -1}, ValueError, "from 0 to 256"),
    ({"io_threads": "4"}, TypeError, "from 0 to 256"),
    ({"work_threads": 257}, ValueError, "from 0 to 256"),
    ({"work_threads": None}, TypeError, "from 0 to 256"),
    ({"nodelay": 1}, TypeError, "True or False"),
    ({"keepalive": 0}, ValueError, "seconds"),
    ({"keepalive": (1, 2, 3)}, ValueError, "(idle, interval)"),
    ({"keepalive": "on"}, TypeError, "seconds"),
    ({"exclusive": None}, TypeError, "True or False"),
    ({"dualstack": 0}, TypeError, "True, False or None"),
    ({"trace": -1}, ValueError, "from 0 to 1000000"),
    ({"trace": "trace.json"}, TypeError, "from 0 to 1000000"),
    ({"processes": 65}, ValueError, "a whole number from 1 to 64"),
    ({"tls": "cert.pem"}, TypeError, "an ssl.SSLContext or None"),
    ({"tls_handshake_timeout": 0}, ValueError, "seconds"),
    ({"tls_handshake_timeout": None}, TypeError, "seconds"),
    ({"reject_remote": 0}, TypeError, "True or False"),
    ({"pipe_security": "all"}, ValueError, "in SDDL, such as"),
    ({"blacklog": 5}, TypeError, "the options are backlog"),
]


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Assert that no socket is made, by whichever way."""
    tries: list[Any] = []

    class Noting(socket.socket):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            tries.append(args)
            super().__init__(*args, **kwargs)

    real = _win32.WSASocketW
    monkeypatch.setattr(socket, "socket", Noting)
    monkeypatch.setattr(_win32, "WSASocketW", lambda *args: tries.append(args) or real(*args))
    yield
    assert tries == []


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize(("options", "exception", "allowed"), BAD_OPTIONS, ids=str)
def test_a_wrong_option_is_refused_by_name_value_and_range(
    options: dict[str, Any], exception: type[Exception], allowed: str
) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(exception) as caught:
        Server(FREE, Echo, **options)
    assert type(caught.value) is exception
    assert f"{name}={value!r}" in str(caught.value)
    assert allowed in str(caught.value)


def test_every_option_is_refused_something() -> None:
    assert {name for options, _kind, _text in BAD_OPTIONS for name in options} - {"blacklog"} == set(OPTIONS)


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize(
    ("address", "exception", "text"),
    [
        (("127.0.0.1", 70000), ValueError, "port=70000"),
        (("127.0.0.1", -1), ValueError, "port=-1"),
        (("127.0.0.1", "80"), TypeError, "port a whole number from 0 to 65535"),
        (("127.0.0.1", True), TypeError, "port a whole number from 0 to 65535"),
        ((b"127.0.0.1", 80), TypeError, "host a str"),
        (("127.0.0.1", 0, 0, 0), ValueError, "wrong family"),
        (("::1", 0, -1, 0), ValueError, "flowinfo"),
        (("::1", 0, 0), TypeError, "(host, port)"),
        ("127.0.0.1:80", ValueError, "'127.0.0.1:80'"),
        (80, TypeError, "address=80"),
        (None, TypeError, "address=None"),
        ([], ValueError, "no address"),
        ((), TypeError, "address=()"),
        ([("127.0.0.1", 0), ("127.0.0.1", 99999)], ValueError, "port=99999"),
    ],
    ids=str,
)
def test_a_wrong_address_is_refused(address: Any, exception: type[Exception], text: str) -> None:
    with pytest.raises(exception) as caught:
        Server(address, Echo)
    assert type(caught.value) is exception
    assert text in str(caught.value)


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize("handler", [None, 5, "Echo", object, Server, Echo(None, None)], ids=str)
def test_a_handler_that_makes_no_connections_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"handler=.*must be a subclass of Connection"):
        Server(FREE, handler)


@pytest.mark.usefixtures("no_socket")
def test_an_engine_must_be_one_and_brings_its_own_threads() -> None:
    with pytest.raises(TypeError, match="engine=7: must be an Engine or None"):
        Server(FREE, Echo, engine=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="io_threads=2: the given engine has its own"):
        Server(FREE, Echo, engine=Engine(), io_threads=2)


def test_sockets_that_cannot_listen_are_refused() -> None:
    with socket.socket() as unbound, pytest.raises(ValueError, match="not bound"):
        Server(unbound, Echo)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(LOOPBACK)
        with pytest.raises(ValueError, match="stream socket"):
            Server(datagrams, Echo)


def gone(address: Any) -> bool:
    """Whether nobody listens there."""
    try:
        raw(address, timeout=3).close()
    except OSError:
        return True
    return False


# -- where it listens ---------------------------------------------------------------------------------------


def test_a_port_in_use_is_named_and_nothing_is_kept() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        other.bind(LOOPBACK)
        other.listen()
        taken = other.getsockname()
        with socket.socket() as free:
            free.bind((OWN_HOST, 0))
            first = free.getsockname()
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{taken[1]}") as caught:
            Server([first, taken], Echo)
        assert getattr(caught.value, "winerror", None) in (10048, 10013)
        with serving(Echo, first) as server:  # it was bound before the second was tried
            reachable(server.address)


def test_a_name_that_cannot_be_resolved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: Any, **_kwargs: Any) -> Any:
        raise socket.gaierror(11001, "getaddrinfo failed")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(OSError, match="no-such-host"):
        Server(("no-such-host", 0), Echo)


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        Server(("192.0.2.1", 0), Echo)


def test_several_addresses() -> None:
    with serving(Echo, [LOOPBACK, ("::1", 0)]) as server:
        assert server.addresses[0][0] == "127.0.0.1"
        assert server.addresses[1][0] == "::1"
        assert server.address == server.addresses[0]
        assert all(address[1] > 0 for address in server.addresses)
        for address in server.addresses:
            reachable(address)
        four, six = made(Echo, 2)
        assert [four.peer_address[0], six.peer_address[0]] == ["127.0.0.1", "::1"]


def test_a_bound_socket() -> None:
    with socket.socket() as bound:
        bound.bind(LOOPBACK)
        name = bound.getsockname()
        with serving(Echo, bound) as server:
            assert server.address == name
            reachable(name)
        assert bound.fileno() == -1  # it is the server's, which has closed it


def test_a_socket_of_another_completion_port_is_refused_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(Echo) as first:
        taken = first._sockets[0]
        second = Server(LOOPBACK, Echo, io_threads=1)
        second._sockets[0].close()
        second._sockets[0] = taken
        with pytest.raises(OSError, match="belongs to another completion port"):
            second.start()
        reachable(first.address)
        second._sockets.clear()
        second.stop()


@pytest.mark.parametrize("dualstack", [None, True])
def test_every_interface_of_both_families(dualstack: bool | None) -> None:
    with serving(Echo, ("", 0), dualstack=dualstack) as server:
        port = server.address[1]
        reachable(("127.0.0.1", port))
        reachable(("::1", port))
        assert sorted(connection.peer_address[0] for connection in made(Echo, 2)) == ["127.0.0.1", "::1"]


@pytest.mark.parametrize("address", [("::1", 0), ("::1", 0, 0, 0), ("::", 0)], ids=str)
def test_ipv6_alone(address: Any) -> None:
    with serving(Echo, address) as server:
        port = server.address[1]
        reachable(("::1", port))
        assert gone((OWN_HOST, port))


def test_exclusive_is_the_default_and_can_be_left_out() -> None:
    for options, expected in (({}, True), ({"exclusive": True}, True), ({"exclusive": False}, False)):
        with serving(Echo, **options) as server:
            (sock,) = server._sockets
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE)) is expected
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            reachable(server.address)


@pytest.mark.windows_only("exclusive-address")
@pytest.mark.parametrize("reuse", [True, False])
def test_nobody_binds_over_a_server(reuse: bool) -> None:
    with serving(Echo) as server, socket.socket() as attacker:
        attacker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        with pytest.raises(PermissionError if reuse else OSError):
            attacker.bind(server.address)
        reachable(server.address)


# -- options and what they do; those of the pool are in test_acceptor.py ------------------------------------


def test_max_per_host_refuses_the_others_with_a_reset() -> None:
    with serving(Echo, max_per_host=2) as server:
        first, second = raw(server.address), raw(server.address)
        echoes(first)
        echoes(second)
        with raw(server.address) as third:
            assert ended(third) == "reset"
        wait_until(lambda: server.stats().refused == 1)
        first.close()
        wait_until(lambda: server.stats().connections == 1)
        reachable(server.address)
        second.close()
        wait_until(lambda: not server.stats().connections)
        assert (server.stats().accepted, server.stats().refused) == (3, 1)
        assert server._hosts == {}
    assert len(Echo.made) == 3


def test_max_per_host_counts_an_ipv4_host_once_whatever_the_listener() -> None:
    with serving(Echo, ("::", 0), dualstack=True, max_per_host=1) as server:
        port = server.address[1]
        with raw(("127.0.0.1", port)) as four, raw(("::1", port)) as six:
            echoes(four)
            echoes(six)
            with raw(("127.0.0.1", port)) as third:
                assert ended(third) == "reset"


def test_work_threads_pin_connections() -> None:
    with serving(Echo, work_threads=3) as server:
        clients = [raw(server.address) for _ in range(9)]
        for _ in range(3):
            for client in clients:
                echoes(client)
        assert len(server.stats().work_queued) == 3
        for client in clients:
            client.close()
        wait_until(lambda: not server.stats().connections)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        assert all(len(connection.threads) == 1 for connection in Echo.made)
        used = {names[ident] for connection in Echo.made for ident in connection.threads}
        assert used == {"iocp_ctypes work 1", "iocp_ctypes work 2", "iocp_ctypes work 3"}
    for connection in Echo.made:
        connection.check()


def test_io_threads_serve() -> None:
    with serving(Echo, io_threads=4) as server:
        assert server.stats().engine.io_threads == 4
        reachable(server.address)
        (connection,) = made(Echo)
        connection.until("close")
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        assert all(names[ident].startswith("iocp_ctypes I/O") for ident in connection.threads)


def test_servers_without_io_threads_of_their_own_share_an_engine() -> None:
    with serving(Echo, io_threads=0) as one, serving(Echo, io_threads=0) as two:
        assert one.engine is two.engine
        with serving(Echo, io_threads=1) as three:
            assert three.engine is not one.engine
        reachable(one.address)
        reachable(two.address)


def test_recv_size_bounds_what_on_data_gets() -> None:
    with serving(Echo, recv_mode="flow", recv_size=64) as server:
        reachable(server.address, bytes(range(200)) * 5)
        (connection,) = made(Echo)
        sizes = {len(call.value) for call in connection.calls if call.name == "data"}
        assert max(sizes) == 64
        assert connection.received == bytes(range(200)) * 5


@pytest.mark.parametrize("mode", ["auto", "flow", "zero-byte", "burst"])
def test_recv_mode(mode: str) -> None:
    with serving(Echo, recv_mode=mode) as server, raw(server.address) as client:
        for size in (1, 1000, 100_000, 1, 20_000):
            data = bytes(size % 251 for _ in range(size))
            sender = threading.Thread(target=client.sendall, args=(data,))
            sender.start()
            assert read_exactly(client, size) == data
            sender.join()
        (connection,) = made(Echo)
        assert connection.recv_mode == mode


def test_marks_sendcap_and_write_buffer_max() -> None:
    class Filling(Recorder):
        def got(self, data: bytes) -> None:
            self.answers = []
            while not self.closing and not self.closed:
                self.answers.append(self.send(bytes(50_000)))
                self.most = max(getattr(self, "most", 0), self.sendcap.in_use)

    options = {"sendcap": 2, "high_mark": 100_000, "low_mark": 50_000, "write_buffer_max": 400_000}
    with serving(Filling, **options) as server, raw(server.address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.sendall(b"go")
        (connection,) = made(Filling)
        closed = connection.until("close").value
        assert isinstance(closed, OSError)
        assert connection.close_reason == "overflow"
        first_no = connection.answers.index(False)
        assert not any(connection.answers[first_no:])
        assert 6 <= len(connection.answers) - first_no <= 7  # 50 kB each from above 100 kB to above 400 kB
        assert connection.most <= 2
        connection.check()


def test_on_drain_comes_once_for_each_time_above_the_high_mark() -> None:
    class Filling(Recorder):
        filled = 0

        def got(self, data: bytes) -> None:
            while self.send(bytes(20_000)):
                pass
            self.filled += 1

    with serving(Filling, high_mark=50_000, low_mark=10_000) as server, raw(server.address) as client:
        (connection,) = made(Filling)
        for number in range(1, 4):
            client.sendall(b"x")
            # Who read before that would keep it from ever being full.
            wait_until(lambda number=number: connection.filled == number)
            client.settimeout(0.1)  # the system may have taken all by now, and on_drain be there
            while connection.names.count("drain") < number:
                with contextlib.suppress(TimeoutError):  # all may have come before on_drain is called
                    client.recv(1 << 16)
        assert connection.names.count("drain") == 3


def test_idle_timeout() -> None:
    with serving(Echo, idle_timeout=0.3) as server, raw(server.address) as client:
        (connection,) = made(Echo)
        assert ended(client) == "eof"
        exc = connection.until("close").value
        assert isinstance(exc, TimeoutError)
        assert connection.close_reason == "idle"
        assert connection.until("timeout").value == "idle"
        wait_until(lambda: server.stats().closed.get("idle"))
        assert server.stats().reaped == 1


def test_linger_timeout_bounds_waiting_for_the_peer() -> None:
    with serving(Echo, linger_timeout=0.2) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        connection.close()
        assert connection.wait_closed(PATIENCE)
        assert connection.close_reason == "local"
        assert connection.until("close").value is None
        assert ended(client) in ("eof", "reset")


# -- live tunables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("silent_timeout", 30.0, 0),
        ("idle_timeout", 30.0, -1),
        ("linger_timeout", 0.5, None),
        ("max_connections", 7, 0),
        ("max_per_host", 7, "7"),
        ("recv_mode", "flow", "none"),
        ("recv_size", 4096, 5),
        ("recv_buffer_max", 4096, 5),
        ("nodelay", False, 1),
        ("keepalive", (60.0, 5.0), 0),
        ("high_mark", 70_000, -1),
        ("low_mark", 5, 1 << 30),
        ("write_buffer_max", 1 << 20, 10),
    ],
)
def test_live_options_hold_for_new_connections(name: str, good: Any, bad: Any) -> None:
    with serving(Echo) as server:
        old = getattr(server, name)
        with raw(server.address) as before:
            echoes(before)
            with pytest.raises((TypeError, ValueError), match=name):
                setattr(server, name, bad)
            assert getattr(server, name) == old
            setattr(server, name, good)
            assert getattr(server, name) == good
            with raw(server.address) as after:
                echoes(after)
                first, second = made(Echo, 2)
                assert getattr(first._settings, name) == old
                assert getattr(second._settings, name) == good


def test_backlog_may_be_changed_before_the_start() -> None:
    server = Server(LOOPBACK, Echo, backlog=2)
    server.backlog = 9
    assert server.backlog == Usage(9, 0)
    with server:
        assert server.backlog == Usage(9, 9)


def test_max_connections_is_live() -> None:
    with serving(Echo, max_connections=1) as server:
        with raw(server.address) as inside, raw(server.address) as waiting:
            echoes(inside)
            waiting.sendall(b"hello")
            wait_until(lambda: server.backlog.in_use == 0)
            assert server.stats().accepted == 1
            server.max_connections = 2
            assert read_exactly(waiting, 5) == b"hello"
        with raw(server.address) as one:
            echoes(one)
            server.max_connections = None
            for _ in range(3):
                reachable(server.address)


@pytest.mark.parametrize("most", [3, None])
def test_raising_max_connections_lets_in_who_was_accepted_too_many(most: int | None) -> None:
    # Each address has an AcceptEx of its own posted, so one more is accepted than may be served.
    with (
        serving(Echo, [LOOPBACK, LOOPBACK], max_connections=1) as server,
        raw(server.addresses[0]) as inside,
        raw(server.addresses[1]) as waiting,
    ):
        wait_until(lambda: (server.stats().connections, server.stats().accepted) == (2, 1))
        server.max_connections = most
        echoes(waiting)
        echoes(inside)


# -- hooks and what raises ----------------------------------------------------------------------------------


def test_verify_request_refuses_with_a_reset() -> None:
    asked: list[Any] = []

    class Picky(Server):
        def verify_request(self, peer_address: Any) -> bool:
            asked.append(peer_address)
            return len(asked) != 2

    with serving(Echo, server=Picky) as server:
        reachable(server.address)
        with raw(server.address) as refused:
            name = refused.getsockname()
            assert ended(refused) == "reset"
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
        assert asked[1] == name
        assert (server.stats().accepted, server.stats().refused) == (2, 1)
        assert len(Echo.made) == 2


def test_verify_request_that_raises_refuses(expects_errors: list[logging.LogRecord]) -> None:
    class Broken(Server):
        broken = True

        def verify_request(self, peer_address: Any) -> bool:
            if self.broken:
                raise LookupError("no list")
            return True

    with serving(Echo, server=Broken) as server:
        with raw(server.address) as refused:
            name = refused.getsockname()
            assert ended(refused) == "reset"
        server.broken = False
        reachable(server.address)
        wait_until(lambda: server.stats().refused == 1)
    (record,) = expects_errors
    assert f"127.0.0.1:{name[1]}" in record.getMessage()
    assert record.exc_info
    assert isinstance(record.exc_info[1], LookupError)


@pytest.mark.parametrize("broken", [lambda _server, _peer: 1 // 0, lambda _server, _peer: "a connection"])
def test_a_factory_that_fails_costs_that_client_only(
    broken: Any, expects_errors: list[logging.LogRecord]
) -> None:
    makers = [broken, Echo]
    with serving(lambda server, peer: makers.pop(0)(server, peer)) as server:
        with raw(server.address) as refused:
            assert ended(refused) == "reset"
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
        assert server.stats().accepted == 1
    (record,) = expects_errors
    assert "could not make a connection" in record.getMessage()


class Shadowing(Recorder):
    """Has a name of its own where the library keeps the number of a connection."""

    @property
    def id(self) -> int:  # type: ignore[override]
        return 5


def test_a_connection_that_cannot_be_attached_costs_that_client_only(
    expects_errors: list[logging.LogRecord],
) -> None:
    makers: list[Any] = [Shadowing, Echo]
    with serving(lambda server, peer: makers.pop(0)(server, peer), max_per_host=1) as server:
        with raw(server.address) as refused:
            assert ended(refused) == "reset"
        wait_until(lambda: server.stats().handler_failed == 1)
        reachable(server.address)
        wait_until(lambda: not server.stats().connections)
        stats = server.stats()
        assert (stats.accepted, stats.handler_failed) == (1, 1)
        assert not server._hosts
    (record,) = expects_errors
    assert record.levelno == logging.ERROR
    assert "could not make a connection for 127.0.0.1:" in record.getMessage()
    assert record.exc_info
    assert isinstance(record.exc_info[1], AttributeError)


def test_a_factory_gets_server_and_peer_and_may_return_any_connection() -> None:
    calls: list[tuple[Any, Any]] = []

    def factory(server: Any, peer: Any) -> Connection:
        calls.append((server, peer))
        return Echo(server, peer)

    with serving(factory) as server, raw(server.address) as client:
        echoes(client)
        assert calls == [(server, client.getsockname())]
        (connection,) = made(Echo)
        assert connection.server is server


def test_a_factory_that_returns_one_connection_twice_costs_the_second_client(
    expects_errors: list[logging.LogRecord],
) -> None:
    one = Echo(None, None)
    with serving(lambda _server, _peer: one) as server, raw(server.address) as first:
        echoes(first)
        with raw(server.address) as second:
            assert ended(second) == "reset"
        echoes(first)
    assert len(expects_errors) == 1


class Fault(Exception):
    """What the callbacks below raise."""


def raising(where: str) -> type[Recorder]:
    """A class whose callback `where` raises in its first connection; the others echo."""

    class Raising(Echo):
        first = True

        def __init__(self, server: Any, peer: Any) -> None:
            super().__init__(server, peer)
            self.mine = type(self).first
            type(self).first = False

        def may_raise(self, name: str) -> None:
            if self.mine and name == where:
                raise Fault(name)

        def connected(self) -> None:
            self.may_raise("connect")

        def got(self, data: bytes) -> None:
            self.may_raise("data")
            if self.mine and where == "drain":
                while self.send(bytes(50_000)):
                    pass
            elif self.mine and where == "call_soon":
                self.call_soon(self.may_raise, "call_soon")
            elif self.mine and where == "timeout":
                self.set_deadline(0)
            else:
                self.send(data)

        def ended(self) -> None:
            self.may_raise("eof")

        def drained(self) -> None:
            self.may_raise("drain")

        def timed_out(self, kind: str) -> None:
            self.may_raise("timeout")

        def gone(self, exc: OSError | None) -> None:
            self.may_raise("close")

    return Raising


CALLBACKS = ["connect", "data", "eof", "drain", "timeout", "call_soon", "close"]


@pytest.mark.parametrize("work_threads", [0, 2])
@pytest.mark.parametrize("where", CALLBACKS)
def test_a_callback_that_raises_ends_its_connection_only(
    where: str, work_threads: int, expects_errors: list[logging.LogRecord]
) -> None:
    handler = raising(where)
    with serving(handler, work_threads=work_threads) as server, raw(server.address) as client:
        (bad,) = made(handler)
        with raw(server.address) as other:
            echoes(other)
            with contextlib.suppress(OSError):  # on_connect has raised, and its connection is gone
                client.sendall(b"x")
                if where in ("eof", "close"):
                    client.shutdown(socket.SHUT_WR)
                read_all(client)
            exc = bad.until("close").value
            wait_until(lambda: expects_errors)
            echoes(other)
            assert other.getsockname() in [connection.peer_address for connection in server.connections]
        bad.check()
        if where == "close":
            assert (bad.close_reason, exc) == ("eof", None)
        else:
            assert bad.close_reason == "error"
            assert isinstance(exc, ConnectionAbortedError)
            assert isinstance(exc.__cause__, Fault)
            assert str(exc.__cause__) == where
        (record,) = expects_errors
        assert record.exc_info
        assert isinstance(record.exc_info[1], Fault)
        for end in (bad.peer_address, server.address):
            assert f"127.0.0.1:{end[1]}" in record.getMessage()
        wait_until(lambda: not server.stats().connections)
        assert server.stats().closed == {str(bad.close_reason): 1, "eof": 1} or where == "close"
        reachable(server.address)


def test_handle_error_gets_what_was_raised_and_logs_nothing_itself() -> None:
    errors: list[tuple[Any, BaseException]] = []

    class Noting(Server):
        def handle_error(self, connection: Connection, exc: BaseException) -> None:
            errors.append((connection, exc))

    handler = raising("data")
    with serving(handler, server=Noting) as server:
        with raw(server.address) as client:
            client.sendall(b"x")
            assert ended(client) == "reset"
        reachable(server.address)
    ((connection, exc),) = errors
    assert connection is handler.made[0]
    assert isinstance(exc, Fault)


def test_handle_error_that_raises_is_logged(expects_errors: list[logging.LogRecord]) -> None:
    class Broken(Server):
        def handle_error(self, connection: Connection, exc: BaseException) -> None:
            raise LookupError("no mail server")

    handler = raising("data")
    with serving(handler, server=Broken) as server:
        with raw(server.address) as client:
            client.sendall(b"x")
            assert ended(client) == "reset"
        reachable(server.address)
    (record,) = expects_errors
    assert record.exc_info
    assert isinstance(record.exc_info[1], LookupError)


@pytest.mark.parametrize("fatal", [SystemExit, KeyboardInterrupt])
def test_a_callback_may_end_the_program(fatal: type[BaseException]) -> None:
    class Ending(Echo):
        def got(self, data: bytes) -> None:
            raise fatal(3)

    server = Server(LOOPBACK, Ending, io_threads=1)
    thread, outcome = serve_beside(server)
    with raw(server.address) as client:
        client.sendall(b"x")
        assert ended(client) == "reset"
    thread.join(PATIENCE)
    assert [type(exc) for exc in outcome] == [fatal]
    assert outcome[0].args == (3,)
    assert Ending.made[0].close_reason == "error"


@pytest.mark.parametrize("fatal", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["on_data", "handle_error", "verify_request", "handler"])
def test_a_callback_that_ends_the_program_stops_a_server_that_nobody_waits_for(
    fatal: type[BaseException], where: str, expects_errors: list[logging.LogRecord]
) -> None:
    """Nobody is there to raise it: the log says so, once, and the server does not run on."""

    class Ending(Echo):
        def __init__(self, server: Any = None, peer_address: Any = None) -> None:
            super().__init__(server, peer_address)
            if where == "handler":
                raise fatal(3)

        def got(self, data: bytes) -> None:
            raise fatal(3) if where == "on_data" else Fault

    class EndingServer(Server):
        def verify_request(self, peer_address: Any) -> bool:
            if where == "verify_request":
                raise fatal(3)
            return True

        def handle_error(self, connection: Connection, exc: BaseException) -> None:
            raise fatal(3)

    with serving(Ending, server=EndingServer) as server:
        with raw(server.address) as client, contextlib.suppress(OSError):
            peer = f"127.0.0.1:{client.getsockname()[1]}"
            client.sendall(b"x")
            read_all(client)
        wait_until(server._stopped.is_set, what="the server has stopped by itself")
        assert server.stop() is True
        (record,) = expects_errors
        assert where == "handle_error" or peer in record.getMessage()
        assert "serve_forever" in record.getMessage()
        assert record.exc_info
        assert isinstance(record.exc_info[1], fatal)
        with pytest.raises(fatal, match="3"):
            server.serve_forever()


# -- all connections at once --------------------------------------------------------------------------------


@contextlib.contextmanager
def clients_of(server: Any, count: int, handler: type[Recorder] = Echo) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(raw(server.address)))
            echoes(clients[-1])  # so `server.connections` has them in this order
        yield clients


def test_broadcast_reaches_all_or_those_chosen() -> None:
    with serving(Echo) as server, clients_of(server, 5) as clients:
        assert server.broadcast(b"all") == 5
        assert server.broadcast(bytearray(b"!")) == 5
        for client in clients:
            assert read_exactly(client, 4) == b"all!"
        chosen = clients[3].getsockname()
        assert server.broadcast(b"you", where=lambda c: c.peer_address == chosen) == 1
        assert read_exactly(clients[3], 3) == b"you"
        with pytest.raises(TypeError, match="str"):
            server.broadcast("text")
        for client in clients:
            echoes(client)


def test_broadcast_passes_over_those_that_are_closing() -> None:
    class Keeping(Echo):
        def ended(self) -> bool:
            return True

    with serving(Keeping) as server, clients_of(server, 3) as clients:
        server.connections[0].send_eof()
        server.connections[1].close()
        assert server.broadcast(b"x") == 1
        assert sorted(len(read_all(c)) for c in clients[:2]) == [0, 0]
        assert read_exactly(clients[2], 1) == b"x"


def test_broadcast_cuts_off_who_does_not_read() -> None:
    with (
        serving(Echo, write_buffer_max=300_000) as server,
        raw(server.address) as reader,
        raw(server.address) as sleeper,
    ):
        echoes(reader)
        echoes(sleeper)
        sent = 0
        while not server.stats().closed:
            server.broadcast(bytes(100_000))
            assert read_exactly(reader, 100_000) == bytes(100_000)
            sent += 1
            assert sent < 1000
        assert server.stats().closed == {"overflow": 1}
        echoes(reader)


def test_pause_and_resume_accepting() -> None:
    with serving(Echo, backlog=64) as server, clients_of(server, 1) as (inside,):
        server.pause_accepting()
        wait_until(lambda: server.backlog.in_use == 0)
        with raw(server.address) as waiting:  # the kernel's queue takes it
            waiting.sendall(b"hello")
            echoes(inside)
            server.pause_accepting()
            assert server.stats().accepted == 1
            server.resume_accepting()
            server.resume_accepting()
            assert read_exactly(waiting, 5) == b"hello"
        wait_until(lambda: server.backlog == Usage(64, 64))
        reachable(server.address)


def test_pausing_and_resuming_in_a_hurry_loses_nobody(io_threads: int) -> None:
    with serving(Echo, io_threads=io_threads, backlog=8) as server:
        done = threading.Event()

        def toggle() -> None:
            while not done.wait(0.005):  # without a breath it would keep the pool's lock from the I/O threads
                server.pause_accepting()
                server.resume_accepting()

        toggling = threading.Thread(target=toggle)
        toggling.start()
        try:
            for _ in range(30):
                reachable(server.address)
        finally:
            done.set()
            toggling.join(PATIENCE)
        wait_until(lambda: server.backlog == Usage(8, 8))
        wait_until(lambda: not server.stats().connections)
        assert server.stats().accepted == 30


def test_close_clients_closes_well_and_goes_on_accepting() -> None:
    with serving(Echo) as server, clients_of(server, 5) as clients:
        server.broadcast(bytes(300_000))
        server.close_clients()
        for client in clients:
            assert read_all(client) == bytes(300_000)
            client.close()
        wait_until(lambda: server.stats().closed == {"local": 5})
        assert all(connection.until("close").value is None for connection in Echo.made)
        reachable(server.address)


def test_abort_clients_resets_and_goes_on_accepting() -> None:
    with serving(Echo) as server, clients_of(server, 5) as clients:
        server.abort_clients()
        assert {ended(client) for client in clients} == {"reset"}
        wait_until(lambda: server.stats().closed == {"aborted": 5})
        reachable(server.address)


def test_connections_is_a_snapshot() -> None:
    with serving(Echo) as server, clients_of(server, 3):
        before = server.connections
        assert sorted(c.id for c in before) == sorted(c.id for c in Echo.made)
        server.abort_clients()
        wait_until(lambda: not server.connections)
        assert len(before) == 3


# -- figures ------------------------------------------------------------------------------------------------


def test_stats_count_and_return_to_zero() -> None:
    with serving(Echo, io_threads=1, backlog=64) as server:
        fresh = server.stats()
        assert (fresh.connections, fresh.accepted, fresh.bytes_received, fresh.last_accept) == (0, 0, 0, None)
        assert fresh.backlog == Usage(64, 64)
        began = time.monotonic()
        with clients_of(server, 7):
            wait_until(lambda: server.stats().bytes_sent == 35)
            during = server.stats()
            assert (during.connections, during.connections_peak, during.accepted) == (7, 7, 7)
            assert (during.bytes_received, during.bytes_sent) == (35, 35)
            assert during.last_accept is not None
            assert began - 0.1 <= during.last_accept <= time.monotonic() + 0.1
        wait_until(lambda: not server.stats().connections)
        after = server.stats()
        assert (after.connections_peak, after.closed, after.bytes_sent) == (7, {"eof": 7}, 35)
        assert after.engine.ops_pending == after.backlog.in_use == 64
        assert after.engine.packets >= after.engine.reaps > 0
    stopped = server.stats()
    assert (stopped.connections, stopped.backlog.in_use, stopped.engine.ops_pending) == (0, 0, 0)
    assert stopped.engine.io_threads == stopped.engine.stalled_threads == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stopped.accepted = 1  # type: ignore[misc]


def test_stats_before_the_start_are_refused() -> None:
    server = Server(LOOPBACK, Echo)
    with pytest.raises(RuntimeError, match="not been started"):
        server.stats()
    assert server.stop() is True


# -- the ways to stop ---------------------------------------------------------------------------------------


def test_a_with_block_starts_and_stops() -> None:
    with Server((OWN_HOST, 0), Echo) as server:
        reachable(server.address)
    assert gone(server.address)
    with contextlib.suppress(ZeroDivisionError), Server((OWN_HOST, 0), Echo) as other:
        raise ZeroDivisionError
    assert gone(other.address)


def test_starting_again_is_refused() -> None:
    with serving(Echo) as server:
        with pytest.raises(RuntimeError, match="started before"):
            server.start()
        reachable(server.address)
    with pytest.raises(RuntimeError, match="started before"):
        server.start()
    unstarted = Server((OWN_HOST, 0), Echo)
    assert unstarted.stop() is True
    assert gone(unstarted.address)
    with pytest.raises(RuntimeError, match="started before"):
        unstarted.start()


def test_stopping_again_is_no_error() -> None:
    with serving(Echo) as server:
        reachable(server.address)
        assert server.stop() is True
        assert server.stop() is True
        server.shutdown()
        server.server_close()
        server.close_clients()
        server.abort_clients()
        server.pause_accepting()
        server.resume_accepting()
        server.backlog = 3
        assert server.broadcast(b"nobody") == 0


def test_stopping_from_several_threads_at_once() -> None:
    with serving(Echo) as server, clients_of(server, 3) as clients:
        results: list[bool] = []
        threads = [threading.Thread(target=lambda: results.append(server.stop(5))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for client in clients:
            assert ended(client) == "eof"
            client.close()
        for thread in threads:
            thread.join(PATIENCE)
        assert results == [True] * 4
    assert {str(connection.close_reason) for connection in Echo.made} == {"shutdown"}


@pytest.mark.parametrize("options", [{}, {"work_threads": 2}], ids=str)
@pytest.mark.parametrize("where", ["connect", "data", "eof", "timeout", "close"])
def test_stopping_from_a_callback(where: str, options: dict[str, int]) -> None:
    answers: list[bool] = []

    class Stopping(Echo):
        def stop_in(self, name: str) -> None:
            if name == where:
                answers.append(self.server.stop(5))

        def connected(self) -> None:
            self.stop_in("connect")

        def got(self, data: bytes) -> None:
            self.stop_in("data")
            if where == "timeout":
                self.set_deadline(0)

        def ended(self) -> None:
            self.stop_in("eof")

        def timed_out(self, kind: str) -> None:
            self.stop_in("timeout")

        def gone(self, exc: OSError | None) -> None:
            self.stop_in("close")

    with serving(Stopping, (OWN_HOST, 0), **options) as server:
        with raw(server.address) as client, contextlib.suppress(OSError):
            client.sendall(b"x")
            if where in ("eof", "close"):
                client.shutdown(socket.SHUT_WR)
            read_all(client)
        wait_until(lambda: server._stopped.is_set())
        assert gone(server.address)
    assert answers == [False]
    Stopping.made[0].check()


def test_shutdown_from_another_thread_ends_serve_forever() -> None:
    server = Server((OWN_HOST, 0), Echo, io_threads=1)
    serving_thread = threading.Thread(target=server.serve_forever)
    serving_thread.start()
    reachable(server.address)
    server.shutdown()
    serving_thread.join(PATIENCE)
    assert not serving_thread.is_alive()
    assert gone(server.address)


def test_shutdown_before_serve_forever_counts() -> None:
    server = Server((OWN_HOST, 0), Echo)
    server.start()
    server.shutdown()
    server.serve_forever()
    assert gone(server.address)


def test_server_close_leaves_connections_alone() -> None:
    with serving(Echo, (OWN_HOST, 0)) as server, clients_of(server, 2) as clients:
        server.server_close()
        assert gone(server.address)
        for client in clients:
            echoes(client)
        wait_until(lambda: server.backlog.in_use == 0)


def test_stop_waits_for_who_is_busy_and_cuts_off_who_idles() -> None:
    sent = bytes(range(250)) * 16_000
    handed = threading.Event()

    class Busy(Echo):
        def got(self, data: bytes) -> None:
            self.send(sent if data == b"much" else data)
            if data == b"much":
                handed.set()

    with (
        serving(Busy, linger_timeout=60) as server,
        clients_of(server, 20) as idle,
        raw(server.address) as busy,
    ):
        busy.sendall(b"much")
        made(Busy, 21)
        assert handed.wait(PATIENCE)
        received: list[bytes] = []

        def read_late() -> None:
            wait_until(lambda: server._stopping)
            received.append(read_all(busy))
            busy.close()

        reading = threading.Thread(target=read_late)
        reading.start()
        began = time.monotonic()
        assert server.stop(10) is True
        assert time.monotonic() - began < 30
        reading.join(PATIENCE)
        assert received == [sent]
        assert {client.recv(1) for client in idle} == {b""}  # FIN came first
    assert len(Busy.made) == 21
    for connection in Busy.made:
        connection.check()
        assert connection.close_reason == "shutdown"
        assert connection.until("close").value is None


def test_stop_cuts_off_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ABORT_TIMEOUT", PATIENCE)
    with serving(Echo) as server, raw(server.address) as sleeper:
        echoes(sleeper)
        (connection,) = made(Echo)
        connection.send(bytes(8_000_000))
        began = time.monotonic()
        assert server.stop(0.5) is True
        assert time.monotonic() - began < 20, "it has 30 s to drain otherwise"
        connection.check()
        assert connection.close_reason == "shutdown"


def test_stop_says_when_a_callback_does_not_return() -> None:
    release = threading.Event()

    class Stuck(Echo):
        def got(self, data: bytes) -> None:
            release.wait(PATIENCE * 3)

    server = Server(LOOPBACK, Stuck, io_threads=1)
    with server, raw(server.address) as client:
        client.sendall(b"x")
        made(Stuck)[0].until("data")
        wait_until(lambda: server.stats().engine.stalled_threads)  # another takes what stop() cancels
        assert server.stop(0.1) is False
        release.set()
    wait_until(lambda: Stuck.made[0].closed)


def test_what_is_left_of_the_time_is_for_threads_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ABORT_TIMEOUT", 0.05)
    busy = threading.Event()

    def late() -> None:
        busy.set()
        time.sleep(0.5)

    server = Server(LOOPBACK, Echo, io_threads=1)
    server.start()
    server._home.engine.dispatcher.call_soon(late)
    assert busy.wait(PATIENCE)
    assert server.stop(PATIENCE) is True


def test_clients_that_come_during_the_stop_are_told(io_threads: int) -> None:
    for _ in range(5):
        with serving(Echo, (OWN_HOST, 0), io_threads=io_threads, linger_timeout=1) as server:
            seen: list[str] = []

            def hammer(address: Any = server.address, seen: list[str] = seen) -> None:
                while True:
                    try:
                        with raw(address, timeout=3) as client:
                            client.sendall(b"x")
                            seen.append(client.recv(1).decode() or "eof")
                    except ConnectionRefusedError:
                        return
                    except OSError:
                        seen.append("reset")

            threads = [threading.Thread(target=hammer) for _ in range(4)]
            for thread in threads:
                thread.start()
            wait_until(lambda: server.stats().accepted > 5)
            assert server.stop(PATIENCE) is True
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            assert seen.count("x") > 0
            stats = server.stats()
            assert stats.connections == 0
            assert stats.accepted == len(Echo.made) == sum(stats.closed.values())
            assert stats.accept_failed == 0, "who came during the stop was refused"
        for connection in Echo.made:
            if connection.calls:  # else it ended before it began
                connection.check()
        Echo.made.clear()


def test_who_is_accepted_while_the_server_stops_is_refused_and_counted_so() -> None:
    seen: list[str] = []

    class Late(Server):
        def server_close(self) -> None:
            if self._stopping and not seen:
                with raw(self.address) as client:
                    seen.append(ended(client))
                    wait_until(lambda: self.stats().refused == 1, what="the refusal")
            super().server_close()

    with serving(Echo, server=Late) as server:
        reachable(server.address)
        assert server.stop(5) is True
        assert seen
        stats = server.stats()
        assert (stats.refused, stats.accept_failed, stats.accepted) == (1, 0, 1)


def test_methods_after_the_end_of_a_connection() -> None:
    with serving(Echo) as server:
        reachable(server.address)
        (connection,) = made(Echo)
        connection.until("close")
        with pytest.raises(ConnectionClosedError):
            connection.send(b"x")
        wait_until(lambda: server.connections == [])


def test_the_defaults_are_those_of_the_documentation() -> None:
    server = Server(LOOPBACK)
    try:
        defaults = dataclasses.asdict(server._settings)
    finally:
        server.stop()
    assert defaults == {
        "backlog": 64,
        "listen_backlog": None,
        "accept_data": 0,
        "silent_timeout": 120,
        "idle_timeout": None,
        "linger_timeout": 5,
        "max_connections": None,
        "max_per_host": None,
        "sendcap": 4,
        "recvburst": 1,
        "recv_mode": "auto",
        "recv_size": 16 * 1024,
        "recv_buffer_max": 1024 * 1024,
        "high_mark": 64 * 1024,
        "low_mark": 16 * 1024,
        "write_buffer_max": 16 * 1024 * 1024,
        "io_threads": 0,
        "work_threads": 0,
        "processes": 1,
        "nodelay": True,
        "keepalive": None,
        "exclusive": True,
        "dualstack": None,
        "trace": 0,
        "tls": None,
        "tls_handshake_timeout": 10,
        "reject_remote": True,
        "pipe_security": None,
    }
    assert _listening.LISTEN_BACKLOG_MIN == 200

"""The way from a name to a connected socket: order, stagger, winners and losers, refusals, time-outs."""

from __future__ import annotations

import errno
import functools
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import PATIENCE, Echo, serving, wait_until
from targets import closed_port, full_queue, names

from iocp_ctypes import Engine, _connector, _sockops, _win32
from iocp_ctypes import engine as engine_module
from iocp_ctypes._addresses import parse_sockaddr
from iocp_ctypes._connector import Connector


class Result:
    """What a connector said, and how often."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, OSError | None]] = []
        self.threads: list[bool] = []
        self.engine: Engine | None = None

    def __call__(self, sock: Any, error: OSError | None) -> None:
        assert self.engine is not None
        self.threads.append(self.engine.dispatcher.is_io_thread())
        self.said.append((sock, error))

    def wait(self) -> tuple[Any, OSError | None]:
        wait_until(lambda: self.said, what="the connector says how it went")
        assert self.threads == [True]
        return self.said[0]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    made.enter(made, lambda: None)
    yield made
    wait_until(lambda: not made.ops_pending, what="no operation pending")
    assert made.leave(made)


def begin(
    engine: Engine, address: Any, *, local: Any = None, timeout: float | None = None
) -> tuple[Connector, Result]:
    result = Result()
    result.engine = engine
    connector = Connector(engine, address, local, timeout, result)
    connector.start()
    return connector, result


def connected(engine: Engine, address: Any, **kwargs: Any) -> Any:
    _connector, result = begin(engine, address, **kwargs)
    sock, error = result.wait()
    assert error is None
    return sock


def failed(engine: Engine, address: Any, **kwargs: Any) -> OSError:
    _connector, result = begin(engine, address, **kwargs)
    sock, error = result.wait()
    assert sock is None
    assert error is not None
    return error


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Note the arguments of a native function."""
    calls: list[tuple[Any, ...]] = []
    native = getattr(_win32, name)

    def noting(*args: Any) -> Any:
        calls.append(args)
        return native(*args)

    monkeypatch.setattr(_win32, name, noting)
    return calls


def test_a_numeric_address_needs_no_resolver(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "resolve", None)
    with serving(Echo) as server:
        sock = connected(engine, server.address)
        assert sock.peer_raw
        assert sock.local_raw != sock.peer_raw
        sock.close()


@pytest.mark.wine_differs("connect-context")
def test_the_context_is_updated(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options = watch(monkeypatch, "setsockopt")
    with serving(Echo) as server:
        sock = connected(engine, server.address)
        sock.shutdown_send()
        sock.close()
    assert [call[2] for call in options].count(_win32.SO_UPDATE_CONNECT_CONTEXT) == 1


def test_the_peer_sees_the_end_of_a_connected_socket(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        sock = connected(engine, listener.getsockname())
        peer, _address = listener.accept()
        with peer:
            peer.settimeout(PATIENCE)
            sock.shutdown_send()
            assert peer.recv(1) == b""
        sock.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "127.0.0.2"])
def test_refusal(engine: Engine, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    controls = watch(monkeypatch, "WSAIoctl")
    address = closed_port(host)
    times = []
    for _ in range(3):  # the best of three, because the machine may be busy
        began = time.monotonic()
        error = failed(engine, address)
        times.append(time.monotonic() - began)
        assert type(error) is ConnectionRefusedError
        assert error.winerror == 10061
        assert error.errno == errno.ECONNREFUSED
        assert str(error).count("WinError 10061") == 1
        assert f"{address[1]}" in str(error)
    assert min(times) < 1  # the system tries for 2 s where SYNs to this machine are repeated
    (values, size), *_ = [call[2:4] for call in controls if call[1] == _win32.SIO_TCP_INITIAL_RTO]
    assert (values._obj.Rtt, values._obj.MaxSynRetransmissions, size) == (0xFFFF, 0xFE, 4)


def test_a_dead_ipv6_address_before_a_living_ipv4_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_queue("::1") as dead, serving(Echo) as server:
        names(monkeypatch, {"two.test": [dead, server.address]})
        times = []
        while len(times) < 10 and min(times, default=1) >= 0.4:  # a busy machine may need more than one
            began = time.monotonic()
            sock = connected(engine, ("two.test", server.address[1]))
            times.append(time.monotonic() - began)
            assert sock.family == socket.AF_INET
            sock.close()
            wait_until(lambda: not engine.ops_pending, what="the loser's packet")
        assert min(times) < 0.4
        assert min(times) >= _connector.STAGGER * 0.9


def test_a_refusal_begins_the_next_attempt_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connector, "STAGGER", 3600.0)
    with serving(Echo) as server:
        names(monkeypatch, {"two.test": [closed_port("::1"), server.address]})
        connected(engine, ("two.test", server.address[1])).close()


def test_attempts_begin_one_after_the_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second a STAGGER after the first; the third when the second is refused."""
    begun: list[tuple[str, float]] = []
    attempt = Connector._attempt

    def noting(self: Connector, family: int, address: Any) -> bool:
        begun.append((address[0], time.monotonic()))
        return attempt(self, family, address)

    monkeypatch.setattr(Connector, "_attempt", noting)
    with full_queue("::1") as silent, serving(Echo) as server:
        refusing = closed_port()
        names(monkeypatch, {"many.test": [silent, refusing, server.address]})
        connected(engine, ("many.test", 9)).close()
    hosts = [host for host, _at in begun]
    assert hosts == ["::1", refusing[0], "127.0.0.1"]
    assert begun[1][1] - begun[0][1] >= _connector.STAGGER * 0.9


def test_losers_are_cancelled_and_awaited(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connector, "STAGGER", 0.01)
    closed: list[Any] = []
    close = _sockops.OverlappedSocket.close

    def noting(self: Any) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(_sockops.OverlappedSocket, "close", noting)
    with (
        full_queue("::1") as dead,
        full_queue() as dead_too,
        serving(Echo) as server,
    ):
        names(monkeypatch, {"three.test": [dead, dead_too, server.address]})
        sock = connected(engine, ("three.test", 9))
        wait_until(lambda: not engine.ops_pending, what="the losers' packets")
        assert sock not in closed
        wait_until(lambda: len({id(one) for one in closed if one.family == socket.AF_INET6}) == 1)
        sock.close()


def test_the_first_error_is_told_when_all_fail(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, {"none.test": [closed_port("::1"), closed_port()]})
    error = failed(engine, ("none.test", 80))
    assert type(error) is ConnectionRefusedError
    assert "none.test:80" in str(error)


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (socket.gaierror(11001, "no such host"), socket.gaierror, "cannot look up 'odd.test': no such host"),
        (UnicodeError("label too long"), socket.gaierror, "label too long"),
        (MemoryError(), socket.gaierror, "cannot look up 'odd.test'"),
        ([], OSError, "'odd.test' has no address"),
    ],
)
def test_a_name_that_cannot_be_looked_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, answer: Any, kind: type[OSError], text: str
) -> None:
    names(monkeypatch, {"odd.test": answer})
    error = failed(engine, ("odd.test", 80))
    assert type(error) is kind
    assert text in str(error)


def test_a_look_up_that_lasts_is_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    names(monkeypatch, {"slow.test": lambda: go.wait(30) and []})
    try:
        error = failed(engine, ("slow.test", 80), timeout=0.05)
        assert type(error) is TimeoutError
        assert "slow.test:80 did not answer within timeout=0.05 s" in str(error)
        connector, result = begin(engine, ("slow.test", 80))
        connector.cancel()
        assert result.wait()[0] is None
    finally:
        go.set()


def test_look_ups_are_bounded_and_those_given_up_are_skipped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    asked = names(monkeypatch, {"slow.test": lambda: go.wait(30) and []})
    try:
        begun = [begin(engine, ("slow.test", 80)) for _ in range(20)]
        wait_until(lambda: len(asked) == engine_module.RESOLVERS_MAX)
        for connector, _result in begun:
            connector.cancel()
        for _connector, result in begun:
            result.wait()
    finally:
        go.set()
    wait_until(lambda: not engine._resolvers)
    assert len(asked) == engine_module.RESOLVERS_MAX


def test_a_system_short_of_threads_looks_names_up_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "RESOLVER_RETRY", 0.01)
    start = threading.Thread.start
    left = [3]

    def failing(thread: threading.Thread) -> None:
        if thread.name == "iocp_ctypes resolver" and left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    with serving(Echo) as server:
        names(monkeypatch, {"one.test": [server.address]})
        connected(engine, ("one.test", 80)).close()
    assert left == [0]


def test_cancel_once_twice_and_late(engine: Engine) -> None:
    with full_queue() as address:
        connector, result = begin(engine, address)
        connector.cancel()
        connector.cancel()
        sock, error = result.wait()
        assert sock is None
        assert error is not None
    connector.cancel()
    assert len(result.said) == 1


def test_success_and_time_out_meet(engine: Engine) -> None:
    """Whoever is first wins, the other is as if it had not been: one answer, no socket left."""
    with serving(Echo, io_threads=0) as server:
        outcomes = []
        for number in range(150):
            _connector, result = begin(engine, server.address, timeout=0.0002 * (number % 10 + 1))
            outcomes.append(result)
        for result in outcomes:
            sock, error = result.wait()
            assert (sock is None) != (error is None)
            if sock is not None:
                sock.close()
            else:
                assert type(error) is TimeoutError
        wait_until(lambda: not engine.ops_pending)
        assert all(len(result.said) == 1 for result in outcomes)
        server.abort_clients()


def test_from_a_local_address(engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        sock = connected(engine, listener.getsockname(), local=("127.0.0.3", 0))
        peer, address = listener.accept()
        peer.close()
        assert address[0] == "127.0.0.3"
        sock.close()


def test_only_addresses_of_the_family_of_the_local_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Echo) as server:
        names(monkeypatch, {"two.test": [closed_port("::1"), server.address], "six.test": ["::1"]})
        connected(engine, ("two.test", 80), local=("127.0.0.1", 0)).close()
        error = failed(engine, ("six.test", 80), local=("127.0.0.1", 0))
        assert "no address of the family of local_address=('127.0.0.1', 0)" in str(error)


def test_a_local_address_that_is_taken(engine: Engine) -> None:
    with serving(Echo) as server, socket.create_server(("127.0.0.1", 0)) as taken:
        error = failed(engine, server.address, local=taken.getsockname())
        assert f"cannot connect from 127.0.0.1:{taken.getsockname()[1]}" in str(error)


def gives_way_soon(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have attempts give way after 0.2 s; the list gets the seconds that they would have had."""
    shares: list[float] = []
    later = engine.watchdog.later

    def soon(seconds: float, action: Any) -> Any:
        if isinstance(action, functools.partial):
            assert action.func.__name__ == "_give_way"
            shares.append(seconds)
            seconds = 0.2
        return later(seconds, action)

    monkeypatch.setattr(engine.watchdog, "later", soon)
    return shares


def test_from_a_fixed_port_a_living_address_behind_a_dead_one_is_tried(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts cannot have the port at a time: each has its share of the time, and then gives way."""
    monkeypatch.setattr(_connector, "STAGGER", 0.01)
    local = closed_port()
    with full_queue() as dead, serving(Echo) as server:
        names(monkeypatch, {"two.test": [dead, server.address]})
        shares = gives_way_soon(engine, monkeypatch)
        sock = connected(engine, ("two.test", 9), local=local, timeout=60.0)
        assert len(shares) == 1
        assert 25 < shares[0] <= 30
        assert parse_sockaddr(sock.local_raw) == local
        sock.close()


def test_from_a_fixed_port_the_next_attempt_waits_for_the_one_before(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a time-out as long as the system tries, which is what the test ends here."""
    monkeypatch.setattr(_connector, "STAGGER", 0.01)
    with full_queue() as dead, serving(Echo) as server:
        names(monkeypatch, {"three.test": [closed_port(), dead, server.address]})
        connector, result = begin(engine, ("three.test", 9), local=closed_port())
        wait_until(lambda: len(connector._waiting) == 1)
        time.sleep(0.1)
        wait_until(lambda: len(connector._attempts) == len(connector._waiting) == 1)
        with connector._lock:  # held until the attempt is issued
            attempts = list(connector._attempts.values())
        for attempt in attempts:
            attempt.cancel()
        sock, error = result.wait()
        assert error is None
        sock.close()


def test_from_a_fixed_port_the_first_error_is_told_when_all_fail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with full_queue() as dead:
        names(monkeypatch, {"none.test": [dead, closed_port()]})
        gives_way_soon(engine, monkeypatch)
        error = failed(engine, ("none.test", 9), local=closed_port(), timeout=60.0)
        assert type(error) is TimeoutError
        assert f"{dead[0]}:{dead[1]} did not answer" in str(error)


def test_an_attempt_that_is_over_in_time_is_not_what_gives_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog may have the deadline in hand when the attempt is retired: it must not hit the next."""
    with full_queue() as dead, full_queue() as dead_too:
        names(monkeypatch, {"two.test": [dead, dead_too]})
        connector, result = begin(engine, ("two.test", 9), local=closed_port())
        wait_until(lambda: connector._attempts)
        with connector._lock:  # it is held until the attempt is issued
            (first,) = connector._attempts.values()
        first.cancel()
        wait_until(lambda: not connector._waiting and connector._attempts)
        connector._give_way(first, dead)
        time.sleep(0.05)
        assert connector._attempts
        connector.cancel()
        result.wait()


def test_a_socket_that_meets_itself_is_refused(engine: Engine) -> None:
    address = closed_port()
    error = failed(engine, address, local=address)
    assert type(error) is ConnectionRefusedError


def test_connect_ex_that_fails_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such(*_args: Any) -> Any:
        raise OSError(errno.EINVAL, "the provider has no ConnectEx")

    monkeypatch.setattr(_sockops, "_extension", no_such)
    assert "no ConnectEx" in str(failed(engine, closed_port()))


def test_scopes_are_kept(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def noting(self: Any, operation: Any, handler: Any, address: Any) -> int:
        seen.append((self.family, address))
        return 10049

    monkeypatch.setattr(_sockops.OverlappedSocket, "connect", noting)
    error = failed(engine, ("fe80::1", 80, 0, 4))
    assert error.winerror == 10049
    assert seen == [(int(socket.AF_INET6), ("fe80::1", 80, 0, 4))]

"""The figures of servers, connections and engines: true at an instant, exact in the sum, zero at the end."""

from __future__ import annotations

import dataclasses
import errno
import threading
import time
from typing import Any

import pytest
from support import LOOPBACK, OWN_HOST, Echo, Recorder, echoes, made, raw, reachable, serving, wait_until

from iocp_ctypes import Connection, Datagram, Engine, Server, Stats, Usage, connect, open_stream
from iocp_ctypes._lifetime import SMALL_RECEIVE
from iocp_ctypes._watching import REAPED


def quiet(server: Any) -> Stats:
    """Wait until nobody is connected, and return the figures."""
    wait_until(lambda: not server.stats().connections, what="nobody connected")
    stats: Stats = server.stats()
    return stats


def all_gone(stats: Stats) -> None:
    """Assert that what says "now" says nothing."""
    assert stats.connections == stats.parked == stats.write_queued == stats.unread == stats.bytes_held == 0
    assert stats.sendcap.in_use == stats.recvburst.in_use == 0
    assert not any(stats.work_queued)


def ended(server: Any, engine: Any) -> None:
    """Assert what is true of a server that has stopped, and of its engine if it had no other user."""
    stats = server.stats()
    all_gone(stats)
    assert stats.backlog.in_use == stats.sockets == 0
    figures = engine.stats()
    assert figures.users == figures.sockets == figures.ops_pending == figures.bytes_pending == 0
    assert figures.io_threads == figures.stalled_threads == 0


# -- what is counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recv_mode", ["auto", "flow", "zero-byte"])
def test_operations_and_bytes_are_counted_exactly(recv_mode: str, io_threads: int) -> None:
    clients, rounds, size = 8, 50, 100

    def talk(client: Any) -> None:
        for _ in range(rounds):
            echoes(client, bytes(size))

    with serving(Echo, recv_mode=recv_mode, io_threads=io_threads) as server:
        sockets = [raw(server.address) for _ in range(clients)]
        threads = [threading.Thread(target=talk, args=(client,)) for client in sockets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: server.stats().bytes_sent == clients * rounds * size)
        for living in (True, False):  # the sums are the same when the connections have gone
            stats = server.stats()
            assert stats.accepted == stats.connections_peak == clients
            assert stats.bytes_received == stats.bytes_sent == clients * rounds * size
            assert stats.sends == clients * rounds
            assert stats.receives >= clients * rounds
            if recv_mode == "zero-byte":
                assert stats.receives >= 2 * clients * rounds
            assert 0 <= stats.receives_at_once <= stats.receives
            assert 0 < stats.sends_at_once <= stats.sends
            if living:
                figures = [connection.stats() for connection in made(Echo, clients)]
                assert sum(one.sends for one in figures) == stats.sends
                assert sum(one.bytes_sent for one in figures) == stats.bytes_sent
                for client in sockets:
                    client.close()
                all_gone(quiet(server))
        engine = server.engine
        wait_until(lambda: engine.stats().turns >= engine.stats().packets > 0)
        assert engine.stats().packets_per_reap == pytest.approx(
            engine.stats().packets / engine.stats().reaps, rel=0.5
        )
    ended(server, engine)


def test_a_server_before_anything_happened() -> None:
    idle = Server(LOOPBACK, Echo)
    with pytest.raises(RuntimeError, match="has not been started"):
        idle.stats()
    idle.server_close()
    with serving(Echo, backlog=7) as server:
        stats = server.stats()
        assert stats.backlog == Usage(7, 7)
        assert stats.sockets == 8
        assert stats.engine.sockets == 8
        assert stats.engine.ops_pending == 7
        assert stats.engine.bytes_pending > 7 * 32, "two addresses each"
        assert stats.engine.users == 1
        assert (stats.last_accept, stats.since_accept) == (None, None)
        assert stats.reaped_by == {"silent": 0, "idle": 0, "deadline": 0}
        assert stats.engine.packets_per_reap >= 0.0
        all_gone(stats)
        server.server_close()
        wait_until(lambda: server.stats().sockets == 0)
    ended(server, server.engine)


def test_the_time_since_the_last_accept() -> None:
    with serving(Echo) as server:
        before = time.monotonic()
        reachable(server.address)
        stats = server.stats()
        assert stats.last_accept is not None
        assert stats.since_accept is not None
        assert before - 0.1 <= stats.last_accept <= time.monotonic()
        assert 0 <= stats.since_accept <= time.monotonic() - before + 0.1


def test_sockets_are_counted_by_the_engine() -> None:
    engine = Engine(1)
    with serving(Echo, engine=engine, backlog=2) as server:
        assert engine.stats().sockets == 3
        with open_stream(server.address, 5, engine=engine) as stream:
            stream.write(b"x")
            assert stream.readexactly(1) == b"x"
            assert engine.stats().sockets == 5  # both ends
            assert engine.stats().users == 2
            with Datagram(LOOPBACK, engine=engine):
                assert engine.stats().sockets == 6
                assert engine.stats().users == 3
        wait_until(lambda: engine.stats().sockets == 3)
        wait_until(lambda: engine.stats().users == 1)
    ended(server, engine)


def test_what_is_queued_and_in_flight() -> None:
    class Floods(Recorder):
        def connected(self) -> None:
            self.send(bytes(12_000_000))

    with serving(Floods, sendcap=3) as server, raw(server.address) as client:
        (connection,) = made(Floods)
        connection.until("connect")

        def full() -> Any:
            stats, own = server.stats(), connection.stats()
            same = own.write_queued == connection.write_buffer_size == stats.write_queued
            return stats if same and stats.sendcap == own.sendcap == Usage(3, 3) else None

        stats = wait_until(full)  # the system may still take a send
        assert 3_000_000 < stats.write_queued <= stats.bytes_held
        assert stats.engine.bytes_pending > 3 * 1024
        assert stats.sends_at_once < stats.sends
        connection.abort()
        client.recv(1)
        all_gone(quiet(server))


def test_what_came_while_reading_was_paused_is_unread() -> None:
    class Pauses(Recorder):
        def got(self, data: bytes) -> None:
            self.pause_reading()

    with serving(Pauses, recv_mode="flow", work_threads=1) as server, raw(server.address) as client:
        (connection,) = made(Pauses)
        connection.until("connect")
        wait_until(lambda: connection.stats().recvburst.in_use == 1)
        connection.pause_reading()
        client.sendall(bytes(700))
        wait_until(lambda: connection.stats().unread == 700)
        stats = server.stats()
        assert stats.unread == 700
        assert stats.bytes_held == connection.stats().bytes_held >= 700
        assert stats.recvburst == connection.stats().recvburst == Usage(1, 0)
        connection.resume_reading()
        wait_until(lambda: connection.received == bytes(700))
        assert server.stats().unread == 0


def test_receives_in_flight() -> None:
    with serving(Echo, recv_mode="flow", recv_size=4096) as server:
        clients = [raw(server.address) for _ in range(3)]
        wait_until(lambda: server.stats().recvburst == Usage(1, 3))
        assert server.stats().bytes_held == 3 * 4096
        server.recv_mode = "auto"
        reachable(server.address)
        for client in clients:
            client.close()
        all_gone(quiet(server))
    with serving(Echo, recv_mode="auto") as server, raw(server.address):
        wait_until(lambda: server.stats().bytes_held == SMALL_RECEIVE)


def test_a_connection_tells_its_figures() -> None:
    before = time.monotonic()
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client, bytes(10))
        (connection,) = made(Echo)
        wait_until(lambda: connection.bytes_sent == 10)
        figures = connection.stats()
        assert figures.id == connection.id
        assert (figures.bytes_received, figures.bytes_sent, figures.sends) == (10, 10, 1)
        assert figures.receives >= 1
        assert 0 <= figures.idle <= figures.age <= time.monotonic() - before + 1
        connection.close()
        client.close()
        assert connection.wait_closed(5)
        figures = connection.stats()
        assert (figures.bytes_received, figures.bytes_sent, figures.sends) == (10, 10, 1)
        assert figures.write_queued == figures.unread == figures.bytes_held == 0
        assert figures.sendcap.in_use == figures.recvburst.in_use == 0


def test_a_client_that_is_not_connected_tells_zeros() -> None:
    with Server((OWN_HOST, 0), Echo, io_threads=1) as server:
        nobody = server.address
    connection = connect(nobody, Recorder)
    for _ in range(2):
        figures = connection.stats()
        assert figures.receives == figures.sends == figures.bytes_sent == figures.bytes_held == 0
        assert figures.recvburst == Usage(1, 0)
        assert connection.wait_closed(10)


# -- why they went ------------------------------------------------------------------------------------------


def test_the_reaped_by_reason() -> None:
    class Impatient(Recorder):
        def got(self, data: bytes) -> None:
            if data == b"deadline":
                self.set_deadline(0)
            elif data == b"idle":
                self.idle_timeout = 0.05

    with serving(Impatient, silent_timeout=0.2) as server:
        with raw(server.address) as client:
            assert client.recv(1) == b""
        server.silent_timeout = None
        for what in (b"deadline", b"idle"):
            with raw(server.address) as client:
                client.sendall(what)
                assert client.recv(1) == b""
        with raw(server.address) as client:
            client.sendall(b"x")
        wait_until(lambda: sum(server.stats().closed.values()) == 4)
        stats = server.stats()
        assert stats.reaped_by == {"silent": 1, "idle": 1, "deadline": 1}
        assert stats.reaped == 3
        assert {name: stats.closed[name] for name in stats.reaped_by} == stats.reaped_by
    assert [reason.value for reason in REAPED] == ["silent", "idle", "deadline"]


def test_the_silent_inside_acceptex_count_as_well() -> None:
    with serving(Echo, accept_data=10, silent_timeout=1) as server, raw(server.address) as silent:
        silent.settimeout(20)
        assert silent.recv(1) == b""
        wait_until(lambda: server.stats().reaped_by["silent"] == 1)
        assert server.stats().reaped == 1
        assert server.stats().accept_failed == 0


@pytest.mark.usefixtures("expects_errors")
def test_who_is_turned_away() -> None:
    class Choosy(Server):
        def verify_request(self, peer_address: Any) -> bool:
            return self.welcome

        welcome = True

    def handler(server: Any, peer: Any) -> Connection:
        if server.stats().accepted:
            raise OSError(errno.ENOMEM, "no more")
        return Echo(server, peer)

    with serving(handler, server=Choosy) as server, raw(server.address) as first:
        echoes(first)
        with raw(server.address):
            wait_until(lambda: server.stats().handler_failed == 1)
        server.welcome = False
        with raw(server.address):
            wait_until(lambda: server.stats().refused == 1)
        stats = server.stats()
        assert (stats.connections, stats.accepted, stats.accept_failed) == (1, 1, 0)


def test_who_waits_above_max_connections() -> None:
    addresses = [LOOPBACK, LOOPBACK]
    with serving(Echo, address=addresses, max_connections=1) as server:
        with raw(server.addresses[0]) as first:
            echoes(first)
            with raw(server.addresses[1]):
                wait_until(lambda: server.stats().parked == 1)
                assert server.stats().accepted == 1
        wait_until(lambda: not server.stats().parked)
        all_gone(quiet(server))


# -- while it runs ------------------------------------------------------------------------------------------


def test_nobody_is_counted_twice_or_not_at_all(io_threads: int) -> None:
    """Figures are read while connections come and go: sums only grow, and never above what was sent."""
    clients, rounds, size = 4, 60, 10
    offered = 0
    counting = threading.Lock()
    failed: list[BaseException] = []

    def come_and_go() -> None:
        nonlocal offered
        try:
            for _ in range(rounds):
                with raw(server.address) as client:
                    with counting:
                        offered += size
                    echoes(client, bytes(size))
        except BaseException as exc:
            failed.append(exc)

    with serving(Echo, io_threads=io_threads) as server:
        threads = [threading.Thread(target=come_and_go) for _ in range(clients)]
        for thread in threads:
            thread.start()
        last = server.stats()
        while any(thread.is_alive() for thread in threads):
            stats = server.stats()
            with counting:
                most = offered
            assert last.bytes_received <= stats.bytes_received <= most
            assert last.sends <= stats.sends <= most // size
            assert last.receives <= stats.receives
            assert stats.connections_peak >= stats.connections >= 0
            last = stats
            time.sleep(0.001)  # or whoever else needs the GIL waits for it
        for thread in threads:
            thread.join()
        assert not failed, failed
        stats = quiet(server)
        assert stats.bytes_received == stats.bytes_sent == clients * rounds * size
        assert stats.sends == stats.accepted == clients * rounds
        assert sum(stats.closed.values()) == clients * rounds
    ended(server, server.engine)


def test_figures_never_need_the_locks_of_connections() -> None:
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        with connection._lock:
            found: list[Any] = []
            other = threading.Thread(target=lambda: found.extend((server.stats(), connection.stats())))
            other.start()
            other.join(10)
            assert len(found) == 2


def test_every_figure_becomes_json() -> None:
    import json

    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        (connection,) = made(Echo)
        for figures in (server.stats(), connection.stats(), server.engine.stats()):
            assert json.loads(json.dumps(dataclasses.asdict(figures)))

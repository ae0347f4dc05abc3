"""Broadcasts by the relay: in order with all else, gathered where they come fast, nothing lost or held up."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from secure import client_context, server_context
from support import PATIENCE, Echo, Recorder, ended, made, raw, read_all, read_exactly, serving, wait_until
from wspeer import TEXT, Peer, noted, websockets

from iocp_ctypes import server as server_module
from iocp_ctypes._flow import SEND_GATHER_MAX
from iocp_ctypes._lifetime import POSTED
from iocp_ctypes.websocket import _hub

BLOCK = bytes(range(256)) * 4


class Held:
    """The engine's relay, walking only when the test says so."""

    def __init__(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: deque[Callable[[], None]] = deque()
        self.engine = server.engine
        monkeypatch.setattr(self.engine.relay, "_execute", self.tasks.append)

    def go(self) -> None:
        """Walk, on an I/O thread, until nobody waits."""
        while self.tasks:
            walked, task = threading.Event(), self.tasks.popleft()
            self.engine.dispatcher.call_soon(lambda task=task, walked=walked: (task(), walked.set()))
            assert walked.wait(PATIENCE)


@pytest.fixture
def by_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have even the smallest broadcast go by the relay."""
    monkeypatch.setattr(server_module, "DIRECT_MAX", 0)
    monkeypatch.setattr(_hub, "DIRECT_MAX", 0)


@contextlib.contextmanager
def held(
    monkeypatch: pytest.MonkeyPatch, handler: type[Recorder] = Echo, clients: int = 1, **options: Any
) -> Iterator[Any]:
    with serving(handler, **options) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(raw(server.address)) for _ in range(clients)]
        wait_until(lambda: len(server.connections) == clients)
        for connection in server.connections:
            connection.until("connect")
            # Only then are on_connect, and what is sent after it, over.
            wait_until(lambda one=connection: one._reading == POSTED)  # type: ignore[misc]
        relay = Held(server, monkeypatch)
        yield server, relay, sockets
        relay.go()


def test_what_is_sent_afterwards_comes_afterwards(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (server, relay, (client,)):
        (connection,) = server.connections
        assert server.broadcast(b"one ") == 1
        assert connection.write_buffer_size == 4
        connection.send(b"two ")  # which takes with it what waits
        assert read_exactly(client, 8) == b"one two "
        relay.go()
        assert server.broadcast(b"three ") == 1
        connection.send_many([b"four ", b"five"])
        assert read_exactly(client, 15) == b"three four five"
        relay.go()
        connection.close()
        assert read_all(client) == b""


def test_broadcasts_before_a_turn_go_out_in_one_send(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, clients=3) as (server, relay, clients):
        for number in range(10):
            assert server.broadcast(b"%d " % number) == 3
        assert [connection.stats().sends for connection in server.connections] == [0, 0, 0]
        relay.go()
        for client in clients:
            assert read_exactly(client, 20) == b"0 1 2 3 4 5 6 7 8 9 "
        assert [connection.stats().sends for connection in server.connections] == [1, 1, 1]


def test_closing_sends_first_what_waits(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, clients=3) as (server, relay, (closed, half, aborted)):
        of = {connection.peer_address: connection for connection in server.connections}
        assert server.broadcast(BLOCK) == 3
        of[closed.getsockname()].close()
        of[half.getsockname()].send_eof()
        of[aborted.getsockname()].abort()
        assert ended(aborted) == "reset"
        assert server.broadcast(b"not to these") == 0
        assert read_all(closed) == BLOCK
        assert read_all(half) == BLOCK
        relay.go()  # turns of which nothing is left
        closed.close()
        half.close()
        wait_until(lambda: not server.connections)
        assert server.stats().closed == {"local": 1, "aborted": 1, "eof": 1}


def test_drain_follows_where_the_turn_sent_all(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch, low_mark=0) as (server, relay, (client,)):
        server.broadcast(BLOCK)
        server.connections[0].high_mark = 1000
        with server.connections[0]._lock:  # as where it was full when the turn was asked for
            assert not server.connections[0]._flow.mark(1000)
        relay.go()
        assert made(Echo)[0].until("drain")
        assert read_exactly(client, len(BLOCK)) == BLOCK


def test_a_drain_that_blocks_holds_nobody_up(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    class Blocking(Recorder):
        def drained(self) -> None:
            assert gate.wait(PATIENCE)

    with held(monkeypatch, Blocking, 2, low_mark=0) as (server, relay, clients):
        server.broadcast(BLOCK)
        for connection in server.connections:
            with connection._lock:
                connection._flow.above = True
        relay.go()  # which waits for all turns
        for client in clients:
            assert read_exactly(client, len(BLOCK)) == BLOCK
        gate.set()
        for connection in server.connections:
            connection.until("drain")


def test_that_the_relay_is_late_is_not_the_peers_fault(
    by_relay: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the high mark, or with many that wait, who broadcasts sends itself: so nobody is cut off."""
    options = {"high_mark": 3000, "low_mark": 0, "write_buffer_max": 4000}
    with held(monkeypatch, **options) as (server, relay, (client,)):
        for _ in range(20):
            assert server.broadcast(BLOCK) == 1
        assert read_exactly(client, 18 * len(BLOCK)) == 18 * BLOCK
        relay.go()
        assert read_exactly(client, 2 * len(BLOCK)) == 2 * BLOCK
        for _ in range(3 * SEND_GATHER_MAX):
            assert server.broadcast(b"!") == 1
        assert read_exactly(client, 2 * SEND_GATHER_MAX) == 2 * SEND_GATHER_MAX * b"!"
        relay.go()
        assert read_exactly(client, SEND_GATHER_MAX) == SEND_GATHER_MAX * b"!"
        assert not made(Echo)[0].names.count("drain")


def test_who_does_not_read_is_cut_off(by_relay: None) -> None:
    with (
        serving(Echo, write_buffer_max=300_000) as server,
        raw(server.address) as reader,
        raw(server.address),
    ):
        wait_until(lambda: len(server.connections) == 2)
        while not server.stats().closed:
            server.broadcast(bytes(100_000))
            assert read_exactly(reader, 100_000) == bytes(100_000)
        assert server.stats().closed == {"overflow": 1}


def test_detaching_sends_what_waits(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Giving(Recorder):
        sock: Any = None

        def got(self, data: bytes) -> None:
            self.sock = self.detach(timeout=0)

    with held(monkeypatch, Giving) as (server, _relay, (client,)):
        server.broadcast(BLOCK)
        client.sendall(b"give it")
        connection = made(Giving)[0]
        connection.until("close")
        with connection.sock as sock:
            sock.sendall(b"and then")
            assert read_exactly(client, len(BLOCK) + 8) == BLOCK + b"and then"


def test_a_connection_waits_for_one_turn_at_a_time(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as (server, relay, (client,)):
        for number in range(3):
            server.broadcast(b"%d" % number)
        assert len(relay.engine.relay._waiting) == 1
        relay.go()
        server.broadcast(b"3")
        assert len(relay.engine.relay._waiting) == 1
        relay.go()
        assert read_exactly(client, 4) == b"0123"


def test_many_threads_to_many_clients(io_threads: int) -> None:
    """More than DIRECT_MAX clients: by the relay as it is. Each gets each thread's messages in order."""
    count, threads, each = server_module.DIRECT_MAX + 16, 3, 40
    with serving(Echo, io_threads=io_threads) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(raw(server.address)) for _ in range(count)]
        wait_until(lambda: len(server.connections) == count)
        some = server.connections[:8]

        def tell(which: int) -> None:
            for number in range(each):
                assert server.broadcast(b"%d:%02d " % (which, number)) == count

        def chatter() -> None:
            for number in range(each):
                for connection in some:
                    connection.send(b"9:%02d " % number)

        telling = [threading.Thread(target=tell, args=(which,)) for which in range(threads)]
        telling.append(threading.Thread(target=chatter))
        for thread in telling:
            thread.start()
        for thread in telling:
            thread.join()
        numbers = [b"%02d" % number for number in range(each)]
        own = {connection.peer_address for connection in some}
        for client in clients:
            speakers = [b"0", b"1", b"2", *([b"9"] if client.getsockname() in own else [])]
            words = read_exactly(client, 5 * each * len(speakers)).split()
            for speaker in speakers:
                assert [word[2:] for word in words if word[:1] == speaker] == numbers
        wait_until(lambda: not server.engine.relay._waiting)


def test_a_callback_that_broadcasts_and_then_blocks_holds_nobody_up(by_relay: None) -> None:
    gate = threading.Event()

    class Blocking(Recorder):
        def got(self, data: bytes) -> None:
            self.server.broadcast(data)
            gate.wait(PATIENCE)

    with serving(Blocking, io_threads=1) as server, raw(server.address) as one, raw(server.address) as two:
        wait_until(lambda: len(server.connections) == 2)
        one.sendall(b"hello")
        try:
            assert read_exactly(two, 5) == read_exactly(one, 5) == b"hello"
        finally:
            gate.set()


def test_a_websockets_messages_stay_in_order(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with websockets(noted(echo=False)) as server, Peer(server.address, "/") as peer:
        wait_until(lambda: len(server.websockets) == 1)
        relay = Held(server, monkeypatch)
        (websocket,) = server.websockets
        assert server.broadcast("one") == 1
        websocket.send("two")
        assert server.broadcast("three") == 1
        relay.go()
        for text in ("one", "two", "three"):
            peer.expect(TEXT, text)


def test_a_subclasss_own_send_is_called(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Framed(Echo):
        def send(self, data: Any) -> bool:
            return super().send(len(data).to_bytes(2, "big") + data)

    with held(monkeypatch, Framed) as (server, _relay, (client,)):
        assert server.broadcast(b"hello") == 1
        assert read_exactly(client, 7) == b"\x00\x05hello"


def test_between_sends_and_files(by_relay: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"<file>")
    with held(monkeypatch) as (server, relay, (client,)):
        (connection,) = server.connections
        server.broadcast(b"one ")
        connection.send_file(path)
        server.broadcast(b" two")
        assert read_exactly(client, 14) == b"one <file> two"
        relay.go()


def test_what_waits_when_tls_begins_goes_in_the_clear(
    by_relay: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(monkeypatch) as (server, relay, (client,)):
        server.broadcast(b"begin\n")
        server.connections[0].start_tls(server_context(), server_side=True)
        server.broadcast(b"under it")
        relay.go()
        assert read_exactly(client, 6) == b"begin\n"
        with client_context().wrap_socket(client, server_hostname="localhost") as secured:
            assert secured.recv(8) == b"under it"


def test_on_work_threads(by_relay: None) -> None:
    class Where(Recorder):
        def drained(self) -> None:
            self.thread = threading.current_thread().name

    with serving(Where, work_threads=2, low_mark=0) as server, raw(server.address) as client:
        (connection,) = made(Where)
        connection.until("connect")
        with connection._lock:
            connection._flow.above = True
        server.broadcast(BLOCK)
        assert read_exactly(client, len(BLOCK)) == BLOCK
        connection.until("drain")
        wait_until(lambda: "work" in getattr(connection, "thread", ""))


def test_stopping_sends_what_waits(by_relay: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Echo) as server, raw(server.address) as client:
        wait_until(lambda: len(server.connections) == 1)
        server.connections[0].until("connect")
        Held(server, monkeypatch)
        server.broadcast(b"goodbye")
        threading.Thread(target=server.stop).start()
        assert read_all(client) == b"goodbye"
        client.close()
        wait_until(lambda: server.stats().closed == {"shutdown": 1})

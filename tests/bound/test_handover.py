"""_handover.py: sockets that are adopted, taken away, shared with another process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
from namedpipes import Plain, new_name
from program import ROOT
from support import (
    LOOPBACK,
    PATIENCE,
    Echo,
    Recorder,
    echoes,
    ended,
    handle_count,
    raw,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)

from iocp_ctypes import Engine, Server, _dispatcher, _win32, connect
from iocp_ctypes import engine as engine_module


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    left, right = socket.socketpair()
    right.settimeout(PATIENCE)
    return left, right


# -- a server adopts ----------------------------------------------------------------------------------------


def test_an_adopted_socket_is_served_like_an_accepted_one(io_threads: int) -> None:
    with serving(Echo, io_threads=io_threads) as server:
        left, right = pair()
        names = left.getpeername(), left.getsockname()
        connection = server.adopt(left)
        assert left.fileno() == -1, "it is the server's now"
        echoes(right)
        assert (connection.peer_address, connection.local_address) == names
        assert connection.server is server
        assert server.connections == [connection]
        stats = server.stats()
        assert (stats.accepted, stats.connections) == (1, 1)
        right.close()
        connection.until("close")
        assert connection.names == ["connect", "data", "eof", "close"]
        assert connection.close_reason == "eof"
        connection.check()
        wait_until(lambda: server.stats().connections == 0)


def test_bytes_that_came_before_are_delivered_first() -> None:
    with serving(Echo) as server:
        left, right = pair()
        right.sendall(b"was read, was not read")
        first = read_exactly(left, 8)
        server.adopt(left, bytearray(first))
        assert read_exactly(right, 22) == b"was read, was not read"
        right.close()


@pytest.mark.parametrize("state", ["timeout", "non-blocking", "duplicate"])
def test_whatever_its_owner_did_with_it_before(state: str) -> None:
    with serving(Echo) as server:
        left, right = pair()
        if state == "timeout":
            left.settimeout(1)
        elif state == "non-blocking":
            left.setblocking(False)
        else:
            left, kept = left.dup(), left
            kept.close()
        left.sendall(b"hello ")
        server.adopt(left)
        right.sendall(b"you")
        assert read_exactly(right, 9) == b"hello you"
        right.close()


@pytest.mark.parametrize("skips", [True, False])
def test_the_mode_of_the_socket_is_asked_for_and_not_changed(skips: bool) -> None:
    left, right = pair()
    if skips:  # as one that another program, or `detach`, gave away
        assert _win32.SetFileCompletionNotificationModes(left.fileno(), 1)
    with serving(Echo) as server:
        connection = server.adopt(left)
        assert connection._socket.skips is skips
        for number in range(50):
            echoes(right, b"number %d" % number)
        right.close()
        connection.until("close")
        connection.check()


def test_stop_tells_adopted_ones_too() -> None:
    with serving(Recorder, linger_timeout=0.1) as server:
        left, right = pair()
        connection = server.adopt(left)
        connection.until("connect")
    assert connection.close_reason == "shutdown"
    assert ended(right) == "eof"
    right.close()


def test_caps_do_not_refuse_it_and_count_it() -> None:
    with serving(Echo, max_connections=1, max_per_host=1) as server:
        lefts = [pair() for _ in range(3)]
        for left, right in lefts:
            server.adopt(left)
            echoes(right)
        assert server.stats().connections == 3
        with raw(server.address) as waiting:
            for _left, right in lefts:
                right.close()
            echoes(waiting)


def test_what_cannot_be_adopted_stays_its_owners() -> None:
    with serving(Echo) as server:
        with socket.socket() as unconnected, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            for wrong, kind in ((5, TypeError), (None, TypeError), (unconnected, ValueError)):
                with pytest.raises(kind, match="sock="):
                    server.adopt(wrong)
            with pytest.raises(ValueError, match="must be a connected IPv4 or IPv6 stream socket"):
                server.adopt(datagrams)
            assert -1 not in (unconnected.fileno(), datagrams.fileno())
        left, right = pair()
        with pytest.raises(TypeError, match="bytes"):
            server.adopt(left, "text")
        left.sendall(b"still mine")
        assert read_exactly(right, 10) == b"still mine"
        left.close()
        with pytest.raises(ValueError, match="sock="):
            server.adopt(left)
        right.close()
        assert server.connections == []
        assert server.stats().connections == 0


def test_a_server_that_does_not_run_adopts_nothing() -> None:
    server = Server(LOOPBACK, Echo)
    left, right = pair()
    with pytest.raises(RuntimeError, match="is not running"):
        server.adopt(left)
    server.start()
    server.adopt(left)
    echoes(right)
    right.close()
    assert server.stop()
    left, right = pair()
    with pytest.raises(RuntimeError, match="is not running"):
        server.adopt(left)
    left.close()
    right.close()


def test_stopping_waits_for_who_is_being_adopted() -> None:
    begun, gate = threading.Event(), threading.Event()
    stopped: list[bool] = []

    def slow(server: Any, peer: Any) -> Echo:
        begun.set()
        assert gate.wait(PATIENCE)
        return Echo(server, peer)

    with serving(slow) as server:
        left, right = pair()
        adopting = threading.Thread(target=server.adopt, args=(left,))
        adopting.start()
        assert begun.wait(PATIENCE)
        stopping = threading.Thread(target=lambda: stopped.append(server.stop(3 * PATIENCE)))
        stopping.start()
        wait_until(lambda: server._stopping)
        other, far = pair()
        with pytest.raises(RuntimeError, match="is not running"):
            server.adopt(other)
        other.sendall(b"still mine")
        assert read_exactly(far, 10) == b"still mine"
        assert server.stats().connections == 1
        assert not stopped
        gate.set()
        assert read_all(right) == b""
        right.close()
        adopting.join(PATIENCE)
        stopping.join(PATIENCE)
        assert stopped == [True]
        assert server.stats().closed == {"shutdown": 1}
        other.close()
        far.close()


def test_a_handler_that_makes_none(expects_errors: Any) -> None:
    with serving(lambda _server, _peer: 5) as server:
        left, right = pair()
        with pytest.raises(RuntimeError, match="the handler made no connection"):
            server.adopt(left)
        assert server.stats().connections == 0
        assert ended(right) in ("reset", "eof")
        right.close()
    assert expects_errors


def test_a_handler_whose_connection_cannot_be_attached(expects_errors: Any) -> None:
    class Shadowing(Recorder):
        @property
        def id(self) -> int:  # type: ignore[override]
            return 5

    with serving(Shadowing) as server:
        left, right = pair()
        with pytest.raises(RuntimeError, match="the handler made no connection"):
            server.adopt(left)
        stats = server.stats()
        assert (stats.connections, stats.handler_failed) == (0, 1)
        assert ended(right) in ("reset", "eof")
        right.close()
    assert [record.levelname for record in expects_errors] == ["ERROR"]


def test_a_peer_that_is_gone_is_a_connection_that_ends() -> None:
    with serving(Recorder) as server:
        left, right = pair()
        rst(right)
        try:
            connection = server.adopt(left)
        except (OSError, ValueError):
            left.close()
            assert server.stats().connections == 0
        else:
            connection.until("close")
            assert connection.close_reason in ("reset", "eof")


def test_adopting_leaves_no_handles(flat_handles: None) -> None:
    with serving(Echo) as server:
        for _ in range(30):
            left, right = pair()
            server.adopt(left)
            echoes(right)
            right.close()
        wait_until(lambda: server.connections == [])


# -- an engine adopts ---------------------------------------------------------------------------------------


def test_an_engine_adopts_without_a_server() -> None:
    engine = Engine()
    left, right = pair()
    right.sendall(b"hello")
    connection = engine.adopt(left, Echo, b"first ", idle_timeout=60, sendcap=2)
    assert read_exactly(right, 11) == b"first hello"
    assert connection.server is None
    assert connection.idle_timeout == 60
    assert connection.sendcap.cap == 2
    assert engine.running
    right.close()
    connection.until("close")
    connection.check()
    wait_until(lambda: not engine.running)
    left, right = pair()
    with pytest.raises(RuntimeError, match="has been stopped"):
        engine.adopt(left, Echo)
    left.close()
    right.close()


def test_an_engine_refuses_what_a_server_does() -> None:
    engine = Engine()
    with socket.socket() as unconnected:
        for arguments, options, kind in (
            ((5, Echo), {}, TypeError),
            ((unconnected, Echo), {}, ValueError),
        ):
            with pytest.raises(kind, match="sock="):
                engine.adopt(*arguments, **options)
    left, right = pair()
    for options, kind in (({"backlog": 5}, TypeError), ({"sendcap": 0}, ValueError)):
        with pytest.raises(kind):
            engine.adopt(left, Echo, **options)
    with pytest.raises(TypeError, match="must be a subclass of Connection"):
        engine.adopt(left, 5)
    with pytest.raises(TypeError, match="must make a Connection"):
        engine.adopt(left, lambda _server, _peer: 5)
    assert left.fileno() != -1
    left.close()
    right.close()
    assert engine.ops_pending == 0
    wait_until(lambda: engine not in engine_module._engines)
    engine.port.close()


# -- taken before it is served ------------------------------------------------------------------------------


class Taking(Server):
    """Takes every other connection away."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offered: list[Any] = []
        self.taken: list[socket.socket] = []
        self.counting = threading.Lock()

    def take_socket(self, sock: socket.socket, peer_address: Any) -> bool:
        with self.counting:
            self.offered.append(peer_address)
            mine = len(self.offered) % 2
        if mine:
            self.taken.append(sock)
            return True
        return False


def test_take_socket_may_take_it_or_leave_it(io_threads: int) -> None:
    with serving(Echo, server=Taking, io_threads=io_threads) as server:
        with raw(server.address) as first, raw(server.address) as second:
            wait_until(lambda: server.taken)
            sock = server.taken[0]
            sock.settimeout(PATIENCE)
            assert sock.getpeername() in (first.getsockname(), second.getsockname())
            mine, other = (first, second) if sock.getpeername() == first.getsockname() else (second, first)
            mine.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
            sock.sendall(b"you")
            assert read_exactly(mine, 3) == b"you"
            echoes(other)
            wait_until(lambda: server.stats().connections == 1)
            connection = server.connections[0]
            assert connection.peer_address == other.getsockname()
            assert connection.local_address == server.address
            # It belongs to no completion port, so it may be bound to one: to another engine's, say.
            engine = Engine()
            adopted = engine.adopt(sock, Echo)
            echoes(mine)
            adopted.abort()
            assert adopted.wait_closed(PATIENCE)
        wait_until(lambda: server.stats().connections == 0)


def test_take_socket_and_first_bytes_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="accept_data=5: must be 0 where take_socket is overridden"):
        Taking(LOOPBACK, Echo, accept_data=5)


def test_take_socket_that_raises_refuses(expects_errors: Any) -> None:
    class Raising(Server):
        def take_socket(self, sock: socket.socket, peer_address: Any) -> bool:
            raise ValueError("no")

    with serving(Echo, server=Raising, max_per_host=2) as server:
        for _ in range(5):
            with raw(server.address) as client:
                assert ended(client) in ("eof", "reset")
        wait_until(lambda: server.stats().connections == 0)
        assert server.stats().refused == 5
    assert "take_socket raised for 127.0.0.1:" in expects_errors[0].getMessage()


def test_pipes_are_not_offered() -> None:
    name = new_name()
    with serving(Echo, name, server=Taking) as server, Plain(name) as client:
        client.write(b"hello")
        assert client.read_exactly(5) == b"hello"
        assert server.offered == []


# -- other processes ----------------------------------------------------------------------------------------

CHILD = """
import socket, sys
from iocp_ctypes import Connection, Server

class Echo(Connection):
    def on_data(self, data):
        self.send(b"child " + data)
    def on_close(self, exc):
        print("closed", self.close_reason, flush=True)

print("ready", flush=True)
line = sys.stdin.readline().split()
shared = socket.fromshare(bytes.fromhex(line[1]))
if line[0] == "listener":
    server = Server(shared, Echo)
    server.start()
else:
    server = Server(("127.0.0.1", 0), Echo)
    server.start()
    server.adopt(shared, bytes.fromhex(line[2]))
print("serving", flush=True)
sys.stdin.read()
server.stop()
"""


class Child:
    """Another process that is handed a socket."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        assert self.line() == "serving"

    def end(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


def test_an_accepted_socket_is_served_by_another_process() -> None:
    child = Child()

    class Sharing(Server):
        shared: bytes = b""

        def take_socket(self, sock: socket.socket, peer_address: Any) -> bool:
            self.kept = sock  # until the child has it
            Sharing.shared = sock.share(child.process.pid)
            return True

    with serving(Echo, server=Sharing) as server:
        client = raw(server.address)
        wait_until(lambda: Sharing.shared)
        child.tell("socket", Sharing.shared.hex(), b"first ".hex())
        server.kept.close()
        assert read_exactly(client, 12) == b"child first "
        client.sendall(b"hello")
        assert read_exactly(client, 11) == b"child hello"
        client.close()
        assert child.line() == "closed eof"
    child.end()


def test_a_listener_is_served_by_another_process() -> None:
    child = Child()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        child.tell("listener", listener.share(child.process.pid).hex())
    for _ in range(3):
        with raw(address) as client:
            client.sendall(b"hello")
            assert read_exactly(client, 11) == b"child hello"
    child.end()


def test_a_listener_that_another_process_serves_is_refused_here() -> None:
    child = Child()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    child.tell("listener", listener.share(child.process.pid).hex())
    server = Server(listener, Echo)
    with pytest.raises(OSError, match="already belongs to another completion port"):
        server.start()
    server.server_close()
    child.end()
    assert os.getpid() != child.process.pid


def test_what_a_client_detached_another_server_adopts() -> None:
    """Where the system takes a socket off its port: see the row."""
    with serving(Echo) as server:
        client = connect(server.address, Recorder)
        client.until("connect")
        sock = client.detach()
        engine = Engine()
        if _win32.is_wine():
            with pytest.raises(OSError, match="another completion port"):
                engine.adopt(sock, Recorder)
            sock.close()
            wait_until(lambda: engine not in engine_module._engines)
        else:
            adopted = engine.adopt(sock, Recorder)
            adopted.send(b"hello")
            wait_until(lambda: adopted.received == b"hello")
            adopted.close()
            assert adopted.wait_closed(PATIENCE)


def test_handing_over_leaves_no_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatcher, "STALL_CHECK", 3600.0)  # a thread in reserve has handles
    with serving(Echo, server=Taking) as server:

        def one() -> None:
            with raw(server.address) as first, raw(server.address) as second:
                wait_until(lambda: len(server.offered) % 2 == 0 and server.taken)
                server.taken.pop().close()
                first.close()
                second.close()

        one()
        Echo.made.clear()
        before = handle_count()
        for _ in range(15):
            one()
            Echo.made.clear()
        wait_until(lambda: handle_count() <= before + 6)

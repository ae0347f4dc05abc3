"""_detaching.py: a connection lets its socket go; nothing that was sent or received is lost."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import (
    PATIENCE,
    Echo,
    Recorder,
    ended,
    made,
    raw,
    read_all,
    read_exactly,
    rst,
    serving,
    wait_until,
)

from iocp_ctypes import ConnectionClosedError, StreamServer, _sockops, _win32, _win32files, connect
from iocp_ctypes._options import KIB

MIB = 1 << 20
SOON = 0.05


class Giving(Recorder):
    """Detaches in the callback of a name and keeps the socket."""

    where = "connect"
    sock: Any = None

    def give(self, where: str) -> None:
        if where == type(self).where:
            self.sock = self.detach(3 * PATIENCE)

    def connected(self) -> None:
        self.give("connect")

    def got(self, data: bytes) -> None:
        self.give("data")

    def ended(self) -> bool:
        self.give("eof")
        return True

    def drained(self) -> None:
        self.give("drain")


def giving(where: str) -> type[Giving]:
    return type("Gives", (Giving,), {"where": where})


def check_given(connection: Any) -> socket.socket:
    """Assert that a connection ended by giving its socket away, and return that."""
    connection.until("close")
    connection.check()
    assert connection.close_reason == "detached"
    assert connection.calls[-1].value is None
    assert not connection.closing
    sock: socket.socket = wait_until(lambda: getattr(connection, "sock", None), what="the socket")
    assert sock.gettimeout() is None
    assert sock.getpeername() == connection.peer_address
    assert sock.getsockname() == connection.local_address
    sock.settimeout(PATIENCE)
    return sock


def test_in_on_connect(io_threads: int) -> None:
    handler = giving("connect")
    with serving(handler, io_threads=io_threads) as server, raw(server.address) as client:
        client.sendall(b"hello")
        (connection,) = made(handler)
        with check_given(connection) as sock:
            assert connection.names == ["connect", "close"]
            assert connection.unread == b""
            assert read_exactly(sock, 5) == b"hello"
            sock.sendall(b"you")
            assert read_exactly(client, 3) == b"you"
            wait_until(lambda: server.connections == [])
            assert server.stats().closed == {"detached": 1}
            assert server.engine.ops_pending == server.backlog.in_use
        assert ended(client) == "eof"


@pytest.mark.parametrize("recv_mode", ["flow", "zero-byte", "auto"])
@pytest.mark.parametrize("work_threads", [0, 2])
def test_in_on_data(recv_mode: str, work_threads: int, io_threads: int) -> None:
    handler = giving("data")
    with (
        serving(handler, recv_mode=recv_mode, work_threads=work_threads, io_threads=io_threads) as server,
        raw(server.address) as client,
    ):
        client.sendall(b"please")
        (connection,) = made(handler)
        connection.until("data")
        client.sendall(b" and more")
        with check_given(connection) as sock:
            rest = connection.received + connection.unread
            assert rest + read_exactly(sock, 15 - len(rest)) == b"please and more"


def test_in_on_eof() -> None:
    handler = giving("eof")
    with serving(handler) as server, raw(server.address) as client:
        client.sendall(b"all")
        client.shutdown(socket.SHUT_WR)
        (connection,) = made(handler)
        with check_given(connection) as sock:
            assert connection.received == b"all"
            assert sock.recv(10) == b""
            sock.sendall(b"the answer")
        assert read_all(client) == b"the answer"


def test_with_first_bytes_of_the_accept() -> None:
    handler = giving("connect")
    with serving(handler, accept_data=100) as server, raw(server.address) as client:
        client.sendall(b"came with the accept")
        (connection,) = made(handler)
        with check_given(connection) as sock:
            assert connection.unread + read_exactly(sock, 20 - len(connection.unread)) == (
                b"came with the accept"
            )
            assert connection.unread


@pytest.mark.parametrize("recv_mode", ["flow", "zero-byte"])
def test_from_another_thread_while_a_receive_is_posted(recv_mode: str, io_threads: int) -> None:
    with serving(Recorder, recv_mode=recv_mode, io_threads=io_threads) as server:
        for number in range(10):
            with raw(server.address) as client:
                connection = made(Recorder, number + 1)[number]
                connection.until("connect")
                wait_until(lambda: server.engine.ops_pending > server.backlog.in_use)
                connection.sock = connection.detach()
                with check_given(connection) as sock:
                    client.sendall(b"hello")
                    assert connection.unread == b""
                    assert read_exactly(sock, 5) == b"hello"


def test_in_another_callback_while_a_receive_is_posted(io_threads: int) -> None:
    """The packet of the receive comes on an I/O thread, and this callback holds up the one there is."""
    handler = giving("drain")
    with (
        serving(handler, io_threads=io_threads, recv_mode="flow", high_mark=KIB, low_mark=0) as server,
        raw(server.address) as client,
    ):
        (connection,) = made(handler)
        connection.until("connect")
        data = bytes(8 * MIB)
        connection.send(data)
        assert read_exactly(client, len(data)) == data
        with check_given(connection) as sock:
            sock.sendall(b"on with it")
            assert read_exactly(client, 10) == b"on with it"


class Slow(Recorder):
    """Its bytes are on their way until somebody has looked whether its socket can be taken."""

    def __init__(self, server: Any = None, peer_address: Any = None) -> None:
        super().__init__(server, peer_address)
        self.on_the_way, self.looked = threading.Event(), threading.Event()
        self.taken_in = b""
        self.task: Any = None

    def got(self, data: bytes) -> None:
        if self.task is not None:
            self.task()
            return
        self.on_the_way.set()
        assert self.looked.wait(PATIENCE)
        self.taken_in += data

    def _deliver_later(self, data: bytes) -> None:
        self.on_the_way.set()
        if threading.current_thread().name.startswith("iocp_ctypes I/O") and self._home.executor is None:
            assert self.looked.wait(PATIENCE)
        super()._deliver_later(data)

    def _try_to_let_go(self, in_callback: bool) -> socket.socket | None:
        taken = super()._try_to_let_go(in_callback)
        self.looked.set()
        return taken


def in_order(client: socket.socket) -> list[Any]:
    """Return the two connections, that of the client first; both have been told and are at rest."""
    both = made(Slow, 2)
    for each in both:
        each.until("connect")
        wait_until(lambda each=each: not each._strand._tasks and each._strand._token)
    return sorted(both, key=lambda each: each.peer_address != client.getsockname())


def test_in_a_callback_amid_a_delivery_nothing_is_lost(io_threads: int) -> None:
    """Another I/O thread has the bytes in hand, which are not in the stash yet."""
    with (
        serving(Slow, io_threads=io_threads, recv_mode="flow") as server,
        raw(server.address) as client,
    ):
        (connection,) = made(Slow)
        connection.until("connect")

        def give() -> None:
            client.sendall(b"hello")
            assert connection.on_the_way.wait(PATIENCE)
            connection.sock = connection.detach()

        connection.call_soon(give)
        with check_given(connection):
            assert connection.received + connection.unread == b"hello"


def test_in_another_connections_callback_it_waits_for_on_data(io_threads: int) -> None:
    with (
        serving(Slow, io_threads=io_threads, recv_mode="flow") as server,
        raw(server.address) as client,
        raw(server.address) as other,
    ):
        one, two = in_order(client)
        seen: list[bytes] = []

        def take() -> None:
            one.sock = one.detach()
            seen.append(one.taken_in)

        two.task = take
        client.sendall(b"hello")
        assert one.on_the_way.wait(PATIENCE)
        other.sendall(b"take it")
        with check_given(one):
            wait_until(lambda: seen)
            assert seen == [b"hello"]
            assert one.unread == b""


def test_in_another_connections_callback_on_the_same_work_thread() -> None:
    """What waits behind that callback is unread: on_data could not get it meanwhile."""
    with (
        serving(Slow, work_threads=1, recv_mode="flow") as server,
        raw(server.address) as client,
        raw(server.address) as other,
    ):
        one, two = in_order(client)

        def take() -> None:
            client.sendall(b"hello")
            wait_until(lambda: one.unread)
            one.sock = one.detach()

        two.task = take
        other.sendall(b"take it")
        with check_given(one):
            assert one.unread == b"hello"
            assert one.received == b""


def test_a_stream_of_bytes_is_not_torn(io_threads: int) -> None:
    """Whatever the moment: what on_data got, what is unread and what is in the socket make the whole."""
    sent = random.Random(8).randbytes(4 * MIB)
    with serving(Recorder, io_threads=io_threads) as server:
        for number in range(6):
            with raw(server.address) as client:
                sender = threading.Thread(target=client.sendall, args=(sent,))
                sender.start()
                connection = made(Recorder, number + 1)[number]
                connection.until("connect")
                wait_until(lambda c=connection, n=number: c.bytes_received > n * 300_000)
                connection.sock = connection.detach()
                before = connection.bytes_received
                with check_given(connection) as sock:
                    whole = connection.received + connection.unread
                    assert len(whole) == connection.bytes_received == before
                    whole += read_exactly(sock, len(sent) - len(whole))
                sender.join()
                assert hashlib.sha256(whole).digest() == hashlib.sha256(sent).digest()


def test_what_came_while_reading_was_paused_is_unread() -> None:
    with serving(Recorder, recv_mode="flow") as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        wait_until(lambda: server.engine.ops_pending > server.backlog.in_use)
        connection.pause_reading()
        client.sendall(b"stashed")
        wait_until(lambda: connection.unread == b"stashed")
        connection.sock = connection.detach()
        with check_given(connection) as sock:
            client.sendall(b" and not")
            assert connection.unread == b"stashed"
            assert read_exactly(sock, 8) == b" and not"
        assert connection.received == b""


def test_what_is_queued_is_sent_before(tmp_path: Any) -> None:
    path = tmp_path / "file"
    path.write_bytes(random.Random(9).randbytes(3 * MIB))
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        data = random.Random(10).randbytes(6 * MIB)
        connection.send(data)
        connection.send_file(path)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(read_exactly(client, 9 * MIB)))
        reader.start()
        connection.sock = connection.detach(timeout=None)
        reader.join()
        assert got == [data + path.read_bytes()]
        with check_given(connection) as sock:
            sock.sendall(b".")
            assert read_exactly(client, 1) == b"."


def test_where_it_cannot_be_sent_in_time_all_goes_on_as_before() -> None:
    with serving(Echo) as server, raw(server.address) as client:
        (connection,) = made(Echo)
        connection.until("connect")
        data = bytes(12 * MIB)
        connection.send(data)
        client.sendall(b"meanwhile")
        for timeout in (0, 0.1):
            with pytest.raises(TimeoutError, match="bytes are unsent after"):
                connection.detach(timeout)
        assert not connection.closed
        assert read_exactly(client, len(data) + 9) == data + b"meanwhile"
        client.sendall(b"as before")
        assert read_exactly(client, 9) == b"as before"


def test_a_time_out_leaves_a_pause_alone() -> None:
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.pause_reading()
        connection.send(bytes(12 * MIB))
        with pytest.raises(TimeoutError):
            connection.detach(0)
        client.sendall(b"hello")
        time.sleep(SOON)
        assert connection.received == b""


class Looked(Recorder):
    """Counts the looks of detach() and does as told in on_data."""

    looks = 0
    task: Any = None

    def got(self, data: bytes) -> None:
        if self.task is not None:
            self.task()

    time_is_up = False

    def _try_to_let_go(self, in_callback: bool) -> socket.socket | None:
        if self.time_is_up:
            raise TimeoutError("as when the time is over")
        taken = super()._try_to_let_go(in_callback)
        self.looks += 1
        return taken

    def looked_again(self) -> None:
        """Wait until a look that has not begun yet is over."""
        before = self.looks
        wait_until(lambda: self.looks >= before + 2)


@contextlib.contextmanager
def detaching_in_vain(connection: Any) -> Iterator[None]:
    """For a `with` block detach() waits for a peer that does not read; then it is out of time."""
    caught: list[BaseException] = []

    def detach() -> None:
        try:
            connection.detach(PATIENCE)
        except TimeoutError as exc:
            caught.append(exc)

    connection.send(bytes(12 * MIB))
    waiter = threading.Thread(target=detach)
    waiter.start()
    connection.looked_again()
    try:
        yield
        assert waiter.is_alive(), "the block was too slow"
    finally:
        connection.time_is_up = True
        waiter.join()
    assert len(caught) == 1


@pytest.mark.parametrize("recv_mode", ["flow", "burst"])
def test_who_resumes_while_it_is_waited_for_reads_on_after_a_time_out(recv_mode: str) -> None:
    with serving(Looked, recv_mode=recv_mode) as server, raw(server.address) as client:
        (connection,) = made(Looked)
        connection.until("connect")
        connection.pause_reading()
        with detaching_in_vain(connection):
            connection.resume_reading()
            client.sendall(b"hello")
            connection.looked_again()
            assert connection.received == b"", "the receive was cancelled, and none is posted meanwhile"
        wait_until(lambda: connection.received == b"hello")


@pytest.mark.parametrize("recv_mode", ["flow", "burst"])
def test_who_pauses_while_it_is_waited_for_stays_paused_after_a_time_out(recv_mode: str) -> None:
    go, paused = threading.Event(), threading.Event()
    with serving(Looked, recv_mode=recv_mode) as server, raw(server.address) as client:
        (connection,) = made(Looked)
        connection.until("connect")

        def pause() -> None:
            assert go.wait(PATIENCE)
            connection.pause_reading()
            paused.set()

        connection.task = pause
        client.sendall(b"one")
        connection.until("data")
        with detaching_in_vain(connection):
            go.set()
            assert paused.wait(PATIENCE)
            connection.looked_again()
        client.sendall(b"two")
        time.sleep(SOON)
        assert connection.received == b"one"
        connection.task = None
        connection.resume_reading()
        wait_until(lambda: connection.received == b"onetwo")


def test_the_first_of_two_that_is_out_of_time_does_not_read_on_under_the_other() -> None:
    with serving(Looked) as server, raw(server.address) as client:
        (connection,) = made(Looked)
        connection.until("connect")
        with detaching_in_vain(connection):
            with pytest.raises(TimeoutError):
                connection.detach(0)
            assert connection._paused
        client.sendall(b"hello")
        wait_until(lambda: connection.received == b"hello")


def test_what_is_not_open_cannot_be_detached() -> None:
    fresh = Recorder()
    with pytest.raises(ConnectionClosedError, match="not connected"):
        fresh.detach()
    with serving(Recorder) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.close()
        wait_until(lambda: connection.closing)  # where an I/O thread is held up in it, it comes later
        with pytest.raises(ConnectionClosedError, match="is not open"):
            connection.detach()
        client.close()  # else closing lingers
        connection.until("close")
        with pytest.raises(ConnectionClosedError, match="is not open"):
            connection.detach()
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="timeout="):
            connection.detach(wrong)


def test_twice_is_once() -> None:
    with serving(Recorder) as server, raw(server.address):
        (connection,) = made(Recorder)
        connection.until("connect")
        with connection.detach():
            with pytest.raises(ConnectionClosedError):
                connection.detach()
            for late in (connection.abort, connection.close, connection.pause_reading):
                late()
            connection.resume_reading()
            with pytest.raises(ConnectionClosedError):
                connection.send(b"x")
            assert connection.wait_closed(PATIENCE)


def test_the_peers_reset_while_it_waits_is_told() -> None:
    with serving(Looked) as server:
        client = raw(server.address)
        (connection,) = made(Looked)
        connection.until("connect")
        connection.send(bytes(12 * MIB))
        resetting = threading.Thread(target=lambda: (connection.looked_again(), rst(client)))
        resetting.start()
        with pytest.raises(ConnectionClosedError, match="is not open"):
            connection.detach(2 * PATIENCE)
        resetting.join()
        connection.until("close")
        assert connection.close_reason == "reset"


def test_many_threads_want_it_and_one_gets_it() -> None:
    with serving(Recorder) as server, raw(server.address):
        (connection,) = made(Recorder)
        connection.until("connect")
        got: list[Any] = []

        def want() -> None:
            try:
                got.append(connection.detach())
            except ConnectionClosedError as exc:
                got.append(exc)

        threads = [threading.Thread(target=want) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (sock,) = [one for one in got if isinstance(one, socket.socket)]
        assert len(got) == 6
        sock.close()


def test_a_client_connection_gives_its_socket_as_well() -> None:
    with serving(Echo) as server:
        connection = connect(server.address, Recorder)
        connection.until("connect")
        with connection.detach() as sock:
            sock.sendall(b"hello")
            assert read_exactly(sock, 5) == b"hello"
        connection.until("close")
        connection.check()


def test_a_stream_keeps_what_it_has_not_been_asked_for() -> None:
    taken: list[Any] = []

    def serve(stream: Any) -> None:
        assert stream.readline() == b"one\n"
        wait_until(lambda: len(stream.connection.buffer) == 4)
        sock = stream.connection.detach()
        taken.append((sock, stream.connection.unread))

    with StreamServer(("127.0.0.1", 0), serve) as server, raw(server.address) as client:
        client.sendall(b"one\ntwo\n")
        wait_until(lambda: taken)
        sock, unread = taken[0]
        assert unread == b"two\n"
        sock.sendall(b"bye")
        sock.close()
        assert read_all(client) == b"bye"


@pytest.mark.wine_differs("detached-port")
def test_the_socket_is_taken_off_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    native, calls = _win32files.NtSetInformationFile, []

    def spy(handle: int, block: Any, value: Any, size: int, kind: int) -> Any:
        content = value._obj
        calls.append((handle, content.Port, content.Key, size == _sockops.sizeof(content), kind))
        return native(handle, block, value, size, kind)

    monkeypatch.setattr(_win32files, "NtSetInformationFile", spy)
    with serving(Recorder) as server, raw(server.address):
        (connection,) = made(Recorder)
        connection.until("connect")
        with connection.detach() as sock:
            assert calls == [(sock.fileno(), 0, 0, True, 61)]
            if _win32.is_wine():
                with pytest.raises(OSError, match="already belongs to another completion port"):
                    server.adopt(sock)
                assert sock.fileno() != -1, "it is still its owner's"
            else:
                server.adopt(sock)

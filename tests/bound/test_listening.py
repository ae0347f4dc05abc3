"""_listening.py, and servers of named pipes from end to end: as with TCP, and where pipes differ."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from namedpipes import Plain, beside, new_name
from program import ROOT
from support import (
    PATIENCE,
    Echo,
    Recorder,
    echoes,
    forget,
    handle_count,
    made,
    raw,
    read_exactly,
    serving,
    wait_until,
)

from iocp_ctypes import Server, StreamServer, _win32files, connect, open_stream
from iocp_ctypes._listening import address_of, bind_all
from iocp_ctypes._options import make_settings

MIB = 1 << 20


def said(name: str, data: bytes = b"hello") -> None:
    """Assert that an echo server serves a new client."""
    with Plain(name) as client:
        client.write(data)
        assert client.read_exactly(len(data)) == data


# -- a server -----------------------------------------------------------------------------------------------


def test_callbacks_come_as_with_tcp(io_threads: int) -> None:
    name = new_name()
    with serving(Echo, name, io_threads=io_threads) as server:
        assert server.address == name
        assert server.addresses == (name,)
        client = Plain(name)
        client.write(b"hello")
        assert client.read_exactly(5) == b"hello"
        (connection,) = made(Echo)
        assert connection.peer_address == connection.local_address == (name, os.getpid())
        assert connection.server is server
        assert f"{name} (process {os.getpid()}) open" in repr(connection)
        client.close()
        connection.until("close")
        assert connection.names == ["connect", "data", "eof", "close"]
        assert connection.close_reason == "eof"
        assert connection.calls[-1].value is None
        assert connection.bytes_received == connection.bytes_sent == 5
        connection.check()
        assert server.stats().accepted == 1


@pytest.mark.parametrize("recv_mode", ["auto", "flow", "zero-byte"])
def test_bulk_both_ways(recv_mode: str, io_threads: int) -> None:
    name, data = new_name(), random.Random(1).randbytes(6 * MIB)
    with serving(Echo, name, recv_mode=recv_mode, io_threads=io_threads), open_stream(name) as stream:
        writing = beside(stream.write, data)
        assert stream.readexactly(len(data), timeout=60) == data
        writing.join()


def test_many_clients_at_once() -> None:
    name = new_name()
    with serving(Echo, name, backlog=4) as server:
        streams = [connect(name, Recorder) for _ in range(60)]
        for number, client in enumerate(streams):
            client.send(b"number %d" % number)
        for number, client in enumerate(streams):
            wait_until(lambda client=client, number=number: client.received == b"number %d" % number)
        assert len(server.connections) == 60
        wait_until(lambda: server.backlog.in_use == 4)
        for client in streams:
            client.close()
        for client in streams:
            assert client.wait_closed(PATIENCE)


def test_tcp_and_pipes_in_one_server() -> None:
    name = new_name()
    with serving(Echo, [("127.0.0.1", 0), name], nodelay=True, keepalive=5, accept_data=10) as server:
        assert server.addresses[1] == name
        said(name)
        with raw(server.addresses[0]) as client:
            echoes(client)


def test_work_threads_serve_pipes() -> None:
    name = new_name()
    with serving(Echo, name, work_threads=2):
        said(name)


def test_close_delivers_all_and_does_not_linger() -> None:
    """A client that waits for our end would wait as long as we for its own."""
    name, data = new_name(), random.Random(2).randbytes(3 * MIB)

    class Closing(Recorder):
        def connected(self) -> None:
            self.send(data)
            self.close()

    with serving(Closing, name, linger_timeout=3600.0), Plain(name) as client:
        assert client.read_all() == data
        (connection,) = made(Closing)
        connection.until("close")
        assert connection.close_reason == "local"
        connection.check()


def test_abort_is_an_error_for_the_client() -> None:
    name = new_name()
    with serving(Recorder, name), Plain(name) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send(b"never mind")
        connection.abort()
        connection.until("close")
        with pytest.raises(OSError, match="233"):
            client.read()


def test_a_client_of_ours_sees_that_as_a_reset() -> None:
    name = new_name()
    with serving(Recorder, name) as server:
        client = connect(name, Recorder)
        client.until("connect")
        wait_until(lambda: len(server.connections) == 1)
        server.abort_clients()
        assert isinstance(client.until("close").value, ConnectionResetError)
        assert client.close_reason == "reset"


def test_there_is_no_half_close() -> None:
    name = new_name()
    with serving(Echo, name):
        client = connect(name, Recorder)
        for _ in range(2):
            with pytest.raises(OSError, match="cannot be closed by half") as caught:
                client.send_eof()
            assert caught.value.errno == errno.EOPNOTSUPP
            client.until("connect")
        client.send(b"still well")
        wait_until(lambda: client.received == b"still well")
        with pytest.raises(OSError, match="no plain socket"):
            client.detach()
        client.send(b"!")
        wait_until(lambda: client.received == b"still well!")
        client.close()
        assert client.wait_closed(PATIENCE)


def test_sending_to_who_has_left_is_a_reset() -> None:
    name = new_name()

    class Keeping(Recorder):
        def ended(self) -> bool:
            return True

    with serving(Keeping, name):
        Plain(name).close()
        (connection,) = made(Keeping)
        connection.until("eof")
        connection.send(b"anybody there?")
        assert isinstance(connection.until("close").value, BrokenPipeError)
        assert connection.close_reason == "reset"


def test_a_client_that_leaves_while_much_is_unsent() -> None:
    name = new_name()
    with serving(Recorder, name):
        client = Plain(name)
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send(bytes(4 * MIB))
        client.read_exactly(1000)
        client.close()
        connection.until("close")
        assert connection.close_reason in ("reset", "eof")
        connection.check()


def test_a_reader_that_never_reads_ends_with_overflow() -> None:
    name = new_name()
    with serving(Recorder, name, write_buffer_max=MIB), Plain(name):
        (connection,) = made(Recorder)
        connection.until("connect")
        while connection.send(bytes(100_000)) or not (connection.closing or connection.closed):
            pass
        connection.until("close")
        assert connection.close_reason == "overflow"


def test_pausing_holds_the_peer_back() -> None:
    name = new_name()

    class Pausing(Recorder):
        def connected(self) -> None:
            self.pause_reading()

    with serving(Pausing, name):
        client = connect(name, Recorder)
        data = random.Random(3).randbytes(2 * MIB)
        client.send(data)
        (connection,) = made(Pausing)
        connection.until("connect")
        wait_until(lambda: client.sendcap.in_use)
        assert connection.received == b""
        assert client.write_buffer_size > MIB
        connection.resume_reading()
        wait_until(lambda: len(connection.received) == len(data))
        assert connection.received == data
        client.close()
        assert client.wait_closed(PATIENCE)


def test_silent_and_idle_clients_are_reaped() -> None:
    class Silent(Recorder):
        def connected(self) -> None:
            self._change(silent_timeout=0.2)  # not sooner: who is late would be reaped before it began

    name = new_name()
    with serving(Silent, name, silent_timeout=None), Plain(name) as client:
        assert client.read() == b""
        assert made(Silent)[0].until("close").value is not None
        assert made(Silent)[0].close_reason == "silent"


def test_max_connections_lets_others_wait() -> None:
    name = new_name()
    with serving(Echo, name, max_connections=2) as server:
        first, second = Plain(name), Plain(name)
        wait_until(lambda: len(server.connections) == 2)
        third = connect(name, Recorder, timeout=PATIENCE)
        third.send(b"at last")
        with pytest.raises(OSError, match="231"):
            Plain(name)
        assert third.received == b""
        first.close()
        wait_until(lambda: third.received == b"at last")
        second.close()
        third.close()
        assert third.wait_closed(PATIENCE)


def test_pausing_accepting_keeps_the_name_and_lets_clients_wait() -> None:
    name = new_name()
    with serving(Echo, name) as server:
        said(name)
        server.pause_accepting()
        wait_until(lambda: server.backlog.in_use == 0)
        with pytest.raises(OSError, match="231"):
            Plain(name)
        client = connect(name, Recorder)
        client.send(b"patience")
        server.resume_accepting()
        wait_until(lambda: client.received == b"patience")
        client.close()
        assert client.wait_closed(PATIENCE)


def test_before_the_start_the_name_is_ours_and_clients_wait() -> None:
    name = new_name()
    server = Server(name, Echo)
    with pytest.raises(OSError, match="231"):
        Plain(name)
    client = connect(name, Recorder)
    client.send(b"early")
    server.start()
    wait_until(lambda: client.received == b"early")
    client.close()
    assert client.wait_closed(PATIENCE)
    assert server.stop()
    with pytest.raises(OSError, match="failed with 2"):
        Plain(name)


def test_a_server_that_never_started_gives_the_name_back() -> None:
    name = new_name()
    Server(name, Echo)
    gc.collect()
    with pytest.raises(OSError, match="failed with 2"):
        Plain(name)
    Server(name, Echo).server_close()
    with pytest.raises(OSError, match="failed with 2"):
        Plain(name)


def test_verify_request_and_max_per_host() -> None:
    name = new_name()
    asked: list[Any] = []

    class Choosy(Server):
        def verify_request(self, peer_address: Any) -> bool:
            asked.append(peer_address)
            return len(asked) > 1

    with serving(Echo, name, server=Choosy, max_per_host=1):
        with Plain(name) as client, pytest.raises(OSError, match=r"233|232"):
            client.read()
        assert asked[0] == (name, os.getpid())
        with Plain(name) as client:
            client.write(b"hello")
            assert client.read_exactly(5) == b"hello"
            with Plain(name) as another, pytest.raises(OSError, match=r"233|232"):
                another.read()


def test_stop_ends_all(flat_handles: None) -> None:
    name = new_name()
    with serving(Recorder, name, backlog=20) as server:
        clients = [Plain(name) for _ in range(10)]
        wait_until(lambda: len(server.connections) == 10)
    for client in clients:
        assert client.read() == b""
        client.close()


def test_names_and_handles_come_back() -> None:
    name = new_name()
    for number in range(12):
        with serving(Echo, name):
            said(name)
        forget()  # with their locks
        if number == 1:
            before = handle_count()
    wait_until(lambda: handle_count() <= before + 5)


def test_a_storm_of_clients_that_leave_at_once() -> None:
    name = new_name()
    with serving(Echo, name, backlog=8) as server:

        def come_and_go() -> None:
            for _ in range(40):
                try:
                    Plain(name).close()
                except OSError as exc:
                    assert exc.winerror == 231  # noqa: PT017  # all instances were taken for a moment

        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: server.backlog.in_use == 8 and not server.connections)

        def is_served() -> bool:  # an instance may be taken by one that has left, and is not known yet
            with contextlib.suppress(OSError):
                said(name)
                return True
            return False

        wait_until(is_served)
        for connection in made(Echo):
            connection.until("close")
            connection.check()


def test_another_process_is_a_client_with_its_number() -> None:
    name = new_name()
    code = f"f = open({name!r}, 'r+b', buffering=0); f.write(b'hello'); assert f.read(5) == b'hello'"
    with serving(Echo, name):
        program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        assert program.wait(60) == 0
        (connection,) = made(Echo)
        connection.until("close")
        path, number = connection.peer_address
        assert path == name
        assert number not in (0, os.getpid())


# -- streams, files -----------------------------------------------------------------------------------------


def test_streams_over_pipes(tmp_path: Path) -> None:
    name = new_name()
    path = tmp_path / "file"
    path.write_bytes(random.Random(4).randbytes(700_000))

    def serve(stream: Any) -> None:
        for line in stream:
            if line == b"file\n":
                stream.send_file(path, header=b"<", trailer=b">")
            else:
                stream.write(line.upper())

    with StreamServer(name, serve), open_stream(name, timeout=PATIENCE) as stream:
        stream.write(b"hello\n")
        assert stream.readline() == b"HELLO\n"
        stream.write(b"file\n")
        assert stream.readexactly(700_002) == b"<" + path.read_bytes() + b">"
        with pytest.raises(OSError, match="by half"):
            stream.write_eof()


# -- what is bound ------------------------------------------------------------------------------------------


def test_where_one_of_several_cannot_be_had_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [new_name(), new_name()]
    settings = make_settings({})
    create = _win32files.CreateNamedPipeW
    monkeypatch.setattr(
        _win32files, "CreateNamedPipeW", lambda name, *rest: create(name if name == names[0] else "no", *rest)
    )
    with pytest.raises(OSError, match="cannot listen on"):
        bind_all([names[0], ("127.0.0.1", 0), names[1]], settings)
    monkeypatch.undo()
    places = bind_all([names[0], ("127.0.0.1", 0)], settings)
    assert address_of(places[0]) == names[0]
    assert address_of(places[1])[0] == "127.0.0.1"
    for place in places:
        place.close()


def test_a_socket_may_be_bound_or_listening_already() -> None:
    for listening in (False, True):
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        if listening:
            sock.listen()
        address = sock.getsockname()
        with serving(Echo, sock) as server, raw(address) as client:
            assert server.address == address
            client.sendall(b"hello")
            assert read_exactly(client, 5) == b"hello"


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"pipe_security": 5}, TypeError, "pipe_security=5: must be a str in SDDL"),
        ({"pipe_security": "all"}, ValueError, "pipe_security='all': must be in SDDL"),
        ({"reject_remote": 1}, TypeError, "reject_remote=1: must be True or False"),
    ],
)
def test_wrong_options(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        Server(new_name(), Echo, **options)
    with pytest.raises(ValueError, match=r"a pipe's name is "):
        Server("NAME", Echo)

"""What meets on one connection: files and TLS, bursts and detaching, traces of files, figures of pipes."""

from __future__ import annotations

import random
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from namedpipes import new_name
from support import PATIENCE, Echo, Recorder, made, raw, read_exactly, serving, wait_until
from traffic import LONG

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from secure import client_context, no_verifying, server_context

from iocp_ctypes import ConnectionClosedError, Engine, Usage, _sockops, connect, open_stream
from iocp_ctypes._filechannel import FILE_AHEAD
from iocp_ctypes._sockops import OverlappedSocket

MIB = 1 << 20
SERVER, CLIENT = server_context(), client_context()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(random.Random(8).randbytes(3 * MIB))
    return path


def tls_raw(address: Any) -> Any:
    return CLIENT.wrap_socket(raw(address, timeout=LONG), server_hostname="localhost")


# -- files over TLS -----------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["server", "workstation"])
def transmits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Whether the system transmits files; the calls of TransmitFile that were made."""
    calls: list[Any] = []
    real = OverlappedSocket.transmit

    def noting(self: OverlappedSocket, operation: Any, handler: Any) -> int:
        calls.append(operation)
        return real(self, operation, handler)

    monkeypatch.setattr(OverlappedSocket, "transmit", noting)
    monkeypatch.setattr(_sockops, "TRANSMITS_FREELY", request.param)
    return calls


def test_files_over_tls_are_read_and_come_in_order(file: Path, transmits: list[Any], io_threads: int) -> None:
    class Sends(Recorder):
        def connected(self) -> None:
            assert self.send(b"first ")
            assert not self.send_file(file, header=b"<", trailer=b">")
            assert not self.send(b" between ")
            assert not self.send_file(file, 5, 10)
            self.close()

    data = file.read_bytes()
    expected = b"first <" + data + b"> between " + data[5:15]
    with serving(Sends, tls=SERVER, io_threads=io_threads) as server, tls_raw(server.address) as client:
        assert read_exactly(client, len(expected)) == expected
        assert client.recv(1) == b"", "close_notify comes behind the files"
        client.close()
        (connection,) = made(Sends)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "local"
    assert transmits == []


def test_a_file_waits_for_the_handshake_on_disk(file: Path, transmits: list[Any]) -> None:
    with serving(Recorder) as server:  # which shakes no hands
        connection = connect(server.address, Recorder, tls=no_verifying(), tls_handshake_timeout=PATIENCE)
        connection.send_file(file)
        (peer,) = made(Recorder, 2)[1:]
        peer.until("data")
        wait_until(lambda: connection.write_buffer_size == 2 * FILE_AHEAD)
        assert connection.bytes_sent < 4096
        connection.abort()
        assert connection.wait_closed(PATIENCE)
    file.unlink()  # nobody has it open
    assert transmits == []


def test_on_drain_comes_when_the_file_is_sent(file: Path) -> None:
    class Sends(Recorder):
        def connected(self) -> None:
            self.data = [self.send_file(file)]

        def drained(self) -> None:
            self.data.append(self.write_buffer_size)
            self.send(b"!")

    with serving(Sends, tls=SERVER) as server, tls_raw(server.address) as client:
        read_exactly(client, 3 * MIB)
        assert read_exactly(client, 1) == b"!"
        (connection,) = made(Sends)
        assert connection.data[0] is False
        assert connection.data[1] <= 16 * 1024


def test_where_tls_fails_files_are_let_go(file: Path) -> None:
    with serving(Recorder, tls=SERVER) as server, tls_raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(file)
        connection.send_file(file)
        read_exactly(client, 1000)
        with socket.socket(fileno=client.detach()) as plain:
            plain.settimeout(PATIENCE)
            plain.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))  # a record that nobody has encrypted
            while plain.recv(1 << 16):
                pass
        connection.until("close")
        connection.check()
        assert connection.close_reason == "tls"
    file.unlink()


def test_start_tls_does_not_overtake_a_file(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(24 * MIB))
    with serving(Recorder) as server, raw(server.address, timeout=LONG) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(large)
        with pytest.raises(RuntimeError, match="is sending a file"):
            connection.start_tls(SERVER, server_side=True)
        assert connection.tls is None
        assert not any(read_exactly(client, 24 * MIB))


# -- detaching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [SERVER, None], ids=["from the first", "later"])
def test_over_tls_nothing_is_detached(tls: Any) -> None:
    class Later(Echo):
        def connected(self) -> None:
            if tls is None:
                self.start_tls(SERVER, server_side=True)

    with serving(Later, tls=tls) as server, tls_raw(server.address) as client:
        (connection,) = made(Later)
        connection.until("connect")
        with pytest.raises(OSError, match="uses TLS") as caught:
            connection.detach()
        assert not isinstance(caught.value, ConnectionClosedError)
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
        assert connection.unread == b""


def test_amid_a_burst_all_receives_come_back_in_order(io_threads: int) -> None:
    sent = b"".join(number.to_bytes(4, "little") for number in range(MIB))
    stuck, go_on = threading.Event(), threading.Event()

    class Slow(Recorder):
        def on_data(self, data: bytes) -> None:
            self.data = (self.data or b"") + data
            if self.recvburst.in_use > 3:
                stuck.set()
                assert go_on.wait(LONG)

    options: dict[str, Any] = {"recv_mode": "burst", "recvburst": 6, "recv_size": 4096}
    with (
        serving(Slow, io_threads=io_threads, recv_buffer_max=40_000, **options) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        feeding = threading.Thread(target=client.sendall, args=(sent,))
        feeding.start()
        (connection,) = made(Slow)
        assert stuck.wait(LONG)
        connection.pause_reading()
        unread = connection.unread
        assert unread == sent[len(connection.data) :][: len(unread)]
        threading.Timer(0.05, go_on.set).start()
        with connection.detach(LONG) as sock:
            connection.until("close")
            assert connection.close_reason == "detached"
            assert connection.recvburst.in_use == 0
            sock.settimeout(LONG)
            begun = connection.data + connection.unread
            assert begun + read_exactly(sock, len(sent) - len(begun)) == sent
            feeding.join(LONG)
            wait_until(lambda: server.engine.ops_pending == server.backlog.in_use)
            assert server.engine.stats().sockets == 1 + server.backlog.in_use, "it is no socket of ours now"


def test_a_burst_that_could_not_be_detached_goes_on(io_threads: int) -> None:
    with (
        serving(Echo, io_threads=io_threads, recv_mode="burst", recvburst=4) as server,
        raw(server.address, timeout=LONG) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # else it grows until it holds all
        (connection,) = made(Echo)
        connection.until("connect")
        for number in range(5):
            connection.send(bytes(8 * MIB))
            with pytest.raises(TimeoutError):
                connection.detach(timeout=0.01)
            assert not any(read_exactly(client, 8 * MIB))
            client.sendall(b"number %d" % number)
            assert read_exactly(client, 8) == b"number %d" % number
        wait_until(lambda: connection.recvburst == Usage(4, 1))


def test_engine_adopt_leaves_tls_to_start_tls() -> None:
    class Secures(Echo):
        def connected(self) -> None:
            self.start_tls(SERVER, server_side=True)

    engine = Engine()
    with socket.create_server(("127.0.0.1", 0)) as listener, raw(listener.getsockname()) as client:
        sock, _ = listener.accept()
        with pytest.raises(ValueError, match="start_tls in on_connect"):
            engine.adopt(sock, Secures, tls=SERVER)
        connection = engine.adopt(sock, Secures, trace=100)
        with CLIENT.wrap_socket(client, server_hostname="localhost") as secure:
            secure.sendall(b"hello")
            assert read_exactly(secure, 5) == b"hello"
            assert {record.operation for record in connection.trace_records()} >= {"receive", "send"}
        assert connection.wait_closed(PATIENCE)
    wait_until(lambda: engine.stats().sockets == 0)


# -- figures and traces -------------------------------------------------------------------------------------


def test_a_transmitted_file_is_in_the_trace(tmp_path: Path, transmits: list[Any]) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    with serving(Recorder, trace=100) as server, raw(server.address) as client:
        (connection,) = made(Recorder)
        connection.until("connect")
        connection.send_file(file, header=b"head")
        assert len(read_exactly(client, 1004)) == 1004
        wait_until(lambda: connection.bytes_sent == 1004)
    # Now every step is over, and has its record.
    steps = [step for step in server.trace_records() if step.operation == "transmit"]
    records = [(step.step, step.bytes) for step in steps]
    if not transmits:
        assert records == []
    elif len(records) == 1:  # it was done at once
        assert records == [("submit", 1004)]
    else:
        assert sorted(records) == [("retire", 1004), ("submit", 1004)]


def test_pipes_have_the_figures_and_the_trace_of_sockets(io_threads: int) -> None:
    name = new_name()
    options: dict[str, Any] = {"recv_mode": "burst", "recvburst": 8}
    with (
        serving(Echo, address=name, trace=1000, io_threads=io_threads, **options) as server,
        open_stream(name, timeout=PATIENCE) as stream,
    ):
        for _ in range(3):
            stream.write(b"hello")
            assert stream.readexactly(5) == b"hello"
        (connection,) = made(Echo)
        wait_until(lambda: connection.recvburst == Usage(8, 1))
        figures = connection.stats()
        assert figures.receives >= 3 <= figures.sends
        assert (figures.bytes_received, figures.bytes_sent) == (15, 15)
        assert server.stats().sockets == 2 + server.backlog.in_use
        assert server.engine.stats().sockets == server.stats().sockets
        wanted = {("accept", "submit"), ("accept", "retire"), ("receive", "submit")}
        wait_until(lambda: wanted <= {(record.operation, record.step) for record in server.trace_records()})
        stream.close()
        connection.until("close")
        connection.check()
        assert connection.close_reason == "eof"
        assert server.stats().sends == figures.sends


def test_tls_over_a_pipe(tmp_path: Path) -> None:
    name = new_name()
    with (
        serving(Echo, address=name, tls=SERVER) as server,
        open_stream(name, timeout=LONG, tls=CLIENT, server_hostname="localhost") as stream,
    ):
        sent = random.Random(9).randbytes(100_000)
        for start in range(0, len(sent), 10_000):
            stream.write(sent[start : start + 10_000])
            assert stream.readexactly(10_000) == sent[start : start + 10_000]
        assert server.connections[0].tls is not None
        with pytest.raises(OSError, match=r"TLS|plain socket"):
            server.connections[0].detach()
        (connection,) = made(Echo)
        stream.close()
        connection.until("close")
        assert connection.close_reason == "eof"

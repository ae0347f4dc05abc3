"""TLS on connections: order of callbacks, ends, limits; against Python's ssl and against ourselves."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    LOOPBACK,
    PATIENCE,
    Echo,
    Recorder,
    made,
    raw,
    read_exactly,
    rst,
    serving,
    wait_until,
)
from targets import Asked
from traffic import LONG, beside

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from secure import TLS12, TLS13, certificate, client_context, no_verifying, server_context

from iocp_ctypes import ConnectionClosedError, Server, StreamServer, _tlschannel, connect, open_stream
from iocp_ctypes._sockops import OverlappedSocket
from iocp_ctypes.tls import TLSCodec

MIB = 1 << 20
SERVER, CLIENT = server_context(), client_context()


def tls_raw(address: Any, context: ssl.SSLContext = CLIENT, name: str = "localhost") -> ssl.SSLSocket:
    """Connect a plain client and shake hands; a FIN without close_notify raises where it reads."""
    return context.wrap_socket(raw(address), server_hostname=name, suppress_ragged_eofs=False)


@contextlib.contextmanager
def asking(address: Any, handler: Any = Asked, **options: Any) -> Iterator[Any]:
    """A TLS connection of our own for a `with` block."""
    options.setdefault("tls", CLIENT)
    connection = connect(address, handler, server_hostname="localhost", timeout=PATIENCE, **options)
    try:
        yield connection
    finally:
        connection.abort()
        assert connection.wait_closed(PATIENCE)


def echoes(sock: Any, data: bytes = b"hello") -> None:
    sock.sendall(data)
    assert read_exactly(sock, len(data)) == data


def exchanged(address: Any, *sizes: int) -> None:
    """Assert that messages of these sizes come back, sent and read at once (ssl's sockets cannot)."""
    with open_stream(address, timeout=LONG, tls=CLIENT) as stream:
        for size in sizes:
            data = (bytes(range(256)) * (size // 256 + 1))[:size]
            with beside(lambda data=data: stream.write(data)):  # type: ignore[misc]
                assert stream.readexactly(size) == data


def refused(address: Any, context: ssl.SSLContext = CLIENT, name: str = "localhost") -> None:
    """Assert that the handshake, or the first read after it, fails."""

    def talk() -> None:
        with tls_raw(address, context, name) as sock:
            sock.sendall(b"x")
            assert sock.recv(1), "the end came without an alert"

    with pytest.raises(OSError, match=r"."):
        talk()


def closed_as(server: Server, reason: str, count: int = 1) -> None:
    """Wait until the server counts so many connections that ended for a reason, and no other."""
    wait_until(lambda: server.stats().closed.get(reason, 0) >= count, what=f"{count} closed as {reason}")
    assert server.stats().closed == {reason: count}


# -- the handshake -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_on_connect_comes_after_the_handshake(limits: dict[str, Any]) -> None:
    versions: list[Any] = []

    class Version(Echo):
        def connected(self) -> None:
            assert self.tls is not None
            versions.append(self.tls.version())

    with serving(Version, tls=server_context(**limits)) as server:
        with tls_raw(server.address) as client:
            for size in (1, 64, 5000, 40_000):
                echoes(client, bytes(size))
            assert client.version() == versions[0]
            client.unwrap()
        [connection] = made(Version)
        connection.until("close")
        connection.check()
        assert connection.names[-2:] == ["eof", "close"]
        assert connection.close_reason == "eof"
        assert connection.calls[-1].value is None
        assert connection.bytes_received > 45_065 < connection.bytes_sent


def test_our_client_and_our_server() -> None:
    with serving(Echo, tls=SERVER) as server, asking(server.address) as client:
        client.send(b"sent before it was connected")
        wait_until(lambda: client.received == b"sent before it was connected")
        assert client.names[0] == "connect"
        assert client.tls.getpeercert()["subject"]
        client.close()
        client.until("close")
        client.check()
        assert client.close_reason == "local"
        [connection] = made(Echo)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "eof"


def test_a_plain_connection_has_no_tls() -> None:
    with serving(Echo) as server, raw(server.address) as client:
        echoes(client)
        assert made(Echo)[0].tls is None


PLAIN_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("how", ["http", "garbage", "scan", "reset", "half", "alert"])
def test_who_does_not_speak_tls_is_turned_away_quietly(how: str) -> None:
    with serving(Echo, tls=SERVER, linger_timeout=1) as server:
        for _ in range(5):
            with raw(server.address) as client:
                if how == "http":
                    client.sendall(PLAIN_REQUEST)
                elif how == "garbage":
                    client.sendall(bytes(range(256)) * 100)
                elif how == "half":
                    client.sendall(b"\x16\x03\x01\x02\x00\x01")
                elif how == "alert":
                    client.sendall(b"\x15\x03\x01\x00\x02\x02\x00")
                if how == "reset":
                    rst(client)
                    continue
                if how in ("scan", "half"):
                    client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while client.recv(4096):
                        pass
        with tls_raw(server.address) as client:
            echoes(client)
        if how == "reset":  # whom it found gone already was not accepted
            assert set(server.stats().closed) <= {"reset", "tls"}
        else:
            wait_until(lambda: server.stats().closed.get("tls", 0) >= 5)
        ours = [connection for connection in Echo.made if connection.names]
        assert len(ours) == 1, "no callback for who never was connected"
    # No ERROR was logged: the guards of conftest see to it.


@pytest.mark.parametrize("dribble", [False, True])
def test_a_slow_handshake_is_cut(dribble: bool) -> None:
    with serving(Echo, tls=SERVER, tls_handshake_timeout=0.3) as server, raw(server.address) as client:
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            if dribble:
                for byte in b"\x16\x03\x01\x02\x00" + bytes(500):
                    client.send(bytes([byte]))
                    time.sleep(0.05)
            while client.recv(4096):
                pass
        assert time.monotonic() - began < PATIENCE
        closed_as(server, "tls")
        assert made(Echo)[0].names == []


def test_a_client_whose_server_does_not_shake_hands() -> None:
    class Silent(Recorder):
        pass

    with serving(Silent) as server, asking(server.address, tls_handshake_timeout=0.2) as client:
        client.until("close")
        assert client.names == ["close"]
        assert client.close_reason == "tls"
        assert isinstance(client.calls[0].value, TimeoutError)
        assert "tls_handshake_timeout=0.2" in str(client.calls[0].value)


def test_a_client_that_does_not_trust_the_server() -> None:
    with serving(Echo, tls=SERVER) as server:
        with asking(server.address, tls=client_context("other.example")) as client:
            client.until("close")
            client.check_failed(ssl.SSLCertVerificationError, "tls")
        closed_as(server, "tls")
        connection = connect(server.address, Asked, tls=CLIENT, server_hostname="example.org")
        connection.until("close")
        connection.check_failed(ssl.SSLCertVerificationError, "tls")
        assert connection.wait_closed(PATIENCE)


def test_the_host_of_the_address_is_verified_unless_another_is_named() -> None:
    asked: list[Any] = []
    context = server_context(sni_callback=lambda _tls, name, _context: asked.append(name))
    with serving(Echo, tls=context) as server:
        port = server.address[1]
        for host, name in (("127.0.0.1", None), ("127.0.0.1", "localhost"), ("localhost", None)):
            client = connect((host, port), Asked, tls=CLIENT, server_hostname=name)
            client.until("connect")
            client.close()
            assert client.wait_closed(PATIENCE)
            assert client.close_reason == "local"
        client = connect(("127.0.0.1", port), Asked, tls=no_verifying(), server_hostname="")
        client.until("connect")
        client.close()
        assert client.wait_closed(PATIENCE)
    assert asked == [None, "localhost", "localhost", None]  # an address is no name


def test_alpn_sni_and_client_certificates() -> None:
    guest = certificate("guest.example")
    second = server_context("two.example")
    server_side = server_context(verify_mode=ssl.CERT_OPTIONAL)
    server_side.sni_callback = lambda tls, name, _context: setattr(
        tls, "context", second if name == "two.example" else server_side
    )
    for context in (server_side, second):
        context.set_alpn_protocols(["talk/2", "talk/1"])
        context.load_verify_locations(cadata=guest.certificate)
    seen: list[Any] = []

    class Asking(Echo):
        def connected(self) -> None:
            assert self.tls is not None
            seen.append((self.tls.selected_alpn_protocol(), bool(self.tls.getpeercert())))

    with serving(Asking, tls=server_side) as server:
        one = client_context()
        one.set_alpn_protocols(["talk/1"])
        guest.load_into(one)
        with tls_raw(server.address, one) as client:
            echoes(client)
            assert client.selected_alpn_protocol() == "talk/1"
        with tls_raw(server.address, client_context("two.example"), "two.example") as client:
            echoes(client)
        assert seen == [("talk/1", True), (None, False)]


@pytest.mark.parametrize("limits", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_a_client_without_the_certificate_that_is_asked_for(limits: dict[str, Any]) -> None:
    context = server_context(verify_mode=ssl.CERT_REQUIRED, **limits)
    with serving(Echo, tls=context) as server:
        refused(server.address)
        closed_as(server, "tls")
        with asking(server.address) as client:
            client.until("close")
            assert client.close_reason == "tls"
            assert isinstance(client.calls[-1].value, ssl.SSLError)


@pytest.mark.parametrize("limits", [TLS12, TLS13], ids=["1.2", "1.3"])
def test_a_session_is_resumed(limits: dict[str, Any]) -> None:
    context = client_context(**limits)
    with serving(Echo, tls=SERVER) as server:
        sessions: list[Any] = [None]
        for resumed in (False, True, True):
            with asking(server.address, tls=context, tls_session=sessions[-1]) as client:
                client.send(b"x")
                client.until("data")  # tickets come before it
                assert client.tls.session_reused is resumed
                sessions.append(client.tls.session)


def test_handshakes_run_where_callbacks_run() -> None:
    threads: list[str] = []
    context = server_context(
        sni_callback=lambda _tls, _name, _context: threads.append(threading.current_thread().name)
    )
    with serving(Echo, tls=context, work_threads=2) as server:
        for _ in range(4):
            with tls_raw(server.address) as client:
                echoes(client, bytes(50_000))
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for connection in made(Echo, 4):
            assert len(connection.threads) == 1
            assert names[connection.calls[0].thread].startswith("iocp_ctypes work")
    assert {name.rsplit(" ", 1)[0] for name in threads} == {"iocp_ctypes work"}
    assert len(set(threads)) == 2


def test_many_handshakes_at_once(io_threads: int) -> None:
    with serving(Echo, tls=SERVER, io_threads=io_threads) as server:

        def talk() -> None:
            for _ in range(5):
                with tls_raw(server.address) as client:
                    echoes(client, bytes(10_000))
                    client.unwrap()

        with beside(*[talk] * 8):
            pass
        for connection in made(Echo, 40):
            connection.until("close")
            connection.check()


def test_first_bytes_that_came_with_the_accept() -> None:
    with serving(Echo, tls=SERVER, accept_data=100) as server, tls_raw(server.address) as client:
        echoes(client, bytes(3000))


def test_what_others_ask_for_before_on_connect_waits_for_it() -> None:
    order: list[str] = []

    class Late(Echo):
        def connected(self) -> None:
            order.append("connect")

        def timed_out(self, kind: str) -> bool:
            order.append(kind)
            return True

    with serving(Late, tls=SERVER) as server, raw(server.address) as sock:
        [connection] = made(Late)
        wait_until(lambda: server.connections)
        connection.call_soon(order.append, "called")
        connection.set_deadline(0)
        assert server.broadcast(b"to all") == 1
        assert connection.write_buffer_size == 6
        connection.pause_reading()
        time.sleep(0.1)
        assert order == []
        with CLIENT.wrap_socket(sock, server_hostname="localhost") as client:
            assert read_exactly(client, 6) == b"to all"
            client.sendall(b"wait")
            wait_until(lambda: len(order) == 3)
            assert order[0] == "connect"
            assert sorted(order[1:]) == ["called", "deadline"]
            time.sleep(0.1)
            assert "data" not in connection.names, "it was paused before it was connected"
            connection.resume_reading()
            assert read_exactly(client, 4) == b"wait"


def test_what_waited_for_on_connect_runs_where_it_never_comes() -> None:
    with serving(Echo, tls=SERVER) as server, raw(server.address):
        [connection] = made(Echo)
        wait_until(lambda: server.connections)
        called = threading.Event()
        connection.call_soon(called.set)
        connection.abort()
        assert called.wait(PATIENCE)
        assert connection.wait_closed(PATIENCE)
        assert connection.names == []


def test_closing_before_on_connect_ends_at_once() -> None:
    with serving(Echo, tls=SERVER, tls_handshake_timeout=60) as server:
        clients = [raw(server.address) for _ in range(10)]
        wait_until(lambda: len(server.connections) == 10)
        began = time.monotonic()
        assert server.stop(3 * PATIENCE)
        assert time.monotonic() - began < 2 * PATIENCE
        assert server.stats().closed == {"shutdown": 10}
        for client in clients:
            client.close()


def test_the_context_of_a_running_server_may_be_replaced() -> None:
    with serving(Echo, tls=SERVER) as server:
        with tls_raw(server.address) as client:
            echoes(client)
        server.tls = server_context("new.example")
        refused(server.address)
        with tls_raw(server.address, client_context("new.example"), "new.example") as client:
            echoes(client)
        with pytest.raises(ValueError, match="is for the client side"):
            server.tls = CLIENT
        with tls_raw(server.address, client_context("new.example"), "new.example") as client:
            echoes(client)


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"recv_mode": "flow"},
        {"recv_mode": "zero-byte"},
        {"recv_mode": "flow", "recv_size": 64},
        {"sendcap": 1, "high_mark": 1000, "low_mark": 100},
    ],
    ids=str,
)
def test_messages_of_all_sizes_come_back(options: dict[str, Any]) -> None:
    with serving(Echo, tls=SERVER, **options) as server:
        exchanged(server.address, 1, 2, 63, 64, 65, 1023, 16_384, 16_385, 100_000)
        [connection] = made(Echo)
        largest = max(len(call.value) for call in connection.calls if call.name == "data")
        if options.get("recv_mode") == "flow":
            assert largest <= options.get("recv_size", 16 * 1024)


def test_16_mib_come_back_with_a_half_close(io_threads: int) -> None:
    block = bytes(range(251)) * 4177  # a little below a MiB

    class HalfClosing(Echo):
        def ended(self) -> bool:
            self.call_soon(self.finish)
            return True

        def drained(self) -> None:
            super().drained()

        def finish(self) -> None:
            self.send_eof()

    with (
        serving(HalfClosing, tls=SERVER, io_threads=io_threads) as server,
        open_stream(server.address, timeout=LONG, tls=CLIENT) as stream,
    ):

        def write() -> None:
            for _ in range(16):
                stream.write(block)
            stream.write_eof()

        with beside(write):
            for _ in range(16):
                assert stream.readexactly(len(block)) == block
            assert stream.read() == b""
        [connection] = made(HalfClosing)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "eof"
        assert connection.bytes_received > 16 * len(block)


def test_gathered_sends_and_sends_of_many_threads_stay_whole() -> None:
    lines = 300

    class Sending(Recorder):
        pass

    with serving(Sending, tls=SERVER) as server, tls_raw(server.address) as client:
        [connection] = made(Sending)
        connection.until("connect")

        def send(number: int) -> None:
            for line in range(lines):
                connection.send_many([b"%d " % number, b"%d" % line, b"\n"])

        with beside(*[lambda number=number: send(number) for number in range(4)]):  # type: ignore[misc]
            file = client.makefile("rb")
            got = [file.readline().split() for _ in range(4 * lines)]
        for number in range(4):
            assert [int(line) for who, line in got if int(who) == number] == list(range(lines))
        file.close()


def test_broadcast() -> None:
    with serving(Recorder, tls=SERVER) as server:
        clients = [tls_raw(server.address) for _ in range(5)]
        for connection in made(Recorder, 5):
            connection.until("connect")
        assert server.broadcast(b"to all") == 5
        for client in clients:
            assert read_exactly(client, 6) == b"to all"
            client.close()


def test_reading_pauses_with_plaintext_that_has_come() -> None:
    class Pausing(Recorder):
        pauses = 0

        def got(self, data: bytes) -> None:
            self.pause_reading()
            self.pauses += 1

    with (
        serving(Pausing, tls=SERVER, recv_mode="flow", recv_size=1000) as server,
        tls_raw(server.address) as client,
    ):
        data = bytes(range(250)) * 200
        with beside(lambda: client.sendall(data)):
            [connection] = made(Pausing)
            count = 0
            while len(connection.received) < len(data):
                count += 1
                wait_until(lambda wanted=count: connection.pauses == wanted)
                assert connection.names.count("data") == count
                connection.resume_reading()
        assert connection.received == data
        # The last call may have put its bytes down, and not have paused yet.
        wait_until(lambda: connection.pauses == connection.names.count("data"))
        connection.resume_reading()
        client.unwrap()
        connection.until("close")
        connection.check()


def test_what_is_unread_is_bounded_while_reading_is_paused() -> None:
    class Paused(Recorder):
        def connected(self) -> None:
            self.pause_reading()

    with (
        serving(Paused, tls=SERVER) as server,
        raw(server.address) as sock,
        CLIENT.wrap_socket(sock, server_hostname="localhost") as client,
    ):
        [connection] = made(Paused)
        connection.until("connect")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(100 * MIB))
        codec = connection._tls
        waiting = codec._incoming.pending + sum(map(len, codec._rest))
        assert waiting <= 128 * 1024
        assert "data" not in connection.names
        connection.abort()


def test_marks_count_ciphertext_and_on_drain_comes() -> None:
    results: list[bool] = []

    class Sending(Recorder):
        def connected(self) -> None:
            while not results or results[-1]:
                results.append(self.send(bytes(10_000)))

    with (
        serving(Sending, tls=SERVER, high_mark=200_000, low_mark=1000) as server,
        tls_raw(server.address) as client,
    ):
        [connection] = made(Sending)
        connection.until("connect")
        wait_until(lambda: results and not results[-1])
        total = 10_000 * len(results)
        assert total > 200_000
        assert read_exactly(client, total) == bytes(total)
        connection.until("drain")
        assert connection.write_buffer_size <= 1000


def test_a_reader_that_never_reads_ends_with_overflow() -> None:
    class Flooding(Recorder):
        def connected(self) -> None:
            self.sent = 0
            with contextlib.suppress(ConnectionClosedError):
                while True:
                    self.send(bytes(50_000))
                    self.sent += 50_000
                    assert self.write_buffer_size <= 2 * MIB

    with (
        serving(Flooding, tls=SERVER, write_buffer_max=2 * MIB) as server,
        raw(server.address) as sock,
        CLIENT.wrap_socket(sock, server_hostname="localhost"),
    ):
        [connection] = made(Flooding)
        connection.until("close")
        assert connection.close_reason == "overflow"
        assert connection.sent >= 2 * MIB


def test_sends_that_the_system_has_no_resources_for_are_not_encrypted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    send = OverlappedSocket.send

    def failing(self: Any, operation: Any, *args: Any) -> int:
        nonlocal calls
        calls += 1
        return 10055 if calls % 3 else send(self, operation, *args)

    with serving(Echo, tls=SERVER) as server:
        monkeypatch.setattr(OverlappedSocket, "send", failing)
        exchanged(server.address, 10, 100_000, 7)
    assert calls > 9


# -- ends ----------------------------------------------------------------------------------------------------


class Keeping(Echo):
    """Keeps the connection at EOF."""

    def ended(self) -> bool:
        return True


def test_a_fin_without_close_notify_is_a_truncation() -> None:
    with serving(Keeping, tls=SERVER) as server, tls_raw(server.address) as client:
        echoes(client)
        client.shutdown(socket.SHUT_WR)  # ssl leaves close_notify out
        [connection] = made(Keeping)
        connection.until("close")
        connection.check()
        assert "eof" not in connection.names
        assert isinstance(connection.calls[-1].value, ssl.SSLEOFError)
        assert connection.close_reason == "tls"


def test_a_truncation_while_paused_is_told_after_what_came() -> None:
    class Pausing(Recorder):
        def connected(self) -> None:
            self.pause_reading()

    with serving(Pausing, tls=SERVER) as server, tls_raw(server.address) as client:
        [connection] = made(Pausing)
        connection.until("connect")
        wait_until(lambda: connection._paused)
        client.sendall(b"unread")
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.1)
        assert connection.names == ["connect"]
        connection.resume_reading()
        connection.until("close")
        assert connection.received == b"unread"
        assert isinstance(connection.calls[-1].value, ssl.SSLEOFError)


def test_close_notify_is_eof_and_sending_may_go_on() -> None:
    class Answering(Recorder):
        def ended(self) -> bool:
            self.send(b"all of " + self.received)
            self.call_soon(self.close)
            return True

    with serving(Answering, tls=SERVER) as server:
        with open_stream(server.address, timeout=PATIENCE, tls=CLIENT) as stream:
            stream.write(b"this")
            stream.write_eof()
            assert stream.read() == b"all of this"
        [connection] = made(Answering)
        connection.until("close")
        connection.check()
        assert connection.names.count("eof") == 1
        assert connection.close_reason == "local"
        assert connection.calls[-1].value is None


def test_what_was_sent_before_close_arrives_whole_at_a_slow_reader_and_ends_with_close_notify() -> None:
    size = 3 * MIB

    class Closing(Recorder):
        def connected(self) -> None:
            self.send(bytes(size))
            self.close()

    with serving(Closing, tls=SERVER) as server, tls_raw(server.address) as client:
        time.sleep(0.2)
        assert read_exactly(client, size) == bytes(size)
        assert client.recv(1) == b""  # an SSLEOFError without close_notify
        client.close()
        [connection] = made(Closing)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "local"


def test_send_eof_ends_with_close_notify_and_receiving_goes_on() -> None:
    class Ending(Recorder):
        def connected(self) -> None:
            self.send(b"last")
            self.send_eof()

    with serving(Ending, tls=SERVER) as server, tls_raw(server.address) as client:
        assert read_exactly(client, 4) == b"last"
        assert client.recv(1) == b""
        client.sendall(b"thanks")
        [connection] = made(Ending)
        wait_until(lambda: connection.received == b"thanks")
        client.unwrap()
        connection.until("close")
        connection.check()
        assert connection.close_reason == "eof"


def test_abort_has_no_close_notify() -> None:
    class Aborting(Echo):
        def got(self, data: bytes) -> None:
            self.abort()

    with serving(Aborting, tls=SERVER) as server, tls_raw(server.address) as client:
        client.sendall(b"x")
        with pytest.raises((ssl.SSLEOFError, ConnectionError)):
            client.recv(1)
        [connection] = made(Aborting)
        connection.until("close")
        assert connection.close_reason == "aborted"


def test_a_reset_is_a_reset_or_a_truncation() -> None:
    with serving(Echo, tls=SERVER) as server:
        client = tls_raw(server.address)
        echoes(client)
        rst(client)
        [connection] = made(Echo)
        connection.until("close")
        connection.check()
        assert connection.close_reason in ("reset", "tls")  # under Wine a receive may say EOF after a reset


def test_a_bad_record_ends_it_with_an_alert() -> None:
    with serving(Echo, tls=SERVER) as server, raw(server.address) as sock:
        codec = TLSCodec(CLIENT, server_side=False, server_hostname="localhost")
        while not codec.handshake():
            sock.sendall(codec.output())
            codec.feed(sock.recv(65536))
        codec.write(b"good")
        good = codec.output()
        codec.write(b"evil")
        evil = bytearray(codec.output())
        evil[-1] ^= 1
        sock.sendall(good + bytes(evil))

        def listen() -> None:
            while data := sock.recv(65536):
                codec.feed(data)
                while codec.read(100):
                    pass

        with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
            listen()
        sock.close()
        [connection] = made(Echo)
        connection.until("close")
        connection.check()
        assert connection.received == b"good"
        assert connection.close_reason == "tls"
        assert isinstance(connection.calls[-1].value, ssl.SSLError)


def test_a_callback_that_raises_ends_its_connection(expects_errors: list[Any]) -> None:
    class Raising(Recorder):
        def got(self, data: bytes) -> None:
            raise ValueError("mine")

    with serving(Raising, tls=SERVER) as server, tls_raw(server.address) as client:
        client.sendall(b"x")
        [connection] = made(Raising)
        connection.until("close")
        assert connection.close_reason == "error"


def test_who_says_nothing_after_the_handshake_is_silent() -> None:
    with serving(Recorder, tls=SERVER, silent_timeout=5) as server, tls_raw(server.address):
        [connection] = made(Recorder)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "silent"


def test_who_talks_is_not_silent_and_may_become_idle() -> None:
    class Idle(Echo):
        def timed_out(self, kind: str) -> bool:
            return self.names.count("timeout") < 2

    with (
        serving(Idle, tls=SERVER, silent_timeout=5, idle_timeout=3) as server,
        tls_raw(server.address) as client,
    ):
        echoes(client)
        [connection] = made(Idle)
        wait_until(lambda: "close" in connection.names, timeout=30)
        assert [call.value for call in connection.calls if call.name == "timeout"] == ["idle"] * 2
        assert connection.close_reason == "idle"


def test_who_ends_badly_leaves_no_garbage() -> None:
    def talk(address: Any, how: int) -> None:
        with raw(address) as sock, contextlib.suppress(OSError):
            if how == 0:
                sock.sendall(PLAIN_REQUEST)
            else:
                with CLIENT.wrap_socket(sock, server_hostname="localhost") as client:
                    echoes(client)
                    if how == 1:
                        client.shutdown(socket.SHUT_WR)
                    elif how == 2:
                        socket.socket.send(client, b"no record of TLS")
                    else:
                        client.unwrap()
            while sock.recv(100):
                pass

    with serving(Echo, tls=SERVER) as server:
        gc.collect()
        gc.disable()
        try:
            for how in range(4):
                talk(server.address, how)
                [connection] = made(Echo)
                gone = weakref.ref(connection)
                assert connection.wait_closed(PATIENCE)
                del connection
                Echo.made.clear()
                dispatcher = server.engine.dispatcher

                def is_gone(gone: Any = gone, dispatcher: Any = dispatcher) -> bool:
                    # Without a GIL the thread that made an object is the one to free it, once it wakes up;
                    # nothing but the collector does it for one that waits in reserve.
                    dispatcher.call_soon(time.monotonic)
                    if not getattr(sys, "_is_gil_enabled", lambda: True)():
                        gc.collect()
                    return gone() is None

                wait_until(is_gone, what=f"connection {how} is let go")
        finally:
            gc.enable()


def test_handles_stay_flat(flat_handles: None) -> None:
    with serving(Echo, tls=SERVER) as server:
        for _ in range(30):
            with tls_raw(server.address) as client:
                echoes(client)
            with raw(server.address) as sock:
                sock.sendall(PLAIN_REQUEST)
                with contextlib.suppress(ConnectionError):
                    sock.recv(100)


def test_encrypting_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Echo, tls=SERVER) as server, tls_raw(server.address) as client:
        echoes(client)

        def failing(_self: Any, _data: Any) -> int:
            raise ssl.SSLError("no more")

        monkeypatch.setattr(TLSCodec, "write", failing)
        client.sendall(b"x")
        [connection] = made(Echo)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "tls"
        assert str(connection.calls[-1].value) == "('no more',)"


def test_what_tls_says_by_itself_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that asks for new keys again and again and does not read: each answer is kept for it."""
    with serving(Recorder, tls=SERVER, write_buffer_max=MIB) as server, tls_raw(server.address) as client:
        [connection] = made(Recorder)
        connection.until("connect")
        monkeypatch.setattr(TLSCodec, "output", lambda _self: bytes(100_000))
        with contextlib.suppress(OSError):
            while not connection.closed:
                client.sendall(b"x")
                time.sleep(0.01)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "overflow"


def test_a_handshake_needs_no_room_in_the_write_buffer() -> None:
    marks: Any = {"write_buffer_max": 100, "high_mark": 100, "low_mark": 0}
    with serving(Echo, tls=SERVER, **marks) as server, asking(server.address, **marks) as client:
        client.send(b"x")
        client.until("data")


def test_a_context_that_went_bad_is_logged_and_ends_its_connections(
    monkeypatch: pytest.MonkeyPatch, expects_errors: list[Any]
) -> None:
    def refuse(*_args: Any) -> TLSCodec:
        raise ValueError("no good")

    with serving(Echo, tls=SERVER) as server:
        monkeypatch.setattr(_tlschannel, "make_codec", refuse)
        with raw(server.address) as client, contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
        closed_as(server, "tls")
        assert made(Echo)[0].names == []
    assert "the context of tls= cannot be used: no good" in expects_errors[0].getMessage()


# -- STARTTLS ------------------------------------------------------------------------------------------------


class Mail(Recorder):
    """Begins TLS at a command; until then, and from then on, it answers each line."""

    behind = True  # hands over what came behind the command

    def connected(self) -> None:
        self.send(b"220 hello\r\n")

    def got(self, data: bytes) -> None:
        command, _, rest = data.partition(b"\r\n")
        if command == b"STARTTLS":
            self.send(b"220 go ahead\r\n")
            self.start_tls(SERVER, server_side=True, received=rest)
        else:
            self.send(b"250 " + command + (b" in private" if self.tls else b"") + b"\r\n")

    def on_tls(self) -> None:
        with self.record("tls"):
            self.send(b"220 hello again\r\n")


def talk(sock: Any, line: bytes) -> bytes:
    sock.sendall(line + b"\r\n")
    return answer(sock)


def answer(sock: Any) -> bytes:
    line = b""
    while not line.endswith(b"\r\n"):
        part = sock.recv(1)
        assert part, line
        line += part
    return line.strip()


def some(sock: Any) -> bytes:
    data: bytes = sock.recv(65536)
    assert data, "the end came instead"
    return data


@pytest.mark.parametrize("recv_mode", ["auto", "burst"])
@pytest.mark.parametrize("work_threads", [0, 2])
def test_starttls_on_the_server(work_threads: int, recv_mode: str) -> None:
    options = {"work_threads": work_threads, "recv_mode": recv_mode, "recvburst": 4}
    with serving(Mail, **options) as server, raw(server.address) as sock:
        assert answer(sock) == b"220 hello"
        assert talk(sock, b"NOOP") == b"250 NOOP"
        assert talk(sock, b"STARTTLS") == b"220 go ahead"
        with CLIENT.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as client:
            assert answer(client) == b"220 hello again"
            assert talk(client, b"NOOP") == b"250 NOOP in private"
            client.unwrap()
        [connection] = made(Mail)
        connection.until("close")
        connection.check()
        assert connection.names[:4] == ["connect", "data", "data", "tls"]
        assert connection.close_reason == "eof"


@pytest.mark.parametrize("recv_mode", ["auto", "burst"])
def test_starttls_with_the_handshake_behind_the_command(recv_mode: str) -> None:
    with serving(Mail, recv_mode=recv_mode) as server, raw(server.address) as sock:
        assert answer(sock) == b"220 hello"
        codec = TLSCodec(CLIENT, server_side=False, server_hostname="localhost")
        codec.handshake()
        sock.sendall(b"STARTTLS\r\n" + codec.output())
        assert answer(sock) == b"220 go ahead"
        while not codec.handshake():
            codec.feed(sock.recv(65536))
        codec.write(b"NOOP\r\n")
        sock.sendall(codec.output())
        got = b""
        while b"private" not in got:
            codec.feed(sock.recv(65536))
            got += codec.read(1000) or b""
        assert got == b"220 hello again\r\n250 NOOP in private\r\n"


def test_what_is_put_behind_the_command_in_the_clear_is_never_taken_for_private() -> None:
    with serving(Mail, linger_timeout=0.1) as server, raw(server.address) as sock:
        assert answer(sock) == b"220 hello"
        sock.sendall(b"STARTTLS\r\nMAIL FROM:<attacker@example.org>\r\n")
        assert answer(sock) == b"220 go ahead"
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
        [connection] = made(Mail)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "tls"
        assert isinstance(connection.calls[-1].value, ssl.SSLError)
        assert b"MAIL" not in b"".join(call.value for call in connection.calls[2:] if call.name == "data")
        assert "tls" not in connection.names


@pytest.mark.parametrize("recv_mode", ["flow", "burst"])
def test_what_was_received_and_not_delivered_is_not_plaintext_either(recv_mode: str) -> None:
    """Paused, with bytes stashed: start_tls from another thread takes them for the handshake."""

    class Paused(Recorder):
        def connected(self) -> None:
            self.call_soon(self.pause_reading)

    with serving(Paused, recv_mode=recv_mode) as server, raw(server.address) as sock:
        [connection] = made(Paused)
        connection.until("connect")
        wait_until(lambda: connection._paused)
        wait_until(lambda: server.engine.ops_pending > server.backlog.in_use)
        codec = TLSCodec(CLIENT, server_side=False, server_hostname="localhost")
        codec.handshake()
        sock.sendall(codec.output())
        wait_until(lambda: connection.unread)
        connection.start_tls(SERVER, server_side=True)
        while not codec.handshake():
            codec.feed(sock.recv(65536))
        codec.write(b"private")
        sock.sendall(codec.output())
        time.sleep(0.2)
        assert "data" not in connection.names, "reading is paused as it was"
        connection.resume_reading()
        wait_until(lambda: connection.received == b"private")


class Bulk(Recorder):
    """Takes `before` bytes in the clear; what comes behind them is TLS."""

    before = 0
    taken = 0
    amid = False
    close_at_once = False

    def got(self, data: bytes) -> None:
        if self.tls is not None:
            self.send(data)
            return
        self.taken += len(data)
        behind = self.taken - self.before
        if behind >= 0:
            self.amid = self._burst is not None and bool(self._burst.posted)
            self.start_tls(SERVER, server_side=True, received=data[len(data) - behind :])
            if self.close_at_once:
                self.send(b"the end")
                self.close()


def bulk(before: int, close_at_once: bool = False) -> type[Bulk]:
    return type("Bulks", (Bulk,), {"before": before, "close_at_once": close_at_once})


@pytest.mark.parametrize("recv_mode", ["auto", "burst"])
def test_starttls_amid_a_burst(recv_mode: str, io_threads: int) -> None:
    """Its first message is in some of the receives that are posted, or in none, and comes in order."""
    before = 100_007
    handler = bulk(before)
    with serving(handler, recv_mode=recv_mode, recvburst=4, recv_size=512, io_threads=io_threads) as server:
        for number in range(16):
            codec = TLSCodec(CLIENT, server_side=False, server_hostname="localhost")
            codec.handshake()
            with raw(server.address) as sock:
                sent = bytes(before) + codec.output()
                cut = len(sent) - number * 50
                sock.sendall(sent[:cut])
                sock.sendall(sent[cut:])
                while not codec.handshake():
                    codec.feed(some(sock))
                got, data = b"", bytes(range(256)) * 400
                codec.write(data)
                sock.sendall(codec.output())
                while len(got) < len(data):
                    codec.feed(some(sock))
                    got += codec.read(1 << 20) or b""
                assert got == data
                connection = made(handler, number + 1)[number]
                assert connection._burst is None
            connection.until("close")
            connection.check()
    assert any(connection.amid for connection in handler.made)


def test_starttls_amid_a_burst_and_the_end_behind_it() -> None:
    handler = bulk(100_000, close_at_once=True)
    with serving(handler, recv_mode="burst", recvburst=4) as server, raw(server.address) as sock:
        sock.sendall(bytes(100_000))
        with CLIENT.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as client:
            assert read_exactly(client, 7) == b"the end"
            assert client.recv(1) == b""
        [connection] = made(handler)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "local"


@pytest.mark.parametrize("end", ["eof", "reset"])
def test_a_peer_that_ends_amid_the_burst_instead_of_shaking_hands(end: str) -> None:
    go = threading.Event()

    class Late(Bulk):
        before = 100_000

        def got(self, data: bytes) -> None:
            assert go.wait(PATIENCE)
            super().got(data)

    with serving(Late, recv_mode="burst", recvburst=4, recv_size=32_768) as server:
        sock = raw(server.address)
        sock.sendall(bytes(100_000))
        [connection] = made(Late)
        connection.until("data")
        wait_until(lambda: connection.bytes_received == 100_000)
        if end == "eof":
            sock.shutdown(socket.SHUT_WR)
        else:
            rst(sock)
        time.sleep(0.05)
        go.set()
        connection.until("close")
        connection.check()
        assert connection.close_reason in (("tls",) if end == "eof" else ("tls", "reset"))
        assert "eof" not in connection.names
        sock.close()


def test_starttls_on_the_client() -> None:
    class Asking(Asked):
        step = 0

        def got(self, data: bytes) -> None:
            self.step += 1
            if self.step == 1:
                self.send(b"STARTTLS\r\n")
            elif self.step == 2:
                assert data == b"220 go ahead\r\n"
                self.start_tls(CLIENT, server_side=False, server_hostname="localhost")
                self.send(b"EHLO\r\n")  # waits for the handshake

        def on_tls(self) -> None:
            with self.record("tls"):
                assert self.tls is not None
                assert self.tls.getpeercert()

    with serving(Mail) as server:
        client = connect(server.address, Asking)
        wait_until(lambda: client.received.endswith(b"250 EHLO in private\r\n"))
        assert client.names.index("tls") == 3
        client.close()
        assert client.wait_closed(PATIENCE)
        client.check()
        [connection] = made(Mail)
        connection.until("close")
        assert connection.close_reason == "eof"


def test_the_server_side_of_a_handshake_may_be_the_connecting_one() -> None:
    class Turned(Recorder):
        def got(self, data: bytes) -> None:
            if self.tls is None:
                self.start_tls(CLIENT, server_side=False, server_hostname="localhost")
                self.send(b"secret")

    class Caller(Asked):
        def connected(self) -> None:
            self.send(b"go")
            self.start_tls(SERVER, server_side=True)

    with serving(Turned) as server:
        caller = connect(server.address, Caller)
        wait_until(lambda: caller.received == b"secret")
        caller.abort()
        assert caller.wait_closed(PATIENCE)


def test_what_was_sent_before_starttls_goes_first_and_in_the_clear() -> None:
    size = MIB

    class Sending(Recorder):
        def connected(self) -> None:
            self.send(bytes(size))
            self.start_tls(SERVER, server_side=True)
            self.send(b"private")
            self.close()

    with serving(Sending, sendcap=1) as server, raw(server.address) as sock:
        time.sleep(0.1)
        assert read_exactly(sock, size) == bytes(size)
        with CLIENT.wrap_socket(sock, server_hostname="localhost", suppress_ragged_eofs=False) as client:
            assert read_exactly(client, 7) == b"private"
            assert client.recv(1) == b""
        [connection] = made(Sending)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "local"


def test_a_peer_that_ends_instead_of_shaking_hands() -> None:
    with serving(Mail) as server, raw(server.address) as sock:
        assert answer(sock) == b"220 hello"
        assert talk(sock, b"STARTTLS") == b"220 go ahead"
        sock.shutdown(socket.SHUT_WR)
        [connection] = made(Mail)
        connection.until("close")
        connection.check()
        assert connection.close_reason == "tls"
        assert isinstance(connection.calls[-1].value, ssl.SSLEOFError)


def test_a_handshake_of_starttls_is_cut_when_it_takes_too_long() -> None:
    with serving(Mail, tls_handshake_timeout=0.3) as server, raw(server.address) as sock:
        assert answer(sock) == b"220 hello"
        assert talk(sock, b"STARTTLS") == b"220 go ahead"
        [connection] = made(Mail)
        connection.until("close")
        assert connection.close_reason == "tls"
        assert isinstance(connection.calls[-1].value, TimeoutError)


def test_starttls_is_refused_where_it_makes_no_sense() -> None:
    class Plain(Recorder):
        pass

    with serving(Plain) as server:
        waiting = connect(server.address, Asked)
        with pytest.raises((RuntimeError, TypeError)):
            waiting.start_tls(CLIENT, server_side=1)  # type: ignore[arg-type]
        waiting.until("connect")
        for wrong, error, says in (
            ({"context": None}, TypeError, "context=None: must be an ssl.SSLContext"),
            ({"context": SERVER}, ValueError, "is for the server side"),
            ({"server_hostname": ""}, ValueError, "needs a server_hostname"),
            ({"server_hostname": 5}, TypeError, "server_hostname=5"),
            ({"server_side": True}, ValueError, "is for the client side"),
            ({"server_side": True, "context": SERVER}, ValueError, "for the client's side"),
            ({"received": "text"}, TypeError, "is a str"),
        ):
            arguments: dict[str, Any] = {
                "context": CLIENT,
                "server_side": False,
                "server_hostname": "localhost",
                **wrong,  # type: ignore[dict-item]
            }
            with pytest.raises(error, match=says):
                waiting.start_tls(**arguments)
        assert waiting.tls is None
        waiting.start_tls(CLIENT, server_side=False, server_hostname="localhost")
        with pytest.raises(RuntimeError, match="uses TLS already"):
            waiting.start_tls(CLIENT, server_side=False, server_hostname="localhost")
        waiting.abort()
        assert waiting.wait_closed(PATIENCE)
        with pytest.raises((RuntimeError, ConnectionClosedError)):
            waiting.start_tls(CLIENT, server_side=False, server_hostname="localhost")
        ended = connect(server.address, Asked)
        ended.until("connect")
        ended.send_eof()
        with pytest.raises(ConnectionClosedError):
            ended.start_tls(CLIENT, server_side=False, server_hostname="localhost")
        ended.abort()
        assert ended.wait_closed(PATIENCE)


# -- streams, and arguments ----------------------------------------------------------------------------------


def test_streams_over_tls() -> None:
    def upper(stream: Any) -> None:
        for line in stream:
            stream.write(line.upper())

    with StreamServer(LOOPBACK, upper, timeout=PATIENCE, tls=SERVER) as server:
        with open_stream(server.address, timeout=PATIENCE, tls=CLIENT, server_hostname="localhost") as stream:
            for number in range(20):
                stream.write(b"line %d\n" % number)
            for number in range(20):
                assert stream.readline() == b"LINE %d\n" % number
            assert stream.connection.tls is not None
            stream.write_eof()
            assert stream.read() == b""
        with pytest.raises(ssl.SSLCertVerificationError):
            open_stream(server.address, timeout=PATIENCE, tls=client_context("other.example"))


def test_a_stream_says_that_what_it_read_may_be_incomplete() -> None:
    with socket.create_server(LOOPBACK) as listener:

        def serve() -> None:
            sock, _peer = listener.accept()
            with sock, SERVER.wrap_socket(sock, server_side=True) as accepted:
                accepted.sendall(b"a part")
                accepted.shutdown(socket.SHUT_WR)

        with beside(serve):
            stream = open_stream(listener.getsockname(), timeout=PATIENCE, tls=CLIENT)
            assert stream.readexactly(6) == b"a part"
            with pytest.raises(ssl.SSLEOFError, match="incomplete"):
                stream.read(1)
            stream.close()


def test_wrong_arguments_are_refused_before_anything_begins() -> None:
    for wrong in (True, "cert.pem", object()):
        with pytest.raises(TypeError, match=r"tls=.*: must be an ssl.SSLContext or None"):
            Server(LOOPBACK, Echo, tls=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tls=.*: is for the client side; this is the server"):
        Server(LOOPBACK, Echo, tls=CLIENT)
    address = ("127.0.0.1", 1)
    for options, says in (
        ({"tls": SERVER}, "is for the server side"),
        ({"tls": CLIENT, "server_hostname": ""}, "needs a server_hostname"),
        ({"server_hostname": "localhost"}, "with tls= only"),
    ):
        with pytest.raises(ValueError, match=says):
            connect(address, Asked, **options)  # type: ignore[arg-type]
    assert Asked.made == []

"""connect_websocket, against our server, a plain socket that does it wrong, and the library's own ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import LOOPBACK, PATIENCE, wait_until
from websockets.sync.client import connect as library_connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol
from wspeer import KEY, Noted, first, noted, websockets

from iocp_ctypes import ConnectionClosedError
from iocp_ctypes.websocket import Deflate, WebSocket, _client, connect_websocket


def client(url: Any, kind: Any = None, **options: Any) -> Any:
    """Open a WebSocket that records and does not echo."""
    return connect_websocket(url, kind or noted(echo=False), **options)


def url_of(server: Any, path: str = "/") -> str:
    return f"ws://127.0.0.1:{server.address[1]}{path}"


def test_there_and_back() -> None:
    kind = noted(subprotocols=("chat",))
    with websockets(kind) as server:
        headers = [("Authorization", "Bearer secret"), ("X-Two", "2")]
        mine = noted(echo=False, subprotocols=("other", "chat"))
        websocket = client(url_of(server, "/a?b=c"), mine, origin="https://x.example", headers=headers)
        websocket.until("open")
        theirs = first(kind)
        theirs.until("open")
        assert theirs.handshake.target == "/a?b=c"
        assert theirs.handshake.origin == "https://x.example"
        assert theirs.handshake.header("authorization") == "Bearer secret"
        assert theirs.handshake.header("x-two") == "2"
        assert websocket.subprotocol == theirs.subprotocol == "chat"
        for message in ("text", b"bytes", "", "x" * 100_000, bytes(200_000)):
            websocket.send(message)
        websocket.until("message", 5)
        assert websocket.messages == ["text", b"bytes", "", "x" * 100_000, bytes(200_000)]
        assert all(type(message) in (str, bytes) for message in websocket.messages)
        websocket.ping(b"?")
        assert websocket.until("pong")[1] == b"?"
        websocket.close(4001, "done")
        assert websocket.until("close") == theirs.until("close") == ("close", 4001, "done")
        assert websocket.connection.wait_closed(PATIENCE)
    websocket.check()
    theirs.check()


def test_what_is_sent_before_it_is_open_goes_when_it_is() -> None:
    with websockets() as server:
        websocket = client(server.address)
        for n in range(10):
            websocket.send(f"{n}")
        websocket.until("message", 10)
        assert websocket.messages == [f"{n}" for n in range(10)]
        websocket.close()
        websocket.until("close")


def test_compression_between_us() -> None:
    with websockets(noted(compression=Deflate(threshold=0, takeover=True))) as server:
        for deflate in (
            Deflate(threshold=0),
            Deflate(threshold=0, takeover=True, window_bits=9),
            Deflate(threshold=0, peer_takeover=False, peer_window_bits=10),
        ):
            websocket = client(server.address, noted(echo=False, compression=deflate))
            websocket.until("open")
            assert websocket._deflate is deflate
            for n in range(5):
                websocket.send("so much of the same " * 50 * n)
            websocket.until("message", 5)
            assert websocket.messages == ["so much of the same " * 50 * n for n in range(5)]
            before = websocket.connection.bytes_sent
            websocket.send("x" * 10_000, compress=False)
            websocket.until("message", 6)
            wait_until(lambda b=before, w=websocket: w.connection.bytes_sent - b > 10_000)
            websocket.close()
            websocket.until("close")


def test_the_server_closes() -> None:
    kind = noted()
    with websockets(kind) as server:
        websocket = client(server.address)
        websocket.until("open")
        first(kind).until("open")
        first(kind).close(1000, "go")
        assert websocket.until("close") == ("close", 1000, "go")
        assert websocket.connection.wait_closed(PATIENCE)
        assert not websocket.open
        with pytest.raises(ConnectionClosedError, match="is closed"):
            websocket.send("x")


def test_the_heartbeat_of_a_client() -> None:
    with websockets() as server:
        websocket = client(server.address, noted(echo=False, ping_interval=0.1))
        wait_until(lambda: websocket.latency is not None)
        websocket.close()
        websocket.until("close")


def refused(url: Any, **options: Any) -> tuple[Any, ...]:
    """Try to open; returns why it was not: on_close is the only callback."""
    kind = noted(echo=False, **options)
    websocket = client(url, kind)
    code, reason = websocket.until("close")[1:]
    assert websocket.names == ["close"]
    assert websocket.connection.wait_closed(PATIENCE)
    assert code == 1006
    return (reason,)


def test_a_server_that_says_no() -> None:
    kind = noted(on_handshake=lambda self, handshake: handshake.refuse(403))
    with websockets(kind) as server:
        assert "403" in refused(server.address)[0]


def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(LOOPBACK)  # kept bound, and not listening
        assert refused(sock.getsockname())[0]


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[Any]:
    """A server that answers every request with the same bytes."""
    with socket.create_server(LOOPBACK) as listener:

        def serve_one() -> None:
            with listener.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                data = b""
                while not data.endswith(b"\r\n\r\n"):
                    data += sock.recv(4096)
                sock.sendall(answer)
                with contextlib.suppress(OSError):
                    while sock.recv(4096):
                        pass

        thread = threading.Thread(target=serve_one)
        thread.start()
        yield listener.getsockname()
        thread.join()


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (SWITCH + b"Sec-WebSocket-Accept: wrong\r\n\r\n", "Sec-WebSocket-Accept"),
        (SWITCH + b"\r\n", "Sec-WebSocket-Accept"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "200"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "Connection"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "HTTP"),
    ],
)
def test_a_server_that_is_none(answer: bytes, told: str) -> None:
    with answering(answer) as address:
        assert told in refused(address)[0]


def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.create_server(LOOPBACK) as listener:
        reason = refused(listener.getsockname(), open_timeout=0.3)[0]
        assert reason == "the handshake took more than 0.3 s"


def test_closing_before_it_is_open() -> None:
    with socket.create_server(LOOPBACK) as listener:
        websocket = client(listener.getsockname())
        with pytest.raises(ConnectionClosedError):
            websocket.ping()
        websocket.close()
        assert websocket.until("close")[1] == 1006
        assert websocket.names == ["close"]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (None, TypeError),
        (5, TypeError),
        ("http://x/", ValueError),
        ("ws://", ValueError),
        ("ws://x:port/", ValueError),
        ("ws://x/#part", ValueError),
        (("127.0.0.1", 0), ValueError),
        (("127.0.0.1", "http"), ValueError),
        (("127.0.0.1",), TypeError),
    ],
)
def test_wrong_urls(url: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        client(url)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"headers": [("X Y", "1")]}, ValueError),
        ({"headers": [("X", "a\r\nb")]}, ValueError),
        ({"headers": [("X", 1)]}, TypeError),
        ({"timeout": -1}, ValueError),
        ({"backlog": 5}, TypeError),
        ({"tls": object()}, ValueError),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        client(("127.0.0.1", 1), **options)


def test_wss_asks_for_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def connect(address: Any, handler: Any, **options: Any) -> Any:
        asked.append((address, options))
        raise InterruptedError

    monkeypatch.setattr(_client, "connect", connect)
    with pytest.raises(InterruptedError):
        client("wss://example.org/x")
    ((address, options),) = asked
    assert address == ("example.org", 443)
    assert options["server_hostname"] == "example.org"
    assert options["tls"].check_hostname is True


def test_a_client_belongs_to_no_server() -> None:
    with websockets() as server:
        websocket = client(server.address)
        websocket.until("open")
        with pytest.raises(RuntimeError, match="belongs to no server"):
            websocket.subscribe("news")
        websocket.close()
        websocket.until("close")


# -- the library's own ends ----------------------------------------------------------------------------------


def test_against_the_server_of_the_library() -> None:
    def echo(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(echo, *LOOPBACK, compression="deflate") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            kind = noted(echo=False, compression=Deflate(threshold=10))
            websocket = client(server.socket.getsockname()[:2], kind)
            for message in ("text", b"bytes", "again and again " * 1000):
                websocket.send(message)
            websocket.send_fragment("in ")
            websocket.send_fragment("parts", last=True)
            websocket.until("message", 4)
            assert websocket.messages == ["text", b"bytes", "again and again " * 1000, "in parts"]
            websocket.close(1000, "bye")
            assert websocket.until("close") == ("close", 1000, "bye")
        finally:
            server.shutdown()
            thread.join()


def test_against_the_client_of_the_library() -> None:
    kind = noted(compression=Deflate(threshold=10), subprotocols=("chat",))
    with (
        websockets(kind) as server,
        library_connect(url_of(server), subprotocols=[Subprotocol("chat")]) as connection,
    ):
        assert connection.subprotocol == "chat"
        for message in ("text", b"bytes", "again and again " * 1000):
            connection.send(message)
            assert connection.recv(PATIENCE) == message
        connection.send(["in ", "three ", "parts"])
        assert connection.recv(PATIENCE) == "in three parts"
        assert connection.ping().wait(PATIENCE)
        connection.close(1000, "bye")
    assert first(kind).until("close") == ("close", 1000, "bye")
    first(kind).check()


def test_the_key_of_the_tests_is_that_of_the_rfc() -> None:
    assert KEY.startswith("dGhl")
    assert issubclass(Noted, WebSocket)

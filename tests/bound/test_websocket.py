"""WebSockets: opening, callbacks, closing, heartbeat, slow readers, stopping."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import LOOPBACK, PATIENCE, ended, raw, read_all, read_exactly, rst, wait_until
from websockets.version import version as websockets_version
from wspeer import (
    ACCEPT,
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Frame,
    Noted,
    Peer,
    close,
    first,
    frame,
    noted,
    request,
    small_buffers,
    websockets,
)

from iocp_ctypes import Connection, ConnectionClosedError, Server
from iocp_ctypes.websocket import (
    Deflate,
    Handshake,
    WebSocket,
    WebSocketConnection,
    WebSocketServer,
    _outgoing,
)

LIBRARY = int(websockets_version.partition(".")[0])

# -- opening -------------------------------------------------------------------------------------------------


def test_the_handshake() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address, "/chat/room?name=A%20b") as peer:
        assert peer.header("Upgrade") == "websocket"
        assert peer.header("Connection") == "Upgrade"
        assert peer.header("Sec-WebSocket-Accept") == ACCEPT
        assert peer.header("Sec-WebSocket-Protocol") is None
        websocket = first(kind)
        websocket.until("open")
        handshake = websocket.handshake
        assert (handshake.method, handshake.http_version) == ("GET", "1.1")
        assert (handshake.target, handshake.path) == ("/chat/room?name=A%20b", "/chat/room")
        assert handshake.query == "name=A%20b"
        assert (b"host", b"test") in handshake.headers
        assert handshake.header("HOST") == "test"
        assert handshake.header("none") is None
        assert handshake.peer_address == peer.sock.getsockname()
        assert websocket.peer_address == peer.sock.getsockname()
        assert websocket.open
        assert websocket.server is server
        assert server.websockets == [websocket]
        assert repr(websocket) == f"<Fresh {websocket.id} open>"


def test_frames_behind_the_request_are_not_lost() -> None:
    with websockets() as server, Peer(server.address, opened=False) as peer:
        peer.ask(request() + frame(TEXT, b"early") + frame(PING, b"p")[:3])
        peer.expect(TEXT, "early")
        peer.send(frame(PING, b"p")[3:])
        peer.expect(PONG, b"p")


def test_a_request_byte_by_byte() -> None:
    with websockets() as server, Peer(server.address, opened=False) as peer:
        for byte in request():
            peer.sock.sendall(bytes([byte]))
        peer.answer()
        assert peer.status == 101


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request(method="POST"), 405),
        (b"GET / HTTP/1.1\r\nHost: test\r\n\r\n", 426),
        (request("/", "Upgrade: h2c"), 426),
        (request("/", "Connection: keep-alive"), 426),
        (request("/", "Sec-WebSocket-Key:"), 400),
        (request("/", "Sec-WebSocket-Key: dG9vIHNob3J0"), 400),
        (request("/", "Sec-WebSocket-Key: ?"), 400),
        (request("/", "Sec-WebSocket-Version: 8"), 400),
        (request("/", "Sec-WebSocket-Version:"), 400),
        (request("/", "Host:"), 400),
        (request().replace(b"Host: test", b"Host: a\r\nHost: b"), 400),
        (request("/", "Content-Length: 5"), 400),
        (request("/", "Transfer-Encoding: chunked"), 400),
        (request("/", "bad header"), 400),
        (request("/", "Sec-WebSocket-Protocol: a b c"), 400),
        (b"hello there\r\n\r\n", 400),
        (b"\x16\x03\x01\0\r\n\r\n", 400),
        (request("/" + "x" * 9000), 414),
        (request("/", "X: " + "x" * 9000), 431),
        (request("/", *[f"X-{n}: y" for n in range(200)]), 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, 431),
    ],
)
def test_bad_requests_are_refused(head: bytes, status: int) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address, opened=False) as peer:
        peer.ask(head)
        assert peer.status in ((status,) if LIBRARY >= 17 else (status, 400)), "older ones know fewer"
        assert peer.header("Connection") == "close"
        length = int(peer.header("Content-Length") or "0")
        assert len(read_exactly(peer.sock, length)) == length
        assert ended(peer.sock) in ("eof", "reset")
        if status == 426:
            assert peer.header("Upgrade") == "websocket"
    assert first(kind).calls == []


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ("chat", "chat"),
        ("superchat", "superchat"),
        ("superchat, chat", "chat"),
        ("other", None),
        ("other,superchat", "superchat"),
    ],
)
def test_subprotocols(offered: str, chosen: str | None) -> None:
    kind = noted(subprotocols=("chat", "superchat"))
    header = f"Sec-WebSocket-Protocol: {offered}"
    with websockets(kind) as server, Peer(server.address, "/", header) as peer:
        assert peer.header("Sec-WebSocket-Protocol") == chosen
        first(kind).until("open")
        assert first(kind).subprotocol == chosen


def test_origins() -> None:
    with websockets(noted(origins=["https://good.example", None])) as server:
        for header, status in (
            ((), 101),
            (("Origin: https://good.example",), 101),
            (("Origin: https://bad.example",), 403),
            (("Origin: null",), 403),
        ):
            with Peer(server.address, opened=False) as peer:
                peer.ask(request("/", *header))
                assert peer.status == status, header


class Door(Noted):
    """Decides in on_handshake."""

    made: list[Any] = []  # noqa: RUF012

    def on_handshake(self, handshake: Handshake) -> None:
        if handshake.path == "/raise":
            raise ZeroDivisionError
        handshake.add_header("X-Door", "1")
        if handshake.header("authorization") != "Bearer secret":
            handshake.add_header("WWW-Authenticate", "Bearer")
            handshake.refuse(401, "who are you?")
        elif handshake.path == "/moved":
            handshake.add_header("Location", "/elsewhere")
            handshake.refuse(302)
        elif "b" in handshake.subprotocols:
            handshake.subprotocol = "b"


def test_on_handshake_decides() -> None:
    good = "Authorization: Bearer secret"
    with websockets(Door) as server:
        with Peer(server.address, "/", good, "Sec-WebSocket-Protocol: a, b") as peer:
            assert peer.header("X-Door") == "1"
            assert peer.header("Sec-WebSocket-Protocol") == "b"
        with Peer(server.address, opened=False) as peer:
            peer.ask(request("/"))
            assert (peer.status, peer.header("WWW-Authenticate")) == (401, "Bearer")
            assert read_all(peer.sock) == b"who are you?"
        with Peer(server.address, opened=False) as peer:
            peer.ask(request("/moved", good))
            assert (peer.status, peer.header("Location")) == (302, "/elsewhere")


def test_on_handshake_that_raises_refuses(expects_errors: Any) -> None:
    with websockets(Door) as server, Peer(server.address, opened=False) as peer:
        peer.ask(request("/raise"))
        assert peer.status == 500


def test_what_on_handshake_may_not_do() -> None:
    told: list[str] = []

    def on_handshake(self: Any, handshake: Handshake) -> None:
        for wrong in (
            lambda: handshake.add_header("bad name", "x"),
            lambda: handshake.add_header("X", "a\r\nb: c"),
            lambda: handshake.refuse(200),
            lambda: handshake.refuse(299),
            lambda: handshake.refuse(600),
        ):
            with pytest.raises(ValueError, match="=") as caught:
                wrong()
            told.append(str(caught.value))

    with websockets(noted(on_handshake=on_handshake)) as server, Peer(server.address):
        assert len(told) == 5


def test_a_slow_request_is_cut_off() -> None:
    kind = noted(open_timeout=0.3)
    stop = threading.Event()
    with websockets(kind) as server, Peer(server.address, opened=False) as peer:

        def drip() -> None:
            for byte in request():
                if stop.wait(0.05):
                    return
                try:
                    peer.sock.sendall(bytes([byte]))
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            peer.answer()
            assert peer.status == 408
        finally:
            stop.set()
            dripping.join()
        wait_until(lambda: server.stats().closed.get("deadline"))
    assert first(kind).calls == []


# -- messages ------------------------------------------------------------------------------------------------


def test_each_kind_of_message_has_its_type() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        peer.send(frame(TEXT, "grüß".encode()), frame(BINARY, b"\0\xff"), close(1000))
        assert [got.opcode for got in peer.frames()] == [TEXT, BINARY, CLOSE]
    websocket = first(kind)
    websocket.check()
    assert websocket.messages == ["grüß", b"\0\xff"]
    assert type(websocket.messages[1]) is bytes


@pytest.mark.parametrize("message", ["text", b"bytes", bytearray(b"more"), memoryview(b"view")])
def test_what_may_be_sent(message: Any) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        first(kind).until("open")
        assert first(kind).send(message) is True
        peer.expect(
            TEXT if isinstance(message, str) else BINARY, message if message == "text" else bytes(message)
        )


@pytest.mark.parametrize("message", [None, 1, ["x"], object()])
def test_what_may_not_be_sent(message: Any) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address):
        first(kind).until("open")
        with pytest.raises(TypeError, match="must be str or bytes-like"):
            first(kind).send(message)
        with pytest.raises(UnicodeEncodeError):
            first(kind).send("\ud800")


def test_messages_of_one_receive_are_answered_by_one_send(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = noted(collect_sends=True)
    sends: list[int] = []
    with websockets(kind) as server, Peer(server.address) as peer:
        first(kind).until("open")
        send = Connection.send
        monkeypatch.setattr(
            WebSocketConnection, "send", lambda self, data: sends.append(len(data)) or send(self, data)
        )
        peer.send(*[frame(TEXT, b"%d" % n) for n in range(50)])
        for n in range(50):
            peer.expect(TEXT, b"%d" % n)
        assert sum(sends) == sum(2 + len(b"%d" % n) for n in range(50))
        assert len(sends) < 10


def test_a_slow_callback_does_not_hold_back_what_it_sent() -> None:
    proceed = threading.Event()

    def got(self: Any, message: str) -> None:
        self.send(f"begun {message}")
        assert proceed.wait(PATIENCE)
        proceed.clear()
        self.send(f"done {message}")

    with websockets(noted(got=got)) as server, Peer(server.address) as peer:
        peer.send(frame(TEXT, b"1"), frame(TEXT, b"2"), frame(TEXT, b"3"))
        for n in (1, 2, 3):
            peer.expect(TEXT, f"begun {n}")
            proceed.set()
            peer.expect(TEXT, f"done {n}")


def test_fragments_piece_by_piece() -> None:
    pieces: list[tuple[Any, bool]] = []
    kind = noted(on_fragment=lambda self, data, last: pieces.append((data, last)))
    with websockets(kind) as server, Peer(server.address) as peer:
        peer.send(
            frame(TEXT, "grü".encode()[:3], False), frame(0, "grü".encode()[3:] + b"!", False), frame(0)
        )
        peer.send(frame(TEXT, b"whole"), frame(BINARY, b"1", False), frame(0, b"2"))
        peer.expect(TEXT, "whole")
        peer.send(close(1000))
        peer.frames()
    assert pieces == [("gr", False), ("ü!", False), ("", True), (b"1", False), (b"2", True)]
    assert first(kind).messages == ["whole"]


def test_pings() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        websocket.ping(b"a")
        websocket.ping()
        peer.expect(PING, b"a")
        peer.expect(PING, b"")
        peer.send(frame(PONG, b"a"), frame(PING, b"b"))
        peer.expect(PONG, b"b")
        websocket.until("ping")
        assert [call for call in websocket.calls if call[0] != "open"] == [("pong", b"a"), ("ping", b"b")]
        with pytest.raises(ValueError, match="at most 125 bytes"):
            websocket.ping(b"x" * 126)


def test_send_from_many_threads_keeps_frames_whole_and_in_order() -> None:
    kind = noted(echo=False, compression=Deflate(threshold=300, takeover=True))
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")

        def talk(who: int) -> None:
            for n in range(100):
                websocket.send(f"{who} {n} {'x' * (n * 7 % 500)}")

        threads = [threading.Thread(target=talk, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        seen = [0] * 4
        for _ in range(400):
            got = peer.get()
            assert got is not None
            who, n, rest = got.data.decode().split(" ")
            assert (int(n), rest) == (seen[int(who)], "x" * (int(n) * 7 % 500))
            seen[int(who)] += 1
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("where", ["on_open", "got", "on_ping", "on_close"])
def test_a_callback_that_raises_closes_its_own_with_1011(where: str, expects_errors: Any) -> None:
    def bad(self: Any, *args: Any) -> None:
        raise ZeroDivisionError(where)

    kind = noted()
    with websockets(kind) as server, Peer(server.address) as other:
        first(kind).until("open")
        kind.made.clear()
        setattr(kind, where, bad)
        with Peer(server.address) as peer:
            peer.send(frame(PING), frame(TEXT, b"x"), *[close(1000)] * (where == "on_close"))
            frames = [got for got in peer.frames() if got.opcode != PONG]
        wanted = 1000 if where == "on_close" else 1011
        assert frames[-1].code == wanted
        wait_until(lambda: len(server.websockets) == 1)
        if where != "on_close":
            assert first(kind).until("close")[1] == 1011
            delattr(kind, where)
            other.text("still here")
            other.expect(TEXT, "still here")
        delattr(kind, where) if where in vars(kind) else None


def test_reading_can_be_paused() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        websocket.pause_reading()
        peer.text("waits")
        time.sleep(0.2)
        peer.text("waits, too")
        assert websocket.messages == []
        websocket.resume_reading()
        peer.expect(TEXT, "waits")
        peer.expect(TEXT, "waits, too")


# -- the end -------------------------------------------------------------------------------------------------


def test_the_peer_closes() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        peer.send(close(4000, b"enough"))
        assert peer.frames() == [Frame(CLOSE, b"\x0f\xa0enough")]
        assert first(kind).until("close") == ("close", 4000, "enough")
        assert (first(kind).close_code, first(kind).close_reason) == (4000, "enough")
    first(kind).check()


def test_the_peer_closes_without_a_code() -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        peer.send(close())
        assert peer.frames() == [Frame(CLOSE, b"")]
        assert first(kind).until("close") == ("close", 1005, "")


@pytest.mark.parametrize("code", [1000, 3000, None])
def test_we_close(code: int | None) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        websocket.send("last words")
        websocket.close(code, "done" if code else "")
        websocket.close(1001)
        with pytest.raises(ConnectionClosedError):
            websocket.send("too late")
        with pytest.raises(ConnectionClosedError):
            websocket.ping()
        peer.expect(TEXT, "last words")
        got = peer.get()
        assert got is not None
        assert got.code == code
        peer.send(frame(TEXT, b"nobody listens"), frame(CLOSE, got.data))
        assert websocket.until("close")[1] == (code or 1005)
        assert peer.get() is None
    websocket.check()
    assert websocket.messages == []


@pytest.mark.parametrize(
    ("code", "reason", "told"),
    [
        (1005, "", "code=1005"),
        (999, "", "code=999"),
        (5000, "", "code=5000"),
        (1000, "x" * 124, "at most 123 bytes"),
        (None, "why", "needs a code"),
    ],
)
def test_what_close_refuses(code: int | None, reason: str, told: str) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        first(kind).until("open")
        with pytest.raises(ValueError, match=told):
            first(kind).close(code, reason)
        peer.text("still open")
        peer.expect(TEXT, "still open")


def test_a_peer_that_does_not_answer_our_close_is_cut_off() -> None:
    kind = noted(close_timeout=0.3)
    with websockets(kind) as server, Peer(server.address) as peer:
        first(kind).until("open")
        first(kind).close()
        assert first(kind).until("close")[1] == 1006
        assert [got.code for got in peer.frames()] == [1000]
    first(kind).check()


@pytest.mark.parametrize("how", ["fin", "half", "rst", "abort", "in a frame"])
def test_an_end_without_a_close_is_1006_at_once(how: str) -> None:
    kind = noted()
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        if how == "fin":
            peer.sock.close()
        elif how == "half":
            peer.sock.shutdown(socket.SHUT_WR)
        elif how == "rst":
            rst(peer.sock)
        elif how == "abort":
            websocket.abort()
        else:
            peer.send(frame(TEXT, b"x" * 100)[:50])
            peer.sock.close()
        assert websocket.until("close")[1] == 1006
        wait_until(lambda: not server.stats().connections)
    websocket.check()


def test_on_close_comes_once_whoever_ends_it_and_when() -> None:
    """Closing from both sides, from threads, by reset: in all orders."""
    for round in range(30):
        kind = noted(close_timeout=0.5)
        with websockets(kind) as server, Peer(server.address) as peer:
            websocket = first(kind)
            websocket.until("open")
            ways = [
                websocket.close,
                websocket.abort,
                lambda: peer.send(close(1000)),
                lambda: rst(peer.sock),
                lambda: peer.send(frame(7)),
            ]
            chosen = [ways[(round + n * 2) % 5] for n in range(1 + round % 3)]
            threads = [threading.Thread(target=quietly, args=(way,)) for way in chosen]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            websocket.until("close")
        websocket.check()


def quietly(function: Any) -> None:
    try:
        function()
    except OSError:
        pass


# -- heartbeat -----------------------------------------------------------------------------------------------


def test_the_heartbeat_is_on_unless_it_is_switched_off() -> None:
    assert (WebSocket.ping_interval, WebSocket.ping_timeout, WebSocket.ping_when) == (20.0, 20.0, "always")


def test_a_peer_that_answers_lives_and_its_latency_is_known() -> None:
    kind = noted(ping_interval=0.2, ping_timeout=PATIENCE)
    with websockets(kind) as server, Peer(server.address) as peer:
        for n in (1, 2, 3):
            got = peer.get()
            assert got == Frame(PING, b"%d" % n)
            peer.send(frame(PONG, got.data))
        wait_until(lambda: first(kind).names.count("pong") == 3)
        assert 0 <= first(kind).latency < PATIENCE
        peer.text("x")
        while (got := peer.get()) is not None and got.opcode == PING:
            peer.send(frame(PONG, got.data))
        assert got == Frame(TEXT, b"x")


def test_a_peer_that_is_gone_is_reset_after_interval_and_timeout() -> None:
    kind = noted(ping_interval=0.4, ping_timeout=0.4)
    began = time.monotonic()
    with websockets(kind) as server, Peer(server.address) as peer:
        assert peer.get() == Frame(PING, b"1")
        code, reason = first(kind).until("close")[1:]
        assert (code, reason) == (1006, "nothing came for 0.4 s after a ping")
        assert time.monotonic() - began >= 0.7, "it was not waited for"
        assert peer.frames() == []
    first(kind).check()


def test_a_peer_that_answers_slowly_but_sends_is_not_gone() -> None:
    """A frame that takes long keeps its pong back; its bytes say that somebody is there."""
    kind = noted(ping_interval=0.3, ping_timeout=5.0)
    data = frame(TEXT, b"x" * 20)
    with websockets(kind) as server, Peer(server.address) as peer:
        for byte in data:
            peer.send(bytes([byte]))
            time.sleep(0.25)
        got = [peer.get() for _ in range(2)]
        assert got[0] == Frame(PING, b"1")
        peer.send(frame(PONG, b"1"))
        assert Frame(TEXT, b"x" * 20) in got


def test_quiet_asks_only_who_says_nothing() -> None:
    kind = noted(ping_interval=5.0, ping_timeout=10.0, ping_when="quiet", echo=False)
    with websockets(kind) as server, Peer(server.address) as peer:
        for _ in range(60):
            peer.text("x")
            time.sleep(0.1)
        assert first(kind)._pings == 0
        assert peer.get() == Frame(PING, b"1")


def test_no_answer_is_waited_for_without_a_timeout() -> None:
    kind = noted(ping_interval=0.1, ping_timeout=None)
    with websockets(kind) as server, Peer(server.address) as peer:
        for n in (1, 2, 3, 4):
            assert peer.get() == Frame(PING, b"%d" % n)


def test_who_is_not_read_from_is_not_judged() -> None:
    kind = noted(ping_interval=0.1, ping_timeout=5.0)
    with websockets(kind) as server, Peer(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        assert peer.get() == Frame(PING, b"1")  # which is not answered yet
        websocket.pause_reading()
        time.sleep(5.5)
        assert websocket.open
        websocket.resume_reading()
        peer.send(frame(PONG, b"1"))
        wait_until(lambda: websocket.latency is not None)


# -- slow readers --------------------------------------------------------------------------------------------


def fill(websocket: Any, message: bytes, most: int = 40_000_000) -> int:
    """Send until something waits, and the system takes no more of it; how many were sent."""
    sent = quiet = 0
    while quiet < 250:
        if websocket._full:
            quiet += 1
            time.sleep(0.01)
        else:
            quiet = 0
            websocket.send(message)
            sent += len(message)
            assert sent < most, "no system keeps so much for a socket"
    return sent // len(message)


def test_control_frames_go_before_data_that_waits() -> None:
    kind = noted(queue_max=4 << 20, echo=False)
    with websockets(kind, high_mark=1 << 16) as server, small_buffers(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        block = bytes(50_000)
        waiting = False
        while not waiting:
            fill(websocket, block)
            with websocket._lock:  # on_drain needs it
                if waiting := websocket._full:
                    for n in range(20):
                        websocket.send(b"%d" % n + block)
                    websocket.ping(b"first")
        frames = []
        while len(frames) < 2 or frames[-1].data != b"19" + block:
            got = peer.get()
            assert got is not None
            frames.append(got)
        assert frames.index(Frame(PING, b"first")) < frames.index(Frame(BINARY, b"0" + block))
        numbered = [got.data[: -len(block)] for got in frames if len(got.data) > len(block)]
        assert numbered == [b"%d" % n for n in range(20)], "in order"
        websocket.until("drain")


@pytest.mark.parametrize("policy", ["close", "drop", "wait"])
def test_slow_readers(policy: str) -> None:
    kind = noted(queue_max=100_000, slow_reader=policy, slow_timeout=1.0, echo=False)
    with websockets(kind, high_mark=1 << 16) as server, small_buffers(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        with Peer(server.address) as quick:
            wait_until(lambda: len(server.websockets) == 2)
            block = bytes(20_000)
            filled = fill(websocket, block)
            if policy == "wait":
                assert websocket.until("close")[1:] == (
                    1008,
                    "the peer reads too slowly: it caught up with nothing for 1 s",
                )
                assert server.broadcast(block) == 1
                quick.expect(BINARY, block)
                return
            took = []
            for _ in range(10):
                took.append(server.broadcast(block))
                quick.expect(BINARY, block)
            assert took[:3] == [2, 2, 2], "so much may wait"
            assert took[-1] == 1
            if policy == "close":
                code, reason = websocket.until("close")[1:]
                assert (code, reason) == (
                    1008,
                    "the peer reads too slowly: more than 100000 bytes wait for it",
                )
                assert websocket.write_buffer_size <= 100_000 + (1 << 18)
            else:
                assert websocket.dropped == took.count(1) > 0
                assert websocket.open
                for _ in range(filled + took.count(2)):
                    assert peer.get() == Frame(BINARY, block)
                wait_until(lambda: not websocket.write_buffer_size)
                assert server.broadcast(b"again") == 2


def test_send_never_drops_but_closes() -> None:
    kind = noted(queue_max=100_000, slow_reader="drop", echo=False)
    with websockets(kind, high_mark=1 << 16) as server, small_buffers(server.address):
        websocket = first(kind)
        websocket.until("open")
        block = bytes(20_000)
        fill(websocket, block)
        with contextlib.suppress(ConnectionClosedError):
            for _ in range(30):
                websocket.send(block)
        assert websocket.until("close")[1] == 1008
        assert websocket.dropped == 0


def test_pings_of_a_peer_that_does_not_read_do_not_pile_up() -> None:
    kind = noted(echo=False)
    with websockets(kind, high_mark=1 << 16) as server, small_buffers(server.address) as peer:
        websocket = first(kind)
        websocket.until("open")
        fill(websocket, bytes(50_000))
        before = websocket.write_buffer_size
        for n in range(3000):
            peer.send(frame(PING, b"%120d" % n))
        websocket.until("ping", 3000)
        assert websocket.write_buffer_size <= before + 65536
        while (got := peer.get()) is not None and got.opcode != PONG:
            pass
        pongs = [got]
        peer.send(frame(PING, b"end"))
        while pongs[-1] != Frame(PONG, b"end"):
            got = peer.get()
            if got is None or got.opcode == PONG:
                pongs.append(got)
        assert Frame(PONG, b"%120d" % 2999) in pongs


# -- the server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [40])
def test_a_stop_tells_every_client_1001(clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("iocp_ctypes.server.ABORT_TIMEOUT", PATIENCE)
    kind = noted()
    peers = []
    with websockets(kind) as server:
        peers = [Peer(server.address) for _ in range(clients)]
        wait_until(lambda: len(server.websockets) == clients)
        for peer in peers[::2]:
            peer.text("busy")
        talking = [threading.Thread(target=answer_close, args=(peer,)) for peer in peers[:-3]]
        for thread in talking:
            thread.start()
        assert server.stop(5) is True
        for thread in talking:
            thread.join()
    for peer in peers[-3:]:  # those that did not answer
        assert any(got.opcode == CLOSE and got.code == 1001 for got in peer.frames())
    for peer in peers:
        peer.sock.close()
        if peer not in peers[-3:]:
            assert peer.closed == 1001  # type: ignore[attr-defined]
    for websocket in kind.made:
        websocket.check()
        assert websocket.close_code in (1001, 1006)


def answer_close(peer: Any) -> None:
    peer.closed = None
    with contextlib.suppress(ConnectionError):
        while (got := peer.get()) is not None:
            if got.opcode == CLOSE:
                peer.closed = got.code
                peer.send(frame(CLOSE, got.data))
    peer.sock.close()  # else closing lingers


def test_a_stop_while_a_client_opens() -> None:
    kind = noted()
    with websockets(kind) as server, raw(server.address) as sock:
        wait_until(lambda: kind.made)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert ended(sock) == "eof"
        sock.close()
        stopping.join()
    assert first(kind).calls == []


def test_a_plain_server_will_do() -> None:
    kind = noted()
    for handler in (kind.serve, type("Mine", (WebSocketConnection,), {"handler": kind, "__slots__": ()})):
        with Server(LOOPBACK, handler) as server, Peer(server.address) as peer:
            peer.text("x")
            peer.expect(TEXT, "x")


def test_idle_timeout_says_goodbye() -> None:
    kind = noted()
    with websockets(kind, idle_timeout=5.0) as server, Peer(server.address) as peer:
        got = peer.get()
        assert got == Frame(CLOSE, b"\x03\xe9idle")
        peer.send(frame(CLOSE, got.data))
        assert first(kind).until("close")[1] == 1001


def test_work_threads() -> None:
    kind = noted()
    threads: set[int] = set()
    kind.got = lambda self, message: (threads.add(threading.get_ident()), self.send(message))
    with websockets(kind, work_threads=2) as server, Peer(server.address) as peer:
        for n in range(20):
            peer.text(str(n))
            peer.expect(TEXT, str(n))
    assert len(threads) == 1


class _Request:
    """What HTTP hands over."""

    def __init__(self, head: bytes) -> None:
        first, *lines = head.decode().split("\r\n")[:-2]
        self.method, self.target, version = first.split(" ")
        self.http_version = version.partition("/")[2]
        pairs = (line.partition(": ") for line in lines)
        self.headers = [(name.lower().encode(), value.encode()) for name, _, value in pairs]


class Front(Connection):
    """Hands its connection over as HTTP does."""

    handler: Any = None
    taken: Any = None
    head = b""

    def on_data(self, data: bytes) -> None:
        if self.taken is not None:
            self.taken.on_data(data)
            return
        self.head += data
        head, end, rest = self.head.partition(b"\r\n\r\n")
        if end:
            self.taken = self.handler.upgrade(self, _Request(head + end), rest)

    def on_eof(self) -> bool | None:
        return self.taken.on_eof() if self.taken else None

    def on_drain(self) -> None:
        self.taken.on_drain()

    def on_timeout(self, kind: str) -> bool | None:
        return self.taken.on_timeout(kind) if self.taken else None

    def on_shutdown(self) -> None:
        if self.taken:
            self.taken.on_shutdown()
        else:
            self.close()

    def on_close(self, exc: OSError | None) -> None:
        if self.taken:
            self.taken.on_close(exc)


def test_the_upgrade_of_a_connection_that_spoke_http() -> None:
    kind = noted(ping_interval=0.2, subprotocols=("chat",))
    assert kind.upgrades == "websocket"
    front = type("Mine", (Front,), {"handler": kind})
    with Server(LOOPBACK, front) as server:
        with Peer(server.address, opened=False) as peer:
            peer.ask(request("/a?b", "Sec-WebSocket-Protocol: chat") + frame(TEXT, b"rest"))
            assert (peer.status, peer.header("Sec-WebSocket-Protocol")) == (101, "chat")
            peer.expect(TEXT, "rest")
            assert peer.get() == Frame(PING, b"1")
            peer.send(frame(PONG, b"1"), close(1000))
            while (got := peer.get()) is not None and got.opcode == PING:
                pass
            assert got is not None
            assert got.code == 1000
        first(kind).until("close")
        first(kind).check()
        assert first(kind).handshake.path == "/a"
        with Peer(server.address, opened=False) as peer:
            peer.ask(request("/", "Sec-WebSocket-Version: 7"))
            assert peer.status == 400
            assert len(read_all(peer.sock)) > 10
        with Peer(server.address) as peer:
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            answer_close(peer)
            stopping.join()
            assert peer.closed == 1001  # type: ignore[attr-defined]


# -- options and importing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("message_max", 0, ValueError),
        ("message_max", "1 MiB", TypeError),
        ("fragments_max", 0, ValueError),
        ("queue_max", 1, ValueError),
        ("slow_reader", "wait a bit", ValueError),
        ("slow_timeout", None, TypeError),
        ("ping_interval", 0, ValueError),
        ("ping_timeout", "20", TypeError),
        ("ping_when", "never", ValueError),
        ("open_timeout", -1, ValueError),
        ("close_timeout", None, TypeError),
        ("subprotocols", "chat", TypeError),
        ("subprotocols", ["a chat"], ValueError),
        ("subprotocols", [b"chat"], TypeError),
        ("origins", "https://example.org", TypeError),
        ("origins", [1], TypeError),
        ("compression", True, TypeError),
    ],
)
def test_wrong_options_are_told_where_the_class_is_made(
    option: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=option):
        type("Wrong", (WebSocket,), {option: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("threshold", -1, ValueError),
        ("level", 0, ValueError),
        ("memory_level", 10, ValueError),
        ("window_bits", 8, ValueError),
        ("window_bits", 16, ValueError),
        ("peer_window_bits", 7, ValueError),
        ("takeover", 1, TypeError),
    ],
)
def test_wrong_compression(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{name}={value!r}"):
        Deflate(**{name: value})


@pytest.mark.parametrize(
    "handler", [None, Connection, WebSocketConnection, "Chat", lambda server, peer: None]
)
def test_wrong_handlers(handler: Any) -> None:
    with pytest.raises(TypeError, match="must be a subclass of WebSocket"):
        WebSocketServer(LOOPBACK, handler)


def test_without_the_library_importing_says_what_is_missing() -> None:
    program = """
import sys
sys.modules["websockets"] = None
try:
    import iocp_ctypes.websocket
except ImportError as exc:
    print(exc)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).resolve().parent.parent.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert "pip install iocp-ctypes[websocket]" in done.stdout, done.stdout


def test_no_two_have_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a GIL, where threads make them in parallel."""

    class Slow:
        last = 0

        def __next__(self) -> int:
            number = self.last + 1
            time.sleep(0.001)  # others may come in between
            self.last = number
            return number

    monkeypatch.setattr(_outgoing, "_numbers", Slow())
    ids: list[int] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(WebSocket(None).id for _ in range(10))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ids) == [*range(1, 41)]


def test_a_websocket_that_has_ended_is_let_go() -> None:
    import gc
    import weakref

    kind = noted(made=[])
    with websockets(kind) as server:
        with Peer(server.address) as peer:
            first(kind).until("open")
            gone = weakref.ref(kind.made.pop())
            peer.send(close(1000))
            peer.frames()
        wait_until(lambda: not server.stats().connections)
        wait_until(lambda: (gc.collect(), gone())[1] is None, what="it is let go")

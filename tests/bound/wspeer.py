"""A WebSocket client made of a plain socket, that may do everything wrong; and WebSockets that record."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from support import LOOPBACK, PATIENCE, raw, read_exactly, wait_until

from iocp_ctypes.websocket import WebSocket, WebSocketServer

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="  # RFC 6455, section 1.3
MASK = b"\x37\xfa\x21\x3d"


def masked(data: bytes) -> bytes:
    return bytes(byte ^ MASK[place % 4] for place, byte in enumerate(data))


def frame(opcode: int, data: bytes = b"", fin: bool = True, rsv: int = 0, mask: bool = True) -> bytes:
    """Write a frame; `rsv`: the three reserved bits, 4 is the first of them."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    size, bit = len(data), mask << 7
    if size < 126:
        head += bytes([bit | size])
    elif size < 1 << 16:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    if not mask:
        return head + data
    if len(data) > 4096:  # the slow way would take its time
        return head + bytes(4) + data
    return head + MASK + masked(data)


def close(code: int | None = None, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack(">H", code) + reason)


class Frame(NamedTuple):
    """One that came."""

    opcode: int
    data: bytes
    fin: bool = True
    rsv: int = 0

    @property
    def code(self) -> int | None:
        """The code of a Close."""
        assert self.opcode == CLOSE, self
        return struct.unpack(">H", self.data[:2])[0] if self.data else None


def request(path: str = "/", *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    """Write a request to open; a header given here replaces the usual one of its name."""
    lines = {"host": "Host: test", "upgrade": "Upgrade: websocket", "connection": "Connection: Upgrade"}
    lines["sec-websocket-key"] = f"Sec-WebSocket-Key: {KEY}"
    lines["sec-websocket-version"] = "Sec-WebSocket-Version: 13"
    more = []
    for header in headers:
        name = header.partition(":")[0].lower()
        if name in lines:
            lines[name] = header
        else:
            more.append(header)
    kept = [line for line in lines.values() if not line.endswith(":")]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *kept, *more, "", ""]).encode("latin-1")


class Peer:
    """A client; opened, unless it is told not to."""

    def __init__(self, address: Any, path: str = "/", *headers: str, opened: bool = True) -> None:
        self.sock = raw(address)
        self.status = 0
        self.head = ""
        if opened:
            self.ask(request(path, *headers))
            assert self.status == 101, self.head

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def ask(self, head: bytes) -> None:
        """Send a request and read the head of the answer."""
        self.sock.sendall(head)
        self.answer()

    def answer(self) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self.sock.recv(1)
            assert byte, f"the end came after {head!r}"
            head += byte
        self.head = head.decode("latin-1")
        self.status = int(self.head.split(" ")[1])

    def header(self, name: str) -> str | None:
        """A header of the answer."""
        for line in self.head.split("\r\n")[1:]:
            key, _, value = line.partition(": ")
            if key.lower() == name.lower():
                return value
        return None

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def text(self, text: str) -> None:
        self.send(frame(TEXT, text.encode()))

    def get(self) -> Frame | None:
        """Read a frame; None at the end."""
        head = read_exactly(self.sock, 2)
        if len(head) < 2:
            return None
        assert not head[1] & 0x80, "a server masked"
        size = head[1]
        if size == 126:
            (size,) = struct.unpack(">H", read_exactly(self.sock, 2))
        elif size == 127:
            (size,) = struct.unpack(">Q", read_exactly(self.sock, 8))
        data = read_exactly(self.sock, size)
        assert len(data) == size
        return Frame(head[0] & 15, data, bool(head[0] & 0x80), head[0] >> 4 & 7)

    def frames(self) -> list[Frame]:
        """Read to the end."""
        found = []
        with contextlib.suppress(ConnectionResetError, ConnectionAbortedError):
            while (got := self.get()) is not None:
                found.append(got)
        return found

    def expect(self, opcode: int, data: bytes | str) -> None:
        """The next frame must be this message."""
        wanted = data.encode() if isinstance(data, str) else data
        assert self.get() == Frame(opcode, wanted)


class Noted(WebSocket):
    """Records its callbacks, and that they do not overlap; sends messages back. Make one by `noted()`."""

    made: list[Any] = []  # noqa: RUF012
    echo = True
    ping_interval = None

    def __init__(self, connection: Any) -> None:
        super().__init__(connection)
        self.calls: list[tuple[Any, ...]] = []
        self.overlaps = 0
        self._running = threading.Lock()
        self.made.append(self)

    @contextlib.contextmanager
    def note(self, *call: Any) -> Iterator[None]:
        alone = self._running.acquire(False)
        self.overlaps += not alone
        self.calls.append(call)
        try:
            yield
        finally:
            if alone:
                self._running.release()

    def on_open(self) -> None:
        with self.note("open"):
            self.opened()

    def on_message(self, message: Any) -> None:
        with self.note("message", message):
            self.got(message)

    def on_ping(self, data: bytes) -> None:
        with self.note("ping", data):
            pass

    def on_pong(self, data: bytes) -> None:
        with self.note("pong", data):
            pass

    def on_drain(self) -> None:
        with self.note("drain"):
            pass

    def on_close(self, code: int, reason: str) -> None:
        with self.note("close", code, reason):
            self.gone()

    def opened(self) -> None: ...
    def got(self, message: Any) -> None:
        if self.echo:
            self.send(message)

    def gone(self) -> None: ...

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]

    @property
    def messages(self) -> list[Any]:
        return [call[1] for call in self.calls if call[0] == "message"]

    def until(self, name: str, count: int = 1) -> tuple[Any, ...]:
        """Wait for the `count`th callback of a name and return it."""
        wait_until(lambda: self.names.count(name) >= count, what=f"on_{name} number {count}")
        return [call for call in self.calls if call[0] == name][count - 1]

    def check(self) -> None:
        """Assert what holds for every WebSocket that has ended."""
        assert self.overlaps == 0
        assert self.names[0] == "open"
        assert self.names.count("open") == self.names.count("close") == 1, self.names
        assert self.names[-1] == "close", self.names


def noted(**options: Any) -> Any:
    """Make a class of Noted with these options, and an empty list of those made."""
    return type("Fresh", (Noted,), {"made": [], **options})


@contextlib.contextmanager
def websockets(kind: Any = None, stop_timeout: float = 5.0, **options: Any) -> Iterator[Any]:
    """Run a server for a `with` block; it must stop well, unless the block raised."""
    server = WebSocketServer(LOOPBACK, kind or noted(), **options)
    server.start()
    try:
        yield server
    except BaseException:
        server.stop(0.2)
        raise
    assert server.stop(stop_timeout) is True
    assert server.websockets == []


def first(kind: Any) -> Any:
    """Wait until a WebSocket of a class was made, and return it."""
    return wait_until(lambda: kind.made)[0]


def small_buffers(address: Any) -> Peer:
    """Open a client for which the system keeps little: it lets others feel that it does not read."""
    peer = Peer.__new__(Peer)
    peer.sock = socket.socket()
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.sock.settimeout(PATIENCE)
    peer.sock.connect(address)
    peer.ask(request())
    assert peer.status == 101
    return peer

"""Helpers of the tests that run on Windows: plain clients, waiting, servers that end well, a recorder."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from iocp_ctypes import Connection, Server, _win32

#: Seconds for what should happen at once; only a failing test waits so long.
PATIENCE = 10.0
#: A host of this run alone: another run may take a port of 127.0.0.1 as soon as it is free.
OWN_HOST = "127." + ".".join(str(1 + byte % 254) for byte in os.urandom(3))
#: `io_threads` of every server that names none; the whole suite passes with 1 and with 4.
BACKLOG = 8  # of most servers in tests
IO_THREADS = int(os.environ.get("IOCP_CTYPES_TEST_IO_THREADS", "0"))
LOOPBACK = ("127.0.0.1", 0)


def raw(address: Any, timeout: float = PATIENCE) -> socket.socket:
    """Connect a plain client socket; (host, port) or a four-part IPv6 address."""
    return socket.create_connection(tuple(address[:2]), timeout=timeout)


def rst(sock: socket.socket) -> None:
    """Close so that the peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH", 1, 0))
    sock.close()


def wait_until(predicate: Callable[[], Any], timeout: float = PATIENCE, what: str = "") -> Any:
    """Wait until `predicate` returns something true, and return that; AssertionError after `timeout` s."""
    deadline = time.monotonic() + timeout
    while True:
        late = time.monotonic() > deadline  # before it is asked: this thread may be held up in between
        if value := predicate():
            return value
        if late:
            raise AssertionError(f"{what or 'what was waited for'}: still {value!r} after {timeout:g} s")
        time.sleep(0.005)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Read `count` bytes; fewer where the peer ended before."""
    parts: list[bytes] = []
    while count and (part := sock.recv(min(count, 1 << 16))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_all(sock: socket.socket) -> bytes:
    """Read up to the peer's EOF."""
    return read_exactly(sock, 1 << 62)


def ended(sock: socket.socket) -> str:
    """Wait for the peer's end: "eof" or "reset"; bytes before it are an AssertionError.

    Under Wine receiving says EOF after a reset too, and only sending tells: a byte goes to who still reads.
    """
    try:
        data = sock.recv(1)
        assert data == b"", f"{data!r} came where the end was expected"
        if _win32.is_wine():
            sock.send(b"?")
    except (ConnectionResetError, ConnectionAbortedError):
        return "reset"
    return "eof"


def handle_count() -> int:
    """How many kernel handles this process has."""
    gc.collect()
    if _win32.is_wine():
        return _handles_under_wine()
    count = _win32.DWORD()
    assert _win32.GetProcessHandleCount(_win32.GetCurrentProcess(), ctypes.byref(count))
    return int(count.value)


def _handles_under_wine() -> int:
    """Count them in the list of all handles of the system: Wine's GetProcessHandleCount says 0.

    NtQuerySystemInformation(SystemExtendedHandleInformation): a count, a reserved word, then entries of five
    words on 64-bit Windows, of which the second is the process.
    """
    query = ctypes.WinDLL("ntdll").NtQuerySystemInformation
    size = 1 << 18
    while query(64, buffer := ctypes.create_string_buffer(size), size, ctypes.byref(ctypes.c_ulong())):
        size *= 2
        assert size < 1 << 28
    words = memoryview(buffer).cast("B").cast("Q")
    return words[3 : 2 + 5 * words[0] : 5].tolist().count(os.getpid())


class Call(NamedTuple):
    """One callback: its name, its argument, the thread it came on."""

    name: str
    value: Any
    thread: int


class Recorder(Connection):
    """Records its callbacks. `made` lists the instances of a class, oldest first; emptied for each test."""

    made: list[Any] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.made = []

    def __init__(self, server: Any = None, peer_address: Any = None) -> None:
        super().__init__(server, peer_address)
        self.calls: list[Call] = []
        self.overlaps = 0
        self._running = threading.Lock()
        type(self).made.append(self)

    @contextlib.contextmanager
    def record(self, name: str, value: Any = None) -> Iterator[None]:
        """Note a callback for as long as it runs."""
        alone = self._running.acquire(False)
        self.overlaps += not alone
        self.calls.append(Call(name, value, threading.get_ident()))
        try:
            yield
        finally:
            if alone:
                self._running.release()

    def on_connect(self) -> None:
        with self.record("connect"):
            self.connected()

    def on_data(self, data: bytes) -> None:
        with self.record("data", data):
            self.got(data)

    def on_eof(self) -> bool | None:
        with self.record("eof"):
            return self.ended()

    def on_drain(self) -> None:
        with self.record("drain"):
            self.drained()

    def on_timeout(self, kind: str) -> bool | None:
        with self.record("timeout", kind):
            return self.timed_out(kind)

    def on_close(self, exc: OSError | None) -> None:
        with self.record("close", exc):
            self.gone(exc)

    # What a test overrides: its part of a callback, recorded around.
    def connected(self) -> None: ...
    def got(self, data: bytes) -> None: ...
    def ended(self) -> bool | None: ...
    def drained(self) -> None: ...
    def timed_out(self, kind: str) -> bool | None: ...
    def gone(self, exc: OSError | None) -> None: ...

    @property
    def names(self) -> list[str]:
        """The names of the callbacks so far."""
        return [call.name for call in self.calls]

    @property
    def received(self) -> bytes:
        """All bytes of on_data so far."""
        return b"".join(call.value for call in self.calls if call.name == "data")

    @property
    def threads(self) -> set[int]:
        """The threads on which callbacks came."""
        return {call.thread for call in self.calls}

    def until(self, name: str, count: int = 1) -> Call:
        """Wait for the `count`th callback of a name and return it."""
        wait_until(lambda: self.names.count(name) >= count, what=f"on_{name} number {count}")
        return [call for call in self.calls if call.name == name][count - 1]

    def check(self) -> None:
        """Assert what holds for every connection that has ended."""
        names = self.names
        assert self.overlaps == 0, f"callbacks overlapped: {names}"
        assert names[0] == "connect", names
        assert names.count("connect") == names.count("close") == 1, names
        assert names[-1] == "close", names
        assert names.count("eof") <= 1, names
        assert self.closed


def forget(kind: type[Recorder] = Recorder) -> None:
    """Empty `made` of all recorders: a connection that is kept keeps its locks, which are kernel handles."""
    kind.made.clear()
    for sub in kind.__subclasses__():
        forget(sub)


class Echo(Recorder):
    """Sends back what comes; a peer that does not read is not read from."""

    def got(self, data: bytes) -> None:
        if not self.send(data):
            self.pause_reading()

    def drained(self) -> None:
        self.resume_reading()


@contextlib.contextmanager
def serving(
    handler: Any = Echo,
    address: Any = LOOPBACK,
    *,
    server: type[Server] = Server,
    stop_timeout: float = PATIENCE,
    **options: Any,
) -> Iterator[Any]:
    """Run a server for a `with` block; it must stop well, unless the block raised.

    With a small pool of AcceptEx: to fill and to empty one of 64 takes longer than most tests.
    """
    options.setdefault("backlog", BACKLOG)
    if "engine" not in options:
        options.setdefault("io_threads", IO_THREADS)
    running = server(address, handler, **options)
    running.start()
    try:
        yield running
    except BaseException:
        running.stop(0.2)
        raise
    assert running.stop(stop_timeout) is True, f"stop({stop_timeout:g}) did not end all"
    assert running.connections == []


def serve_beside(server: Server) -> tuple[threading.Thread, list[BaseException]]:
    """Run serve_forever on a thread; returns that, and a list that gets what serve_forever raises."""
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve_forever()
        except BaseException as exc:
            raised.append(exc)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, raised


def made(handler: type[Recorder], count: int = 1) -> list[Any]:
    """Wait until `count` connections of a class were made, and return all of them."""

    def attached() -> list[Any]:  # one is listed before it has its socket; this is the last that _attach sets
        return [one for one in list(handler.made) if hasattr(one, "_pause_asked")]

    wait_until(lambda: len(attached()) >= count, what=f"{count} connections of {handler.__name__}")
    return attached()


def echoes(sock: socket.socket, data: bytes = b"hello") -> None:
    """Assert that what is sent comes back."""
    sock.sendall(data)
    assert read_exactly(sock, len(data)) == data


def reachable(address: Any, data: bytes = b"hello") -> None:
    """Assert that an echo server serves a new client."""
    with raw(address) as client:
        echoes(client, data)

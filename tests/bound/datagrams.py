"""A Datagram that records its callbacks, and plain sockets to talk to it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from support import IO_THREADS, LOOPBACK, OWN_HOST, PATIENCE, wait_until

from iocp_ctypes import Datagram


class Probe(Datagram):
    """Records what it is called with; `got` is overridden by tests."""

    def __init__(self, address: Any = LOOPBACK, **options: Any) -> None:
        if "engine" not in options:
            options.setdefault("io_threads", IO_THREADS)
        self.calls: list[tuple[str, Any]] = []
        self.senders: list[Any] = []
        self.raised: list[BaseException] = []
        self.overlaps = 0
        self._running = threading.Lock()
        super().__init__(address, **options)

    @contextlib.contextmanager
    def record(self, name: str, value: Any = None) -> Iterator[None]:
        alone = self._running.acquire(False)
        self.overlaps += not alone
        self.calls.append((name, value))
        try:
            yield
        finally:
            if alone:
                self._running.release()

    def on_datagram(self, data: bytes, address: Any) -> None:
        with self.record("datagram", data):
            self.senders.append(address)
            self.got(data, address)

    def on_oversize(self, data: bytes, address: Any) -> None:
        with self.record("oversize", data):
            self.senders.append(address)

    def on_error(self, exc: OSError) -> None:
        with self.record("error", exc):
            pass

    def on_drain(self) -> None:
        with self.record("drain"):
            pass

    def on_close(self, exc: OSError | None) -> None:
        with self.record("close", exc):
            pass

    def handle_error(self, exc: BaseException) -> None:
        self.raised.append(exc)

    def got(self, data: bytes, address: Any) -> None: ...

    def values(self, name: str) -> list[Any]:
        """What a callback was called with, each time."""
        return [value for called, value in list(self.calls) if called == name]

    @property
    def received(self) -> list[bytes]:
        return self.values("datagram")

    def until(self, count: int, name: str = "datagram") -> list[Any]:
        """Wait for `count` calls of a callback."""
        wait_until(
            lambda: len(self.values(name)) >= count, what=f"{count} calls of on_{name}: {self.stats()}"
        )
        return self.values(name)

    def check(self) -> None:
        """Assert what holds for each that has ended."""
        names = [name for name, _ in self.calls]
        assert self.overlaps == 0
        assert names.count("close") == 1
        assert names[-1] == "close"
        assert self.closed
        assert self.stats().receives.in_use == 0


class Echo(Probe):
    """Sends back what comes."""

    def got(self, data: bytes, address: Any) -> None:
        self.send_to(data, address)


@contextlib.contextmanager
def running(datagram: Any) -> Iterator[Any]:
    """Run a Datagram for a `with` block; it must end well."""
    datagram.start()
    try:
        yield datagram
    finally:
        datagram.close()
        assert datagram.wait_closed(PATIENCE), datagram.stats()
        datagram.check()


@contextlib.contextmanager
def plain(family: int = socket.AF_INET, address: Any = None) -> Iterator[socket.socket]:
    """A plain bound datagram socket."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(address or (("::1", 0) if family == socket.AF_INET6 else LOOPBACK))
        sock.settimeout(PATIENCE)
        yield sock


def closed_port() -> tuple[str, int]:
    """Return a loopback address where nobody listens."""
    with plain(address=(OWN_HOST, 0)) as sock:
        host, port = sock.getsockname()
        return str(host), int(port)

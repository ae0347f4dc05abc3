"""L7: detect: HTTP and another protocol on one port, told apart by the first bytes.

Laws
1. A connection becomes what its first bytes say: its class is changed, its callbacks begin with on_connect,
   and on_data gets all bytes from the first one on.
2. What is decided is decided at the first byte that can: at most the length of a method is waited for.
"""

from __future__ import annotations

from typing import ClassVar, Final

from ._options import check_timeout
from .connection import Connection

#: Seconds that a peer has for its first bytes; then it is the other protocol's, which may speak first.
DETECT_TIMEOUT: Final = 10.0

#: What a request begins with; WebDAV's methods as well, for HTTP shall say what it does not know.
_METHODS: Final = (
    *(b"GET ", b"HEAD ", b"POST ", b"PUT ", b"PATCH ", b"DELETE ", b"OPTIONS ", b"TRACE ", b"CONNECT "),
    *(
        b"PROPFIND ",
        b"PROPPATCH ",
        b"MKCOL ",
        b"COPY ",
        b"MOVE ",
        b"LOCK ",
        b"UNLOCK ",
        b"REPORT ",
        b"SEARCH ",
    ),
)


def is_http(first: bytes) -> bool | None:
    """Return whether these are the first bytes of a request; None where more are needed to tell."""
    if first.startswith(_METHODS):
        return True
    return None if any(method.startswith(first) for method in _METHODS) else False


class Detecting(Connection):
    """A connection whose protocol is not known yet."""

    _http: ClassVar[type[Connection]]
    _other: ClassVar[type[Connection]]
    _patience: ClassVar[float]
    _first = b""

    def on_connect(self) -> None:
        """Wait for the first bytes."""
        self.set_deadline(self._patience)

    def on_data(self, data: bytes) -> None:
        """Look whether they tell."""
        self._first += data
        told = is_http(self._first)
        if told is not None:
            self._become(self._http if told else self._other)

    def on_eof(self) -> bool | None:
        """The peer has said all: let the other protocol make of it what it can."""
        self._become(self._other)
        return self.on_eof()

    def on_timeout(self, kind: str) -> bool | None:
        """Nothing told: it is not HTTP."""
        if kind != "deadline":
            return None
        self._become(self._other)
        return True

    def _become(self, kind: type[Connection]) -> None:
        first = self.__dict__.pop("_first", b"")
        self.set_deadline(None)
        self.__class__ = kind  # type: ignore[assignment]
        kind.__init__(self, self.server, self.peer_address)
        self.on_connect()
        if first and not (self.closing or self.closed):
            self.on_data(first)


def detect(
    http: type[Connection], other: type[Connection], *, timeout: float = DETECT_TIMEOUT
) -> type[Connection]:
    """Return a handler for Server that serves HTTP and another protocol on one port.

    Args:
        http: the class that a connection becomes whose first bytes begin a request: an HTTPConnection.
        other: the class that all others become, and those that say nothing for `timeout` seconds.
        timeout: seconds.

    Raises:
        TypeError: one of the classes is no subclass of Connection, or has `__slots__`, which a connection
            that exists already cannot get. ValueError: the timeout is out of range.

    What the classes' `__init__` take is what Server calls them with. Any thread; does not block.
    """
    for name, kind in (("http", http), ("other", other)):
        if not (isinstance(kind, type) and issubclass(kind, Connection)):
            raise TypeError(f"{name}={kind!r}: must be a subclass of Connection")
        try:
            Detecting.__new__(Detecting).__class__ = kind  # type: ignore[assignment]
        except TypeError as exc:
            raise TypeError(f"{name}={kind!r}: must have no __slots__ of its own") from exc
    if timeout is None:
        raise TypeError("timeout=None: must be a number of seconds")
    check_timeout("timeout", timeout)
    namespace = {"_http": http, "_other": other, "_patience": timeout}
    return type("Detecting", (Detecting,), namespace)

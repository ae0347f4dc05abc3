"""L6: Stream, the blocking way to use a connection: read and write from any thread, with timeouts.

Laws
1. One thread reads at a time, a second one is told so. Any number may write: the bytes of one `write` stay
   together.
2. At most READ_AHEAD_MAX bytes and one receive are kept unread, or as many as the read under way asked for:
   then reading pauses, and TCP holds the peer back.
3. A time-out loses nothing: what came is left to be read, and a `write` that timed out has sent nothing.
4. Waiting is done in slices, because on Windows Ctrl-C does not end a wait.
5. `changed` is taken before the connection's lock; callbacks take it while they hold none.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from . import _lifecycle as life
from ._addresses import Address
from ._channel import Buffer, as_bytes
from ._errors import ConnectionClosedError
from ._filechannel import make_job
from ._options import KIB, Settings, check_count, check_timeout
from .client import connect
from .connection import Connection

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Unpack

    from ._options import ClientOptions
    from .engine import Engine

#: Bytes kept for a reader that is behind.
READ_AHEAD_MAX: Final = 256 * KIB
#: Longest line or other delimited piece, unless the caller says otherwise.
UNTIL_MAX: Final = 64 * KIB
#: Seconds of one slice of waiting.
SLICE: Final = 0.25
#: A read of everything: more than there is.
_ALL: Final = 1 << 62
#: A stream's writers wait at the high mark, so nothing overflows.
_NO_OVERFLOW: Final = 1 << 40

#: The attribute of an exception that names the connection whose stream raised it.
_RAISED_BY: Final = "_iocp_ctypes_raised_by"

_UNSET: Final[Any] = object()


class IncompleteReadError(EOFError):
    """The peer ended before what was asked for was complete.

    Attributes:
        partial: the bytes that came, which are read herewith.
    """

    def __init__(self, partial: bytes, wanted: str) -> None:
        """Say what was wanted and how much of it came."""
        super().__init__(f"the peer ended after {len(partial)} bytes; wanted were {wanted}")
        self.partial = partial


class Feed(Connection):
    """The connection under a stream: keeps what comes and wakes who waits. `changed` guards its fields."""

    def __init__(self, server: Any = None, peer_address: Address | None = None) -> None:
        """As any connection."""
        super().__init__(server, peer_address)
        self.changed = threading.Condition()
        self.buffer = bytearray()
        self.ahead_max = READ_AHEAD_MAX
        self.pausing = False
        self.connected = False
        self.ended = False  # the peer's EOF came
        self.over = False  # on_close was called
        self.error: OSError | None = None  # what it was called with
        self.begin: Callable[[Feed], None] | None = None  # called by on_connect

    def _attach(self, server: Any, home: Any, sock: Any, settings: Settings, peer: Address) -> None:
        settings = dataclasses.replace(settings, write_buffer_max=_NO_OVERFLOW)
        super()._attach(server, home, sock, settings, peer)

    def on_connect(self) -> None:
        """Wake who waits for it; begin what a StreamServer does with it."""
        with self.changed:
            self.connected = True
            self.changed.notify_all()
        if self.begin is not None:
            self.begin(self)

    def on_data(self, data: bytes) -> None:
        """Keep what came, and read no further where that is enough."""
        with self.changed:
            self.buffer += data
            if len(self.buffer) >= self.ahead_max:
                self.pausing = True
                self.pause_reading()
            self.changed.notify_all()

    def detach(self, timeout: float | None = 5.0) -> Any:
        """As any connection; what is unread stays in `unread`."""
        sock = super().detach(timeout)
        with self.changed:
            self._stash = [bytes(self.buffer), *(self._stash or ())]
            self.buffer.clear()
        return sock

    def on_eof(self) -> bool:
        """Note the peer's end; sending goes on."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        return True

    def on_drain(self) -> None:
        """Wake the writers."""
        with self.changed:
            self.changed.notify_all()

    def on_close(self, exc: OSError | None) -> None:
        """Wake all: nothing more will come."""
        with self.changed:
            self.over = True
            self.error = exc
            self.changed.notify_all()

    def take(self, size: int) -> bytes:
        """Remove bytes from the head of the buffer. Needs `changed`."""
        with memoryview(self.buffer) as view:
            taken = bytes(view[:size])
        del self.buffer[:size]
        return taken

    def let_come(self, ahead_max: int, below: int) -> None:
        """Set how much may be kept unread; go on reading where fewer than `below` are. Needs `changed`."""
        self.ahead_max = ahead_max
        if self.pausing and len(self.buffer) < below:
            self.pausing = False
            self.resume_reading()


class Stream:
    """A connection with blocking calls; a context manager that closes it, an iterator over lines.

    Every blocking method takes `timeout`: seconds, or None for no limit; left out, the stream's own `timeout`
    holds. A time-out raises TimeoutError and loses nothing. Any thread may call them, but for the callbacks
    of the connection's own engine: there they raise RuntimeError, for what they wait for could not happen. On
    the main thread Ctrl-C ends them within a quarter of a second.

    The connection's end raises what ended it, ConnectionResetError for one; an end that is no error, and any
    use after `close`, raise ConnectionClosedError. Both are ConnectionErrors; over TLS it may be an
    ssl.SSLError.
    """

    def __init__(self, connection: Connection, timeout: float | None = None) -> None:
        """Made by `open_stream` and StreamServer."""
        if not isinstance(connection, Feed):
            raise TypeError(f"connection={connection!r}: streams are made by open_stream and StreamServer")
        self._timeout = check_timeout("timeout", timeout)
        self._closed = False
        self._told = False  # `close` has returned or said what was lost, or nobody wants to know: `abort`
        self._feed = connection
        self._reading = threading.Lock()

    def __del__(self) -> None:
        """Warn of a stream that nobody closed, and abort its connection.

        Plain attributes only: when the interpreter ends, modules are empty (and `over` is true by then).
        """
        feed = getattr(self, "_feed", None)
        if feed is not None and not (self._closed or feed.over):
            feed._home.engine.dispatcher.call_soon(feed.abort)
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)

    # -- properties -----------------------------------------------------------------------------------------

    @property
    def timeout(self) -> float | None:
        """Seconds for a call that names no timeout of its own; None: no limit. May be set."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._timeout = check_timeout("timeout", seconds)

    @property
    def connection(self) -> Connection:
        """The connection underneath, for its figures and tunables; its callbacks are the stream's."""
        return self._feed

    @property
    def peer_address(self) -> Address:
        """The peer, as Connection.peer_address."""
        return self._feed.peer_address

    @property
    def local_address(self) -> Address | None:
        """Our end of it, as Connection.local_address."""
        return self._feed.local_address

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._closed

    def __repr__(self) -> str:
        return f"<Stream {'closed ' if self._closed else ''}{self._feed!r}>"

    # -- waiting --------------------------------------------------------------------------------------------

    def _wait(self, ready: Callable[[], object], timeout: Any, what: str) -> None:
        """Wait until something is true. Needs `changed`, which is let go meanwhile."""
        limit = self._timeout if timeout is _UNSET else check_timeout("timeout", timeout)
        if self._feed._home.is_callback_thread():
            raise RuntimeError(f"{what}: called from a callback, which must not wait")
        deadline = None if limit is None else monotonic() + limit
        while not ready():
            left = SLICE if deadline is None else deadline - monotonic()
            if left <= 0:
                raise self._blame(TimeoutError(f"{what}: not done within timeout={limit:g} s"))
            self._feed.changed.wait(min(left, SLICE))

    def _blame(self, exc: Exception) -> Exception:
        """Mark what this stream raises in a server's function; see StreamServer.

        The mark is on the exception, because several threads of a function may be told at once.
        """
        if self._feed.server is not None:
            exc.__dict__[_RAISED_BY] = self._feed.id
        return exc

    def _raised(self, exc: BaseException) -> bool:
        """Whether that came from this stream."""
        return exc.__dict__.get(_RAISED_BY) == self._feed.id

    def _gone(self, what: str) -> Exception:
        """What to raise where the connection or this stream is at its end."""
        feed = self._feed
        if self._closed:
            return self._blame(ConnectionClosedError(f"{what}: the stream is closed"))
        if feed.error is not None:
            return self._blame(feed.error.with_traceback(None))
        return self._blame(ConnectionClosedError(f"{what}: the connection has ended: {feed.close_reason}"))

    # -- reading --------------------------------------------------------------------------------------------

    def _read(
        self, enough: Callable[[bytearray], int], most: int, timeout: Any, what: str, wanted: str = ""
    ) -> bytes:
        """Wait until `enough` of the buffer is not 0, or nothing more will come, then take that much.

        Where the peer ended with too little in the buffer, the rest is taken: IncompleteReadError says what
        was `wanted`, or nothing is returned where nothing in particular was.
        """
        feed = self._feed

        def ready() -> bool:
            return self._closed or enough(feed.buffer) > 0 or feed.ended or feed.over

        if not self._reading.acquire(False):
            raise RuntimeError(f"{what}: another thread is reading from this stream")
        try:
            with feed.changed:
                if not ready():
                    most = max(most, READ_AHEAD_MAX)
                    feed.let_come(most, most)
                self._wait(ready, timeout, what)
                if self._closed:
                    raise self._gone(what)
                size = enough(feed.buffer)
                if not size and not feed.ended:
                    raise self._gone(what)
                if not size and wanted:
                    raise self._blame(IncompleteReadError(feed.take(len(feed.buffer)), wanted))
                return feed.take(size)
        finally:
            with feed.changed:
                feed.let_come(READ_AHEAD_MAX, READ_AHEAD_MAX // 2)
            self._reading.release()

    def read(self, n: int = -1, *, timeout: Any = _UNSET) -> bytes:
        """Read up to n bytes, as soon as some are there; without n everything up to the peer's end.

        Returns:
            The bytes; none where the peer has ended (or n is 0).

        Raises:
            TimeoutError: nothing came, or the end did not; what did come is left to be read.
            ConnectionError: the connection ended, and not by the peer's EOF; what came before is read first.
            RuntimeError: another thread is reading, or this one runs a callback.
        """
        check_count("n", n, -1, _ALL)
        if n == 0:
            return b""
        if n > 0:
            return self._read(lambda buffer: min(n, len(buffer)), 0, timeout, "read()")
        return self._read(lambda buffer: len(buffer) if self._feed.ended else 0, _ALL, timeout, "read()")

    def readexactly(self, n: int, *, timeout: Any = _UNSET) -> bytes:
        """Read exactly n bytes.

        Raises:
            IncompleteReadError: the peer ended before; its `partial` is what came.
            TimeoutError, ConnectionError, RuntimeError: as `read`.
        """
        check_count("n", n, 0, _ALL)
        if n == 0:
            return b""
        what = f"readexactly({n})"
        return self._read(lambda buffer: n if len(buffer) >= n else 0, n, timeout, what, f"{n}")

    def readuntil(self, separator: bytes = b"\n", *, limit: int = UNTIL_MAX, timeout: Any = _UNSET) -> bytes:
        """Read up to and with the separator.

        Args:
            separator: one or more bytes.
            limit: the most bytes to look through, the separator's included.
            timeout: see the class.

        Raises:
            IncompleteReadError: the peer ended before; its `partial` is what came.
            ValueError: no separator within `limit` bytes, which are left to be read.
            TimeoutError, ConnectionError, RuntimeError: as `read`.
        """
        if not isinstance(separator, bytes) or not separator:
            raise ValueError(f"separator={separator!r}: must be one or more bytes")
        check_count("limit", limit, len(separator), _ALL)
        length = len(separator)
        seen = 0  # bytes in which the separator does not begin

        def enough(buffer: bytearray) -> int:
            nonlocal seen
            end = buffer.find(separator, seen, limit)
            if end >= 0:
                return end + length
            seen = max(0, len(buffer) - length + 1)
            if len(buffer) >= limit:
                raise self._blame(ValueError(f"readuntil(): no {separator!r} within limit={limit} bytes"))
            return 0

        what = f"readuntil({separator!r})"
        return self._read(enough, limit, timeout, what, f"those up to {separator!r}")

    def readline(self, *, limit: int = UNTIL_MAX, timeout: Any = _UNSET) -> bytes:
        """Read a line with its newline; at the peer's end what is left, without one; then nothing.

        As `readuntil` in all else.
        """
        try:
            return self.readuntil(b"\n", limit=limit, timeout=timeout)
        except IncompleteReadError as exc:
            return exc.partial

    def __iter__(self) -> Iterator[bytes]:
        """Iterate over lines until the peer's end; see `readline`."""
        while line := self.readline():
            yield line

    # -- writing --------------------------------------------------------------------------------------------

    def write(self, data: Buffer, *, timeout: Any = _UNSET) -> None:
        """Send bytes; waits while more than the high mark of earlier ones is unsent, until they drained.

        Args:
            data: a bytes object, which is kept uncopied until it is sent, or another buffer, which is copied.
            timeout: see the class.

        Raises:
            TimeoutError: the peer does not read; nothing of `data` was sent, so it may be written again.
            ConnectionError: the connection has ended.
            TypeError: `data` is not bytes-like.
            RuntimeError: called from a callback.

        It returns before the bytes are sent; `close` waits for them.
        """
        checked = as_bytes(data)
        self._hand_over(lambda: self._feed.send(checked), timeout, "write()")

    def send_file(
        self,
        file: Any,
        offset: int = 0,
        count: int | None = None,
        *,
        header: Buffer = b"",
        trailer: Buffer = b"",
        timeout: Any = _UNSET,
    ) -> None:
        """Send a file, after all that was written; waits as `write` does, for what was written before.

        Args:
            file, offset, count, header, trailer: as Connection.send_file.
            timeout: see the class.

        Raises:
            TimeoutError, ConnectionError, RuntimeError: as `write`; nothing of the file was sent.
            TypeError, ValueError, OSError: the file cannot be sent, as Connection.send_file.

        It returns before the file is sent, and the file object may be closed; `close` waits for it.
        """
        job = make_job(file, offset, count, header, trailer)
        try:
            self._hand_over(lambda: self._feed._send_job(job), timeout, "send_file()")
        except BaseException:
            job.source.close()
            raise

    def _hand_over(self, send: Callable[[], object], timeout: Any, what: str) -> None:
        """Send when earlier bytes have drained."""
        feed = self._feed
        with feed.changed:
            if self._closed:
                raise self._gone(what)
            # Looking and sending in one go: of several writers that wait, one finds the queue drained.
            self._wait(lambda: self._closed or feed.over or not feed._flow.above, timeout, what)
            if self._closed:
                raise self._gone(what)
            try:
                send()
            except ConnectionClosedError:
                if feed._eof_out and not feed.closing and not feed.closed:
                    raise self._blame(ConnectionClosedError(f"{what}: after write_eof()")) from None
                if feed._state >= life.JOINING:  # on_close is on its way, and knows why
                    self._wait(lambda: feed.over, timeout, what)
                raise self._gone(what) from None

    def write_eof(self) -> None:
        """Half-close: the peer reads what was written and then the end; reading goes on. Never blocks."""
        if self._closed:
            raise self._gone("write_eof()")
        try:
            self._feed.send_eof()
        except ConnectionClosedError:
            raise self._gone("write_eof()") from None

    # -- the end --------------------------------------------------------------------------------------------

    def close(self, *, timeout: Any = _UNSET) -> None:
        """Send what was written, then the end, and wait until the connection is closed; again is a no-op.

        What the peer still sends is dropped. It is waited for no longer than `linger_timeout` to end its
        side, and half a minute to take something of what is unsent.

        Raises:
            TimeoutError: not done in time; it goes on nevertheless, and `close` may be called again.
            ConnectionError: the connection ended before all that was written was sent; said once.
            RuntimeError: called from a callback; `abort` may be.
        """
        feed = self._feed
        if feed._home.is_callback_thread():
            raise RuntimeError("close(): called from a callback, which must not wait")
        told = self._told  # before waiting: an abort meanwhile is what this call has to tell
        self._closed = True
        feed.close()
        with feed.changed:
            feed.changed.notify_all()
            self._wait(lambda: feed.over, timeout, "close()")
            feed.buffer.clear()
        self._told = True
        if feed._flow.lost and not told:
            if feed.error is not None:
                raise self._blame(feed.error.with_traceback(None))
            text = "close(): the connection was aborted before all that was written was sent"
            raise self._blame(ConnectionClosedError(text))

    def abort(self) -> None:
        """Close at once: what is unsent is dropped and the peer sees a reset. Any thread; never blocks."""
        self._closed = self._told = True
        self._feed.abort()
        with self._feed.changed:
            self._feed.changed.notify_all()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Close; abort where the block raised, so that the peer does not take a part for the whole."""
        if kind is None:
            self.close()
        else:
            self.abort()


def open_stream(
    address: Any,
    timeout: float | None = None,
    *,
    local_address: Any = None,
    engine: Engine | None = None,
    server_hostname: str | None = None,
    tls_session: ssl.SSLSession | None = None,
    **options: Unpack[ClientOptions],
) -> Stream:
    """Connect, wait for it, and return a Stream. Needs no server in this process.

    Args:
        address: (host, port), as for `connect`.
        timeout: seconds for connecting, and for each call on the stream that names no other; None: no limit.
        local_address: as for `connect`.
        engine: as for `connect`; None: the engine of the process, which ends with its last connection.
        server_hostname, tls_session: as for `connect`; with `tls`, the handshake is waited for as well.
        options: as for `connect`.

    Raises:
        OSError: why it could not connect: ConnectionRefusedError, TimeoutError, socket.gaierror, ssl.SSLError
            and others.
        TypeError, ValueError: an argument is wrong.
        RuntimeError: called from a callback.

    Any thread; blocks.
    """
    if "write_buffer_max" in options:
        raise TypeError("write_buffer_max: a stream has none, for write() waits at high_mark")
    feed = connect(
        address,
        Feed,
        timeout=timeout,
        local_address=local_address,
        engine=engine,
        server_hostname=server_hostname,
        tls_session=tls_session,
        **options,
    )
    assert isinstance(feed, Feed)
    stream = Stream(feed, timeout)
    try:
        with feed.changed:
            stream._wait(lambda: feed.connected or feed.over, None, "open_stream()")
        if not feed.connected:
            raise stream._gone("open_stream()")
    except BaseException:
        stream.abort()
        raise
    return stream

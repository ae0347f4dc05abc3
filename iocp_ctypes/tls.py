"""TLS over ssl.MemoryBIO and ssl.SSLObject: bytes in, bytes out (layer P: pure, no I/O, no locks).

Laws
1. Ciphertext goes in by `feed`, in any pieces, and comes out by `output`; plaintext comes out by `read` and
   goes in by `write`. Who calls does the sending and receiving, and lets one thread in at a time.
2. What the peer has not been asked for stays where it is: `read` returns no more than it is asked for, and
   the input BIO holds at most BIO_MAX bytes; the rest waits as it came.
3. A bad record is told by the read after the last good bytes; its alert is in `output`.
4. `ended` is true exactly when the peer's close_notify was read: without it, the end of the bytes is a
   truncation. OpenSSL is not asked, because CPython has it take the one for the other.
5. Nothing is encrypted before the handshake is complete, and then in the order of the calls. Alerts, tickets
   and key updates are bytes of `output` like all others, in the order in which OpenSSL wrote them.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ._flow import SEND_GATHER_MAX, SEND_SLICE_MAX, Piece, WriteFlow

#: Plaintext bytes of one record at the most (RFC 8446 section 5.1), and so of one SSLObject.write here: the
#: output BIO, which keeps the memory it once needed, stays at the size of a record.
RECORD_MAX: Final = 16 * 1024
#: Bytes that encrypting adds to a record at the most (RFC 5246 section 6.2.3).
RECORD_EXTRA_MAX: Final = 2048
#: Bytes that the input BIO is given at a time, for the same reason.
BIO_MAX: Final = 16 * 1024


def check_context(name: str, context: Any, server_side: bool) -> ssl.SSLContext:
    """Return an SSLContext that serves this side of a connection.

    Raises TypeError or ValueError naming the argument and what is allowed.
    """
    if not isinstance(context, ssl.SSLContext):
        raise TypeError(f"{name}={context!r}: must be an ssl.SSLContext")
    unfit = ssl.PROTOCOL_TLS_CLIENT if server_side else ssl.PROTOCOL_TLS_SERVER
    if context.protocol == unfit:
        side, other = ("server", "client") if server_side else ("client", "server")
        raise ValueError(f"{name}={context!r}: is for the {other} side; this is the {side} of the connection")
    return context


def context_of_files(certificate: str, key: str | None) -> ssl.SSLContext:
    """Return a server's context with a certificate, its chain and its key from PEM files.

    `key` is None where the certificate's file has it. ValueError says in one line which file is of no use,
    and why.
    """
    for path in (certificate, key):
        try:
            if path is not None:
                open(path, "rb").close()
        except OSError as exc:
            raise ValueError(f"{path}: {exc.strerror or exc}") from exc
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as exc:  # OpenSSL's reasons are terse: KEY_VALUES_MISMATCH, NO_START_LINE
        reason = getattr(exc, "reason", None) or exc
        files = certificate if key is None else f"{certificate}, {key}"
        raise ValueError(f"{files}: not a certificate and its key in PEM form: {reason}") from exc
    return context


def _no_password() -> str:
    """OpenSSL would ask for one on the terminal, and a server would wait for it."""
    raise ValueError("the key is protected by a password")


def truncated() -> ssl.SSLEOFError:
    """Make the exception of a peer that ended its bytes without a close_notify."""
    text = "the peer ended the connection without ending TLS: what it sent may be incomplete"
    return ssl.SSLEOFError(ssl.SSL_ERROR_EOF, text)


class Handshake:
    """What waits for a handshake under way."""

    __slots__ = ("calls", "due", "first", "pause")

    def __init__(self, first: bool) -> None:
        """Begin one; `first` where the connection begins with it."""
        self.first = first  # on_connect follows; else on_tls
        self.due: float | None = None  # when it is too late
        self.pause = False  # reading is paused as soon as it is complete
        self.calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []  # for after on_connect


class TLSCodec:
    """One side of a TLS connection."""

    __slots__ = (
        "_error",
        "_incoming",
        "_outgoing",
        "_plain",
        "_rest",
        "closed",
        "ended",
        "object",
        "shaken",
        "spoken",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """Prepare; `handshake` begins.

        Args:
            context: certificates, protocols, ALPN, verification: all that is configured.
            server_side: whether this is the server.
            server_hostname: whom a client expects, and names to the server; None or "": nobody.
            session: a client's session to resume.

        Raises:
            ValueError, ssl.SSLError: the context verifies names and there is none, or does not fit.
        """
        if context.check_hostname and not server_side and not server_hostname:
            # SSLSocket refuses this; SSLObject would verify no name at all.
            raise ValueError("a context with check_hostname needs a server_hostname")
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._rest: deque[memoryview] = deque()  # ciphertext that the BIO has not been given yet
        self._plain = b""  # what `close` had to take out
        self._error: OSError | None = None
        self.shaken = False  # true exactly when the handshake is complete
        self.ended = False
        self.closed = False  # our close_notify was written, or never may be
        self.spoken = False  # the peer sent at least a byte of plaintext
        self.object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname or None,
            session=session,
        )

    # -- ciphertext -----------------------------------------------------------------------------------------

    def feed(self, data: bytes) -> None:
        """Take ciphertext that came from the peer."""
        if len(data) <= BIO_MAX and not self._rest and not self._incoming.pending:
            self._incoming.write(data)
            return
        view = memoryview(data)
        self._rest.extend(view[start : start + BIO_MAX] for start in range(0, len(view), BIO_MAX))

    def output(self) -> bytes:
        """Return the ciphertext for the peer that there is, which may be none."""
        return self._outgoing.read() if self._outgoing.pending else b""

    @property
    def more(self) -> bool:
        """Whether `read` might return something without further ciphertext."""
        return bool(
            self._incoming.pending or self._rest or self._plain or self.object.pending() or self._error
        )

    def _top_up(self) -> bool:
        """Give the BIO what waits for it, where it is empty; return whether it has something."""
        if not self._incoming.pending:
            if not self._rest:
                return False
            self._incoming.write(self._rest.popleft())
        return True

    # -- the handshake --------------------------------------------------------------------------------------

    def handshake(self) -> bool:
        """Take the handshake as far as it goes; return whether it is complete.

        Calls the context's functions (SNI). Raises ssl.SSLError where it fails; `output` has the alert.
        """
        while not self.shaken:
            self._top_up()
            try:
                self.object.do_handshake()
            except ssl.SSLWantReadError:
                if not self._rest:
                    return False
            else:
                self.shaken = True
        return True

    # -- plaintext ------------------------------------------------------------------------------------------

    def read(self, most: int) -> bytes | None:
        """Return up to `most` bytes of plaintext; None where there are none now, or `ended`.

        Raises ssl.SSLError for a bad record, after the good bytes before it were returned.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        parts: list[bytes] = []
        if self._plain:
            parts.append(self._plain[:most])
            self._plain = self._plain[most:]
            most -= len(parts[0])
        while most and not self.ended:
            size = self.object.pending() or (self._top_up() and self._incoming.pending)
            if not size:
                break
            try:
                part = self.object.read(min(size, most))
            except ssl.SSLWantReadError:
                if self._incoming.pending:
                    break
                continue  # what the BIO had is in an incomplete record
            except ssl.SSLZeroReturnError:
                part = b""
            except OSError as exc:
                if not parts:
                    raise
                self._error = exc.with_traceback(None)  # which refers to this very object
                break
            if not part:
                self.ended = True
                break
            parts.append(part)
            most -= len(part)
        if not parts:
            return None
        self.spoken = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, data: bytes | memoryview) -> int:
        """Encrypt up to RECORD_MAX bytes; return how many were taken: 0 where TLS has to receive first.

        The latter happens while the peer renegotiates. Raises ssl.SSLError where TLS has failed.
        """
        try:
            return self.object.write(data)
        except ssl.SSLWantReadError:
            return 0

    def close(self) -> None:
        """Write close_notify: no plaintext follows. What the peer still sends may be read on."""
        if not self.shaken or self.closed:
            return
        self.closed = True
        # SSLObject.unwrap looks for the peer's close_notify as well, and takes plaintext that it finds in its
        # way for a failure. So it gets to see none.
        while size := self.object.pending():
            self._plain += self.object.read(size)
        unread = self._incoming.read()
        try:
            self.object.unwrap()
        except ssl.SSLError:
            pass  # SSLWantReadError, as a rule: the peer has not ended yet
        if unread:
            self._incoming.write(unread)


class SecureFlow(WriteFlow):
    """A write queue that encrypts what it hands out; before the handshake it keeps plaintext back.

    `pieces` is ciphertext, or what went before TLS began; `queued` counts what may be sent now: these and,
    once `open`, the plaintext behind them. What is taken is encrypted as late as possible, so nothing is kept
    twice.
    """

    __slots__ = ("_plain", "blocked", "codec", "error", "is_open", "secret")

    def __init__(self, before: WriteFlow | None = None) -> None:
        """Make an empty one, or one that goes on where another stopped."""
        super().__init__()
        self.at_once_max = 0
        self._plain: deque[Piece] = deque()
        self.secret = 0  # bytes in `_plain`
        self.codec: TLSCodec | None = None
        self.is_open = False
        self.blocked = False  # TLS has to receive before it can encrypt
        self.error: OSError | None = None  # why nothing can be encrypted any more
        if before is not None:
            for name in WriteFlow.__slots__:
                if name != "at_once_max":
                    setattr(self, name, getattr(before, name))

    @property
    def size(self) -> int:
        """Bytes queued, in flight and held, plaintext that waits for the handshake included."""
        return self.queued + self.in_flight + self.held + (0 if self.is_open else self.secret)

    def open(self) -> None:
        """The handshake is complete: plaintext may go."""
        self.is_open = True
        self.queued += self.secret

    def push(self, data: bytes) -> None:
        """Queue plaintext at the tail."""
        self._plain.append(Piece(data, 0, len(data)))
        self.secret += len(data)
        if self.is_open:
            self.queued += len(data)

    def push_wire(self, data: bytes) -> None:
        """Queue bytes that go as they are, before the plaintext that is not encrypted yet."""
        super().push(data)

    def take(self, most: int = SEND_SLICE_MAX, gather: int = SEND_GATHER_MAX) -> tuple[list[Piece], int]:
        """Take the next ciphertext for one send, one record or at most `most` bytes; see WriteFlow.

        None, though something is queued, where TLS is `blocked` or has failed with `error`.
        """
        if self.pieces:
            return super().take(most, gather)
        taken: list[Piece] = []
        total = 0
        codec = self.codec
        assert codec is not None
        while self._plain and len(taken) < gather and self.error is None:
            if taken and total + RECORD_MAX + RECORD_EXTRA_MAX > most:
                break
            chunk = self._next_record()
            try:
                written = codec.write(chunk)
            except OSError as exc:
                self.error, written = exc.with_traceback(None), 0  # it refers to this very object
            data = codec.output()
            if data:
                taken.append(Piece(data, 0, len(data)))
                total += len(data)
            self.blocked = not written
            if not written:
                break
            self._forget(written)
        return taken, total

    def _next_record(self) -> bytes | memoryview:
        """Return the plaintext of the next record: small pieces are put together, a part is not copied."""
        data, start, stop = self._plain[0]
        if stop - start >= RECORD_MAX or len(self._plain) == 1:
            whole = start == 0 and stop <= RECORD_MAX
            return data if whole else memoryview(data)[start : min(stop, start + RECORD_MAX)]
        parts: list[bytes] = []
        room = RECORD_MAX
        for data, start, stop in self._plain:
            parts.append(data[start : min(stop, start + room)])
            room -= len(parts[-1])
            if not room:
                break
        return b"".join(parts)

    def _forget(self, count: int) -> None:
        """Remove plaintext that was encrypted."""
        self.secret -= count
        self.queued -= count
        while count:
            data, start, stop = self._plain.popleft()
            if stop - start > count:
                self._plain.appendleft(Piece(data, start + count, stop))
                return
            count -= stop - start

    def mark(self, high: int) -> bool:
        """See WriteFlow."""
        if self.files or self.size > high:
            self.above = True
        return not self.above

    def relieved(self, low: int) -> bool:
        """See WriteFlow."""
        if self.above and not self.files and self.size <= low:
            self.above = False
            return True
        return False

    def drop_plain(self) -> None:
        """Forget plaintext and files: TLS has failed, and what is left to be sent is its alert."""
        self.lost = self.lost or self.secret > 0 or self.files > 0
        self.files = self.held = 0
        if self.is_open:
            self.queued -= self.secret
        self._plain.clear()
        self.secret = 0

    def clear(self) -> None:
        """See WriteFlow."""
        super().clear()
        self._plain.clear()
        self.secret = 0

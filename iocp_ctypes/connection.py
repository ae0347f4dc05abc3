"""L5: Connection, what users subclass: callbacks to override, methods, properties, live tunables.

Laws
1. What moves inside is in `_channel`; this file is the face.
2. Methods are thread-safe and do not block, except `wait_closed` and `detach`; `send_file` opens a file.
3. A tunable that is set on a connection is this connection's own from then on; the others keep theirs.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

from . import _lifecycle as life
from ._addresses import Address, format_address, parse_sockaddr
from ._channel import Buffer, as_bytes
from ._detaching import Detaching
from ._errors import ConnectionClosedError
from ._lifecycle import CloseReason
from ._lifetime import DELIVERING, IDLE
from ._options import KeepAlive, Usage, change


class Connection(Detaching):
    """A connection; subclass it and override the callbacks, all of which are optional.

    Callbacks of one connection never overlap and come in order, on an I/O thread or on the connection's
    work thread. One that raises is reported to `Server.handle_error` and closes this connection, and
    nothing else.

    Attributes:
        id: a number that no other connection of this process has.
        data: yours; None at first.
        connected_at: time.monotonic() when the connection was accepted.
        last_activity: time.monotonic() when a byte last came or went.
        bytes_received: bytes handed to on_data, those stashed by pause_reading included.
        bytes_sent: bytes the kernel has accepted.
    """

    __slots__ = ()

    def __init__(self, server: Any = None, peer_address: Address | None = None) -> None:
        """Called by the server with itself and the peer's address; a subclass's own takes the same."""

    # -- callbacks ------------------------------------------------------------------------------------------

    def on_connect(self) -> None:
        """The connection works; the first callback."""

    def on_data(self, data: bytes) -> None:
        """Bytes came: as many as one receive brought, for TCP knows no messages."""

    def on_eof(self) -> bool | None:
        """The peer will send no more.

        Return True to keep sending; otherwise what is queued is sent, then we close.
        """
        return None

    def on_drain(self) -> None:
        """The write queue had passed the high mark and has now fallen to the low mark: send on."""

    def on_timeout(self, kind: str) -> bool | None:
        """`idle_timeout` ("idle") or `set_deadline` ("deadline") ran out.

        Return True to go on; otherwise we close.
        """
        return None

    def on_close(self, exc: OSError | None) -> None:
        """The last callback, once for each on_connect; `exc` is None where the end was clean."""

    # -- sending --------------------------------------------------------------------------------------------

    def send_many(self, buffers: Iterable[Buffer]) -> bool:
        """Send several buffers by one gathered WSASend (64 buffers, 256 KiB at most; more take several).

        As `send` in all else.
        """
        checked = [as_bytes(buffer) for buffer in buffers]
        with self._lock:
            return self._send_queued(checked)

    def send_eof(self) -> None:
        """Half-close: what is queued is sent, then FIN; receiving goes on until the peer's EOF.

        Any thread; never blocks; again is a no-op. Raises ConnectionClosedError where the connection is
        closed, and OSError on a pipe, which has no half-close.
        """
        with self._lock:
            if self._state > life.OPEN:
                raise ConnectionClosedError(f"connection {self.id} is closed")
            if not self._socket.half_closes:
                raise OSError(errno.EOPNOTSUPP, "a pipe cannot be closed by half: use close()")
            if not self._eof_out:
                self._eof_out = True
                self._advance()

    # -- the end --------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close gracefully: send what is queued, send FIN, wait up to `linger_timeout` for the peer's, close.

        What arrives meanwhile is dropped. A peer that takes nothing for half a minute is cut off. Any
        thread; never blocks; again is a no-op.
        """
        self._end_by(self._close, CloseReason.LOCAL)

    def abort(self) -> None:
        """Close at once: what is queued is dropped and the peer sees a reset. Any thread; never blocks."""
        self._abort(CloseReason.ABORTED)

    def _abort(self, reason: CloseReason) -> None:
        self._end_by(self._fail, reason, None, True)

    def _shutdown(self) -> None:
        """The server stops: close gracefully, and say why."""
        self._end_by(self._close, CloseReason.SHUTDOWN)

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Wait until on_close has returned.

        Args:
            timeout: seconds; None: without end.

        Returns:
            True where the connection is closed, False where the time ran out.

        Raises:
            RuntimeError: called from a callback, which on_close would wait for.

        Any other thread. Blocks.
        """
        if self._home.is_callback_thread():
            raise RuntimeError(
                "wait_closed() was called from a callback: on_close could not run while it waits"
            )
        with self._lock:
            if self.closed and not self._opened:
                return True
            if self._closed_event is None:
                self._closed_event = threading.Event()
            event = self._closed_event
        # In slices, because before Python 3.14 an endless wait on Windows cannot be interrupted by Ctrl-C.
        remaining = timeout
        while not event.wait(0.25 if remaining is None else min(0.25, max(0.0, remaining))):
            if remaining is not None:
                remaining -= 0.25
                if remaining <= 0:
                    return event.is_set()
        return True

    # -- reading, time, tasks -------------------------------------------------------------------------------

    def pause_reading(self) -> None:
        """Call on_data no more until `resume_reading`; the peer is held back by TCP. Any thread; never
        blocks.

        While paused nobody looks at the socket: the peer's end is noticed by sending, by timeouts, or on
        resuming.
        """
        self._paused = True

    def resume_reading(self) -> None:
        """Go on reading; what came in the meantime is delivered first. Any thread; never blocks."""
        with self._lock:
            if not self._paused:
                return
            self._paused = False
            if self._state == life.OPEN and self._reading == IDLE and self._opened:
                if self._stash or self._eof_in:
                    self._reading = DELIVERING
                    self._strand.post(self._deliver_stash)
                elif self._retry_due is None:
                    self._post_receive(self._next_size)
            self._silent_since = monotonic()  # while we did not look, silence meant nothing
            self._arm()

    def set_deadline(self, seconds: float | None) -> None:
        """Call on_timeout("deadline") after this many seconds, whatever comes or goes; None: never.

        Replaces the deadline before. Any thread; never blocks.
        """
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
            raise TypeError(f"seconds={seconds!r}: must be a number, 0 or more, or None")
        if seconds is not None and not seconds >= 0:
            raise ValueError(f"seconds={seconds!r}: must be a number, 0 or more, or None")
        with self._lock:
            self._deadline = None if seconds is None else self._home.engine.watchdog.clock() + seconds
            self._arm()

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function among this connection's callbacks: not overlapping with them, and after those
        before it.

        Raises ConnectionClosedError where the connection is closed. Any thread; never blocks.
        """
        with self._lock:  # on_close is posted under it: what is posted before comes before
            if self._state == life.CLOSED:
                raise ConnectionClosedError(f"connection {self.id} is closed")
            self._strand.post(self._call, function, *args)

    # -- properties -----------------------------------------------------------------------------------------

    @property
    def server(self) -> Any:
        """The Server that accepted this connection; None where `connect` made it."""
        return self._server

    @property
    def peer_address(self) -> Address:
        """The peer, (host, port) or (host, port, flowinfo, scope_id).

        An IPv4 peer is always shown as IPv4.
        """
        return self._peer_address

    @property
    def local_address(self) -> Address | None:
        """Our end of it, in the same form."""
        return parse_sockaddr(self._socket.local_raw)

    @property
    def closing(self) -> bool:
        """True from close(), or the failure, until it is closed."""
        return life.OPEN < self._state < life.CLOSED

    @property
    def closed(self) -> bool:
        """True exactly when the handle is closed or handed over; on_close runs then or has run."""
        return self._state == life.CLOSED

    @property
    def close_reason(self) -> CloseReason | None:
        """Why this connection ends or ended; None while it is open. The first reason wins."""
        return self._reason

    @property
    def write_buffer_size(self) -> int:
        """Bytes handed over and not yet accepted by the kernel."""
        return self._flow.size

    @property
    def tls(self) -> None:
        """The TLS session, None on a plain connection."""
        return None

    # -- live tunables --------------------------------------------------------------------------------------

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self._settings = change(self._settings, **changes)
            self._arm()

    @property
    def sendcap(self) -> Usage:
        """Concurrent WSASends: the cap and how many are in flight; assign a whole number."""
        return Usage(self._settings.sendcap, self._flow.sends)

    @sendcap.setter
    def sendcap(self, cap: int) -> None:
        self._change(sendcap=cap)
        with self._lock:
            if self._state == life.OPEN:
                self._flush()

    @property
    def recv_mode(self) -> str:
        """How receives are posted: "auto", "flow" or "zero-byte"; a change holds from the next receive on."""
        return self._settings.recv_mode

    @recv_mode.setter
    def recv_mode(self, mode: str) -> None:
        self._change(recv_mode=mode)
        self._next_size = self._first_size()

    @property
    def high_mark(self) -> int:
        """`send` returns False above this many unsent bytes."""
        return self._settings.high_mark

    @high_mark.setter
    def high_mark(self, size: int) -> None:
        self._change(high_mark=size)

    @property
    def low_mark(self) -> int:
        """on_drain comes when the unsent bytes have fallen to this many."""
        return self._settings.low_mark

    @low_mark.setter
    def low_mark(self, size: int) -> None:
        self._change(low_mark=size)

    @property
    def idle_timeout(self) -> float | None:
        """Seconds without a byte in or out before on_timeout("idle"); None: never."""
        return self._settings.idle_timeout

    @idle_timeout.setter
    def idle_timeout(self, seconds: float | None) -> None:
        self._change(idle_timeout=seconds)

    @property
    def nodelay(self) -> bool:
        """TCP_NODELAY; off, small sends may wait for the peer's acknowledgement."""
        return self._settings.nodelay

    @nodelay.setter
    def nodelay(self, on: bool) -> None:
        self._change(nodelay=on)
        with self._lock:
            if self._state < life.CLOSED:
                self._socket.set_nodelay(on)

    @property
    def keepalive(self) -> KeepAlive:
        """Seconds, or (idle, interval) in seconds, between the system's probes of a quiet peer; None.

        No probes.
        """
        return self._settings.keepalive

    @keepalive.setter
    def keepalive(self, value: KeepAlive) -> None:
        self._change(keepalive=value)
        with self._lock:
            if self._state < life.CLOSED:
                self._socket.set_keepalive(self._settings.keepalive)

    def __repr__(self) -> str:
        if not hasattr(self, "_state"):
            return f"<{type(self).__name__} not connected>"
        state = life.STATE_NAMES[self._state]
        return f"<{type(self).__name__} {self.id} {format_address(self._peer_address)} {state}>"

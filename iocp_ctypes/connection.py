"""L5: Connection, what users subclass: callbacks to override, methods, properties, live tunables.

Laws
1. What moves inside is in `_channel` and what builds on it up to `_detaching`; this file is the face.
2. Methods are thread-safe and do not block, except `wait_closed` and `detach`; `send_file` opens a file.
3. A tunable that is set on a connection is this connection's own from then on; the others keep theirs.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from . import _lifecycle as life
from ._addresses import Address, format_address, parse_sockaddr
from ._channel import Buffer, as_bytes
from ._detaching import Detaching
from ._errors import ConnectionClosedError
from ._lifecycle import CloseReason
from ._lifetime import DELIVERING, IDLE
from ._options import KeepAlive, Usage, change, check_option
from ._stats import ConnectionStats, Traffic
from ._tlschannel import make_codec
from ._trace import TraceRecord, write_trace
from ._tracing import Trace

if TYPE_CHECKING:
    import ssl


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
        bytes_received: bytes that came, those included that wait for on_data; over TLS all of its bytes.
        bytes_sent: bytes the kernel has accepted; over TLS all of its bytes.
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

    def on_tls(self) -> None:
        """The handshake that `start_tls` began is complete. (That of `tls=` is when on_connect comes.)"""

    def on_drain(self) -> None:
        """The write queue had passed the high mark and has now fallen to the low mark: send on.

        Who pauses another connection until this comes looks at `write_buffer_size` after pausing: it may have
        come in between.
        """

    def on_timeout(self, kind: str) -> bool | None:
        """`idle_timeout` ("idle") or `set_deadline` ("deadline") ran out.

        Return True to go on; otherwise we close.
        """
        return None

    def on_shutdown(self) -> None:
        """The server stops; close, or say goodbye first.

        What is left at the deadline of `Server.stop` is reset.
        """
        self.close()

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
                if self._relayed:
                    self._flush()
                self._advance()

    # -- TLS ------------------------------------------------------------------------------------------------

    def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        received: bytes = b"",
    ) -> None:
        """Begin TLS on a plain connection (STARTTLS); `on_tls` comes when the handshake is complete.

        What was sent before goes in the clear, and first; what is sent from now on waits for the handshake.
        `tls_handshake_timeout` bounds it.

        Args:
            context: an ssl.SSLContext for this side.
            server_side: True on the side that waits for the other's first message; either side may be it.
            server_hostname: whom a client's context verifies; needed where it does.
            session: a client's session to resume, `tls.session` of an earlier connection.
            received: what came behind the command in the same on_data. It has to be the peer's first message:
                bytes that somebody put there in the clear must not be taken for what came under TLS, so any
                other fail the handshake. What on_data has not been called with yet is treated so by itself.

        Raises:
            TypeError, ValueError, ssl.SSLError: an argument is wrong.
            RuntimeError: not connected yet, or TLS already.
            ConnectionClosedError: after close(), send_eof() or the end of the connection.

        Never blocks. Call it in a callback: to any other thread, what comes meanwhile would be plaintext.
        """
        if not isinstance(server_side, bool):
            raise TypeError(f"server_side={server_side!r}: must be True or False")
        codec = make_codec("context", context, server_side, server_hostname, session)
        self._start_tls(codec, as_bytes(received))

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
        """The server stops: close gracefully, in the way of on_shutdown, and say why."""
        asks = type(self).on_shutdown is not Connection.on_shutdown
        self._end_by(self._ask if asks else self._close, CloseReason.SHUTDOWN)

    def _ask(self, reason: CloseReason) -> None:
        """Have on_shutdown close, for this reason. Needs the lock."""
        assert self._lock._is_owned()
        if self._state == life.OPEN and self._opened:  # not amid a TLS handshake: it may never end
            self._reason = reason
            self._strand.post(self._call, self.on_shutdown)
        else:
            self._close(reason)

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
        resuming. A TLS handshake under way is completed first.
        """
        with self._lock:
            if not self._hold(True):
                self._paused = self._detour = True

    def resume_reading(self) -> None:
        """Go on reading; what came in the meantime is delivered first. Any thread; never blocks."""
        with self._lock:
            if self._hold(False) or not self._paused:
                return
            self._paused = False
            self._detour = self._tls is not None
            if self._burst is not None:
                self._burst_go_on()
            elif self._state == life.OPEN and self._reading == IDLE and self._opened:
                if self._stash or self._eof_in or (self._tls is not None and self._tls.more):
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
            self._post(self._call, function, *args)

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
        return self._reason if self._state > life.OPEN else None

    @property
    def write_buffer_size(self) -> int:
        """Bytes handed over and not yet accepted by the kernel."""
        return self._flow.size

    @property
    def tls(self) -> ssl.SSLObject | None:
        """The ssl.SSLObject of this connection; None on a plain one.

        For its questions (`version`, `cipher`, `getpeercert`, `selected_alpn_protocol`, `session` ...), in
        callbacks from on_connect or on_tls on. Do not read, write or unwrap it.
        """
        return None if self._tls is None else self._tls.object

    # -- live tunables --------------------------------------------------------------------------------------

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self._settings = change(self._settings, **changes)
            if self._short is not None:  # what is assigned holds, until the next shortage
                for name in changes:
                    self._short.forget(name)
            self._arm()

    @property
    def sendcap(self) -> Usage:
        """Concurrent WSASends: the cap and how many are in flight; assign a whole number.

        The cap is less than what was assigned for as long as the system is short of buffers.
        """
        return Usage(self._settings.sendcap, self._flow.sends)

    @sendcap.setter
    def sendcap(self, cap: int) -> None:
        self._change(sendcap=cap)
        with self._lock:
            if self._state == life.OPEN:
                self._flush()

    @property
    def recvburst(self) -> Usage:
        """Concurrent WSARecvs: the cap and how many the kernel has; assign a whole number.

        Above 1 it counts in the modes "burst" and "auto". The cap is less than what was assigned for as long
        as the system is short of buffers.
        """
        return Usage(self._settings.recvburst, self._in_use().receives)

    @recvburst.setter
    def recvburst(self, cap: int) -> None:
        with self._lock:
            self._change(recvburst=cap)
            self._burst_go_on()

    @property
    def recv_mode(self) -> str:
        """How receives are posted: "auto", "flow", "zero-byte" or "burst".

        A change holds from the next receive on; nothing is lost or comes out of order by it.
        """
        return self._settings.recv_mode

    @recv_mode.setter
    def recv_mode(self, mode: str) -> None:
        with self._lock:
            self._change(recv_mode=mode)
            self._next_size = self._first_size()
            self._burst_go_on()

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

    # -- figures and trace ----------------------------------------------------------------------------------

    def stats(self) -> ConnectionStats:
        """Return the figures of this instant. Any thread; never blocks."""
        traffic, now, clock = Traffic(), self._in_use(), monotonic()
        traffic.add(self)
        return ConnectionStats(
            id=self.id,
            age=max(0.0, clock - self.connected_at),
            idle=max(0.0, clock - self.last_activity),
            bytes_received=traffic.bytes_received,
            bytes_sent=traffic.bytes_sent,
            receives=traffic.receives,
            receives_at_once=traffic.receives_at_once,
            sends=traffic.sends,
            sends_at_once=traffic.sends_at_once,
            sendcap=Usage(self._settings.sendcap, now.sends),
            recvburst=Usage(self._settings.recvburst, now.receives),
            write_queued=now.queued,
            unread=now.unread,
            bytes_held=now.held,
        )

    @property
    def trace(self) -> int:
        """How many operations this connection's own trace remembers; 0: none. Assign to switch it."""
        trace = self._trace
        return trace.size if trace is not None else 0

    @trace.setter
    def trace(self, size: int) -> None:
        check_option("trace", size)
        with self._lock:
            if self._trace is None:
                self._trace = Trace()
            self._trace.switch(size)
            self._retrace()

    def trace_records(self) -> list[TraceRecord]:
        """Return this connection's trace, the oldest first.

        Its own, where it had one; else what its server's or its engine's has of it. Any thread; never blocks.
        """
        own, server, engine = self._trace, self._home.trace, self._home.engine.tracing
        if own is not None and own.was_on:
            return own.records()
        found = server.records() if server is not None and server.was_on else engine.records()
        return [record for record in found if record.connection == self.id]

    def write_trace(self, path: str | os.PathLike[str]) -> int:
        """Write its trace as a file for ui.perfetto.dev (Chrome trace format), while traffic goes on.

        Args:
            path: the file, which is replaced.

        Returns:
            How many records were written. OSError where that cannot be done. Any thread; blocks as files do.
        """
        return write_trace(path, self.trace_records())

    def __repr__(self) -> str:
        if not hasattr(self, "_state"):
            return f"<{type(self).__name__} not connected>"
        state = life.STATE_NAMES[self._state]
        return f"<{type(self).__name__} {self.id} {format_address(self._peer_address)} {state}>"

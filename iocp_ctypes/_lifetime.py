"""L5: Lifetime, how a connection begins, runs its callbacks, watches the time, and ends.

Laws
1. Callbacks never overlap and come in order: they run on the strand. on_connect first, on_close last, each
   exactly once, whatever the others raised.
2. `_lock` guards state, write queue and the handle's life. Nobody takes two of these locks. It is held across
   issuing a call, which never blocks, and never while user code runs. What says "needs the lock" asserts it.
3. Three steps to the end: JOINING (nothing new is issued, all is cancelled), joined (no packet outstanding),
   closed (closesocket, then on_close). The first reason wins.
4. "Closed" is decided by our own state, never by a status: what a cancelled operation reports differs from
   system to system.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from . import _lifecycle as life
from ._addresses import Address, format_address, parse_sockaddr
from ._burst import Burst
from ._caps import Recovery
from ._errors import ConnectionClosedError, reason_of
from ._flow import WriteFlow
from ._lifecycle import CloseReason
from ._locks import lock_number, make_locks
from ._options import Settings, change
from ._pipeops import OverlappedPipe
from ._proactor import Operation
from ._sockops import OverlappedSocket
from ._strand import Strand
from ._tracing import Knobs, Trace, TracedSocket, rings_of, traced

if TYPE_CHECKING:
    from ._connector import Connector
    from ._deadlines import Deadline
    from ._pipeconnector import PipeConnector
    from .engine import Engine
    from .tls import Handshake, TLSCodec

#: Bytes of the receive that a connection in mode "auto" keeps posted while it talks: most requests and
#: messages fit.
SMALL_RECEIVE: Final = 1024
#: Seconds before a call that the system had no resources for is tried again: doubled each time up to the
#: second.
RETRY_FIRST: Final = 0.010
RETRY_MAX: Final = 1.0

#: Seconds that a closing connection waits, at the least, for a peer to take something of what is still to
#: be sent: on Windows a send shows no progress before it is complete.
DRAIN_PATIENCE_MIN: Final = 30.0
#: Seconds to wait for the lock where a finalizer closes a connection in the middle of another's locked
#: section.
FINALIZER_PATIENCE: Final = 1.0

#: In place of the size of the next receive: burst detection takes over.
BURST: Final = -1

#: Where a connection's receiving is: nothing posted and nobody delivering; the kernel has a receive; its
#: bytes are on the way to on_data, or were there and the next is not posted yet, or EOF to on_eof; on_eof
#: had its call.
IDLE, POSTED, DELIVERING, ENDED = 0, 1, 2, 3

_LOCKS: Final = make_locks()
_numbers = itertools.count(1)
_numbers_lock: Final = threading.RLock()  # without a GIL, count alone may give a number twice

log = logging.getLogger("iocp_ctypes")


class InUse(NamedTuple):
    """What a connection has in use: operations that the kernel has, and bytes."""

    sends: int
    receives: int
    queued: int  # bytes handed to send() and not accepted by the kernel
    unread: int  # bytes that came and are not delivered
    held: int  # those two, and the buffers of receives


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """What all connections of one server share."""

    engine: Engine
    gone: Callable[[Any], None]  # called with the connection after on_close
    failed: Callable[[Any, BaseException], None]  # called with the connection when a callback raised
    executor: Callable[[int], Callable[[Callable[[], None]], None]] | None  # of pinned connections
    is_callback_thread: Callable[[], bool]
    trace: Trace | None = None  # of the server


class Lifetime:
    """A connection's state, callbacks, end and deadlines; Channel adds what moves."""

    __slots__ = (
        "__weakref__",
        "_burst",
        "_burst_due",
        "_closed_event",
        "_deadline",
        "_detour",
        "_eof_in",
        "_eof_out",
        "_error",
        "_flow",
        "_home",
        "_idle_since",
        "_linger_due",
        "_lock",
        "_logged",
        "_next_size",
        "_opened",
        "_operation",
        "_paused",
        "_peer_address",
        "_reading",
        "_reason",
        "_relayed",
        "_retry_delay",
        "_retry_due",
        "_server",
        "_settings",
        "_shaking",
        "_short",
        "_silent_since",
        "_socket",
        "_stash",
        "_state",
        "_strand",
        "_timer",
        "_tls",
        "_trace",
        "bytes_received",
        "bytes_sent",
        "connected_at",
        "data",
        "id",
        "last_activity",
    )

    def _attach(self, server: Any, home: Home, sock: Any, settings: Settings, peer: Address) -> None:
        """Give a connection its socket; what a subclass's `__init__` did or forgot does not matter here."""
        with _numbers_lock:
            self.id = next(_numbers)
        self.data: Any = None
        self.bytes_received = self.bytes_sent = 0
        self.connected_at = self.last_activity = self._silent_since = self._idle_since = monotonic()
        self._server = server
        self._home = home
        self._socket: Any = sock
        self._settings = settings
        self._peer_address = peer
        execute = home.engine.dispatcher.call_soon if home.executor is None else home.executor(self.id)
        self._strand = Strand(execute)
        self._strand.enter()  # until on_connect was called: the server's table is open to all, and they post
        self._flow = WriteFlow(settings.write_buffer_max)
        self._lock: Any = _LOCKS[lock_number(self.id)]
        self._state = life.OPEN
        self._reading = DELIVERING  # on_connect comes first; then the first receive is posted
        self._operation: Operation | None = None
        self._paused = False
        self._detour = False  # bytes may not go straight to on_data: paused, or TLS
        self._tls: TLSCodec | None = None
        self._shaking: Handshake | None = None  # the handshake that has to come first
        self._stash: list[bytes] | None = None
        self._eof_in = False
        self._eof_out = False  # send_eof() was called
        self._opened = False  # on_connect was called
        self._reason: CloseReason | None = None
        self._error: OSError | None = None
        self._timer: Deadline | None = None
        self._deadline: float | None = None
        self._linger_due: float | None = None
        self._relayed = 0  # buffers queued while it waits for its turn in the relay; 0: it does not wait
        self._retry_due: float | None = None
        self._retry_delay = RETRY_FIRST
        self._short: Recovery | None = None  # while a cap is less than was assigned
        self._burst: Burst | None = None  # while burst detection is in charge of the receiving
        self._burst_due: float | None = None
        self._closed_event: threading.Event | None = None
        self._trace: Trace | None = None  # made when it is first switched on
        self._logged = log.isEnabledFor(logging.DEBUG)  # asked once: it decides for begin and end
        self._next_size = self._first_size()

    def _attach_client(
        self, home: Home, connector: Connector | PipeConnector, settings: Settings, peer: Address
    ) -> None:
        """Give a connection that is not connected yet what stands in for its socket."""
        self._attach(None, home, connector, settings, peer)
        self._strand.leave()  # only who called connect() knows it: on_timeout may come before on_connect
        self._state = life.CONNECTING
        self._reading = POSTED  # the connector counts as something in flight
        self._opened = True  # on_close is owed in any case: it says why connecting failed
        if settings.trace:
            self._trace = Trace(settings.trace)
        connector.traced = self._traced

    def _connect_done(self, sock: OverlappedSocket | OverlappedPipe | None, error: OSError | None) -> None:
        """The connector is done. On an I/O thread."""
        with self._lock:
            if sock is not None and self._state == life.CONNECTING:
                error = self._connected(sock)
            elif sock is not None:
                sock.close()  # it was closed meanwhile
            if self._state == life.OPEN:
                # Posted under the lock: whoever ends it from now on posts on_close behind it.
                self._strand.post(self._begin, b"")
                return
            self._reading = IDLE
            code = getattr(error, "winerror", None) or 0
            timeout = isinstance(error, TimeoutError)
            self._fail(CloseReason.TIMEOUT if timeout else reason_of(code), error)
            self._join()

    def _connected(self, sock: OverlappedSocket | OverlappedPipe) -> OSError | None:
        """Take the socket over; returns why it cannot be. Needs the lock."""
        try:
            sock.set_nodelay(self._settings.nodelay)
            if self._settings.keepalive is not None:
                sock.set_keepalive(self._settings.keepalive)
        except OSError as exc:
            sock.close()
            return exc
        self._socket = sock
        self._peer_address = parse_sockaddr(sock.peer_raw) or self._peer_address
        self.connected_at = self.last_activity = monotonic()
        self._move(life.CONNECTED)
        self._reading = DELIVERING
        self._retrace()
        self._arm()
        return None

    def _first_size(self) -> int:
        """Bytes of a receive where nothing is known of the flow yet: a new connection is expected to talk."""
        mode = self._settings.recv_mode
        sizes = {"zero-byte": 0, "flow": self._settings.recv_size, "burst": BURST}
        return sizes.get(mode, SMALL_RECEIVE)

    # -- callbacks, overridden by Connection and its subclasses ---------------------------------------------

    def on_connect(self) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_eof(self) -> bool | None: ...
    def on_drain(self) -> None: ...
    def on_timeout(self, kind: str) -> bool | None: ...
    def on_close(self, exc: OSError | None) -> None: ...

    # -- what moves, in Channel and BurstChannel -------------------------------------------------------------

    def _begin(self, first: bytes) -> None: ...
    def _receive_for_close(self) -> None: ...
    def _flush(self) -> None: ...
    def _try_again(self) -> None: ...
    def _post_burst(self) -> None: ...
    def _burst_quiet(self, now: float) -> None: ...

    # -- over TLS, in TLSChannel ----------------------------------------------------------------------------

    def _finish_tls(self) -> bool: ...  # type: ignore[empty-body]
    def _handshake_late(self) -> None: ...
    def _post(self, task: Callable[..., object], *args: Any) -> None: ...
    def _go_on_with_files(self) -> None: ...

    def _call(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Run user code on the strand; what it raises closes this connection and nothing else."""
        try:
            return callback(*args)
        except BaseException as exc:
            self._callback_raised(exc)
            return None

    def _callback_raised(self, exc: BaseException) -> None:
        if isinstance(exc, ConnectionClosedError) and self._state != life.OPEN:
            return  # it sent on a connection that ended under it, which is nobody's mistake
        with self._lock:
            aborted = ConnectionAbortedError(errno.ECONNABORTED, f"a callback raised {type(exc).__name__}")
            aborted.__cause__ = exc
            self._fail(CloseReason.ERROR, aborted, reset=True)
        self._home.failed(self, exc)

    def _run(self, task: Callable[..., None], *args: Any) -> None:
        """Run a task on the strand: here and now where the strand is free and this is where its tasks belong.

        Only for handlers called by the dispatcher itself: anybody else may be inside another callback.
        """
        if self._home.executor is None and self._strand.enter():
            try:
                task(*args)
            finally:
                self._strand.leave_done()
        else:
            self._strand.post(task, *args)

    # -- closing --------------------------------------------------------------------------------------------

    def _move(self, event: str) -> bool:
        """Change the state by the table; True where there was such a change. Needs the lock."""
        assert self._lock._is_owned()
        state = life.TRANSITIONS.get((self._state, event))
        if state is None:
            return False
        self._state = state
        return True

    def _end_by(self, ending: Callable[..., None], *args: Any) -> None:
        """Take the lock and call `ending`; where a finalizer is what closes, do it later.

        A garbage collection may run one anywhere, inside a section that holds this very lock or another's.
        """
        lock = self._lock
        if lock._is_owned() or not lock.acquire(timeout=FINALIZER_PATIENCE):
            self._home.engine.dispatcher.call_soon(lambda: self._end_by(ending, *args))
            return
        try:
            ending(*args)
        finally:
            lock.release()

    def _close(self, reason: CloseReason) -> None:
        """Close gracefully: send what is queued, then FIN, then wait for the peer's. Needs the lock."""
        if self._move(life.CLOSE):
            self._reason = self._reason or reason
            if self._state == life.JOINING:  # it was not connected yet
                self._flow.clear()
                self._cancel()
                return
            self._stash = None
            self._linger_due = monotonic() + self._settings.linger_timeout
            self._receive_for_close()
            if self._relayed:
                self._flush()
            self._advance()
            self._arm()

    def _advance(self) -> None:
        """Take the next step towards the end where nothing is left to send. Needs the lock."""
        flow = self._flow
        if flow.queued or flow.sends or (self._state == life.OPEN and not self._eof_out):
            return
        if (self._tls is not None or self._shaking is not None) and not self._finish_tls():
            return
        if flow.files:
            return
        if self._state == life.OPEN:
            if self._eof_in:
                self._reason = self._reason or CloseReason.EOF
                self._move(life.CLOSE)
            else:
                self._socket.shutdown_send()
        if self._move(life.DRAINED) and not self._eof_in:
            self._socket.shutdown_send()
            self._linger_due = monotonic() + self._settings.linger_timeout
            self._arm()
        # A pipe's peer reads the end only when the handle is closed: waiting for its own would be in vain.
        if self._state == life.LINGERING and (self._eof_in or not self._socket.half_closes):
            self._move(life.FINISHED)
            self._cancel()
        self._join()

    def _fail(self, reason: CloseReason, exc: OSError | None, reset: bool = False) -> None:
        """End now: nothing more is sent or received. The first reason wins. Needs the lock."""
        assert self._lock._is_owned()
        if not self._move(life.FAIL):
            return
        self._reason = self._reason or reason
        self._error = self._error or exc
        self._flow.clear()
        self._stash = None
        if reset:
            self._socket.reset_on_close()
        self._cancel()

    def _cancel(self) -> None:
        """Cancel what is in flight, and join where nothing is. Needs the lock."""
        if self._reading == POSTED or self._flow.sends:
            self._socket.cancel()
        self._join()

    def _join(self) -> None:
        """Close the handle once the last packet is retired. Needs the lock."""
        if self._state != life.JOINING or self._reading == POSTED or self._flow.sends:
            return
        self._move(life.JOINED)
        self._socket.close()
        if self._timer is not None:
            self._home.engine.watchdog.cancel(self._timer)
            self._timer = None
        self._strand.post(self._deliver_close)

    def _deliver_close(self) -> None:
        """Call on_close, tell the server, let everything go. On the strand, as its last task."""
        operation, self._operation = self._operation, None
        if operation is not None:
            self._home.engine.proactor.give_receive(operation)
        # Handed over, not kept: the traceback of a callback that raised refers to this connection.
        error, self._error = self._error, None
        if self._opened:
            try:
                self.on_close(error)
            except BaseException as exc:
                self._home.failed(self, exc)
        with self._lock:
            self._opened = False
            event = self._closed_event
            if isinstance(self._socket, TracedSocket):
                self._retrace()  # a stand-in refers to its connection
        if self._logged:
            self._log_end(error)
        self._home.gone(self)
        if event is not None:
            event.set()

    # -- what can be seen of it -----------------------------------------------------------------------------

    def _in_use(self) -> InUse:
        """What is in use at this instant. Any thread, with the lock or without."""
        flow, operation, stash = self._flow, self._operation, self._stash
        queued, unread = flow.size, sum(map(len, stash or ()))
        posted = int(self._reading == POSTED and self._state != life.CONNECTING)
        room = operation.size if operation is not None else 0
        burst = self._burst
        if burst is not None:
            posted, unread, room = len(burst.posted), unread + burst.unread, room + burst.reserved
        return InUse(flow.sends, posted, queued, unread, queued + unread + room)

    def _knobs(self) -> Knobs:
        now = self._in_use()
        return None, now.sends, now.receives, now.queued

    def _retrace(self) -> None:
        """Have the socket's operations recorded by the traces that are on, or no longer. Needs the lock."""
        assert self._lock._is_owned()
        if self._state != life.CONNECTING:
            self._socket = self._traced(self._socket)

    def _traced(self, sock: Any) -> Any:
        """Return what stands in for a socket while it is traced. With no lock of ours, or any."""
        rings: Any = ()
        if self._state != life.CLOSED:
            rings = rings_of(self._trace, self._home.trace, self._home.engine.tracing)
        return traced(TracedSocket, sock, rings, self.id, self._knobs)

    def _log_begin(self) -> None:
        local = format_address(parse_sockaddr(self._socket.local_raw))
        log.debug("connection %d is open: %s, here %s", self.id, format_address(self._peer_address), local)

    def _log_end(self, error: OSError | None) -> None:
        log.debug(
            "connection %d with %s is closed: %s, %d bytes received, %d sent%s",
            self.id,
            format_address(self._peer_address),
            self._reason,
            self.bytes_received,
            self.bytes_sent,
            f" ({error})" if error is not None else "",
        )

    # -- time -----------------------------------------------------------------------------------------------

    def _next_due(self) -> float | None:
        """When this connection wants to be looked at. Needs the lock."""
        assert self._lock._is_owned()
        due: list[float] = []
        if self._retry_due is not None:
            due.append(self._retry_due)
        if self._linger_due is not None:
            due.append(self._linger_due)
        if self._burst_due is not None:
            due.append(self._burst_due)
        if self._short is not None and self._short.due is not None:
            due.append(self._short.due)
        if self._shaking is not None and self._shaking.due is not None:
            due.append(self._shaking.due)
        if self._state == life.OPEN:
            settings = self._settings
            if self._deadline is not None:
                due.append(self._deadline)
            if settings.idle_timeout is not None:
                due.append(max(self.last_activity, self._idle_since) + settings.idle_timeout)
            if settings.silent_timeout is not None and self._is_silent():
                due.append(self._silent_since + settings.silent_timeout)
        return min(due) if due else None

    def _arm(self) -> None:
        """Have `_on_time` called when something is due; one that comes early arms again. Needs the lock."""
        assert self._lock._is_owned()
        if self._state >= life.JOINING:
            return
        due = self._next_due()
        timer = self._timer
        if due is None or (timer is not None and timer.due <= due):
            return
        watchdog = self._home.engine.watchdog
        if timer is not None:
            watchdog.cancel(timer)
        self._timer = watchdog.at(due, self._on_time)

    def _on_time(self) -> None:
        """Look what is due. On the watchdog's thread."""
        with self._lock:
            timer, self._timer = self._timer, None
            if timer is not None:  # a newer one may have been armed since this one came up
                self._home.engine.watchdog.cancel(timer)
            now = monotonic()
            if self._retry_due is not None and self._retry_due <= now:
                self._retry_due = None
                self._try_again()
            if self._short is not None and self._short.due is not None and self._short.due <= now:
                self._recover(now)
            if self._burst_due is not None and self._burst_due <= now:
                self._burst_due = None
                self._burst_quiet(now)
            if self._linger_due is not None and self._linger_due <= now:
                self._linger_over(now)
            if self._shaking is not None and self._shaking.due is not None and self._shaking.due <= now:
                self._handshake_late()
            if self._state == life.OPEN:
                self._expire(now)
            self._arm()

    def _retry_later(self, knob: str, in_use: int) -> None:
        """The system was short of something: halve a cap and try again after a while, doubled each time.

        Needs the lock.
        """
        self._home.engine.count_retry()
        cap = getattr(self._settings, knob)
        if cap > 1 or self._short is not None:
            if self._short is None:
                self._short = Recovery()
            less = self._short.shrink(knob, cap, in_use)
            self._settings = change(self._settings, **{knob: less})
        if self._retry_due is None:
            self._retry_due = monotonic() + self._retry_delay
            self._retry_delay = min(RETRY_MAX, self._retry_delay * 2)
            self._arm()

    def _recover(self, now: float) -> None:
        """A while has passed since calls worked again: the next step towards the caps. Needs the lock."""
        short = self._short
        assert short is not None
        short.due = now + short.delay
        if self._state >= life.JOINING or not short.assigned:
            self._short = None  # a whole step has passed with the caps as they were assigned
            return
        caps = {knob: short.step(knob, getattr(self._settings, knob)) for knob in tuple(short.assigned)}
        self._settings = change(self._settings, **caps)
        self._try_again()

    def _linger_over(self, now: float) -> None:
        """The peer did not close for linger_timeout, or took nothing for even longer: end it."""
        patience = self.last_activity + max(DRAIN_PATIENCE_MIN, self._settings.linger_timeout)
        if self._state == life.DRAINING and patience > now:
            self._linger_due = patience
            return
        self._linger_due = None
        if self._state == life.DRAINING:
            self._fail(
                CloseReason.TIMEOUT, TimeoutError(errno.ETIMEDOUT, "the peer does not read"), reset=True
            )
        elif self._move(life.FINISHED):
            self._cancel()

    def _expire(self, now: float) -> None:
        settings = self._settings
        silent, idle = settings.silent_timeout, settings.idle_timeout
        if silent is not None and self._is_silent() and self._silent_since + silent <= now:
            text = f"not one byte came within silent_timeout={silent:g} s"
            self._fail(CloseReason.SILENT, TimeoutError(errno.ETIMEDOUT, text))
        elif self._deadline is not None and self._deadline <= now:
            self._deadline = None
            self._post(self._deliver_timeout, CloseReason.DEADLINE, "the deadline passed")
        elif idle is not None and max(self.last_activity, self._idle_since) + idle <= now:
            self._idle_since = now  # it comes again after another idle_timeout at the earliest
            burst = self._burst
            if self._reading != DELIVERING and (burst is None or not burst.delivering):
                # Else on_data is at work, or has just been, which is not idle.
                text = f"nothing came or went for {idle:g} s"
                self._post(self._deliver_timeout, CloseReason.IDLE, text, self.last_activity)

    def _is_silent(self) -> bool:
        return not self.bytes_received and not self._paused

    def _deliver_timeout(self, reason: CloseReason, text: str, seen: float | None = None) -> None:
        """Tell on_timeout, unless something came or went since the idleness was `seen`. On the strand."""
        if self._state != life.OPEN or (seen is not None and seen != self.last_activity):
            return
        if self._call(self.on_timeout, reason.value):
            return
        with self._lock:
            self._fail(reason, TimeoutError(errno.ETIMEDOUT, text))

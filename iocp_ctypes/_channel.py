"""L5: Channel, what moves inside a Connection: receiving, sending, closing, time.

Laws
1. Callbacks never overlap and come in order: they run on the strand. on_connect first, on_close last, each exactly
   once, whatever the others raised.
2. `_lock` guards state, write queue and the handle's life. It is held across issuing a call, which never blocks, and
   never while user code runs. What says "needs the lock" asserts it.
3. One receive at a time: `_reading` is IDLE (nothing posted and nobody delivering), POSTED (the kernel has it) or
   DELIVERING (its bytes are on the way to on_data, after which the next one is posted). So bytes stay in order, and
   what on_data does not take in stays with the peer, by TCP's own flow control.
4. Three steps to the end: JOINING (nothing new is issued, all is cancelled), joined (no packet outstanding), closed
   (closesocket, then on_close). The first reason wins.
5. "Closed" is decided by our own state, never by a status: what a cancelled operation reports differs from system to
   system.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from . import _lifecycle as life
from ._addresses import Address
from ._errors import RESOURCE_CODES, ConnectionClosedError, error_from_code, error_from_status, reason_of, winsock_code
from ._flow import SEND_SLICE_MAX, Piece, WriteFlow
from ._lifecycle import CloseReason
from ._options import Settings
from ._proactor import COMPLETED, PENDING, Operation
from ._sockops import OverlappedSocket
from ._strand import Strand

if TYPE_CHECKING:
    from ._deadlines import Deadline
    from .engine import Engine

#: Bytes of the receive that a connection in mode "auto" keeps posted while it talks: most requests and messages fit.
SMALL_RECEIVE: Final = 1024
#: Seconds between two messages up to which a connection counts as busy and keeps its small receive posted.
BUSY_GAP: Final = 1.0
#: Seconds before a call that the system had no resources for is tried again: doubled each time up to the second.
RETRY_FIRST: Final = 0.010
RETRY_MAX: Final = 1.0

IDLE, POSTED, DELIVERING = 0, 1, 2

_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True, slots=True)
class Home:
    """What all connections of one server share."""

    engine: Engine
    gone: Callable[[Any], None]  # called with the connection after on_close
    failed: Callable[[Any, BaseException], None]  # called with the connection when a callback raised
    executor: Callable[[int], Callable[[Callable[[], None]], None]] | None  # of pinned connections, by their id
    is_callback_thread: Callable[[], bool]


class Channel:
    """The machinery of a connection; Connection adds what users see."""

    __slots__ = (
        "__weakref__", "_closed_event", "_deadline", "_eof_in", "_eof_out", "_error", "_flow", "_home", "_linger_due",
        "_lock", "_next_size", "_opened", "_operation", "_paused", "_peer_address", "_reading", "_reason",
        "_retry_delay", "_retry_due", "_server", "_settings", "_socket", "_stash", "_state", "_strand", "_timer",
        "bytes_received", "bytes_sent", "connected_at", "data", "id", "last_activity",
    )

    def _attach(self, server: Any, home: Home, sock: OverlappedSocket, settings: Settings, peer: Address) -> None:
        """Give a connection its socket; what a subclass's `__init__` did or forgot does not matter here."""
        self.id = next(_numbers)
        self.data: Any = None
        self.bytes_received = self.bytes_sent = 0
        self.connected_at = self.last_activity = monotonic()
        self._server = server
        self._home = home
        self._socket = sock
        self._settings = settings
        self._peer_address = peer
        execute = home.engine.dispatcher.call_soon if home.executor is None else home.executor(self.id)
        self._strand = Strand(execute)
        self._flow = WriteFlow()
        self._lock = threading.Lock()
        self._state = life.OPEN
        self._reading = DELIVERING  # on_connect comes first; then the first receive is posted
        self._operation: Operation | None = None
        self._paused = False
        self._stash: list[bytes] | None = None
        self._eof_in = False
        self._eof_out = False  # send_eof() was called
        self._opened = False  # on_connect was called
        self._reason: CloseReason | None = None
        self._error: OSError | None = None
        self._timer: Deadline | None = None
        self._deadline: float | None = None
        self._linger_due: float | None = None
        self._retry_due: float | None = None
        self._retry_delay = RETRY_FIRST
        self._closed_event: threading.Event | None = None
        self._next_size = self._first_size()

    def _first_size(self) -> int:
        """Bytes of a receive where nothing is known of the flow yet: a new connection is expected to talk."""
        mode = self._settings.recv_mode
        return 0 if mode == "zero-byte" else self._settings.recv_size if mode == "flow" else SMALL_RECEIVE

    # -- callbacks, overridden by Connection and its subclasses ----------------------------------------------------

    def on_connect(self) -> None: ...
    def on_data(self, data: bytes) -> None: ...
    def on_eof(self) -> bool | None: ...
    def on_drain(self) -> None: ...
    def on_timeout(self, kind: str) -> bool | None: ...
    def on_close(self, exc: OSError | None) -> None: ...

    def _call(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Run user code on the strand; what it raises closes this connection and nothing else."""
        try:
            return callback(*args)
        except BaseException as exc:
            self._callback_raised(exc)
            return None

    def _callback_raised(self, exc: BaseException) -> None:
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
            task(*args)
            self._strand.leave()
        else:
            self._strand.post(task, *args)

    # -- the beginning ---------------------------------------------------------------------------------------------

    def _start(self, first: bytes) -> None:
        """Begin the callbacks; `first` came with the accept. On an I/O thread."""
        with self._lock:
            self._arm()
        self._run(self._open, first)

    def _open(self, first: bytes) -> None:
        self._opened = True
        self._call(self.on_connect)
        if first:
            self.bytes_received += len(first)
            self._deliver(first)
        else:
            self._receive_next()

    # -- receiving -------------------------------------------------------------------------------------------------

    def _received(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a receive. On an I/O thread; the usual case takes no lock before on_data."""
        self._reading = DELIVERING
        if status or not transferred or self._state != life.OPEN or self._paused:
            self._received_rarely(operation, transferred, status)
            return
        data = operation.buffer[:transferred]
        self.bytes_received += transferred
        now = monotonic()
        settings = self._settings
        if settings.recv_mode == "auto":
            if transferred >= SMALL_RECEIVE:
                self._next_size = settings.recv_size
            else:
                self._next_size = SMALL_RECEIVE if now - self.last_activity <= BUSY_GAP else 0
        self.last_activity = now
        if self._home.executor is None and self._strand.enter():
            self._deliver(data)
            self._strand.leave()
        else:
            self._strand.post(self._deliver, data)

    def _received_rarely(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a receive that failed, brought EOF, or came to a paused or closing connection."""
        eof = False
        with self._lock:
            if self._state >= life.JOINING:
                self._reading = IDLE
                self._join()
            elif status:
                self._reading = IDLE
                self._receive_failed(winsock_code(status) or status, status)
            elif operation.size == 0:
                # Bytes or EOF wait: only a receive with a buffer can tell, and it does not wait.
                self._reading = IDLE
                if not self._paused:
                    self._post_receive(self._settings.recv_size)
            elif self._state != life.OPEN:
                self._drop_received(transferred)
            elif transferred:
                self._stash_received(operation.buffer[:transferred])
            else:
                self._eof_in = True
                self._reading = IDLE
                eof = not self._paused  # else resume_reading delivers it, after what was stashed
        if eof:
            self._run(self._deliver_eof)

    def _drop_received(self, transferred: int) -> None:
        """Receive on while closing: nobody wants these bytes, but unread ones would turn our FIN into RST."""
        self._reading = IDLE
        if transferred:
            self._receive_for_close()
        else:
            self._eof_in = True
            self._advance()

    def _stash_received(self, data: bytes) -> None:
        """Keep what came to a paused connection. Needs the lock."""
        self.bytes_received += len(data)
        self.last_activity = monotonic()
        self._stash = [*(self._stash or ()), data]
        if self._paused:
            self._reading = IDLE
        else:  # resumed a moment ago
            self._strand.post(self._deliver_stash)

    def _deliver(self, data: bytes) -> None:
        """Hand bytes to on_data, then receive on. On the strand."""
        if self._paused:
            with self._lock:
                if self._paused and self._state == life.OPEN:
                    self._stash = [*(self._stash or ()), data]
                    self._reading = IDLE
                    return
        if self._state == life.OPEN:
            try:
                self.on_data(data)
            except BaseException as exc:
                self._callback_raised(exc)
        self._receive_next()

    def _deliver_stash(self) -> None:
        """Hand over what came while reading was paused, then receive on. On the strand."""
        while True:
            with self._lock:
                if self._state != life.OPEN or self._paused or not self._stash:
                    break
                data = self._stash.pop(0)
            self._call(self.on_data, data)
        if self._eof_in and not self._paused and self._state == life.OPEN:
            self._deliver_eof()
        else:
            self._receive_next()

    def _deliver_eof(self) -> None:
        self._reading = IDLE
        keep = self._call(self.on_eof)
        with self._lock:
            if self._state == life.OPEN:
                if not keep:
                    self._close(CloseReason.EOF)
                elif self._eof_out:
                    self._advance()

    def _receive_next(self) -> None:
        with self._lock:
            if self._state == life.OPEN and not self._paused and not self._eof_in:
                self._post_receive(self._next_size)
            else:
                self._reading = IDLE
                self._receive_for_close()

    def _receive_for_close(self) -> None:
        """While closing, receive and drop, to see the peer's EOF. Needs the lock."""
        if self._reading == IDLE and not self._eof_in and life.OPEN < self._state < life.JOINING:
            self._post_receive(SMALL_RECEIVE)

    def _post_receive(self, size: int) -> None:
        """Post one receive with a buffer of `size` bytes. Needs the lock."""
        assert self._lock.locked()
        operation = self._operation
        if operation is None or operation.size != size:
            pool = self._home.engine.proactor.pool
            if operation is not None:
                pool.give(operation)
            operation = self._operation = pool.take(size)
            operation.handler = self._received
        self._reading = POSTED  # before the call: the packet may be retired before it returns
        code = self._socket.receive(operation)
        if code == PENDING:
            return
        if code == COMPLETED:
            self._home.engine.dispatcher.completed(operation.address, operation.InternalHigh)
        else:
            self._reading = IDLE
            self._receive_failed(code, 0)

    def _receive_failed(self, code: int, status: int) -> None:
        """A receive could not be issued, or failed. Needs the lock."""
        if code in RESOURCE_CODES:
            self._retry_later()
        else:
            self._fail(reason_of(code), error_from_status(status) if status else error_from_code(code))

    # -- sending ---------------------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> bool:
        """Send bytes at once where nothing is before them, else queue them; what `Connection.send` returns."""
        with self._lock:
            flow = self._flow
            if self._state != life.OPEN or self._eof_out:
                raise ConnectionClosedError(f"connection {self.id} is closed for sending")
            length = len(data)
            if flow.queued or flow.sends >= self._settings.sendcap or not 0 < length <= SEND_SLICE_MAX:
                return self._send_queued((data,))
            if flow.in_flight + length > self._settings.write_buffer_max:
                return self._overflow()
            proactor = self._home.engine.proactor
            operation = proactor.pool.take(0)
            operation.load(data)
            code = self._socket.send(operation, self._sent)
            if code == COMPLETED and operation.InternalHigh == length:
                proactor.pool.give(operation)
                self.bytes_sent += length
                self.last_activity = monotonic()
                return not flow.above
            self._issued(operation, code, [Piece(data, 0, length)])
            return flow.mark(self._settings.high_mark)

    def _send_queued(self, buffers: Sequence[bytes]) -> bool:
        """Queue buffers and send as much as may be in flight. Needs the lock."""
        assert self._lock.locked()
        if self._state != life.OPEN or self._eof_out:
            raise ConnectionClosedError(f"connection {self.id} is closed for sending")
        flow = self._flow
        if flow.size + sum(map(len, buffers)) > self._settings.write_buffer_max:
            return self._overflow()
        for data in buffers:
            if data:
                flow.push(data)
        self._flush()
        return flow.mark(self._settings.high_mark)

    def _overflow(self) -> bool:
        """The peer does not read: end it, rather than keep everything for it. Needs the lock."""
        most = self._settings.write_buffer_max
        text = f"more than write_buffer_max={most} bytes were waiting to be sent"
        self._fail(CloseReason.OVERFLOW, OSError(errno.ENOBUFS, text), reset=True)
        return False

    def _flush(self) -> None:
        """Issue sends of what is queued, as many as sendcap allows. Needs the lock."""
        assert self._lock.locked()
        flow = self._flow
        pool = self._home.engine.proactor.pool
        while flow.queued and flow.sends < self._settings.sendcap and self._retry_due is None:
            pieces, length = flow.take()
            operation = pool.take(0)
            if len(pieces) == 1 and length == len(pieces[0].data):
                operation.load(pieces[0].data)
                code = self._socket.send(operation, self._sent)
            else:
                vector, count = operation.load_pieces(pieces)
                code = self._socket.send(operation, self._sent, vector, count)
            if not self._issued(operation, code, pieces):
                return

    def _issued(self, operation: Operation, code: int, pieces: list[Piece]) -> bool:
        """Account for a send that was issued; False where sending cannot go on now. Needs the lock."""
        flow = self._flow
        if code == PENDING:
            flow.sends += 1
            flow.in_flight += operation.length
            return True
        length, sent = operation.length, int(operation.InternalHigh)
        self._home.engine.proactor.pool.give(operation)
        if code == COMPLETED:
            self.bytes_sent += sent
            if sent == length:
                return True
            return self._short(pieces, sent)
        if code in RESOURCE_CODES:
            flow.push_front(pieces)
            self._retry_later()
        else:
            self._fail(reason_of(code), error_from_code(code))
        return False

    def _short(self, pieces: list[Piece], sent: int) -> bool:
        """A send took only a part: send the rest first, or give up where later bytes are under way already."""
        if self._flow.sends:
            self._fail(CloseReason.ABORTED, OSError(errno.EIO, "a send was cut short with others behind it"), reset=True)
            return False
        self._flow.push_front(pieces, sent)
        return True

    def _sent(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire a send. On an I/O thread."""
        kept, length = operation.keep, operation.length
        with self._lock:
            flow = self._flow
            flow.sends -= 1
            flow.in_flight -= length
            self._home.engine.proactor.pool.give(operation)
            if self._state >= life.JOINING:
                self._join()
                return
            self.bytes_sent += transferred
            self.last_activity = monotonic()
            if transferred != length or status:
                pieces = kept if isinstance(kept, list) else [Piece(kept, 0, length)]
                code = winsock_code(status) or status
                if not status or code in RESOURCE_CODES:
                    if self._short(pieces, transferred) and status:
                        self._retry_later()
                else:
                    self._fail(reason_of(code), error_from_status(status))
            self._flush()
            relieved = self._state == life.OPEN and flow.relieved(self._settings.low_mark)
            self._advance()
        if relieved:
            self._run(self._call, self.on_drain)

    def _retry_later(self) -> None:
        """The system was short of something: try again after a while, doubled each time. Needs the lock."""
        self._home.engine.count_retry()
        if self._retry_due is None:
            self._retry_due = monotonic() + self._retry_delay
            self._retry_delay = min(RETRY_MAX, self._retry_delay * 2)
            self._arm()

    # -- closing ---------------------------------------------------------------------------------------------------

    def _move(self, event: str) -> bool:
        """Change the state by the table; True where there was such a change. Needs the lock."""
        assert self._lock.locked()
        state = life.TRANSITIONS.get((self._state, event))
        if state is None:
            return False
        self._state = state
        return True

    def _close(self, reason: CloseReason) -> None:
        """Close gracefully: send what is queued, then FIN, then wait for the peer's. Needs the lock."""
        if self._move(life.CLOSE):
            self._reason = self._reason or reason
            self._stash = None
            self._linger_due = monotonic() + self._settings.linger_timeout
            self._receive_for_close()
            self._advance()
            self._arm()

    def _advance(self) -> None:
        """Take the next step towards the end where nothing is left to send. Needs the lock."""
        if self._flow.queued or self._flow.sends:
            return
        if self._state == life.OPEN and self._eof_out:
            if self._eof_in:
                self._reason = self._reason or CloseReason.EOF
                self._move(life.CLOSE)
            else:
                self._socket.shutdown_send()
        if self._move(life.DRAINED):
            if not self._eof_in:
                self._socket.shutdown_send()
                self._linger_due = monotonic() + self._settings.linger_timeout
                self._arm()
        if self._state == life.LINGERING and self._eof_in:
            self._move(life.FINISHED)
        self._join()

    def _fail(self, reason: CloseReason, exc: OSError | None, reset: bool = False) -> None:
        """End now: nothing more is sent or received. The first reason wins. Needs the lock."""
        assert self._lock.locked()
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
            self._home.engine.proactor.pool.give(operation)
        if self._opened:
            try:
                self.on_close(self._error)
            except BaseException as exc:
                self._home.failed(self, exc)
        with self._lock:
            self._opened = False
            event = self._closed_event
        self._home.gone(self)
        if event is not None:
            event.set()

    # -- time ------------------------------------------------------------------------------------------------------

    def _next_due(self) -> float | None:
        """When this connection wants to be looked at. Needs the lock."""
        due = [at for at in (self._retry_due, self._linger_due) if at is not None]
        if self._state == life.OPEN:
            settings = self._settings
            if self._deadline is not None:
                due.append(self._deadline)
            if settings.idle_timeout is not None:
                due.append(self.last_activity + settings.idle_timeout)
            if settings.silent_timeout is not None and not self.bytes_received:
                due.append(self.connected_at + settings.silent_timeout)
        return min(due) if due else None

    def _arm(self) -> None:
        """Have `_on_time` called when something is due; a timer that comes too early finds nothing and arms again.

        Needs the lock.
        """
        assert self._lock.locked()
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
            self._timer = None
            now = monotonic()
            if self._retry_due is not None and self._retry_due <= now:
                self._retry_due = None
                self._try_again()
            if self._linger_due is not None and self._linger_due <= now:
                self._linger_over(now)
            if self._state == life.OPEN:
                self._expire(now)
            self._arm()

    def _try_again(self) -> None:
        if self._state >= life.JOINING:
            return
        if self._state == life.OPEN and self._reading == IDLE and not self._paused and not self._eof_in:
            self._post_receive(self._next_size)
        self._receive_for_close()
        self._flush()
        if self._retry_due is None:
            self._retry_delay = RETRY_FIRST
        self._advance()

    def _linger_over(self, now: float) -> None:
        """The peer took nothing, or did not close, for linger_timeout: end it. A peer that still reads gets on."""
        patience = self.last_activity + self._settings.linger_timeout
        if self._state == life.DRAINING and patience > now:
            self._linger_due = patience
            return
        self._linger_due = None
        if self._state == life.DRAINING:
            self._fail(CloseReason.TIMEOUT, TimeoutError(errno.ETIMEDOUT, "the peer does not read"), reset=True)
        elif self._move(life.FINISHED):
            self._cancel()

    def _expire(self, now: float) -> None:
        settings = self._settings
        silent, idle = settings.silent_timeout, settings.idle_timeout
        if silent is not None and not self.bytes_received and self.connected_at + silent <= now:
            text = f"not one byte came within silent_timeout={silent:g} s"
            self._fail(CloseReason.SILENT, TimeoutError(errno.ETIMEDOUT, text))
        elif self._deadline is not None and self._deadline <= now:
            self._deadline = None
            self._strand.post(self._deliver_timeout, CloseReason.DEADLINE, "the deadline passed")
        elif idle is not None and self.last_activity + idle <= now:
            self.last_activity = now  # so that it comes again only after another idle_timeout
            self._strand.post(self._deliver_timeout, CloseReason.IDLE, f"nothing came or went for {idle:g} s")

    def _deliver_timeout(self, reason: CloseReason, text: str) -> None:
        if self._state != life.OPEN or self._call(self.on_timeout, reason.value):
            return
        with self._lock:
            self._fail(reason, TimeoutError(errno.ETIMEDOUT, text))

"""L5: DatagramChannel, the moving datagrams of a Datagram: receiving, sending, the end.

Laws
1. Receives are numbered when they are posted, under the lock, and the kernel fills them in that order; with
   several I/O threads they are put into that order again. Callbacks never overlap: they run on a strand.
2. A receive is free, with the kernel, or on its way to the callback that it is posted again after. So what
   is kept is bounded by recv_depth; what comes meanwhile waits in the kernel, which drops what it cannot
   hold. At most one delivery waits on the strand, however much it has to deliver.
3. No peer, no ICMP error and no raising callback ends the receiving: a datagram socket serves many, and one
   of them must not end it for the others. Only close() and abort() do.
4. A datagram is sent at once, or waits in the queue where the kernel has no room, or is dropped and counted
   above write_buffer_max. Never in parts.
5. The end has three steps: nothing new is issued and all is cancelled; each receive has come back; the
   handle is closed and on_close called, once, as the last callback.
6. `_lock` guards state, queue and handle. It is held across issuing a call, never while user code runs.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from . import _lifecycle as life
from ._addresses import Address, format_address, parse_sockaddr
from ._datagramops import (
    EARLIER_CODES,
    ICMP_CODES,
    STATUS_BUFFER_OVERFLOW,
    DatagramReceive,
    DatagramSocket,
    Target,
)
from ._datagramoptions import DatagramSettings, destination
from ._errors import (
    ERROR_OPERATION_ABORTED,
    RESOURCE_CODES,
    error_from_code,
    error_from_status,
    winsock_code,
)
from ._lifecycle import CloseReason
from ._lifetime import RETRY_FIRST, RETRY_MAX
from ._proactor import COMPLETED, PENDING, Operation
from ._strand import Strand
from ._tracing import Knobs, TracedDatagrams, other_number, rings_of, traced
from .engine import Engine, enter_engine

if TYPE_CHECKING:
    from ._deadlines import Deadline

#: Addresses remembered in each direction: peers that talk again cost a look into a dict.
ADDRESSES_MAX: Final = 1024
#: What a queued datagram counts besides its bytes, so that a queue of empty ones is bounded, too.
QUEUED_OVERHEAD: Final = 64
#: Queued datagrams sent in one turn; then others have theirs.
FLUSH_MAX: Final = 64
#: Calls of on_error waiting at once; what fails above that is only counted.
ERRORS_WAITING_MAX: Final = 64
#: ICMP errors that posting receives may report in one turn before it backs off.
EARLIER_MAX: Final = 64

log = logging.getLogger("iocp_ctypes")


class _Backoff:
    """When something is tried again that the system had no resources for. Needs the lock."""

    __slots__ = ("delay", "timer")

    def __init__(self) -> None:
        self.delay = RETRY_FIRST
        self.timer: Deadline | None = None

    def arm(self, engine: Engine, action: Callable[[], None]) -> None:
        engine.count_retry()
        if self.timer is None:
            self.timer = engine.watchdog.later(self.delay, action)
            self.delay = min(RETRY_MAX, self.delay * 2)


class DatagramChannel:
    """A datagram socket's state, receives, sends and end; Datagram adds what users see."""

    def __init__(
        self, sock: DatagramSocket, settings: DatagramSettings, dualstack: bool, engine: Engine | None
    ) -> None:
        """Take a bound socket over; `_begin` begins to receive."""
        self._settings = settings
        self._socket = sock  # or what stands in for it while it is traced
        self._trace_number = 0
        self._dualstack = dualstack
        self._given = engine
        self._address = sock.address
        self._remote: Address | None = None
        self._remote_target: Target | None = None
        self._lock: Any = threading.RLock()
        self._state = life.CONNECTING  # not started
        self._started = False
        self.close_reason: CloseReason | None = None
        self._closed_event = threading.Event()
        self._linger: Deadline | None = None
        self._error: OSError | None = None
        self._engine: Any = None
        self._strand: Any = None
        self._prepare()
        sock.report_unreachable(self._reporting)

    def _prepare(self) -> None:
        """Make what receiving and sending need."""
        size, received = self._settings.recv_size, self._received
        self._free = [DatagramReceive(size, received) for _ in range(self._settings.recv_depth)]
        self._arrived: dict[int, DatagramReceive] = {}  # by number: retired, and not delivered yet
        # Who pops the token posts a delivery, which gives it back before it looks at what has arrived: so
        # what arrives while there is none to pop is seen. A list, for the reason that Strand has.
        self._due = [True]
        self._number = 0  # of the next receive to be posted
        self._next = 0  # number of the next one to be delivered; the strand's
        self._senders: dict[bytes, Address] = {}
        self._targets: dict[Any, Target] = {}
        self._queue: deque[tuple[bytes, Target]] = deque()
        self._queued = 0
        self._sending: Operation | None = None  # the overlapped send of the queue's head
        self._above = False
        self._drain_waits = False  # a call of on_drain waits on the strand
        self._receive_backoff = _Backoff()
        self._send_backoff = _Backoff()
        self._groups: set[tuple[Any, Any, Any]] = set()
        self._errors_waiting = 0
        self._datagrams_in = self._bytes_in = self._oversize = self._receive_errors = 0
        self._datagrams_out = self._bytes_out = self._send_errors = self._dropped = 0
        self._callback_errors = 0

    def on_datagram(self, data: bytes, address: Address) -> None: ...
    def on_oversize(self, data: bytes, address: Address) -> None: ...
    def on_error(self, exc: OSError) -> None: ...
    def on_drain(self) -> None: ...
    def on_close(self, exc: OSError | None) -> None: ...
    def handle_error(self, exc: BaseException) -> None: ...

    def _begin(self) -> None:
        """Enter an engine and post the receives."""
        with self._lock:
            if self._started or self._state != life.CONNECTING:
                raise RuntimeError("a Datagram is started once: make another")
            self._started = True
        try:
            io_threads = self._settings.io_threads
            engine = enter_engine(self, self._at_exit, self._given, io_threads, retrace=self._retrace)
            try:
                with self._lock:  # close() may come any moment, and must not take the handle away meanwhile
                    if self._state == life.CONNECTING:
                        self._socket.attach(engine.proactor, engine.port)
            except BaseException:
                engine.leave_soon(self)
                raise
        except BaseException:
            with self._lock:
                self._started = False
                if self._state == life.CLOSED:
                    self._closed_event.set()
            raise
        with self._lock:
            self._engine = engine
            self._strand = Strand(engine.dispatcher.call_soon)
            self._trace_socket()
            if self._state == life.CONNECTING:
                self._move(life.CONNECTED)
                self._fill()
            else:  # closed meanwhile
                self._strand.post(self._deliver_close)

    # -- the trace ----------------------------------------------------------------------------------------

    def _retrace(self) -> None:
        """The engine's trace was switched. Any thread."""
        with self._lock:
            self._trace_socket()

    def _trace_socket(self) -> None:
        """Have the socket's operations recorded by the engine, or no longer. Needs the lock."""
        assert self._lock._is_owned()
        engine = self._engine
        if engine is None:
            return
        rings = () if self._state == life.CLOSED else rings_of(engine.tracing)
        if rings and not self._trace_number:
            self._trace_number = other_number()
        self._socket = traced(TracedDatagrams, self._socket, rings, self._trace_number, self._knobs)

    def _knobs(self) -> Knobs:
        receives = self._settings.recv_depth - len(self._free)
        return None, int(self._sending is not None), receives, self._queued

    # -- receiving ----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Post what is free. Needs the lock."""
        assert self._lock._is_owned()
        earlier = 0
        while self._free and self._state == life.OPEN and self._receive_backoff.timer is None:
            operation = self._free.pop()
            operation.number = self._number
            self._number += 1
            code = self._socket.receive(operation)
            if code == PENDING:
                continue
            if code == COMPLETED:
                self._engine.dispatcher.completed(operation.address, operation.size)
                continue
            self._number -= 1
            self._free.append(operation)
            self._receive_errors += 1
            if code not in RESOURCE_CODES:
                self._report(error_from_code(code, "receiving"))
            earlier += 1
            if code not in ICMP_CODES or earlier > EARLIER_MAX:
                self._receive_backoff.arm(self._engine, self._fill_again)

    def _fill_again(self) -> None:
        with self._lock:
            self._receive_backoff.timer = None
            self._fill()

    def _received(self, operation: Any, transferred: int, status: int) -> None:
        """Retire a receive. On an I/O thread."""
        operation.transferred = transferred
        operation.status = status
        self._arrived[operation.number] = operation
        strand = self._strand
        if strand.enter():
            self._deliver()
            strand.leave()
        else:
            self._post_delivery()

    def _post_delivery(self) -> None:
        """Have `_deliver` called, unless a delivery waits that has not looked yet. Any thread."""
        try:
            self._due.pop()
        except IndexError:
            return
        self._strand.post(self._deliver_due)

    def _deliver_due(self) -> None:
        """Deliver what was posted for. On the strand."""
        self._due.append(True)
        self._deliver()

    def _deliver(self) -> None:
        """Deliver what has come, in the order of posting. On the strand."""
        for _ in range(self._settings.recv_depth):
            operation = self._arrived.pop(self._next, None)
            if operation is None:
                return
            self._next += 1
            if self._state == life.OPEN:
                if operation.status:
                    self._deliver_unusual(operation)
                else:
                    size = operation.transferred
                    self._datagrams_in += 1
                    self._bytes_in += size
                    data = operation.buffer[:size]
                    self._call(self.on_datagram, data, self._sender(operation))
            with self._lock:
                self._free.append(operation)
                if self._state == life.OPEN:
                    self._fill()
                else:
                    self._join()
        if self._next in self._arrived:
            self._post_delivery()  # others have their turn first

    def _deliver_unusual(self, operation: DatagramReceive) -> None:
        """Deliver a receive that brought an oversize datagram or an error. On the strand."""
        status = operation.status & 0xFFFFFFFF
        if status == STATUS_BUFFER_OVERFLOW:
            self._oversize += 1
            data = operation.buffer[: min(operation.transferred, operation.size)]
            self._call(self.on_oversize, data, self._sender(operation))
            return
        with self._lock:
            self._receive_errors += 1
            code = winsock_code(status)
            if code not in ICMP_CODES and self._state == life.OPEN:
                self._receive_backoff.arm(self._engine, self._fill_again)
        if self._reporting and code not in RESOURCE_CODES and code != ERROR_OPERATION_ABORTED:
            self._call(self.on_error, error_from_status(status, "receiving"))

    def _sender(self, operation: DatagramReceive) -> Address:
        """Return who sent what a receive brought. On the strand."""
        self._receive_backoff.delay = RETRY_FIRST
        raw = self._socket.sender(operation)
        address = self._senders.get(raw)
        if address is None:
            if len(self._senders) >= ADDRESSES_MAX:
                self._senders.clear()
            address = self._senders[raw] = parse_sockaddr(raw) or ("", 0)
        return address

    @property
    def _reporting(self) -> bool:
        chosen = self._settings.report_errors
        return self._remote is not None if chosen is None else chosen

    def _report(self, exc: OSError) -> None:
        """Have on_error called, where that was opted for. Needs the lock."""
        assert self._lock._is_owned()
        if self._reporting and self._errors_waiting < ERRORS_WAITING_MAX and self._state == life.OPEN:
            self._errors_waiting += 1
            self._strand.post(self._deliver_error, exc)

    def _deliver_error(self, exc: OSError) -> None:
        with self._lock:
            self._errors_waiting -= 1
        if self._state == life.OPEN:
            self._call(self.on_error, exc)

    def _call(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run user code; what it raises is told, and that is all. On the strand."""
        try:
            callback(*args)
        except BaseException as exc:
            with self._lock:
                self._callback_errors += 1
            try:
                self.handle_error(exc)
            except BaseException:
                log.exception("handle_error of datagrams at %s raised", format_address(self._address))

    # -- sending ------------------------------------------------------------------------------------------
    def _target(self, address: Any) -> Target:
        if address is None:
            if self._remote_target is None:
                raise ValueError("address=None: must be (host, port), for connect() was not called")
            return self._remote_target
        target = Target(*destination(self._socket.family, self._socket.kind, self._dualstack, address))
        if len(self._targets) >= ADDRESSES_MAX:
            self._targets.clear()
        self._targets[address] = target
        return target

    def _try_send(self, data: bytes, target: Target) -> int:
        """Send without waiting: COMPLETED, or why not; all but a lack of room is told. Needs the lock."""
        assert self._lock._is_owned()
        code = self._socket.send_now(data, target)
        if code in EARLIER_CODES:  # this one was not looked at
            self._count_earlier(code)
            code = self._socket.send_now(data, target)
        if code not in RESOURCE_CODES:
            self._count_sent(code, len(data))
        return code

    def _count_earlier(self, code: int) -> None:
        """Account for a send that told of an earlier datagram. Needs the lock."""
        assert self._lock._is_owned()
        self._receive_errors += 1
        self._report(error_from_code(code, "an earlier datagram"))

    def _count_sent(self, code: int, size: int) -> None:
        """Needs the lock."""
        assert self._lock._is_owned()
        if code == COMPLETED:
            self._datagrams_out += 1
            self._bytes_out += size
            return
        self._send_errors += 1
        self._report(error_from_code(code, "sending"))

    def _enqueue(self, data: bytes, target: Target) -> bool:
        """Queue a datagram, or drop it. Needs the lock."""
        assert self._lock._is_owned()
        cost = len(data) + QUEUED_OVERHEAD
        if self._queued + cost > self._settings.write_buffer_max:
            self._above = bool(self._queue)
            self._dropped += 1
            return False
        self._queue.append((data, target))
        self._queued += cost
        if self._queued > self._settings.high_mark:
            self._above = True
        relieved = not self._above
        if self._sending is None and self._send_backoff.timer is None:
            self._send_head()
            self._relieve()
        return relieved

    def _send_head(self) -> None:
        """Issue a send of the queue's head whose packet says when there is room. Needs the lock."""
        assert self._lock._is_owned()
        while self._queue:
            data, target = self._queue[0]
            self._sending = operation = Operation()
            code = self._socket.send(operation, self._sent, data, target)
            if code in EARLIER_CODES:
                self._count_earlier(code)
                code = self._socket.send(operation, self._sent, data, target)
            if code == PENDING:
                return
            self._sending = None
            if code in RESOURCE_CODES:
                self._send_backoff.arm(self._engine, self._send_again)
                return
            self._take_head()
            self._count_sent(code, len(data))

    def _take_head(self) -> int:
        """Remove the queue's head; returns its size. Needs the lock."""
        assert self._lock._is_owned()
        size = len(self._queue.popleft()[0])
        self._queued -= size + QUEUED_OVERHEAD
        return size

    def _send_again(self) -> None:
        with self._lock:
            self._send_backoff.timer = None
            self._flush()

    def _sent(self, _operation: Operation, _transferred: int, status: int) -> None:
        """Retire an overlapped send. On an I/O thread."""
        with self._lock:
            self._sending = None
            if self._queue:  # not after an abort
                self._count_sent(winsock_code(status) or status, self._take_head())
                self._send_backoff.delay = RETRY_FIRST
            self._flush()
            self._join()

    def _flush(self) -> None:
        """Send what is queued, a turn's worth. Needs the lock."""
        assert self._lock._is_owned()
        if self._state > life.DRAINING:
            return
        for _ in range(FLUSH_MAX):
            if not self._queue or self._try_send(*self._queue[0]) in RESOURCE_CODES:
                break
            self._take_head()
        self._send_head()
        self._relieve()
        if self._state == life.DRAINING and not self._queue:
            self._end()

    def _relieve(self) -> None:
        """Have on_drain called once the queue fell from above the high mark to the low. Needs the lock."""
        assert self._lock._is_owned()
        if self._above and self._queued <= self._settings.low_mark:
            self._above = False
            if self._state == life.OPEN and not self._drain_waits:
                self._drain_waits = True
                self._strand.post(self._deliver_drain)

    def _deliver_drain(self) -> None:
        with self._lock:
            self._drain_waits = False
        if self._state == life.OPEN:
            self._call(self.on_drain)

    # -- the end ------------------------------------------------------------------------------------------
    def _fail(self, reason: CloseReason, exc: OSError | None) -> None:
        with self._lock:
            if self._move(life.FAIL):
                self.close_reason = self.close_reason or reason
                self._error = exc
                self._end()

    def _linger_over(self) -> None:
        with self._lock:
            text = f"{len(self._queue)} queued datagrams were not sent within linger_timeout"
            if self._state == life.DRAINING:
                self.close_reason = None
                self._fail(CloseReason.TIMEOUT, TimeoutError(errno.ETIMEDOUT, text))

    def _move(self, event: str) -> bool:
        """Change the state by the table; True where there was such a change. Needs the lock."""
        assert self._lock._is_owned()
        state = life.TRANSITIONS.get((self._state, event))
        if state is None:
            return False
        self._state = state
        return True

    def _end(self) -> None:
        """Cancel what is in flight, and join. Needs the lock."""
        assert self._lock._is_owned()
        # Datagrams have no FIN to send and none to wait for.
        self._move(life.DRAINED)
        self._move(life.FINISHED)
        self._dropped += len(self._queue)
        self._queue.clear()
        self._queued = 0
        for timer in (self._linger, self._receive_backoff.timer, self._send_backoff.timer):
            if timer is not None:
                self._engine.watchdog.cancel(timer)
        if self._sending is not None or len(self._free) < self._settings.recv_depth:
            self._socket.cancel()
        self._join()

    def _join(self) -> None:
        """Close the handle once nothing is in flight or on its way to a callback. Needs the lock."""
        assert self._lock._is_owned()
        if self._state != life.JOINING or self._sending is not None:
            return
        if len(self._free) < self._settings.recv_depth:
            return
        self._move(life.JOINED)
        self._socket.close()
        for operation in self._free:
            operation.handler = None  # which refers to us
        self._free.clear()
        if self._engine is not None:
            self._strand.post(self._deliver_close)
        elif not self._started:
            self._closed_event.set()

    def _deliver_close(self) -> None:
        """Call on_close, leave the engine. On the strand, as its last task."""
        self._call(self.on_close, self._error)
        self._retrace()
        self._closed_event.set()
        self._engine.leave_soon(self)

    def _at_exit(self) -> None:
        """The interpreter ends."""
        self._fail(CloseReason.SHUTDOWN, None)

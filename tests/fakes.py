"""Stand-ins for what is below a connection: a completion port, a socket, a dispatcher, a watchdog, an engine.

They do what the kernel may do and seldom does when a test looks: complete a call before it returns, on
another thread, only in part, or hold its packet back for as long as the test likes. The suite in
bound/test_fakes.py runs against them and against the real ones, so that they stay true.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from iocp_ctypes._deadlines import Deadline, Deadlines
from iocp_ctypes._errors import STATUS_CANCELLED, error_from_code
from iocp_ctypes._flow import SEND_GATHER_MAX
from iocp_ctypes._proactor import COMPLETED, PENDING, Operation, Proactor
from iocp_ctypes._tracing import Trace

STATUS_SUCCESS: Final = 0
STATUS_RESET: Final = 0xC000020D
#: The statuses with which systems complete what was pending when its connection was closed here.
LOCAL_CLOSE_STATUSES: Final = (STATUS_CANCELLED, STATUS_RESET, 0xC000013B, 0x8000000A, 0xC0000024)


# -- the port -----------------------------------------------------------------------------------------------


class _Waiter:
    """A thread in `reap`; it is handed its packets by who queues them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.woken = threading.Semaphore(0)
        self.packets: list[tuple[Any, int]] = []


class FakePort:
    """A CompletionPort in memory; `lifo` wakes the thread that came last, as Windows does, else the first."""

    def __init__(self, lifo: bool = False) -> None:
        self.lifo = lifo
        self.posts = 0
        self.associated: set[int] = set()
        self._lock = threading.Lock()
        self._packets: deque[tuple[Any, int]] = deque()
        self._waiting: list[_Waiter] = []
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many threads wait for packets."""
        with self._lock:
            return len(self._waiting)

    def associate(self, handle: int) -> None:
        self._check("the completion port is closed")
        if handle in self.associated:
            raise error_from_code(87, "the socket already belongs to another completion port")
        self.associated.add(handle)

    def post(self) -> None:
        self._check("PostQueuedCompletionStatus")
        self.posts += 1
        self.put((0, 0))

    def put(self, *packets: tuple[Any, int]) -> None:
        """Queue packets, all at once: who is woken gets as many as fit its batch."""
        with self._lock:
            self._packets.extend(packets)
            while self._packets and self._waiting:
                waiter = self._waiting.pop(-1 if self.lifo else 0)
                waiter.packets = self._take(waiter.size)
                waiter.woken.release()

    def reap(self, batch: Any, timeout_ms: int, ready: deque[tuple[Any, int]]) -> int:
        self._check("GetQueuedCompletionStatusEx")
        with self._lock:
            packets = self._take(batch.size)
            if not packets and timeout_ms:
                waiter = _Waiter(batch.size)
                self._waiting.append(waiter)
        if not packets and timeout_ms:
            waiter.woken.acquire(timeout=None if timeout_ms == 0xFFFFFFFF else timeout_ms / 1000)
            with self._lock:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                packets = waiter.packets
        ready.extend(packets)
        return len(packets)

    def close(self) -> None:
        self._closed = True

    def _take(self, size: int) -> list[tuple[Any, int]]:
        return [self._packets.popleft() for _ in range(min(size, len(self._packets)))]

    def _check(self, what: str) -> None:
        if self._closed:
            raise error_from_code(6, what)


# -- the dispatcher, the watchdog, the engine -------------------------------------------------------------


class FakeDispatcher:
    """Serves on the thread that calls `run`, one thing after another, when the test says so.

    Where the test says that it is `crowded`, what may be deferred is served after what is ready.
    """

    def __init__(self, proactor: Proactor) -> None:
        self.crowded = False
        self.ready: deque[tuple[Any, int]] = deque()
        self.served = 0
        self._proactor = proactor
        self._mine = threading.local()

    def call_soon(self, function: Callable[[], None]) -> None:
        self.ready.append((function, 0))

    def completed(self, address: int, transferred: int) -> None:
        self.ready.append((address, transferred))

    def defer(self, function: Callable[[], None]) -> bool:
        if self.crowded:
            self.ready.append((function, 0))
        return self.crowded

    def is_io_thread(self) -> bool:
        return getattr(self._mine, "serving", False)

    def is_serving(self) -> bool:
        return self.is_io_thread()

    def run(self, most: int = 1 << 30) -> int:
        """Serve what is ready and what becomes ready by it; return how much that was."""
        count = 0
        while self.ready and count < most:
            self.serve(*self.ready.popleft())
            count += 1
        return count

    def serve(self, what: Any, transferred: int) -> None:
        """Do what an I/O thread does with one thing that is ready."""
        self._mine.serving = True
        self.served += 1
        operation = self._proactor.pending.pop(what, None)
        if operation is not None:
            operation.handler(operation, transferred, operation.Internal)  # type: ignore[misc]
        elif what:
            what()
        self._mine.serving = False

    def serve_elsewhere(self, what: Any, transferred: int) -> threading.Thread:
        """Do it on another thread, which is returned."""
        thread = threading.Thread(target=self.serve, args=(what, transferred))
        thread.start()
        return thread


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeWatchdog:
    """A watchdog without a thread: `advance` lets time pass and calls what is due, in order."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.deadlines = Deadlines()

    def at(self, due: float, action: Callable[[], None]) -> Deadline:
        return self.deadlines.add(due, action)

    def later(self, seconds: float, action: Callable[[], None]) -> Deadline:
        return self.at(self.clock() + seconds, action)

    def cancel(self, entry: Deadline) -> None:
        self.deadlines.cancel(entry)

    def __len__(self) -> int:
        return len(self.deadlines)

    def advance(self, seconds: float) -> None:
        """Let time pass, stopping at each deadline on the way."""
        end = self.clock.now + seconds
        while (due := self.deadlines.next_due()) is not None and due <= end:
            self.clock.now = max(self.clock.now, due)
            for action in self.deadlines.take_due(self.clock.now):
                action()
        self.clock.now = end


class FakeEngine:
    """What a connection knows of its engine."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.port = FakePort()
        self.proactor = Proactor()
        self.watchdog = FakeWatchdog(self.clock)
        self.dispatcher = FakeDispatcher(self.proactor)
        self.tracing = Trace()
        self.retries = 0

    @property
    def ops_pending(self) -> int:
        return len(self.proactor.pending)

    def count_retry(self) -> None:
        self.retries += 1


# -- the socket ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hold:
    """The call says PENDING; its packet comes when the test completes the operation."""


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """The call is done when it returns: of all bytes, or of so many. With `skips` there is no packet."""

    part: int | None = None


@dataclasses.dataclass(frozen=True)
class Before:
    """The packet is handled on another thread, before the call returns, unless a lock forbids it."""

    part: int | None = None
    status: int = STATUS_SUCCESS


@dataclasses.dataclass(frozen=True)
class Fail:
    """The call fails with a code; there will be no packet."""

    code: int


Behaviour = Hold | AtOnce | Before | Fail


class FakeSocket:
    """An OverlappedSocket in memory. What a call does is planned; without a plan its packet is held.

    `sent` is what the peer got. The peer's bytes wait in `incoming` until a receive takes them; b"" is EOF.
    """

    half_closes = True
    gather_max = SEND_GATHER_MAX
    bursts = True
    detachable = True

    def __init__(self, engine: FakeEngine, skips: bool = True) -> None:
        self.family = 2
        self.transmits = True
        self.reset_unseen = False  # what `was_reset` says: a reset that no operation has told of
        self.transmitted: list[tuple[int, int]] = []  # offset and bytes of each file part, in order
        self.released = False
        self.local_raw = self.peer_raw = b""
        self.skips = skips
        self.receives_at_once = self.receives_by_packet = 0
        self.sends_at_once = self.sends_by_packet = 0
        self.sent = bytearray()
        self.incoming: deque[bytes] = deque()
        self.sends: list[tuple[Operation, bytes]] = []  # what the kernel has, oldest first
        self.receives: list[Operation] = []
        self.plan_sends: deque[Behaviour] = deque()
        self.plan_receives: deque[Behaviour] = deque()
        self.calls: list[str] = []  # of the rare methods
        self.lengths: list[int] = []  # of the sends, in the order of the calls
        self.cancel_status = STATUS_CANCELLED
        self.cancels_at_once = True  # else the packets of a cancel come with `finish_cancel`
        self.closed = False
        self.torn_at: int | None = None  # so many bytes of `sent` are in order: after them a part is missing
        self._cut: tuple[Operation, int] | None = None  # the newest send that was cut short, and where
        self.threads: list[threading.Thread] = []
        self._engine = engine
        self._pending = engine.proactor.pending

    # What a connection calls ---------------------------------------------------------------------------

    def associate(self, port: Any) -> None:
        self._note("associate")
        port.associate(id(self))

    def set_nodelay(self, on: bool) -> None:
        self._note(f"nodelay {on}")

    def set_keepalive(self, keepalive: Any) -> None:
        self._note(f"keepalive {keepalive}")

    def reset_on_close(self) -> None:
        self._note("reset_on_close")

    def shutdown_send(self) -> None:
        self._note("shutdown_send")

    def receive(self, operation: Operation) -> int:
        assert not self.closed, "a receive on a closed socket"
        self._register(operation)
        behaviour = self.plan_receives.popleft() if self.plan_receives else Hold()
        if isinstance(behaviour, Fail):
            del self._pending[operation.address]
            return behaviour.code
        self.receives.append(operation)
        if isinstance(behaviour, AtOnce):
            assert self.incoming, "nothing to receive at once"
            transferred = self._fill(operation)
            self.receives.remove(operation)
            if self.skips:
                return COMPLETED
            self._engine.dispatcher.completed(operation.address, transferred)
        elif isinstance(behaviour, Before):
            self.threads.append(self._finish_receive(operation, behaviour.status, elsewhere=True))
        elif self.incoming:
            self._finish_receive(operation, STATUS_SUCCESS)
        return PENDING

    def send(self, operation: Operation, handler: Any, vector: Any = None, count: int = 1) -> int:
        assert not self.closed, "a send on a closed socket"
        cut_before = self._cut is not None and self._pending.get(self._cut[0].address) is self._cut[0]
        operation.handler = handler
        self._register(operation)
        data = self._read(operation, vector is not None, count)
        self.lengths.append(operation.length)
        behaviour = self.plan_sends.popleft() if self.plan_sends else Hold()
        if self._cut and not isinstance(behaviour, Fail):
            if cut_before and self.torn_at is None:  # its packet has not been seen yet
                self.torn_at = self._cut[1]
            self._cut = None
        if self.sends and not isinstance(behaviour, Fail):
            behaviour = Hold()  # bytes go out in the order of the calls: nothing overtakes what is held
        if isinstance(behaviour, Fail):
            del self._pending[operation.address]
            return behaviour.code
        if isinstance(behaviour, AtOnce):
            transferred = operation.length if behaviour.part is None else behaviour.part
            operation.Internal, operation.InternalHigh = STATUS_SUCCESS, transferred
            self.sent += data[:transferred]
            if self.skips:
                del self._pending[operation.address]
                return COMPLETED
            self._engine.dispatcher.completed(operation.address, transferred)
            return PENDING
        self.sends.append((operation, data))
        if isinstance(behaviour, Before):
            self.threads.append(
                self.complete_send(part=behaviour.part, status=behaviour.status, index=-1, elsewhere=True)
            )
        return PENDING

    def was_reset(self) -> bool:
        return self.reset_unseen

    def transmit(self, operation: Any, handler: Any) -> int:
        """A send of header, file and trailer; planned among the sends."""
        head, tail = operation.keep
        offset = operation.Offset | operation.OffsetHigh << 32
        self.transmitted.append((offset, operation.amount))
        operation.keep = head + b"F" * min(operation.amount, 1 << 16) + tail
        return self.send(operation, handler)

    def release(self) -> Any:
        self._note("release")
        self.closed = self.released = True
        return self

    def cancel(self) -> None:
        self._note("cancel")
        if self.cancels_at_once:
            self.finish_cancel()

    def cancel_receive(self, operation: Operation) -> None:
        self._note("cancel_receive")
        if operation in self.receives and self.cancels_at_once:
            self.receives.remove(operation)
            self._retire(operation, 0, self.cancel_status)

    def close(self) -> None:
        if self.released:
            return
        self.calls.append("close")
        assert not self.sends, "the handle was closed before its packets had come"
        assert not self.receives, "the handle was closed before its packets had come"
        self.closed = True

    # What the test calls -------------------------------------------------------------------------------

    def plan(self, *, sends: Any = (), receives: Any = ()) -> None:
        """Say what the next calls do."""
        self.plan_sends.extend(sends)
        self.plan_receives.extend(receives)

    def deliver(self, *chunks: bytes) -> None:
        """The peer sends bytes; b"" is its EOF.

        The receives that are posted get them, oldest first; the rest waits for more receives.
        """
        self.incoming.extend(chunks)
        while self.receives and self.incoming:
            self._finish_receive(self.receives[0], STATUS_SUCCESS)

    def fail_receive(self, status: int) -> None:
        """The receive that is posted fails."""
        self._finish_receive(self.receives[0], status)

    def complete_send(
        self,
        part: int | None = None,
        status: int = STATUS_SUCCESS,
        index: int = 0,
        elsewhere: bool = False,
    ) -> Any:
        """Complete a send that was held: with all its bytes, or with so many; the oldest by default."""
        operation, data = self.sends.pop(index)
        transferred = operation.length if part is None else part
        self.sent += data[:transferred]
        if transferred < operation.length:
            self._cut = operation, len(self.sent)
            if self.torn_at is None and self.sends[index:] and index >= 0:
                self.torn_at = len(self.sent)
        return self._retire(operation, transferred, status, elsewhere)

    def finish_cancel(self) -> None:
        """Complete all that was held as cancelled."""
        for operation in [*(operation for operation, _data in self.sends), *self.receives]:
            self._retire(operation, 0, self.cancel_status)
        self.sends.clear()
        self.receives.clear()

    # -----------------------------------------------------------------------------------------------------

    def _note(self, call: str) -> None:
        assert not self.closed, f"{call} on a closed socket"
        self.calls.append(call)

    def _register(self, operation: Operation) -> None:
        assert operation.address not in self._pending, "two operations at one address"
        operation.Internal = 0x103  # STATUS_PENDING
        operation.InternalHigh = 0
        self._pending[operation.address] = operation

    def _read(self, operation: Operation, gathered: bool, count: int) -> bytes:
        kept = operation.keep if gathered else [(operation.keep, 0, len(operation.keep))]
        assert len(kept) == count
        return b"".join(bytes(data[start : min(stop, start + (1 << 20))]) for data, start, stop in kept)

    def _fill(self, operation: Operation) -> int:
        """Move bytes of the peer into a receive, as the kernel does; a receive of no bytes takes none."""
        data = self.incoming.popleft()
        taken = data[: operation.size]
        if operation.size:
            ctypes.memmove(operation.buffer, taken, len(taken))
        if len(taken) < len(data):
            self.incoming.appendleft(data[len(taken) :])
        elif not data or not operation.size:
            self.incoming.appendleft(data)  # EOF stays EOF; a receive of no bytes has taken none of it
        operation.Internal, operation.InternalHigh = STATUS_SUCCESS, len(taken)
        return len(taken)

    def _finish_receive(self, operation: Operation, status: int, elsewhere: bool = False) -> Any:
        self.receives.remove(operation)
        transferred = 0 if status else self._fill(operation)
        return self._retire(operation, transferred, status, elsewhere)

    def _retire(self, operation: Operation, transferred: int, status: int, elsewhere: bool = False) -> Any:
        operation.Internal, operation.InternalHigh = status, transferred
        if elsewhere:
            thread = self._engine.dispatcher.serve_elsewhere(operation.address, transferred)
            thread.join(
                0.02
            )  # so that it comes before the call returns, unless a lock of the caller's holds it
            return thread
        self._engine.dispatcher.completed(operation.address, transferred)
        return None

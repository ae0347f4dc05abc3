"""L5: tracing, what stands in for a socket while its operations are recorded.

Laws
1. Off costs nothing: who is not traced has its own socket, and no call asks. Switching on puts a stand-in in
   front of the socket, switching off takes it away, both under the lock that its calls are made under.
2. An operation that was submitted through a stand-in has its retirement recorded, whatever was switched
   meanwhile: its handler says so, and is itself again before it runs.
3. A record goes to each ring that wants it: the connection's own, its server's, its engine's.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Final

from ._options import check_option
from ._proactor import COMPLETED, PENDING, Handler, Operation
from ._trace import CALL, RETIRE, SUBMIT, Ring, TraceRecord

#: What is in use: (AcceptEx operations, sends, receives, bytes queued), None where it does not apply.
Knobs = tuple[int | None, int | None, int | None, int | None]

# Of the operations that are traced; a count of its own is not safe without a GIL. Reentrant, as in Ring.
_numbers = itertools.count(1)
_numbers_lock: Final = threading.RLock()
_others = itertools.count(-1, -1)


def _next_number() -> int:
    with _numbers_lock:
        return next(_numbers)


def other_number() -> int:
    """Return a number for what is traced and is no connection: below 0, and nobody else's."""
    with _numbers_lock:
        return next(_others)


class Trace:
    """The switch of one scope (an engine, a server, a connection) and what was recorded in it.

    What was recorded stays readable after switching off, until it is switched on again.
    """

    __slots__ = ("_last", "ring")

    def __init__(self, size: int = 0) -> None:
        """Make a switch that is on where `size`, the most records to keep, is not 0."""
        self.ring: Ring | None = None  # of what is recorded now
        self._last: Ring | None = None
        self.switch(size)

    @property
    def size(self) -> int:
        """The most records that are kept; 0: off."""
        ring = self.ring
        return ring.size if ring is not None else 0

    @property
    def was_on(self) -> bool:
        """Whether it is on or was."""
        return self._last is not None

    def switch(self, size: int) -> None:
        """Keep the newest `size` records from now on; 0: record nothing more."""
        check_option("trace", size)
        if size:
            self._last = Ring(size, threading.RLock())
        self.ring = self._last if size else None

    def records(self) -> list[TraceRecord]:
        """Return a copy of what was recorded, oldest first."""
        last = self._last
        return last.records() if last is not None else []


def rings_of(*traces: Trace | None) -> tuple[Ring, ...]:
    """Return the rings of those that are on."""
    return tuple(trace.ring for trace in traces if trace is not None and trace.ring is not None)


class _StandIn:
    """What stand-ins have in common; all that they do not record is the socket's own."""

    __slots__ = ("_knobs", "_number", "_rings", "inner")

    def __init__(self, inner: Any, rings: tuple[Ring, ...], number: int, knobs: Callable[[], Knobs]) -> None:
        """Stand in for `inner`, recording as `number`."""
        self.inner = inner
        self._rings = rings
        self._number = number
        self._knobs = knobs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _add(
        self,
        began: int,
        operation: str,
        step: str,
        number: int,
        size: int,
        status: int,
        knobs: Knobs,
    ) -> None:
        thread = threading.current_thread()
        record = TraceRecord(
            began,
            perf_counter_ns() - began,
            thread.ident or 0,
            thread.name,
            self._number,
            operation,
            step,
            number,
            size,
            status,
            *knobs,
        )
        for ring in self._rings:
            ring.add(record)

    def _retire(
        self,
        handler: Handler,
        restore: bool,
        what: str,
        number: int,
        operation: Operation,
        transferred: int,
        status: int,
    ) -> None:
        """Stand in for an operation's handler."""
        if restore:
            operation.handler = handler  # it may be submitted again in there
        began = perf_counter_ns()
        try:
            handler(operation, transferred, status)
        finally:
            self._add(began, what, RETIRE, number, transferred, status & 0xFFFFFFFF, self._knobs())

    def _call(self, name: str, *arguments: Any) -> None:
        began = perf_counter_ns()
        getattr(self.inner, name)(*arguments)
        self._add(began, name.partition("_")[0], CALL, 0, 0, 0, self._knobs())

    def cancel(self) -> None:
        """Record it."""
        self._call("cancel")

    def close(self) -> None:
        """Record it."""
        self._call("close")


class _Mover(_StandIn):
    """What moves bytes: the stand-in of a stream's socket or of a datagram socket."""

    __slots__ = ()

    def receive(self, operation: Operation) -> int:
        """Record a receive."""
        number = _next_number()
        handler = operation.handler
        assert handler is not None
        size = operation.size
        operation.handler = functools.partial(self._retire, handler, True, "receive", number)
        began = perf_counter_ns()
        code: int = self.inner.receive(operation)
        if code not in (COMPLETED, PENDING):
            operation.handler = handler
        self._add(began, "receive", SUBMIT, number, size, code, self._knobs())
        return code

    def _submit(
        self,
        what: str,
        issue: Callable[..., int],
        operation: Operation,
        handler: Handler,
        arguments: tuple[Any, ...],
        size: int,
    ) -> int:
        number = _next_number()
        retire = functools.partial(self._retire, handler, False, what, number)
        began = perf_counter_ns()
        code = issue(operation, retire, *arguments)
        if code == COMPLETED and what != "connect":
            size = int(operation.InternalHigh)
        backlog, sends, receives, queued = self._knobs()
        if code == PENDING and what == "send" and sends is not None:
            sends += 1  # the caller counts it after this
        self._add(began, what, SUBMIT, number, size, code, (backlog, sends, receives, queued))
        return code


class TracedSocket(_Mover):
    """A stream socket whose operations are recorded."""

    __slots__ = ()

    def send(self, operation: Operation, handler: Handler, *arguments: Any) -> int:
        """Record a send."""
        size = operation.length
        return self._submit("send", self.inner.send, operation, handler, arguments, size)

    def transmit(self, operation: Any, handler: Handler) -> int:
        """Record a TransmitFile."""
        return self._submit("transmit", self.inner.transmit, operation, handler, (), operation.length)

    def connect(self, operation: Operation, handler: Handler, *arguments: Any) -> int:
        """Record a connect."""
        return self._submit("connect", self.inner.connect, operation, handler, arguments, 0)

    def cancel_receive(self, operation: Operation) -> None:
        """Record it, as a cancel."""
        self._call("cancel_receive", operation)

    def shutdown_send(self) -> None:
        """Record it."""
        self._call("shutdown_send")


class TracedDatagrams(_Mover):
    """A datagram socket whose operations are recorded."""

    __slots__ = ()

    def send(self, operation: Operation, handler: Handler, *arguments: Any) -> int:
        """Record a send that has to wait."""
        return self._submit("send", self.inner.send, operation, handler, arguments, len(arguments[0]))

    def send_now(self, data: bytes, target: Any) -> int:
        """Record a send that does not."""
        began = perf_counter_ns()
        code: int = self.inner.send_now(data, target)
        self._add(began, "send", SUBMIT, _next_number(), len(data), code, self._knobs())
        return code


class TracedListener(_StandIn):
    """A listening socket whose AcceptEx operations are recorded."""

    __slots__ = ()

    def accept(self, handler: Handler, data_size: int, home: Any) -> Any:
        """Record an AcceptEx."""
        number = _next_number()
        retire = functools.partial(self._retire, handler, False, "accept", number)
        began = perf_counter_ns()
        operation, code = self.inner.accept(retire, data_size, home)
        in_use = self._knobs()[0]
        if operation is not None and in_use is not None:
            in_use += 1  # the caller counts it after this
        self._add(began, "accept", SUBMIT, number, data_size, code, (in_use, None, None, None))
        return operation, code


def traced(
    kind: type[_StandIn], sock: Any, rings: tuple[Ring, ...], number: int, knobs: Callable[[], Knobs]
) -> Any:
    """Return what to use in a socket's place: a stand-in where there are rings, else the socket itself.

    Args:
        kind: the class of the stand-in.
        sock: the socket, or the stand-in that it has now.
        rings: where records go.
        number: the connection's id, or one of `other_number`.
        knobs: returns what is in use; called without a lock.
    """
    inner = sock.inner if isinstance(sock, _StandIn) else sock
    return kind(inner, rings, number, knobs) if rings else inner

"""L6: Watched, the figures and the trace of a server; Server adds what they are about.

Laws
1. Reading figures holds the server's lock for a copy of its counts and of its table, and nobody up.
2. A connection is counted in the table or among those that have gone, never in both: both are read under
   one lock.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ._lifecycle import CloseReason
from ._options import Settings, Usage
from ._stats import Stats, Traffic
from ._trace import TraceRecord, write_trace
from ._tracing import Trace

if TYPE_CHECKING:
    from ._acceptor import Acceptor
    from ._processes import Processes
    from .connection import Connection
    from .engine import Engine
    from .workers import WorkThreads

#: Reasons for which the watchdog ends a connection.
REAPED: Final = (CloseReason.SILENT, CloseReason.IDLE, CloseReason.DEADLINE)


class Watched:
    """A server as an operator sees it."""

    _settings: Settings
    _acceptor: Acceptor | None
    _engine: Engine | None
    _workers: WorkThreads | None
    _processes: Processes | None
    _lock: threading.Lock
    _connections: dict[int, Connection]
    _parked: deque[Any]
    _open: int
    _peak: int

    def _begin_counting(self, trace: int) -> None:
        """Start from zero, with a trace of so many records."""
        self._counts: Counter[str] = Counter()
        self._closed: Counter[str] = Counter()
        self._past = Traffic()  # of the connections that have gone; written under the lock
        self._trace = Trace(trace)

    # -- figures --------------------------------------------------------------------------------------------

    def _moved(self) -> Traffic:
        """What its connections have moved until now, in this process."""
        if self._acceptor is None:  # there were none; and `start`, which gives up, holds the lock
            return Traffic()
        with self._lock:
            living = list(self._connections.values())
            traffic = Traffic(self._past)
        for connection in living:
            traffic.add(connection)
        return traffic

    def stats(self) -> Stats:
        """Return the figures of this instant. RuntimeError before `start`. Any thread; does not block.

        With `processes`, what worker processes have moved is added as each last reported it, every half
        second; `connections` is of this instant, and `engine` is this process's.
        """
        acceptor, engine = self._acceptor, self._engine
        if acceptor is None or engine is None:
            raise RuntimeError("the server has not been started: there are no figures")
        with self._lock:
            living = list(self._connections.values())
            traffic = Traffic(self._past)
            closed, counts = dict(self._closed), self._counts.copy()
            peak, is_open, parked = self._peak, self._open, len(self._parked)
        sends = receives = queued = unread = held = 0
        for connection in living:
            traffic.add(connection)
            now = connection._in_use()
            sends += now.sends
            receives += now.receives
            queued += now.queued
            unread += now.unread
            held += now.held
        reaped = {reason.value: closed.get(reason.value, 0) for reason in REAPED}
        reaped[CloseReason.SILENT.value] += acceptor.reaped
        backlog, last = acceptor.usage, acceptor.last_accept
        own = Stats(
            connections=is_open,
            connections_peak=peak,
            parked=parked,
            sockets=is_open + backlog.in_use + acceptor.listening,
            accepted=counts["accepted"],
            refused=counts["refused"],
            handler_failed=counts["handler_failed"],
            accept_failed=acceptor.failed + counts["accept_failed"],
            accept_unreplaced=acceptor.unreplaced,
            backlog=backlog,
            sendcap=Usage(self._settings.sendcap, sends),
            recvburst=Usage(self._settings.recvburst, receives),
            bytes_received=traffic.bytes_received,
            bytes_sent=traffic.bytes_sent,
            receives=traffic.receives,
            receives_at_once=traffic.receives_at_once,
            sends=traffic.sends,
            sends_at_once=traffic.sends_at_once,
            write_queued=queued,
            unread=unread,
            bytes_held=held,
            closed=closed,
            reaped=sum(reaped.values()),
            reaped_by=reaped,
            last_accept=last,
            since_accept=None if last is None else max(0.0, monotonic() - last),
            work_queued=self._workers.queued() if self._workers else (),
            engine=engine.stats(),
        )
        return own if self._processes is None else self._processes.add_to(own)

    # -- the trace ------------------------------------------------------------------------------------------

    def _retrace(self) -> None:
        """Have what runs record its operations for those who want them now, or no longer. Any thread."""
        if self._acceptor is not None and self._engine is not None:
            self._acceptor.retrace(self._trace, self._engine.tracing)
        with self._lock:
            living = list(self._connections.values())
        for connection in living:
            with connection._lock:
                connection._retrace()

    def trace_records(self) -> list[TraceRecord]:
        """Return the trace of this server and its connections, the oldest first; see the option `trace`.

        Empty where it was never on; what was recorded stays until it is switched on again. Any thread; does
        not block.
        """
        return self._trace.records()

    def write_trace(self, path: str | os.PathLike[str]) -> int:
        """Write the trace as a file for ui.perfetto.dev (Chrome trace format), while traffic goes on.

        Args:
            path: the file, which is replaced.

        Returns:
            How many records were written. OSError where that cannot be done. Any thread; blocks as files do.
        """
        return write_trace(path, self.trace_records())

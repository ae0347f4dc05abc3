"""L5: Acceptor, the pool of AcceptEx operations of a server, over one or more listening sockets.

Laws
1. Accepting never stops: an AcceptEx that fails is about its peer. It is replaced at once; what could not
   be posted is posted after a back-off. Only `pause`, the cap of connections and `close` end that.
   Where the system is short of resources the cap shrinks, and comes back (`_caps`).
2. `in_use` changes in two places: up where an AcceptEx was issued, down where its packet is retired.
3. A replacement is posted before the new connection's callbacks run: they may take their time.
4. The cap is the server's; each listening socket has its share of it, at least one.
5. Accepting is not greedy: after some AcceptEx in a row what the others brought has its turn. Many more are
   retired and replaced than connections begin, for the kernel's queue is short: those wait in `_arrived`.
   Who puts something there, or into `_packets`, sees to it that a turn is due.
6. Whatever is raised in here, out of memory or by a user's logging handler: a connection that came is handed
   over or closed, who waits has another turn, and a pool that is short is filled up later.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Final

from ._caps import Recovery
from ._dispatcher import Dispatcher
from ._errors import ERROR_OPERATION_ABORTED, RESOURCE_CODES, winsock_code
from ._options import Usage
from ._pipeops import ListeningPipe, OverlappedPipe
from ._proactor import Operation
from ._sockops import NOT_CONNECTED, AcceptOperation, ListeningSocket, OverlappedSocket
from ._tracing import Knobs, Trace, TracedListener, other_number, rings_of, traced
from .watchdog import Watchdog

#: Seconds before a failed AcceptEx is posted again: doubled each time up to the second.
RETRY_FIRST: Final = 0.010
RETRY_MAX: Final = 1.0
#: Codes that say that the peer is gone. However many do, each has left the kernel's queue and is no reason
#: to wait.
PEER_GONE: Final = frozenset({10051, 10053, 10054, 10057, 10060, 10065})
#: Other failures in a row, as a multiple of the cap, after which failing is taken for a condition and not
#: for bad peers.
FAILURES_IN_ROW: Final = 2
#: AcceptEx operations retired, and replaced, in a row, and connections that begin: then the packets that came
#: meanwhile are served, those of who is there. More begin where there were none.
RETIRED_IN_ROW: Final = 32
BEGUN_IN_ROW: Final = 1
BEGUN_ALONE: Final = 4
#: ERROR_NOT_ENOUGH_MEMORY, in place of the code of a call that was not made because something was raised.
NO_MEMORY: Final = 8
#: Connections that wait to begin; above it no AcceptEx is replaced, and the kernel's queue fills.
ARRIVED_MAX: Final = 1024
#: Seconds between two looks at sockets that are connected and silent inside AcceptEx, at the most.
SILENT_LOOK_MAX: Final = 1.0

log = logging.getLogger("iocp_ctypes")

#: What can listen, and what comes of it. A pipe's ConnectNamedPipe is called an AcceptEx in here.
Listening = ListeningSocket | ListeningPipe
Accepted = OverlappedSocket | OverlappedPipe


class _Pool:
    """One listening socket and its AcceptEx operations."""

    __slots__ = ("listening", "number", "operations", "share")

    def __init__(self, listening: Listening) -> None:
        self.listening = listening  # or what stands in for it while it is traced
        self.number = 0  # of its records in a trace
        self.operations: dict[int, AcceptOperation] = {}  # by address
        self.share = 1


class Acceptor:
    """Keeps AcceptEx operations posted and hands over what they bring. Thread-safe; nothing blocks."""

    def __init__(
        self,
        sockets: list[Listening],
        watchdog: Watchdog,
        dispatcher: Dispatcher,
        cap: int,
        data_size: int,
        room: Callable[[], int],
        admit: Callable[[], None],
        accepted: Callable[[Accepted, bytes], None],
    ) -> None:
        """Make an acceptor; `top_up` starts it.

        Args:
            sockets: where to listen; closed by `close`.
            watchdog: for back-offs.
            dispatcher: whose turns those are.
            cap: AcceptEx operations to keep posted.
            data_size: 0, or the most first bytes that AcceptEx waits for.
            room: how many more connections the server takes, those being accepted included.
            admit: called when a connection came, before its AcceptEx is replaced.
            accepted: called with it afterwards, and its first bytes.
        """
        self._pools = [_Pool(sock) for sock in sockets]
        self._watchdog = watchdog
        self._dispatcher = dispatcher
        self._cap = cap
        self._data_size = data_size
        self._room = room
        self._admit = admit
        self._accepted = accepted
        self._lock = threading.Lock()
        self._in_use = 0
        self._paused = False
        self._cancelled: set[int] = set()  # the operations that `pause` cancelled, by address
        self._closing = False
        self._retrying = False
        self._to_tell: tuple[int, float, Exception | None] | None = None  # a failure for the log
        self._retry_delay = RETRY_FIRST
        self._short: Recovery | None = None  # while the cap is less than was assigned
        self._failures_in_row = 0
        self._turn_due = False  # true exactly while a call of `_turn` is to come, or takes what waits
        self._held_up = False  # too many have arrived for an AcceptEx to be replaced
        self._round = dispatcher.round
        self._retired_in_row = self._begun_in_row = 0  # since what the others brought had its turn
        self._packets: deque[tuple[AcceptOperation, int]] = deque()  # that wait to be retired
        self._arrived: deque[tuple[Accepted, bytes]] = deque()  # that wait to begin
        self.failed = 0
        self.unreplaced = 0
        self.reaped = 0
        self.last_accept: float | None = None
        self._share_out()

    @property
    def usage(self) -> Usage:
        """The cap in force, and how many AcceptEx operations the kernel has."""
        return Usage(self._cap, self._in_use)

    @property
    def listening(self) -> int:
        """How many sockets listen."""
        return 0 if self._closing else len(self._pools)

    def retrace(self, *traces: Trace) -> None:
        """Have AcceptEx operations recorded by those traces that are on. Any thread; does not block."""
        with self._lock:
            rings = rings_of(*traces)
            for pool in self._pools:
                if rings and not pool.number:
                    pool.number = other_number()
                pool.listening = traced(TracedListener, pool.listening, rings, pool.number, self._knobs)

    def _knobs(self) -> Knobs:
        return self._in_use, None, None, None

    def set_cap(self, cap: int) -> None:
        """Change the cap: more are posted at once, a surplus drains as connections come."""
        with self._lock:
            self._cap = cap
            if self._short is not None:  # what is assigned holds, until the next shortage
                self._short.forget("backlog")
            self._share_out()
        self.top_up()

    def _share_out(self) -> None:
        share, rest = divmod(self._cap, len(self._pools) or 1)  # a worker process listens nowhere
        for number, pool in enumerate(self._pools):
            pool.share = max(1, share + (number < rest))

    def top_up(self) -> None:
        """Post what is missing."""
        with self._lock:
            self._held_up = len(self._arrived) >= ARRIVED_MAX
            if self._paused or self._closing or self._held_up:
                return
            # One for each address in turn, so that a small room is not all taken by the first; and one for
            # each in any case, so that none is deaf: the server lets wait whom that brings above its cap.
            pools = [pool for pool in self._pools if len(pool.operations) < pool.share]
            while pools and (room := self._room()) > 0:
                pools = [pool for pool in pools if self._in_use < room or not pool.operations]
                pools = [pool for pool in pools if self._post(pool) and len(pool.operations) < pool.share]
            told, self._to_tell = self._to_tell, None
        if told is not None:  # not here: who handles the record may block, raise or ask for our figures
            self._dispatcher.call_soon(functools.partial(_tell, *told))

    def _post(self, pool: _Pool) -> bool:
        """Post one AcceptEx; False where it failed and a retry was arranged. Needs the lock."""
        assert self._lock.locked()
        raised: Exception | None = None
        try:
            operation, code = pool.listening.accept(self._retired, self._data_size, pool)
        except Exception as exc:
            operation, code, raised = None, NO_MEMORY, exc
        if operation is not None:
            pool.operations[operation.address] = operation
            self._in_use += 1
            return True
        self.unreplaced += 1
        if self._retry_delay == RETRY_FIRST:  # once for each time it begins
            self._to_tell = code, self._retry_delay, raised
        self._retry_later(code)
        return False

    def _retry_later(self, code: int) -> None:
        """Try again after a back-off, with a lower cap where resources are missing. Needs the lock."""
        assert self._lock.locked()
        if code in RESOURCE_CODES and (self._cap > 1 or self._short is not None):
            if self._short is None:
                self._short = Recovery()
            self._cap = self._short.shrink("backlog", self._cap, self._in_use)
            self._share_out()
        if not self._retrying:
            self._watchdog.later(self._retry_delay, self._retry)
            self._retrying = True  # once it is sure to come
            self._retry_delay = min(RETRY_MAX, self._retry_delay * 2)

    def _retry(self) -> None:
        with self._lock:
            self._retrying = False
        self.top_up()
        with self._lock:
            if self._short is not None and not self._retrying and self._short.due is None:
                self._recover_later(self._short)

    def _recover_later(self, short: Recovery) -> None:
        """Have the next step towards the cap that was assigned. Needs the lock."""
        assert self._lock.locked()
        short.begin(0.0)
        self._watchdog.later(short.delay, self._recover)

    def _recover(self) -> None:
        """A while has passed since posting worked again: the next step."""
        with self._lock:
            short = self._short
            if short is None or short.due is None or self._closing:
                return  # short again meanwhile: the retry goes on from there
            if not short.assigned:
                self._short = None  # a whole step has passed with the cap as it was assigned
                return
            self._cap = short.step("backlog", self._cap)
            self._share_out()
        self.top_up()
        with self._lock:
            if self._short is short and short.due is not None:
                self._recover_later(short)

    def _retired(self, operation: Operation, transferred: int, status: int) -> None:
        """Retire an AcceptEx, or let it wait for its turn. On an I/O thread."""
        assert isinstance(operation, AcceptOperation)
        with self._lock:
            if self._round != self._dispatcher.round:
                self._new_row(0, 0)
            self._retired_in_row += 1
            waits = bool(self._packets) or self._retired_in_row > RETIRED_IN_ROW
            if waits:
                self._packets.append((operation, transferred))
                self._arrange_turn()
        if not waits:
            self._take(operation, transferred, status)

    def _new_row(self, retired: int, begun: int) -> None:
        """What the others brought has had its turn. Needs the lock."""
        assert self._lock.locked()
        self._round = self._dispatcher.round
        self._retired_in_row, self._begun_in_row = retired, begun

    def _arrange_turn(self) -> None:
        """See to it that who waits has a turn, behind the packets that the port has. Needs the lock."""
        assert self._lock.locked()
        if not self._turn_due:
            self._turn_due = True
            self._dispatcher.call_soon(self._turn)

    def _turn(self) -> None:
        """Take some of those that wait. On an I/O thread."""
        with self._lock:
            alone = self._round == self._dispatcher.round  # the others brought nothing meanwhile
            count = min(RETIRED_IN_ROW, len(self._packets))
            # Whom these bring waits: all are replaced before a callback takes its time.
            self._new_row(count, BEGUN_IN_ROW)
        taken = False
        try:
            for _ in range(count):  # one by one: what is raised on the way keeps none of the others
                operation, transferred = self._packets.popleft()
                self._take(operation, transferred, operation.Internal)
            taken = True
        finally:
            with self._lock:
                self._turn_due = False
                if not taken:  # the rest, and who has arrived, have another
                    self._arrange_turn()
        for _ in range(BEGUN_ALONE if alone else BEGUN_IN_ROW):
            with self._lock:
                waiting = self._arrived.popleft() if self._arrived else None
                if self._arrived or self._packets:  # the next does not wait for the callbacks of this one
                    self._arrange_turn()
            if self._held_up:
                self.top_up()
            if waiting is None:
                break
            self._accepted(*waiting)

    def _take(self, operation: AcceptOperation, transferred: int, status: int) -> None:
        """Take what an AcceptEx brought, and replace it. On an I/O thread."""
        try:
            self._finish(operation, transferred, status)
        except BaseException:
            with self._lock:
                self._retry_later(0)
            raise

    def _finish(self, operation: AcceptOperation, transferred: int, status: int) -> None:
        """Hand over what an AcceptEx brought, or discard it, once it was replaced."""
        pool: _Pool = operation.home
        if self._closing or status:
            self._discard(pool, operation, status)
            return
        try:
            accepted, first = pool.listening.finish(operation, transferred)
        except Exception as exc:
            self._discard(pool, operation, 0)
            if isinstance(exc, OSError):
                log.debug("a peer was gone before it was accepted: %s", exc)
            else:
                log.error("a connection that came could not be accepted", exc_info=exc)
            return
        self._admit()  # before the AcceptEx is uncounted: in between it would look as if there were room
        with self._lock:
            self._uncount(pool, operation)
            self._failures_in_row = 0
            if not self._retrying:
                self._retry_delay = RETRY_FIRST
            self.last_accept = monotonic()
            self._begun_in_row += 1
            waits = bool(self._arrived) or self._begun_in_row > BEGUN_IN_ROW
            if waits:
                self._arrived.append((accepted, first))
                self._arrange_turn()
        try:
            pool.listening.give(operation)
            self.top_up()
        finally:
            if not waits:
                self._accepted(accepted, first)

    def _uncount(self, pool: _Pool, operation: AcceptOperation) -> None:
        """An AcceptEx has left the kernel. Needs the lock."""
        assert self._lock.locked()
        del pool.operations[operation.address]
        self._cancelled.discard(operation.address)
        self._in_use -= 1

    def _discard(self, pool: _Pool, operation: AcceptOperation, status: int) -> None:
        """Drop the socket of an AcceptEx that brought no connection, and replace it."""
        operation.socket.close()
        code = winsock_code(status)
        with self._lock:
            asked = operation.address in self._cancelled
            self._uncount(pool, operation)
            if self._closing:
                return
            if operation.reaped:
                self.reaped += 1
            elif code != ERROR_OPERATION_ABORTED or not asked:
                self.failed += 1
                self._failures_in_row += bool(status) and code not in PEER_GONE
            if code in RESOURCE_CODES or self._failures_in_row > FAILURES_IN_ROW * self._cap:
                self._retry_later(code)
                return
        self.top_up()

    def pause(self) -> None:
        """Take no more connections until `resume`; those that the kernel has accepted already still come."""
        with self._lock:
            self._paused = True
            if not self._closing:  # else the handles are no longer ours to cancel
                for pool in self._pools:
                    self._cancelled.update(pool.operations)
                    pool.listening.cancel()

    def resume(self) -> None:
        """Accept again."""
        with self._lock:
            self._paused = False
        self.top_up()

    def reap_silent(self, timeout: float) -> None:
        """End the AcceptEx operations whose peer has been connected for `timeout` seconds and sent nothing.

        Cancelled, not closed: where the first byte comes at this very moment, the packet says so.
        """
        with self._lock:
            waiting = [(pool, operation) for pool in self._pools for operation in pool.operations.values()]
        for pool, operation in waiting:
            seconds = operation.socket.connect_time()
            if timeout <= seconds < NOT_CONNECTED:
                pool.listening.reap(operation)

    def close(self) -> None:
        """Stop listening.

        The AcceptEx operations complete as cancelled, and their sockets are closed then.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for pool in self._pools:
                pool.listening.cancel()
                pool.listening.close()


def _tell(code: int, delay: float, raised: Exception | None) -> None:
    """Log that an AcceptEx could not be posted. On an I/O thread."""
    log.warning(
        "an AcceptEx could not be posted (error %d): trying again in %.2f s", code, delay, exc_info=raised
    )

"""L4: the I/O threads: reap packets, retire operations, call their handlers; hand over from a stalled thread.

Laws
1. At most `running` threads serve at a time. On a build with a GIL more than one would only fight for it,
   so the rest wait in reserve; what the kernel's concurrency value does on Windows (and does not on Wine)
   is done here.
2. One FIFO, `ready`, is shared by all threads: packets, operations that completed at once and calls are
   served in turn. A thread that stalls in a callback therefore holds back nothing but that callback.
   What a handler of a round deferred is done when the round is over, or by who takes over within it.
3. A thread is stalled exactly when one look (every STALL_CHECK seconds, only while somebody is busy) finds
   it in the same turn as the look before. Then another takes its place; it waits in reserve once its
   callback returns.
4. Handlers do not raise. One that does is a defect of this library: it is logged, and the thread goes on.
   A thread that cannot take packets ends, and whoever made the dispatcher is told: nobody may go on waiting.
5. Stopping: a flag, and a WAKE packet that each leaving thread posts again, so that no batch can swallow it.
   Who leaves serves what is ready: a callback that outlasts `stop` still has its on_close after it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from ._port import Batch, CompletionPort
from ._proactor import ENDING_THREADS_DROP, Proactor
from ._win32 import INFINITE

#: Seconds between two looks for stalled threads: a stall is handed over after one to two of them, so another
#: connection waits at most 80 ms; 25 looks a second, and only while there is traffic, cost nothing to speak
#: of.
STALL_CHECK: Final = 0.04
#: The same right after one was found stalled: who takes over may run into the next callback that blocks, and
#: several of them must not add up.
STALL_CHECK_AGAIN: Final = 0.01
#: Threads that may be stalled at once; above it connections wait for a callback to return.
STALLED_MAX: Final = 32
#: Threads kept in reserve; more than that end, but none where its operations might go with it: a connection
#: that an AcceptEx had brought would be lost.
RESERVE_MAX: Final = STALLED_MAX if ENDING_THREADS_DROP else 4
#: Packets taken at a time: where one thread serves, a call should bring much; where several do, each its
#: share.
BATCH_ALONE: Final = 64
BATCH_SHARED: Final = 8
#: Packets taken in a row at the most before any is served: who queues as fast as we take must not keep us
#: from serving.
REAPED_MAX: Final = 512
#: So many wait to be served: what only prepares for the next round is done at the end of this one.
CROWD: Final = 4

log = logging.getLogger("iocp_ctypes")


class _Worker:
    """One I/O thread.

    Its fields are written by itself, but for `relieved`, which is written under the lock.
    """

    __slots__ = ("busy", "gate", "ident", "packets", "reaps", "relieved", "seen", "thread", "turn")

    def __init__(self) -> None:
        self.turn = 0  # counts handlers begun
        self.reaps = 0
        self.packets = 0
        self.busy = False  # false exactly while it waits for packets or in reserve
        self.seen = -1  # `turn` at the last look, -1 where it was not busy
        self.relieved = False  # another took its place
        self.ident = 0
        self.gate = threading.Semaphore(0)  # released to call it out of reserve
        self.thread: threading.Thread | None = None


class Dispatcher:
    """The threads of an engine."""

    def __init__(
        self,
        port: CompletionPort,
        proactor: Proactor,
        running: int,
        later: Callable[[float, Callable[[], None]], object],
        failed: Callable[[BaseException], object] = lambda _exc: None,
    ) -> None:
        """Make a dispatcher; threads come with `start`.

        Args:
            port: where packets come from.
            proactor: the pending table they are looked up in.
            running: how many threads serve at a time.
            later: `later(seconds, function)` calls a function after a while, on a thread that never blocks.
            failed: called with what a thread failed with that cannot take packets, on that thread.
        """
        self._port = port
        self._proactor = proactor
        self._running_max = running
        self._batch_size = BATCH_ALONE if running == 1 else BATCH_SHARED
        self._later = later
        self._failed = failed
        self._ready: deque[tuple[Any, int]] = deque()
        self._deferred: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._reserve: list[_Worker] = []
        self._serving: dict[int, _Worker] = {}  # by thread identity; not those relieved
        self._stopping = False
        self._hurrying = False  # the look before found somebody stalled; written under the lock
        self._looking = threading.Lock()  # held exactly while looks for stalled threads are scheduled
        self._past_reaps = 0  # of threads that have ended
        self._past_packets = 0
        self._past_turns = 0
        self.handoffs = 0
        #: Changes with each round but where one call, or operation that completed at once, is all that is
        #: served; no count, as threads may write it at once.
        self.round = 0

    # -- any thread -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads that serve."""
        with self._lock:
            self._fill()

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call a function on an I/O thread, after what is ready now. Never blocks; any thread."""
        self._put(function, 0)

    def completed(self, address: int, transferred: int) -> None:
        """Serve, in its turn, an operation that completed at once and will have no packet. Any thread."""
        self._ready.append((address, transferred))  # as `_put`, with a call less
        if threading.get_ident() not in self._serving:
            self._port.post()

    def defer(self, function: Callable[[], None]) -> bool:
        """Call a function when this round has been served, where that is a crowd; else return False.

        In a handler, on its I/O thread: that one, or who took over from it, calls it. Where several threads
        serve the answer is False: there a packet wakes one that is idle.
        """
        if self._running_max > 1 or len(self._ready) + len(self._deferred) < CROWD:
            return False
        self._deferred.append(function)
        return True

    def _put(self, what: Any, transferred: int) -> None:
        self._ready.append((what, transferred))
        # A serving thread looks at `ready` when its handler returns; from any other thread somebody must be
        # woken.
        if threading.get_ident() not in self._serving:
            self._port.post()

    def is_serving(self) -> bool:
        """Return whether the calling thread is an I/O thread that nobody took over from."""
        return threading.get_ident() in self._serving

    def is_io_thread(self) -> bool:
        """Return whether the calling thread is one of this dispatcher's."""
        ident = threading.get_ident()
        with self._lock:
            return any(worker.ident == ident for worker in self._workers)

    @property
    def threads(self) -> int:
        """How many I/O threads exist."""
        return len(self._workers)

    @property
    def reaps(self) -> int:
        """How many calls brought packets."""
        with self._lock:
            return self._past_reaps + sum(worker.reaps for worker in self._workers)

    @property
    def packets(self) -> int:
        """How many packets were taken off the port, our own included."""
        with self._lock:
            return self._past_packets + sum(worker.packets for worker in self._workers)

    @property
    def turns(self) -> int:
        """How much was served: packets, operations that completed at once, calls, those deferred included."""
        with self._lock:
            return self._past_turns + sum(worker.turn for worker in self._workers)

    @property
    def stalled(self) -> int:
        """How many of them are in a callback that another thread took over from."""
        with self._lock:
            return sum(worker.relieved for worker in self._workers) - len(self._reserve)

    def stop(self, timeout: float) -> bool:
        """End the threads; a callback that runs is waited for. Blocks up to `timeout` seconds; any thread.

        Returns:
            True where all threads but the calling one have ended.
        """
        with self._lock:
            self._stopping = True
            reserve, self._reserve = self._reserve, []
            for worker in reserve:
                worker.gate.release()
            threads = [worker.thread for worker in self._workers]
        self._port.post()
        deadline = time.monotonic() + timeout
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                while thread.is_alive() and time.monotonic() < deadline:
                    thread.join(min(0.25, max(0.0, deadline - time.monotonic())))
        return not any(t is not None and t.is_alive() for t in threads if t is not threading.current_thread())

    # -- the threads ----------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Let as many threads serve as may. Needs the lock."""
        assert self._lock.locked()
        while len(self._serving) < self._running_max and not self._stopping:
            if self._reserve:
                worker = self._reserve.pop()
                worker.relieved = False
                self._serving[worker.ident] = worker
                worker.gate.release()
            elif len(self._workers) < self._running_max + STALLED_MAX:
                worker = _Worker()
                number = len(self._workers) + 1
                worker.thread = threading.Thread(
                    target=self._run, args=(worker,), name=f"iocp_ctypes I/O {number}", daemon=False
                )
                try:
                    worker.thread.start()
                except RuntimeError:
                    log.warning("no I/O thread could be started: the system is short of them", exc_info=True)
                    break
                self._workers.add(worker)
                # start() returns when the thread has begun, so its identity is known.
                worker.ident = worker.thread.ident or 0
                self._serving[worker.ident] = worker
            else:
                break

    def _run(self, me: _Worker) -> None:
        me.ident = threading.get_ident()
        try:
            self._serve(me)
        except BaseException as exc:
            _complain("an I/O thread could not take packets off the port", exc)
            if not self._stopping:
                self._failed(exc)
        finally:
            with self._lock:
                self._workers.discard(me)
                self._past_reaps += me.reaps
                self._past_packets += me.packets
                self._past_turns += me.turn
                self._serving.pop(me.ident, None)
                if me in self._reserve:
                    self._reserve.remove(me)
            if self._stopping or self._ready or self._deferred:
                self._wake_next()

    def _wake_next(self) -> None:
        try:
            self._port.post()
        except OSError:
            # The port is closed: nobody waits there any more.
            log.debug("the port closed before the last thread left")

    def _serve(self, me: _Worker) -> None:
        reap = self._port.reap
        ready, deferred = self._ready, self._deferred
        popleft = ready.popleft
        retire = self._proactor.pending.pop
        looking = self._looking.acquire
        batch = Batch(self._batch_size)
        while ready or deferred or not self._stopping:
            if deferred:
                self._end_round(me)
                if me.relieved and not self._rejoin(me):
                    return
                continue  # it may have been the last there is to do
            me.busy = False
            count = reaped = reap(batch, 0 if ready else INFINITE, ready)
            # All that is there takes its place behind what was ready before.
            while reaped == batch.size and count < REAPED_MAX:
                reaped = reap(batch, 0, ready)
                count += reaped
            me.busy = True
            if count or len(ready) > 1:
                self.round += 1
            if count:
                me.reaps += 1
                me.packets += count
                if count > 1 and self._running_max > 1 and len(self._serving) > 1:
                    self._wake_next()  # the next takes its share of what was reaped
            if looking(False):
                self._later(STALL_CHECK, self._look)
            # What becomes ready meanwhile waits for the next round, after what the port has: nobody is
            # starved.
            for _ in range(len(ready)):
                try:
                    what, transferred = popleft()
                except IndexError:
                    break
                me.turn += 1
                operation = retire(what, None)
                try:
                    if operation is not None:
                        operation.handler(operation, transferred, operation.Internal)  # type: ignore[misc]
                    elif what:
                        what()
                except Exception as exc:
                    _complain("a handler raised, which is a defect of iocp_ctypes", exc)
                if me.relieved:
                    what = operation = None  # nothing is kept alive by a thread that waits
                    if not self._rejoin(me):
                        return
            what = operation = None

    def _end_round(self, me: _Worker) -> None:
        """Do what was deferred until the others were served; the rest is for who takes over meanwhile."""
        me.busy = True  # it may be the first that this thread does
        for _ in range(len(self._deferred)):
            try:
                function = self._deferred.popleft()
            except IndexError:
                break
            me.turn += 1
            try:
                function()
            except Exception as exc:
                _complain("what a handler deferred raised, which is a defect of iocp_ctypes", exc)
            if me.relieved:
                break

    def _rejoin(self, me: _Worker) -> bool:
        """Serve again after having been relieved, at once or after a time in reserve; False.

        End this thread.
        """
        with self._lock:
            if self._stopping:
                return True  # to serve what is ready; then the loop ends
            if len(self._serving) < self._running_max:
                me.relieved = False
                self._serving[me.ident] = me
                return True
            full = len(self._reserve) >= RESERVE_MAX
            if not full:
                me.busy = False
                self._reserve.append(me)
        if self._ready or self._deferred:
            self._wake_next()  # it may have reaped these itself, before it saw that it was relieved
        if full:
            return False
        me.gate.acquire()
        me.busy = True
        return True

    # -- looking for stalled threads (on the thread of `later`) ---------------------------------------------

    def _look(self) -> None:
        relieved: list[str] = []
        with self._lock:
            if self._stopping:
                return
            busy = hurry = False
            for worker in tuple(self._serving.values()):
                if not worker.busy:
                    worker.seen = -1
                    continue
                busy = True
                if worker.seen == worker.turn:
                    worker.relieved = True
                    worker.seen = -1
                    del self._serving[worker.ident]
                    self.handoffs += 1
                    if log.isEnabledFor(logging.DEBUG) and worker.thread is not None:
                        relieved.append(worker.thread.name)
                    hurry = True
                else:
                    hurry = hurry or (self._hurrying and worker.seen < 0)  # it took over: look at it again
                    worker.seen = worker.turn
            self._hurrying = hurry
            self._fill()
        for name in relieved:  # told by who takes over: a logging handler may block, and this thread may not
            self._ready.append((functools.partial(log.debug, "%s is held up: another took over", name), 0))
            self._wake_next()
        if busy:
            self._later(STALL_CHECK_AGAIN if hurry else STALL_CHECK, self._look)
            return
        self._looking.release()
        # A thread may have become busy before the release: then it found the looking on, so it is switched
        # on here.
        with self._lock:
            busy = any(worker.busy for worker in self._serving.values())
        if busy and self._looking.acquire(False):
            self._later(STALL_CHECK, self._look)


def _complain(what: str, exc: BaseException) -> None:
    """Log what should not be; a user's logging handler that raises ends no thread."""
    with contextlib.suppress(Exception):
        log.critical(what, exc_info=exc)

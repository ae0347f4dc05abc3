"""L5: Engine: one completion port with its I/O threads and its watchdog.

Laws
1. Servers and clients of a process share one engine unless they are given one or name their own `io_threads`.
2. An engine counts its users; the shared one stops with the last of them and is made anew for the next.
3. When the interpreter ends, engines still running are stopped first: a script that forgets to stop a
   server exits.
4. Who may not wait leaves by `leave_soon`. If it was the last, the watchdog's thread, which nobody needs any
   more, ends the others and then itself: no thread is made for it.
5. What the kernel still has when an engine has stopped stays for ever (`_abandoned`), and so does the port.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple

from ._dispatcher import STALLED_MAX, Dispatcher
from ._options import check_option
from ._port import CompletionPort
from ._proactor import Proactor
from ._relay import Relay
from ._stats import EngineStats, Traffic
from ._trace import TraceRecord, write_trace
from ._tracing import Trace
from .watchdog import Watchdog

#: Seconds an engine's threads get to end at stop; a callback that blocks for longer is left behind.
STOP_TIMEOUT: Final = 5.0
#: Name look-ups at a time: the system's resolver blocks a thread for each.
RESOLVERS_MAX: Final = 4
#: Seconds before another try where the system was short of threads for a look-up.
RESOLVER_RETRY: Final = 0.5
#: Seconds they get when the interpreter ends.
EXIT_TIMEOUT: Final = 1.0

log = logging.getLogger("iocp_ctypes")


def default_io_threads() -> int:
    """How many I/O threads serve at a time with `io_threads=0`: one under a GIL, else one per processor."""
    gil = getattr(sys, "_is_gil_enabled", None)
    if gil is None or gil():
        return 1
    return max(1, os.cpu_count() or 1)


def _nothing(*_args: object) -> None: ...


class User(NamedTuple):
    """What an engine tells and asks one of its users. Called without the engine's lock, on any thread."""

    at_exit: Callable[[], None]  # the interpreter ends before `leave` was called
    retrace: Callable[[], None] = _nothing  # the engine's trace was switched
    failed: Callable[[BaseException], None] = _nothing  # an I/O thread failed: nothing more completes
    moved: Callable[[], Traffic] = Traffic  # what its connections have moved; asked again when it leaves


class Engine:
    """A completion port, its threads and its watchdog. Thread-safe; nothing here but `stop` blocks."""

    def __init__(self, io_threads: int = 0, trace: int = 0) -> None:
        """Make an engine; it starts with its first user.

        Args:
            io_threads: I/O threads that serve at a time, 0 to 256; 0: sized from the processors.
            trace: operations of all its users that its trace remembers, 0 to 1000000; 0: no trace.
        """
        check_option("io_threads", io_threads)
        running = io_threads or default_io_threads()
        # The kernel counts a thread as running while its callback computes, and would hold packets back
        # from the thread that takes over. How many serve at a time is therefore the dispatcher's business
        # alone.
        self.port = CompletionPort(concurrency=running + STALLED_MAX)
        self.proactor = Proactor()
        self.watchdog = Watchdog()
        self.dispatcher = Dispatcher(
            self.port, self.proactor, running, self.watchdog.later, self._threads_failed
        )
        self.relay = Relay(self.dispatcher.call_soon)
        self._lock = threading.Lock()
        self._started = False
        self._stopped = False
        self._failed = False  # an I/O thread could not take packets
        self._users: dict[int, User] = {}  # by the id of the object that entered
        self._moved = Traffic()  # by connections of users that have left
        self.tracing = Trace(trace)
        self._retries = 0
        self._look_ups: deque[Callable[[], None]] = deque()
        self._resolvers = 0

    @property
    def running(self) -> bool:
        """Whether users may enter: true until the last has left, or the I/O threads failed."""
        return not (self._stopped or self._failed)

    @property
    def ops_pending(self) -> int:
        """How many operations the kernel has."""
        return len(self.proactor.pending)

    def count_retry(self) -> None:
        """Note that a call was put off because the system was short of something."""
        with self._lock:
            self._retries += 1

    def resolve(self, look_up: Callable[[], None]) -> None:
        """Run a name look-up on a thread of its own; at most RESOLVERS_MAX run at a time, the rest wait."""
        with self._lock:
            self._look_ups.append(look_up)
        self._start_resolver()

    def _start_resolver(self) -> None:
        with self._lock:
            if not self._look_ups or self._resolvers >= RESOLVERS_MAX:
                return
            self._resolvers += 1
        # A daemon: the system's resolver cannot be interrupted, and the end of a process should not wait.
        thread = threading.Thread(target=self._resolve, name="iocp_ctypes resolver", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            log.warning("no resolver thread could be started: the system is short of them", exc_info=True)
            with self._lock:
                self._resolvers -= 1
            self.watchdog.later(RESOLVER_RETRY, self._start_resolver)

    def _resolve(self) -> None:
        while True:
            with self._lock:
                if not self._look_ups:
                    self._resolvers -= 1
                    return
                look_up = self._look_ups.popleft()
            look_up()

    def enter(self, user: Any, at_exit: Callable[[], None], **hooks: Any) -> None:
        """Begin to use the engine; the rest as in `User`."""
        if not self._try_enter(user, User(at_exit, **hooks)):
            raise RuntimeError("this engine has been stopped: make another")

    def _try_enter(self, user: Any, hooks: User) -> bool:
        with self._lock:
            if not self.running:
                return False
            self._users[id(user)] = hooks
            if not self._started:
                self._started = True
                self.watchdog.start()
                self.dispatcher.start()
                with _engines_lock:
                    _engines.add(self)
            return True

    def _threads_failed(self, exc: BaseException) -> None:
        """An I/O thread cannot take packets: nobody enters any more, and the users are told, once."""
        with self._lock:
            already, self._failed = self._failed, True
            users = [] if already else list(self._users.values())
        for hooks in users:
            hooks.failed(exc)

    def leave(self, user: Any, timeout: float = STOP_TIMEOUT) -> bool:
        """End using the engine; the last one out stops it. Blocks up to `timeout` seconds then.

        Returns:
            True where the engine goes on for others, or all its threads have ended.
        """
        return self._stop(timeout) if self._was_last(user) else True

    def leave_soon(self, user: Any) -> None:
        """End using the engine; if that was the last, it stops a moment later. Any thread; never blocks."""
        if self._was_last(user):
            self.watchdog.later(0.0, self._stop_soon)

    def _was_last(self, user: Any) -> bool:
        hooks = self._users.get(id(user))
        moved = hooks.moved() if hooks else None  # which may take the user's lock, and not under ours
        with self._lock:
            if self._users.pop(id(user), None) is None:
                return False
            if moved:
                self._moved.add_all(moved)
            if self._users or self._stopped:
                return False
            self._stopped = True
            return True

    def _stop_soon(self) -> None:
        """Stop. On the watchdog's thread, which ends when this has returned."""
        self._stop(STOP_TIMEOUT, on_watchdog=True)

    def _stop(self, timeout: float, on_watchdog: bool = False) -> bool:
        if self._failed:
            timeout = min(timeout, EXIT_TIMEOUT)  # nobody takes packets: what is pending stays so
        deadline = time.monotonic() + timeout
        # What the kernel still has must come back before the port closes; it was cancelled by those who left.
        while self.ops_pending and time.monotonic() < deadline and not self.dispatcher.is_io_thread():
            time.sleep(0.005)
        ended = self.dispatcher.stop(max(0.1, deadline - time.monotonic()))
        ended = (self.watchdog.stop(max(0.1, deadline - time.monotonic())) or on_watchdog) and ended
        if self.ops_pending:
            _abandoned.append(self.proactor)
        elif ended and not self.dispatcher.is_io_thread():
            self.port.close()
        with _engines_lock:
            _engines.discard(self)
        if ended:
            log.debug("an engine has stopped, and its threads have ended")
        else:
            log.warning("an engine has stopped and left threads behind that callbacks keep")
        return ended

    def stop_at_exit(self) -> None:
        """Tell all users that the interpreter ends, let them leave, then stop."""
        with self._lock:
            users = list(self._users.values())
        for hooks in users:
            hooks.at_exit()
        deadline = time.monotonic() + EXIT_TIMEOUT
        while self._users and time.monotonic() < deadline:
            time.sleep(0.005)
        with self._lock:
            already, self._stopped = self._stopped, True
        if not already:
            self._stop(EXIT_TIMEOUT)

    #: Makes the connection of `adopt`; handed over by what is above.
    _adopter: ClassVar[Callable[..., Any]]

    def adopt(self, sock: Any, handler: Any, data: Any = b"", **options: Any) -> Any:
        """Make a connection of a connected socket, without a server.

        Args:
            sock: an IPv4 or IPv6 `socket.socket` of type SOCK_STREAM that is connected; it is taken over, and
                closed for its owner. Not one that belongs to another completion port.
            handler: a Connection subclass, or a factory called with (None, peer address).
            data: bytes that were received from it already, which on_data gets first.
            options: as for `connect`, without `tls`: `start_tls` in on_connect says which side this is.

        Returns:
            The Connection; on_connect follows, on an I/O thread. The engine starts where it has not, and runs
            until the connection has ended.

        Raises:
            TypeError, ValueError: an argument is wrong. OSError: the socket has another completion port. In
            these cases it stays yours. RuntimeError: the engine has been stopped.

        Any thread; never blocks.
        """
        return type(self)._adopter(self, sock, handler, data, options)

    def stats(self) -> EngineStats:
        """Return the figures of this instant."""
        dispatcher, proactor = self.dispatcher, self.proactor
        reaps, packets = dispatcher.reaps, dispatcher.packets
        with self._lock:
            moved, users = Traffic(self._moved), list(self._users.values())
        for hooks in users:  # who leaves meanwhile is not in the sum yet
            moved.add_all(hooks.moved())
        return EngineStats(
            io_threads=dispatcher.threads,
            stalled_threads=dispatcher.stalled,
            users=len(users),
            sockets=len(proactor.sockets),
            ops_pending=self.ops_pending,
            bytes_pending=proactor.bytes_pending,
            bytes_kept=proactor.bytes_kept,
            deadlines=len(self.watchdog),
            packets=packets,
            reaps=reaps,
            packets_per_reap=packets / reaps if reaps else 0.0,
            bytes_received=moved.bytes_received,
            bytes_sent=moved.bytes_sent,
            receives=moved.receives,
            receives_at_once=moved.receives_at_once,
            sends=moved.sends,
            sends_at_once=moved.sends_at_once,
            turns=dispatcher.turns,
            handoffs=dispatcher.handoffs,
            resource_retries=self._retries,
        )

    @property
    def trace(self) -> int:
        """How many operations of all its users the trace remembers; 0: none. Assign to switch it."""
        return self.tracing.size

    @trace.setter
    def trace(self, size: int) -> None:
        self.tracing.switch(size)
        with self._lock:
            users = list(self._users.values())
        for hooks in users:
            hooks.retrace()

    def trace_records(self) -> list[TraceRecord]:
        """Return the trace of all servers, clients and datagram sockets on this engine, the oldest first.

        What was recorded stays until the trace is switched on again. Any thread; does not block.
        """
        return self.tracing.records()

    def write_trace(self, path: str | os.PathLike[str]) -> int:
        """Write the trace as a file for ui.perfetto.dev; as `Server.write_trace`."""
        return write_trace(path, self.trace_records())


#: The tables of engines that stopped while the kernel still had operations, whose memory it may yet write to:
#: an engine that is dropped is one cycle with its table and all that is in there, and would take that along.
#: Nothing leaves this list. Only an engine whose cancelled operations do not come back gets into it.
_abandoned: Final[list[Proactor]] = []

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_engines_lock = threading.Lock()
_shared: Engine | None = None
_shared_lock = threading.Lock()


def enter_engine(
    user: Any, at_exit: Callable[[], None], given: Engine | None, io_threads: int, **hooks: Any
) -> Engine:
    """Enter the engine a user is to have; `at_exit` and `hooks` as in `User`.

    The given one, one of its own for its `io_threads`, or the shared one.
    """
    global _shared
    if given is not None or io_threads:
        engine = given if given is not None else Engine(io_threads)
        engine.enter(user, at_exit, **hooks)
        return engine
    with _shared_lock:  # one new engine, whoever finds the old one left by its last user
        if _shared is None or not _shared._try_enter(user, User(at_exit, **hooks)):
            _shared = Engine()
            _shared.enter(user, at_exit, **hooks)
        return _shared


def _at_exit() -> None:
    with _engines_lock:
        running = list(_engines)
    for engine in running:
        engine.stop_at_exit()


# The I/O threads are not daemons, so the interpreter waits for them; this hook runs before it does. It
# exists on all supported versions (concurrent.futures relies on it); atexit would come too late and serves
# only as the fallback.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)

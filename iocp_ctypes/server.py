"""L6: Server: listening sockets, the connections they bring, and the way they all end.

Laws
1. Addresses, handler and options are checked before a socket exists; sockets are bound before the
   constructor returns.
2. `_lock` guards the counts and the table of connections; no user code and no native call runs under it.
3. A connection is counted from the moment it was accepted until its on_close has returned.
4. Stopping has one way: stop accepting, close gracefully, abort what is left at the deadline, leave the
   engine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ._acceptor import SILENT_LOOK_MAX, Accepted, Acceptor
from ._addresses import Address, check_addresses, format_address, parse_sockaddr
from ._channel import Buffer, as_bytes
from ._errors import ConnectionClosedError
from ._handover import Handover, check_handler, check_taking, set_options
from ._lifecycle import CloseReason
from ._lifetime import Home
from ._listening import address_of, bind_all, listen_on
from ._locks import lock_number
from ._options import ServerOptions, Settings, make_settings
from ._processes import Processes, check_processes
from ._relay import DIRECT_MAX
from ._tlschannel import check_tls
from ._tunables import Tunables
from ._watching import Watched
from .connection import Connection
from .engine import Engine, enter_engine
from .workers import WorkThreads

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ._workerprocess import Role

Handler = type[Connection] | Callable[["Server", Address], Connection]

#: Seconds that Ctrl-C leaves for a graceful end; with the poll interval it makes less than half a second.
INTERRUPT_TIMEOUT: Final = 0.15
#: Seconds for the packets of aborted connections to come back.
ABORT_TIMEOUT: Final = 1.0

log = logging.getLogger("iocp_ctypes")


class Server(Watched, Tunables, Handover):
    """A server on a completion port: of TCP, of named pipes, or of both.

    Use `serve_forever()`, or `start()` and `stop()`, or a `with` block, which starts and stops it.
    Thread-safe.
    """

    _role: Role | None = None  # set in a worker process, before the constructor is called
    _made_by: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remember how the server is made: worker processes make theirs by the same call."""
        made = super().__new__(cls)
        made._made_by = args, kwargs
        return made

    def __init__(
        self,
        address: Any,
        handler: Handler = Connection,
        *,
        engine: Engine | None = None,
        **options: Unpack[ServerOptions],
    ) -> None:
        r"""Bind and listen; nothing is accepted before `start`.

        Args:
            address: (host, port), a bound or listening stream socket, the name of a pipe such as
                r"\\.\pipe\NAME", or an iterable of several. Host "" is every interface, IPv4 and IPv6; port
                0 is any that is free.
            handler: a Connection subclass, or a factory called with (server, peer_address) that returns a
                Connection.
            engine: whose threads to use; None: the engine of the process, or one of its own where
                `io_threads` is named.
            options: see `iocp_ctypes.OPTIONS`.

        Raises:
            TypeError, ValueError: an option, an address or the handler is wrong; the message says what is
            allowed. OSError: an address cannot be had; the message names it.

        May ask the name service for the host, and blocks while it does.
        """
        self._settings: Settings = check_tls(make_settings(options))
        if self._role is not None:  # in a worker process, which the parent's constructor was checked for
            self._settings = self._role.settings(self._settings)
        self._handler: Callable[[Server, Address], Any] = check_handler(handler)
        check_taking(self, self._settings)
        if engine is not None and not isinstance(engine, Engine):
            raise TypeError(f"engine={engine!r}: must be an Engine or None")
        if engine is not None and self._settings.io_threads:
            count = self._settings.io_threads
            raise ValueError(
                f"io_threads={count}: the given engine has its own threads; leave one of the two out"
            )
        self._given_engine = engine
        self._engine: Engine | None = None
        places = [] if self._role else check_addresses(address)
        self._processes = self._make_processes(engine, places)
        self._sockets = bind_all(places, self._settings)
        self._addresses: tuple[Address | str, ...] = (
            self._role.addresses if self._role else tuple(map(address_of, self._sockets))
        )
        self._lock = threading.Lock()
        self._gone_one = threading.Condition(self._lock)
        self._connections: dict[int, Connection] = {}
        self._open = 0
        self._peak = 0
        self._hosts: Counter[str] = Counter()
        self._begin_counting(self._settings.trace)
        self._acceptor: Acceptor | None = None
        self._workers: WorkThreads | None = None
        self._home: Home | None = None
        self._parked: deque[tuple[Accepted, bytes]] = deque()  # accepted above max_connections
        self._stopping = False
        self._stopped = threading.Event()
        self._shutdown_wanted = threading.Event()
        self._serving = False  # true exactly while `serve_forever` runs, which raises what is in `_fatal`
        self._fatal: BaseException | None = None

    def _make_processes(self, engine: Engine | None, places: list[Any]) -> Processes | None:
        """Return the worker processes of the option `processes`, None where it is 1."""
        (args, kwargs), self._made_by = self._made_by, ((), {})
        count = self._settings.processes
        if count == 1:
            return None
        if engine is not None:
            raise ValueError(f"processes={count}: must be 1 where an engine is given: others cannot have it")
        check_processes(self, args, kwargs, places)
        return Processes(self, args, kwargs)

    # -- running --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to accept, and return at once; with `processes`, when all of them are ready.

        Raises:
            RuntimeError: it was started or stopped before, or a worker process could not start; the message
            says why, and none is left.
        """
        with self._lock:
            if self._engine is not None or self._stopping:
                raise RuntimeError("this server was started before: make another")
            settings = self._settings
            engine = self._engine = enter_engine(
                self,
                self._at_exit,
                self._given_engine,
                settings.io_threads,
                retrace=self._retrace,
                failed=self._io_failed,
                moved=self._moved,
            )
            workers = self._workers = WorkThreads(settings.work_threads) if settings.work_threads else None
            self._home = Home(
                engine=engine,
                gone=self._gone,
                failed=self._callback_failed,
                executor=workers.executor if workers else None,
                is_callback_thread=self._is_callback_thread,
                trace=self._trace,
            )
            try:
                listening = [listen_on(place, engine) for place in self._sockets]
            except BaseException:
                engine.leave(self)
                raise
            self._acceptor = Acceptor(
                listening,
                engine.watchdog,
                engine.dispatcher,
                settings.backlog,
                settings.accept_data,
                self._room,
                self._admit,
                self._accepted,
            )
        if workers:
            workers.start()
        if self._processes:
            try:
                self._processes.start()
            except BaseException:
                self.stop(0)
                raise
        self._retrace()
        self._acceptor.top_up()
        if settings.accept_data:
            self._look_for_silent()
        log.debug("listening on %s", ", ".join(format_address(address) for address in self.addresses))

    def serve_forever(self, poll_interval: float = 0.25) -> None:
        """Serve until `shutdown`, `stop` or Ctrl-C, then stop. Starts the server where `start` was not
        called.

        Args:
            poll_interval: seconds between two looks for Ctrl-C, which Windows does not let through while a
                thread waits.

        Ctrl-C returns as `shutdown` does. SystemExit or KeyboardInterrupt raised by a callback is raised
        again here; where this does not run it is logged, and the server stops. Blocks; from the main thread,
        if Ctrl-C shall work.
        """
        with self._lock:
            self._serving = True
        try:
            if self._engine is None:
                self.start()
            timeout = 5.0
            try:
                while not self._shutdown_wanted.wait(poll_interval):
                    pass
            except KeyboardInterrupt:
                timeout = INTERRUPT_TIMEOUT
            self.stop(timeout)
        finally:
            with self._lock:
                self._serving, fatal = False, self._fatal
        if fatal is not None:
            raise fatal

    def shutdown(self) -> None:
        """Make `serve_forever` stop the server and return. Any thread; does not block."""
        self._shutdown_wanted.set()

    def stop(self, timeout: float = 5.0) -> bool:
        """Stop accepting, close all connections gracefully, at the deadline abort who is left, end threads.

        Args:
            timeout: seconds for the graceful part.

        Returns:
            True where every connection's on_close has returned and all threads have ended. From a callback:
            False, for the rest happens on another thread after the callback has returned.

        Any thread; blocks for `timeout` and up to two seconds more.
        """
        if self._home is not None and self._is_callback_thread():
            self._shutdown_wanted.set()
            threading.Thread(target=self.stop, args=(timeout,), name="iocp_ctypes stop").start()
            return False
        with self._lock:
            first, self._stopping = not self._stopping, True
        if not first:
            return self._stopped.wait(timeout + 2 * ABORT_TIMEOUT)
        self._shutdown_wanted.set()
        self.server_close()
        deadline = monotonic() + timeout
        with self._lock:
            parked = list(self._parked)
            self._parked.clear()
        for sock, _first in parked:
            sock.close()
            self._release("refused")
        if self._processes:
            self._processes.ask_to_stop(timeout)
        for connection in self.connections:
            connection._shutdown()
        gone = self._wait_gone(deadline)
        if not gone:
            for connection in self.connections:
                connection._abort(CloseReason.SHUTDOWN)
            gone = self._wait_gone(monotonic() + ABORT_TIMEOUT)
        over = max(deadline, monotonic() + ABORT_TIMEOUT)  # for threads and processes to end
        others_ended = not self._processes or self._processes.stop(over - monotonic())
        if not gone and self._processes:
            gone = self._wait_gone(monotonic())  # those of processes that were ended
        ended = (self._workers.stop(over - monotonic()) if self._workers else True) and others_ended
        if self._engine is not None:
            ended = self._engine.leave(self, over - monotonic()) and ended
        self._stopped.set()
        log.debug(
            "stopped serving %s: %s",
            ", ".join(format_address(address) for address in self.addresses),
            "all has ended" if gone and ended else "callbacks that go on were left behind",
        )
        return gone and ended

    def server_close(self) -> None:
        """Stop listening; connections go on. Any thread; does not block."""
        if self._acceptor is not None:
            self._acceptor.close()
        else:
            for sock in self._sockets:
                sock.close()

    def _wait_gone(self, deadline: float) -> bool:
        with self._gone_one:
            while self._open and (left := deadline - monotonic()) > 0:
                self._gone_one.wait(min(left, 0.25))
            return not self._open

    def _at_exit(self) -> None:
        self.stop(0.5)

    def __enter__(self) -> Server:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop the server."""
        self.stop()

    # -- accepting, on the I/O threads ----------------------------------------------------------------------

    def _room(self) -> int:
        most = self._settings.max_connections
        return 1 << 30 if most is None else most - self._open

    def _is_full(self, leaving: int) -> bool:
        """Whether more are accepted than may be served, counting `leaving` of those parked out.

        Needs the lock.
        """
        assert self._lock.locked()
        most = self._settings.max_connections
        return most is not None and self._open - len(self._parked) + leaving > most

    def _admit(self) -> None:
        with self._lock:
            self._open += 1
            if self._open > self._peak:
                self._peak = self._open

    def _release(self, what: str) -> None:
        """Uncount one that was admitted and does not begin, and count why. Any thread."""
        with self._gone_one:
            self._open -= 1
            self._counts[what] += 1
            self._gone_one.notify_all()
        self._refill_soon()

    def _refill_soon(self) -> None:
        """Let in who waits, on a thread of callbacks: this one, or soon. Any thread."""
        if self._engine is None or (self._settings.max_connections is None and not self._parked):
            return  # nobody waits
        if self._is_callback_thread():
            self._refill()
        elif not self._stopping:
            with contextlib.suppress(OSError):  # it has stopped meanwhile
                self._engine.dispatcher.call_soon(self._refill)

    def _refill(self) -> None:
        """There may be room again: let in who waits. On a thread of callbacks."""
        while self._parked:
            with self._lock:
                waiting = self._parked.popleft() if self._parked and not self._is_full(1) else None
            if waiting is None:
                break
            self._accepted(*waiting)
        if self._settings.max_connections is not None and self._acceptor is not None:
            self._acceptor.top_up()

    def _accepted(self, sock: Accepted, first: bytes) -> None:
        """Make a connection of an accepted socket, or turn it away."""
        assert self._home is not None
        settings = self._settings
        with self._lock:
            if self._is_full(0) and not self._stopping:
                self._parked.append((sock, first))
                return
        peer = parse_sockaddr(sock.peer_raw)
        if peer is None or self._stopping:
            sock.close()
            self._release("refused" if self._stopping else "accept_failed")
            return
        if not self._welcome(peer, settings):
            sock.reset_on_close()
            sock.close()
            self._release("refused")
            return
        remaining = self._was_taken(sock, peer, first)
        if remaining is None:
            return
        sock = remaining
        try:
            set_options(sock, settings)
            sock.associate(self._home.engine.port)
        except OSError as exc:
            log.debug("%s was gone before it could be served: %s", format_address(peer), exc)
            sock.close()
            self._leave_host(peer)
            self._release("accept_failed")
            return
        connection = self._make(peer, sock, settings)
        if connection is None:
            return
        self._begin_with(connection, first, self._enrol(connection))

    def _welcome(self, peer: Address, settings: Settings) -> bool:
        host = peer[0]
        with self._lock:
            if settings.max_per_host is not None and self._hosts[host] >= settings.max_per_host:
                return False
            self._hosts[host] += 1
        try:
            if self.verify_request(peer):
                return True
        except BaseException as exc:
            self._hook_failed(exc, f"verify_request raised for {format_address(peer)}, which is refused")
        self._leave_host(peer)
        return False

    def _leave_host(self, peer: Address) -> None:
        with self._lock:
            self._hosts[peer[0]] -= 1
            if not self._hosts[peer[0]]:
                del self._hosts[peer[0]]

    def _gone(self, connection: Connection) -> None:
        """A connection's on_close has returned."""
        self._leave_host(connection.peer_address)
        with self._gone_one:
            self._connections.pop(connection.id, None)
            self._open -= 1
            self._closed[str(connection.close_reason)] += 1
            self._past.add(connection)
            if self._stopping:
                self._gone_one.notify_all()
        if self._role is not None:
            self._role.gone(connection.peer_address[0])
        self._refill()

    def _gone_elsewhere(self, hosts: Sequence[str], counts: Mapping[str, int]) -> None:
        """Connections that worker processes had, or were to have, have gone. On a thread of `_processes`."""
        with self._gone_one:
            for host in hosts:
                self._hosts[host] -= 1
                if not self._hosts[host]:
                    del self._hosts[host]
            self._open -= len(hosts)
            self._counts["refused"] += counts.get("refused", 0)
            if lost := counts.get("lost", 0):
                self._closed[CloseReason.ABORTED.value] += lost
            self._gone_one.notify_all()
        self._refill_soon()

    def _callback_failed(self, connection: Connection, exc: BaseException) -> None:
        whose = f"connection {connection.id} from {format_address(connection.peer_address)}"
        if not isinstance(exc, Exception):
            self._hook_failed(exc, f"{whose}: a callback raised")
            return
        try:
            self.handle_error(connection, exc)
        except BaseException as another:
            self._hook_failed(another, f"{whose}: handle_error raised")

    def _hook_failed(self, exc: BaseException, what: str) -> None:
        """Log what user code raised. SystemExit and KeyboardInterrupt end more."""
        if isinstance(exc, Exception):
            log.error(what, exc_info=exc)
        else:
            self._end_serving(exc, what)

    def _end_serving(self, exc: BaseException, what: str) -> None:
        """Have serve_forever raise this; where it does not run, log it and stop. Any thread; never blocks."""
        with self._lock:
            if self._fatal is None:  # the first wins
                self._fatal = exc
            raised = self._serving or self._role is not None  # a worker process tells its parent
            stopping = self._stopping
        self._shutdown_wanted.set()
        if raised:
            return
        if not stopping:
            with contextlib.suppress(RuntimeError):  # the system is short of threads: it is logged, at least
                threading.Thread(target=self.stop, name="iocp_ctypes stop").start()
        log.error("%s; the server stops, for no serve_forever is there to raise it", what, exc_info=exc)

    def _io_failed(self, exc: BaseException) -> None:
        if self._role is not None:  # what its parent can be told
            exc = SystemExit(f"the I/O threads of a worker process failed: {exc}")
        self._end_serving(exc, "the I/O threads failed")

    def _look_for_silent(self) -> None:
        """Reap sockets that are connected and silent inside AcceptEx, every so often.

        On the watchdog's thread.
        """
        acceptor, engine, timeout = self._acceptor, self._engine, self._settings.silent_timeout
        if acceptor is None or engine is None or self._stopping:
            return
        if timeout is not None:
            acceptor.reap_silent(timeout)
        engine.watchdog.later(min(SILENT_LOOK_MAX, (timeout or SILENT_LOOK_MAX) / 4), self._look_for_silent)

    def _is_callback_thread(self) -> bool:
        engine, workers = self._engine, self._workers
        return (engine is not None and engine.dispatcher.is_io_thread()) or (
            workers is not None and workers.is_work_thread()
        )

    # -- for subclasses -------------------------------------------------------------------------------------

    def verify_request(self, peer_address: Address) -> bool:
        """Return False to refuse a peer, which sees a reset. On an I/O thread: do not block."""
        return True

    def handle_error(self, connection: Connection, exc: BaseException) -> None:
        """A callback of a connection raised; the connection is closed with reason `error`. Logs it with its
        traceback.

        On the thread of the callback.
        """
        local, peer = format_address(connection.local_address), format_address(connection.peer_address)
        log.error("connection %d from %s to %s: a callback raised", connection.id, peer, local, exc_info=exc)

    # -- what runs ------------------------------------------------------------------------------------------

    @property
    def address(self) -> Any:
        """The first address this server listens on, with the port it got; of a pipe, its name."""
        return self._addresses[0]

    @property
    def addresses(self) -> tuple[Any, ...]:
        """All addresses this server listens on."""
        return self._addresses

    @property
    def engine(self) -> Engine | None:
        """The engine this server runs on; None before `start`."""
        return self._engine

    @property
    def connections(self) -> list[Connection]:
        """The connections of this instant; with `processes`, those of the process that asks."""
        with self._lock:
            return list(self._connections.values())

    def broadcast(self, data: Buffer, where: Callable[[Connection], bool] | None = None) -> int:
        """Send the same bytes to all connections, or to those for which `where` is true; never blocks.

        To more than 64 they are queued where that can wait: the I/O threads then go from one connection to
        the next, and broadcasts that come meanwhile go out with them. The order with all else that is sent is
        kept.

        To those of this process: with `processes`, call it in a callback to reach those of its worker.

        A peer that reads too slowly is closed with `overflow` once `write_buffer_max` bytes wait for it.

        Returns:
            To how many connections they were handed.
        """
        encoded = as_bytes(data)
        reached, chosen = 0, self.connections
        if where is not None:
            chosen = list(filter(where, chosen))
        directly = len(chosen) <= DIRECT_MAX
        if not directly:
            chosen.sort(key=lambda connection: lock_number(connection.id))
        for connection in chosen:
            try:
                if directly:
                    connection.send(encoded)
                else:
                    connection._send_in_turn(encoded)
                reached += 1
            except ConnectionClosedError:
                continue  # it ended a moment ago
        return reached

    def pause_accepting(self) -> None:
        """Accept no more until `resume_accepting`; the kernel queues up to `listen_backlog` peers."""
        if self._acceptor is not None:
            self._acceptor.pause()

    def resume_accepting(self) -> None:
        """Accept again."""
        if self._acceptor is not None:
            self._acceptor.resume()

    def close_clients(self) -> None:
        """Close all connections gracefully, also those of worker processes."""
        if self._processes:
            self._processes.tell("close_clients")
        for connection in self.connections:
            connection.close()

    def abort_clients(self) -> None:
        """Abort all connections, also those of worker processes."""
        if self._processes:
            self._processes.tell("abort_clients")
        for connection in self.connections:
            connection.abort()

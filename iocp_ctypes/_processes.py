"""L6: Processes, the worker processes of a server that has the option `processes`.

Laws
1. This process accepts, and hands each connection, which has no completion port yet, to the worker with the
   fewest; a connection stays with its worker.
2. A socket is closed here when its worker has said that it has opened its own.
3. Each worker has two threads here: one starts it, hears it and sees it end, one sends. Whoever hands over
   only queues.
4. A worker that ends unasked is replaced, after a pause that grows while they keep ending.
5. A connection is counted by the server from here until its worker said that it has gone, or has ended.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import logging
import pickle
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ._options import Settings
from ._stats import Stats, merged, of_the_past
from ._workerprocess import Recipe, Report, main

if TYPE_CHECKING:
    from ._addresses import Address

#: Sockets that wait to be sent to a worker; more are refused.
WAITING_MAX: Final = 1000
#: Sockets in one message.
BATCH_MAX: Final = 64
#: Seconds before a worker that ended is replaced: doubled each time up to the last.
RESTART_FIRST: Final = 0.1
RESTART_MAX: Final = 10.0
#: Times that `start` asks the system for a process: it may be short of something for a moment.
TRIES_MAX: Final = 3
#: Seconds for a worker to be ready: importing a large program takes a while.
START_TIMEOUT: Final = 60.0
#: Seconds for a process to end once its pipe has.
END_TIMEOUT: Final = 2.0
#: Seconds between two looks for Ctrl-C, which Windows does not let through while a thread waits.
LOOK_INTERVAL: Final = 0.1
#: The name of worker processes, by which one knows itself while it imports the program again.
NAME: Final = "iocp_ctypes worker"

log = logging.getLogger("iocp_ctypes")

_spawning = threading.Lock()  # multiprocessing does not say that processes may be started at the same time


class Handed(NamedTuple):
    """A connection on its way to a worker."""

    sock: socket.socket
    host: str
    first: bytes  # received from it already


def choose(loads: Sequence[int | None], last: int) -> int | None:
    """Return the index of the smallest load, of equal ones the next after `last`; None: there is none.

    None among the loads is a worker that takes nothing now.
    """
    turns = [(last + 1 + step) % len(loads) for step in range(len(loads))]
    return min(
        (turn for turn in turns if loads[turn] is not None), key=lambda turn: loads[turn] or 0, default=None
    )


class _Pickler(pickle.Pickler):
    """Leaves sockets out: where to listen is the parent's business."""

    def reducer_override(self, thing: Any) -> Any:
        return (_no_socket, ()) if isinstance(thing, socket.socket) else NotImplemented


def _no_socket() -> None:
    """What a worker sees in place of a listening socket."""


def _pickled(thing: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file).dump(thing)
    return file.getvalue()


def check_processes(server: Any, args: tuple[Any, ...], kwargs: dict[str, Any], addresses: list[Any]) -> None:
    """Raise where a server cannot have several processes; before a socket exists."""
    import multiprocessing

    count = server._settings.processes
    if multiprocessing.current_process().name.startswith(NAME):
        raise RuntimeError(
            f"processes={count}: a worker process imports the program again, so what starts the server must"
            ' stand below `if __name__ == "__main__":`'
        )
    for address in addresses:
        if isinstance(address, str):
            raise ValueError(f"processes={count}: must be 1 for a pipe, such as {address!r}")
    try:
        _pickled(type(server))
    except Exception as exc:
        raise TypeError(
            f"processes={count}: the class {type(server).__qualname__} must be at the top level of a module,"
            f" for worker processes to import it ({exc})"
        ) from exc
    bound = inspect.signature(type(server).__init__).bind(server, *args, **kwargs)
    given = dict(list(bound.arguments.items())[1:])
    for name, value in list(given.items()):
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given.update(given.pop(name))
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            given[name] = tuple(value)
    for name, value in given.items():
        try:
            _pickled(value)
        except Exception as exc:
            hint = (
                "make the context in the constructor of a subclass, which each process calls"
                if name == "tls"
                else "classes and functions must be at the top level of a module"
            )
            raise TypeError(
                f"{name}={value!r}: with processes={count} must be something that pickle takes:"
                f" {hint} ({exc})"
            ) from exc


class Processes:
    """The workers of one server. Thread-safe; `start` and `stop` block."""

    def __init__(self, server: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make them; `start` starts them. `args` and `kwargs` are the server's own."""
        self._server = server
        self._call = args, kwargs
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        count = server._settings.processes
        self._workers: list[_Worker | None] = [None] * count
        self._last = -1
        self._waiting: deque[Handed] = deque()  # while no worker is ready
        self._running = False  # all have been ready once
        self._stopping = False
        self._failure = ""
        self._clean = True  # no worker had to be ended by force
        self._past: list[Stats] = []  # one or none: of workers that have ended
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"iocp_ctypes process {number + 1}")
            for number in range(count)
        ]

    def start(self) -> None:
        """Start the workers and wait until all are ready; RuntimeError where one cannot be."""
        for thread in self._threads:
            thread.start()
        with self._lock:
            while not self._failure and not self._stopping:
                if all(worker is not None and worker.ready for worker in self._workers):
                    self._running = True
                    return
                self._changed.wait(LOOK_INTERVAL)
            failure = self._failure or "the server was stopped meanwhile"
        raise RuntimeError(f"processes={len(self._workers)}: a worker process could not start: {failure}")

    def recipe(self) -> bytes:
        """What a worker needs to know."""
        server, (args, kwargs) = self._server, self._call
        return _pickled(Recipe(type(server), args, kwargs, server.addresses, _plain(server._settings)))

    # -- connections ----------------------------------------------------------------------------------------

    def give(self, sock: socket.socket, peer: Address, first: bytes) -> bool:
        """Queue a connection for a worker; False: none takes it. Any thread; never blocks."""
        handed = Handed(sock, peer[0], first)
        with self._lock:
            return self._give(handed)

    def _give(self, handed: Handed) -> bool:
        """Queue a connection. Needs the lock."""
        assert self._lock.locked()
        if self._stopping:
            return False
        ready = [worker if worker is not None and worker.ready else None for worker in self._workers]
        loads = [worker.load if worker is not None else None for worker in ready]
        chosen = choose(loads, self._last)
        if chosen is not None and (worker := ready[chosen]) is not None:
            self._last = chosen
            worker.take(handed)
            return True
        if any(ready) or len(self._waiting) >= WAITING_MAX:
            return False
        self._waiting.append(handed)  # for the first that is ready
        return True

    def gone(self, hosts: Sequence[str], figures: Counter[str] | None = None) -> None:
        """Connections of these hosts have gone."""
        self._server._gone_elsewhere(hosts, figures or Counter())

    def refuse(self, handed: Sequence[Handed]) -> None:
        """Reset connections that no worker takes."""
        for one in handed:
            reset(one.sock)
        if handed:
            self.gone([one.host for one in handed], Counter(refused=len(handed)))

    # -- workers --------------------------------------------------------------------------------------------

    def _keep(self, number: int) -> None:
        """Have a worker in this place until the server stops. On a thread of its own."""
        delay, tries = RESTART_FIRST, 0
        while True:
            tries += 1
            began = monotonic()
            worker = _Worker(self, number)
            with self._lock:
                if self._stopping:
                    return
                self._workers[number] = worker
            told = worker.run()
            with self._lock:
                self._workers[number] = None
                if worker.stats is not None:
                    self._past = [merged(of_the_past(worker.stats), map(of_the_past, self._past))]
                self._changed.notify_all()
                if self._stopping:
                    self._clean &= worker.left_well
                    return
                if not self._running and not (worker.short and tries < TRIES_MAX):
                    self._failure = self._failure or told
                    return
                if monotonic() - began > RESTART_MAX:
                    delay = RESTART_FIRST
            log.warning(
                "worker process %d (id %s) of the server on %s has ended: %s; another is started in %.1f s",
                number + 1,
                worker.pid,
                self._server.address,
                told,
                delay,
            )
            deadline = monotonic() + delay
            delay = min(RESTART_MAX, delay * 2)
            with self._lock:
                while not self._stopping and (left := deadline - monotonic()) > 0:
                    self._changed.wait(left)

    def is_ready(self, worker: _Worker) -> bool:
        """A worker can take connections now; False: it shall not, for the server stops."""
        with self._lock:
            if self._stopping:
                return False
            worker.ready, worker.left_well = True, False
            worker.say("settings", _plain(self._server._settings))  # may have changed meanwhile
            while self._waiting:
                worker.take(self._waiting.popleft())
            self._changed.notify_all()
            return True

    def heard(self, report: Report) -> None:
        """A worker has said something for the server."""
        if report.gone:
            self.gone(report.gone)
        if report.fatal is not None:
            self._server._end_serving(report.fatal, "a callback in a worker process raised")
        if report.shutdown:
            self._server.shutdown()

    # -- all of them ----------------------------------------------------------------------------------------

    def tell(self, what: str, value: Any = None) -> None:
        """Queue a message for each worker. Any thread; never blocks."""
        with self._lock:
            for worker in self._workers:
                if worker is not None and worker.ready:
                    worker.say(what, value)

    def retune(self, settings: Settings) -> None:
        """Tell the workers the options of new connections."""
        self.tell("settings", _plain(settings))

    def add_to(self, own: Stats) -> Stats:
        """Return the figures of a server with those that its workers last reported."""
        with self._lock:
            parts = [worker.stats for worker in self._workers if worker is not None and worker.stats]
            return merged(own, [*parts, *self._past])

    def ask_to_stop(self, timeout: float) -> None:
        """Tell all workers to stop. Never blocks; `stop` waits for them."""
        with self._lock:
            self._stopping = True
            left = list(self._waiting)
            self._waiting.clear()
            for worker in self._workers:
                if worker is None:
                    continue
                left += worker.queue
                worker.forget_queue()
                if worker.ready:
                    worker.say("stop", timeout)
                else:
                    worker.kill()
            self._changed.notify_all()
        self.refuse(left)

    def stop(self, timeout: float) -> bool:
        """Wait for the workers, and end those that do not go in time; whether all went well."""
        deadline = monotonic() + timeout
        while any(thread.is_alive() for thread in self._threads) and monotonic() < deadline:
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join(min(LOOK_INTERVAL, max(0.0, deadline - monotonic())))
        with self._lock:
            left = [worker for worker in self._workers if worker is not None]
            for worker in left:
                self._clean = False
                worker.kill()
        for worker in left:
            log.warning("worker process %s did not stop, and was ended", worker.pid)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(END_TIMEOUT)
        return self._clean and not any(thread.is_alive() for thread in self._threads)


def _plain(settings: Settings) -> Settings:
    """Settings without what cannot be handed over."""
    return dataclasses.replace(settings, tls=None)


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("HH", 1, 0))
    except OSError:
        pass  # the peer has gone, so there is nobody to see it
    sock.close()


class _Worker:
    """One process, from its start to its end; its fields are guarded by the lock of all."""

    def __init__(self, home: Processes, number: int) -> None:
        self._home = home
        self._number = number
        self._wake = threading.Condition(home._lock)
        self._process: Any = None
        self._conn: Any = None
        self.pid = 0  # 0: none yet
        self.ready = False
        self._ended = False
        self._killed = False
        self.short = False  # the system had no process to give
        self.left_well = True  # its server had stopped before it ended, or it never served
        self.stats: Stats | None = None
        self._messages: deque[tuple[str, Any]] = deque()
        self.queue: deque[Handed] = deque()  # to be sent
        self._unopened: deque[Handed] = deque()  # sent; the worker has not said that it has opened it
        self._hosts: Counter[str] = Counter()  # of all that was handed to it and has not gone
        self._open = 0  # how many these are

    @property
    def load(self) -> int | None:
        """How many connections it has; None: it can take no more now."""
        return self._open if len(self.queue) < WAITING_MAX else None

    # -- what others ask for; they need the lock of all ----------------------------------------------------

    def take(self, handed: Handed) -> None:
        """Queue a connection. Needs the lock."""
        assert self._home._lock.locked()
        self.queue.append(handed)
        self._hosts[handed.host] += 1
        self._open += 1
        self._wake.notify()

    def say(self, what: str, value: Any) -> None:
        """Queue a message. Needs the lock."""
        assert self._home._lock.locked()
        self._messages.append((what, value))
        self._wake.notify()

    def forget_queue(self) -> None:
        """Somebody else sees to what was not sent. Needs the lock."""
        assert self._home._lock.locked()
        for handed in self.queue:
            self._forget(handed.host)
        self.queue.clear()

    def kill(self) -> None:
        """End it by force. Needs the lock."""
        assert self._home._lock.locked()
        self._killed = True
        if self._process is not None:
            self._process.kill()

    def _forget(self, host: str) -> None:
        self._open -= 1
        self._hosts[host] -= 1
        if not self._hosts[host]:
            del self._hosts[host]

    # -- its life ------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Start it, hear it, see it end; what there is to say about its end."""
        try:
            told = self._spawn()
        except Exception as exc:  # multiprocessing asserts, for one, that a daemon starts none
            self.short = isinstance(exc, OSError)
            return f"no process could be made: {type(exc).__name__}: {exc}"
        sender = threading.Thread(target=self._send, name=f"iocp_ctypes to process {self._number + 1}")
        try:
            if not told and self._home.is_ready(self):
                sender.start()
                self._hear()
        except RuntimeError as exc:
            told = f"{exc}"  # no thread could be started
        finally:
            with self._home._lock:
                self.ready, self._ended = False, True
                self._wake.notify_all()
            if sender.ident is not None:
                sender.join()
            self._conn.close()
            self._end()
        with self._home._lock:
            process, self._process = self._process, None
        code = process.exitcode
        process.close()
        self._let_go()
        return told or f"exit code {code}"

    def _spawn(self) -> str:
        """Start the process and tell it what to do; why it cannot, or nothing."""
        import multiprocessing
        from multiprocessing import connection

        context = multiprocessing.get_context("spawn")
        self._conn, theirs = context.Pipe()
        process = context.Process(target=main, args=(theirs,), name=f"{NAME} {self._number + 1}")
        try:
            with _spawning:
                process.start()
        except BaseException:
            self._conn.close()
            raise
        finally:
            theirs.close()
        with self._home._lock:
            self._process = process
            if self._killed:
                process.kill()
        try:
            # Until it has taken its end of the pipe, that is open here, and does not end with it.
            heard = connection.wait([self._conn, process.sentinel], START_TIMEOUT)
            if self._conn in heard:
                self.pid = self._conn.recv()
                self._conn.send_bytes(self._home.recipe())
                if self._conn.poll(START_TIMEOUT):
                    return self._conn.recv() or ""
                heard = []
        except (EOFError, OSError):
            heard = [self._conn]
        except BaseException:  # what it is to do cannot be written
            process.kill()
            self._conn.close()
            raise
        if not heard:
            process.kill()
            return f"it was not ready after {START_TIMEOUT:.0f} s"
        process.join(END_TIMEOUT)
        return f"it ended with exit code {process.exitcode} before it was ready; see its stderr"

    def _hear(self) -> None:
        while True:
            try:
                report: Report = self._conn.recv()
            except (EOFError, OSError):
                return
            except Exception:
                log.exception("what worker process %d said cannot be read: it is replaced", self.pid)
                return
            with self._home._lock:
                opened = [self._unopened.popleft() for _ in range(report.opened)]
                for host in report.gone:
                    self._forget(host)
                self.stats = report.stats or self.stats
                if report.stopped is not None:
                    self.left_well = report.stopped
            for handed in opened:
                handed.sock.close()
            self._home.heard(report)

    def _send(self) -> None:
        while True:
            with self._home._lock:
                while not (self.queue or self._messages or self._ended):
                    self._wake.wait()
                if self._ended:
                    return
                batch = [self.queue.popleft() for _ in range(min(BATCH_MAX, len(self.queue)))]
                self._unopened.extend(batch)
                messages = list(self._messages)
                self._messages.clear()
            try:
                if batch:
                    shared = [(self._share(handed), handed.host, handed.first) for handed in batch]
                    self._conn.send(("serve", shared))
                for message in messages:
                    self._conn.send(message)
            except OSError:
                return  # it has ended, which the other thread sees

    def _share(self, handed: Handed) -> bytes:
        """What opens a socket there; nothing where the system refuses, and then it cannot be opened."""
        try:
            shared: bytes = handed.sock.share(self.pid)  # type: ignore[attr-defined, unused-ignore]
        except OSError as exc:
            log.warning("a connection of %s could not be shared with a worker: %s", handed.host, exc)
            return b""
        return shared

    def _end(self) -> None:
        """See the process end; by force where it does not by itself."""
        self._process.join(END_TIMEOUT)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _let_go(self) -> None:
        """It has ended: what it was not sent another takes, what it had is gone."""
        home = self._home
        with home._lock:
            queued, unopened = list(self.queue), list(self._unopened)
            self.forget_queue()
            self._unopened.clear()
            lost = list(self._hosts.elements())
            self._hosts.clear()
            refused = [handed for handed in queued if not home._give(handed)]
        for handed in unopened:
            reset(handed.sock)
        home.refuse(refused)
        if lost:
            home.gone(lost, Counter(lost=len(lost)))

"""L6: a worker process: it serves the connections that another process has accepted and hands to it.

Laws
1. Its server is made as its parent's was, by the same call, and listens nowhere: `Role` says so.
2. What it is sent it takes in the order in which it came, and tells how many sockets it has opened, so that
   the parent can close its own handles, and which hosts' connections have gone.
3. It ends when it is told to, and when its parent has ended: then its pipe ends. Ctrl-C is the parent's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import socket
import sys
import threading
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ._options import Settings

if TYPE_CHECKING:
    from ._stats import Stats

#: Seconds between two reports of figures; ends are told at once.
REPORT_INTERVAL: Final = 0.5
#: Making figures looks at each connection: it may take one part in so many of a worker's time.
REPORT_SHARE: Final = 20
#: Seconds for a graceful end where the parent has gone: nobody waits for it any more.
ORPHAN_TIMEOUT: Final = 0.3

log = logging.getLogger("iocp_ctypes")


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How a worker makes its server: the call that made the parent's, and what the parent is now."""

    kind: Any  # the class of the server
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    addresses: tuple[Any, ...]
    settings: Settings  # without the context of tls


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a worker says from time to time."""

    opened: int = 0  # sockets since the last report
    gone: tuple[str, ...] = ()  # the hosts of connections that have gone since then
    stats: Stats | None = None
    shutdown: bool = False  # a callback called Server.shutdown or stop
    fatal: BaseException | None = None  # a callback raised SystemExit or KeyboardInterrupt
    stopped: bool | None = None  # the last report: what Server.stop has returned


class Role:
    """What makes a server that of a worker: whose addresses it serves, and whom it tells."""

    def __init__(self, conn: Any, recipe: Recipe) -> None:
        """Say with what connection (of multiprocessing) to the parent."""
        self.addresses = recipe.addresses
        self._settings = recipe.settings
        self._conn = conn
        self._changed = threading.Condition()
        self._opened = 0
        self._gone: list[str] = []
        self._ending = False
        self._told_shutdown = False
        self._thread = threading.Thread(target=self._run, name="iocp_ctypes reports")
        self._server: Any = None

    def settings(self, own: Settings) -> Settings:
        """Return the settings of a worker: caps are the parent's business, a TLS context is its own."""
        return dataclasses.replace(
            self._settings, processes=1, max_connections=None, max_per_host=None, tls=own.tls
        )

    def change(self, settings: Settings) -> None:
        """The parent's settings have changed: those of new connections follow."""
        self._settings = settings
        server = self._server
        with server._lock:
            server._settings = dataclasses.replace(
                self.settings(server._settings), trace=server._settings.trace
            )
        if server.trace != settings.trace:
            server.trace = settings.trace

    def begin(self, server: Any) -> None:
        """Report from now on."""
        self._server = server
        self._thread.start()

    def opened(self) -> None:
        """A socket has a handle in this process now."""
        with self._changed:
            self._opened += 1
            self._changed.notify()

    def gone(self, host: str) -> None:
        """A connection of this host has gone. Any thread; never blocks."""
        with self._changed:
            self._gone.append(host)
            self._changed.notify()

    def end(self, stopped: bool) -> None:
        """Report a last time."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        self._tell(Report(self._opened, tuple(self._gone), self._server.stats(), stopped=stopped))

    def _tell(self, report: Report) -> bool:
        try:
            self._conn.send(report)
        except OSError:
            return False  # the parent has gone, and the main thread sees that, too
        return True

    def _run(self) -> None:
        due = monotonic() + REPORT_INTERVAL
        while True:
            with self._changed:
                if not (self._opened or self._gone or self._ending):
                    self._changed.wait(max(0.0, due - monotonic()))
                if self._ending:
                    return  # `end` tells the rest
                opened, gone = self._opened, tuple(self._gone)
                self._opened = 0
                self._gone.clear()
            figures = None
            if (began := monotonic()) >= due:
                figures = self._server.stats()
                now = monotonic()
                due = now + max(REPORT_INTERVAL, REPORT_SHARE * (now - began))
            shutdown = self._server._shutdown_wanted.is_set() and not self._told_shutdown
            self._told_shutdown |= shutdown
            if (opened or gone or figures or shutdown) and not self._tell(
                Report(opened, gone, figures, shutdown, _told(self._server._fatal) if shutdown else None)
            ):
                return


def _told(exc: BaseException | None) -> BaseException | None:
    """What a callback raised to end the program, as another process can read it."""
    if isinstance(exc, SystemExit):
        return SystemExit(exc.code if isinstance(exc.code, (int, str, type(None))) else 1)
    return None if exc is None else KeyboardInterrupt()


def main(conn: Any) -> None:
    """Serve what `conn` brings until it says stop or ends. The main thread of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        conn.send(os.getpid())
        text = conn.recv_bytes()
    except (EOFError, OSError):
        return  # the parent ended meanwhile
    try:
        server, role = _make(conn, text)
    except BaseException as exc:
        conn.send(f"{type(exc).__name__}: {exc}")
        sys.exit(1)
    conn.send(None)
    role.begin(server)
    timeout = _serve(conn, server, role)
    ended = server.stop(ORPHAN_TIMEOUT if timeout is None else timeout)
    role.end(ended)
    conn.close()
    if timeout is None and not ended:
        os._exit(1)  # a callback that does not return would keep the process for ever


def _make(conn: Any, text: bytes) -> tuple[Any, Role]:
    """Make the server that a pickled recipe describes, and start it."""
    recipe: Recipe = pickle.loads(text)
    role = Role(conn, recipe)
    server = recipe.kind.__new__(recipe.kind, *recipe.args, **recipe.kwargs)
    server._role = role
    server.__init__(*recipe.args, **recipe.kwargs)
    server.start()
    return server, role


def _serve(conn: Any, server: Any, role: Role) -> float | None:
    """Do what the parent says; the timeout with which it says stop, None where it has ended."""
    while True:
        try:
            what, value = conn.recv()
        except (EOFError, OSError):
            return None
        if what == "serve":
            for shared, host, first in value:
                _adopt(server, role, shared, host, first)
        elif what == "settings":
            role.change(value)
        elif what == "stop":
            timeout: float = value
            return timeout
        else:
            getattr(server, what)()  # close_clients, abort_clients


def _adopt(server: Any, role: Role, shared: bytes, host: str, first: bytes) -> None:
    """Serve one socket."""
    sock: socket.socket | None = None
    try:
        try:
            sock = socket.fromshare(shared)  # type: ignore[attr-defined, unused-ignore]  # on Windows
        finally:
            role.opened()
        assert sock is not None
        server.adopt(sock, first)
    except RuntimeError:
        pass  # the handler made no connection, which the log says, or the server is being stopped
    except (OSError, ValueError) as exc:  # of a peer that is gone
        log.debug("a connection of %s was gone before it could be served: %s", host, exc)
        with server._lock:
            server._counts["accept_failed"] += 1
    else:
        return
    if sock is not None:
        sock.close()
    role.gone(host)

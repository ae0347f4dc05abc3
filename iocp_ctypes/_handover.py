"""L6: Handover, what a server does with connections that come from elsewhere or go elsewhere.

Laws
1. A socket that is adopted is served as if it had been accepted: counted, in the table, told when the server
   stops.
2. A socket that is taken away has not been bound to a completion port: whoever gets it, in whatever process,
   may bind it to one. It has been verified, and counts no more.
"""

from __future__ import annotations

import functools
import logging
import socket
from typing import TYPE_CHECKING, Any

from ._addresses import Address, format_address, parse_sockaddr
from ._channel import Buffer, as_bytes
from ._options import Settings
from ._processes import reset
from ._sockops import OverlappedSocket, adopt_socket
from .connection import Connection

if TYPE_CHECKING:
    from ._acceptor import Accepted
    from ._lifetime import Home
    from ._processes import Processes

log = logging.getLogger("iocp_ctypes")


class Handover:
    """A part of Server."""

    _counts: Any
    _connections: dict[int, Connection]
    _handler: Any
    _home: Home | None
    _hosts: Any
    _lock: Any
    _open: int
    _peak: int
    _processes: Processes | None
    _settings: Settings
    _stopping: bool

    if TYPE_CHECKING:
        _gone_one: Any

        def _release(self, what: str) -> None: ...
        def _refill_soon(self) -> None: ...
        def _leave_host(self, peer: Address) -> None: ...
        def _hook_failed(self, exc: BaseException, what: str) -> None: ...

    def take_socket(self, sock: socket.socket, peer_address: Address) -> bool:
        """Override to take a connection away before this server serves it.

        For example to another process: `pipe.send(sock.share(pid))` here, `socket.fromshare` and
        `Server.adopt` there. It has been accepted and verified, and belongs to no completion port yet.

        Args:
            sock: the connection, as a plain blocking socket.
            peer_address: whose it is.

        Returns:
            True: it is yours, and yours to close. False: it is served here.

        On an I/O thread: do not block. Not called for pipes, and not to be had with `accept_data`.
        """
        return False

    def _was_taken(self, sock: Accepted, peer: Address, first: bytes) -> Accepted | None:
        """Offer a connection to `take_socket` and worker processes; what is still to be served."""
        offered = type(self).take_socket is not Handover.take_socket
        if not (offered or self._processes) or not isinstance(sock, OverlappedSocket):
            return sock
        local, raw, proactor = sock.local_raw, sock.peer_raw, sock._proactor
        plain = sock.release()
        taken: Any = offered
        counted = "handed_over"
        try:
            taken = offered and self.take_socket(plain, peer)
        except BaseException as exc:
            self._hook_failed(exc, f"take_socket raised for {format_address(peer)}, which is refused")
            plain.close()
            counted = "refused"
        if taken:
            self._leave_host(peer)
            self._release(counted)
            return None
        if self._processes is not None:
            if not self._processes.give(plain, peer, first):
                reset(plain)
                self._leave_host(peer)
                self._release("refused")
            return None
        family = int(plain.family)
        back = OverlappedSocket(plain.detach(), family, proactor)
        back.local_raw, back.peer_raw = local, raw
        return back

    def adopt(self, sock: socket.socket, data: Buffer = b"") -> Connection:
        """Serve a connected socket as if it had been accepted here.

        Args:
            sock: an IPv4 or IPv6 stream socket that is connected; it is taken over, and closed for its owner.
                Not one that belongs to another completion port: that is for life (but see
                `Connection.detach`).
            data: bytes that were received from it already, which on_data gets first.

        Returns:
            The connection; on_connect follows, on an I/O thread.

        Raises:
            TypeError, ValueError: not such a socket. OSError: it has another completion port. In these cases
            it stays yours. ConnectionError: its peer is gone. RuntimeError: the server is not running, or its
            handler made no connection (the log says why).

        It counts like others, but neither `verify_request` nor a cap of connections refuses it. Any thread;
        never blocks.
        """
        home, first = self._home, as_bytes(data)
        if home is None or not self._admit_unless_stopping():
            raise RuntimeError("adopt(): the server is not running")
        settings, adopted = self._settings, None
        try:
            adopted = adopt_socket(sock, home.engine.proactor, home.engine.port)
            set_options(adopted, settings)
        except BaseException:
            if adopted is not None:
                adopted.close()
            self._give_up()
            raise
        peer = parse_sockaddr(adopted.peer_raw)
        assert peer is not None  # it was read a moment ago
        with self._lock:
            self._peak = max(self._peak, self._open)
            self._hosts[peer[0]] += 1
        connection = self._make(peer, adopted, settings)
        if connection is None:
            raise RuntimeError("adopt(): the handler made no connection; the log says why")
        stopping = self._enrol(connection)
        home.engine.dispatcher.call_soon(functools.partial(self._begin_with, connection, first, stopping))
        return connection

    def _admit_unless_stopping(self) -> bool:
        """Count one more, unless `stop` counts down already, which would wait for it or miss it."""
        with self._lock:
            if not self._stopping:
                self._open += 1
            return not self._stopping

    def _give_up(self) -> None:
        """Uncount what was to be adopted. On any thread."""
        with self._gone_one:
            self._open -= 1
            self._gone_one.notify_all()
        self._refill_soon()

    def _enrol(self, connection: Connection) -> bool:
        """Put a new connection into the table; whether the server is stopping."""
        with self._lock:
            self._connections[connection.id] = connection
            self._counts["accepted"] += 1
            return self._stopping

    def _begin_with(self, connection: Connection, first: bytes, stopping: bool) -> None:
        """Begin a connection's callbacks. On an I/O thread."""
        connection._start(first)
        if stopping:  # it came while stop() was counting: it is told as well
            connection._shutdown()

    def _make(self, peer: Address, sock: Accepted, settings: Settings) -> Connection | None:
        """Have the handler make a connection and give it its socket.

        Where that cannot be, the socket is reset and released. What the connection's class has in the place
        of a name of ours fails when the socket is given, and is the handler's mistake as well.
        """
        try:
            connection: Any = self._handler(self, peer)
            if not isinstance(connection, Connection):
                raise TypeError(f"the handler returned {connection!r}, which is no Connection")
            if hasattr(connection, "_state"):
                raise ValueError(f"the handler returned {connection!r} a second time: each needs its own")
            made: Connection = connection
            made._attach(self, self._home, sock, settings, peer)
            return made
        except BaseException as exc:
            self._hook_failed(exc, f"the handler could not make a connection for {format_address(peer)}")
            sock.reset_on_close()
            sock.close()
            self._leave_host(peer)
            self._release("handler_failed")
            return None


def set_options(sock: Accepted, settings: Settings) -> None:
    """Set the options of a connection's socket; OSError where the peer is gone."""
    sock.set_nodelay(settings.nodelay)
    if settings.keepalive is not None:
        sock.set_keepalive(settings.keepalive)


def check_taking(server: Handover, settings: Settings) -> None:
    """Raise ValueError where bytes that came with an accept would be lost."""
    if settings.accept_data and type(server).take_socket is not Handover.take_socket:
        raise ValueError(
            f"accept_data={settings.accept_data}: must be 0 where take_socket is overridden, which gets none"
            " of them"
        )


def check_handler(handler: Any) -> Any:
    """Return what can make connections; TypeError for all else."""
    good = issubclass(handler, Connection) if isinstance(handler, type) else callable(handler)
    if not good:
        raise TypeError(
            f"handler={handler!r}: must be a subclass of Connection, or a function of (server, peer_address)"
        )
    return handler

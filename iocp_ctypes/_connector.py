"""L5: Connector, the way from a name to a connected socket.

Laws
1. Names are looked up on a thread of their own, never on an I/O thread.
2. The addresses of a name are tried in turn, families interleaved, a new attempt every STAGGER seconds or
   as soon as one fails (RFC 8305); the first that connects wins, the others are cancelled, and their
   packets awaited.
3. `done` is called exactly once, on an I/O thread, when no more attempt can win: with a socket, or with why
   not. It stands in for the socket of a connection until then: `cancel` and `close` are what a closing
   connection calls.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ._addresses import Address, format_address, interleave
from ._errors import ERROR_OPERATION_ABORTED, error_from_code, error_from_status, winsock_code
from ._proactor import COMPLETED, PENDING, Operation
from ._sockops import OverlappedSocket, open_socket

if TYPE_CHECKING:
    from ._deadlines import Deadline
    from .engine import Engine

#: Seconds between two attempts (RFC 8305 section 5 recommends 250 ms).
STAGGER: Final = 0.25
#: Addresses of one name that are tried at the most.
ATTEMPTS_MAX: Final = 16

Done = Callable[[OverlappedSocket | None, OSError | None], None]


class Connector:
    """One connecting; thread-safe, nothing blocks."""

    local_raw = b""  # what a connection asks its socket for, while there is none

    def __init__(
        self, engine: Engine, address: Address, local: Address | None, timeout: float | None, done: Done
    ) -> None:
        """Prepare; `start` begins."""
        self._engine = engine
        self._address = address
        self._local = local
        self._timeout = timeout
        self._done: Done | None = done
        self._lock = threading.Lock()
        self._waiting: list[tuple[int, Address]] = []
        self._attempts: dict[int, OverlappedSocket] = {}  # by the address of the operation
        self._winner: OverlappedSocket | None = None
        self._error: OSError | None = None
        self._over = False  # no further attempt begins
        self._resolving = True
        self._timer: Deadline | None = None

    def start(self) -> None:
        """Begin: look the name up, then connect."""
        if self._timeout is not None:
            self._timer = self._engine.watchdog.later(self._timeout, self._timed_out)
        self._engine.resolve(self._look_up)

    # -- what a closing connection calls in place of its socket ---------------------------------------------

    def cancel(self) -> None:
        """Give up; `done` follows."""
        self._give_up(error_from_code(ERROR_OPERATION_ABORTED, "connecting was cancelled"))

    def close(self) -> None:
        """Nothing is left to close."""

    def reset_on_close(self) -> None:
        """Nothing is connected that could be reset."""

    def shutdown_send(self) -> None:
        """Nothing is connected that could be shut down."""

    # -- the way --------------------------------------------------------------------------------------------

    def _look_up(self) -> None:
        """Ask the name service. On a resolver thread; blocks."""
        host, port = self._address[0], self._address[1]
        places: list[tuple[int, Address]] = []
        error: OSError | None = None
        try:
            for family, _type, _protocol, _name, sockaddr in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            ):
                place = (int(family), tuple(sockaddr))
                if family in (socket.AF_INET, socket.AF_INET6) and place not in places:
                    places.append(place)
        except OSError as exc:
            error = OSError(exc.errno, f"cannot look up {host!r}: {exc.strerror or exc}")
        with self._lock:
            self._resolving = False
            self._waiting = [] if self._over else interleave(places)[:ATTEMPTS_MAX]
            if not places and self._error is None:
                self._error = error or OSError(errno.EADDRNOTAVAIL, f"{host!r} has no address")
        self._next()

    def _next(self) -> None:
        """Begin the next attempt, and arrange for the one after it."""
        with self._lock:
            while self._waiting and not self._over:
                family, address = self._waiting.pop(0)
                if self._attempt(family, address):
                    break
            if self._waiting and not self._over:
                self._engine.watchdog.later(STAGGER, self._next)
        self._conclude()

    def _attempt(self, family: int, address: Address) -> bool:
        """Issue one ConnectEx; False where that failed at once. Needs the lock."""
        engine = self._engine
        try:
            sock = open_socket(family, self._local, engine.proactor, engine.port)
        except OSError as exc:
            self._error = self._error or exc
            return False
        if address[0] in ("127.0.0.1", "::1"):
            sock.refuse_fast()
        operation = Operation()
        self._attempts[operation.address] = sock
        code = sock.connect(operation, self._retired, address)
        if code == COMPLETED:
            engine.dispatcher.completed(operation.address, 0)
            return True
        if code == PENDING:
            return True
        del self._attempts[operation.address]
        sock.close()
        self._error = self._error or error_from_code(code, f"cannot connect to {format_address(address)}")
        return False

    def _retired(self, operation: Operation, _transferred: int, status: int) -> None:
        """Retire a ConnectEx. On an I/O thread."""
        with self._lock:
            sock = self._attempts.pop(operation.address)
            if self._over or status:
                sock.close()
                if status and winsock_code(status) != ERROR_OPERATION_ABORTED:
                    where = f"cannot connect to {format_address(self._address)}"
                    self._error = self._error or error_from_status(status, where)
            else:
                try:
                    sock.finish_connect()
                except OSError as exc:
                    self._error = self._error or exc
                    sock.close()
                else:
                    self._winner = sock
                    self._stop()
            more = bool(self._waiting)
        if more:
            self._next()
        else:
            self._conclude()

    def _stop(self) -> None:
        """Begin no further attempt, cancel the others. Needs the lock."""
        self._over = True
        self._waiting.clear()
        for sock in self._attempts.values():
            sock.cancel()

    def _timed_out(self) -> None:
        where = format_address(self._address)
        self._give_up(
            TimeoutError(errno.ETIMEDOUT, f"{where} did not answer within timeout={self._timeout:g} s")
        )

    def _give_up(self, error: OSError) -> None:
        with self._lock:
            if self._over:
                return
            self._error = error
            self._stop()
        self._conclude()

    def _conclude(self) -> None:
        """Call `done` once there is a winner, or nothing is left that could win."""
        with self._lock:
            winner, error = self._winner, self._error
            if self._done is None or (
                winner is None and (self._attempts or self._waiting or self._resolving)
            ):
                return
            done, self._done = self._done, None
            timer, self._timer = self._timer, None
        if timer is not None:
            self._engine.watchdog.cancel(timer)
        self._engine.dispatcher.call_soon(lambda: done(winner, None if winner else error))

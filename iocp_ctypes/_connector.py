"""L5: Connector, the way from a name to a connected socket.

Laws
1. Names are looked up on a thread of their own, never on an I/O thread; a numeric address needs no look-up
   and no thread.
2. The addresses of a name are tried in turn, families interleaved, a new attempt STAGGER seconds after the
   last one began or as soon as one fails (RFC 8305); the first that connects wins, the others are cancelled.
   A fixed local port is only one attempt's at a time: there the next begins when the one before is closed,
   which gives way after its share of the time there is.
3. `done` is called exactly once, on an I/O thread: with a socket as soon as there is one, or with why not
   once no attempt is in flight. After a time-out or a cancel a look-up is not waited for: it may take long.
4. Success and giving up meet under the lock, the first wins. A socket whose attempt came too late is closed
   when its packet is retired, never before.
5. It stands in for the socket of a connection: `cancel` and `close` are what a closing connection calls.
   Locks are taken in the order connection, connector, watchdog.
"""

from __future__ import annotations

import errno
import functools
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ._addresses import Address, format_address, interleave, numeric_family
from ._errors import ERROR_OPERATION_ABORTED, error_from_code
from ._options import KeepAlive
from ._proactor import COMPLETED, PENDING, Operation
from ._sockops import OverlappedSocket, error_code, open_socket

if TYPE_CHECKING:
    from ._deadlines import Deadline
    from .engine import Engine

#: Seconds between two attempts (RFC 8305 section 5 recommends 250 ms).
STAGGER: Final = 0.25
#: Addresses of one name that are tried at the most.
ATTEMPTS_MAX: Final = 16
#: The code of a refused connection.
WSAECONNREFUSED: Final = 10061

Place = tuple[int, Address]  # a family and a numeric address
Done = Callable[[OverlappedSocket | None, OSError | None], None]


class Connector:
    """One connecting; thread-safe, nothing blocks."""

    local_raw = b""  # what a connection asks its socket for, while there is none
    receives_at_once = receives_by_packet = sends_at_once = sends_by_packet = 0
    half_closes = True

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
        self._waiting: list[Place] = []
        self._attempts: dict[int, OverlappedSocket] = {}  # by the address of the operation
        self._winner: OverlappedSocket | None = None
        self._error: OSError | None = None
        self._over = False  # no further attempt begins
        self._resolving = True
        self._timer: Deadline | None = None
        self._stagger: Deadline | None = None
        #: What stands in for a socket while its operations are recorded; set before `start`.
        self.traced: Callable[[Any], Any] | None = None

    def start(self) -> None:
        """Begin: look the name up, then connect."""
        if self._timeout is not None:
            with self._lock:
                self._timer = self._engine.watchdog.later(self._timeout, self._timed_out)
        family = numeric_family(self._address[0])
        if family is None:
            self._engine.resolve(self._look_up)
        else:
            self._found([(family, self._address)], None)

    # -- what a closing connection calls in place of its socket ---------------------------------------------

    def cancel(self) -> None:
        """Give up; `done` follows."""
        self._give_up(error_from_code(ERROR_OPERATION_ABORTED, "connecting was cancelled"))

    def close(self) -> None:
        """Nothing is left to close."""

    def reset_on_close(self) -> None:
        """Nothing is connected that could be reset."""

    def set_nodelay(self, on: bool) -> None:
        """The connection sets its options once it is connected."""

    def set_keepalive(self, keepalive: KeepAlive) -> None:
        """The connection sets its options once it is connected."""

    # -- the way --------------------------------------------------------------------------------------------

    def _look_up(self) -> None:
        """Ask the name service. On a resolver thread; blocks."""
        if self._over:
            return
        host, port = self._address[0], self._address[1]
        places: list[Place] = []
        error: OSError | None = None
        try:
            for family, _type, _protocol, _name, sockaddr in socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            ):
                place = (int(family), tuple(sockaddr))
                if family in (socket.AF_INET, socket.AF_INET6) and place not in places:
                    places.append(place)
        except OSError as exc:
            kind = socket.gaierror if isinstance(exc, socket.gaierror) else OSError
            error = kind(exc.errno, f"cannot look up {host!r}: {exc.strerror or exc}")
        except Exception as exc:  # UnicodeError, ValueError: what cannot be a name at all
            error = socket.gaierror(socket.EAI_NONAME, f"cannot look up {host!r}: {exc}")
        self._found(places, error)

    def _found(self, places: list[Place], error: OSError | None) -> None:
        """The addresses to try are known."""
        local = self._local
        family = None if local is None else numeric_family(local[0])
        usable = [place for place in places if family in (None, place[0])]
        if not places:
            error = error or OSError(errno.EADDRNOTAVAIL, f"{self._address[0]!r} has no address")
        elif not usable:
            text = f"{self._address[0]!r} has no address of the family of local_address={local!r}"
            error = OSError(errno.EADDRNOTAVAIL, text)
        with self._lock:
            self._resolving = False
            if not self._over:
                self._waiting = interleave(usable)[:ATTEMPTS_MAX]
                self._error = error
        self._next()

    def _next(self) -> None:
        """Begin the next attempt, and arrange for the one after it."""
        with self._lock:
            self._quiet()
            sock: OverlappedSocket | None = None
            while self._waiting and not self._over and sock is None:
                family, address = self._waiting.pop(0)
                sock = self._attempt(family, address)
            if self._waiting and not self._over:
                watchdog = self._engine.watchdog
                if self._local is None or not self._local[1]:
                    self._stagger = watchdog.later(STAGGER, self._next)
                elif self._timer is not None and sock is not None:  # else as long as the system tries
                    share = (self._timer.due - watchdog.clock()) / (len(self._waiting) + 1)
                    give_way = functools.partial(self._give_way, sock, address)
                    self._stagger = watchdog.later(share, give_way)
        self._conclude()

    def _give_way(self, sock: OverlappedSocket, address: Address) -> None:
        """An attempt has had its share of the time: the next has its port as soon as it is closed."""
        with self._lock:
            if sock in self._attempts.values():
                text = f"{format_address(address)} did not answer in time"
                self._error = self._error or TimeoutError(errno.ETIMEDOUT, text)
                sock.cancel()

    def _quiet(self) -> None:
        """Forget when the next attempt was to begin. Needs the lock."""
        assert self._lock.locked()
        stagger, self._stagger = self._stagger, None
        if stagger is not None:
            self._engine.watchdog.cancel(stagger)

    def _attempt(self, family: int, address: Address) -> OverlappedSocket | None:
        """Issue one ConnectEx and return its socket; None where that failed at once. Needs the lock."""
        assert self._lock.locked()
        engine = self._engine
        try:
            sock = open_socket(family, self._local, engine.proactor, engine.port)
        except OSError as exc:
            self._error = self._error or exc
            return None
        if self.traced is not None:
            sock = self.traced(sock)
        if address[0] == "::1" or address[0].startswith("127."):
            sock.refuse_fast()
        operation = Operation()
        self._attempts[operation.address] = sock
        try:
            code = sock.connect(operation, self._retired, address)
        except OSError as exc:
            error: OSError | None = exc
        else:
            if code == COMPLETED:
                engine.dispatcher.completed(operation.address, 0)
            if code in (COMPLETED, PENDING):
                return sock
            error = error_from_code(code, f"cannot connect to {format_address(address)}")
        del self._attempts[operation.address]
        sock.close()
        self._error = self._error or error
        return None

    def _retired(self, operation: Operation, _transferred: int, status: int) -> None:
        """Retire a ConnectEx. On an I/O thread."""
        with self._lock:
            sock = self._attempts.pop(operation.address)
            if self._over or status:
                sock.close()
                if status and not self._over:
                    self._error = self._error or error_from_code(error_code(status), self._where)
            else:
                error = self._finish(sock)
                if error is None:
                    self._winner = sock
                    self._stop()
                else:
                    sock.close()
                    self._error = self._error or error
            more = bool(self._waiting)
        if more:
            self._next()
        else:
            self._conclude()

    def _finish(self, sock: OverlappedSocket) -> OSError | None:
        """Make a connected socket a full one, or say why it is not."""
        try:
            sock.finish_connect()
        except OSError as exc:
            return exc
        # A socket that was given the very port it connects to, where nobody listens, has met itself: TCP
        # allows that ("simultaneous open", RFC 9293 section 3.5), and no caller wants it.
        if sock.local_raw == sock.peer_raw:
            return error_from_code(WSAECONNREFUSED, self._where)
        return None

    @property
    def _where(self) -> str:
        return f"cannot connect to {format_address(self._address)}"

    def _stop(self) -> None:
        """Begin no further attempt, cancel the others. Needs the lock."""
        assert self._lock.locked()
        self._over = True
        self._waiting.clear()
        self._quiet()
        for sock in self._attempts.values():
            sock.cancel()

    def _timed_out(self) -> None:
        where = format_address(self._address)
        text = f"{where} did not answer within timeout={self._timeout:g} s"
        self._give_up(TimeoutError(errno.ETIMEDOUT, text))

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
            if self._done is None:
                return
            if winner is None and (self._attempts or self._waiting or (self._resolving and not self._over)):
                return
            done, self._done = self._done, None
            self.traced = None  # it refers to the connection, which may go on referring to us
            self._over = True
            timer, self._timer = self._timer, None
        if timer is not None:
            self._engine.watchdog.cancel(timer)
        self._engine.dispatcher.call_soon(lambda: done(winner, None if winner else error))
